"""Components on different devices (`device_map`, or moved by hand): where a module computes, and moving states there.

accelerate's hooks move what a module is called with, and bring weights that are offloaded (to the CPU's memory or a
disk) while it runs. A hybrid calls more than modules: stacks through their segments, mixtures of several components'
states. What is read or called past a hook is placed here. In a graph that is being compiled nothing is moved.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations import deepspeed

from .settings_manticore import ManticoreError


def check_whole_rows() -> None:
    """Raises ManticoreError where accelerate gives each process a part of every row."""
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    how = None if state is None else state._shared_state.get("parallelism_config")
    for size in ("cp_size", "sp_size"):
        if getattr(how, size, 1) > 1:
            raise ManticoreError(
                f"parallelism_config has {size}={getattr(how, size)}: each process would get a part of every row, and "
                f"recurrent states are not passed on between them. Set {size}=1 (tp_size and data parallelism work)."
            )


def hooks_of(module: nn.Module) -> tuple:
    """accelerate's hooks on a module, in order."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """`next(module.parameters(), None)`, in a tenth of the time: every step of decoding asks a dozen times."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    found = (first_parameter(child) for child in module._modules.values() if child is not None)
    return next((parameter for parameter in found if parameter is not None), None)


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module computes: not where its weights are while they are offloaded. None: nothing to say.

    Each process of a distributed run has one device, and its weights may be elsewhere between calls (where FSDP and
    ZeRO offload them): only accelerate's hooks are asked there.
    """
    if torch.compiler.is_compiling():
        return None
    first = first_parameter(module)
    if first is not None and first.device.type != "meta" and not hooks_of(module):
        return None if torch.distributed.is_available() and torch.distributed.is_initialized() else first.device
    for part in module.modules():
        for hook in hooks_of(part):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
    return None if first is None else first.device


def place(value: Any, device: torch.device | None) -> Any:
    """A tensor, or the tensors in lists, tuples and dicts, on a device; None: as they are."""
    if device is None or torch.compiler.is_compiling():
        return value
    if isinstance(value, dict):
        return {key: place(one, device) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(place(one, device) for one in value)
    return value.to(device) if isinstance(value, torch.Tensor) and value.device != device else value


def offloading(module: nn.Module) -> list:
    """The hooks on a module that bring its weights for the time of a call."""
    return [hook for hook in hooks_of(module) if getattr(hook, "offload", False)]


@contextlib.contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Brings the offloaded tensors of these modules (not of their children) while they are read past their forward."""
    hooked = [(hook, module) for module in modules for hook in offloading(module)]
    for hook, module in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook, module in reversed(hooked):
            hook.post_forward(module, ())


def present(model: nn.Module, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of a state dict's key, read from where it is offloaded to if it stands on the meta device for that."""
    if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
        path, _, name = key.rpartition(".")
        for hook in offloading(model.get_submodule(path)):
            if hook.weights_map is not None and name in hook.weights_map:
                return hook.weights_map[name]
    return tensor


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Models made in the block are whole, also where DeepSpeed's ZeRO-3 is set up.

    Transformers would make each in parts there, whose tensors have no shape. A hybrid's components are built, cut and
    measured one by one, so it is made whole, on every process, and the Trainer distributes it.
    """
    held = deepspeed._hf_deepspeed_config_weak_ref if deepspeed.is_deepspeed_zero3_enabled() else None
    if held is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
