"""What a stage was asked for, kept in its directory: what lies there counts only if the same is asked for again.

A stage writes it before its work, so that it is also there after a kill. Directories of earlier versions have none, and
count as before.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from manticore_hf.compose.convert.converted_files import convert_again, converted
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.training.stage_arguments import (
    OLD_NAMES,
    AlphaArguments,
    CalibrateArguments,
    HybridArguments,
    PruneArguments,
    StageArguments,
)
from manticore_hf.utils.files import names_gguf, read_json, write_json
from manticore_hf.utils.renamed import old_fields
from manticore_hf.utils.settings import PRESETS

FILE = "_asked.json"  # it names this machine's paths: the Trainer does not upload what begins with an underscore
_MOST = 5  # differences in a message
_IDLE = {"verbose"}
_SOURCES = {"components", "model", "mixture_from", "data", "tokenizer", "tokenizer_data", "transplant_data", "source"}
_STARTS = {"compose": HybridArguments, "calibrate": CalibrateArguments, "prune": PruneArguments}
_UNTRAINED = ("compose", "calibrate")
_TRAINS = frozenset(
    """
    num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size data_seed
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay max_grad_norm label_smoothing_factor
    optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon neftune_noise_alpha
    average_tokens_across_devices bf16 fp16 train_sampling_strategy length_column_name dataloader_drop_last
    load_best_model_at_end metric_for_best_model greater_is_better
    """.split()
)
"""What changes what comes out, of TrainingArguments: not devices, logs, checkpoints, or how the work is laid out."""

_COMPARED: ContextVar[bool] = ContextVar("compared", default=False)


@contextlib.contextmanager
def compared_before(same: bool) -> Iterator[None]:
    """Stages within are not compared again where their recipe was: it may have moved with the files that it names."""
    token = _COMPARED.set(same)
    try:
        yield
    finally:
        _COMPARED.reset(token)


def asked_for(stage: str, output: Path, arguments: Any, *given: Any) -> dict[str, Any]:
    """What a stage is asked for, as plain values: what is not the default and changes what it writes.

    Args:
        stage: Its name.
        output: The directory that it writes.
        arguments: Its TrainingArguments.
        *given: Mappings and dataclasses of its other settings; None for none.
    """
    parts = [vars(one) if dataclasses.is_dataclass(one) else one for one in given if one is not None]
    found = {key: value for one in parts for key, value in one.items()}
    found |= {key: getattr(arguments, key, None) for key in _trained_by(stage)}
    usual = _defaults(stage)
    plain = {key: _plain(key, value, output) for key, value in found.items() if key not in _IDLE}
    return {"stage": stage, **{key: value for key, value in plain.items() if value != usual.get(key)}}


def check_asked(output: Path, now: dict[str, Any], result: dict | None, interrupted: bool) -> None:
    """Compares what lies in a directory with what is asked for; nothing is changed.

    Args:
        output: The directory.
        now: From `asked_for`.
        result: Of the stage that has ended there, or None.
        interrupted: Whether a stage has left a checkpoint to go on from.

    Raises:
        ManticoreError: Names what differs: then, and now.
    """
    if _COMPARED.get() or (result is None and not interrupted):
        return
    file = output / FILE
    then = read_json(file) if file.is_file() else {}
    stage = then.get("stage") or (result or {}).get("stage") or now["stage"]
    stage = OLD_NAMES.get(stage, stage)
    if stage != now["stage"]:
        found = [f"stage: {stage} then, {now['stage']} now"]
    else:
        found = differences(_whole(then), _whole(now)) if then else []
    if found:
        done = result is not None
        how = "a finished stage" if done else "checkpoints of a stage"
        remedy = "delete that directory" if done else "ask for the same again to go on from them"
        raise ManticoreError(
            f"{output} holds {how} that was asked for something else ({listing(found)}): give another --output-dir, or "
            f"{remedy}."
        )


def remember_asked(output: Path, asked: dict[str, Any]) -> None:
    """Writes what a stage was asked for into its directory."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / FILE, asked)


def composed_from(folder: str | os.PathLike) -> list[str | None] | None:
    """Where a hybrid's components are, as `compose` was asked for them, before the stages that have trained it since.

    Args:
        folder: Directory of the hybrid.

    Returns:
        Their directories, None for one that is there no more or came from the Hub; None if nothing is known. GGUF
        files whose conversions were deleted are converted again.

    Raises:
        ManticoreError: One of these cannot be.
    """
    for _ in range(100):  # stages: more than anyone runs
        file = Path(folder or "") / FILE
        asked = read_json(file) if folder and file.is_file() else {}
        if isinstance(asked.get("components"), list):
            return [_component(one, folder) for one in asked["components"]]
        folder = _there(asked.get("model"), folder)
        if folder is None:
            return None
    return None


def _component(place, folder):
    if _is_place(place) and names_gguf(str(place["name"])):
        found = convert_again(converted(place["name"], folder))
        return None if found is None else str(found)
    return _there(place, folder)


def _there(place, folder):
    """The directory that a place in `FILE` stands for: where it is beside the output, or else on this machine."""
    if not _is_place(place):
        return None
    found = os.path.normpath(os.path.join(folder, str(place["beside"]))), str(place["path"])
    return next((one for one in found if os.path.isdir(one)), None)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of settings, each as "name: value then, value now"."""
    out = []
    for key in dict.fromkeys([*now, *then]):
        one, two = then.get(key), now.get(key)
        if not _same(one, two):
            # Two directories of one name are told apart by their paths
            by = "name" if _shown(one, "last") != _shown(two, "last") else "path"
            out.append(f"{key}: {_shown(one, by)} then, {_shown(two, by)} now")
    return out


def listing(found: list[str]) -> str:
    """The first differences of a list, and how many there are beside them."""
    rest = len(found) - _MOST
    return "; ".join([*found[:_MOST], *([f"and {rest} more"] if rest > 0 else [])])


def _trained_by(stage):
    """Names of the TrainingArguments that count."""
    own = {field.name for field in dataclasses.fields(AlphaArguments)} if stage == "search" else set()
    return {"seed"} if stage in _UNTRAINED else {"seed", *_TRAINS, *own}


def _defaults(stage):
    kinds = [TrainingArguments, AlphaArguments, _STARTS.get(stage, StageArguments), DataArguments]
    fields = [field for kind in kinds for field in dataclasses.fields(kind)]
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def _whole(asked):
    """What was asked for, with the defaults; of a hybrid also those that its preset fills in."""
    usual, old = _defaults(asked["stage"]), old_fields(_STARTS.get(asked["stage"], StageArguments))
    own = {old.get(key, key): value for key, value in asked.items() if key != "stage"}
    if asked["stage"] == "compose":
        usual |= PRESETS.get(own.get("preset") or usual["preset"], {})
    own = {key: value for key, value in own.items() if value not in (None, {}, [])}
    return {key: _plain(key, value, None) for key, value in {**usual, **own}.items()}


def _plain(key, value, output):
    """A value as JSON has it; what lies on this machine by its path and by its place beside the output."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        usual = {field.name: field.default for field in dataclasses.fields(value)}
        value = {name: one for name, one in vars(value).items() if one != usual[name]}
    if isinstance(value, Mapping):
        return {str(name): _plain(name, one, output) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(key, one, output) for one in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if key in _SOURCES and isinstance(value, str) and output is not None and os.path.exists(value):
        path = os.path.realpath(value)
        return {"name": value, "path": path, "beside": os.path.relpath(path, os.path.realpath(output))}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, str):
        return json.loads(json.dumps(value))  # an enum's text
    # Of a model that was given as such no more can be said
    return type(value).__name__ if hasattr(value, "parameters") else str(value)


def _is_place(value):
    return isinstance(value, dict) and value.keys() == {"name", "path", "beside"}


def _same(one, two):
    if _is_place(one) and _is_place(two):
        return one["path"] == two["path"] or one["beside"] == two["beside"]
    if isinstance(one, str) and _is_place(two):
        one, two = two, one
    if _is_place(one) and isinstance(two, str):  # what lay there is there no more
        return two == one["name"] or os.path.realpath(two) == one["path"]
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return one == two


def _shown(value, by):
    if _is_place(value):
        return os.path.basename(value["path"]) if by == "last" else value[by]
    if isinstance(value, list):
        return f"[{', '.join(_shown(one, by) for one in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_shown(one, by)}' for key, one in value.items())}}}"
    return "not given" if value is None else str(value)
