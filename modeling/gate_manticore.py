"""The token gate: mixture weights of the predictions that depend on what was read."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .mixture_manticore import widen, without_autocast


class Float32Linear(nn.Linear):
    """An affine map that is kept and computed in float32, whatever it is given.

    As a module of its own, called as such, so that whatever hooks into modules (sharding) finds its weight.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, dtype=torch.float32)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = widen(self.weight)
        return F.linear(states.to(weight.dtype), weight, self.bias.to(weight.dtype))


class TokenGate(nn.Module):
    """Output mixture that depends on the token: w_t = softmax(W f_t + b), zero at the start (the plain ensemble).

    f_t holds, of each component, the last state divided by its root mean square, and, detached, the entropy (nats) and
    the largest log-probability of its own prediction.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.linear = Float32Linear(sum(widths) + 2 * len(widths), len(widths))

    def reset(self) -> None:
        """(Re-)initialises everything; called by the mixer's own."""
        init.zeros_(self.linear.weight)
        init.zeros_(self.linear.bias)

    def forward(self, *given: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """states: K x [batch, time, d_k]; confidence: K x [batch, time, 2] -> [batch, time, K], summing to 1."""
        with without_autocast(given[0][0].device.type):
            return self.scores(*given).softmax(-1)

    def scores(self, states: list[torch.Tensor], confidence: list[torch.Tensor]) -> torch.Tensor:
        """W f_t + b [batch, time, K] of what `forward` is given."""
        pairs = zip(map(widen, states), confidence)
        features = [(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), one) for x, one in pairs]
        return self.linear(torch.cat([part for pair in features for part in pair], -1))
