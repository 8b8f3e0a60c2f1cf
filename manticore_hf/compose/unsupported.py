"""Kinds of causal LMs that no hybrid can have as a component, told from their configuration.

What can be found by running a few tokens is found by `verify_segments`; here is the rest.
"""

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from manticore_hf.modeling.bounds_manticore import ManticoreError, reason, show

_INSTEAD = "only causal LMs can be joined"

_DRAFTS = "it drafts for another model, whose states it reads"

# Model types that cannot be components although their classes are causal LMs: what only a longer or padded input, or
# none at all, would show.
UNSUITED = {
    "blt": "it reads bytes in patches that other parts of it make",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "minimax_m3_vl_text": "padding on the left shifts the blocks of keys that its sparse attention chooses from",
    "moshi": "beyond its sliding window Transformers decodes it with a cache differently than without",
    "zamba": "in Transformers a call with several tokens after the first starts from an empty state",
}


def check_type(what: str, model_type: str) -> None:
    """Raises ManticoreError if no model of a type can be a component.

    Args:
        what: How a message calls the component.
        model_type: Transformers' name of the type.
    """
    if model_type in UNSUITED:
        raise ManticoreError(f"{what}: model type {model_type!r} is not supported: {UNSUITED[model_type]}.")


def check_kind(what: str, config: PreTrainedConfig) -> None:
    """Raises ManticoreError if a configuration is of a kind of model that cannot be a component.

    Args:
        what: How a message calls the component.
        config: Its configuration.
    """
    kind = config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True):
        raise ManticoreError(f"{what} reads text in both directions (is_decoder=False in its config.json); {_INSTEAD}.")
    check_type(what, kind)
    try:
        text = config.get_text_config()
    except ValueError as err:  # several that it might be
        raise ManticoreError(f"{what}: its config.json cannot be used: {reason(err)}") from err
    if not isinstance(text, PreTrainedConfig):  # its class knows no such part
        raise ManticoreError(f"{what}: its config.json has a part {show(text)}, which a {kind!r} has not; remove it.")
    if text is not config:
        parts = ", ".join(sorted(key for key in config.sub_configs if getattr(config, key, None) is not None))
        raise ManticoreError(
            f"{what} is a model of several parts ({parts}), of which a hybrid can have only the text model: "
            + _how_to_get(text)
        )
    media = sorted(key for key in config.sub_configs if key in ("vision_config", "audio_config"))
    if media:
        raise ManticoreError(f"{what} reads more than text ({', '.join(media)}), which no hybrid can give it.")


def _how_to_get(text):
    if text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"give a checkpoint or an instance of model type {text.model_type!r}."
    return f"its type {text.model_type!r} has no causal LM of its own in Transformers."
