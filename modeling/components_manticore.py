"""A component as a hybrid needs it: repaired where Transformers is wrong, with its own attention.

Transformers refuses an attention implementation that one sub-model lacks. A hybrid joins models that attend with others
that do not attend at all (Mamba) or in their own way (Bloom, Gemma 2), so these keep theirs.
"""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .configuration_manticore import ManticoreError
from .mixers_manticore import repair_mixers

# Of engines that keep the keys and values themselves: Transformers' continuous batching, vLLM, SGLang
_ENGINES = ("paged", "vllm", "sglang")
ENGINE_REFUSED = (
    "{} keeps keys and values outside of the hybrid's cache, for one list of layers of one size, and knows no "
    "recurrent states: a hybrid cannot run in that engine. Use generate(), a pipeline or `transformers serve`; of a "
    "hybrid that is hardened to one component, that component, saved by itself, runs where its family does."
)
NO_PAGES = (
    "Continuous batching keeps the keys and values of one list of attention layers of one size in pages; a hybrid has "
    "several models' layers, and recurrent states, which cannot be paged. Use generate() with a batch that is padded "
    "on the left, or pipeline(..., batch_size=8)."
)


def prepare(component):
    """Repairs what Transformers gets wrong for a component: its state-space mixers, and experts.

    Experts run in groups by default, which torch cannot multiply where a row of their weights is not a multiple of 16
    bytes.
    """
    experts = [tensor for name, tensor in component.named_parameters() if ".experts." in name and tensor.ndim == 3]
    if any(size * tensor.element_size() % 16 for tensor in experts for size in tensor.shape[1:]):
        component.set_experts_implementation("eager")
    repair_mixers(component)


def refuse_engines(implementation):
    """Raises ManticoreError for an attention that keeps keys and values outside of the cache it is given."""
    for one in implementation.values() if isinstance(implementation, dict) else (implementation,):
        if isinstance(one, str) and one.partition("|")[0] in _ENGINES:
            raise ManticoreError(ENGINE_REFUSED.format(f"attn_implementation={one!r}"))


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


def choose_attention(components, implementation):
    """What Transformers' `set_attn_implementation` is to be given so that components that lack one keep theirs.

    Args:
        components: {name: causal LM}.
        implementation: What was asked for: a name, or {component name: name}, which is taken literally.

    Raises:
        ManticoreError: It belongs to an engine with a cache of its own.
    """
    refuse_engines(implementation)
    if not isinstance(implementation, str):
        return implementation
    able = [name for name, part in components.items() if supports_attention(type(part), implementation)]
    if len(able) in (0, len(components)):
        return implementation
    kept = {name: part.config._attn_implementation for name, part in components.items()}
    return {"": implementation} | kept | dict.fromkeys(able, implementation)
