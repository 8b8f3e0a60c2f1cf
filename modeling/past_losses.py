"""Mixtures that learn from what each component has lost on the tokens so far, which costs nothing to know.

When token x_{t+1} is predicted, the components' losses -log p_k(x_1), ..., -log p_k(x_t) are known. Of each component a
few exponentially decayed sums of them are followed, s_k(t) = decay * s_k(t - 1) - log p_k(x_t), from nothing at the
beginning of a text. `mixture="online"` weighs with them, without any training,

    w_k(t) = (1 - share) * prior_k * exp(-eta * s_k(t)) / sum_j prior_j * exp(-eta * s_j(t)) + share * prior_k

where the prior is alpha of the block whose weights mix the heads (exponential weights with a fixed share; Herbster and
Warmuth 1998). With `gate_past_losses` the token gate reads exponential means of them, GATE_DECAYS of each component.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_manticore import ManticoreConfig, ManticoreError
from .devices_manticore import place
from .gate_manticore import Float32Linear, TokenGate
from .mixture_manticore import widen, without_autocast
from .running_manticore import Inputs, takes_turns

GATE_DECAYS = 0.0, 0.5, 0.9, 0.98
"""Of the means that a gate reads; of the first the last token's loss is left."""
MOST = 30.0
"""Nats that one token counts at most: what a component thinks impossible does not silence it for good."""
TRAIL = 64
"""Tokens that a cache which records its past can take back."""
PIECE = 1 << 24
"""Logits that are made at once of positions whose logits nobody else wants."""


@dataclass
class Past:
    """What a cache keeps of each row, at its last n positions: n is 1, or up to TRAIL where tokens may be taken back.

    Attributes:
        sums: [batch, n, K, decays] decayed losses.
        log_probs: [batch, n, K, vocabulary] of the token after the last one that is no padding; 0 before the first.
    """

    sums: torch.Tensor
    log_probs: torch.Tensor

    def __len__(self):
        return len(self.sums)

    def pick(self, rows: torch.Tensor) -> "Past":
        """The rows of these numbers."""
        return Past(*(one.index_select(0, rows.to(one.device)) for one in (self.sums, self.log_probs)))

    def crop(self, tokens: int) -> "Past":
        """What it was before the last `tokens` positions.

        Raises:
            ManticoreError: That is no longer known.
        """
        if tokens >= self.sums.shape[1]:
            raise ManticoreError(
                f"The last {tokens} tokens cannot be taken back: the cache knows the components' losses at only "
                f"{self.sums.shape[1]} positions. Call cache.activate_past_recording() before reading them, and take "
                f"back fewer than {TRAIL}, all from the last call."
            )
        return self if tokens == 0 else Past(self.sums[:, :-tokens], self.log_probs[:, :-tokens])


def decayed_sums(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """s(t) = factors(t) * s(t - 1) + values(t) over dimension 1, from s = 0, in about log2(time) steps.

    Args:
        values: [batch, time, ...].
        factors: The same shape, or one that expands to it.
    """
    step = 1
    while step < values.shape[1]:
        ahead = [0, 0] * (values.ndim - 2) + [step, 0]
        values = values + factors * F.pad(values[:, :-step], ahead)
        factors = factors * F.pad(factors[:, :-step], ahead)
        step *= 2
    return values


def decays_of(config: ManticoreConfig) -> tuple[list[float], list[float]]:
    """(decays, what a new loss counts in each): a sum for the online mixture, means for the gate."""
    if config.mixture == "online":
        return [config.online_decay], [1.0]
    return list(GATE_DECAYS), [1 - decay for decay in GATE_DECAYS]


def online_weights(prior: torch.Tensor, sums: torch.Tensor, eta: float, share: float) -> torch.Tensor:
    """The online mixture's weights [..., K] from a prior [K] and decayed losses [..., K]; see the file's head."""
    prior = widen(prior)
    known = (prior.clamp(min=torch.finfo(prior.dtype).tiny).log() - eta * sums).softmax(-1)
    return (1 - share) * known + share * prior


def mix_online(config: ManticoreConfig, weights: list[Tensor], sums: Tensor) -> Tensor:
    """Mixture weights [batch, time, K] of the components' heads, whose prior is a list of scalar tensors."""
    with without_autocast(sums.device.type):
        return online_weights(torch.stack(list(weights)), sums[..., 0], config.online_eta, config.online_share)


def _order(inputs, device):
    """([batch, time] the place of the token before, in the same text and this call, or -1; real ones; begins a text)"""
    batch, time = inputs.shape
    steps = torch.arange(time, device=device)
    if inputs.documents is None:
        real = (torch.ones(batch, time) if inputs.mask is None else inputs.mask[:, -time:]).to(device) != 0
        last = torch.where(real, steps, -1).cummax(1).values
        return F.pad(last[:, :-1], (1, 0), value=-1), real, torch.zeros_like(real)
    index, lengths = inputs.documents.index, inputs.documents.lengths
    first = torch.zeros(len(index), dtype=torch.bool)
    first[lengths.cumsum(0) - lengths] = True
    before = torch.full((batch * time,), -1)
    before[index[1:]] = torch.where(first[1:], -1, index[:-1] % time)
    real, begins = (torch.zeros(batch * time, dtype=torch.bool) for _ in range(2))
    real[index], begins[index[first]] = True, True
    return tuple(one.view(batch, time).to(device) for one in (before, real, begins))


@torch.no_grad()
def read_losses(model: nn.Module, inputs: Inputs, kept: object, heads: Callable, own: list, norms: list) -> Tensor:
    """The decayed losses before each prediction; a cache goes on from them.

    Args:
        model: The hybrid.
        inputs: The Inputs of the call.
        kept: Slice, or indices, of the positions that are wanted.
        heads: Gives {component: its logits [batch, places, vocabulary]} of a slice of the positions.
        own: Logits [batch, kept, vocabulary] of each component.
        norms: What normalises them, [batch, kept, 1] each.

    Returns:
        [batch, kept, K, decays], in float32 or wider; padding has those of the token before it.

    Raises:
        ManticoreError: There are no token ids.
    """
    if inputs.ids is None:
        raise ManticoreError(
            "This hybrid's mixture depends on the components' losses on the tokens so far: give input_ids, not "
            "inputs_embeds."
        )
    device, (batch, time), cache = own[0].device, inputs.shape, inputs.cache
    ids = place(inputs.ids, device)
    before, real, begins = _order(inputs, device)
    # After which place each token stands, turned round: which token comes after each place
    after = ids.new_zeros(batch, time + 1).scatter(1, torch.where(real & (before >= 0), before, time), ids)[:, :time]
    past = None if cache is None else cache.kept.get("past_losses")
    count, size = len(own), own[0].shape[-1]
    pending = widen(own[0]).new_zeros(batch, count, size) if past is None else past.log_probs[:, -1]
    trail = ends = None
    if cache is not None:
        length = min(time + 1, TRAIL) if cache.records else 1
        ends = torch.where(real, torch.arange(time, device=device), -1).cummax(1).values
        ends = F.pad(ends, (1, 0), value=-1)[:, -length:]
        trail = pending[:, None].repeat(1, length, 1, 1)
    losses = []
    for start, logits, norm in _pieces(model, heads, kept, own, norms, time):
        places, pairs = slice(start, start + logits[0].shape[1]), list(zip(logits, norm))
        losses.append(torch.cat([n - widen(x.gather(-1, after[:, places, None])) for x, n in pairs], -1))
        if trail is not None:
            rows, columns = ((ends >= start) & (ends < places.stop)).nonzero().unbind(1)
            there = ends[rows, columns] - start
            trail[rows, columns] = torch.stack([widen(x[rows, there]) - n[rows, there] for x, n in pairs], 1)
    losses = torch.cat(losses, 1).gather(1, before.clamp(min=0)[..., None].expand(-1, -1, count))
    first = -pending.gather(-1, ids[:, None].expand(-1, count, -1)).mT
    losses = torch.where((before < 0)[..., None], torch.where(begins[..., None], 0.0, first), losses)
    decays, shares = (losses.new_tensor(x) for x in decays_of(model.config))
    factors = torch.where(real[..., None], torch.where(begins[..., None], 0.0, decays), 1.0)[:, :, None]
    values = torch.where(real[..., None], losses.clamp(0, MOST), 0.0)[..., None] * shares
    known = torch.zeros_like(values[:, 0]) if past is None else past.sums[:, -1]
    values[:, 0] += factors[:, 0] * known
    sums = decayed_sums(values, factors)
    if cache is not None:
        cache.kept["past_losses"] = Past(torch.cat([known[:, None], sums], 1)[:, -length:], trail)
    return sums[:, kept if isinstance(kept, slice) else kept.to(device)]


def _pieces(model, heads, kept, own, norms, time):
    """(first position, the components' logits, what normalises them) of all positions, a piece at a time."""
    if isinstance(kept, slice) and own[0].shape[1] == time:
        yield 0, own, norms
        return
    size = time if takes_turns(model) else max(PIECE // (own[0][:, 0].numel() * len(own)), 1)
    for start in range(0, time, size):
        logits = list(heads(slice(start, start + size)).values())
        yield start, logits, [widen(one).logsumexp(-1, keepdim=True) for one in logits]


class LossGate(TokenGate):
    """A token gate that also reads the components' past losses: softmax(W f_t + V l_t + b), V zero at the start.

    l_t holds, of each component and for each of GATE_DECAYS, the exponential mean of its loss minus the components'
    mean of those.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__(widths)
        self.past = _WithoutBias(len(widths) * len(GATE_DECAYS), len(widths))

    def reset(self) -> None:
        super().reset()
        init.zeros_(self.past.weight)

    def scores(self, states: list[Tensor], confidence: list[Tensor], losses: Tensor) -> Tensor:
        return super().scores(states, confidence) + self.past((losses - losses.mean(-2, keepdim=True)).flatten(-2))


class _WithoutBias(Float32Linear):
    def __init__(self, width_in, width_out):
        super().__init__(width_in, width_out)
        self.bias = None

    def forward(self, states):
        weight = widen(self.weight)
        return F.linear(states.to(weight.dtype), weight)
