"""Padding on the left in training, where one CUDA kernel runs a whole state-space mixer.

With `mamba_ssm` installed, Transformers' Mamba and Mamba-2 mixers train in one fused kernel. They set padding to zero
before it, but the convolution inside turns zeros into its bias, which the scan then takes for text: the first real
token starts from a state that depends on how much padding there was. Step by step the mixers mask again after the
convolution. So rows with padding on the left are kept from the fused kernel; the kernels of the steps are used.
Padding on the right comes after all that reads it and may stay fused.
"""

import sys
import weakref

import torch

from .fast_mixers_manticore import _MARK, FUSED, _install_module, _is_bound_to_kernel, hook_once
from .scan_manticore import _shared


def _has_kernel(module, name) -> bool:
    function = getattr(module, name, None)
    return function is not None and _is_bound_to_kernel(getattr(function, _MARK, function))


def _is_left_padded(mask: torch.Tensor | None) -> bool:
    if mask is None or mask.ndim != 2:
        return False
    # Which way to take must not depend on numbers in a compiled graph: step by step is right for all
    if torch.compiler.is_compiling():
        return True
    # Reading a number makes a GPU wait, and all layers are given the same mask: it is looked at once
    known = None if mask.is_inference() else getattr(_shared.local, "mask", None)
    if known is not None and known[0]() is mask and known[1] == mask._version:
        return known[2]
    found = _look(mask)
    if not mask.is_inference():
        _shared.local.mask = weakref.ref(mask), mask._version, found
    return found


def _look(mask: torch.Tensor) -> bool:
    return not mask[:, 0].all().item()


def _padded_in(module, args, kwargs):
    _shared.local.is_padded = module.training and _is_left_padded(kwargs.get("attention_mask"))


def _padded_out(module, args, output):
    _shared.local.is_padded = False


_padded_in._manticore_padding = True


def unfuse_padded(model: torch.nn.Module) -> int:
    """Makes mixers that train in a fused CUDA kernel read rows with padding on the left step by step.

    The hooks are plain functions of the module that they are given: they can be pickled and shared by copies.

    Args:
        model: a component or any module holding mixers; others are left alone.

    Returns:
        The number of mixers that have a fused kernel, none where no package with kernels is installed. Calling again
        adds no hooks.
    """
    count = 0
    for module in model.modules():
        homes = [sys.modules.get(cls.__module__) for cls in type(module).__mro__]
        home = next((home for home in homes if any(_has_kernel(home, name) for name in FUSED)), None)
        if home is None or not hasattr(module, "conv1d"):
            continue
        count += 1
        _install_module(home)
        hook_once(module, "_manticore_padding", _padded_in, _padded_out, with_kwargs=True)
    return count
