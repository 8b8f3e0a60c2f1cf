"""Checkpoints in mamba_ssm's own layout, in the words of Transformers: configuration and names of tensors.

mamba_ssm (the code of Gu and Dao, arXiv 2312.00752, and Dao and Gu, arXiv 2405.21060) writes a config.json without a
model_type, whose `ssm_cfg` holds the arguments of every mixer that differ from its defaults. What Transformers' classes
cannot compute (attention layers, MLPs, LayerNorm, a skip weight per channel) is unsupported.
"""

import math
import re

import torch
from transformers import Mamba2Config, MambaConfig

from manticore_hf.modeling.configuration_manticore import ManticoreError

TOKENIZER = "EleutherAI/gpt-neox-20b"
"""What the published checkpoints in this layout were trained with; their repositories hold no tokenizer."""

_MODEL = {
    "d_model": None, "n_layer": None, "vocab_size": None, "d_intermediate": 0, "ssm_cfg": {}, "attn_layer_idx": [],
    "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}  # fmt: skip
_MIXER = {"d_state": 16, "d_conv": 4, "expand": 2, "bias": False, "conv_bias": True}
_MAMBA1 = {**_MIXER, "dt_rank": "auto"}
_MAMBA2 = {
    **_MIXER, "d_state": 128, "headdim": 64, "d_ssm": None, "ngroups": 1, "D_has_hdim": False, "rmsnorm": True,
    "norm_before_gate": False, "dt_limit": [0.0, float("inf")], "chunk_size": 256,
}  # fmt: skip
# They choose initial weights, or kernels with the same result.
_NO_MATTER = {
    "layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "conv_init", "A_init_range",
    "sequence_parallel", "use_mem_eff_path",
}  # fmt: skip


def is_mamba_ssm(values: dict) -> bool:
    """Whether a config.json is in mamba_ssm's layout."""
    return "model_type" not in values and {"d_model", "n_layer", "vocab_size"} <= set(values)


def mamba_config(what: str, values: dict) -> MambaConfig | Mamba2Config:
    """Transformers' configuration of a checkpoint in mamba_ssm's layout.

    Args:
        what: What messages call the checkpoint.
        values: Its config.json.

    Returns:
        A MambaConfig or Mamba2Config; its vocabulary is the padded one, as the checkpoint's embeddings are.

    Raises:
        ManticoreError: Names a setting that is unknown, no number, or not what Transformers' classes compute.
    """
    model = _settings(what, "", values, _MODEL)
    ssm = model["ssm_cfg"]
    if not isinstance(ssm, dict):
        raise ManticoreError(f"{what}: ssm_cfg={ssm!r} in its config.json must be an object of settings.")
    layer = ssm.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ManticoreError(f"{what}: its layers are {layer!r}; Mamba1 and Mamba2 can be converted.")
    mixer = _settings(what, "ssm_cfg.", ssm, _MAMBA1 if layer == "Mamba1" else _MAMBA2)
    if model["attn_layer_idx"]:
        raise ManticoreError(
            f"{what} has attention in layers {model['attn_layer_idx']}; Transformers' Mamba classes have none, so it "
            "cannot be converted."
        )
    for key, wanted in (("d_intermediate", 0), ("rms_norm", True)):
        _must_be(what, key, model[key], wanted)
    sizes = {key: model[key] for key in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple")}
    sizes.update({key: mixer[key] for key in ("d_state", "d_conv", "expand", "headdim", "ngroups") if key in mixer})
    for key, value in sizes.items():
        if type(value) is not int or not 0 < value <= 2**25:
            raise ManticoreError(f"{what}: {key}={value!r} in its config.json must be a positive integer.")
    multiple = model["pad_vocab_size_multiple"]
    common = {
        "vocab_size": -(-model["vocab_size"] // multiple) * multiple, "hidden_size": model["d_model"],
        "num_hidden_layers": model["n_layer"], "state_size": mixer["d_state"], "conv_kernel": mixer["d_conv"],
        "expand": mixer["expand"], "use_bias": mixer["bias"], "use_conv_bias": mixer["conv_bias"],
        "residual_in_fp32": model["residual_in_fp32"], "tie_word_embeddings": model["tie_embeddings"],
        "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    if layer == "Mamba1":
        rank = mixer["dt_rank"]
        return _built(
            what,
            MambaConfig,
            time_step_rank=math.ceil(model["d_model"] / 16) if rank == "auto" else rank,
            architectures=["MambaForCausalLM"],
            **common,
        )
    inner = mixer["expand"] * model["d_model"]
    for key, wanted in (("D_has_hdim", False), ("rmsnorm", True), ("norm_before_gate", False)):
        _must_be(what, f"ssm_cfg.{key}", mixer[key], wanted)
    if mixer["d_ssm"] not in (None, inner):
        _must_be(what, "ssm_cfg.d_ssm", mixer["d_ssm"], inner)
    if inner % mixer["headdim"]:
        raise ManticoreError(f"{what}: inner width {inner} is not a multiple of ssm_cfg.headdim={mixer['headdim']}.")
    return _built(
        what,
        Mamba2Config,
        num_heads=inner // mixer["headdim"],
        head_dim=mixer["headdim"],
        n_groups=mixer["ngroups"],
        chunk_size=mixer["chunk_size"],
        architectures=["Mamba2ForCausalLM"],
        time_step_limit=[float(limit) for limit in mixer["dt_limit"]],
        **common,
    )


def mamba_weights(what: str, tensors: dict[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in mamba_ssm's layout by the names that Transformers gives them.

    Args:
        what: What messages call the checkpoint.
        tensors: {name: tensor} as mamba_ssm saved them.
        tied: Whether the head is the embedding; mamba_ssm writes it a second time.

    Raises:
        ManticoreError: A tied head that differs from the embedding.
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("backbone.embedding.weight")
    if tied and head is not None and embedding is not None:
        same = head.shape == embedding.shape and head.dtype == embedding.dtype and (head == embedding).all()
        if not same:
            raise ManticoreError(
                f"{what}: its head differs from its embedding, though its config.json ties them; add "
                '"tie_embeddings": false there if they are meant to differ.'
            )
        tensors = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    return {re.sub(r"^backbone\.embedding\.", "backbone.embeddings.", key): one for key, one in tensors.items()}


def _settings(what, prefix, given, known):
    unknown = sorted(set(given) - set(known) - _NO_MATTER)
    if unknown:
        raise ManticoreError(
            f"{what}: {prefix}{unknown[0]}={given[unknown[0]]!r} in its config.json is unknown here, and might change "
            "what the model computes; only what is known can be converted."
        )
    return {key: given.get(key, default) for key, default in known.items()}


def _must_be(what, key, value, wanted):
    if value != wanted:
        raise ManticoreError(
            f"{what}: {key}={value!r} in its config.json; Transformers' class computes {key}={wanted!r} only, so it "
            "cannot be converted."
        )


def _built(what, kind, **values):
    try:
        return kind(**values)
    except Exception as err:  # Transformers checks with as many kinds of errors as there are checks
        raise ManticoreError(f"{what}: its config.json is invalid: {' '.join(str(err).split())[:500]}") from err
