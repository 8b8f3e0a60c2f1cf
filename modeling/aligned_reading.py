"""How a component reads a row of the hybrid's tokens through its own tokenizer: as a tree of its tokens.

The trunk of the tree are tokens that can no longer change: those of whole words. At each of the hybrid's positions the
growing word hangs on it as one or more paths (`aligned_mapping.Cover`). Most of them are where the trunk goes next, so
the tree has few nodes more than the text has tokens. A component with attention alone reads the tree at once, by a mask
that shows each node its ancestors; any other reads the trunk with a cache, and the paths from copies of it.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from .aligned_mapping import Mapping
from .running_manticore import NoGradient
from .segments_manticore import Whole

_WINDOWED = ("sliding_attention", "full_attention")


@dataclass
class Position:
    """What a component's prediction at one of the hybrid's positions is made of.

    Attributes:
        node: The node that has read all bytes so far: its state is the component's here.
        covers: [(node, edges from the beginning of the word as (node, token), Cover)].
        last: The hybrid's tokens that the growing word lies in, as a tuple; the last one is the last that was read.
    """

    node: int
    covers: list
    last: tuple


@dataclass
class Tree:
    """New nodes of a row; node 0 is where an earlier call ended, or before all tokens.

    Attributes:
        parents, tokens, depths: Of each node; the depth of the first token of all is 0.
        trunk: Nodes that can no longer change, in order.
        end: The last of them, or 0.
        positions: A Position for each of the hybrid's tokens, or None.
    """

    depths: list
    parents: list = field(default_factory=lambda: [-1])
    tokens: list = field(default_factory=lambda: [0])
    trunk: list = field(default_factory=list)
    end: int = 0
    positions: list = field(default_factory=list)
    known: dict = field(default_factory=dict)

    def add(self, parent: int, token: int) -> int:
        """The node of a token after another node, made if need be."""
        key = (parent, token)
        if key not in self.known:
            self.known[key] = len(self.parents)
            self.parents.append(parent)
            self.tokens.append(token)
            self.depths.append(self.depths[parent] + 1)
        return self.known[key]

    def extend(self, tokens: Iterable[int]) -> None:
        """Lets the trunk grow."""
        for token in tokens:
            self.end = self.add(self.end, token)
            self.trunk.append(self.end)

    def paths(self, start: int, longest: int) -> dict[int, tuple[int, ...]]:
        """{node: tokens that lead to it} of a node and those after it, up to some number of tokens."""
        found = {start: ()}
        for node in range(start + 1, len(self.parents)):
            path = found.get(self.parents[node])
            if path is not None and len(path) < longest:
                found[node] = (*path, self.tokens[node])
        return found


@dataclass
class Row:
    """How far a component has read a row.

    Attributes:
        word: Bytes of the growing word.
        read: The hybrid's tokens, from one that the growing word begins in.
        begun: Whether the component's own start tokens have been read.
        texts: Whether any text has come after them.
        depth: Depth of the last token of the trunk; -1: none.
        cache: The component's cache of the trunk, None before the first token.
        state: [width] after the trunk, None before.
        ahead: (tokens, cache after them, their states) of the growing word, from the trunk on; None: not kept.
        told: The head's logits after the trunk, and after tokens of the growing word, by those tokens.
    """

    word: bytes = b""
    read: tuple = ()
    begun: bool = False
    texts: bool = False
    depth: int = -1
    cache: object = None
    state: torch.Tensor | None = None
    ahead: tuple | None = None
    told: dict = field(default_factory=dict)

    def copy(self) -> "Row":
        """One that can be read on by itself."""
        out = copy.copy(self)
        out.cache = None if self.cache is None else fork(self.cache)
        return out


def grow(mapping: Mapping, row: Row, ids: list[int], last: bool = False) -> tuple[Tree, Row]:
    """Reads tokens of the hybrid into a row.

    Args:
        mapping: The component's `Mapping`.
        row: The Row before them.
        ids: The tokens.
        last: Whether what comes after the last of them is all that is wanted: then only that one has a Position.

    Returns:
        (the Tree of what the component reads, the Row after them, without states and cache).
    """
    a, b, tree = mapping.a, mapping.b, Tree([row.depth])
    word, read, begun, texts = row.word, row.read, row.begun, row.texts
    if not begun and len(ids):
        tree.extend(b.start)
        word, begun = mapping.begins_with, True
    for place, number in enumerate(ids, 1):
        data = a.table[number] if number < a.size else b""
        if data is None:
            text, tokens, anew = mapping.read_special(number)
            if text is None:
                if texts or not anew:
                    tree.extend((*(b.cut(word) if texts else ()), *tokens))
                    word, read = mapping.begins_with if anew else b"", ()
                texts = not anew
            data = text
        elif not texts:
            data, texts = data.removeprefix(mapping.put_before), True
        if data:
            texts = True
            done, word = mapping.grow(word, data)
            if done:
                tree.extend(b.cut(done))
            read = a.ending((*read, number), len(word))
        wanted = not last or place == len(ids)
        tree.positions.append(_position(mapping, tree, word, read or (number,), texts) if wanted else None)
    after = Row(word=word, read=read, begun=begun, texts=texts, depth=tree.depths[tree.end])
    return tree, after


def _position(mapping, tree, word, last, texts):
    covers, node = [], tree.end
    for cover in mapping.covers(word, mapping.opens(last[-1]), len(last)) if texts else mapping.first_covers():
        at, edges = tree.end, []
        for token in cover.path:
            edges.append((at, token))
            at = tree.add(at, token)
        covers.append((at, edges, cover))
        if not cover.rest and not cover.ahead and node == tree.end:
            node = at
    return Position(node, covers, last)


def _device_of(segment):
    return segment.device or next(segment.stack.parameters()).device


# ---- states of the nodes -------------------------------------------------------------------------------------------


def read_trees(segment: Whole, config: PreTrainedConfig, trees: list[Tree], rows: list[Row] | None = None) -> tuple:
    """Last states of all nodes of several trees, in one call of an attention-only component.

    Args:
        segment: The component as a `Whole`.
        config: Its configuration.
        trees: The Trees of the rows.
        rows: The Rows before them, where caches are wanted; None: the trees begin with nothing.

    Returns:
        ([nodes, width] of each tree; of node 0 the state of the row before, or zeros; caches of the trunks, or None).
    """
    device = _device_of(segment)
    size = max(len(tree.parents) for tree in trees) - 1
    ids = torch.zeros(len(trees), size, dtype=torch.long)
    depths, sees = torch.zeros_like(ids), torch.eye(size, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        count = len(tree.parents) - 1
        ids[row, :count] = torch.tensor(tree.tokens[1:])
        depths[row, :count] = torch.tensor(tree.depths[1:])
        for node in range(count):
            if (parent := tree.parents[node + 1] - 1) >= 0:
                sees[row, node] |= sees[row, parent]
    ids, depths, sees = ids.to(device), depths.to(device), sees.to(device)
    beside = None
    if rows is not None:
        beside = DynamicCache()
        none = [None] * len(DynamicCache(config=config).layers)
        kept = zip(*(none if row.cache is None else row.cache.layers for row in rows))
        beside.layers = [_Beside(trunks) for trunks in kept]
    ends = torch.tensor([tree.depths[0] for tree in trees], device=device)
    states = segment(ids, masks(segment, sees, depths, ends, beside), depths, beside)
    befores = [None if rows is None else row.state for row in rows or trees]
    zeros = states.new_zeros(states.shape[-1])
    states = [torch.cat([(zeros if one is None else one)[None], found]) for one, found in zip(befores, states)]
    return states, None if rows is None else [_grown(config, *one, beside) for one in enumerate(zip(rows, trees))]


def _grown(config, number, pair, beside):
    """The cache of a row with the trunk's new nodes."""
    row, tree = pair
    if not tree.trunk:
        return row.cache
    out = DynamicCache(config=config) if row.cache is None else fork(row.cache)
    for layer, new in zip(out.layers, beside.layers):
        if new.keys is not None:  # layers that share another's have none
            picked = torch.tensor(tree.trunk, device=new.keys.device) - 1
            layer.update(*(one[number : number + 1].index_select(2, picked) for one in (new.keys, new.values)))
    return out


class _Beside(DynamicLayer):
    """Layer of a cache that shows trunks of several rows to the nodes of trees, and keeps those nodes alone.

    Args:
        trunks: Layers of the rows' caches; None: a row that begins.
    """

    def __init__(self, trunks):
        super().__init__()
        self.keys = self.values = None
        self.trunks = [None if one is None or one.keys is None else one for one in trunks]
        self.lengths = [0 if one is None else one.keys.shape[-2] for one in self.trunks]

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys, self.values = key_states, value_states
        longest = max(self.lengths)
        if not longest:
            return key_states, value_states

        def shown(name, new):
            past = new.new_zeros(*new.shape[:2], longest, new.shape[-1])
            for row, (trunk, length) in enumerate(zip(self.trunks, self.lengths)):
                if length:
                    past[row, :, longest - length :] = getattr(trunk, name)[0]
            return torch.cat([past, new], -2)

        return shown("keys", key_states), shown("values", value_states)


def masks(segment: Whole, sees: Tensor, depths: Tensor, ends: Tensor, beside: Cache | None) -> Tensor | dict:
    """What Transformers' attention is given for `sees` [batch, query, key]; one for each kind of layers.

    Args:
        segment, sees, depths: Of the nodes.
        ends: [batch] depths of the last tokens before them.
        beside: Cache whose layers show those tokens, or None.
    """
    config, dtype = segment.stack.config, next(p.dtype for p in segment.stack.parameters() if p.is_floating_point())
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)

    def mask(number, near):
        shown, at = sees, depths
        lengths = torch.tensor(beside.layers[number].lengths if beside is not None else [0], device=sees.device)
        if longest := int(lengths.max()):
            back = torch.arange(longest - 1, -1, -1, device=sees.device)  # how far before the last one
            there = (back < lengths[:, None])[:, None].expand(-1, sees.shape[1], -1)
            shown, at = torch.cat([there, sees], -1), torch.cat([ends[:, None] - back, depths], -1)
        if near:
            shown = shown & (depths[:, :, None] - at[:, None, :] < window)
        out = torch.zeros(shown.shape, dtype=dtype, device=shown.device)
        return out.masked_fill_(~shown, torch.finfo(dtype).min)[:, None]

    if kinds is None:
        return mask(0, bool(window))
    return {kind: mask(kinds.index(kind), kind == "sliding_attention") for kind in dict.fromkeys(kinds)}


def walk(segment: Whole, config: PreTrainedConfig, tree: Tree, row: Row, after: Row | None) -> torch.Tensor | None:
    """Last states of all nodes of a tree, by reading its trunk with a cache and its paths from copies of it.

    Args:
        segment: The component as a `Whole`.
        config: Its configuration.
        tree: The Tree.
        row: The Row before it.
        after: The Row after it, which gets cache, state and what was read ahead; None: they are not wanted.

    Returns:
        [nodes, width]; node 0 has the state of the row before, or zeros. None: nothing but padding so far.
    """
    if len(tree.parents) == 1:
        if after is not None:
            after.cache, after.state, after.ahead = row.cache, row.state, row.ahead
        return None if row.state is None else row.state[None]
    device = _device_of(segment)
    cache = fork(row.cache) if row.cache is not None else DynamicCache(config=config)
    states, children = [row.state, *[None] * (len(tree.parents) - 1)], {}
    # Steps of one token overwrite states that gradients need, in some classes: there no step is shorter than two
    careful = torch.is_grad_enabled() and after is None and not segment.layout.attends
    trunk = set(tree.trunk)
    for node, parent in enumerate(tree.parents):
        if parent >= 0 and node not in trunk:
            children.setdefault(parent, []).append(node)

    # Layers that are checkpointed leave out the cache they are given: here each call as a whole is
    checked = [one for one in segment.stack.modules() if getattr(one, "gradient_checkpointing", False)]
    checked = checked if segment.stack.training and torch.is_grad_enabled() else []

    def run(ids, depths, cache):
        cache = fork(cache) if torch.is_grad_enabled() else cache  # states are changed in place
        for one in checked:
            one.gradient_checkpointing = False
        try:
            return segment(ids, None, depths, cache)[0], cache
        finally:
            for one in checked:
                one.gradient_checkpointing = True

    def read(nodes, cache):
        """Reads a chain of nodes; gives the cache after it."""
        ids, depths = [tree.tokens[node] for node in nodes], [tree.depths[node] for node in nodes]
        if careful and len(nodes) == 1:  # and then nothing reads on from this cache
            ids, depths = [*ids, *ids], [*depths, depths[0] + 1]
        given = torch.tensor([ids], device=device), torch.tensor([depths], device=device), cache
        found, cache = checkpoint(run, *given, use_reentrant=False) if checked else run(*given)
        for node, state in zip(nodes, found):
            states[node] = state
        return cache

    def leaves(node, path):
        below = children.get(node, ())
        if not below and path:
            yield path
        for child in below:
            yield from leaves(child, [*path, child])

    pending, at = list(tree.trunk), 0
    if row.ahead is not None and pending:
        tokens, further, found = row.ahead
        if tuple(tree.tokens[node] for node in pending[: len(tokens)]) == tokens:
            cache = fork(further)
            for node, state in zip(pending, found):
                states[node] = state
            at = len(tokens)
            # Nodes inside what was read ahead have no cache of their own: paths from there are read anew.
            if any(node in children for node in (0, *pending[: at - 1])):
                cache, at = fork(row.cache) if row.cache is not None else DynamicCache(config=config), 0
    start, ahead = at, None

    def branch(node, before=()):
        nonlocal ahead
        for path in leaves(node, []):
            after_path = read([*before, *path], fork(cache))
            if node == tree.end:
                ahead = ahead or (tuple(tree.tokens[one] for one in path), after_path, [states[one] for one in path])

    branch(pending[start - 1] if start else 0)
    while at < len(pending):
        is_end = at == len(pending) - 1
        if careful and at == start and pending[at] in children:
            branch(pending[at], pending[start : at + 1])
        elif pending[at] in children or is_end:
            cache = read(pending[start : at + 1], cache)
            start = at + 1
            branch(pending[at])
        at += 1
    if after is not None:
        after.cache, after.ahead, after.state = cache, ahead, states[tree.end]
    empty = torch.zeros_like(next(state for state in states if state is not None))
    out = torch.stack([empty if state is None else state for state in states])
    return NoGradient.apply(out) if after is not None and not segment.layout.attends and out.requires_grad else out


def fork(cache: Cache) -> Cache:
    """A copy of a component's cache that can be read on by itself; what is never changed in place is shared."""
    out = copy.copy(cache)
    out.layers = [_fork_layer(layer) for layer in cache.layers]
    return out


def _fork_layer(layer):
    if not isinstance(layer, (DynamicLayer, LinearAttentionCacheLayerMixin)):
        return copy.deepcopy(layer)
    kind = type(layer)
    if torch.is_grad_enabled() and isinstance(layer, LinearAttentionCacheLayerMixin) and not issubclass(kind, _Kept):
        kind = _kept.setdefault(kind, type(kind.__name__, (_Kept, kind), {}))
    out = kind.__new__(kind)
    for key, value in vars(layer).items():
        if isinstance(value, dict):
            value = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in value.items()}
        out.__dict__[key] = value
    return out


class _Kept:
    """Mixin of recurrent layers of a cache whose states gradients go through: none is overwritten in place."""

    def update_conv_state(self, conv_states, state_idx=0, **kwargs):
        if self.conv_states[state_idx] is not None:
            self.conv_states[state_idx] = self.conv_states[state_idx].clone()
        return super().update_conv_state(conv_states, state_idx=state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        if not self.is_recurrent_states_initialized[state_idx]:
            self.lazy_initialization(recurrent_states=recurrent_states, state_idx=state_idx)
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


_kept = {}


def may_read_trees(segment: Whole, config: PreTrainedConfig) -> bool:
    """Whether nothing that a component says of itself forbids that it reads trees."""
    if not segment.layout.attends or not segment.layout.positions:
        return False
    if any(kind not in _WINDOWED for kind in getattr(config, "layer_types", None) or ()):
        return False
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers)


@torch.no_grad()
def can_read_trees(segment: Whole, config: PreTrainedConfig) -> bool:
    """Whether a component reads a tree as it reads each of its paths: tried on a few tokens."""
    if not may_read_trees(segment, config):
        return False
    paths, device = [(4, 5), (6,)], _device_of(segment)
    training = [one for one in segment.stack.modules() if one.training]
    try:
        for one in training:  # without dropout
            one.training = False
        row = Row()
        for trunk in ((1, 2, 3), (7, 8)):  # the second after a cache of the first
            tree, ends = Tree([row.depth]), []
            tree.extend(trunk)
            for path in paths:
                at = tree.end
                for token in path:
                    at = tree.add(at, token)
                ends.append(at)
            (found,), (cache,) = read_trees(segment, config, [tree], [row])
            before = () if row.depth < 0 else (1, 2, 3)
            for end, path in zip(ends, paths):
                ids = torch.tensor([[*before, *trunk, *path]], device=device)
                alone = segment(ids, None, torch.arange(ids.shape[1], device=device)[None], None)[0, -1]
                if not torch.allclose(found[end].float(), alone.float(), atol=1e-2, rtol=1e-2):
                    return False
            row = Row(depth=tree.depths[tree.end], cache=cache, state=found[tree.end])
    except Exception:  # of the component's class, or its attention
        return False
    finally:
        for one in training:
            one.training = True
    return True
