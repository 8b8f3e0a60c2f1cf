"""What each stage starts from and can be given: dataclasses that command line, recipes and plans read.

Imports neither torch nor Transformers: a command's help is printed before they are.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.renamed import takes_old_fields
from manticore_hf.utils.settings import HybridSettings

OLD_NAMES = {"harden": "prune"}
"""Stages under their names in version 0.1, in recipes, as commands and in what they have written."""

RECIPE_MAY_SAY = frozenset(
    """
    num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size seed
    data_seed learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay max_grad_norm
    label_smoothing_factor optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon neftune_noise_alpha
    full_determinism average_tokens_across_devices bf16 fp16 tf32 bf16_full_eval fp16_full_eval use_cpu torch_compile
    torch_compile_mode
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_empty_cache_steps use_cache train_sampling_strategy length_column_name label_names remove_unused_columns
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object per_device_eval_batch_size prediction_loss_only batch_eval_metrics load_best_model_at_end
    metric_for_best_model greater_is_better logging_strategy logging_steps logging_first_step logging_nan_inf_filter
    include_num_input_tokens_seen disable_tqdm save_strategy save_steps save_total_limit save_only_model
    """.split()
)
"""What a recipe may set of TrainingArguments: what trains. All else (who is told, where it is uploaded, files that are
read, how processes are joined) acts outside of the run's directory, and is said by the person who runs it."""


_SMALL = 1e-12
RANGES = {
    "num_train_epochs": (_SMALL, 1e6), "max_steps": (1, 1e9), "per_device_train_batch_size": (1, 2**16),
    "per_device_eval_batch_size": (1, 2**16), "gradient_accumulation_steps": (1, 1e6), "learning_rate": (0, 1e3),
    "warmup_steps": (0, 1e9), "weight_decay": (0, 1e3), "adam_beta1": (0, 1 - _SMALL), "adam_beta2": (0, 1 - _SMALL),
    "adam_epsilon": (0, 1), "max_grad_norm": (0, 1e9), "label_smoothing_factor": (0, 1 - _SMALL),
    "neftune_noise_alpha": (0, 1e4), "torch_empty_cache_steps": (1, 1e9), "logging_steps": (_SMALL, 1e9),
    "eval_steps": (_SMALL, 1e9), "eval_delay": (0, 1e9), "eval_accumulation_steps": (1, 1e9),
    "save_steps": (_SMALL, 1e9), "save_total_limit": (1, 1e6), "dataloader_num_workers": (0, 256),
    "dataloader_prefetch_factor": (1, 1e4),
    "ddp_bucket_cap_mb": (1, 1e6), "seed": (0, 2**32 - 1), "data_seed": (0, 2**32 - 1),
    # of the stages themselves, and of their text
    "tokens": (1, 1e12), "component_max_norm": (_SMALL, 1e9), "new_rows_learning_rate": (0, 1e3),
    "alpha_learning_rate": (0, 1e3), "alpha_weight_decay": (0, 1e3), "entropy_penalty": (-1e6, 1e6),
    "cost_penalty": (-1e6, 1e6), "temperature": (_SMALL, 1e6), "budget": (_SMALL, 1e6), "beam": (1, 1e4),
    "distil_weight": (0, 1), "block_size": (2, 2**24), "max_tokens": (1, 1e15), "validation_fraction": (0, 1 - _SMALL),
    "split_seed": (0, 2**32 - 1), "shuffle_seed": (0, 2**32 - 1), "max_records": (1, 2**32 - 1),
    # of a mixture that is programmed
    "seq_len": (1, 2**20), "num_train": (1, 1e8), "num_test": (1, 1e8), "layers": (1, 1024), "hidden_size": (1, 2**18),
    "steps": (1, 1e9), "batch_size": (1, 2**16), "seeds": (1, 1e4),
}  # fmt: skip
"""{setting: the least and the most that makes sense of it}. (max_steps may also be -1: epochs count.)"""
_OF_COMMANDS = {
    "smoothing": (0, 1 - _SMALL), "noise": (0, 1e6), "time_limit": (_SMALL, 1e9), "port": (0, 2**16 - 1),
    "limit": (_SMALL, 1e12), "num_fewshot": (0, 1e6), "devices": (1, 1e6),
}  # fmt: skip
"""The same, for options of commands that are no stages."""

_SHARES = ("warmup_steps", "logging_steps", "eval_steps", "save_steps")  # below 1 of all steps
_COMPILE = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_TARGET = re.compile(r"[\w.-]{0,200}(\*[\w.-]{0,200}){0,3}")  # of other patterns some take for ever
_METRIC = re.compile(r"(eval_)?(loss(/[\w-]+)?|gate/[\w-]+)")
_CHECKPOINTING = {"every_n_layers", "offload", "use_reentrant", "preserve_rng_state", "determinism_check", "early_stop"}


def wrong_setting(key: str, value: Any, stage: str | None = None) -> str | None:
    """What is wrong with a setting of a stage or command, as the rest of a sentence ("must be ..."); None: nothing.

    Args:
        key: Its name.
        value: Of the type that the setting has.
        stage: Of which stage, where it is of one.
    """
    if stage == "prune" and key in ("max_steps", "num_train_epochs") and value == 0:
        return None  # without recovery
    bounds = RANGES.get(key) or _OF_COMMANDS.get(key)
    if bounds and type(value) in (int, float) and not (key == "max_steps" and value == -1):
        low, high = bounds
        if not low <= value <= high:  # nor no number at all
            least = "above 0" if low == _SMALL else f"at least {low:,.12g}"
            return f"must be {least} and {'below 1' if high == 1 - _SMALL else f'at most {high:,.12g}'}"
        if key in _SHARES and value >= 1 and value != int(value):
            return "must be a whole number of steps, or below 1 for a share of all"
    if key == "torch_compile_mode" and value not in (None, *_COMPILE):
        return f"must be one of {', '.join(_COMPILE)}"
    if key == "metric_for_best_model" and value is not None and not _METRIC.fullmatch(str(value)):
        return "must be what is measured: loss, or loss/ and gate/ with the name of a part"
    if key == "optim_target_modules" and value != "all-linear" and value is not None:  # else patterns, which may hang
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) and _TARGET.fullmatch(one) for one in names):
            return (
                "must be all-linear, or names of modules, in which .* may stand three times and other patterns may not"
            )
    if key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs") and value is not None:
        if not isinstance(value, dict) or not set(value) <= _CHECKPOINTING:
            return f"must be a mapping of some of {', '.join(sorted(_CHECKPOINTING))}"
    return None


def check_best(metric: str | None, greater_is_better: bool | None, config: Any) -> None:
    """Checks by which measure of a hybrid's part the best checkpoint is chosen.

    Args:
        metric: `metric_for_best_model`, with "eval_" before it or without.
        greater_is_better: As TrainingArguments have it.
        config: The hybrid's ManticoreConfig.

    Raises:
        ManticoreError: An evaluation of this hybrid does not measure it, or the largest loss would be the best.
    """
    what, _, part = str(metric).removeprefix("eval_").partition("/")
    if what not in ("loss", "gate") or not part:
        return
    last = config.embeddings == "native" or config.head_mixture == "last"
    row = (config.mixture_weights or [None])[-1 if last else 0]
    run = [name for name, weight in zip(config.component_names, row or [1] * len(config.component_names)) if weight]
    gated = run if config.mixture != "static" and row is None and len(run) > 1 else []
    measured = [*(f"loss/{one}" for one in ("mixture", "ensemble", *run)), *(f"gate/{name}" for name in gated)]
    if f"{what}/{part}" not in measured:
        raise ManticoreError(
            f"metric_for_best_model is {metric!r}, which no evaluation of this hybrid measures; choose loss, or one of "
            f"{', '.join(measured)}."
        )
    if what == "loss" and greater_is_better:
        raise ManticoreError(
            f"greater_is_better is true and metric_for_best_model {metric!r}: the largest loss would be the best. Give "
            "greater_is_better=False."
        )


def with_direction(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training with `greater_is_better`, where it is not said and the best checkpoint has the least loss.

    Transformers goes by whether the metric's name ends in "loss", and would keep the largest loss/mixture.
    """
    metric = str(given.get("metric_for_best_model")).removeprefix("eval_")
    if given.get("greater_is_better") is None and metric.startswith("loss/"):
        return {**given, "greater_is_better": False}
    return dict(given)


@dataclass
class OutsideArguments:
    """What a run does beside training into its directory: for its command line, never for its recipe."""

    report_to: str | None = field(
        default=None, metadata={"help": "Tracker that logs every training stage: trackio, tensorboard, wandb, ..."}
    )
    run_name: str | None = field(default=None, metadata={"help": "Name of the run in the tracker."})
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload what each training stage saves, the last one's at the end."}
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository for --push-to-hub: you/name."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Whether to make that repository private."})
    deepspeed: str | None = field(default=None, metadata={"help": "DeepSpeed configuration file."})
    accelerator_config: str | None = field(default=None, metadata={"help": "accelerate configuration file."})
    fsdp_config: str | None = field(default=None, metadata={"help": "FSDP configuration file."})

    def given(self) -> dict[str, Any]:
        """What was given, as keyword arguments of TrainingArguments."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: value for key, value in found.items() if value not in (None, False)}


@dataclass
class HybridArguments(HybridSettings):
    """How components are composed: what is set of the hybrid, and what is done to its components before."""

    transplant: str | None = field(
        default=None,
        metadata={
            "help": "Give components with other tokenizers the vocabulary of the tokenizer "
            "component: mean, omp or auto. Default: in one block each keeps its own "
            "tokenizer; several blocks need a transplant.",
            "choices": ("mean", "omp", "auto"),
        },
    )
    transplant_data: str | None = field(
        default=None,
        metadata={
            "help": "Text to measure transplants on and choose the method with: a file, folder "
            "or Hub data set. Default: none; in a recipe, its data."
        },
    )
    tokenizer_data: str | None = field(
        default=None,
        metadata={
            "help": "Text for choosing the tokenizer component where tokenizers differ: the one with which the "
            "untrained hybrid predicts it best. A file, folder or Hub data set. Default: none; in a recipe, its data."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "With embeddings fresh: the hybrid's tokenizer, a directory or Hub repo, whatever the components'. "
            "Default: that of the tokenizer component."
        },
    )
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights, for example bfloat16."})

    def settings(self) -> dict[str, Any]:
        """What was given, as keyword arguments of `from_components`.

        Raises:
            ManticoreError: A mixture that only a recipe can ask for.
        """
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.mixture is not None and self.mixture.startswith("mad"):
            raise ManticoreError(
                f"mixture={self.mixture!r} is programmed by a recipe: write it under `hybrid:` there and give the "
                "recipe to `manticore-hf run` (or use manticore_hf.experiments.program_alpha and set_mixture_weights)."
            )
        return {key: value for key, value in given.items() if value is not None}


@takes_old_fields
@dataclass
class CalibrateArguments:
    """What calibration starts from."""

    model: str = field(metadata={"help": "The hybrid to start from: directory or Hub repo."})
    tokens: int = field(
        default=40_000, metadata={"help": "Tokens to use of the training text; a few tens of thousands."}
    )
    reference_component: str | None = field(
        default=None,
        metadata={
            "help": "Reference component. Default: the one with the lowest loss on this text.",
            "old": "reference",
        },
    )
    dtype: str = field(
        default="float32", metadata={"help": "dtype the weights are loaded in.", "old": "calibration_dtype"}
    )


@takes_old_fields
@dataclass
class StageArguments:
    """What a training stage starts from."""

    model: str = field(metadata={"help": "The hybrid to start from: directory or Hub repo."})
    mixture_from: str | None = field(
        default=None,
        metadata={
            "help": "finetune: a searched hybrid whose mixture weights are taken over and fixed, while components and "
            "projectors start from --model (the paper's order)."
        },
    )
    component_max_norm: float | None = field(
        default=None, metadata={"help": "Clip each component's gradient by its own norm (not one norm over all)."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype the weights are loaded in; bf16/fp16 options autocast over it.", "old": "train_dtype"},
    )
    new_rows_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of new embeddings and heads (transplanted, or embeddings: fresh); "
            "0 freezes them. Default: the common learning rate."
        },
    )
    new_embeddings: bool = field(
        default=False,
        metadata={
            "help": "With embeddings: fresh: draw them and the heads anew before the training, as the paper's code "
            "does for search and finetune, which keep no more than the projectors of the stage before."
        },
    )
    verbose: bool = field(
        default=False,
        metadata={"help": "Print what the Trainer logs at every step, instead of one bar and a file (training.log)."},
    )


@dataclass
class AlphaArguments:
    """How a search moves alpha; a part of SearchArguments."""

    strategy: str = field(
        default="darts", metadata={"help": "How alpha moves: darts, darts_alternating, darts_bilevel, gaea or dash."}
    )
    alpha_learning_rate: float = field(
        default=0.01, metadata={"help": "Learning rate of alpha (paper: 0.005 to 0.05)."}
    )
    keep_alpha: bool = field(
        default=False, metadata={"help": "Continue from the alpha of --model instead of equal weights."}
    )
    alpha_weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay of alpha's logits."})
    alpha_lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of alpha's learning rate."})
    entropy_penalty: float = field(
        default=0.0, metadata={"help": "Weight of alpha's entropy (nats, mean over blocks): larger is more one-hot."}
    )
    cost_penalty: float = field(
        default=0.0,
        metadata={"help": "Weight of the expected cost: sum of alpha times the layers' parameters, as a share of all."},
    )
    temperature: float = field(default=2.0, metadata={"help": "dash: first Gumbel-softmax temperature (falls to 0.5)."})


@takes_old_fields
@dataclass
class PruneArguments:
    """What is pruned, and how its path is chosen."""

    model: str = field(metadata={"help": "The hybrid to prune: directory or Hub repo."})
    path: str = field(
        default="alpha",
        metadata={
            "old": "route",
            "help": "alpha (by the mixture weights), loss (measured on the validation text), a component's name, "
            "or one name per block, separated by commas.",
        },
    )
    budget: float | None = field(
        default=None, metadata={"help": "Largest cost of the path, as a share of the full hybrid's."}
    )
    cost: str = field(default="parameters", metadata={"help": "What the budget counts: parameters, flops or latency."})
    beam: int = field(default=4, metadata={"help": "Paths kept if there are too many to measure them all."})
    distil_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the full hybrid's distribution in the distillation loss; the text gets the rest."},
    )
    dtype: str = field(default="float32", metadata={"help": "dtype the weights are loaded in.", "old": "train_dtype"})
    verbose: bool = field(
        default=False,
        metadata={"help": "Print what the Trainer logs at every step, instead of one bar and a file (training.log)."},
    )

    def __post_init__(self):
        if not 0 <= self.distil_weight <= 1:
            raise ManticoreError(f"distil_weight={self.distil_weight} must be in [0, 1].")
