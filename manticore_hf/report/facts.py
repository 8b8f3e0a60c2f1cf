"""What is on disk about a hybrid: its stages, their curves and costs, its licences, its comparison with baselines."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from manticore_hf.evaluation.data import DataArguments
from manticore_hf.hub.card import read_results
from manticore_hf.hub.inspection import inspect_hybrid
from manticore_hf.hub.licenses import combine
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.report.comparison import FILE, FOLDER, find_comparison, read_comparison
from manticore_hf.training.recipe import load_kept_recipe, stage_data
from manticore_hf.training.search import alpha_history
from manticore_hf.utils.files import check_link
from manticore_hf.utils.formatting import is_number

_STAGE = re.compile(r"(\d+)-([a-z]+)")
_UNTRAINED = ("compose", "calibrate")
_SHOWN = ("*.json", "*.yaml", "*.md", "checkpoint-*/*.json", f"{FOLDER}/{FILE}")


@dataclass
class FinishedStage:
    """One finished stage.

    Args:
        name: As "3-finetune".
        folder: Its directory.
        result: What `stage.json` says.
        log: The Trainer's `log_history`, [] where it kept none.
        flops: The Trainer's estimate of training FLOPs (6 x parameters x tokens), or None.
        logging_steps: Steps from one logged loss to the next, or None.
    """

    name: str
    folder: Path
    result: dict
    log: list = field(default_factory=list)
    flops: float | None = None
    logging_steps: int | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds of training, or None where no log says."""
        return next((row["train_runtime"] for row in reversed(self.log) if is_number(row.get("train_runtime"))), None)

    def series(self, key: str) -> dict[str, tuple[list[int], list[float]]]:
        """What was logged under a key, or below it ("loss" takes "loss/mixture", too).

        Returns:
            {key: ([steps], [values])}.
        """
        out = {}
        for row in self.log:
            for name, value in row.items():
                fits = name == key or name.startswith(key if key.endswith("/") else f"{key}/")
                if fits and is_number(value) and type(row.get("step")) is int and is_number(row["step"]):
                    steps, values = out.setdefault(name, ([], []))
                    steps.append(row["step"])
                    values.append(value)
        return out

    def alpha(self) -> tuple[list[int], dict[str, list[float]]]:
        """(steps, {"alpha/BLOCK/COMPONENT": values}); where nothing was logged, ([], {})."""
        return alpha_history(self.log)


@dataclass
class Facts:
    """Everything that a report says, beside what is measured for it.

    Args:
        name: What the hybrid is called: the last parts of its path.
        folder: Its directory.
        stages: [FinishedStage], in order.
        found: What `inspect_hybrid` says.
        combined: What follows from the licences, for any use; `commercial` for commercial use.
        results: [Result] of this hybrid on texts, from its directory.
        comparison: What `read_comparison` gives, or None.
        comparison_path: Where it is.
        recipe: Path of the recipe that made it, or None.
        measured: {name: measurement}, and what `Store.about` says of them, filled by `write_report`.
        notices: Sentences on what was found and is not used.
    """

    name: str
    folder: Path
    stages: list
    found: dict
    combined: object
    commercial: object
    results: list = field(default_factory=list)
    comparison: dict | None = None
    comparison_path: Path | None = None
    recipe: Path | None = None
    measured: dict = field(default_factory=dict)
    notices: list = field(default_factory=list)

    @property
    def untrained(self) -> bool:
        """Whether it is known that nothing was trained; of a hybrid that says nothing of its making, it is not."""
        return bool(self.stages) and all(stage.result.get("stage") in _UNTRAINED for stage in self.stages)


def gather(directory: str | os.PathLike, comparison: str | os.PathLike | None = None) -> Facts:
    """Reads what is known about a saved hybrid, or about the last hybrid of a run.

    Args:
        directory: Of a saved hybrid, or the output directory of `manticore-hf run`.
        comparison: Directory or file of a comparison; default: beside the hybrid, or one level up.

    Returns:
        Facts.

    Raises:
        ManticoreError: There is no hybrid, or the comparison cannot be used.
    """
    directory = Path(directory)
    folder, stages = _stages(directory)
    _check_links({directory, folder, *(stage.folder for stage in stages)}, directory)
    found = inspect_hybrid(str(folder))
    licenses = {entry["name"]: entry["license"] for entry in found["components"]}
    path = find_comparison(directory, comparison)
    if path is None and comparison is None:
        path = find_comparison(folder)
    recipe = next((p for p in (folder / "recipe.yaml", directory / "recipe.yaml") if p.is_file()), None)
    return Facts(
        _name(directory, folder),
        folder,
        stages,
        found,
        combine(licenses),
        combine(licenses, commercial=True),
        read_results(folder),
        None if path is None else read_comparison(path),
        path,
        recipe,
    )


def _check_links(folders, named):
    """A downloaded directory may have links to files of its reader's, pieces of which would be shown."""
    found = [(folder, folder.parent) for folder in folders if folder != named]
    found += [(path, folder) for folder in folders for pattern in _SHOWN for path in folder.glob(pattern)]
    for path, home in found:
        check_link(path, home)


def _stages(directory):
    """(directory of the hybrid, [FinishedStage] that made it)."""
    if not directory.is_dir():
        raise ManticoreError(
            f"{str(directory)!r} is not a directory; give that of a saved hybrid or of `manticore-hf run`."
        )
    if (directory / "config.json").is_file():
        run, last = directory.absolute().parent, _STAGE.fullmatch(directory.absolute().name)
        if last is None or not (run / "recipe.yaml").is_file():
            return directory, [stage] if (stage := _stage(directory)) else []
        folders = [folder for folder in _numbered(run) if int(_STAGE.fullmatch(folder.name)[1]) <= int(last[1])]
        return directory, [stage for folder in folders if (stage := _stage(folder))]
    stages = [stage for folder in _numbered(directory) if (stage := _stage(folder))]
    hybrids = [stage.folder for stage in stages if (stage.folder / "config.json").is_file()]
    if not hybrids:
        raise ManticoreError(
            f"{str(directory)!r} holds no hybrid: neither a config.json nor folders of finished stages (0-compose, "
            "1-...). Give the directory of a saved hybrid, or the output directory of `manticore-hf run`."
        )
    return hybrids[-1], stages


def _numbered(run):
    folders = [folder for folder in run.iterdir() if folder.is_dir() and _STAGE.fullmatch(folder.name)]
    return sorted(folders, key=lambda folder: int(_STAGE.fullmatch(folder.name)[1]))


def _stage(folder):
    """A finished stage, or None."""
    result = _json(folder / "stage.json")
    if result is None:
        return None
    state = _json(folder / "trainer_state.json") or _last_state(folder)
    log = state.get("log_history")
    log = [row for row in log if isinstance(row, dict)] if isinstance(log, list) else []
    flops, every = (
        value if is_number(value) and value > 0 else None for value in map(state.get, ("total_flos", "logging_steps"))
    )
    return FinishedStage(folder.name, folder, result, log, flops, every)


def _last_state(folder):
    """What the newest checkpoint says, of a stage that keeps no log of its own."""
    states = [_json(path) for path in folder.glob("checkpoint-*/trainer_state.json")]
    states = [state for state in states if state and is_number(state.get("global_step", 0))]
    return max(states, key=lambda state: state.get("global_step", 0), default={})


def _json(path):
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _name(directory, folder):
    path = folder.absolute()
    return f"{path.parent.name}/{path.name}" if _STAGE.fullmatch(path.name) else path.name


def held_out(
    facts: Facts, data: str | os.PathLike | None = None, block_size: int | None = None, allow_outside: bool = False
) -> tuple[DataArguments, bool]:
    """Where held-out text comes from: (DataArguments, whether its validation split is meant).

    Args:
        facts: Facts.
        data: File of held-out text, or None for the validation split of the recipe's data.
        block_size: Tokens per row; default: the recipe's, else 512, at most what the hybrid reads.
        allow_outside: Whether a recipe that was not run here may name files outside of the directory.

    Raises:
        ManticoreError: There is neither a file nor a recipe that holds text out.
    """
    settings = None
    if facts.recipe is not None:
        trusted = allow_outside or data is not None  # whose text is not read then
        recipe = load_kept_recipe(facts.recipe, trusted)
        try:
            settings = _text_of(recipe, facts.folder)
        except ManticoreError as err:
            raise ManticoreError(f"{err} Or give another text with --data FILE.") from err
    longest = facts.found["settings"]["max_position_embeddings"]
    if data is not None:
        block_size = block_size or min(settings.block_size if settings else 512, longest or 512)
        return DataArguments(data=str(data), block_size=block_size, validation_fraction=0.0), False
    if settings is None:
        raise ManticoreError(
            f"{str(facts.folder)!r} has no recipe.yaml that says where its text is: give held-out text with "
            "--data FILE, or --no-measure."
        )
    if not settings.validation_fraction:
        raise ManticoreError(
            f"The recipe of {str(facts.folder)!r} holds out no text (validation_fraction 0): give text that the hybrid "
            "was not trained on with --data FILE, or --no-measure."
        )
    return settings, True


def _text_of(recipe, folder):
    """DataArguments of the stage that wrote a folder (of the last stage, if the name does not say), or None."""
    stage, stages = _STAGE.fullmatch(folder.absolute().name), recipe.stages
    number = int(stage[1]) - 1 if stage and 0 < int(stage[1]) <= len(stages) else -1
    return stage_data(recipe, stages[number][1].get("data", {})) if stages else None
