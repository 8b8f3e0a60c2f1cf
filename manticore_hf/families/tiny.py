"""Tiny random models of any model type: a family's names for its sizes are read from its configuration.

A type's own default configuration says which sizes it knows; rules by the words of a setting make each small, and so
that a sequence of nine tokens crosses every window, chunk and layer pattern. What the rules get wrong, because a class
wants two sizes to agree that nothing of it says, is in `OWN`.
"""

import dataclasses
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 99
DEPTH = 5
WIDTH = 32

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# (words of a setting's name, as a pattern; its tiny value). The first that fits counts; only whole numbers are set.
_RULES = (
    (r"(^|_)(unpadded_)?vocab_size(_per_layer_input)?$", VOCABULARY),
    (r"^(num_hidden_layers|num_layers|n_layers?|decoder_layers)$", DEPTH),
    (r"^(hidden_size|d_model|n_embd|dim_model)$", WIDTH),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length)$", 64),
    (r"(key_value_heads|kv_heads|query_groups)$", 2),
    (r"index(er)?_n_heads$", 32),  # their scores are cut off at zero: with few heads all of a token's would be, and tie
    (r"(^|_)(num_(attention_|mamba_)?heads|n_heads?|attention_heads|num_v(alue)?_heads|linear_num_heads)$", 4),
    (r"linear_num_value_heads$", 4),
    (r"linear_num_key_heads$", 2),
    (r"(mamba_n_heads|mamba_num_heads)$", 4),
    (r"^qk_head_dim$", None),  # a sum of two others
    (r"(head_dim|d_head|headdim|v_head_dim|dim_head|kv_channels|head_size|rotary_dim)$", 8),
    (r"(rank)$", 8),
    (r"(d_state|state_size)$", 8),
    (r"(intermediate_size|ffn_dim|ffn_hidden_size|dim_ff|dff|n_inner|intermediate_size_mlp)$", 48),
    (r"(num_shared_experts|n_shared_experts|zero_expert_num)$", 1),
    (r"(experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|index_topk)$", 2),
    (r"(num_experts|routed_experts|local_experts|experts)$", 4),
    (r"^(n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|mamba_ngroups)$", 1),
    (r"(first_k_dense_replace|num_dense_layers)$", 1),
    (r"(chunk_size|block_size|(sliding|attention|keep)_window(_size)?|^window_size|block_topk)$", 4),
    (r"(every_n_layers|_period|_interval|window_pattern|sparse_step|layer_group_size)$", 2),
    (r"(layer_offset)$", 1),
    (r"(max_window_layers)$", 2),
    (r"(nextn_predict_layers|kv_shared_layers|mtp_num_hidden_layers)$", 0),
)  # fmt: skip

_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]

# What the rules cannot know: layers of every kind, sizes that must agree.
OWN = {
    "bamba": {"attn_layer_indices": [1, 4], "mamba_n_heads": 4, "mamba_d_head": 16},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "falcon": {"num_kv_heads": None},
    "gemma3n_text": {"hidden_size_per_layer_input": 8},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba", "attention"]},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "laguna": {"layer_types": _SLIDING},
    "lfm2": {"full_attn_idxs": [1, 4], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax_m3_vl_text": {
        "index_n_heads": 2,  # as many as heads of keys
        "index_topk_blocks": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention", "minimax_m3_sparse", "full_attention"]
    },
    "mellum": {"layer_types": _SLIDING},
    "ministral3": {"sliding_window": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"]},
    "qwen2": {"use_sliding_window": True},
    "qwen2_moe": {"use_sliding_window": True},
    "qwen3": {"use_sliding_window": True},
    "qwen3_moe": {"use_sliding_window": True},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "hc_count": 2, "ngram_vocab_size_base": 100, "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 1, "heads_per_ngram": 2, "ple_layer_ids": [1], "ple_embed_dim": 16,
    },
    "recurrent_gemma": {"num_key_value_heads": 1, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8], "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4, "attn_layers": ["local", "local", "local", "local", "local"],
        "feed_forward_size": 48,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "rwkv": {"attention_hidden_size": WIDTH, "rescale_every": 2},
    "smollm3": {"use_sliding_window": True, "layer_types": _SLIDING},
    "starcoder2": {"sliding_window": 4},
    "xlm": {"emb_dim": WIDTH, "causal": True},
    "xlnet": {"d_inner": 48},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "mamba_headdim": 16, "n_mamba_heads": 4,
        "adapter_rank": 4, "use_mamba_kernels": False,
    },
    "zamba": {"use_mamba_kernels": False},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}  # fmt: skip


def tiny_config(model_type: str, **settings: Any) -> PretrainedConfig:
    """The configuration of a tiny model of a type.

    Args:
        model_type: Transformers' name: "llama", "mamba", ...
        **settings: Override what was found.

    Raises:
        Exception: Whatever Transformers raises for a configuration it does not take.
    """
    cls = CONFIG_MAPPING[model_type]
    known = known_settings(cls)
    values = {key: size for key, default in known.items() if (size := _tiny(key, default)) is not None}
    values |= {key: 0.0 for key, default in known.items() if "drop" in key and isinstance(default, float)}
    values |= {key: value for key, value in _TOKENS.items() if key in known}
    values |= {key: True for key in ("is_decoder",) if key in known}
    if "kv_lora_rank" in known:  # latent attention: keys and values are made for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= OWN.get(model_type, {})
    values |= settings
    return AutoConfig.for_model(model_type, **values)


def known_settings(cls: type[PretrainedConfig]) -> dict[str, Any]:
    """What a configuration class takes, and its defaults; without what all classes share."""
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    return {key: value for key, value in fields.items() if not key.startswith("_")}


def _tiny(key, default):
    if isinstance(default, (bool, str, dict, list, tuple)) or key.endswith("_id"):
        return None
    return next((size for pattern, size in _RULES if re.search(pattern, key)), None)


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A causal LM with random weights so strong that differences show: matrices multiplied, biases and norms perturbed.

    It does not stop at an end-of-text token, which a random model would emit after some random number of tokens.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if parameter.ndim >= 2:
                parameter.mul_(8.0 if parameter.std() < 0.05 else 1.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            # The row of padding is zeros: where a model generates it, all keys to choose from would score alike
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].normal_(std=module.weight.std().item())
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tokens(batch: int = 2, time: int = 9, seed: int = 1, device: torch.device | str = "cpu") -> torch.Tensor:
    """Random token ids [batch, time] without special tokens, the same on every device."""
    return torch.randint(3, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed)).to(device)
