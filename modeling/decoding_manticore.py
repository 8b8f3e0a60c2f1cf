"""How a hybrid makes and checks its caches, called by hand or by `generate`."""

from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from .cache_manticore import ManticoreCache
from .configuration_manticore import ManticoreError
from .versions_manticore import CACHE

_NO_PAGES = (
    "Continuous batching keeps the keys and values of one list of attention layers of one size in pages; a hybrid has "
    "several models' layers, and recurrent states, which cannot be paged. Use generate() with a batch that is padded "
    "on the left, or pipeline(..., batch_size=8)."
)


class CachedDecoding:
    """Mixin of ManticoreModel."""

    @property
    def init_continuous_batching(self):
        """Not there: `transformers serve --continuous-batching` asks whether it is, and then takes `generate`."""
        raise AttributeError(_NO_PAGES)

    def continuous_batching_context_manager(self, *args, **kwargs):
        """Refused: see the error's message."""
        raise ManticoreError(_NO_PAGES)

    def generate_batch(self, *args, **kwargs):
        """Refused: see the error's message."""
        raise ManticoreError(_NO_PAGES)

    def make_cache(self, max_cache_len=None):
        """An empty cache for this hybrid.

        Args:
            max_cache_len: Length of a static cache; None for one that grows.

        Raises:
            ManticoreError: A component's own class gives no right results with a static cache.
        """
        configs = {name: self._modules[name].config for name in self.config.component_names}
        segments = {name: [(block, *self._range(name, block)) for block in self._blocks_of(name)] for name in configs}
        cache = ManticoreCache(configs, segments, max_cache_len)
        if max_cache_len is not None:
            for name in configs:
                component = self._modules[name]
                recurrent = all(cache.view(name, b)._attention is None for b in self._blocks_of(name))
                if not recurrent and not component._can_compile_fullgraph:
                    raise ManticoreError(
                        f"Component {name!r} ({component.config.model_type}) does not support a static cache; leave "
                        "cache_implementation at its default."
                    )
        return cache

    def _cache_for(self, cache, use_cache):
        if cache is not None and not isinstance(cache, ManticoreCache) and type(cache).__name__ != "ManticoreCache":
            raise ManticoreError(
                f"{CACHE} is a {type(cache).__name__}; a hybrid takes a ManticoreCache (model.make_cache())."
            )
        use_cache = (not self.training) if use_cache is None else use_cache
        if self.training and self.is_activation_checkpointing:
            use_cache = False
        if not use_cache:
            return None
        return self.make_cache() if cache is None else cache

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        implementation = generation_config.cache_implementation
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            if implementation is not None:
                raise ManticoreError(f"Give either cache_implementation or {CACHE}, not both.")
            cache._is_user_defined = True
            return
        if generation_config.use_cache is False:
            return
        if implementation in (None, "dynamic"):
            model_kwargs[CACHE] = self.make_cache()
        elif implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS and "offloaded" not in implementation:
            length = max(max_cache_length, generation_config.max_cache_len or 0)
            model_kwargs[CACHE] = self.make_cache(length)
        else:
            raise ManticoreError(
                f"cache_implementation={implementation!r} is not supported; use 'dynamic' or 'static'."
            )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """Each component makes its own masks from the 2-D one."""
        return attention_mask
