"""Small models from scratch, of any family by its Transformers name, and hybrids of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from manticore_hf.compose.components import ComponentSpec
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.mixers_manticore import repair_mixers

HEAD_WIDTH = 32

DESIGNED = "jamba"
"""A hybrid designed by hand: Transformers' Jamba with experts off, Mamba and attention layers in turn, Mamba first (as
MambaFormer, Park et al., arXiv 2402.04248, interleaves them, here with MLPs), no positions but what Mamba knows."""


def scratch_config(family: str, vocab_size: int, layers: int, width: int, positions: int) -> PretrainedConfig:
    """A family's configuration at a small size.

    What a family calls its sizes is asked of its configuration. Attention has heads of 32 (one head where the width is
    smaller), as many for keys and values; MLPs are four widths wide, and recurrent states as the family has them by
    default. No dropout, and no special tokens: every id is an ordinary token here (families that know a padding token
    do not train its embedding).

    Args:
        family: Transformers' model type: llama, mamba, gpt_neox, ...
        vocab_size: Token ids.
        layers, width: Number of layers, width of the hidden states.
        positions: Longest sequence.

    Returns:
        The configuration.

    Raises:
        ManticoreError: There is no such family of causal LMs, or it cannot be made of that size.
    """
    if family not in CONFIG_MAPPING or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or family == "manticore":
        raise ManticoreError(
            f"model={family!r} is not a model type with a causal LM in Transformers; give for example llama, gpt_neox, "
            "mamba or mamba2."
        )
    if min(layers, width) < 1:
        raise ManticoreError(f"{family}: {layers} layers of width {width} make no model; give at least 1 of each.")
    heads = max(1, width // HEAD_WIDTH)
    if width % heads or width // heads % 2:
        raise ManticoreError(
            f"{family}: hidden_size={width} cannot be cut into heads of an even width; give a multiple of {HEAD_WIDTH}."
        )
    wanted = {
        "vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": width // heads, "intermediate_size": 4 * width, "ffn_dim": 4 * width,
        "max_position_embeddings": positions, "word_embed_proj_dim": width, "lru_width": width,
        "rotary_dim": width // heads, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    plain = AutoConfig.for_model(family)
    own = {plain.attribute_map.get(key, key): value for key, value in wanted.items() if hasattr(plain, key)}
    if family == "mamba2":  # its heads are of the inner width, and head_dim means theirs
        own |= {"head_dim": HEAD_WIDTH, "num_heads": plain.expand * width // HEAD_WIDTH, "n_groups": 1}
    if family == "jamba":
        if layers < 2:
            raise ManticoreError(f"jamba: {layers} layer has no attention, which comes second; give at least 2 layers.")
        own |= {"num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
        own |= {"mamba_dt_rank": -(-width // 16)}
    if family == "gpt_neo":
        own["attention_types"] = [[["global"], layers]]
    dropped = {key: 0.0 for key, value in vars(plain).items() if "drop" in key and isinstance(value, float)}
    try:
        return AutoConfig.for_model(family, **own, **dropped)
    except Exception as err:
        raise ManticoreError(f"{family} cannot be made with {own}: {err}") from err


def from_scratch(
    family: str, vocab_size: int, layers: int, width: int, positions: int, seed: int = 0
) -> PreTrainedModel:
    """A causal LM with initial weights, in float32.

    Mamba and Mamba-2 get this package's scan here, too, so that a hybrid and its components run the same.

    Args:
        family, vocab_size, layers, width, positions: As `scratch_config`.
        seed: Seed of the weights.

    Returns:
        The model, in training mode as Transformers builds it.

    Raises:
        ManticoreError: There is no such family, or it cannot be built at that size.
    """
    config = scratch_config(family, vocab_size, layers, width, positions)
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as err:
        raise ManticoreError(f"{family} cannot be built with {layers} layers of width {width}: {err}") from err
    repair_mixers(model)
    return model


def hybrid_from_scratch(
    families: Sequence[str],
    vocab_size: int,
    layers: int,
    width: int,
    positions: int,
    seed: int = 0,
    layers_of: Mapping[str, int] | None = None,
    **settings: Any,
) -> ManticoreForCausalLM:
    """A hybrid whose components have initial weights.

    Args:
        families: Model types; component i has the weights that `from_scratch(..., seed=seed + i)` gives it.
        vocab_size, layers, width, positions: As `scratch_config`, the same for every component.
        seed: Seed of the weights.
        layers_of: {family: its layers}, of those that have others than `layers`.
        **settings: Keys of ManticoreConfig. Projectors that would be calibrated start as the identity: states of
            untrained components hold nothing to calibrate on.

    Returns:
        The hybrid, in float32.

    Raises:
        ManticoreError: Fewer than two families, or one that cannot be built at that size.
    """
    if len(families) < 2:
        raise ManticoreError(f"hybrid={','.join(families)!r} has {len(families)} component(s); give at least two.")
    parts = []
    for i, family in enumerate(families):
        name = family if families.count(family) == 1 else f"{family}_{families[: i + 1].count(family)}"
        depth = (layers_of or {}).get(family, layers)
        parts.append(ComponentSpec(from_scratch(family, vocab_size, depth, width, positions, seed + i), name=name))
    if settings.get("preset", "default") == "default":
        settings = {"projector_init": "identity", **settings}
    torch.manual_seed(seed)
    return ManticoreForCausalLM.from_components(parts, **settings)
