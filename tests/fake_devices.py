"""Devices that are not there, for tests of models on several: "maia:0", "maia:1", as strict as GPUs, with real values.

A tensor on one of them is a wrapper around one on the CPU; what operators compute is therefore right to the last bit.
An operator whose tensors are not all on one device fails, as a GPU's does; moves between devices are counted. Nothing
is faked in the code under test: accelerate's hooks, Transformers' loading and the caches see devices like any other.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ONE, TWO = "maia:0", "maia:1"
_CPU = torch.device("cpu")
_aten = torch.ops.aten
# Bindings of one tensor that ask for the device itself
_GUARDED = {"contiguous", "__invert__", "__bool__", "__int__", "__float__", "__index__", "item", "tolist"}
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
# As on GPUs, an index on the CPU may pick from a tensor elsewhere
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """A tensor on a device that is not there."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, device=None, requires_grad=False):
        if device is None:  # accelerate makes a new tensor of the class of the one that it replaces
            return torch.nn.Parameter(held, requires_grad)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
            requires_grad=requires_grad,
        )

    def __init__(self, held, device=None, requires_grad=False):
        if device is not None:
            self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def data_ptr(self):  # accelerate tells tied tensors by it
        return self.held.data_ptr()

    def __repr__(self):
        return f"Elsewhere({self.held!r}, {self.device})"


class FakeDevices(TorchDispatchMode):
    """While it is active, tensors can be made on, and moved to, the devices that are not there.

    Attributes:
        moves: (from, to) of every tensor with dimensions that was moved, in order.
        used: The devices that computed something.
    """

    def __init__(self):
        super().__init__()
        self.moves, self.used = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self)


class _PastTheDispatcher(TorchFunctionMode):
    """What torch's Python bindings do on a device before the dispatcher is asked."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "maia":
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        if name == "copy_":
            return _aten.copy_.default(*args, **kwargs)
        if name in _GUARDED and isinstance(args[0], Elsewhere):
            out = func(args[0].held, *args[1:], **kwargs)
            return Elsewhere(out, args[0].device) if isinstance(out, torch.Tensor) else out
        if name in ("__getitem__", "__setitem__") and any(isinstance(x, Elsewhere) for x in tree_flatten(args)[0]):
            return _pick(func, *args)
        return func(*args, **kwargs)


def _pick(func, tensor, index, *value):
    """`tensor[index]`, or `tensor[index] = value`."""
    home = tensor.device
    flat = [x for x in tree_flatten(index)[0] if isinstance(x, torch.Tensor)]
    given = {x.device for x in value if isinstance(x, torch.Tensor) and x.dim()}
    strangers = {x.device for x in flat} - {home, _CPU} | given
    if strangers - {home} or (home == _CPU and any(isinstance(x, Elsewhere) for x in flat)):
        raise RuntimeError(f"{func.__name__}: tensor on {home}, others on {sorted(map(str, strangers))}.")
    out = func(*tree_map(_held, (tensor, index, *value)))
    return Elsewhere(out, home) if isinstance(out, torch.Tensor) else out


def _held(x):
    if isinstance(x, slice):
        return slice(_held(x.start), _held(x.stop), _held(x.step))
    return x.held if isinstance(x, Elsewhere) else x


@contextlib.contextmanager
def fake_devices():
    """Makes the devices available, for inference; gives the FakeDevices. (Autograd asks a device for its streams.)"""
    with torch.no_grad(), FakeDevices() as mode, _PastTheDispatcher():
        yield mode


def _run(func, args, kwargs, mode=None):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    if func in _INDEXED:
        tensors = tensors[:1] + [x for x in tensors[1:] if x.device != _CPU]
    # A number on the CPU may go with tensors anywhere
    devices = {x.device for x in tensors if x.dim() or x.device != _CPU}
    wanted = kwargs.get("device")
    if func in _MOVES:
        target = args[0].device if func is _aten.copy_.default or wanted is None else torch.device(wanted)
        source = args[-1] if func is _aten.copy_.default else args[0]
        if mode is not None and source.dim() and source.device != target:
            mode.moves.append((str(source.device), str(target)))
    elif len(devices) > 1:
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, devices))}, and all must be on one device.")
    else:
        target = torch.device(wanted) if wanted is not None else next(iter(devices), _CPU)
        if mode is not None and devices:
            mode.used.add(str(target))
    if wanted is not None:
        kwargs = {**kwargs, "device": _CPU if target.type == "maia" else target}
    held = {id(x.held): x for x in tensors if isinstance(x, Elsewhere)}
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))

    def wrap(x):
        if not isinstance(x, torch.Tensor) or target.type != "maia":
            return x
        return held.get(id(x)) if id(x) in held else Elsewhere(x, target)

    return tree_map(wrap, out)
