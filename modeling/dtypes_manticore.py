"""Which tensor of a hybrid has which dtype.

A hybrid has one dtype, `config.dtype`: its components' and its projectors'. Three things differ from it, and each for
its own reason: what a component's class keeps in float32 (Transformers' `_keep_in_fp32_modules`, of this component
only), buffers that no checkpoint holds (rotary angles), which are as in the component loaded alone, and the mixture
weights and the token gate, which are float32 always: a step of training is smaller than what a half precision number
resolves.
"""

import contextlib
import functools
import re

import torch

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


def loaded_dtypes(model):
    """Function from the name of a tensor to the dtype that it has when what is saved now is loaded again."""
    dtype = model.dtype
    plan = dtype_plan(model._get_dtype_plan(dtype))
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
    wanted, plan = model.state_dict(), dtype_plan(plan)
    for key, tensor in tensors.items():
        name, converted = rename(key)
        if name not in wanted or not wanted[name].is_floating_point():
            continue
        shape = tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
        if key not in own or (not converted and shape == tuple(wanted[name].shape)):
            tensors[key] = tensor[...].to(plan(name, wanted[name].dtype))


def dtype_plan(plan):
    """Function from a tensor's name to the dtype that a plan of Transformers' has for it, or else to a default."""
    plan = [(re.compile(key.replace("*", ".*")), kept) for key, kept in plan.items()]
    return lambda name, default: next((kept for pattern, kept in plan if pattern.search(name)), default)
