"""Bridges: components run side by side, as in one block, and add to each other's states on the way.

Each component is cut into `bridge_blocks` blocks where bridges begin or end. What enters block t of component k becomes

    h_k + sum over bridges (j, s) -> (k, t) of  w * g * rms(h_k) * M(h_j / rms(h_j))

h_j is what left block s of component j, before anything was added to it there. M is linear, of full rank or U V; or
causal cross-attention, O attention(Q h_k / rms(h_k); K, V of h_j / rms(h_j) at this token and before), without
positions. U and O are zero at the start, where the hybrid is that of one block; g is a number per bridge, 1 at the
start. w is 1, a weight that was given, or, with `bridge_alpha`, of softmax over (none, the bridges into that place).
(Others who report gains from joining hidden states add a gated, normalised update to a stream that stays, too: C2C,
arXiv 2510.03215; CALM, arXiv 2401.02412.)

What a component's state waits for runs before it, so that a bridge may lead from the last state of one component into
the first block of another, as long as no bridges go round in a circle. Whatever nothing that is read waits for is not
run.
"""

from graphlib import TopologicalSorter
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init

from .configuration_manticore import ManticoreConfig
from .mixture_manticore import is_active, widen, without_autocast
from .running_manticore import Inputs, Pass, active_in, mix_native, native_inputs

# ---- where bridges lead ----------------------------------------------------------------------------------------------


def inner_width(config: ManticoreConfig, edge: dict, width: int) -> int | None:
    """Inner width of an edge's map into states of a width; None where a linear one has no factors."""
    if edge["kind"] == "linear" or config.bridge_rank is not None:
        return config.bridge_rank
    return width // config.bridge_heads * config.bridge_heads


def _borders(config):
    """{component: the blocks that begin at a border, and what comes after the last one}."""
    borders = {name: {0, config.bridge_blocks} for name in config.component_names}
    for edge in config.bridges:
        borders[edge["to"]].add(edge["to_block"])
        borders[edge["from"]].add(edge["from_block"] + 1)
    return {name: sorted(found) for name, found in borders.items()}


def ranges(config: ManticoreConfig) -> dict[tuple[str, int], tuple[int, int]]:
    """{(component, block it begins in): (start, stop)} of the layers between two places where bridges begin or end."""
    return {
        (name, first): (config.bounds(name)[first], config.bounds(name)[after])
        for name, borders in _borders(config).items()
        for first, after in pairwise(borders)
    }


def order(config: ManticoreConfig, wanted: list | None = None) -> list[tuple[str, int]]:
    """What is run, in order: [(component, block it begins in)].

    Args:
        config: Of a hybrid with bridges.
        wanted: Names of the components whose last states are read; default: all.

    Raises:
        CycleError: Bridges go round in a circle.
    """
    borders, waits, needed = _borders(config), {}, {}
    for name, found in borders.items():
        waits |= {(name, after): [(name, first)] for first, after in pairwise(found[:-1])} | {(name, 0): []}
    for edge in config.bridges:
        if is_active(edge["weight"]):
            waits[edge["to"], edge["to_block"]].append(_source(borders, edge))
    todo = [(name, borders[name][-2]) for name in (config.component_names if wanted is None else wanted)]
    while todo:
        here = todo.pop()
        needed[here] = waits[here]
        todo += [one for one in waits[here] if one not in needed]
    return list(TopologicalSorter(needed).static_order())


def _source(borders, edge):
    """(component, block it begins in) of the layers that give an edge's state."""
    return edge["from"], max(block for block in borders[edge["from"]] if block <= edge["from_block"])


# ---- the maps --------------------------------------------------------------------------------------------------------


def _normed(state):
    """A state [..., width] divided by its root mean square, in float32; and that [..., 1]."""
    state = widen(state)
    size = (state.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return state / size, size


class LinearBridge(nn.Module):
    """M = U V, or U alone: the sender's normalised state [batch, time, d_j] -> [batch, time, d_k], 0 at the start."""

    def __init__(self, width_from: int, width_to: int, rank: int | None) -> None:
        super().__init__()
        self.down = None if rank is None else nn.Linear(width_from, rank, bias=False)
        self.up = nn.Linear(rank or width_from, width_to, bias=False)

    def forward(self, own: Tensor, other: Tensor, mask: Tensor | None, view: Cache | None) -> Tensor:
        other = other.to(self.up.weight.dtype)
        return self.up(other if self.down is None else self.down(other))


class AttentionBridge(nn.Module):
    """M = O attention(Q own; K, V of other): causal over the sender's normalised states; 0 at the start."""

    def __init__(self, width_from: int, width_to: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width_to, width, bias=False)
        self.store = nn.Linear(width_from, 2 * width, bias=False)
        self.up = nn.Linear(width, width_to, bias=False)

    def forward(self, own: Tensor, other: Tensor, mask: Tensor | None, view: Cache | None) -> Tensor:
        """own: [batch, time, d_k]; other: [batch, time, d_j]; mask: [batch, past + time], or None; view: a cache."""
        (batch, time), dtype = own.shape[:2], self.up.weight.dtype
        split = [self.query(own.to(dtype)), *self.store(other.to(dtype)).chunk(2, -1)]
        query, keys, values = (x.view(batch, time, self.heads, -1).transpose(1, 2) for x in split)
        past = 0 if view is None else view.seen
        if view is not None:
            keys, values = view.update(keys, values, 0)
        allowed = None
        if mask is not None or view is not None:
            here, there = (torch.arange(n, device=own.device) for n in (time, keys.shape[2]))
            here = here[:, None] + past
            allowed = there <= here
            if mask is not None:  # padding reads itself, so that its softmax is over something
                mask = F.pad(mask.bool(), (0, keys.shape[2] - mask.shape[1]))
                allowed = (allowed & mask[:, None, None]) | (there == here)
        read = F.scaled_dot_product_attention(query, keys, values, allowed, is_causal=allowed is None)
        return self.up(read.transpose(1, 2).reshape(batch, time, -1))


class Bridges(nn.Module):
    """All bridges of a hybrid, as a part of its mixer: in the order of `config.bridges`, of which each is a dict.

    Args:
        config: Of a hybrid with bridges.
        widths_in: Width of the state each component's first segment reads, by name.
        widths: Width of each component's hidden states.
        widths_out: Width of its last state.
    """

    def __init__(self, config: ManticoreConfig, widths_in: dict, widths: dict, widths_out: dict) -> None:
        super().__init__()
        self.edges = nn.ModuleList()
        for edge in config.bridges:
            width_from = (widths_out if edge["from_block"] == config.bridge_blocks - 1 else widths)[edge["from"]]
            width_to = (widths if edge["to_block"] else widths_in)[edge["to"]]
            sizes = width_from, width_to, inner_width(config, edge, width_to)
            linear = edge["kind"] == "linear"
            self.edges.append(LinearBridge(*sizes) if linear else AttentionBridge(*sizes, config.bridge_heads))
        # Float32 whatever the rest is, as all mixture weights
        self.gates = nn.Parameter(torch.ones(len(self.edges), dtype=torch.float32))
        self.weights_given = [edge["weight"] for edge in config.bridges]
        self.rows = list(places(config).values())
        self.noise, self.temperature, self.holds_alpha, self.alpha_logits = None, 1.0, False, None
        if config.bridge_alpha:
            size = len(self.rows), 1 + max(map(len, self.rows))
            self.alpha_logits = nn.Parameter(torch.zeros(size, dtype=torch.float32))

    def reset(self) -> None:
        """(Re-)initialises everything; called by the mixer's own."""
        init.ones_(self.gates)
        if self.alpha_logits is not None:
            init.zeros_(self.alpha_logits)
        for edge in self.edges:
            for name, part in edge.named_children():
                init.zeros_(part.weight) if name == "up" else init.normal_(part.weight, 0.0, part.in_features**-0.5)

    def weights(self) -> Tensor:
        """Of each place that bridges lead into, the weights of (none, each of its bridges, 0 for the rest), float32."""
        if self.noise is not None and self.training:
            return self.softmax((widen(self.alpha_logits) + self.noise) / self.temperature)
        return self.weights_without_noise()

    def weights_without_noise(self) -> Tensor:
        """The same, whatever noise a search adds; without gradient where it holds alpha."""
        return self.softmax(self.alpha_logits.detach() if self.holds_alpha and self.training else self.alpha_logits)

    def softmax(self, logits: Tensor) -> Tensor:
        """Weights of such logits [places, choices]."""
        return widen(logits).masked_fill(self.beyond(), float("-inf")).softmax(-1)

    def beyond(self) -> Tensor:
        """[places, choices]: where the alpha of a place with fewer bridges than another ends."""
        device = self.alpha_logits.device
        counts = torch.tensor([[1 + len(row)] for row in self.rows], device=device)
        return torch.arange(self.alpha_logits.shape[1], device=device) >= counts

    def edge_weights(self, alpha: Tensor | None) -> list[float | Tensor]:
        """The weight of each bridge: numbers where they are given or 1, else scalar tensors of `alpha`, or None."""
        out = [1.0 if weight is None else weight for weight in self.weights_given]
        for row, found in zip(self.rows, () if alpha is None else alpha):
            for i, weight in zip(row, found[1:]):
                out[i] = weight if self.weights_given[i] is None else out[i]
        return out


def places(config: ManticoreConfig) -> dict[tuple[str, int], list[int]]:
    """{(component, block): numbers of the bridges that lead into it}."""
    out = {}
    for i, edge in enumerate(config.bridges):
        out.setdefault((edge["to"], edge["to_block"]), []).append(i)
    return out


def add(mixer: nn.Module, state: Tensor, others: dict[int, Tensor], mask: Tensor | None, views: dict) -> Tensor:
    """What bridges make of the state [batch, time, d_k] that enters a block; a step of the mixer.

    Args:
        mixer: The HybridMixer.
        state: What entered without bridges.
        others: {number of a bridge: the state [batch, time, d_j] it reads}.
        mask: [batch, past + time], 1 for real tokens, or None.
        views: {number of a bridge of kind attention: its layer's view of the cache}.
    """
    bridges, total = mixer.bridges, 0.0
    weights = bridges.edge_weights(None if bridges.alpha_logits is None else bridges.weights())
    with without_autocast(state.device.type):
        own, size = _normed(state)
        others = {i: _normed(other)[0] for i, other in others.items()}
    for i, other in others.items():
        update = widen(bridges.edges[i](own, other, mask, views.get(i)))
        total = total + weights[i] * widen(bridges.gates[i]) * update
    return state + (size * total).to(state.dtype)


# ---- running ---------------------------------------------------------------------------------------------------------


def running(config: ManticoreConfig, weights: list) -> list[tuple[str, int]]:
    """What runs under a row of mixture weights, in order; also what only bridges read."""
    return order(config, [name for name, weight in zip(config.component_names, weights) if is_active(weight)])


def run_bridged(model: PreTrainedModel, inputs: Inputs, weights: list, shared: bool) -> Pass:
    """Components side by side, as in one block, with what bridges add: a way to run, of `running_manticore`."""
    config, mixer, segments, cache = model.config, model.hybrid_mixer, model.segments, inputs.cache
    todo, borders, into = running(config, weights[0]), _borders(config), places(config)
    names = {name for name, _ in todo}
    own = native_inputs(model, inputs, [1.0 * (name in names) for name in config.component_names])
    states, left = dict(own), {}
    for name, block in todo:
        state = states[name]
        mine = [i for i in into.get((name, block), ()) if is_active(config.bridges[i]["weight"])]
        if mine:
            state = state if state.is_floating_point() else model.embed(name, state)
            others = {i: left[_source(borders, config.bridges[i])] for i in mine}
            stored = [i for i in mine if cache is not None and config.bridges[i]["kind"] == "attention"]
            state = mixer(add, state, others, inputs.mask, {i: cache.view("", i) for i in stored})
        states[name] = left[name, block] = segments.segment(name, block)(state, *inputs.around(name, block))
    found = {name: states[name] for name in active_in(model, weights[0])}
    state = mix_native(model, weights[0], found) if shared or inputs.keep else None
    boundaries = (mix_native(model, weights[0], own), state) if inputs.keep else None
    return Pass(found, weights, state, boundaries)
