"""One cache for a whole hybrid.

Transformers' models keep one cache object whose length is that of its first attention layer. A hybrid runs a component
in segments, and after the first segment has been run that length already counts the new tokens: later segments would
get wrong positions. So every segment sees its own view, made of the layers it owns, and the hybrid counts tokens
itself.
"""

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin


class _Hole(DummyLayer):
    """Stands at the index of a layer that belongs to another segment, so that layers keep their own `layer_idx`.

    Transformers' mask code looks for the first layer that slides, and for the first that neither slides nor is a dummy.
    """

    is_sliding = None


class SegmentCache(Cache):
    """What the segment [start, stop) of a component sees: its own layers at their own indices, and the true length."""

    def __init__(self, owner, layers, start):
        hole = _Hole()
        super().__init__(layers=[hole] * start + list(layers))
        self.owner = owner
        self.max_cache_len = owner.max_cache_len
        self.is_recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        self._attention = next((i for i, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)), None)

    def _attention_layer(self, layer_idx):
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], CacheLayerMixin):
            return self.layers[layer_idx]
        return None if self._attention is None else self.layers[self._attention]

    def get_seq_length(self, layer_idx=0):
        """Tokens already seen; a view without attention layers asks the hybrid's counter."""
        layer = self._attention_layer(layer_idx)
        return self.owner.seen if layer is None else layer.get_seq_length()

    def get_mask_sizes(self, query_length, layer_idx=0):
        """(key length, key offset) of the mask for `query_length` new tokens."""
        layer = self._attention_layer(layer_idx)
        return (self.owner.seen + query_length, 0) if layer is None else layer.get_mask_sizes(query_length)


class ManticoreCache(Cache):
    """The layers of all components in one flat list, in the order of `segments`.

    Reordering (beams), selecting, resetting and moving act on all layers at once, as Transformers does it.

    Args:
        configs: `{component name: configuration}`.
        segments: `{component name: [(block, start, stop), ...]}`, the layers it runs in each block; a layer that is in
            none is left out.
        max_cache_len: None for caches that grow, else the length of static ones.
    """

    # The token counter is a Python integer, so a compiled decoding step would be traced anew for each token.
    is_compileable = False

    def __init__(self, configs, segments, max_cache_len=None):
        layers, self._views = [], {}
        self.max_cache_len = max_cache_len
        for name, config in configs.items():
            if max_cache_len is None:
                part = DynamicCache(config=config)
            else:
                part = StaticCache(config=config, max_cache_len=max_cache_len)
            for block, start, stop in segments[name]:
                self._views[name, block] = SegmentCache(self, part.layers[start:stop], start)
                layers += part.layers[start:stop]
        super().__init__(layers=layers)
        self.seen = 0

    @property
    def is_linear(self):
        """Of no layer: Transformers' `generate` (5.24) feeds a cache of recurrent layers alone all tokens again.

        It takes such a cache's length for unknown; a hybrid counts.
        """
        return [False] * len(self.layers)

    def view(self, name, block):
        """The cache of component `name` in block `block` (0-based); it shares its layers with this cache."""
        return self._views[name, block]

    def advance(self, tokens):
        """Counts `tokens` new positions; called once at the end of each forward of the hybrid."""
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
        self.seen = 0

    def crop(self, tokens_to_remove):
        """Removes the last `tokens_to_remove` tokens (given as a negative number, as Transformers does)."""
        super().crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)

    def forget_padding(self, begun):
        """Empties the recurrent states of rows that consist of left padding so far.

        Transformers takes a call's only token for a generated one, never padding, so it reaches the states of some
        models (Mamba2, Jamba); with several tokens they are masked.

        Args:
            begun: [batch], whether a row has had a real token.
        """
        layers = [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        if not layers or begun.all():
            return
        for layer in layers:
            for states in (layer.conv_states, layer.recurrent_states):
                for state in states.values():
                    if state is not None:
                        state[~begun.to(state.device)] = 0

    def batch_repeat_interleave(self, repeats):
        """Repeats each row `repeats` times. Recurrent layers lack this method in Transformers 5.23."""

        def repeated(rows, device):
            return torch.arange(rows, device=device).repeat_interleave(repeats)

        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                self._pick_rows(layer, repeated)
            if isinstance(layer, CacheLayerMixin):
                layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices):
        """Keeps the rows `indices`."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                self._pick_rows(layer, lambda rows, device: indices.to(device))
            if isinstance(layer, CacheLayerMixin):
                layer.batch_select_indices(indices)

    @staticmethod
    def _pick_rows(layer, chosen):
        for states in (layer.conv_states, layer.recurrent_states):
            for key, state in states.items():
                if state is not None:
                    states[key] = state.index_select(0, chosen(state.shape[0], state.device))
