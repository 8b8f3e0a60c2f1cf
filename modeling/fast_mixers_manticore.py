"""Fast paths for the mixers of state-space models, put into Transformers from outside.

Transformers' torch paths are slow, start every multi-token call of Mamba, FalconMamba and Jamba from a zero state even
when the cache holds one, hand CPU tensors to CUDA kernels once `mamba_ssm` is importable, and forget the limits of
Mamba-2's step sizes in calls with one token. `install`, `carry_state` and `limit_steps` repair the four through the
module globals that the mixers call: the selective scan (scan_manticore), the causal convolution (conv_manticore),
Mamba-2's chunked scan (ssd_manticore) and its step. CUDA kernels stay in use where they are and take the numbers: they
know no float64. `padding_manticore` keeps padded rows from fused ones.
"""

import importlib
import importlib.util
import inspect
import sys
import types
import warnings

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from transformers.activations import ACT2FN
from transformers.utils.import_utils import is_torchdynamo_exporting

from .conv_manticore import causal_conv1d
from .scan_manticore import _shared, selective_scan
from .ssd_manticore import chunk_scan

_MARK = "_manticore_upstream"
_SCAN_MIXERS = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")


# ---------------------------------------------------------------------------------------------------------------------
# Taking their place in Transformers.


def _modeling_module(model_type: str) -> types.ModuleType | None:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    name = model_type_to_module_name(model_type)
    try:
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ModuleNotFoundError:
        return None


def _is_bound_to_kernel(function) -> bool:
    """Tells whether Transformers bound a package's CUDA kernel to this function when its module was imported."""
    try:
        bound = inspect.getclosurevars(function).nonlocals
    except TypeError:
        return False
    return "implementation" in bound and bound["implementation"] is not inspect.unwrap(function)


def _is_packed(kwargs: dict) -> bool:
    return kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None


def _kernel_takes(tensor: torch.Tensor) -> bool:
    # Fake tensors, on which components are looked at, say that they are on the GPU: a kernel would write to no memory
    return tensor.is_cuda and tensor.dtype != torch.float64 and not isinstance(tensor, FakeTensor)


def _must_trace() -> bool:
    return torch.jit.is_tracing() or is_torchdynamo_exporting()


def _make_scan(upstream):
    plain, has_kernel = inspect.unwrap(upstream), _is_bound_to_kernel(upstream)

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
        **kwargs,
    ):
        state, other = getattr(_shared.local, "state", None), None
        if _is_packed(kwargs) or (state is None and has_kernel and _kernel_takes(hidden_states)):
            other = upstream  # a CUDA kernel, or the error for sequences packed without one
        elif state is None and _must_trace():
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
        _shared.local.state = None  # taken: whatever is left when the mixer returns is an error
        y, last_state = selective_scan(hidden_states, dt, A, B, C, state)
        y = y.to(hidden_states.dtype)
        if D is not None:
            y = y + hidden_states * D[None, :, None]
        if z is not None:
            y = y * F.silu(z)
        return (y, last_state) if return_last_state else y

    return mamba_selective_scan


def _leave_to(upstream, tensor, kwargs):
    """The version of Transformers' that must run instead of ours, or None."""
    if _kernel_takes(tensor) or _is_packed(kwargs):
        return upstream
    return None if tensor.device.type == "cpu" and not _must_trace() else inspect.unwrap(upstream)


def _make_conv(upstream):
    def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
        other = _leave_to(upstream, hidden_states, kwargs)
        if other is not None:
            strides = hidden_states.stride()
            if strides[1] == 1 and (strides[0] % 8 or strides[2] % 8):
                hidden_states = hidden_states.contiguous()  # causal-conv1d refuses such strides
            # By name: what comes fourth in causal-conv1d is no activation
            return other(hidden_states, weight, bias=bias, activation=activation, **kwargs)
        y = causal_conv1d(hidden_states, weight, bias)
        return (y if activation is None else ACT2FN[activation](y)).to(hidden_states.dtype)

    return causal_conv1d_fn


def _make_chunk_scan(upstream):
    def mamba2_chunk_scan(
        hidden_states,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        dt_bias=None,
        initial_states=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        **kwargs,
    ):
        other = _leave_to(upstream, hidden_states, kwargs)
        if other is not None:
            kwargs |= {"D": D, "dt_bias": dt_bias, "initial_states": initial_states, "dt_softplus": dt_softplus}
            kwargs |= {"dt_limit": dt_limit, "return_final_states": return_final_states}
            return other(hidden_states, dt, A, B, C, chunk_size, **kwargs)
        if dt_bias is not None:
            dt = dt + dt_bias.to(dt.dtype)
        if dt_softplus:
            dt = F.softplus(dt)
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
        y, last_state = chunk_scan(hidden_states, dt, A, B, C, initial_states)
        y = y.contiguous()  # some mixers (FalconH1) view it in another shape
        if D is not None:
            y = y + hidden_states.to(y.dtype) * D[:, None]
        return (y, last_state) if return_final_states else y

    return mamba2_chunk_scan


def _make_step(upstream):
    plain, has_kernel = inspect.unwrap(upstream), _is_bound_to_kernel(upstream)

    def mamba2_selective_state_update(
        state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
    ):
        use_kernel = has_kernel and (_kernel_takes(hidden_states) or _is_packed(kwargs))
        limits = getattr(_shared.local, "limits", None)
        if limits is not None:
            # All channels of a head have one step size, as a view that kernels recognise by its strides and we keep
            step = dt[..., 0].float() if use_kernel else dt[..., 0]  # as in the scan: kernels compute it in float32
            if dt_bias is not None:
                step = step + dt_bias[..., 0].to(step.dtype)
            if dt_softplus:
                step = F.softplus(step)
            dt = step.clamp(*limits)[..., None].expand_as(dt)
            # Zeros and no None: the kernel asks a bias for its strides
            dt_bias = None if dt_bias is None else step.new_zeros(1, 1).expand_as(dt_bias)
            dt_softplus = False
        other = plain if has_kernel and not use_kernel else upstream
        kwargs |= {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus}
        return other(state, hidden_states, dt, A, B, C, **kwargs)

    return mamba2_selective_state_update


# What is replaced: how ours is made, the parameters upstream must have, and what a user loses where it has others.
_SLOW = "Without CUDA kernels the model will be slow"
_FAST = {
    "mamba_selective_scan": (
        _make_scan,
        "hidden_states dt A B C D z delta_bias delta_softplus return_last_state use_mambapy use_associative_scan "
        "kwargs",
        f"{_SLOW}, and calls with several tokens cannot continue from a cache.",
    ),
    "mamba2_chunk_scan": (
        _make_chunk_scan,
        "hidden_states dt A B C chunk_size D dt_bias initial_states dt_softplus dt_limit return_final_states kwargs",
        f"{_SLOW}.",
    ),
    "mamba2_selective_state_update": (
        _make_step,
        "state hidden_states dt A B C D dt_bias dt_softplus z kwargs",
        "Models that limit their step sizes decode with a cache differently than without.",
    ),
    "causal_conv1d_fn": (_make_conv, "hidden_states weight bias activation kwargs", f"{_SLOW}."),
}
_SCANS = ("mamba_selective_scan", "mamba2_chunk_scan")


FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")
"""Whole mixers in one kernel; Transformers' torch versions return None, and the mixer goes on step by step."""


def _make_guard(upstream, is_fused):
    """Wraps a function that is bound to a CUDA kernel so that tensors elsewhere get Transformers' torch version.

    So do padded rows of a fused mixer, which can mask neither what its convolution makes of padding nor its steps; and
    FalconMamba's, which fused normalises step sizes after they are projected, and in every other way before.
    """
    plain = inspect.unwrap(upstream)

    def guard(*args, **kwargs):
        tensor = args[0] if args else next(iter(kwargs.values()))
        is_padded = getattr(_shared.local, "is_padded", False)
        is_wrong = is_fused and (is_padded or kwargs.get("dt_rms_weight") is not None)
        if (_kernel_takes(tensor) or _is_packed(kwargs)) and not is_wrong:
            return upstream(*args, **kwargs)
        return plain(*args, **kwargs)

    setattr(guard, _MARK, upstream)
    return guard


def _install_module(module: types.ModuleType) -> bool:
    with _shared.lock:
        replaced = _FAST if any(hasattr(module, name) for name in _SCANS) else {}
        for name, function in list(vars(module).items()):
            if name not in replaced and inspect.isfunction(function) and _is_bound_to_kernel(function):
                setattr(module, name, _make_guard(function, name in FUSED))
        found = [_replace(module, name) for name in replaced if hasattr(module, name)]
        return bool(found) and all(found)


def _replace(module, name) -> bool:
    current = getattr(module, name)
    if getattr(current, "_manticore_owner", None) == __name__:
        return True
    make, expected, loss = _FAST[name]
    # Another copy's dispatcher is replaced, never wrapped
    upstream = getattr(current, _MARK, current)
    try:
        signature = " ".join(inspect.signature(upstream).parameters)
    except (TypeError, ValueError):
        signature = None
    if signature != expected:
        warned = _shared.__dict__.setdefault("warned", set())
        if (module.__name__, name) not in warned:
            warned.add((module.__name__, name))
            warnings.warn(
                f"{module.__name__}.{name} has the signature ({signature}) instead of the expected ({expected}): it is "
                f"left in place. {loss} Use a Transformers version this was tested on.",
                stacklevel=4,
            )
        return False
    ours = make(upstream)
    setattr(ours, _MARK, upstream)
    ours._manticore_owner = __name__
    setattr(module, name, ours)
    return True


def install(model_type: str) -> bool:
    """Makes the mixers of one model type use our scan and convolution wherever no CUDA kernel applies.

    Also keeps tensors that are not on a CUDA device away from the CUDA kernels that Transformers binds on import.
    Idempotent and thread-safe; a second copy of this file replaces the first one's dispatcher. Model types without a
    scan of Mamba's or Mamba-2's kind, unknown ones included, are left alone.

    Args:
        model_type: `config.model_type` of a component, such as "mamba".

    Returns:
        Whether ours are in place. False after a warning if a function of Transformers' is not the one expected.
    """
    module = _modeling_module(model_type)
    return module is not None and _install_module(module)


# ---------------------------------------------------------------------------------------------------------------------
# Continuing from a cache. The hooks are plain functions that read everything from the module they are given: they can
# be pickled, and shallow copies of a mixer with another layer_idx, which share the hooks, find their own state.


def hook_once(module, mark, before, after, with_kwargs=False):
    """Adds hooks to a mixer unless it has them, from this copy of the file or another.

    Args:
        module: The mixer.
        mark: Attribute of `before` by which every copy's is known.
        before, after: What is called; `after` also when the mixer fails.
        with_kwargs: Whether `before` is given the keyword arguments.
    """
    if not any(getattr(hook, mark, False) for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(before, with_kwargs=with_kwargs)
        module.register_forward_hook(after, always_call=True)


def _carry_state_in(module, args, kwargs):
    # Also overwrites what an interrupted forward (KeyboardInterrupt skips forward hooks) may have left
    _shared.local.state = None
    names = ("cache", "cache_params")  # of Transformers 5.24 and later, of 5.23
    cache = next((kwargs[name] for name in names if name in kwargs), args[1] if len(args) > 1 else None)
    if cache is None:
        return None
    tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
    if tokens > 1:
        _shared.local.state = cache.get_recurrent_state(module.layer_idx)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and mask.shape[1] > tokens:
        # A mask over the whole history would broadcast against one token, silently, and fail against several
        return args, {**kwargs, "attention_mask": mask[:, -tokens:]}
    return None


def _carry_state_out(module, args, output):
    if getattr(_shared.local, "state", None) is None:
        return
    _shared.local.state = None
    # After an exception the output is None, and the state is only dropped
    if output is not None:
        raise RuntimeError(
            f"{type(module).__name__} was given several tokens and a cached state that its scan did not take: the "
            "result would be silently wrong. Call install() for its model type, or pass one token at a time."
        )


_carry_state_in._manticore_carry = True


def carry_state(model: torch.nn.Module) -> int:
    """Makes Mamba, FalconMamba and Jamba mixers continue from the cached state when called with several tokens.

    Transformers 5.23 starts such calls (chunked prefill, a second turn) from a zero state; the convolution is continued
    correctly. Hooks on each mixer hand the layer's cached state to the dispatcher of `install`, which is called here as
    well. Nothing is stored outside the cache between calls, and no parameter or buffer is added. A mask that covers the
    whole history is cut to the new tokens.

    Args:
        model: a component or any module holding mixers; others are left alone.

    Returns:
        The number of mixers that continue from a cached state. Calling again adds no hooks.
    """
    count = 0
    for module in model.modules():
        mixer = next((cls for cls in type(module).__mro__ if cls.__name__ in _SCAN_MIXERS), None)
        if mixer is None:
            continue
        count += 1
        _install_module(sys.modules[mixer.__module__])
        hook_once(module, "_manticore_carry", _carry_state_in, _carry_state_out, with_kwargs=True)
    return count


# ---------------------------------------------------------------------------------------------------------------------
# Limits of step sizes. These hooks, too, are plain functions of the module that they are given.


def _limit_steps_in(module, args):
    _shared.local.limits = module.time_step_limit


def _limit_steps_out(module, args, output):
    _shared.local.limits = None


_limit_steps_in._manticore_limit = True


def limit_steps(model: torch.nn.Module) -> int:
    """Makes Mamba-2 mixers keep to the limits of their step sizes in calls with one token, too.

    Transformers 5.23 limits step sizes to a mixer's `time_step_limit` in its scan of several tokens, but not in the
    step of one: decoding with a cache differs from decoding without wherever a step is beyond a limit. NemotronH and
    Zamba2 always have a lower one, 0.001 by default; other types (Bamba, FalconH1, GraniteMoeHybrid, Mamba2) where
    their configuration says so. Mixers without limits get no hook.

    Args:
        model: a component or any module holding mixers; others are left alone.

    Returns:
        The number of mixers whose steps are limited. Calling again adds no hooks.
    """
    count = 0
    for module in model.modules():
        limits = getattr(module, "time_step_limit", None)
        homes = [sys.modules.get(cls.__module__) for cls in type(module).__mro__]
        home = next((home for home in homes if hasattr(home, "mamba2_selective_state_update")), None)
        if home is None or limits is None or (limits[0] <= 0.0 and limits[1] == float("inf")):
            continue
        count += 1
        _install_module(home)
        hook_once(module, "_manticore_limit", _limit_steps_in, _limit_steps_out)
    return count
