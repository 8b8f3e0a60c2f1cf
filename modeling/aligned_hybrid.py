"""Aligned hybrids: components that read the same bytes through tokenizers of their own.

The hybrid has the tokenizer of one component, A, and is an ordinary causal LM over it. Any other component B reads the
bytes of A's tokens as its own tokens (`aligned_reading`), and what it predicts is mapped to A's vocabulary
(`aligned_mapping`): the probability, under B, of the text going on so that A's next token is this one. Of each row
these are

    q(a) = sum over covers c of  P(c) * sum over b of  P(b | c) * share(a | b)

normalised, where a cover is one way in which B may have cut the bytes so far, b is B's next token, and share(a | b) is
one where the bytes of b alone say what A's next token is. Approximations: covers are only those along B's canonical
tokens of the bytes so far; where A's token goes on beyond b, its share is A's own probability among the tokens of A
that b may begin; tokens that A would never write after its last one get nothing, and with them B's tokens whose bytes
begin like them keep BLOCKED of their weight. A part TRUST of the result is A's own prediction, so that no token is
impossible.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from .aligned_mapping import UNSURE, ByteTokenizer, Mapping
from .aligned_reading import Row, can_read_trees, grow, read_trees, walk
from .aligned_tokenizers import tokenizer_of
from .bounds_manticore import guard
from .configuration_manticore import ManticoreError
from .mixing_manticore import resize
from .mixture_manticore import without_autocast
from .rows_manticore import check_not_told
from .running_manticore import Inputs, Pass, active_in, mix_native, mixture_rows, run_any, takes_turns
from .segments_manticore import Head, Whole

TRUST = 1e-6
LIKELY, MOVED = 64, 0.5
"""How many tokens of each vocabulary, the likeliest, may be cut otherwise than alone, and what part of one at most."""
BLOCKED = 0.05
HEADS, PIECE = 1 << 24, 1 << 21
"""Numbers over both vocabularies that a head, and the mapping, work on at once: what it makes stays in the processor's
cache, and the memory of one piece serves the next."""


@dataclass
class Reading:
    """What a component has read of a batch.

    Attributes:
        positions: Of the flattened batch: (where the nodes of the row begin, its Position), None for padding.
        states: [nodes of all rows, width].
        shape: (batch, time).
        told: Logits of nodes that an earlier call predicted from already, by node.
        ends: (where the nodes of a row begin, its Tree, the Row after it) where a cache keeps the latter.
    """

    positions: list
    states: torch.Tensor
    shape: tuple
    told: dict
    ends: list

    def logits(self, head: Head, states: torch.Tensor, nodes: list[int], keep: bool) -> torch.Tensor:
        """[nodes, vocabulary] of a head; what the next call will ask for again is kept in the rows' caches."""
        new = [node for node in nodes if not keep or node not in self.told]
        found = head(states[None, torch.tensor(new, dtype=torch.long, device=states.device)])[0]
        if keep and self.ends:
            known = {**self.told, **dict(zip(new, found))}
            for offset, tree, row in self.ends:
                paths = tree.paths(tree.end, 64)
                row.told.update((path, known[offset + node]) for node, path in paths.items() if offset + node in known)
            found = found if len(new) == len(nodes) else torch.stack([known[node] for node in nodes])
        return found


class Aligner:
    """What the components of one hybrid need to read the same bytes; made on first use.

    Args:
        home: The component whose tokenizer is the hybrid's.
    """

    def __init__(self, home: str) -> None:
        self.home, self.byte_tokenizers, self.mappings, self.trees, self.boundaries = home, {}, {}, {}, {}

    def mapping(self, model: PreTrainedModel, name: str) -> Mapping:
        """The `Mapping` of a component to the hybrid's tokenizer."""
        if name not in self.mappings:
            self.mappings[name] = Mapping(self.bytes_of(model, self.home), self.bytes_of(model, name))
        return self.mappings[name]

    def bytes_of(self, model: PreTrainedModel, name: str) -> ByteTokenizer:
        """A component's tokenizer as a `ByteTokenizer`; kept."""
        if name not in self.byte_tokenizers:
            rows = getattr(model.config, name).vocab_size
            self.byte_tokenizers[name] = ByteTokenizer(tokenizer_of(model, name), rows)
        return self.byte_tokenizers[name]

    def check_embeds(self, model: PreTrainedModel, inputs: Inputs) -> None:
        """Raises ManticoreError where what is read is not what the embeddings give for the tokens."""
        embedding = model.get_input_embeddings()
        with torch.no_grad():
            if not torch.equal(inputs.embeds, torch.cat([model.embed(n, inputs.ids) for n in embedding.readers], -1)):
                raise ManticoreError(
                    "A hook on get_input_embeddings() (such as NEFTune's) changes only what component "
                    f"{self.home!r} reads; {list(model.config.aligned)} read other tokens, which it does not reach. "
                    "Hook model.component(name).get_input_embeddings() of each, or leave neftune_noise_alpha out."
                )

    @torch.compiler.disable
    def read(self, model: PreTrainedModel, name: str, inputs: Inputs) -> Reading:
        """The Reading of a component of what a call gives it."""
        mapping, segment = self.mapping(model, name), model.segments.segment(name, 0)
        config = model.component(name).config
        (batch, time), ids = inputs.shape, inputs.ids.flatten().tolist()
        if inputs.documents is not None:  # each a text of its own, without padding
            places = [one.tolist() for one in inputs.documents.index.split(inputs.documents.lengths.tolist())]
        else:
            places = [list(range(row * time, (row + 1) * time)) for row in range(batch)]
            if inputs.mask is not None:
                real = inputs.mask[:, -time:].flatten().tolist()
                places = [[place for place in row if real[place]] for row in places]
        if len(places) > 1:
            check_not_told(model, "adapter_names", f"component {name!r}, with its own tokenizer, reads in pieces")
        rows = [Row() for _ in places]
        if inputs.cache is not None:
            rows = inputs.cache.readers.setdefault(name, rows)
        if len(rows) != len(places):
            raise ManticoreError(f"The cache holds {len(rows)} rows; input_ids has {batch}.")
        grown = [grow(mapping, row, [ids[place] for place in one], inputs.last) for row, one in zip(rows, places)]
        trees, after = [tree for tree, _ in grown], [row for _, row in grown]
        for tree in trees:
            guard().positions([(name, segment)], torch.tensor([tree.depths]), max(tree.depths) + 1, True)
        if any(len(tree.parents) > 1 for tree in trees) and self.reads_trees(name, segment, config):
            states, caches = read_trees(segment, config, trees, rows if inputs.cache is not None else None)
            for tree, before, row, found, cache in zip(trees, rows, after, states, caches or ()):
                row.cache, row.state = cache, found[tree.end] if tree.trunk else before.state
        else:
            if takes_turns(model):
                raise ManticoreError(
                    f"Component {name!r} ({config.model_type}) reads text in as many passes as the text asks for, and "
                    "weights that are divided among processes (FSDP2, ZeRO-3) need as many in each: train with DDP, or "
                    "transplant its vocabulary (tokenizers='transplant')."
                )
            kept = [row if inputs.cache is not None else None for row in after]
            states = [walk(segment, config, *one) for one in zip(trees, rows, kept)]
        if inputs.cache is not None:
            inputs.cache.readers[name] = after
        width = max((one.shape[-1] for one in states if one is not None), default=config.hidden_size)
        parameter = next(p for p in segment.stack.parameters() if p.is_floating_point())
        states = [parameter.new_zeros(1, width) if one is None else one for one in states]
        positions, told, ends, offset = [None] * (batch * time), {}, [], 0
        for before, tree, row, one, found in zip(rows, trees, after, places, states):
            for place, position in zip(one, tree.positions):
                positions[place] = position and (offset, position)
            paths = tree.paths(0, max(map(len, before.told))) if before.told else {}
            told.update((offset + node, before.told[path]) for node, path in paths.items() if path in before.told)
            ends += [(offset, tree, row)] if inputs.cache is not None else []
            offset += len(found)
        return Reading(positions, torch.cat(states), (batch, time), told, ends)

    def reads_trees(self, name: str, segment: Whole, config: PreTrainedConfig) -> bool:
        """Whether a component reads a tree in one call."""
        key = config._attn_implementation
        if self.trees.get(name, (None,))[0] != key:
            self.trees[name] = (key, key in ("sdpa", "eager") and can_read_trees(segment, config))
        return self.trees[name][1]

    def states_at(self, reading: Reading) -> torch.Tensor:
        """[batch, time, width]: the component's state after the bytes of each of the hybrid's positions."""
        nodes = [0 if one is None else one[0] + one[1].node for one in reading.positions]
        return reading.states[torch.tensor(nodes, device=reading.states.device)].unflatten(0, reading.shape)

    # ---- predictions -------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def log_probs(self, model: PreTrainedModel, name: str, reading: Reading, logits: Tensor, kept: object) -> Tensor:
        """A component's log-probabilities over the hybrid's vocabulary.

        Args:
            model: The hybrid.
            name: The component.
            reading: Its Reading.
            logits: [batch, kept, vocabulary] of the component whose tokenizer is the hybrid's.
            kept: Slice, or indices, of the positions that are wanted.

        Returns:
            [batch, kept, vocabulary], in float32 or wider; rows of padding have the other component's.
        """
        mapping, states, shape = self.mapping(model, name), model.together(reading.states), logits.shape
        kept = kept.cpu().numpy() if isinstance(kept, torch.Tensor) else kept
        places = np.arange(len(reading.positions)).reshape(reading.shape)[:, kept].flatten().tolist()
        own = logits.detach().float() if logits.dtype in (torch.float16, torch.bfloat16) else logits.detach()
        own, wanted = own.flatten(0, 1), [reading.positions[place] for place in places]
        out, width, head = [], own.shape[-1] + getattr(model.config, name).vocab_size, model.segments.head(name)
        trained = any(p.requires_grad for p in model.component(name).get_output_embeddings().parameters())
        few, again = max(1, PIECE // width), torch.is_grad_enabled() and (states.requires_grad or trained)
        rows = len(wanted) if again else max(1, HEADS // width)
        for start in range(0, len(wanted), rows):
            mine = own[start : start + rows].split(few)
            places = range(start, start + sum(map(len, mine)), few)
            pieces = [Piece(self, mapping, wanted[at : at + len(one)], own.shape[-1]) for at, one in zip(places, mine)]
            nodes, number = np.unique(np.concatenate([piece.nodes for piece in pieces]), return_inverse=True)
            logits = reading.logits(head, states, nodes.tolist(), not again).to(own.device)
            number = torch.from_numpy(number).to(own.device)
            logits = logits[number].split([len(piece.nodes) for piece in pieces])
            for piece, theirs, one in zip(pieces, logits, mine):  # less is kept for the gradient than without
                out.append(checkpoint(piece, theirs, one, use_reentrant=False) if again else piece(theirs, one))
        return torch.cat(out).view(shape)

    def boundary(self, mapping: Mapping, device: torch.device) -> "Boundary":
        """`Mapping.at_boundary` as a Boundary; kept."""
        key = (mapping, device)
        if key not in self.boundaries:
            self.boundaries[key] = Boundary(*mapping.at_boundary()[:2], mapping.prefixes(), device)
        return self.boundaries[key]


class Boundary:
    """From probabilities of a component's tokens to the hybrid's, where the tokens of both end.

    Args:
        b, a: Pairs of tokens of the component and the hybrid's, sorted by the first.
        device: Where they are wanted.
    """

    def __init__(self, b: np.ndarray, a: np.ndarray, prefixes: dict[str, np.ndarray], device: torch.device) -> None:
        self.prefixes = {name: torch.from_numpy(found).to(device) for name, found in prefixes.items()}
        names, number, counts = np.unique(b, return_inverse=True, return_counts=True)
        one, many = counts[number] == 1, counts > 1
        # One token only that may come first: no need to know what is shared
        self.single = [torch.from_numpy(ids[one]).to(device) for ids in (b, a)]
        of = np.cumsum(many) - 1
        found = names[many], of[number[~one]], a[~one]
        self.shared, self.of, self.sharing = (torch.from_numpy(ids).to(device) for ids in found)
        self.total = torch.full((2, len(prefixes["b"])), -1, device=device)  # where what is shared of a token is found
        self.total[0, self.single[0]] = self.single[1]
        self.total[1, self.shared] = torch.arange(len(self.shared), device=device)

    def __call__(self, probs, share):
        """[rows, hybrid's vocabulary] of [rows, component's vocabulary] and the hybrid's own probabilities."""

        def wide(ids):
            return ids.expand(len(share), -1)

        b, a = self.single
        mine = share.gather(1, wide(self.sharing))
        total = share.new_zeros(len(share), len(self.shared)).scatter_add_(1, wide(self.of), mine)
        probs, moved, to = self.otherwise(probs, share, total)
        out = torch.zeros_like(share).scatter_add_(1, wide(a), probs.gather(1, wide(b))).scatter_add_(1, to, moved)
        if len(self.shared):
            kept = probs.gather(1, wide(self.shared)) / total.clamp_(min=1e-30)
            out = out.scatter_add_(1, wide(self.sharing), kept.gather(1, wide(self.of)) * mine)
        return out

    def likely(self, of: str, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(How far the likeliest tokens are above the next one, their ids): nothing jumps where another comes in."""
        values, numbers = (known := probs[:, : len(self.prefixes[of])]).topk(min(LIKELY, known.shape[-1]))  # no padding
        return values - values[:, -1:], numbers

    def otherwise(self, probs: torch.Tensor, share: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Lets the likeliest tokens be cut otherwise than they are alone: the rest of a word may ask for that.

        Where B's token is "Deb", A's next token is "De" if the word goes on as "De|bian": of any two tokens of which
        one begins with the other, A's takes a part of the probability of B's, as far as A itself expects it.
        """
        with torch.no_grad():
            expected, names = self.likely("a", share)
        values, numbers = self.likely("b", probs)
        b, a = self.prefixes["b"][numbers][:, :, None], self.prefixes["a"][names][:, None]
        begins = (b[..., 1] <= a[..., 0]) & (a[..., 0] < b[..., 2]) | (a[..., 1] <= b[..., 0]) & (b[..., 0] < a[..., 2])
        begins &= (b[..., 3] != names[:, None]) & (a[..., 3] != numbers[:, :, None]) & (a[..., 0] >= 0)
        parts = UNSURE * expected[:, None] * begins
        single, shared = self.total[:, numbers]
        usual = torch.where(single >= 0, share.gather(1, single.clamp(min=0)), 0.0)
        if total.shape[-1]:
            usual = torch.where(shared >= 0, total.gather(1, shared.clamp(min=0)), usual)
        every = parts.sum(-1)
        taken = values * (every / (every + usual).clamp(min=1e-30)).clamp(max=MOVED)
        moved = (taken / every.clamp(min=1e-30))[:, :, None] * parts
        return probs.scatter_add(1, numbers, -taken), moved.sum(1), names


class Piece:
    """The mapping at some positions: called with (logits of its nodes, A's logits), gives log-probabilities.

    Args:
        aligner: The Aligner.
        mapping: The component's Mapping.
        wanted: Of each position (where the row's nodes begin, Position), or None.
        size: The hybrid's vocabulary.

    Attributes:
        nodes: Those whose predictions it needs, of all rows.
    """

    def __init__(self, aligner: Aligner, mapping: Mapping, wanted: list, size: int) -> None:
        self.aligner, self.mapping, self.size = aligner, mapping, size
        self.there = [i for i, one in enumerate(wanted) if one is not None]
        nodes, dense, weights, covers = {}, [], [], []
        never, blocked, sparse = [], [], []

        def local(node):
            return nodes.setdefault(node, len(nodes))

        for i in self.there:  # first, so that they need not be picked out where there is one of each position
            offset, position = wanted[i]
            for node, _, cover in position.covers:
                if not cover.rest and not cover.ahead:
                    local(offset + node)
        for place, i in enumerate(self.there):
            offset, position = wanted[i]
            last = position.last[-1]
            never.append((place, mapping.never(last)))
            blocked.append((place, mapping.blocked(last)))
            for node, edges, cover in position.covers:
                number = len(covers)
                covers.append(place)
                weights += [(number, local(offset + parent), token) for parent, token in edges]
                if not cover.rest and not cover.ahead:
                    dense.append((number, local(offset + node), place))
                else:
                    pairs = mapping.pairs(cover.rest, cover.ahead, position.last)
                    sparse.append((number, local(offset + node), place, *pairs, cover.without))
        self.nodes = np.array(list(nodes), dtype=np.int64)
        self.covers = torch.tensor(covers, dtype=torch.long)
        self.weights = torch.tensor(weights, dtype=torch.long).view(-1, 3).T
        dense = np.array(dense, dtype=np.int64).reshape(-1, 3).T
        rows = np.arange(len(self.there))
        self.in_order = dense.shape[1] == len(rows) and bool((dense[1:] == rows).all())
        self.dense = torch.from_numpy(dense)
        self.never, self.blocked = _flat(never, size), blocked
        self.sparse = _join(sparse, size)

    def __call__(self, logits, own):
        with without_autocast(own.device.type):
            if not self.there:
                return own.log_softmax(-1)
            if len(self.there) == len(own):
                return self._map(logits.to(own.dtype), own.softmax(-1))
            there = torch.tensor(self.there, device=own.device)
            found = self._map(logits.to(own.dtype), own[there].softmax(-1))
            return own.log_softmax(-1).index_copy(0, there, found)

    def ways(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(Probabilities [nodes, vocabulary], weight of each cover, [rows, vocabulary] of tokens that follow A's)."""
        device, rows, width = logits.device, len(self.there), logits.shape[-1]
        probs = logits.softmax(-1)
        covers = self.covers.to(device)
        weight = probs.new_zeros(len(covers))
        if self.weights.numel():
            number, node, token = self.weights.to(device)
            likeliest = logits.detach().argmax(-1, keepdim=True)
            norm = logits.gather(-1, likeliest) - probs.gather(-1, likeliest).log()
            weight = weight.index_add(0, number, logits[node, token] - norm[node, 0])
        most = probs.new_full((rows,), -torch.inf).scatter_reduce(0, covers, weight.detach(), "amax")
        weight = (weight - most[covers]).exp()
        number, node, place = self.dense.to(device)
        if self.in_order:
            ended = probs[:rows] * weight[number, None]
        else:
            ended = probs.new_zeros(rows, width).index_add(0, place, probs[node] * weight[number, None])
        blocked = _flat(self.blocked, width).to(device)
        if len(blocked):
            ended = ended.view(-1).index_add_(0, blocked, ended.view(-1)[blocked] * (BLOCKED - 1)).view(rows, width)
        return probs, weight, ended

    def _map(self, logits, share):
        device, rows, width = share.device, len(share), logits.shape[-1]
        share = share.clamp_(min=1e-30)
        probs, weight, ended = self.ways(logits)
        out = self.aligner.boundary(self.mapping, device)(ended, share)

        # Elsewhere B's next token begins within bytes that were read, or A's does
        if self.sparse is not None:
            number, node, place, b, a, group, groups, part, kept = (
                one.to(device) if isinstance(one, torch.Tensor) else one for one in self.sparse
            )
            mine = share.view(-1)[place * self.size + a] * part
            total = share.new_zeros(groups).index_add_(0, group, mine)
            values = probs.view(-1)[node * width + b] * mine / total[group] * weight[number] * kept
            out = out.view(-1).index_add_(0, place * self.size + a, values).view(rows, self.size)
        never = self.never.to(device)
        if len(never):
            out = out.view(-1).index_fill_(0, never, 0.0).view(rows, self.size)
        total = out.sum(-1, keepdim=True)
        known = total > 1e-30
        scale = torch.where(known, (1 - TRUST) / total.clamp(min=1e-30), 0.0)
        return (out * scale).addcmul_(share, torch.where(known, TRUST, 1.0).to(share.dtype)).log()


def _flat(found, width):
    """Indices into a flattened [rows, width] of (row, ids)."""
    parts = [row * width + ids for row, ids in found if len(ids)]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.long)


def _join(sparse, size):
    """The pairs of several covers as one list; None without any."""
    sparse = [one for one in sparse if len(one[3])]
    if not sparse:
        return None
    lengths = [len(one[3]) for one in sparse]
    repeated = [torch.from_numpy(np.repeat([one[i] for one in sparse], lengths)) for i in (0, 1, 2)]
    b, a = (torch.from_numpy(np.concatenate([one[i] for one in sparse])) for i in (3, 4))
    counts = [int(one[5][-1]) + 1 for one in sparse]
    starts = np.cumsum([0, *counts])
    group = torch.from_numpy(np.concatenate([one[5] + start for one, start in zip(sparse, starts)]))
    part = torch.from_numpy(np.concatenate([one[6] for one in sparse]))
    kept = torch.from_numpy(np.concatenate([(one[3] != one[8]) * one[7] for one in sparse]))
    return *repeated, b, a, group, int(starts[-1]), part, kept


# ---- running -------------------------------------------------------------------------------------------------------


def aligner_of(model: PreTrainedModel) -> Aligner:
    """The Aligner of a hybrid."""
    found = model.__dict__.get("_aligner")
    if found is None or found.home != model.config.tokenizer_component:
        found = model.__dict__["_aligner"] = Aligner(model.config.tokenizer_component)
    return found


def run_aligned(model: PreTrainedModel, inputs: Inputs, shared: bool) -> Pass:
    """One block whose components read the same bytes; see `running_manticore.run`."""
    if inputs.ids is None:
        raise ManticoreError("Give input_ids: components have several tokenizers, inputs_embeds are of one's tokens.")
    if torch.compiler.is_exporting():
        raise ManticoreError(
            f"Components {list(model.config.aligned)} read the text of input_ids by tokenizers of their own, which no "
            "graph can hold: export model.component(name), each by itself."
        )
    return _run(model, inputs, shared)


@torch.compiler.disable(recursive=False)
def _run(model, inputs, shared):
    config, segments, aligner, weights = model.config, model.segments, aligner_of(model), mixture_rows(model)
    active = active_in(model, weights[0])
    if inputs.embeds is not None and any(name in active for name in config.aligned):
        aligner.check_embeds(model, inputs)
    plain = [
        float(name not in config.aligned and (name in active or name == aligner.home))
        for name in config.component_names
    ]
    found = run_any(model, replace(inputs, keep=False), False, [plain])
    states, readings = dict(found.states), {}
    for name in config.aligned:
        if name in active:
            readings[name] = aligner.read(model, name, inputs)
            states[name] = aligner.states_at(readings[name])
    states = {name: states[name] for name in active}
    state = mix_native(model, weights[0], states) if shared or inputs.keep else None
    boundaries = (resize(model.embed(aligner.home, inputs.ids), config.hidden_size), state) if inputs.keep else None

    def own_logits(kept):
        logits = {n: segments.logits(n, x[:, kept]) for n, x in found.states.items()}
        for name, reading in readings.items():
            logits[name] = aligner.log_probs(model, name, reading, logits[aligner.home], kept)
        return {name: logits[name] for name in active}

    return replace(found, states=states, weights=weights, shared=state, hidden_states=boundaries, own_logits=own_logits)
