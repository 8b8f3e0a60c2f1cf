"""One cache for a whole hybrid, made and checked by hand or by `generate`.

Transformers takes the length of a cache's first attention layer for that of all. Once the first segment of a component
has run, it counts the new tokens already, and later ones would get wrong positions: each sees a view of the layers it
owns (`SegmentCache`, layer_stack_manticore), and the hybrid counts tokens itself. A component that is run whole has its
own cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from .bounds_manticore import trying
from .carried_manticore import optional
from .configuration_manticore import ManticoreError


def _keeping(cls):
    """A class of recurrent layers, but that a state which a backward pass needs is not overwritten by the next."""

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        old = self.recurrent_states[state_idx]
        if old is not None and recurrent_states.requires_grad:
            self.recurrent_states[state_idx] = torch.empty_like(old)
        return cls.update_recurrent_state(self, recurrent_states, state_idx, **kwargs)

    return type(cls.__name__, (cls,), {"update_recurrent_state": update_recurrent_state, "__module__": __name__})


_KEEPING = {cls: _keeping(cls) for cls in (LinearAttentionLayer, *LinearAttentionLayer.__subclasses__())}


class ManticoreCache(Cache):
    """The layers of all components in one flat list, so that Transformers reorders, resets and moves all at once.

    Args:
        configs: `{component name: configuration}`.
        ranges: `{(component name, block): (start, stop)}`, the layers it runs from each block on; a layer that is in
            none is left out.
        max_cache_len: None for caches that grow, else the length of static ones.
        offloading: Whether keys and values wait in the CPU's memory for their layer's turn.
        quantized: Settings of Transformers' QuantizedCache (`backend`, ...) for components with attention; or None.
        beside: Blocks under which layers beside the components' are kept, viewed as of a component without name.
    """

    model_type = "manticore"  # by which a cache of another copy of this file is known
    # The token counter is a Python integer, so a compiled decoding step would be traced anew for each token.
    is_compileable = False

    def __init__(
        self,
        configs: dict,
        ranges: dict,
        max_cache_len: int | None = None,
        offloading: bool = False,
        quantized: dict | None = None,
        beside: list = (),
    ) -> None:
        layers, self._views, self.options = [], {}, (max_cache_len, offloading, quantized)
        self.max_cache_len, self.seen = max_cache_len, 0
        self.readers = {}  # of components with tokenizers of their own: {name: how far each row has been read}
        self.kept, self.records = {}, False  # of mixtures that go by what was read: {file: its `Past`, `Held`}
        self.mask, self.has_padding = None, False  # of what was read (None: all real), and whether any was in between
        # Whether nothing in it depends on where padding stands: neither GPT-Neo's windows nor MPT's biases count places
        kinds = [(getattr(one, "attention_layers", ()), getattr(one, "attn_config", None)) for one in configs.values()]
        self.is_plain = not any("local" in windows or getattr(biases, "alibi", False) for windows, biases in kinds)
        for name, config in configs.items():
            part = _part(name, config, max_cache_len, offloading, quantized)
            for block, (start, stop) in ((block, pair) for (other, block), pair in ranges.items() if other == name):
                kind = None if (start, stop) != (0, len(part.layers)) else type(part)
                self._views[f"{name}-{block}"] = [kind, len(layers), start, stop]
                layers += part.layers[start:stop]
        for number in beside:
            self._views[f"-{number}"] = [None, len(layers), 0, 1]
            layers.append(DynamicLayer() if max_cache_len is None else StaticLayer(max_cache_len))
        self.is_plain &= all(type(layer) in (DynamicLayer, StaticLayer) for layer in layers)
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=False)

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer keeps a state that does not tell what it was before the last token."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    @property
    def is_linear(self) -> list[bool]:
        """Of no layer: else Transformers takes the length of a cache of recurrent layers for unknown."""
        return [False] * len(self.layers)

    def view(self, name: str, block: int) -> Cache:
        """The cache of component `name` from `block` on, on layers of this one; its class's own where it is whole.

        Made for one pass, and not kept: exporters walk through caches, and copy what they find.
        """
        kind, first, start, stop = self._views[f"{name}-{block}"]
        mine = self.layers[first : first + stop - start]
        if kind is None:
            view = optional("layer_stack_manticore").SegmentCache(self.seen, mine, start)
        else:
            view = kind.__new__(kind)
            Cache.__init__(view, layers=mine)
        if self.offloading:
            view.offloading, view.only_non_sliding, view.prefetch_stream = True, False, self.prefetch_stream
        return view

    def stretch(
        self, mask: torch.Tensor | None, name: str, block: int, batch: int, time: int, device: torch.device
    ) -> torch.Tensor | None:
        """The mask [batch, past + time] of a segment, to the end of a static cache (Bloom's biases are as long)."""
        if self.max_cache_len is None:
            return mask
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.view(name, block).layers):
            return mask
        mask = torch.ones(batch, self.seen + time, dtype=torch.long, device=device) if mask is None else mask
        return F.pad(mask, (0, self.max_cache_len - mask.shape[1]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens already seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(key length, key offset) of a full mask for `query_length` new tokens."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forgets everything and keeps the memory."""
        super().reset()
        self.seen, self.mask, self.has_padding, self.readers, self.kept = 0, None, False, {}, {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Puts rows in another order."""
        super().reorder_cache(beam_idx)
        self._pick_beside_layers(lambda rows: beam_idx)

    def _pick_beside_layers(self, chosen):
        """Keeps rows of the mask and of the readers; `chosen` gives their numbers for how many rows there are."""
        if self.mask is not None:
            self.mask = self.mask.index_select(0, chosen(len(self.mask)).to(self.mask.device))
        self.kept = {key: one.pick(chosen(len(one))) for key, one in self.kept.items()}
        for name, found in self.readers.items():
            self.readers[name] = [found[row].copy() for row in chosen(len(found)).tolist()]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `tokens_to_remove` tokens (given as a negative number, as Transformers does)."""
        if tokens_to_remove > 0:
            raise ManticoreError(f"crop({tokens_to_remove}): say what to remove as a negative number, as in crop(-1).")
        removed = min(-tokens_to_remove, self.seen)
        if not removed and not self.records:
            return
        whose = "recurrent or quantised layers, or of a component with its own tokenizer,"
        if self.is_croppable and not self.readers:  # may lack keys that the next token would read
            windows = [one for one in self.layers if isinstance(one, DynamicSlidingWindowLayer) and one.is_initialized]
            lacks = any(x.keys.shape[-2] - removed < min(x.sliding_window - 1, self.seen - removed) for x in windows)
            whose = "sliding windows (without activate_past_recording() before they were read)" if lacks else None
            if self.has_padding and removed and not self.mask[:, -removed:].all():  # rows keep others at these places
                whose = "rows with padding inside"
        if removed and whose:
            raise ManticoreError(f"A cache of {whose} cannot undo tokens: go on from a copy.deepcopy of the cache.")
        self.kept = {key: one.crop(removed) for key, one in self.kept.items() if removed < self.seen}
        super().crop(-removed)
        self.seen -= removed
        self.mask = None if self.mask is None else self.mask[:, : self.seen]

    def activate_past_recording(self) -> None:
        """Lets tokens of the last call be taken back by `crop`, as far as each layer can."""
        super().activate_past_recording()
        self.records = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        self._pick_rows("batch_repeat_interleave", repeats, lambda rows: torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`."""
        self._pick_rows("batch_select_indices", indices, lambda rows: indices)

    def _pick_rows(self, method, argument, chosen):
        self._pick_beside_layers(chosen)
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin):
                getattr(layer, method)(argument)
        # Layers that cannot do it themselves in Transformers 5.24
        layers = [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        for states in [states for layer in layers for states in (layer.conv_states, layer.recurrent_states)]:
            for key in [key for key, state in states.items() if state is not None]:
                states[key] = states[key].index_select(0, chosen(len(states[key])).to(states[key].device))


def is_hybrids(cache: Cache) -> bool:
    """Whether a cache is a ManticoreCache, be it of another copy of this file."""
    return getattr(cache, "model_type", None) == ManticoreCache.model_type


def _part(name, config, max_cache_len, offloading, quantized):
    """A component's own cache, as its class makes it, with recurrent layers that keep what gradients need."""
    part = _made(name, config, max_cache_len, offloading, quantized)
    for layer in part.layers:
        layer.__class__ = _KEEPING.get(type(layer), type(layer))
    return part


def _made(name, config, max_cache_len, offloading, quantized):
    if max_cache_len is not None:
        # Transformers (5.24) fails where all layers slide and only others are to be offloaded
        return StaticCache(config, max_cache_len, offloading=offloading, offload_only_non_sliding=False)
    part = DynamicCache(config=config, offloading=offloading)
    if quantized is None or not any(isinstance(layer, CacheLayerMixin) for layer in part.layers):
        return part
    with trying(f"A quantised cache (cache_config={quantized}) for component {name!r} ({config.model_type})"):
        return QuantizedCache(config=config, **quantized)


def _behind(model, cache):
    """The ManticoreCache of a call that was given it, or a DynamicCache, whose layers are then the hybrid's.

    Raises:
        ManticoreError: It is another cache, or a component is recurrent: a DynamicCache cannot count what it has read.
    """
    if is_hybrids(cache):
        return cache
    found = model.make_cache(offloading=cache.offloading) if type(cache) is DynamicCache else None
    if found is not None and not found.is_recurrent and not found.keeps_more:
        if cache.get_seq_length() == 0 and not hasattr(cache, "_read"):
            cache.layers, cache.layer_class_to_replicate, cache._read = found.layers, None, (None, False)
        if hasattr(cache, "_read") and [*map(type, cache.layers)] == [*map(type, found.layers)]:
            found.layers = cache.layers
            found.seen = max(layer.get_seq_length() for layer in cache.layers if isinstance(layer, CacheLayerMixin))
            found.mask, found.has_padding = cache._read
            return found
    raise ManticoreError(
        f"cache is a {type(cache).__name__}; a hybrid takes a ManticoreCache (model.make_cache()) or, if all its "
        "components are attention-only, an empty DynamicCache. PEFT's prefix tuning gives one with keys and values of "
        "no token: use lora_config or prompt_config instead."
    )


def cache_for(model: PreTrainedModel, cache: Cache | None, use_cache: bool | None) -> ManticoreCache | None:
    """The cache of a call: the one that was given, a new one, or None.

    Raises:
        ManticoreError: It is no cache that a hybrid can use.
    """
    cache = None if cache is None else _behind(model, cache)
    use_cache = (model.config.use_cache and not model.training) if use_cache is None else use_cache
    if not use_cache or model.training and model.is_activation_checkpointing:
        return None
    return model.make_cache() if cache is None else cache


def cache_for_generation(
    model: PreTrainedModel, settings: Any, given: Cache | None, max_cache_length: int, mask: torch.Tensor | None = None
) -> ManticoreCache | None:
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
        if is_hybrids(given) and mask is not None and not given.is_plain:
            read = mask[:, : given.seen] != 0
            if not torch.equal(read, torch.ones_like(read) if given.mask is None else given.mask.to(read.device) != 0):
                given.__dict__.update(vars(model.make_cache(*given.options)))  # for whoever holds it, too
        _behind(model, given)  # an empty DynamicCache gets its layers before any is asked to record the past
        given._is_user_defined = True
        return given
    if settings.use_cache is False:
        return None
    offloading = "offloaded" in (kind or "")
    if offloading and model.device.type == "cpu":
        raise ManticoreError(f"cache_implementation={kind!r}: the hybrid is on the CPU, as is its cache; leave it out.")
    length = max(max_cache_length, settings.max_cache_len or 0) if kind in ALL_STATIC_CACHE_IMPLEMENTATIONS else None
    quantized = {"backend": "quanto", **(settings.cache_config or {})} if kind == "quantized" else None
    cache = model.make_cache(length, offloading, quantized)
    if settings.is_assistant:  # what it drafts may be rejected
        cache.activate_past_recording()
    return cache
