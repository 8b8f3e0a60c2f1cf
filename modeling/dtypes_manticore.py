"""Which tensor of a hybrid has which dtype.

A hybrid has one dtype, `config.dtype`: its components' and its projectors'. Three things differ from it, and each for
its own reason: what a component's class keeps in float32 (Transformers' `_keep_in_fp32_modules`, of this component
only), buffers that no checkpoint holds (rotary angles), which are as in the component loaded alone, and the mixture
weights and the token gate, which are float32 always: a step of training is smaller than what a half precision number
resolves.
"""

import contextlib
import copy
import functools
import re

import torch
from safetensors import safe_open
from transformers.integrations import is_deepspeed_zero3_enabled

from .sizes_manticore import build_component

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

ALWAYS_FLOAT32 = ("alpha_logits", "token_gate.")
"""Beginnings of the names, within the mixer, of what is made in float32 there."""


class MixedDtypes:
    """Mixin of the hybrid classes, before PreTrainedModel."""

    @property
    def dtype(self):
        """The widest dtype of the parts; what `save_pretrained` states, and a later load takes."""
        found = [dtype for name, part in self.named_children() if (dtype := _dtype_of(name, part)) is not None]
        return functools.reduce(torch.promote_types, found)

    def _get_dtype_plan(self, dtype):
        # As in Transformers, but a component's patterns speak of that component alone ("norm" is in every family).
        plan = {}
        for name in self.config.component_names:
            for pattern, kept in self._modules[name]._get_dtype_plan(dtype).items():
                # Transformers replaces "*" by ".*", so that no other may stand here.
                plan[f"^{name}\\..{{0,}}(?:{pattern})"] = kept
        return plan

    def loaded_dtypes(self):
        """Function from the name of a tensor to the dtype that it has when what is saved now is loaded again."""
        dtype = self.dtype
        plan = _compiled(self._get_dtype_plan(dtype))
        return lambda name: plan(name, dtype)


def _dtype_of(name, part):
    """A part's own dtype: that of its first tensor of floating point that is not float32 whatever the rest is."""
    for key, one in part.named_parameters():
        if one.is_floating_point() and not (name == "hybrid_mixer" and key.startswith(ALWAYS_FLOAT32)):
            return one.dtype
    return None


@contextlib.contextmanager
def default_dtype(dtype):
    """Context in which new tensors have a dtype unless they say another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def stored_dtype(component, files):
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


def cast(what, component, dtype):
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
    with torch.device("meta"), default_dtype(dtype):
        twin = build_component(what, copy.deepcopy(component.config))
    plan, stored = _compiled(twin._get_dtype_plan(dtype)), set(twin.state_dict())
    tensors = (*twin.named_parameters(), *twin.named_buffers())
    return {key: (plan(key, one.dtype) if key in stored else one.dtype, key in stored) for key, one in tensors}


def convert_unpacked(model, tensors, own, rename, plan):
    """Converts, in place, what is not packed of a quantised hybrid's tensors.

    Transformers takes it as it is in the file, which is right where all was quantised at once. References have the
    dtype of their own repositories.

    Args:
        model: The hybrid, on the meta device or not.
        tensors: {checkpoint key: tensor or lazy slice}.
        own: Keys that are the hybrid's own, among which are packed ones.
        rename: The model's `Renamer`.
        plan: What `_get_dtype_plan` gave.
    """
    wanted, plan = model.state_dict(), _compiled(plan)
    for key, tensor in tensors.items():
        name, converted = rename(key)
        if name not in wanted or not wanted[name].is_floating_point():
            continue
        shape = tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
        if key not in own or (not converted and shape == tuple(wanted[name].shape)):
            tensors[key] = tensor[...].to(plan(name, wanted[name].dtype))


def _compiled(plan):
    """Function from a tensor's name to the dtype that a plan of Transformers' has for it, or else to a default."""
    plan = [(re.compile(key.replace("*", ".*")), kept) for key, kept in plan.items()]
    return lambda name, default: next((kept for pattern, kept in plan if pattern.search(name)), default)


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
