"""Faster ways to run what a published repo carries: the selective scan (in chunks; numba, Triton), convolutions on a
CPU, and mixtures of predictions.

Results are the same without them. They are registered by `import manticore_hf`, also for hybrids that run the code of
their repo, and numba and Triton are imported when a scan first runs.
"""

from manticore_hf.kernels.conv import causal_conv1d
from manticore_hf.kernels.mixture import LogMean, WeightedSum
from manticore_hf.kernels.scan import register_run, selective_scan
from manticore_hf.modeling.mixers_manticore import register_conv
from manticore_hf.modeling.mixture_manticore import register_mixtures
from manticore_hf.modeling.scan_manticore import register_scan


def _with_numba(u, n, dtype):
    from manticore_hf.kernels.numba_scan import find_scan

    return find_scan(u, n, dtype)


def _with_triton(u, n, dtype):
    from manticore_hf.kernels.triton_scan import find_scan

    return find_scan(u, n, dtype)


def register() -> None:
    """Registers them for every copy of the mixers in the process; again changes nothing."""
    register_run("cpu", _with_numba)
    register_run("cuda", _with_triton)
    register_scan(selective_scan)
    register_conv(causal_conv1d)
    register_mixtures(WeightedSum.apply, LogMean.apply)
