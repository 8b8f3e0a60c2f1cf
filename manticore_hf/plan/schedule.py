"""Stages as tasks: what is trained, on which rows, for how many tokens."""

import importlib.util
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch

from manticore_hf.evaluation.data import load_rows
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.evaluation.records import read_texts
from manticore_hf.modeling.bounds_manticore import ManticoreError
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from manticore_hf.plan.memory import weigh
from manticore_hf.plan.step import meta_hybrid
from manticore_hf.plan.subject import Subject
from manticore_hf.training.recipe import stage_data
from manticore_hf.training.stages import STAGES
from manticore_hf.utils.tokenizers import read_tokenizer, tokenise

_COUNTED = 20_000_000  # bytes of text that are tokenised to count tokens; of more, a sample is
_SAMPLE = 2_000_000
_GUESS = 4.0  # bytes per token, without a tokenizer


@dataclass
class Task:
    """One stage, as it is planned.

    Attributes:
        stage: Its name.
        settings: As the recipe has them.
        config: The ManticoreConfig that it trains.
        trains: As `set_stage` takes it; None for a calibration.
        teacher: Configuration of the soft hybrid that a pruned one learns from, or None.
        dtype, autocast: Of the weights; of mixed precision, or None.
        converts: The dtype that they are stored in, where it is another; else None.
        amounts: Of components that read text by tokenizers of their own, as the Subject has them.
        batch, accumulation, length, checkpointing: Rows per device, micro-batches per step, tokens per row, and whether
            activations are recomputed.
        eval_batch: Rows per device of the losses that end the stage; None if it has no validation text.
        tokens: Tokens that the stage reads in all, None where they cannot be counted; `counted` says how.
    """

    stage: str
    settings: dict
    config: ManticoreConfig
    trains: str | None
    teacher: ManticoreConfig | None
    dtype: torch.dtype
    autocast: torch.dtype | None
    batch: int
    accumulation: int
    length: int
    checkpointing: bool
    eval_batch: int | None = None
    tokens: int | None = None
    counted: str = ""
    converts: torch.dtype | None = None
    amounts: dict = field(default_factory=dict)

    @property
    def compute(self) -> torch.dtype:
        """dtype that matrices are multiplied in."""
        return self.autocast or self.dtype

    @property
    def adaptable(self) -> bool:
        """Whether LoRA could take its place."""
        return self.stage == "finetune" and importlib.util.find_spec("peft") is not None


def checkpoints(given: dict) -> bool:
    """Whether a stage recomputes activations: by Transformers' name for it, else by the one that it had before."""
    named = given["activation_checkpointing"]
    return bool(given["gradient_checkpointing"] if named is None else named)


def make_task(
    subject: Subject, stage: str, settings: dict, length: int | None = None, tokens: int | None = None, devices: int = 1
) -> Task:
    """The Task of a stage.

    Args:
        subject: A Subject.
        stage, settings: Of its `stages`.
        length: Tokens per row instead of the recipe's.
        tokens: Tokens of the training text instead of those counted.
        devices: How many read at a time.

    Raises:
        ManticoreError: A setting that cannot be planned.
    """
    known = STAGES[stage]
    given = {**_defaults(known.training_class), **_defaults(known.arguments), **settings}
    data = None
    if subject.recipe is not None and ("data" in subject.recipe.data or "data" in settings.get("data", {})):
        data = stage_data(subject.recipe, settings.get("data", {}))
    rows = length or (data.block_size if data is not None else 512)
    longest = subject.config.max_position_embeddings
    if longest is not None and rows > longest:
        rows, note = longest, f"{stage}: rows of {rows} tokens are cut to {longest}, the hybrid's context length"
        if note not in subject.notes:
            subject.notes.append(note)
    config, teacher = subject.config, None
    if stage in ("finetune", "prune"):
        config = _fixed(config)
    if stage == "prune" and config.route is None:
        config, teacher = _pruned(config, given, subject)
    dtype = given["dtype"]
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ManticoreError(f"{stage}: {dtype!r} is not a torch dtype; give for example 'bfloat16'.")
    autocast = torch.bfloat16 if given["bf16"] else torch.float16 if given["fp16"] else None
    task = Task(
        stage,
        settings,
        config,
        known.trains,
        teacher,
        getattr(torch, dtype),
        autocast,
        given["per_device_train_batch_size"],
        given["gradient_accumulation_steps"],
        rows,
        checkpoints(given),
        amounts=subject.amounts,
    )
    if (stored := subject.config.dtype) is not None and stored != task.dtype:
        task.converts = stored
    if data is not None and (data.validation_fraction or data.validation_split):
        task.eval_batch = given["per_device_eval_batch_size"]
    if stage == "calibrate":
        task.tokens, task.counted = given["tokens"], "the stage's tokens"
        return task
    if given["max_steps"] > 0:
        task.tokens = given["max_steps"] * task.batch * task.accumulation * task.length * devices
        task.counted = f"{given['max_steps']} steps"
        return task
    found, task.counted = (tokens, "as given") if tokens is not None else count_tokens(data, subject)
    task.tokens = None if found is None else int(found * given["num_train_epochs"])
    return task


def _defaults(cls):
    """{field: default} of a dataclass, where there is one."""
    return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


def _fixed(config):
    """A configuration with the static mixture weights fixed, as for a fine-tuning: at the mean, for want of better."""
    config = ManticoreConfig.from_dict(config.to_dict())
    if config.route is None:
        count = len(config.component_names)
        rows = config.mixture_weights or [None] * config.num_blocks
        rows = [[1 / count] * count if row is None else row for row in rows]
        rows[-1] = rows[-1] if config.mixture == "static" else None
        config.mixture_weights = rows if any(row is not None for row in rows) else None
    return config


def _pruned(config, settings, subject):
    """(configuration of the pruned hybrid, of its teacher or None)."""
    path = settings["path"]
    if config.bridges:
        subject.notes.append("prune: which bridges are kept is not known yet; the plan keeps all of them")
        return config, config if settings["distil_weight"] > 0 else None
    if config.aligned:
        if path not in ("alpha", "loss", config.tokenizer_component):
            raise ManticoreError(
                f"prune: path={path!r}: components {list(config.aligned)} have tokenizers of their own; such a "
                f"hybrid can be pruned to {config.tokenizer_component!r} alone, whose tokenizer is the hybrid's."
            )
        names = [config.tokenizer_component]
    elif "," in path:
        names = path.split(",")
    elif path in ("alpha", "loss"):  # not known before it is measured: the largest it can be
        model = meta_hybrid(config)
        sizes = {name: weigh(model.component(name), model).count for name in config.component_names}
        names = [max(sizes, key=sizes.get)] * config.num_blocks
        subject.notes.append(f"prune: the path is not known yet; the plan assumes the largest component ({names[0]})")
    else:
        names = [path] * config.num_blocks
    values = config.to_dict()
    values.update(mixture_weights=None, route=names)
    values["components"] = [entry for entry in values["components"] if entry["name"] in names]
    values["block_layers"] = {name: cut for name, cut in config.block_layers.items() if name in names}
    if values["tokenizer_component"] not in names:
        values["tokenizer_component"] = names[0]
    try:
        hard = ManticoreConfig.from_dict(values)
    except ManticoreError as err:
        raise ManticoreError(f"prune: path={path!r} cannot be planned: {err}") from err
    return hard, config if settings["distil_weight"] > 0 else None


def count_tokens(data: DataArguments | None, subject: Subject) -> tuple[int | None, str]:
    """Tokens of a stage's training text.

    Returns:
        (tokens or None, how they were counted).
    """
    if data is None:
        return None, "no data in the recipe; give --tokens"
    kept = 1 if data.validation_split else 1 - data.validation_fraction
    path = Path(data.data)
    if not os.path.exists(path):
        if data.max_tokens is None:
            return None, f"{data.data} was not downloaded for counting; give --tokens"
        return int(data.max_tokens * kept), "max_tokens of the recipe"
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    tokenizer = _tokenizer(subject.home)
    if tokenizer is not None and size <= _COUNTED:
        rows, _ = load_rows(data, tokenizer)
        return sum(len(ids) for ids in rows["input_ids"]), "the text was tokenised"
    per_token, how = _GUESS, f"at {_GUESS:g} bytes per token"
    if tokenizer is not None:
        texts = read_texts(data, _SAMPLE)
        read = sum(len(text.encode()) for text in texts)
        per_token = read / max(1, sum(len(ids) for ids in tokenise(tokenizer, texts)["input_ids"]))
        how = f"{per_token:.2f} bytes per token in a sample of {read:,} bytes"
    found = int(size / per_token)
    return int(min(found, data.max_tokens or found) * kept), f"{size:,} bytes, {how}"


def _tokenizer(home):
    if home is None:
        return None
    try:
        return read_tokenizer(home.directory or home.repo_id, revision=home.revision or "main")
    except (OSError, ValueError):
        return None
