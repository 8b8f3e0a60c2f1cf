"""LoRA and QLoRA on a hybrid's components, with targets that train the same way on every machine.

On the portable path a low-rank update of Mamba's `dt_proj` never gets a gradient (its weight is read raw), and on the
fused CUDA path those of `x_proj`, `dt_proj` and `out_proj` do not either: PEFT would train different parameters on
different machines, silently. PEFT's own guard looks at the model type and does not see Mamba inside a hybrid.
What is read raw cannot be quantised either: QLoRA quantises what LoRA targets, and nothing else.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.compose.training_checks import check_adapted
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.dtypes_manticore import (
    MIXER,
    RAW,
    SCORE,
    check_unquantized,
    is_state_space,
    kept_maps,
    plain_linear_maps,
)
from manticore_hf.utils.unwrap import hybrid_of

if TYPE_CHECKING:
    from peft import LoraConfig, PromptLearningConfig

TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
}


def lora_targets(model: nn.Module, components: list[str] | None = None) -> list[str]:
    """Full names of the linear maps inside the components' layers that LoRA may wrap.

    Args:
        model: A hybrid.
        components: Names of the components to adapt; default: all.

    Returns:
        Sorted module names: attention, MLP and input projections; no heads, no embeddings, no expert routers, none of
        Mamba's raw or fused projections.
    """
    # Of maps that earlier adapters wrap, the wrapper, which PEFT adds the next one to
    wrapped = [f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer")]
    maps = plain_linear_maps(model, components)
    return sorted({next((name[:-1] for name in wrapped if key.startswith(name)), key) for key in maps})


def lora_config(
    model: nn.Module, r: int = 8, components: list[str] | None = None, train_mixer: bool = True, **kwargs: object
) -> "LoraConfig":
    """A LoraConfig for a hybrid.

    Args:
        model: A hybrid.
        r: Rank.
        components: Names of the components to adapt; default: all.
        train_mixer: Train and save projectors, mixture weights and gate in full beside the adapters. (Score heads of
            a classifier always are; so are embeddings and heads, where the vocabulary was resized since the hybrid was
            loaded: an adapter would bring nothing else of them back.)
        **kwargs: Further fields of LoraConfig (lora_alpha, lora_dropout, ...). `target_modules` replaces the safe
            targets; unsafe ones among them raise. `modules_to_save` adds to what is saved in full.
            `trainable_token_indices` as a list means these rows of every component's embeddings. `task_type` follows
            from the model's class.

    Returns:
        A `peft.LoraConfig` for `peft.get_peft_model(model, config)`; its revision is the hybrid's own commit if it was
        loaded from the Hub. A hybrid in 4 bits on the CPU gives up bitsandbytes' inference kernel, which has no
        backward.

    Raises:
        ManticoreError: An unsafe target was asked for, there is nothing to adapt, or the hybrid was quantised in a way
            that leaves nothing out.
    """
    from peft import LoraConfig

    check_unquantized(model)
    _keep_trainable(model)
    targets = kwargs.pop("target_modules", None)
    if targets == "all-linear":
        raise ManticoreError(
            "target_modules='all-linear' would wrap heads, projectors and Mamba's raw projections; leave it out: "
            "lora_config(model) targets every linear map that is safe."
        )
    if targets is None:
        targets = lora_targets(model, components)
    if not targets:
        raise ManticoreError(f"No linear maps to adapt in {components}.")
    # By the Auto class that it is registered for: loaded as remote code, its class is of another copy of the files.
    task_type = TASK_TYPES.get(model._auto_class)
    saved = [MIXER] * train_mixer + [name for name, _ in model.named_children() if name == SCORE]
    saved += kwargs.pop("modules_to_save", None) or []
    if model.is_resized:
        saved += [name for pair in end_modules(model).values() for name in pair if name is not None]
    rows = kwargs.pop("trainable_token_indices", None)
    if isinstance(rows, list) and model.config.aligned:
        raise ManticoreError(
            f"trainable_token_indices={rows}: components {list(model.config.aligned)} have tokenizers of their own, in "
            "which these are other tokens. Give {name of embeddings: indices} for each "
            f"({[embedding for embedding, _ in end_modules(model).values()]})."
        )
    if isinstance(rows, list):
        rows = {embedding: rows for embedding, _ in end_modules(model).values()}
    config = LoraConfig(
        r=r,
        target_modules=targets,
        modules_to_save=saved or None,
        task_type=kwargs.pop("task_type", task_type),
        revision=getattr(model, "_own_commit", None),
        trainable_token_indices=rows,
        **kwargs,
    )
    check_adapter(model, config)
    return config


def prompt_config(
    model: nn.Module, kind: type | None = None, num_virtual_tokens: int = 20, **kwargs: object
) -> "PromptLearningConfig":
    """A configuration of soft prompts for a hybrid, as wide as what it reads (`get_input_embeddings`).

    PEFT would take the hidden size for that width, and ask for a number of attention heads, which a hybrid lacks and
    prompts do not need.

    Args:
        model: A hybrid.
        kind: `peft.PromptTuningConfig` (the default), or another class of prompts that are read as embeddings, such as
            `peft.PromptEncoderConfig` (P-tuning).
        num_virtual_tokens: Length of the prompt.
        **kwargs: Further fields of that class.

    Returns:
        What `peft.get_peft_model(model, config)` takes.

    Raises:
        ManticoreError: `kind` is no such class: prefix tuning writes keys and values into the cache of every layer.
    """
    from peft import PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig

    kind = kind or PromptTuningConfig
    if not issubclass(kind, PromptLearningConfig) or issubclass(kind, PrefixTuningConfig):
        raise ManticoreError(
            f"{kind.__name__} is not a prompt that a hybrid can read: recurrent components have no keys and values. "
            "Use PromptTuningConfig or PromptEncoderConfig."
        )
    if model.config.aligned or model.config.reads_past_losses:
        why = "components with tokenizers of their own" if model.config.aligned else "a mixture that knows past losses"
        raise ManticoreError(
            f"{kind.__name__}: soft prompts have no token ids, which a hybrid with {why} needs; use lora_config."
        )
    sizes = {"token_dim": model.get_input_embeddings().embedding_dim, "num_layers": 1, "num_attention_heads": 1}
    task_type = TASK_TYPES.get(model._auto_class)
    return kind(**{"task_type": task_type, "num_virtual_tokens": num_virtual_tokens, **sizes, **kwargs})


def end_modules(model: nn.Module) -> dict[str, tuple[str | None, str | None]]:
    """{component: (name of its embeddings, name of its head)} in a hybrid; None for a head that it lacks."""
    names = {id(module): name for name, module in model.named_modules()}
    parts = {name: model.component(name) for name in model.config.component_names}
    ends = {name: (part.get_input_embeddings(), part.get_output_embeddings()) for name, part in parts.items()}
    return {name: tuple(names.get(id(end)) for end in pair) for name, pair in ends.items()}


def _keep_trainable(model):
    """Keeps bitsandbytes from repacking 4-bit weights for its CPU inference kernel, which has no backward.

    On processors with AVX512-BF16 the first forward in evaluation does so; every training step after it would leave the
    adapters below without gradient, with a warning at best (bitsandbytes 0.50).
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # unpacks what is packed
            module.support_avx512bf16_for_cpu = False


def quantization_skips(model: nn.Module | PreTrainedConfig) -> list[str]:
    """What quantised loading leaves in floating point: every linear map that `lora_targets` leaves out.

    A hybrid that is loaded with a `quantization_config` leaves these out by itself. This list is for other programs.

    Args:
        model: A hybrid or, before it is loaded, its configuration.

    Returns:
        Sorted patterns of module names, as BitsAndBytesConfig takes them for `llm_int8_skip_modules` (other methods of
        Transformers: `modules_to_not_convert`): heads, expert routers, Mamba's raw and fused projections, the mixer,
        a classifier's score heads. A pattern holds for all layers of its component.
    """
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = ManticoreForCausalLM(copy.deepcopy(model))
    return kept_maps(model)


def check_adapter(model: nn.Module, config: "LoraConfig") -> None:
    """Raises ManticoreError if a PEFT config would wrap a projection whose adapter trains on some machines only."""
    from peft.tuners.tuners_utils import check_target_module_exists

    for key, _ in model.named_modules():
        parent, _, leaf = key.rpartition(".")
        if leaf in RAW and is_state_space(model.get_submodule(parent)):
            if check_target_module_exists(config, key):
                raise ManticoreError(
                    f"LoRA target {key!r}: Mamba reads this weight raw or inside a fused kernel, so its adapter would "
                    "get no gradient on some machines, silently. Use lora_config(model), which leaves it out."
                )


def check_adapters(model: nn.Module) -> nn.Module:
    """Raises ManticoreError if a PEFT model has wrapped what an adapter cannot train everywhere; returns the model."""
    check_adapted(hybrid_of(model))
    return model
