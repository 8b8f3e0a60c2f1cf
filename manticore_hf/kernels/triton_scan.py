"""The selective scan of `scan` on a GPU, in Triton, which CUDA builds of torch bring along; never required.

mamba-ssm's kernel is faster still but has to be compiled for every torch and cannot continue from a state. Without
either, every token would be several launches.

One program runs one sequence and 32 channels through time with the states in registers; a warp holds a channel per
thread, so that the sum over states stays within a thread. As in the other versions only the states at chunk starts are
kept: the backward walks a chunk forward once more, writes its states to memory that stays in the level 2 cache, and
walks it back. What the channels share (gradients of B and C) every program writes for itself: sums are the same in
every run.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

CHANNELS = 32
_SIZES = ("batch", "time", "n")
_lock, _found = threading.Lock(), []


def _forward(
    u,
    dt,
    A,
    B,
    C,
    starts,
    y,
    batch,
    time,
    d,
    n,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    cols, rows = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    tile, inside = rows[:, None] * d + cols[None, :], (rows < n)[:, None] & (cols < d)[None, :]
    rate = tl.load(A + tile, mask=inside, other=0.0)
    h = tl.load(starts + b * n * d + tile, mask=inside, other=0.0)
    for k in range(0, tl.cdiv(time, CHUNK)):
        for j in range(0, CHUNK, UNROLL):
            for i in tl.static_range(UNROLL):
                t = k * CHUNK + j + i
                at, real = b * time + t, t < time  # past the end a step is 0 long and changes nothing
                s = tl.load(dt + at * d + cols, mask=(cols < d) & real, other=0.0)
                x = tl.load(u + at * d + cols, mask=(cols < d) & real, other=0.0)
                into = tl.load(B + at * n + rows, mask=(rows < n) & real, other=0.0)
                out = tl.load(C + at * n + rows, mask=(rows < n) & real, other=0.0)
                h = tl.exp(s[None, :] * rate) * h + (s * x)[None, :] * into[:, None]
                tl.store(y + at * d + cols, tl.sum(h * out[:, None], 0), mask=(cols < d) & real)
        tl.store(starts + ((k + 1) * batch + b) * n * d + tile, h, mask=inside)


def _backward(
    u,
    dt,
    A,
    B,
    C,
    starts,
    dy,
    carry,
    du,
    ddt,
    dA,
    dB,
    dC,
    states,
    batch,
    time,
    d,
    n,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    b, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols, rows = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    tile, inside = rows[:, None] * d + cols[None, :], (rows < n)[:, None] & (cols < d)[None, :]
    rate = tl.load(A + tile, mask=inside, other=0.0)
    g = tl.load(carry + b * n * d + tile, mask=inside, other=0.0)
    drate = tl.zeros((STATES, CHANNELS), tl.float32)
    # This program's states of a chunk, and its share of the gradients of B and C
    states += (b * tl.num_programs(1) + block) * CHUNK * STATES * CHANNELS
    states += rows[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    share = block.to(tl.int64) * batch * time * n
    chunks = tl.cdiv(time, CHUNK)
    for step in range(0, chunks):
        k = chunks - 1 - step
        h = tl.load(starts + (k * batch + b) * n * d + tile, mask=inside, other=0.0)
        for j in range(0, CHUNK, UNROLL):
            for i in tl.static_range(UNROLL):
                tl.store(states + (j + i) * STATES * CHANNELS, h)
                t = k * CHUNK + j + i
                at, real = b * time + t, t < time
                s = tl.load(dt + at * d + cols, mask=(cols < d) & real, other=0.0)
                x = tl.load(u + at * d + cols, mask=(cols < d) & real, other=0.0)
                into = tl.load(B + at * n + rows, mask=(rows < n) & real, other=0.0)
                h = tl.exp(s[None, :] * rate) * h + (s * x)[None, :] * into[:, None]
        tl.debug_barrier()
        for j in range(0, CHUNK, UNROLL):
            for i in tl.static_range(UNROLL):
                last = CHUNK - 1 - j - i
                t = k * CHUNK + last
                at, real = b * time + t, t < time
                before = tl.load(states + last * STATES * CHANNELS)
                s = tl.load(dt + at * d + cols, mask=(cols < d) & real, other=0.0)
                x = tl.load(u + at * d + cols, mask=(cols < d) & real, other=0.0)
                grad = tl.load(dy + at * d + cols, mask=(cols < d) & real, other=0.0)
                into = tl.load(B + at * n + rows, mask=(rows < n) & real, other=0.0)
                out = tl.load(C + at * n + rows, mask=(rows < n) & real, other=0.0)
                tl.store(dC + share + at * n + rows, tl.sum(h * grad[None, :], 1), mask=(rows < n) & real)
                # g = dL/dh[t] = C[t] dy[t] + exp(dt[t + 1] A) dL/dh[t + 1]
                g += out[:, None] * grad[None, :]
                tl.store(dB + share + at * n + rows, tl.sum(g * (s * x)[None, :], 1), mask=(rows < n) & real)
                through = tl.sum(g * into[:, None], 0)
                g *= tl.exp(s[None, :] * rate)
                of_decay = g * before  # dL/d(dt A)
                tl.store(du + at * d + cols, through * s, mask=(cols < d) & real)
                tl.store(ddt + at * d + cols, through * x + tl.sum(of_decay * rate, 0), mask=(cols < d) & real)
                drate += of_decay * s[None, :]
                h = before
        tl.debug_barrier()
    tl.store(dA + b * n * d + tile, drate, mask=inside)
    tl.store(carry + b * n * d + tile, g, mask=inside)


def find_triton(u: torch.Tensor, dtype: torch.dtype) -> tuple | None:
    """Returns (forward, backward), compiled when first called, or None where they do not apply or cannot be had."""
    if not u.is_cuda or dtype != torch.float32 or triton is None or os.environ.get("MANTICORE_TRITON") == "0":
        return None
    with _lock:
        if not _found:
            _found.append(_try(u.device))
        return _found[0]


def find_scan(u: torch.Tensor, n: int, dtype: torch.dtype) -> tuple[Callable, int] | None:
    """What `register_run` asks for."""
    found = find_triton(u, dtype)
    return None if found is None else (functools.partial(run_triton, found), block_count(u.shape[1]))


def build() -> tuple:
    """The kernels, not compiled yet: once for a number of states, and not again for sizes that are multiples of 16."""
    return tuple(triton.jit(do_not_specialize=_SIZES)(kernel) for kernel in (_forward, _backward))


def _try(device):
    """The kernels if one runs: Triton also needs a C compiler, and a GPU that it knows."""
    try:
        kernels, one = build(), torch.zeros(1, 1, 1, device=device)
        run_triton(kernels, (one, one, one[0], one, one, one.new_zeros(2, 1, 1, 1), one.clone()), None, None, 1, False)
        return kernels
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(f"Triton cannot run the selective scan ({reason}): torch is used instead.", stacklevel=2)
        return None


def block_count(d: int) -> int:
    """Number of programs that share a sequence of `d` channels."""
    return -(-d // CHANNELS)


def run_triton(
    kernels: tuple, tensors: tuple, dB: torch.Tensor | None, dC: torch.Tensor | None, chunk: int, backward: bool
) -> None:
    """Runs a kernel on tensors as `register_run` says; dB and dC have a slice per block of channels."""
    u, A = tensors[0], tensors[2]
    (batch, time, d), n = u.shape, len(A)
    grid, states = (batch, block_count(d)), triton.next_power_of_2(n)
    unroll = 4 if chunk % 4 == 0 else 1  # more would hide more of the memory's latency, and take a minute to compile
    sizes = {"CHUNK": chunk, "UNROLL": unroll, "STATES": states, "CHANNELS": CHANNELS, "num_warps": 1}
    with torch.cuda.device_of(u):  # Triton launches on the current device, whichever the tensors are on
        if not backward:
            kernels[0][grid](*tensors[:7], batch, time, d, n, **sizes)
        else:
            memory = u.new_empty(batch * grid[1] * chunk * states * CHANNELS)
            kernels[1][grid](*tensors, dB, dC, memory, batch, time, d, n, **sizes)
