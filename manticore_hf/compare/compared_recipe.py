"""The recipe of a comparison: one that can be compared, and what its stages say of training."""

import dataclasses
from pathlib import Path

from transformers import TrainingArguments

from manticore_hf.compare.arguments import stage_settings
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.training.recipe import Recipe, find_beside, load_recipe

VALIDATION = 0.1  # share of the training text that settings are chosen on, where the recipe holds out none
GATE = {"num_train_epochs": 1, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 5}
_TRAINING = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}


def read_recipe(path: str | Path, allow_outside: bool = False) -> Recipe:
    """A recipe that can be compared, with its local paths made absolute and a validation split.

    Args:
        path: Its file.
        allow_outside: Whether its relative paths may leave the folder that it is in.

    Raises:
        ManticoreError: It has no finetune stage, stages with data of their own, or paths that leave its folder.
    """
    path = Path(path)
    recipe = load_recipe(path)
    recipe.allow_outside = allow_outside
    stages = [stage for stage, _ in recipe.stages]
    if "finetune" not in stages:
        raise ManticoreError(
            f"{path}: a comparison needs a finetune stage, whose settings all models are tuned with; it has {stages}."
        )
    if any("data" in settings for _, settings in recipe.stages):
        raise ManticoreError(f"{path}: stages with data of their own do not compare at equal tokens; remove them.")
    recipe.data = dict(recipe.data)
    recipe.data["data"] = _absolute(recipe.data["data"], recipe)
    recipe.components = [_absolute(source, recipe) for source in recipe.components]
    if "tokenizer_data" in recipe.hybrid:
        recipe.hybrid = {**recipe.hybrid, "tokenizer_data": _absolute(recipe.hybrid["tokenizer_data"], recipe)}
    if not recipe.data.get("validation_fraction", DataArguments.validation_fraction):
        recipe.data["validation_fraction"] = VALIDATION
    return recipe


def _absolute(source, recipe):
    path = Path(find_beside(source, recipe))
    return str(path.resolve()) if path.exists() else source


def training_settings(recipe: Recipe, stage: str, **own: object) -> dict:
    """What a stage of the recipe sets of TrainingArguments, with changes."""
    settings = stage_settings(recipe, stage)
    settings = settings if settings is not None else GATE if stage == "pretrain" else {}
    return only_training({**settings, **own})


def only_training(settings: dict) -> dict:
    """Those of a stage's settings that are TrainingArguments'."""
    return {key: value for key, value in settings.items() if key in _TRAINING}
