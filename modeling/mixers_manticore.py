"""Mixers of state-space models, repaired one by one: what else the process runs is left alone.

Transformers' torch paths are slow, start every call of Mamba, FalconMamba and Jamba with several tokens from a zero
state even when the cache holds one, hand CPU tensors to CUDA kernels once `mamba_ssm` is importable, forget the limits
of Mamba-2's step sizes in calls with one token, and let padding on the left into fused training kernels.

A mixer's forward calls the functions that would have to differ as globals of its module. So every mixer of a hybrid
gets a forward of its own, as an attribute of the instance: the code of its class's forward with globals of its own, in
which those functions are ours. The two that miss an argument (the cached state, the limits) are given it there.
Mixers keep their type, and a plain model beside a hybrid runs what it always ran.
"""

import ast
import functools
import inspect
import linecache
import sys
import textwrap
import types
import warnings
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from transformers.activations import ACT2FN
from transformers.utils.import_utils import is_torchdynamo_exporting

from .carried_manticore import optional
from .dtypes_manticore import RAW, is_state_space
from .settings_manticore import ManticoreError

SCANS = ("mamba_selective_scan", "mamba2_chunk_scan")
FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")
"""Whole mixers in one kernel; Transformers' torch versions return None, and the mixer goes on step by step."""

_MISSING = {
    "mamba_selective_scan": ("initial_states", "None if {0} is None else {0}.get_recurrent_state(self.layer_idx)"),
    "mamba2_selective_state_update": ("dt_limit", "self.time_step_limit"),
}
"""Arguments that mixers do not give: name and value, where {0} is the forward's name for its cache."""


# What all copies of this file in the process share
_shared = sys.modules.setdefault("_manticore_mixers", types.ModuleType("_manticore_mixers"))


def register_conv(causal_conv1d: Callable) -> None:
    """Registers a faster convolution for CPUs: (x [batch, channels, time], weight, bias) -> [batch, channels, time]."""
    _shared.causal_conv1d = causal_conv1d


# ---------------------------------------------------------------------------------------------------------------------
# Which function runs. CUDA kernels stay in use where they are and take the numbers: they know no float64.


def _wrapped(function):
    """The function under what the package `kernels` makes of it, which is a module."""
    if isinstance(function, torch.nn.Module):
        inner = inspect.getclosurevars(type(function).forward).nonlocals.values()
        return next((one for one in inner if inspect.isfunction(one)), None)
    # Copies of this code from before 0.2 replace functions in Transformers' modules, and keep what was there
    return getattr(function, "_manticore_upstream", function)


def _implementation(function):
    """What Transformers bound to this function when its module was imported; None: it is not of that kind."""
    function = _wrapped(function)
    return inspect.getclosurevars(function).nonlocals.get("implementation") if inspect.isfunction(function) else None


def plain_of(function: Callable) -> Callable:
    """Transformers' torch version."""
    return inspect.unwrap(_wrapped(function))


def has_kernel(function: Callable) -> bool:
    """Tells whether a kernel runs in a function's place: of an installed package, or one that `use_kernels` brought."""
    if isinstance(function, torch.nn.Module):
        own = vars(function).get("forward")
        if own is not None and getattr(own, "__func__", own) is not type(function).forward:
            return True
    bound = _implementation(function)
    return bound is not None and bound is not plain_of(function)


def _is_packed(kwargs: dict) -> bool:
    return kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None


def _kernel_takes(tensor: torch.Tensor) -> bool:
    # Fake tensors, on which components are looked at, say that they are on the GPU: a kernel would write to no memory
    return tensor.is_cuda and tensor.dtype != torch.float64 and not isinstance(tensor, FakeTensor)


def is_for_kernel(tensor: torch.Tensor, kwargs: dict) -> bool:
    """Whether a call is a kernel's, if there is one, or gets the error for sequences packed without one."""
    return _kernel_takes(tensor) or _is_packed(kwargs)


def _must_trace() -> bool:
    return torch.jit.is_tracing() or is_torchdynamo_exporting()


def leave_to(upstream: Callable, plain: Callable, tensor: torch.Tensor, kwargs: dict) -> Callable | None:
    """The version of Transformers' that must run instead of ours, or None."""
    if is_for_kernel(tensor, kwargs):
        return upstream
    return None if tensor.device.type == "cpu" and not _must_trace() else plain


# ---------------------------------------------------------------------------------------------------------------------
# Our functions. Each is made for the one it replaces, and has its arguments and those of _MISSING.


def _make_scan(upstream):
    plain, kernel, selective_scan = plain_of(upstream), has_kernel(upstream), optional("scan_manticore").selective_scan

    def mamba_selective_scan(
        hidden_states,
        dt,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
        use_mambapy=False,
        use_associative_scan=False,
        initial_states=None,
        **kwargs,
    ):
        other = None
        if _is_packed(kwargs) or (initial_states is None and kernel and _kernel_takes(hidden_states)):
            other = upstream  # a CUDA kernel, or the error for sequences packed without one
        elif initial_states is None and _must_trace():
            other = plain  # the exported graph must run where our operator is not registered
        if other is not None:
            kwargs |= {"use_mambapy": use_mambapy, "use_associative_scan": use_associative_scan}
            kwargs |= {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
            return other(hidden_states, dt, A, B, C, return_last_state=return_last_state, **kwargs)
        # Types follow upstream's torch path: dt in its own type, the state in at least float32, y in the input's type
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        if delta_softplus:
            dt = F.softplus(dt)
        y, last_state = selective_scan(hidden_states, dt, A, B, C, initial_states)
        y = y.to(hidden_states.dtype)
        if D is not None:
            y = y + hidden_states * D[None, :, None]
        if z is not None:
            y = y * F.silu(z)
        return (y, last_state) if return_last_state else y

    return mamba_selective_scan


def _make_conv(upstream):
    plain = plain_of(upstream)

    def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
        other = leave_to(upstream, plain, hidden_states, kwargs)
        other = plain if other is None and not hasattr(_shared, "causal_conv1d") else other
        if other is not None:
            strides = hidden_states.stride()
            if strides[1] == 1 and (strides[0] % 8 or strides[2] % 8):
                hidden_states = hidden_states.contiguous()  # causal-conv1d raises on such strides
            # By name: what comes fourth in causal-conv1d is no activation
            return other(hidden_states, weight, bias=bias, activation=activation, **kwargs)
        y = _shared.causal_conv1d(hidden_states, weight, bias)
        return (y if activation is None else ACT2FN[activation](y)).to(hidden_states.dtype)

    return causal_conv1d_fn


def _make_guard(upstream):
    """A function that a kernel may run in place of: tensors elsewhere get Transformers' torch version.

    So does FalconMamba's fused mixer, which normalises step sizes after they are projected, and in every other way
    before.
    """
    plain = plain_of(upstream)

    def guard(*args, **kwargs):
        tensor = args[0] if args else next(iter(kwargs.values()))
        takes = is_for_kernel(tensor, kwargs)
        return (upstream if takes and kwargs.get("dt_rms_weight") is None else plain)(*args, **kwargs)

    return guard


# What is replaced: how ours is made, and what a user loses where upstream's has other parameters than ours.
_SLOW = "Without CUDA kernels the model will be slow"
_FAST = {
    "mamba_selective_scan": (_make_scan, f"{_SLOW}, and calls with several tokens cannot continue from a cache."),
    "mamba2_chunk_scan": (lambda function: optional("ssd_manticore").make_chunk_scan(function), f"{_SLOW}."),
    "mamba2_selective_state_update": (
        lambda function: optional("ssd_manticore").make_step(function),
        "Models that limit their step sizes decode with a cache differently than without.",
    ),
    "causal_conv1d_fn": (_make_conv, f"{_SLOW}."),
}
_warned = set()


def _takes_ours(home, name, function, ours) -> bool:
    """Whether a function is the one that ours replaces; if not, that is said once."""
    added = _MISSING.get(name, ("",))[0]
    expected = " ".join(one for one in inspect.signature(ours).parameters if one != added)
    try:
        signature = " ".join(inspect.signature(plain_of(function)).parameters)
    except (TypeError, ValueError):
        signature = None
    if signature != expected and (home, name) not in _warned:
        _warned.add((home, name))
        warnings.warn(
            f"{home}.{name} has the signature ({signature}) instead of the expected ({expected}): it is left in place. "
            f"{_FAST[name][1]} Use a Transformers version this was tested on.",
            stacklevel=4,
        )
    return signature == expected


# ---------------------------------------------------------------------------------------------------------------------
# A forward with globals of its own.


def _called(forward) -> tuple:
    """(name, function, whether a kernel runs in its place) of the globals of this kind that a forward calls."""
    forward = inspect.unwrap(forward)
    if not inspect.isfunction(forward):
        return ()
    home = {name: forward.__globals__[name] for name in forward.__code__.co_names if name in forward.__globals__}
    return tuple((k, f, has_kernel(f)) for k, f in home.items() if k in _FAST or _implementation(f) is not None)


def _replacements(home, called) -> dict:
    """{name: our function}, of a mixer's module called `home`."""
    scans, found = any(name in SCANS for name, _, _ in called), {}
    for name, function, kernel in called:
        if scans and name in _FAST:
            ours = _FAST[name][0](function)
            if _takes_ours(home, name, function, ours):
                found[name] = ours
        elif kernel or isinstance(function, torch.nn.Module):  # `use_kernels` may bring that one a kernel later
            found[name] = _make_guard(function)
    return found


def _complete(forward, names):
    """The code of a forward whose calls of these functions are given the arguments of _MISSING, and what was given.

    Calls in a loop (Zamba scans head by head) are left as they are.
    """
    file, first = forward.__code__.co_filename, forward.__code__.co_firstlineno - 1
    # inspect.getsource would look through every module of the process for the file's
    lines = inspect.getblock(linecache.getlines(file, forward.__globals__)[first:])
    tree = ast.parse("\n" * first + textwrap.dedent("".join(lines)))  # line numbers are the file's
    cache = next((name for name in ("cache", "cache_params") if name in inspect.signature(forward).parameters), None)
    nodes, given = list(ast.walk(tree)), set()
    loops = [node for node in nodes if isinstance(node, (ast.For, ast.While))]
    looped = {id(node) for loop in loops for node in ast.walk(loop)}
    for node in nodes:
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        if name in names and id(node) not in looped:
            argument, value = _MISSING[name]
            if argument not in [keyword.arg for keyword in node.keywords]:
                added = ast.parse("\n" * (node.lineno - 1) + f"_({argument}={value.format(cache)})", mode="eval")
                node.keywords += added.body.keywords
            given.add(name)
    tree.body[0].decorator_list = []
    code = compile(tree, file, "exec", forward.__code__.co_flags & _FUTURES, dont_inherit=True)
    return next(one for one in code.co_consts if getattr(one, "co_name", None) == forward.__name__), given


_FUTURES = 0x1FF0000  # the flags of `from __future__ import`


def _rebuild(forward, code, own):
    """A forward's decorators around a function with this code and these globals."""
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        out = types.FunctionType(code, own, forward.__name__, forward.__defaults__, forward.__closure__)
        out.__kwdefaults__, out.__qualname__ = forward.__kwdefaults__, forward.__qualname__
        return out
    rebuilt = _rebuild(inner, code, own)
    cells = [
        types.CellType(rebuilt if cell.cell_contents is inner else cell.cell_contents) for cell in forward.__closure__
    ]
    out = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, tuple(cells)
    )
    out.__kwdefaults__, out.__wrapped__ = forward.__kwdefaults__, rebuilt
    return out


@functools.lru_cache(None)
def _ways(forward, called):
    """What a class's forward becomes: (forward, the same step by step or None, whether it scans, whether that goes on).

    Args:
        forward: The class's own.
        called: Its `_called`. None comes back where nothing of it is replaced.
    """
    inner = inspect.unwrap(forward)
    ours = _replacements(inner.__globals__.get("__name__"), called)
    if not ours:
        return None
    code, given, missing = inner.__code__, (), [name for name in _MISSING if name in ours]
    if missing:
        try:
            code, given = _complete(inner, missing)
        except (OSError, SyntaxError, IndexError, StopIteration) as error:
            warnings.warn(
                f"The source of {inner.__qualname__} cannot be read ({error}): calls with several tokens cannot go on "
                "from a cache, and limits of step sizes are not kept in decoding.",
                stacklevel=3,
            )
    # Without its name, by which torch.compile would look the functions up in Transformers' module
    home = {key: value for key, value in inner.__globals__.items() if key not in ("__name__", "__spec__", "__loader__")}
    whole, stepwise = _rebuild(forward, code, home | ours), None
    fused = {name: plain_of(function) for name, function, kernel in called if name in FUSED and kernel}
    if fused:
        stepwise = _rebuild(forward, code, home | ours | fused)
    scans = SCANS[0] in inner.__code__.co_names
    return whole, stepwise, scans, SCANS[0] in given


class OwnForward:
    """The forward of one mixer. It can be pickled, and copied with its mixer.

    Args:
        mixer: The mixer; `type(mixer).forward` is what this one is made of.
    """

    def __init__(self, mixer: torch.nn.Module) -> None:
        self.__setstate__(mixer)

    def __setstate__(self, mixer):
        # What is made of the class is made again here: a mixer that is being unpickled has no attributes yet
        self.mixer, forward = mixer, type(mixer).forward
        self.whole, self.stepwise, self.scans, self.continues = _ways(forward, _called(forward))

    def __reduce__(self):
        return object.__new__, (type(self),), self.mixer

    def __call__(self, *args, **kwargs):
        mixer = self.mixer
        if self.scans:
            args, kwargs = self._look_at_cache(args, kwargs)
        # Step by step mixers mask padding again after the convolution, where a fused one would take its bias for text
        padded = self.stepwise is not None and mixer.training and _is_left_padded(kwargs.get("attention_mask"))
        return (self.stepwise if padded else self.whole)(mixer, *args, **kwargs)

    def _look_at_cache(self, args, kwargs):
        names = ("cache", "cache_params")  # the old name, which mixers still take
        cache = next((kwargs[name] for name in names if name in kwargs), args[1] if len(args) > 1 else None)
        if cache is None:
            return args, kwargs
        tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
        if not self.continues and tokens > 1 and cache.get_recurrent_state(self.mixer.layer_idx) is not None:
            raise RuntimeError(
                f"{type(self.mixer).__name__} was given several tokens and a cached state that its scan does not take: "
                "the result would be silently wrong. Pass one token at a time, or use a Transformers version this was "
                "tested on."
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and mask.shape[1] > tokens:
            # A mask over the whole history would broadcast against one token, silently, and fail against several
            kwargs = {**kwargs, "attention_mask": mask[:, -tokens:]}
        return args, kwargs


_looked = [None]


def _is_left_padded(mask: torch.Tensor | None) -> bool:
    if mask is None or mask.ndim != 2:
        return False
    # Which way to take must not depend on numbers in a compiled graph: step by step is right for all
    if torch.compiler.is_compiling():
        return True
    if mask.is_inference():
        return _look(mask)
    # Reading a number makes a GPU wait, and all layers are given the same mask: it is looked at once
    known = _looked[0]
    if known is None or known[0]() is not mask or known[1] != mask._version:
        known = _looked[0] = weakref.ref(mask), mask._version, _look(mask)
    return known[2]


def _look(mask: torch.Tensor) -> bool:
    return not mask[:, 0].all().item()


def repair_mixers(model: torch.nn.Module) -> int:
    """Gives every state-space mixer of a model a forward of its own, see the head of this file.

    Nothing is added to parameters, buffers or modules; calling again changes nothing but mixers that are new, copied
    one by one (`copy.copy`), or for which `use_kernels` has brought kernels since.

    Args:
        model: A component, or any module; what holds no mixer is left alone.

    Returns:
        The number of mixers that have a forward of their own.
    """
    count, known = 0, {}
    for module in model.modules():
        forward = type(module).forward
        if forward not in known:
            known[forward] = _ways(forward, _called(forward))
        if known[forward] is None:
            continue
        # Under accelerate's hooks, which run what they found as the module's forward
        place = "_old_forward" if "_hf_hook" in vars(module) and "_old_forward" in vars(module) else "forward"
        present = vars(module).get(place)
        if type(present).__name__ == OwnForward.__name__:  # this copy's of the file, or another's
            is_old = present.mixer is not module or (type(present) is OwnForward and present.whole != known[forward][0])
        else:  # a forward that somebody else gave the instance stays
            is_old = present is None or getattr(present, "__func__", None) is forward
        if is_old:
            setattr(module, place, OwnForward(module))
        count += 1
    return count


def check_adapted(model: torch.nn.Module) -> None:
    """Raises ManticoreError where PEFT has wrapped what mixers read raw, which would train on some machines only."""
    for key, module in model.named_modules():
        parent, _, leaf = key.rpartition(".")
        if hasattr(module, "base_layer") and leaf in RAW and is_state_space(model.get_submodule(parent)):
            raise ManticoreError(
                f"PEFT has wrapped {key!r}, which Mamba reads raw or inside a fused kernel: its adapter would get no "
                "gradient on some machines, silently. Load the hybrid again, and adapt it with lora_config(model)."
            )


def follow_kernels(model: torch.nn.Module) -> None:
    """Lets mixers use the kernels that `use_kernels=True` has brought from the Hub, and names what it has not brought.

    Args:
        model: A hybrid, after Transformers' `set_use_kernels(True)`.
    """
    repair_mixers(model)
    forwards = {type(module).forward for module in model.modules()}
    called = {name: kernel for forward in forwards for name, _, kernel in _called(forward)}
    lacking = sorted(name for name, kernel in called.items() if not kernel)
    if lacking:
        device = next(model.parameters()).device.type
        warnings.warn(
            f"use_kernels=True: the Hub gave no kernel for {', '.join(lacking)} on this machine (device {device}); "
            "they run without one.",
            stacklevel=3,
        )
