"""Projectors: maps between a component's states and the shared space, or another component's states.

In the notation of mixing_manticore:

    u_k = (1 - g) * in_sk(h) + g * resize(h, d_k)        o_k = (1 - g) * out_sk(v_k) + g * resize(v_k, d)

with g = alpha_sk for gate="alpha" (the paper) and g = 0 for gate="none".
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .mixing_manticore import HybridMixer, resize


class LinearProjector(nn.Linear):
    """The paper's projector: an affine map [..., width_in] -> [..., width_out]."""

    def reset(self, kind: str) -> None:
        """(Re-)initialises it: as the framework does ("default"), or as the identity."""
        if kind == "default":
            return _framework_init(self)
        init.eye_(self.weight)
        init.zeros_(self.bias)


class MLPProjector(nn.Module):
    """`resize(x) + W2 gelu(W1 x)`: two layers with a skip that pads or truncates where the widths differ.

    (Without the skip at unequal widths the identity initialisation would start from nothing.)
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.up = nn.Linear(width_in, max(width_in, width_out))
        self.down = nn.Linear(max(width_in, width_out), width_out)

    def forward(self, states: Tensor) -> Tensor:
        return resize(states, self.down.out_features) + self.down(F.gelu(self.up(states)))

    def reset(self, kind: str) -> None:
        """(Re-)initialises it: as the framework does ("default"), or as `resize`."""
        _framework_init(self.up)
        _framework_init(self.down)
        if kind != "default":
            init.zeros_(self.down.weight)
            init.zeros_(self.down.bias)


class Resize(nn.Module):
    """No parameters: pad or truncate (the ablation, and the reference component's own maps)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.width = width_out

    def forward(self, states: Tensor) -> Tensor:
        return resize(states, self.width)

    def reset(self, kind: str) -> None:
        """Nothing to initialise."""


PROJECTORS = {"linear": LinearProjector, "mlp": MLPProjector, "none": Resize}


def _framework_init(linear):
    init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(linear.in_features)
    init.uniform_(linear.bias, -bound, bound)


def projector_width(projector: nn.Module) -> int:
    """Output width of a projector."""
    if isinstance(projector, nn.Sequential):
        return projector_width(projector[-1])
    if isinstance(projector, Resize):
        return projector.width
    return projector.down.out_features if isinstance(projector, MLPProjector) else projector.out_features


def gated(mixer: HybridMixer, projector: nn.Module, states: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 - g) * projector(states) + g * resize(states), with the gate g of a mixer and a block's alpha."""
    gate = alpha if mixer.gate == "alpha" else 0.0
    if isinstance(gate, float) and gate == 1.0:
        return resize(states, projector_width(projector))
    raw = states
    parameter = next(projector.parameters(), None)
    if parameter is not None and parameter.is_floating_point():
        # Some components keep their state in float32 whatever their weights are (Mamba's residual_in_fp32)
        states = states.to(parameter.dtype)
    if isinstance(gate, float) and gate == 0.0:
        return projector(states)
    return (1 - gate) * projector(states) + gate * resize(raw, projector_width(projector))
