"""Tiny random models of every supported family, for tests: seeded, with weights strong enough that differences show.

Sliding windows and chunks are a few tokens long so that short sequences cross them; members of a pair have unequal
widths and depths.
"""

from built_once import built_once
from transformers import AutoConfig

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.families.contract import randomise
from manticore_hf.families.tiny import VOCABULARY, tiny_model, tokens

__all__ = [
    "FAMILIES", "PAIRS", "VOCABULARY", "components", "hybrid", "randomise", "representatives", "tiny", "tiny_config",
    "tokens", "uneven",
]  # fmt: skip

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 48}
_GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64}

# name -> (model_type, settings beyond _COMMON)
FAMILIES = {
    "gpt2": ("gpt2", _GPT2),
    "gpt_neo": (
        "gpt_neo",
        # Layers 1 and 3 look back four tokens
        {"num_layers": 5, "num_heads": 4, "attention_types": [[["global", "local"], 2], [["global"], 1]],
         "window_size": 4},
    ),
    "gpt_neox": ("gpt_neox", _HEADS),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "opt": ("opt", {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    # The 350M of the family: embeddings of another width, and no final norm
    "opt_projected": (
        "opt",
        {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
    "bloom": ("bloom", {"n_layer": 5, "n_head": 4}),
    "llama": ("llama", _ATTENTION),
    "mistral": ("mistral", {**_ATTENTION, "sliding_window": 4}),
    "qwen2": ("qwen2", {**_ATTENTION, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**_ATTENTION, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
    "phi": ("phi", {**_HEADS, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {**_HEADS, "num_key_value_heads": 2, "sliding_window": 4}),
    "gemma2": ("gemma2", {**_ATTENTION, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3_text", {**_ATTENTION, "sliding_window": 4, "sliding_window_pattern": 2}),
    "olmo2": ("olmo2", {**_HEADS, "num_key_value_heads": 2}),
    "stablelm": ("stablelm", {**_HEADS, "num_key_value_heads": 2}),
    "granite": (
        "granite",
        {**_HEADS, "num_key_value_heads": 2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
         "logits_scaling": 2.0, "attention_multiplier": 0.3},
    ),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 4, "expand": 2},
    ),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "jamba": (
        "jamba",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "attn_layer_period": 2,
         "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
         "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 48, "lru_width": 32,
         "attention_window_size": 4},
    ),
}  # fmt: skip

PAIRS = {
    "gpt_neox+mamba": ("gpt_neox", "mamba"),
    "gpt_neo+mamba2+opt": ("gpt_neo", "mamba2", "opt"),
    "llama+falcon_mamba": ("llama", "falcon_mamba"),
    "gemma2+jamba": ("gemma2", "jamba"),
}

# Learned, rotary and linear positions, tables of them that are shifted, windows, scaled states, every kind of recurrent
# state; the pairs have families with experts, soft caps and partial rotations besides.
_REPRESENTATIVE = {
    "gpt2", "gpt_neo", "bloom", "opt_projected", "llama", "qwen3", "granite", "mamba", "mamba2", "recurrent_gemma",
    *PAIRS,
}  # fmt: skip


def representatives(names):
    """Names as parameters of a test: those that no other stands for are quick, all of them are in the slow tests."""
    import pytest  # other processes import this file without

    slow = pytest.mark.slow
    return [name if name in _REPRESENTATIVE else pytest.param(name, marks=slow) for name in names]


# What a member of a pair has instead of width 32 and 5 layers
_OTHER_SIZE = {
    "mamba": {"hidden_size": 48, "num_hidden_layers": 6},
    "mamba2": {"hidden_size": 48, "num_hidden_layers": 4, "num_heads": 12},
    "opt": {"hidden_size": 40, "word_embed_proj_dim": 24, "num_hidden_layers": 6},
    "falcon_mamba": {"hidden_size": 24, "num_hidden_layers": 4},
    "jamba": {"hidden_size": 48, "num_hidden_layers": 6},
}


def tiny_config(family, **settings):
    """Configuration of a tiny model; `settings` override those of the family."""
    model_type, own = FAMILIES[family]
    values = {**_COMMON, **own, **settings}
    if model_type in ("gpt2", "gptj", "gpt_neo"):
        # They call the same things by other names, and take only one of the two
        other = {"num_hidden_layers": "num_layers" if model_type == "gpt_neo" else "n_layer"}
        if model_type != "gpt_neo":
            other |= {"hidden_size": "n_embd", "max_position_embeddings": "n_positions"}
        for key, name in other.items():
            value = values.pop(key)
            if key in settings or name not in values:
                values[name] = value
    if model_type == "bloom":
        values["n_layer"] = values.pop("num_hidden_layers")
    config = AutoConfig.for_model(model_type, **values)
    for key, value in list(vars(config).items()):
        if ("dropout" in key or "pdrop" in key or "drop" in key.split("_")) and isinstance(value, float):
            if key not in settings:
                setattr(config, key, 0.0)
    return config


@built_once
def tiny(family, seed=0, **settings):
    """A tiny causal LM in evaluation mode: matrices multiplied, biases and norms perturbed."""
    config = tiny_config(family, **settings)
    return tiny_model(config, seed)


def components(name):
    """Components of one family ("llama") or of a pair ("gpt_neox+mamba") by name, which is their family."""
    families = PAIRS.get(name, (name,))
    sizes = _OTHER_SIZE if len(families) > 1 else {}
    return {family: tiny(family, seed=i, **sizes.get(family, {})) for i, family in enumerate(families)}


@built_once
def hybrid(name, num_blocks=2, **settings):
    """A hybrid of one family ("llama") or of a pair ("gpt_neox+mamba"), in evaluation mode.

    Components are named after their family; projectors and mixture weights are drawn at random where the settings
    leave them free, so that nothing is the identity by accident.
    """
    parts = [ComponentSpec(part, name=family) for family, part in components(name).items()]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=num_blocks, **settings)
    randomise(model)
    return model


def uneven(depth, blocks):
    """A cut of `depth` layers into `blocks` segments that is as uneven as possible."""
    return [1] * (blocks - 1) + [depth - blocks + 1]
