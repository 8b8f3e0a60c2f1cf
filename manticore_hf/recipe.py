"""One YAML file for a whole experiment: components, data, stages.

    manticore-hf run recipes/poc.yaml --output-dir out

Every stage writes a directory of its own below the output directory; stages that are finished are not run again, so the
same command goes on after a kill. A recipe is data: it names settings of the stages and nothing else, and is read with
YAML's safe loader.
"""

import dataclasses
import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import TrainingArguments

from manticore_hf.data import DataArguments
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.search import SearchArguments
from manticore_hf.train import StageArguments

TOP = {"name", "description", "seed", "components", "hybrid", "data", "stages"}
_SET_BY_THE_RUN = {"output_dir", "model", "mixture_from"}


@dataclass
class Recipe:
    """A validated recipe.

    Attributes:
        path: Its file.
        name: Name of the experiment.
        seed: Random seed of all stages.
        components: As `from_components` takes them.
        hybrid: Keys of ManticoreConfig (and dtype).
        data: Keys of DataArguments.
        stages: [(stage, its settings)], in order; compose comes first by itself.
    """

    path: Path
    name: str
    seed: int
    components: list
    hybrid: dict
    data: dict
    stages: list


def load_recipe(path):
    """Reads and validates a recipe.

    Raises:
        ManticoreError: Names file, line, key and value of what is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise ManticoreError(f"Recipe {str(path)!r} cannot be read: {err}") from err
    try:
        values = yaml.safe_load(text)
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as err:
        raise ManticoreError(f"Recipe {str(path)!r} is no valid YAML: {err}") from err

    def wrong(where, message):
        line = next((lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in lines), 1)
        raise ManticoreError(f"{path}:{line}: {'.'.join(map(str, where)) or 'recipe'}: {message}")

    if not isinstance(values, dict):
        wrong((), "must be a mapping of settings.")
    for key in values:
        if key not in TOP:
            wrong((key,), f"unknown key; known are {sorted(TOP)}.")
    for key, kind in (("components", list), ("stages", list), ("hybrid", dict), ("data", dict)):
        if not isinstance(values.get(key, kind()), kind):
            wrong((key,), f"is {values[key]!r}, must be a {'list' if kind is list else 'mapping'}.")
    components = values.get("components") or []
    if not components:
        wrong(("components",), "names no component.")
    for i, component in enumerate(components):
        if not isinstance(component, str):
            wrong(("components", i), f"is {component!r}, must be a repo id or a directory.")
    seed = values.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        wrong(("seed",), f"is {seed!r}, must be an integer.")
    hybrid, data = values.get("hybrid") or {}, values.get("data") or {}
    _check_keys(hybrid, _config_keys(), ("hybrid",), wrong)
    _check_keys(data, _fields(DataArguments), ("data",), wrong)
    stages = [_stage(entry, i, wrong) for i, entry in enumerate(values.get("stages") or [])]
    if stages and "data" not in data:
        wrong(("data",), "has no key 'data' that says where the text is.")
    return Recipe(path, str(values.get("name", path.stem)), seed, components, hybrid, data, stages)


def _stage(entry, i, wrong):
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        wrong(("stages", i), f"is {entry!r}, must be one stage with its settings.")
    (stage, settings), = entry.items()
    if stage not in _stage_keys():
        wrong(("stages", i), f"stage {stage!r} is unknown; known are {sorted(_stage_keys())}.")
    settings = settings or {}
    if not isinstance(settings, dict):
        wrong(("stages", i, stage), f"is {settings!r}, must be a mapping of settings.")
    _check_keys(settings, _stage_keys()[stage], ("stages", i, stage), wrong)
    return stage, settings


def _stage_keys():
    from manticore_hf.prepare import run_calibrate

    training = (_fields(TrainingArguments) | _fields(StageArguments)) - _SET_BY_THE_RUN
    calibrate = set(inspect.signature(run_calibrate).parameters) - {"start", "data", "output"}
    return {
        "calibrate": calibrate,
        "pretrain": training,
        "search": (training | _fields(SearchArguments)) - _SET_BY_THE_RUN,
        "finetune": training,
    }


def _fields(cls):
    return {f.name for f in dataclasses.fields(cls) if f.init}


def _config_keys():
    known = set(inspect.signature(ManticoreConfig.__init__).parameters)
    return (known - {"self", "kwargs", "components", "manticore_version"}) | {"dtype"}


def _check_keys(values, known, where, wrong):
    for key, value in values.items():
        if key not in known:
            close = sorted(k for k in known if str(key)[:4] == k[:4]) or sorted(known)[:12]
            wrong((*where, key), f"unknown key (value {value!r}); did you mean one of {close}?")


def _lines(node, path=()):
    """{path of a key: its line, from 1}."""
    out = {path: node.start_mark.line + 1} if node is not None else {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            out.update(_lines(value, (*path, key.value)))
            out[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            out.update(_lines(value, (*path, i)))
    return out


def run_recipe(path, output_dir):
    """Runs all stages of a recipe, skipping those that are finished.

    Args:
        path: The YAML file.
        output_dir: Directory below which every stage writes its own.

    Returns:
        [(directory, result)] of the stages, in order.

    Raises:
        ManticoreError: The recipe is invalid, or another recipe was run in this directory.
    """
    import torch

    from manticore_hf.prepare import run_calibrate, run_compose
    from manticore_hf.train import run_stage

    recipe, output = load_recipe(path), Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "recipe.yaml"
    if kept.exists() and load_recipe(kept) != dataclasses.replace(recipe, path=kept):
        raise ManticoreError(f"{output} holds the stages of another recipe ({kept}); give another --output-dir.")
    shutil.copyfile(recipe.path, kept)

    folder = output / "0-compose"
    results = [(folder, run_compose(recipe.components, str(folder), recipe.seed, **recipe.hybrid))]
    before_search, searched = folder, None
    for number, (stage, settings) in enumerate(recipe.stages, 1):
        folder = output / f"{number}-{stage}"
        start = results[-1][0]
        print(f"[{recipe.name}] {stage} -> {folder}", flush=True)
        if stage == "calibrate":
            result = run_calibrate(str(start), DataArguments(**recipe.data), str(folder), **settings)
        else:
            own = {key: settings[key] for key in settings if key in _fields(StageArguments)}
            training = {key: settings[key] for key in settings if key not in own}
            if stage == "finetune" and searched is not None:
                # The paper's order: components and projectors start again, the mixture is the one found.
                start, own["mixture_from"] = before_search, str(searched)
            defaults = {"seed": recipe.seed, "report_to": "none", "use_cpu": not torch.cuda.is_available()}
            kind = SearchArguments if stage == "search" else TrainingArguments
            arguments = kind(output_dir=str(folder), **{**defaults, **training})
            result = run_stage(stage, StageArguments(str(start), **own), DataArguments(**recipe.data), arguments)
        if stage == "search":
            searched = folder
        elif searched is None:
            before_search = folder
        shutil.copyfile(recipe.path, folder / "recipe.yaml")
        results.append((folder, result))
    return results
