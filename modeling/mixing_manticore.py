"""Mixture weights, projectors and token gate: the only parameters a hybrid adds to its components, in one module.

Notation of Roberts et al. (arXiv 2406.00894), section 3: component k has width d_k, the shared space width
d = max d_k, block s has mixture weights alpha_s on the simplex.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .carried_manticore import optional
from .configuration_manticore import ManticoreConfig
from .devices_manticore import device_of, place
from .mixture_manticore import widen


def resize(states: Tensor, width: int) -> Tensor:
    """Truncates or zero-pads the last dimension to `width`."""
    have = states.shape[-1]
    if have == width:
        return states
    return states[..., :width] if have > width else F.pad(states, (0, width - have))


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with all its values: one that FSDP2 has sharded is gathered, which all processes must do at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class HybridMixer(nn.Module):
    """All projectors (projectors_manticore), the mixture weights and the gate (gate_manticore), with a forward.

    One module, so that PEFT's `modules_to_save=["hybrid_mixer"]` and FSDP see them. Its steps are run through `forward`
    for the same reason: shards are gathered, and offloaded weights brought, by hooks on a module's call.

    Args:
        config: A ManticoreConfig.
        widths_in: Width of the state each component's first segment reads, by name (its embeddings).
        widths: Width of each component's hidden states.
        widths_out: Width of the state its head reads.
    """

    def __init__(self, config: ManticoreConfig, widths_in: dict, widths: dict, widths_out: dict) -> None:
        super().__init__()
        self.names, self.width = config.component_names, config.hidden_size
        self.gate, self.projector_init = config.gate, config.projector_init
        blocks, count = config.num_blocks, len(self.names)
        # Float32 whatever the rest is: in half precision most steps of training would round to nothing.
        self.alpha_logits = nn.Parameter(torch.zeros(blocks, count, dtype=torch.float32))
        self.noise, self.temperature, self.holds_alpha = None, 1.0, False
        self.into, self.out_of, self.across = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        native, self.token_gate = config.embeddings == "native", None
        self.bridges = optional("bridges").Bridges(config, widths_in, widths, widths_out) if config.bridges else None
        if config.route is not None:
            optional("path_manticore").add_crossings(self, config, widths_in, widths, widths_out)
            return
        if config.num_blocks > 1 or not native:
            optional("shared_manticore").add_projectors(self, config, widths_in, widths, widths_out)
        if config.mixture == "token":
            gate = optional("past_losses").LossGate if config.gate_past_losses else optional("gate_manticore").TokenGate
            self.token_gate = gate([widths_out[n] for n in self.names])

    def forward(self, step: Callable[..., Tensor], *args: object) -> Tensor:
        """Runs one step: a function of the mixer, as `mixer(HybridMixer.weights)` or `mixer(leave, block, ...)`."""
        return step(self, *place(args, device_of(self)))

    def weights(self) -> Tensor:
        """alpha = softmax(a): [S, K], in float32; a search may add noise and a temperature while training."""
        if self.noise is not None and self.training:
            return ((widen(self.alpha_logits) + self.noise) / self.temperature).softmax(-1)
        return self.weights_without_noise()

    def weights_without_noise(self) -> Tensor:
        """softmax(a), whatever noise a search adds; without gradient where it holds alpha."""
        logits = self.alpha_logits.detach() if self.holds_alpha and self.training else self.alpha_logits
        return widen(logits).softmax(-1)

    def gate_tokens(self, *given: list[Tensor] | Tensor) -> Tensor:
        """The token gate's weights [batch, time, K]; see `TokenGate`.

        They stand for the last block's row of alpha.
        """
        return self.touched(self.token_gate(*given), self.alpha_logits)

    def touched(self, weights: Tensor, *unused: Tensor) -> Tensor:
        """Mixture weights, with gradients of zero for what they replace: DDP stops at a parameter without one."""
        trained = [one.sum() for one in unused if one.requires_grad and self.training and one.numel()]
        return weights + 0.0 * sum(trained) if trained else weights

    def reset(self) -> None:
        """(Re-)initialises everything; called by the model's `_init_weights`."""
        init.zeros_(self.alpha_logits)
        for projector in (*self.into.values(), *self.out_of.values(), *self.across.values()):
            projector.reset(self.projector_init)
        for part in (self.token_gate, self.bridges):
            if part is not None:
                part.reset()
