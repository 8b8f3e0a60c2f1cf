"""The recipe of a comparison: one that can be compared, and what its stages say of training."""

import dataclasses
import os
from pathlib import Path

from transformers import TrainingArguments

from manticore_hf.compare.arguments import stage_settings
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.training.recipe import HYBRID_SOURCES, Recipe, find_beside, load_named_recipe, stage_data
from manticore_hf.training.stages import STAGES

VALIDATION = 0.1  # share of the training text that settings are chosen on, where the recipe holds out none
GATE = {"num_train_epochs": 1, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 5}
_TRAINING = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}


def read_recipe(path: str | Path, allow_outside: bool = False) -> Recipe:
    """A recipe that can be compared, with its local paths made absolute and a validation split.

    Its `data` becomes that of its finetune stage, on which all models are tuned; stages that read another text keep
    theirs, whole. A copy that a run has left in its directories counts paths from where the recipe was.

    Args:
        path: Its file.
        allow_outside: Whether what it names on this machine may lie outside of the folder that it is in.

    Raises:
        ManticoreError: It has no finetune stage, or names what is outside of its folder.
    """
    recipe = load_named_recipe(path, allow_outside)
    stages = [stage for stage, _ in recipe.stages]
    if "finetune" not in stages:
        raise ManticoreError(
            f"{path}: a comparison needs a finetune stage, whose settings all models are tuned with; it has {stages}."
        )
    read = [_whole(stage_data(recipe, settings.get("data", {}))) for _, settings in recipe.stages]
    recipe.data = read[stages.index("finetune")]
    for (_, settings), text in zip(recipe.stages, read):
        settings.pop("data", None)
        settings |= {} if text == recipe.data else {"data": text}
    recipe.components = [_absolute(source, recipe) for source in recipe.components]
    sources = {key: _absolute(recipe.hybrid[key], recipe) for key in HYBRID_SOURCES & recipe.hybrid.keys()}
    recipe.hybrid = {**recipe.hybrid, **sources}
    if not recipe.data.get("validation_fraction", DataArguments.validation_fraction):
        recipe.data["validation_fraction"] = VALIDATION
    return recipe


def _absolute(source, recipe):
    path = Path(find_beside(source, recipe))
    return str(path.resolve()) if os.path.exists(path) else source


def _whole(data):
    """DataArguments as a recipe says them: what differs from the defaults, with a full path."""
    path = Path(data.data)
    given = {f.name: getattr(data, f.name) for f in dataclasses.fields(data) if getattr(data, f.name) != f.default}
    return {**given, "data": str(path.resolve()) if os.path.exists(path) else data.data}


def earlier_texts(recipe: Recipe) -> list[dict]:
    """Keys of DataArguments of each other text that training stages read before the finetune stage, in their order."""
    out = []
    for stage, settings in recipe.stages:
        if stage == "finetune":
            break
        if "data" in settings and STAGES[stage].trains is not None and settings["data"] not in out:
            out.append(settings["data"])
    return out


def training_settings(recipe: Recipe, stage: str, **own: object) -> dict:
    """What a stage of the recipe sets of TrainingArguments, with changes."""
    settings = stage_settings(recipe, stage)
    settings = settings if settings is not None else GATE if stage == "pretrain" else {}
    return only_training({**settings, **own})


def only_training(settings: dict) -> dict:
    """Those of a stage's settings that are TrainingArguments'."""
    return {key: value for key, value in settings.items() if key in _TRAINING}
