"""The selective scan as an operator that works in chunks: fast in torch alone, faster where numba or Triton is.

The recurrence, in the notation of `scan_manticore`:

    h[t] = exp(dt[t] * A) * h[t - 1] + dt[t] * B[t] * u[t]        y[t] = <C[t], h[t]>

Autograd's nodes for every token are what makes a plain loop slow. Here forward and backward are one operator each; only
the states between chunks of tokens are kept. Earlier repositories carry copies of this file: what they must agree on
with it (operators, registered ways to run them, the lock) is kept process-wide.
"""

import sys
import threading
import types
from collections.abc import Callable

import torch

CHUNK = 16
# Part of the operator names: raise it when a schema or its meaning changes, so that an older copy of this file in the
# same process keeps the operators it was written against.
_OP_VERSION = 1


def _process_wide() -> types.ModuleType:
    """Returns the object that all copies of this file share; `dict.setdefault` makes the creation atomic."""
    shared = types.ModuleType(f"_manticore_scan_v{_OP_VERSION}")
    # Copies from before 0.2, which know nothing of scans, keep what they hand on in `local`
    shared.lock, shared.local = threading.RLock(), threading.local()
    shared = sys.modules.setdefault(shared.__name__, shared)
    shared.__dict__.setdefault("scans", {})
    return shared


shared = _process_wide()


def register_run(device_type: str, find: Callable) -> None:
    """Registers a faster way to run the recurrence, for all copies of this file in the process.

    Args:
        device_type: Of the tensors that it takes, such as "cpu" or "cuda". What was registered for it is replaced.
        find: Called with u [batch, d, time], the number of states n and the dtype in which to compute; gives None where
            it does not apply, else (run, slices). `run(tensors, dB, dC, chunk, backward)` is called with (u, dt, A, B,
            C, starts, y, carry, du, ddt, dA), sequences first (u [batch, time, d]), otherwise as `_scan` and
            `_scan_backward` have them, and writes into them; y holds its gradient in the backward. dB and dC have
            `slices` slices, which are summed afterwards.
    """
    shared.scans[device_type] = find


# ---------------------------------------------------------------------------------------------------------------------
# The recurrence. Everything is time-major with the channels last: u, dt and y [time, batch, d], B and C [time, batch,
# n], A [n, d], starts [chunks + 1, batch, n, d]. One step is then a contiguous fused multiply-add over batch * n * d
# numbers, and dt and u broadcast over n without short inner loops. Results are written into the tensors given.


def _fill_states(a, h, dt, v, A, B, start):
    """Writes the decay into `a` and the states into `h` for one chunk, both [chunk, batch, n, d]."""
    torch.mul(dt.unsqueeze(2), A, out=a).exp_()
    torch.mul(v.unsqueeze(2), B.unsqueeze(3), out=h)
    for decay, state in zip(a.unbind(0), h.unbind(0)):
        state.addcmul_(decay, start)
        start = state


def _scan(u, dt, A, B, C, starts, y, chunk):
    v = dt * u
    a_buffer, h_buffer = u.new_empty(2, min(chunk, len(u)), *starts[0].shape)
    for k, s in enumerate(range(0, len(u), chunk)):
        e = min(s + chunk, len(u))
        a, h = a_buffer[: e - s], h_buffer[: e - s]
        _fill_states(a, h, dt[s:e], v[s:e], A, B[s:e], starts[k])
        torch.matmul(C[s:e].unsqueeze(2), h, out=y[s:e].unsqueeze(2))
        starts[k + 1].copy_(h[-1])


def _scan_backward(u, dt, A, B, C, starts, carry, dy, du, ddt, dA, dB, dC, chunk):
    # carry is dL/dh at the end of the chunk at hand, through all that comes after it
    v = dt * u
    a_buffer, h_buffer, g_buffer = u.new_empty(3, min(chunk, len(u)), *carry.shape)
    for k in reversed(range(len(starts) - 1)):
        s, e = k * chunk, min((k + 1) * chunk, len(u))
        a, h, g = a_buffer[: e - s], h_buffer[: e - s], g_buffer[: e - s]
        _fill_states(a, h, dt[s:e], v[s:e], A, B[s:e], starts[k])
        torch.matmul(h, dy[s:e].unsqueeze(3), out=dC[s:e].unsqueeze(3))
        # g[t] = dL/dh[t] = C[t] dy[t] + exp(dt[t + 1] A) g[t + 1]
        torch.mul(dy[s:e].unsqueeze(2), C[s:e].unsqueeze(3), out=g)
        g[-1].add_(carry)
        steps, decays = g.unbind(0), a.unbind(0)
        for t in range(e - s - 2, -1, -1):
            steps[t].addcmul_(decays[t + 1], steps[t + 1])
        torch.mul(decays[0], steps[0], out=carry)
        torch.matmul(B[s:e].unsqueeze(2), g, out=du[s:e].unsqueeze(2))  # dL/d(dt u), so far
        torch.matmul(g, v[s:e].unsqueeze(3), out=dB[s:e].unsqueeze(3))
        # dL/d(dt A) = g[t] * h[t - 1] * exp(dt A); h is not needed afterwards and serves as scratch
        g.mul_(a)
        g[1:].mul_(h[:-1])
        g[0].mul_(starts[k])
        torch.sum(torch.mul(g, A, out=h), 2, out=ddt[s:e])
        dA.add_(torch.mul(g, dt[s:e].unsqueeze(2), out=h).sum(0))
    ddt.addcmul_(du, u)
    du.mul_(dt)


# ---------------------------------------------------------------------------------------------------------------------
# The operators. As custom operators they are one node for torch.compile instead of thousands of unrolled steps.


def _compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _channels_first(x: torch.Tensor, batch_first: bool, dtype: torch.dtype) -> torch.Tensor:
    # The mixers transpose before and after the scan: kept as [batch, time, ...] in memory, their views cost no copy
    return (x if batch_first else x.transpose(0, 1)).to(dtype).contiguous().transpose(1, 2)


def _swapped(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.detach().transpose(-2, -1).to(dtype, copy=True, memory_format=torch.contiguous_format)


def _find_run(u, n, dtype):
    """(registered function that runs the recurrence, slices for the gradients of B and C), or (None, 1)."""
    find = shared.scans.get("cuda" if u.is_cuda else u.device.type)
    return (None if find is None else find(u, n, dtype)) or (None, 1)


def _forward_op(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = _compute_dtype(u, dt, A, B, C, initial_state)
    run, shares = _find_run(u, A.shape[1], dtype)
    chunks = -(-u.shape[2] // chunk)
    order = (2, 0, 1) if run is None else (0, 2, 1)
    u, dt, B, C = (x.detach().permute(order).to(dtype).contiguous() for x in (u, dt, B, C))
    A, state, y = _swapped(A, dtype), _swapped(initial_state, dtype), torch.empty_like(u)
    starts = u.new_empty(chunks + 1, *state.shape)
    starts[0] = state
    # Autocast is still active below the dispatcher and would run the matmuls in half precision
    with torch.autocast(u.device.type, enabled=False):
        if run is None:
            _scan(u, dt, A, B, C, starts, y, chunk)
        else:
            none, unused = u.new_empty(0, 0, 0), u.new_empty(shares, 0, 0, 0)
            run((u, dt, A, B, C, starts, y, *[none] * 4), unused, unused, chunk, False)
    return _channels_first(y, run is not None, dtype), _swapped(starts[-1], dtype), starts


def _backward_op(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    starts: torch.Tensor,
    grad_y: torch.Tensor,
    grad_last: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, types_ = starts.dtype, [x.dtype for x in (u, dt, B, C, A)]
    run, shares = _find_run(u, A.shape[1], dtype)
    order = (2, 0, 1) if run is None else (0, 2, 1)
    u, dt, B, C, dy = (x.detach().permute(order).to(dtype).contiguous() for x in (u, dt, B, C, grad_y))
    A, carry, du, ddt = _swapped(A, dtype), _swapped(grad_last, dtype), torch.zeros_like(u), torch.zeros_like(u)
    dA, dB, dC = (x.new_zeros(t, *x.shape) for x, t in ((carry[0], len(carry)), (B, shares), (C, shares)))
    with torch.autocast(u.device.type, enabled=False):
        if run is None:
            _scan_backward(u, dt, A, B, C, starts, carry, dy, du, ddt, dA, dB[0], dC[0], chunk)
        else:
            run((u, dt, A, B, C, starts, dy, carry, du, ddt, dA), dB, dC, chunk, True)
    grads = zip((du, ddt, dB.sum(0), dC.sum(0)), types_)
    du, ddt, dB, dC = (_channels_first(x, run is not None, t) for x, t in grads)
    return du, ddt, _swapped(dA.sum(0), types_[4]), dB, dC, _swapped(carry, dtype)


def _empty_channels_first(x, dtype=None):
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], dtype=dtype or x.dtype).transpose(1, 2)


def _forward_fake(u, dt, A, B, C, initial_state, chunk):
    dtype, (batch, d, time), n = _compute_dtype(u, dt, A, B, C, initial_state), u.shape, A.shape[1]
    starts = u.new_empty((time + chunk - 1) // chunk + 1, batch, n, d, dtype=dtype)
    return _empty_channels_first(u, dtype), u.new_empty(batch, d, n, dtype=dtype), starts


def _backward_fake(u, dt, A, B, C, starts, grad_y, grad_last, chunk):
    du, ddt, dB, dC = (_empty_channels_first(x) for x in (u, dt, B, C))
    return du, ddt, A.new_empty(A.shape), dB, dC, starts.new_empty(grad_last.shape)


def _setup_context(ctx, inputs, output):
    u, dt, A, B, C, initial_state, chunk = inputs
    ctx.save_for_backward(u, dt, A, B, C, output[2])
    ctx.mark_non_differentiable(output[2])
    # Otherwise autograd would hand zeros of the size of the saved states to the backward
    ctx.set_materialize_grads(False)
    ctx.chunk, ctx.state_dtype = chunk, initial_state.dtype


def _autograd_backward(ctx, grad_y, grad_last, _):
    u, dt, A, B, C, starts = ctx.saved_tensors
    grad_y = torch.zeros_like(u, dtype=starts.dtype) if grad_y is None else grad_y
    grad_last = starts.new_zeros(u.shape[0], *A.shape) if grad_last is None else grad_last
    *grads, grad_state = shared.ops[1](u, dt, A, B, C, starts, grad_y, grad_last, ctx.chunk)
    return *grads, grad_state.to(ctx.state_dtype), None


def _register_ops():
    """Returns the forward and backward operator, registered by whichever copy of this file comes first."""
    with shared.lock:
        if not hasattr(shared, "ops"):
            name = f"selective_scan_v{_OP_VERSION}"
            forward = torch.library.custom_op(f"manticore_hf::{name}", _forward_op, mutates_args=())
            backward = torch.library.custom_op(f"manticore_hf::{name}_backward", _backward_op, mutates_args=())
            forward.register_fake(_forward_fake)
            backward.register_fake(_backward_fake)
            forward.register_autograd(_autograd_backward, setup_context=_setup_context)
            # The bare overloads, because calling them costs less than calling the objects that registered them
            shared.ops = tuple(getattr(torch.ops.manticore_hf, op).default for op in (name, f"{name}_backward"))
    return shared.ops


_FORWARD, _ = _register_ops()


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the recurrence; as `scan_manticore.selective_scan`, in whose place it is registered.

    Differentiable once in every tensor argument. Only the states at the chunk starts are kept for the backward, which
    recomputes the rest; decays are multiplied, never divided or summed as logarithms, so no step size can overflow.

    Args:
        u, dt, A, B, C, initial_state: As there.
        chunk: tokens between two saved states.

    Returns:
        As there.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    tensors = (u, dt, A, B, C)
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0], *A.shape, dtype=_compute_dtype(*tensors))
    y, last_state, _ = _FORWARD(u, dt, A, B, C, initial_state, chunk)
    return y, last_state
