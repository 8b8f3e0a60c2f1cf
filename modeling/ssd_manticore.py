"""The state-space duality of Mamba-2 in chunks, for processors without its CUDA kernels.

Algorithm of Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 6: within a chunk the recurrence

    h[t] = exp(dt[t] * A) * h[t - 1] + dt[t] * B[t] x[t]^T        y[t] = h[t]^T C[t]

is a masked matrix product, and only the states at the chunks' starts are passed on. Transformers' torch path does the
same, but pads every sequence to chunks of 256, spreads B and C over the heads of their group before multiplying them,
and builds its decays by sums over three dimensions. Here chunks are short, products are made once per group, and
decays come from cumulative sums in float64, so that they are exact where many steps cancel.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .mixers_manticore import has_kernel, is_for_kernel, leave_to, plain_of

CHUNK, CHUNKS = 64, 64  # tokens per chunk up to CHUNK * CHUNKS tokens; the pass over chunks costs their number squared


def _decays(logs):
    """Decay from after position j to position i, lower triangular [..., i, j], from log decays [..., time]."""
    sums = logs.cumsum(-1)
    above = torch.ones(logs.shape[-1], logs.shape[-1], dtype=torch.bool, device=logs.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(above, -torch.inf)


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs Mamba-2's recurrence over a sequence. Differentiable in every tensor argument.

    Args:
        x: Inputs [batch, time, heads, head_dim].
        dt: Positive step sizes (after softplus and clamping), [batch, time, heads].
        A: Decay rates, negative, [heads].
        B, C: Input and output projections [batch, time, groups, state]; head h reads group h // (heads / groups).
        initial_state: State before the first token [batch, heads, head_dim, state]; zeros when None.
        chunk: Tokens per chunk. Default: 64, doubled while the sequence has more than 64 of them.

    Returns:
        y [batch, time, heads, head_dim], without skip connection, and the state after the last token [batch, heads,
        head_dim, state]. Both are float32, or float64 if x is; lower precisions are computed in float32.
    """
    if chunk is None:
        chunk = CHUNK
        while x.shape[1] > chunk * CHUNKS:
            chunk *= 2
    with torch.autocast(x.device.type, enabled=False):  # it would run the products in half precision
        return _chunk_scan(x, dt, A, B, C, initial_state, chunk)


def _chunk_scan(x, dt, A, B, C, initial_state, chunk):
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, time, heads, width = x.shape
    groups, size = B.shape[2:]
    per, count = heads // groups, -(-time // chunk)

    def cut(z, *tail):  # [batch, time, heads or groups, ...] -> [batch, groups, chunks, chunk, ...], zeros behind
        z = F.pad(z, (0, 0) * (z.ndim - 2) + (0, count * chunk - time)) if time % chunk else z
        return z.reshape(batch, count, chunk, groups, *tail).permute(0, 3, 1, 2, *range(4, 4 + len(tail)))

    # Positions behind the end have dt = 0: they neither decay the state nor add to it.
    dt = dt.to(dtype)
    v = cut(x.to(dtype) * dt[..., None], per, width).permute(0, 1, 4, 2, 3, 5)  # [batch, group, head, chunks, chunk, p]
    B, C = cut(B.to(dtype), size).contiguous(), cut(C.to(dtype), size).contiguous()
    logs = cut(dt.double() * A.double(), per).permute(0, 1, 4, 2, 3)  # [batch, group, head, chunks, chunk]

    # Within the chunks
    scores = (C @ B.mT)[:, :, None] * _decays(logs).to(dtype).exp()
    y = scores @ v

    # What each chunk adds to the state by its end, for all heads of a group in one product: [.., head * p, state]
    sums = logs.cumsum(-1)
    left = (sums[..., -1:] - sums).to(dtype).exp()
    added = (v * left[..., None]).permute(0, 1, 3, 2, 5, 4).reshape(batch, groups, count, per * width, chunk) @ B

    # From chunk to chunk, the initial state being what a chunk before the first one added
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, width, size)
    first = initial_state.to(dtype).reshape(batch, groups, 1, per * width, size)
    states = torch.cat([first, added], 2).reshape(batch, groups, count + 1, per, width * size)
    between = _decays(F.pad(sums[..., -1], (1, 0))).to(dtype).exp()  # [batch, group, head, chunks + 1, chunks + 1]
    states = between @ states.transpose(2, 3)

    # What the state at a chunk's start gives its positions
    start = states[:, :, :, :-1].reshape(batch, groups, per, count, width, size).permute(0, 1, 3, 2, 4, 5)
    read = C @ start.reshape(batch, groups, count, per * width, size).mT
    read = read.reshape(batch, groups, count, chunk, per, width).permute(0, 1, 4, 2, 3, 5)
    y = torch.addcmul(y, read, sums.to(dtype).exp()[..., None])

    y = y.permute(0, 3, 4, 1, 2, 5).reshape(batch, count * chunk, heads, width)[:, :time]
    return y, states[:, :, :, -1].reshape(batch, heads, width, size)


# ---- in the place of Transformers' functions, see mixers_manticore ---------------------------------------------------


def make_chunk_scan(upstream: Callable) -> Callable:
    """What runs in the place of Transformers' `mamba2_chunk_scan`: on the CPU `chunk_scan`."""
    plain = plain_of(upstream)

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
        other = leave_to(upstream, plain, hidden_states, kwargs)
        if other is not None:
            kwargs |= {"D": D, "dt_bias": dt_bias, "initial_states": initial_states, "dt_softplus": dt_softplus}
            kwargs |= {"dt_limit": dt_limit, "return_final_states": return_final_states}
            return other(hidden_states, dt, A, B, C, chunk_size, **kwargs)
        dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        dt = F.softplus(dt) if dt_softplus else dt
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
        y, last_state = chunk_scan(hidden_states, dt, A, B, C, initial_states)
        y = y.contiguous()  # some mixers (FalconH1) view it in another shape
        if D is not None:
            y = y + hidden_states.to(y.dtype) * D[:, None]
        return (y, last_state) if return_final_states else y

    return mamba2_chunk_scan


def make_step(upstream: Callable) -> Callable:
    """What runs in the place of Transformers' `mamba2_selective_state_update`: it also observes `dt_limit`."""
    plain, kernel = plain_of(upstream), has_kernel(upstream)

    def mamba2_selective_state_update(
        state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, dt_limit=None, **kwargs
    ):
        use_kernel = kernel and is_for_kernel(hidden_states, kwargs)
        if dt_limit is not None and (dt_limit[0] > 0.0 or dt_limit[1] != float("inf")):
            # All channels of a head have one step size, as a view that kernels recognise by its strides and we keep
            step = dt[..., 0].float() if use_kernel else dt[..., 0]  # as in the scan: kernels compute it in float32
            step = step if dt_bias is None else step + dt_bias[..., 0].to(step.dtype)
            step = F.softplus(step) if dt_softplus else step
            dt = step.clamp(*dt_limit)[..., None].expand_as(dt)
            # Zeros and no None: the kernel asks a bias for its strides
            dt_bias = None if dt_bias is None else step.new_zeros(1, 1).expand_as(dt_bias)
            dt_softplus = False
        other = plain if kernel and not use_kernel else upstream
        kwargs |= {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus}
        return other(state, hidden_states, dt, A, B, C, **kwargs)

    return mamba2_selective_state_update
