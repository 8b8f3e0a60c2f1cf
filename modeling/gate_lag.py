"""Weights per token that are known beforehand: asked for at every n-th token of a text and kept until the next.

With `gate_lag` n > 1 the token gate, or the online mixture, is asked at the tokens 0, n, 2n, ... of each text. A hybrid
is trained and scored with the weights that sampling one component per token then has
(manticore_hf.compose.mixture_sampling), where only the component that was drawn runs at a step.
"""

from dataclasses import dataclass

import torch

from .running_manticore import Inputs
from .settings_manticore import ManticoreError


@dataclass
class Held:
    """What a cache keeps of each row.

    Attributes:
        weights: [batch, K] that hold after its last token.
        count: [batch] tokens of it that were read.
    """

    weights: torch.Tensor
    count: torch.Tensor

    def __len__(self):
        return len(self.count)

    def pick(self, rows: torch.Tensor) -> "Held":
        """The rows of these numbers."""
        rows = rows.to(self.count.device)
        return Held(self.weights.index_select(0, rows), self.count.index_select(0, rows))

    def crop(self, tokens: int) -> "Held":
        """What it was before the last `tokens` positions: unknown, a ManticoreError, unless there are none."""
        if tokens:
            raise ManticoreError("A hybrid whose gate_lag is more than 1 cannot undo tokens that it has read.")
        return self


class Lag:
    """From which positions of a call the mixture weights are.

    Args:
        lag: Tokens for which weights are kept.
        inputs: The Inputs of the call.
        kept: Slice, or indices, of the positions whose logits are wanted.

    Attributes:
        places: [positions] those, and where weights that count for them were asked, in order.
    """

    def __init__(self, lag: int, inputs: Inputs, kept: slice | torch.Tensor) -> None:
        batch, time = inputs.shape
        self.cache = inputs.cache
        self.before = None if self.cache is None else self.cache.kept.get("gate_lag")
        steps = torch.arange(time)
        if inputs.documents is None:
            mask = torch.ones(batch, time) if inputs.mask is None else inputs.mask[:, -time:].cpu()
            real = mask != 0
            known = torch.zeros(batch, dtype=torch.long) if self.before is None else self.before.count
            count = known[:, None] + real.cumsum(1)
            self.count = count[:, -1]
            self.asked = torch.where(real & ((count - 1) % lag == 0), steps, -1).cummax(1).values  # -1: before the call
        else:  # each a text of its own, and no cache
            index, lengths = inputs.documents.index, inputs.documents.lengths
            at = torch.arange(len(index)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            self.asked = torch.full((batch * time,), -1)
            self.asked[index] = index[torch.arange(len(index)) - at % lag] % time
            self.asked = self.asked.view(batch, time)
        self.wanted = steps[kept if isinstance(kept, slice) else kept.cpu()]
        used = self.asked[:, self.wanted if self.cache is None else torch.cat([self.wanted, steps[-1:]])]
        self.places = torch.cat([self.wanted, used[used >= 0]]).unique()

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """[batch, wanted, ...] of [batch, places, ...]."""
        if torch.equal(self.wanted, self.places):
            return values
        return values[:, torch.searchsorted(self.places, self.wanted).to(values.device)]

    def hold(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights [batch, wanted, K] that count, of those [batch, places, K] that are asked at each place."""
        if self.cache is not None:
            end = self._from(weights, self.asked[:, -1:], weights[:, -1:])
            self.cache.kept["gate_lag"] = Held(end[:, 0], self.count)
        return self._from(weights, self.asked[:, self.wanted], self.cut(weights))

    def _from(self, weights, asked, otherwise):
        at = torch.searchsorted(self.places, asked.clamp(min=0)).clamp(max=len(self.places) - 1).to(weights.device)
        found = weights.gather(1, at[..., None].expand(-1, -1, weights.shape[-1]))
        if self.before is not None:
            otherwise = self.before.weights[:, None].to(weights)
        return torch.where((asked >= 0)[..., None].to(weights.device), found, otherwise)
