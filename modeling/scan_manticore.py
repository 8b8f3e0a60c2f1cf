"""Selective scan for Mamba-1 style mixers that can continue from a cached state.

The recurrence is eq. 2 and algorithm 2 of Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State
Spaces" (arXiv:2312.00752), with the zero-order hold simplified as in the reference implementation:

    h[t] = exp(dt[t] * A) * h[t - 1] + dt[t] * B[t] * u[t]        y[t] = <C[t], h[t]>

`mixers_manticore` puts it in the place of Transformers' torch path, whose training takes far longer. The package has
one faster still, for all copies of this file in the process (`manticore_hf.kernels.scan`); results are the same.
"""

import sys
import types
from collections.abc import Callable

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)
_shared = sys.modules.setdefault("_manticore_selective_scan", types.ModuleType("_manticore_selective_scan"))


def register_scan(scan: Callable) -> None:
    """Registers a function that runs in the place of `selective_scan`."""
    _shared.scan = scan


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the selective state-space recurrence.

    Args:
        u: input, [batch, d, time].
        dt: positive step sizes (after softplus), [batch, d, time].
        A: continuous-time decay rates, negative, [d, n].
        B: input projection, [batch, n, time].
        C: output projection, [batch, n, time].
        initial_state: state before the first token, [batch, d, n]; zeros when None.

    Returns:
        y, [batch, d, time], without skip connection or gate, and the state after the last token, [batch, d, n]. Both
        are float32, or float64 if any argument is; lower precisions are computed in float32.
    """
    if hasattr(_shared, "scan"):
        return _shared.scan(u, dt, A, B, C, initial_state)
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0], *A.shape)
    if u.shape[2] > 1 and not torch.compiler.is_compiling():
        logger.warning_once(
            "Mamba's scan runs token by token; manticore-hf (pip install, and import it) makes it faster."
        )
    tensors = (u, dt, A, B, C, initial_state)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    u, dt, A, B, C, state = (x.to(dtype) for x in tensors)
    steps, y = (x.unbind(-1) for x in (dt, dt * u, B, C)), []
    for step, value, into, out in zip(*steps):
        state = torch.exp(step[..., None] * A) * state + value[..., None] * into[:, None]
        y.append((state * out[:, None]).sum(-1))  # no matrix product, which autocast would run in half precision
    return torch.stack(y, -1) if y else torch.zeros_like(u), state
