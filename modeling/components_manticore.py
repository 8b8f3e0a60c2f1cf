"""A component as a hybrid needs it: repaired where Transformers is wrong, with its own attention.

Transformers refuses an attention implementation that one sub-model lacks. A hybrid joins models that attend with others
that do not attend at all (Mamba) or in their own way (Bloom, Gemma 2), so these keep theirs.
"""

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .configuration_manticore import ManticoreError
from .mixers_manticore import repair_mixers

# Engines that keep the keys and values themselves: Transformers' continuous batching, vLLM, SGLang
ENGINES = ("paged", "vllm", "sglang")


class EngineError(ManticoreError):
    """A hybrid cannot run in an engine; `what` belongs to it or is its name."""

    def __init__(self, what: str):
        super().__init__(
            f"{what} keeps keys and values outside of the hybrid's cache, for one list of layers of one size, and has "
            "no recurrent states: a hybrid cannot run in that engine. Use generate() with a batch padded on the left, "
            "a pipeline or `transformers serve`; a hybrid pruned to one component can run as that component, saved by "
            "itself."
        )


def prepare(component: PreTrainedModel) -> None:
    """Repairs what Transformers gets wrong for a component: its state-space mixers, and experts."""
    # Experts run in groups by default, which torch cannot do where a row of weights is no multiple of 16 bytes
    experts = [tensor for name, tensor in component.named_parameters() if ".experts." in name and tensor.ndim == 3]
    if any(size * tensor.element_size() % 16 for tensor in experts for size in tensor.shape[1:]):
        component.set_experts_implementation("eager")
    repair_mixers(component)


def check_engine(implementation: str | dict | None) -> None:
    """Raises EngineError for an attention that keeps keys and values outside of the cache it is given."""
    for one in implementation.values() if isinstance(implementation, dict) else (implementation,):
        if isinstance(one, str) and one.partition("|")[0] in ENGINES:
            raise EngineError(f"attn_implementation={one!r}")


def supports_attention(cls: type, implementation: str | None) -> bool:
    """Whether a model class has an attention implementation ("sdpa", "flash_attention_2", "flex_attention", ...)."""
    flags = {"sdpa": "_supports_sdpa", "flex": "_supports_flex_attn", "flash": "_supports_flash_attn"}
    return all(getattr(cls, flag) for word, flag in flags.items() if word in (implementation or "eager"))


def settle_attention(config: PreTrainedConfig) -> None:
    """Lets components whose class lacks the implementation in their configuration use their default."""
    for name in config.component_names:
        sub = getattr(config, name)
        check_engine(sub._attn_implementation)
        cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(sub), None)
        if cls is not None and not supports_attention(cls, sub._attn_implementation):
            sub._attn_implementation = None


def choose_attention(components: dict, implementation: str | dict) -> str | dict:
    """What Transformers' `set_attn_implementation` is to be given so that components that lack one keep theirs.

    `components` are {name: causal LM}; {component name: implementation} is taken literally.
    """
    check_engine(implementation)
    if not isinstance(implementation, str):
        return implementation
    able = [name for name, part in components.items() if supports_attention(type(part), implementation)]
    if len(able) in (0, len(components)):
        return implementation
    kept = {name: part.config._attn_implementation for name, part in components.items()}
    return {"": implementation} | kept | dict.fromkeys(able, implementation)
