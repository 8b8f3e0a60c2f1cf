"""Faster ways to run the selective scan that a published repo carries: numba's on a CPU, Triton's on a GPU.

Results are the same without them. They are registered by `import manticore_hf`, also for hybrids that run the code of
their repo, and imported when a scan first runs.
"""

from manticore_hf.modeling.scan_manticore import register_scan


def _with_numba(u, n, dtype):
    from manticore_hf.kernels.numba_scan import find_scan

    return find_scan(u, n, dtype)


def _with_triton(u, n, dtype):
    from manticore_hf.kernels.triton_scan import find_scan

    return find_scan(u, n, dtype)


def register() -> None:
    """Registers them for every copy of the scan in the process; again changes nothing."""
    register_scan("cpu", _with_numba)
    register_scan("cuda", _with_triton)
