"""The dtype that components come in, and instances brought to it."""

import copy
import functools

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import local_torch_dtype
from transformers.pytorch_utils import Conv1D

from manticore_hf.modeling.bounds_manticore import build_component
from manticore_hf.modeling.dtypes_manticore import dtype_plan

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(component: object, files: list | None) -> torch.dtype:
    """The dtype that a component comes in, as Transformers' "auto" has it.

    Args:
        component: Its configuration, or an instance: the widest dtype of its tensors then, but for those that its class
            keeps in float32.
        files: Paths of its safetensors files, which tell where the configuration does not.
    """
    if not isinstance(component, torch.nn.Module):
        return component.dtype or _first_dtype(files)
    found = {component.dtype}
    if len({one.dtype for one in component.parameters() if one.is_floating_point()}) > 1:
        usual = _loaded_dtypes(type(component).__name__, component, component.dtype)
        found |= {one.dtype for key, one in component.named_parameters() if one.dtype != usual[key][0]}
    return functools.reduce(torch.promote_types, found)


def _first_dtype(files):
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():
                dtype = _DTYPES.get(handle.get_slice(key).get_dtype())
                if dtype is not None:
                    return dtype
    return torch.float32


def cast(what: str, component: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Gives an instantiated component, in place, the dtypes that it would have if it were loaded in `dtype`.

    `component.to(dtype)` would round what stays in float32, rotary angles for example. Those that were rounded by such
    a call before are computed anew.

    Args:
        what: How a message calls it.
        component: The causal LM.
        dtype: A floating point dtype of torch.

    Returns:
        The component.
    """
    if is_deepspeed_zero3_enabled():  # it holds the tensors in pieces
        return component.to(dtype)
    for key, (wanted, stored) in _loaded_dtypes(what, component, dtype).items():
        path, _, leaf = key.rpartition(".")
        module = component.get_submodule(path)
        own = getattr(module, leaf)
        if own.dtype == wanted or not own.is_floating_point():
            continue
        if leaf in module._parameters:
            own.data = own.data.to(wanted)
        elif stored:
            module._buffers[leaf] = own.to(wanted)
        else:
            _compute_anew(component, module, leaf, wanted)
    component.config.dtype = dtype
    return component


def _loaded_dtypes(what, component, dtype):
    """{name of a parameter or buffer: (its dtype in a component that is loaded in `dtype`, whether it is in files)}."""
    with torch.device("meta"), local_torch_dtype(dtype):
        twin = build_component(what, copy.deepcopy(component.config))
    plan, stored = dtype_plan(twin._get_dtype_plan(dtype)), set(twin.state_dict())
    tensors = (*twin.named_parameters(), *twin.named_buffers())
    return {key: (plan(key, one.dtype) if key in stored else one.dtype, key in stored) for key, one in tensors}


@torch.no_grad()
def _compute_anew(component, module, leaf, dtype):
    """A buffer that no checkpoint holds, as the component's class makes it when it loads."""
    rounded, others = module._buffers[leaf], [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    module._buffers[leaf] = fresh = torch.full_like(rounded, float("nan"), dtype=dtype)
    others = [one for one in others if one is not rounded and not hasattr(one, "_is_hf_initialized")]
    for one in others:  # Transformers' initialisation passes over tensors that have this mark
        one._is_hf_initialized = True
    try:
        component._init_weights(module)
    finally:
        for one in others:
            del one._is_hf_initialized
    if fresh.isnan().any():  # code of its own, which makes it elsewhere
        module._buffers[leaf] = rounded.to(dtype)


def transposed_maps(model: PreTrainedModel) -> list[str]:
    """Names of the linear maps that GPT-2 keeps transposed (`Conv1D`)."""
    return [key for key, one in model.named_modules() if type(one) is Conv1D]


def transpose_again(model: PreTrainedModel, names: list[str]) -> None:
    """Makes of plain linear maps, where they have these names, transposed ones again: checkpoints have no others."""
    for key in names:
        path, _, leaf = key.rpartition(".")
        plain = model.get_submodule(key)
        if isinstance(plain, nn.Linear):
            with torch.device("meta"):
                module = Conv1D(*plain.weight.shape)
            module.weight, module.bias = nn.Parameter(plain.weight.data.T.contiguous()), plain.bias
            setattr(model.get_submodule(path), leaf, module)
