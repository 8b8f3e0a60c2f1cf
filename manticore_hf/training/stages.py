"""The stages, in order: one table, from which command line, recipes, plans, comparisons and the docs' table come.

Imports neither torch nor Transformers: a stage's own modules are imported when it is run.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from manticore_hf.training.stage_arguments import (
    AlphaArguments,
    CalibrateArguments,
    HybridArguments,
    PruneArguments,
    StageArguments,
)


@dataclass(frozen=True)
class Stage:
    """One stage of making a hybrid.

    Attributes:
        name: Its command, and its key in a recipe's `stages:`.
        help: What it does, in a line.
        prints: What it prints at its end, beside the directory it wrote.
        arguments: Dataclass of what it starts from and its options.
        entry: (module, name) of the function that runs it: `(start, data, arguments) -> result`, of an instance of
            `arguments`, DataArguments, and TrainingArguments of the kind `training`. (`compose` takes no text, see
            `run_compose`.)
        training: (module, name) of its TrainingArguments' class.
        own_training: Dataclass of what `training` has beside Transformers' own fields, or None.
        trains: What it trains, as `set_stage` takes it; None where there is no gradient.
    """

    name: str
    help: str
    prints: str
    arguments: type
    entry: tuple[str, str]
    training: tuple[str, str] = ("transformers", "TrainingArguments")
    own_training: type | None = None
    trains: str | None = None

    @property
    def run(self) -> Callable[..., dict]:
        """The function that runs it."""
        return _found(self.entry)

    @property
    def training_class(self) -> type:
        """TrainingArguments, or the stage's own kind of it."""
        return _found(self.training)


def _found(place: tuple[str, str]) -> Any:
    module, name = place
    return getattr(importlib.import_module(module), name)


_TRAINED = "manticore_hf.training.trained_stages"

STAGES: dict[str, Stage] = {
    one.name: one
    for one in (
        Stage(
            "compose",
            "join pretrained models into a hybrid, untrained",
            "parameters and bytes; coverage and bits per byte of transplants",
            HybridArguments,
            ("manticore_hf.training.untrained_stages", "run_compose"),
        ),
        Stage(
            "calibrate",
            "solve for a hybrid's projectors in closed form",
            "loss of each component, R^2 of each map",
            CalibrateArguments,
            ("manticore_hf.training.untrained_stages", "run_calibrate"),
        ),
        Stage(
            "pretrain",
            "train projectors, bridges, mixture weights and gate, components frozen",
            "losses",
            StageArguments,
            (_TRAINED, "run_pretrain"),
            trains="projectors",
        ),
        Stage(
            "search",
            "search the mixture weights",
            "losses",
            StageArguments,
            (_TRAINED, "run_search"),
            training=("manticore_hf.training.search", "SearchArguments"),
            own_training=AlphaArguments,
            trains="search",
        ),
        Stage(
            "finetune",
            "fine-tune everything at fixed mixture weights",
            "losses",
            StageArguments,
            (_TRAINED, "run_finetune"),
            trains="finetune",
        ),
        Stage(
            "prune",
            "keep one component per block, and recover by distillation",
            "losses, also before recovery distillation",
            PruneArguments,
            ("manticore_hf.training.distill", "run_prune"),
            trains="finetune",
        ),
    )
}

AFTER_COMPOSE: dict[str, Stage] = {name: stage for name, stage in STAGES.items() if name != "compose"}
"""Those that a recipe lists: composing comes first by itself."""
