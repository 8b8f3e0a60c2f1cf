"""Which attention implementation each component runs: the one asked for, where its class has it.

Transformers refuses an implementation that one sub-model lacks. A hybrid joins models that attend with others that do
not attend at all (Mamba) or in their own way (Bloom, Gemma 2), so these keep theirs.
"""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .configuration_manticore import ManticoreError

# Of engines that keep the keys and values themselves: Transformers' continuous batching, vLLM, SGLang
_ENGINES = ("paged", "vllm", "sglang")
_REFUSAL = (
    "{} keeps keys and values outside of the hybrid's cache, for one list of layers of one size, and knows no "
    "recurrent states: a hybrid cannot run in that engine. Use generate(), a pipeline or `transformers serve`; of a "
    "hybrid that is hardened to one component, that component, saved by itself, runs where its family does."
)


def refuse_engines(implementation):
    """Raises ManticoreError for an attention that keeps keys and values outside of the cache it is given."""
    for one in implementation.values() if isinstance(implementation, dict) else (implementation,):
        if isinstance(one, str) and one.partition("|")[0] in _ENGINES:
            raise ManticoreError(_REFUSAL.format(f"attn_implementation={one!r}"))


def supports_attention(cls, implementation):
    """Whether a model class has an attention implementation ("sdpa", "flash_attention_2", "flex_attention", ...)."""
    if implementation is None or implementation == "eager":
        return True
    for word, flag in (("sdpa", "_supports_sdpa"), ("flex", "_supports_flex_attn"), ("flash", "_supports_flash_attn")):
        if word in implementation:
            return bool(getattr(cls, flag))
    return True


def settle_attention(config):
    """Lets components whose class lacks the requested implementation fall back to their default, before they are built.

    Args:
        config: A ManticoreConfig whose sub-configs hold what was requested.
    """
    for name in config.component_names:
        sub = getattr(config, name)
        refuse_engines(sub._attn_implementation)
        cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(sub), None)
        if cls is not None and not supports_attention(cls, sub._attn_implementation):
            sub._attn_implementation = None


class PerComponentAttention:
    """Mixin of ManticoreModel."""

    _supports_attention_backend = False

    @classmethod
    def is_backend_compatible(cls):
        """Never returns: vLLM (0.32) and SGLang (0.5) go on after a False, and fail in a worker with a long trace.

        Raises:
            ManticoreError: Always. Only such engines ask.
        """
        raise ManticoreError(_REFUSAL.format("An engine that puts its own attention into a model (vLLM, SGLang)"))

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """Sets the implementation of every component that has it; the others keep theirs.

        Args:
            attn_implementation: A name, or a dict {component name: name} that is taken literally.
            *args, **kwargs: As in Transformers.

        Raises:
            ManticoreError: It belongs to an engine with a cache of its own.
            ValueError: No component has it, or a component named in a dict lacks it.
        """
        refuse_engines(attn_implementation)
        parts = {name: self.component(name) for name in self.config.component_names}
        able = list(parts)
        if isinstance(attn_implementation, str):
            able = [name for name, part in parts.items() if supports_attention(type(part), attn_implementation)]
        if 0 < len(able) < len(parts):
            attn_implementation = {"": attn_implementation} | {
                name: attn_implementation if name in able else part.config._attn_implementation
                for name, part in parts.items()
            }
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
