"""One cache for a whole hybrid, made and checked by hand or by `generate`.

Transformers' models keep one cache object whose length is that of its first attention layer. A component that is run
whole has its own. Of one that runs in segments, after the first has been run that length already counts the new tokens,
and later ones would get wrong positions: each sees its own view, made of the layers it owns, and the hybrid counts
tokens itself.
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from .configuration_manticore import ManticoreError


class _Hole(DummyLayer):
    """Stands at the index of a layer that belongs to another segment, so that layers keep their own `layer_idx`.

    Transformers' mask code looks for the first layer that slides, and for the first that neither slides nor is a dummy.
    """

    is_sliding = None


class SegmentCache(Cache):
    """What the segment [start, stop) of a component sees: its own layers at their own indices, and the true length."""

    def __init__(self, owner, layers, start):
        super().__init__(layers=[_Hole()] * start + list(layers))
        self.owner = owner
        self._attention = next((layer for layer in layers if isinstance(layer, CacheLayerMixin)), None)

    def _attention_layer(self, layer_idx):
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], CacheLayerMixin):
            return self.layers[layer_idx]
        return self._attention

    def get_seq_length(self, layer_idx=0):
        """Tokens already seen; a view without attention layers asks the hybrid's counter."""
        layer = self._attention_layer(layer_idx)
        return self.owner.seen if layer is None else layer.get_seq_length()

    def get_mask_sizes(self, query_length, layer_idx=0):
        """(key length, key offset) of the mask for `query_length` new tokens."""
        layer = self._attention_layer(layer_idx)
        return (self.owner.seen + query_length, 0) if layer is None else layer.get_mask_sizes(query_length)


class ManticoreCache(Cache):
    """The layers of all components in one flat list.

    Reordering (beams), selecting, resetting and moving act on all layers at once, as Transformers does it.

    Args:
        configs: `{component name: configuration}`.
        ranges: `{(component name, block): (start, stop)}`, the layers it runs from each block on; a layer that is in
            none is left out.
        max_cache_len: None for caches that grow, else the length of static ones.
    """

    # The token counter is a Python integer, so a compiled decoding step would be traced anew for each token.
    is_compileable = False

    def __init__(self, configs, ranges, max_cache_len=None):
        layers, self._views = [], {}
        self.max_cache_len, self.seen = max_cache_len, 0
        self.mask, self.has_padding = None, False  # of what was read (None: all real), and whether any was in between
        self.is_plain = not any("local" in getattr(config, "attention_layers", ()) for config in configs.values())
        for name, config in configs.items():
            if max_cache_len is None:
                part = DynamicCache(config=config)
            else:
                part = StaticCache(config=config, max_cache_len=max_cache_len)
            for block, (start, stop) in ((block, pair) for (other, block), pair in ranges.items() if other == name):
                mine, whole = part.layers[start:stop], (start, stop) == (0, len(part.layers))
                self._views[name, block] = part if whole else SegmentCache(self, mine, start)
                layers += mine
        self.is_plain &= all(type(layer) in (DynamicLayer, StaticLayer) for layer in layers)
        super().__init__(layers=layers)

    @property
    def is_linear(self):
        """Of no layer: Transformers' `generate` feeds a cache of recurrent layers alone all tokens again.

        It takes such a cache's length for unknown; a hybrid counts.
        """
        return [False] * len(self.layers)

    def view(self, name, block):
        """The cache of component `name` in block `block` (0-based), on layers of this one.

        Of a component that is run whole it is that component's own cache, as its class makes it.
        """
        return self._views[name, block]

    def attends(self, name):
        """Whether a component has layers with keys and values."""
        views = [view for (other, _), view in self._views.items() if other == name]
        return any(isinstance(layer, CacheLayerMixin) for view in views for layer in view.layers)

    def stretch(self, mask, name, block, batch, time, device):
        """The mask [batch, past + time] of a segment; to the end of a static cache, since not every model does that.

        (Bloom's position biases are as long as the mask.)
        """
        layers = self.view(name, block).layers
        if self.max_cache_len is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
            return mask
        mask = torch.ones(batch, self.seen + time, dtype=torch.long, device=device) if mask is None else mask
        return F.pad(mask, (0, self.max_cache_len - mask.shape[1]))

    def advance(self, tokens):
        """Counts `tokens` new positions; called once at the end of each pass."""
        self.seen += tokens

    def get_seq_length(self, layer_idx=0):
        """Tokens already seen."""
        return self.seen

    def get_mask_sizes(self, query_length, layer_idx=0):
        """(key length, key offset) of a full mask for `query_length` new tokens."""
        return self.seen + query_length, 0

    def reset(self):
        """Forgets everything and keeps the memory."""
        super().reset()
        self.seen, self.mask, self.has_padding = 0, None, False

    def restart(self, empty):
        """Becomes a new cache of the same hybrid, `empty`, for the sake of whoever holds this one."""
        self.__dict__.update(empty.__dict__)
        for view in self._views.values():
            if isinstance(view, SegmentCache):
                view.owner = self

    def reorder_cache(self, beam_idx):
        """Puts rows in another order."""
        super().reorder_cache(beam_idx)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, beam_idx.to(self.mask.device))

    def crop(self, tokens_to_remove):
        """Removes the last `tokens_to_remove` tokens (given as a negative number, as Transformers does)."""
        super().crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)
        self.mask = None if self.mask is None else self.mask[:, : self.seen]

    def batch_repeat_interleave(self, repeats):
        """Repeats each row `repeats` times."""
        self._pick_rows(lambda rows, device: torch.arange(rows, device=device).repeat_interleave(repeats))
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin):
                layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices):
        """Keeps the rows `indices`."""
        self._pick_rows(lambda rows, device: indices.to(device))
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin):
                layer.batch_select_indices(indices)

    def _pick_rows(self, chosen):
        if self.mask is not None:
            self.mask = self.mask.index_select(0, chosen(len(self.mask), self.mask.device))
        # Recurrent layers cannot do it themselves in Transformers 5.24
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states in (layer.conv_states, layer.recurrent_states):
                    for key, state in states.items():
                        if state is not None:
                            states[key] = state.index_select(0, chosen(state.shape[0], state.device))


def cache_for(model, cache, use_cache):
    """The cache of a call: the one that was given, a new one, or None.

    Raises:
        ManticoreError: It is no cache of a hybrid.
    """
    if cache is not None and not isinstance(cache, ManticoreCache) and type(cache).__name__ != "ManticoreCache":
        raise ManticoreError(
            f"cache is a {type(cache).__name__}; a hybrid takes a ManticoreCache (model.make_cache())."
        )
    use_cache = (not model.training) if use_cache is None else use_cache
    if model.training and model.is_activation_checkpointing:
        use_cache = False
    if not use_cache:
        return None
    return model.make_cache() if cache is None else cache


def cache_for_generation(model, settings, given, max_cache_length, mask=None):
    """The cache that `generate` begins with, or None.

    Args:
        model: The hybrid.
        settings: The GenerationConfig.
        given: The caller's own, or None.
        max_cache_length: What is read and generated at most.
        mask: [batch, time] of all that is to be read, or None. Where it leaves out tokens that the caller's cache has
            read as text (rows that had ended before others, in an earlier turn), all is read again, into that cache.

    Raises:
        ManticoreError: Settings that contradict each other, or a kind of cache that hybrids do not have.
    """
    kind = settings.cache_implementation
    if given is not None:
        if kind is not None:
            raise ManticoreError("Give either cache_implementation or cache, not both.")
        if isinstance(given, ManticoreCache) and mask is not None and not given.is_plain:
            read = mask[:, : given.seen] != 0
            if not torch.equal(read, torch.ones_like(read) if given.mask is None else given.mask.to(read.device) != 0):
                given.restart(model.make_cache(given.max_cache_len))
        given._is_user_defined = True
        return given
    if settings.use_cache is False:
        return None
    if kind in (None, "dynamic"):
        return model.make_cache()
    if kind in ALL_STATIC_CACHE_IMPLEMENTATIONS and "offloaded" not in kind:
        return model.make_cache(max(max_cache_length, settings.max_cache_len or 0))
    raise ManticoreError(f"cache_implementation={kind!r} is not supported; use 'dynamic' or 'static'.")
