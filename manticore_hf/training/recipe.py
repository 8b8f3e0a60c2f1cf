"""One YAML file for a whole experiment: components, data, stages.

    manticore-hf run recipes/poc.yaml --output-dir out

Every stage writes a directory of its own below the output directory; stages that are finished are not run again, so the
same command resumes after an interruption. A recipe is data, and may be a stranger's: it names what trains and nothing
else. What acts outside of the run's directory (uploads, trackers, files that configure engines) is said on the command
line, and the files that it names lie below its own folder. It is read with YAML's safe loader, within bounds that no
experiment needs and that keep a hostile file from taking the machine.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from huggingface_hub import constants
from transformers import TrainingArguments

from manticore_hf.evaluation.data import DataArguments
from manticore_hf.evaluation.records import read_texts
from manticore_hf.modeling.bounds_manticore import ManticoreError, show
from manticore_hf.training.asked import compared_before, differences, listing
from manticore_hf.training.programs import program_of
from manticore_hf.training.runtime import RESULT, check_training, training_defaults
from manticore_hf.training.search import STRATEGIES
from manticore_hf.training.stage_arguments import (
    OLD_NAMES,
    RECIPE_MAY_SAY,
    HybridArguments,
    OutsideArguments,
    with_direction,
    wrong_setting,
)
from manticore_hf.training.stages import AFTER_COMPOSE, STAGES
from manticore_hf.utils.bounded_yaml import BoundedLoader
from manticore_hf.utils.distributed import on_main, print_main
from manticore_hf.utils.files import read_json, replace_text, stays_inside, write_json
from manticore_hf.utils.renamed import old_fields, warn_renamed

HYBRID_SOURCES = {"transplant_data", "tokenizer_data", "tokenizer"}
"""Keys under `hybrid:` that may name files of this machine: whoever reads a recipe keeps them below its folder."""
TOP = {"name", "description", "seed", "components", "hybrid", "program", "data", "stages"}
_MAX_PATH = 1_000
_SET_BY_THE_RUN = {"output_dir", "model", "mixture_from"}
_MOST = 2**63  # of a number
_MAX_BYTES = 200_000
_MOST_RUNS = 9  # that are remembered of one recipe, beside the last


@dataclass
class Recipe:
    """A validated recipe.

    Attributes:
        path: Its file.
        name: Name of the experiment.
        seed: Random seed of all stages.
        components: As `from_components` takes them.
        hybrid: Keys of ManticoreConfig and of HybridArguments; `mixture` may be "mad:TASK+TASK", an
            alpha programmed with MAD.
        program: Keys of ProgramSettings, of a mixture that is programmed.
        data: Keys of DataArguments.
        stages: [(stage, its settings)], in order; compose comes first by itself. A stage's settings may hold `data` of
            its own: keys that replace the recipe's, or all of them where it names another source.
        allow_outside: Whether what it names on this machine may lie outside of the folder that it is in.
    """

    path: Path
    name: str
    seed: int
    components: list
    hybrid: dict
    program: dict
    data: dict
    stages: list
    allow_outside: bool = field(default=False, compare=False)


def find_recipe(path: str | Path) -> Path:
    """A recipe's file: the one of that path, or else the one of that name that comes with the package.

    Args:
        path: A path, or a name alone ("poc.yaml").

    Raises:
        ManticoreError: There is neither.
    """
    path = Path(path)
    if path.is_file() or path.name != str(path):
        return path
    shipped = {one.name: one for one in files("manticore_hf.recipes").iterdir() if one.name.endswith(".yaml")}
    if path.name not in shipped:
        raise ManticoreError(
            f"Recipe {str(path)!r} does not exist, and is not one of those shipped: {', '.join(sorted(shipped))}."
        )
    return Path(str(shipped[path.name]))


def load_recipe(path: str | Path) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: Its file, or the name of a shipped one (see `find_recipe`).

    Raises:
        ManticoreError: Names file, line, key and value of what is wrong.
    """
    path = find_recipe(path)
    text = _read(path)
    try:
        loader = BoundedLoader(text)
        node = loader.get_single_node()
        lines = _lines(node)  # before the construction, which writes merged keys (<<) into the nodes
        values = loader.construct(node)
    except yaml.YAMLError as err:
        raise ManticoreError(f"Recipe {str(path)!r} is not valid YAML: {err}") from err
    except ValueError as err:
        raise ManticoreError(f"Recipe {str(path)!r} has a value that is not of its YAML type: {err}") from err

    def wrong(where, message):
        line = next((lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in lines), 1)
        place = ".".join(str(one)[:100] for one in where) or "recipe"
        raise ManticoreError(f"{path}:{line}: {place}: {message}")

    if not isinstance(values, dict):
        wrong((), "must be a mapping of settings.")
    for key in values:
        if key not in TOP:
            wrong((key,), f"unknown key; known are {sorted(TOP)}.")
    for key, kind in (("components", list), ("stages", list), ("hybrid", dict), ("program", dict), ("data", dict)):
        if not isinstance(values.get(key, kind()), kind):
            wrong((key,), f"is {show(values[key])}, must be a {'list' if kind is list else 'mapping'}.")
    components = values.get("components") or []
    if not components:
        wrong(("components",), "names no component.")
    for i, component in enumerate(components):
        if not isinstance(component, str):
            wrong(("components", i), f"is {show(component)}, must be a repo id, a directory or a .gguf file.")
    seed = values.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        wrong(("seed",), f"is {show(seed)}, must be an integer in [0, 2**32).")
    name = values.get("name", path.stem)
    if not isinstance(name, str):
        wrong(("name",), f"is {show(name)}, must be text.")
    hybrid, data = values.get("hybrid") or {}, values.get("data") or {}
    hybrid = _check_values(hybrid, _hybrid_types(), ("hybrid",), wrong)
    data = _check_values(data, _types(DataArguments), ("data",), wrong)
    stages = [_stage(entry, i, wrong) for i, entry in enumerate(values.get("stages") or [])]
    if any("data" not in {**data, **settings.get("data", {})} for _, settings in stages):
        wrong(("data",), "has no key 'data' that says where the text is.")
    program = _check_program(hybrid, values.get("program") or {}, stages, wrong)
    return Recipe(path, name, seed, components, hybrid, program, data, stages)


def _read(path):
    """A recipe's text, if it is one of a size that can be looked at."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as err:
        raise ManticoreError(f"Recipe {str(path)!r} cannot be read: {err}") from err
    if len(content) > _MAX_BYTES:
        raise ManticoreError(f"Recipe {str(path)!r} has more than {_MAX_BYTES} bytes; that is not a recipe.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        raise ManticoreError(f"Recipe {str(path)!r} is not UTF-8 text ({err}); save it as such.") from err


def _stage(entry, i, wrong):
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        wrong(("stages", i), f"is {show(entry)}, must be one stage with its settings.")
    ((stage, settings),) = entry.items()
    if isinstance(stage, str) and stage in OLD_NAMES:
        warn_renamed(f"stages: {stage}", OLD_NAMES[stage])
        stage = OLD_NAMES[stage]
    if stage not in _stage_keys():
        wrong(("stages", i), f"stage {show(stage)} is unknown; known are {sorted(_stage_keys())}.")
    settings = settings or {}
    if not isinstance(settings, dict):
        wrong(("stages", i, stage), f"is {show(settings)}, must be a mapping of settings.")
    settings, data = dict(settings), settings.get("data")
    if data is not None:
        settings.pop("data")
        if not isinstance(data, dict):
            wrong(("stages", i, stage, "data"), f"is {show(data)}, must be a mapping of data settings.")
        data = _check_values(data, _types(DataArguments), ("stages", i, stage, "data"), wrong)
    for old, new in old_fields(AFTER_COMPOSE[stage].arguments).items():
        if old in settings:
            if new in settings:
                wrong(("stages", i, stage, old), f"is the old name of {new}, which is given, too; drop it.")
            warn_renamed(f"stages: {stage}: {old}", new)
            settings = {new if key == old else key: value for key, value in settings.items()}
    for key in settings:
        if key in _outside(stage):
            option, own = f"--{key.replace('_', '-')}", key in _types(OutsideArguments)
            wrong(
                ("stages", i, stage, key),
                f"(value {show(settings[key])}) acts outside of the run's directory, so a recipe may not say it. "
                f"Remove it, and if you want it yourself, give {option} to `manticore-hf {'run' if own else stage}`.",
            )
    settings = _check_values(settings, _stage_keys()[stage], ("stages", i, stage), wrong)
    if settings.get("strategy", "darts") not in STRATEGIES:
        wrong(("stages", i, stage, "strategy"), f"is {show(settings['strategy'])}; choose one of {sorted(STRATEGIES)}.")
    return stage, settings if data is None else {**settings, "data": data}


def _check_program(hybrid, program, stages, wrong):
    """The settings of a mixture that is programmed, checked, and that its fixed alpha leaves the stages work to do."""
    programs = program_of(hybrid.get("mixture"))
    try:
        tasks = programs and programs.mixture_tasks(hybrid["mixture"])
    except ManticoreError as err:
        wrong(("hybrid", "mixture"), f"is {show(hybrid['mixture'])}: {err}")
    if tasks is None:
        if program:
            wrong(("program",), 'is for a mixture that is programmed: give hybrid.mixture "mad:TASK+TASK", or drop it.')
        return program
    program = _check_values(program, _types(programs.ProgramSettings), ("program",), wrong)
    try:
        settings = programs.ProgramSettings(**program)
        for task in tasks:
            settings.task(task, settings.seed)
        if type(hybrid.get("num_blocks", 1)) is int:
            settings.depth(hybrid.get("num_blocks", 1))
    except ManticoreError as err:
        wrong(("program",), str(err))
    if hybrid.get("mixture_weights") is not None:
        wrong(("hybrid", "mixture_weights"), "are given, and mixture is programmed: drop one of the two.")
    default = hybrid.get("preset", "default") == "default"
    native = hybrid.get("embeddings") == "native" or (default and hybrid.get("embeddings") is None)
    for i, (stage, _) in enumerate(stages):
        if stage == "search":
            wrong(
                ("stages", i),
                f"search would move the alpha that mixture {show(hybrid['mixture'])} has programmed: "
                "leave the stage out, or give mixture: static.",
            )
        alone = hybrid.get("num_blocks", 1) == 1 and hybrid.get("topology") != "bridge"
        if stage == "pretrain" and native and alone and "transplant" not in hybrid:
            wrong(
                ("stages", i),
                "pretrain has nothing to train: one block with native embeddings has no projectors, "
                "and its alpha is programmed. Leave the stage out.",
            )
    return program


def _stage_keys():
    """{stage: {setting: its type}}."""
    out = {}
    for name, stage in AFTER_COMPOSE.items():
        types = {**_types(stage.training_class), **_types(stage.arguments)}
        out[name] = {key: types[key] for key in types if key not in _SET_BY_THE_RUN | _outside(name)}
    return out


@cache
def _outside(stage):
    """TrainingArguments that no recipe may set: a list of what is allowed, so that new ones of Transformers are not."""
    own = _types(AFTER_COMPOSE[stage].arguments)
    return {key for key in _types(TrainingArguments) if key not in RECIPE_MAY_SAY and key not in own}


@cache
def _types(cls):
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _hybrid_types():
    """Keys under `hybrid:`; ManticoreConfig checks the values of most itself."""
    checked = ("dtype", "transplant", *HYBRID_SOURCES)
    return {f.name: str if f.name in checked else object for f in dataclasses.fields(HybridArguments)}


def _check_values(values, known, where, wrong):
    """The settings, with numbers that YAML takes for text (2e-4 has no dot) as numbers."""
    out = {}
    for key, value in values.items():
        if key not in known:
            close = sorted(k for k in known if str(key)[:4] == k[:4]) or sorted(known)[:12]
            wrong((*where, key), f"unknown key (value {show(value)}); did you mean one of {close}?")
        if isinstance(value, (int, float)) and not -_MOST < value < _MOST:  # nor infinite, nor none at all
            wrong((*where, key), f"is {show(value)}, must be a finite number of a sensible size.")
        kinds = set(get_args(known[key]) or (known[key],))
        plain = {kind for kind in kinds if kind in (bool, int, float, str, type(None))}
        if isinstance(value, str) and float in plain and str not in plain:
            try:
                value = float(value)
            except ValueError:
                pass
            else:
                if not -_MOST < value < _MOST:
                    wrong((*where, key), f"is {show(value)}, must be a finite number of a sensible size.")
        fits = type(value) in kinds or (float in kinds and type(value) is int)
        if plain == kinds and not fits:
            names = sorted("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
            wrong((*where, key), f"is {show(value)}, must be {' or '.join(names)}.")
        if (message := wrong_setting(key, value, where[-1] if where else None)) is not None:
            wrong((*where, key), f"is {show(value)}, {message}.")
        out[key] = value
    return out


def _lines(node, path=()):
    """{path of a key: its line, from 1}."""
    out = {path: node.start_mark.line + 1} if node is not None else {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                out.update(_lines(value, (*path, key.value)))
                out[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            out.update(_lines(value, (*path, i)))
    return out


def run_recipe(
    path: str | Path,
    output_dir: str | Path,
    seed: int | None = None,
    outside: OutsideArguments | None = None,
    allow_outside: bool = False,
    verbose: bool = False,
) -> list[tuple[Path, dict]]:
    """Runs all stages of a recipe, skipping those that are finished.

    Args:
        path: The YAML file.
        output_dir: Directory below which every stage writes its own.
        seed: Random seed instead of the recipe's.
        outside: What every training stage does outside of that directory; default: nothing.
        allow_outside: Whether what the recipe names on this machine may lie outside of the folder that it is in.
        verbose: Whether the training stages print what they log at every step.

    Returns:
        [(directory, result)] of the stages, in order.

    Raises:
        ManticoreError: The recipe is invalid, or another recipe was run in this directory.
    """
    recipe, output = load_named_recipe(path, allow_outside), Path(output_dir)
    content = _read(find_recipe(path))
    if seed is not None and seed != recipe.seed:
        recipe.seed, line = seed, f"seed: {seed}"
        stated = re.search(r"(?m)^seed:", content)
        content = re.sub(r"(?m)^seed:.*$", line, content) if stated else f"{line}\n{content}"
    kept = output / "recipe.yaml"
    # Not by name, which may be the file's
    defaults = {"seed": recipe.seed, **training_defaults()}
    folder = output / "0-compose"
    arguments = TrainingArguments(output_dir=str(folder), **defaults)  # also joins the processes
    again = kept.exists()
    if again and (found := _changed(load_recipe(kept), recipe)):
        raise ManticoreError(
            f"{output} holds the stages of another recipe ({kept}; {listing(found)}): give another --output-dir, or "
            "delete that directory."
        )
    components = [find_beside(one, recipe) for one in recipe.components]
    stages = []
    for number, (stage, settings) in enumerate(recipe.stages, 1):  # whatever is wrong is said before anything is run
        known = STAGES[stage]
        own = {key: settings[key] for key in settings if key in _types(known.arguments)}
        if verbose and known.trains is not None:
            own["verbose"] = True
        training = {key: settings[key] for key in settings if key not in own and key != "data"}
        told = outside.given() if outside is not None and known.trains is not None else {}
        given = {"output_dir": str(output / f"{number}-{stage}"), **defaults, **with_direction(training), **told}
        check_training(f"{recipe.path}: stages.{number - 1}.{stage}", known.training_class, given)
        text = stage_data(recipe, settings.get("data", {}))
        if not (output / f"{number}-{stage}" / RESULT).is_file():
            on_main(read_texts, text, 1)
        stages.append((known, own, text, given))
    hybrid = dict(recipe.hybrid)
    for key in HYBRID_SOURCES & hybrid.keys():
        source, is_text = hybrid[key], key != "tokenizer"
        hybrid[key] = stage_data(recipe, {"data": source}) if is_text else find_beside(source, recipe)
    if "transplant" in hybrid and "transplant_data" not in hybrid and "data" in recipe.data:
        hybrid["transplant_data"] = stage_data(recipe, {})
    text = stage_data(recipe, {}) if "data" in recipe.data else stages[0][2] if stages else None
    output.mkdir(parents=True, exist_ok=True)
    on_main(replace_text, kept, content)
    on_main(remember_recipe, content, recipe.path.parent, recipe.allow_outside)
    program = None
    programs = program_of(hybrid.get("mixture"))
    if programs is not None:
        settings = programs.ProgramSettings(**{"seed": recipe.seed, **recipe.program})
        tasks, hybrid["mixture"] = programs.mixture_tasks(hybrid["mixture"]), "static"
        program = partial(programs.program_alpha, tasks=tasks, output_dir=output / "0-program", settings=settings)
    with compared_before(again):
        results = [(folder, STAGES["compose"].run(components, arguments, program=program, text=text, **hybrid))]
        before_search, searched = folder, None
        for known, own, data, training in stages:
            stage, folder, start = known.name, Path(training["output_dir"]), results[-1][0]
            print_main(f"[{recipe.name}] {stage} -> {folder}", flush=True)
            if stage == "finetune" and searched is not None:
                # The paper's order: components and projectors start again, the mixture is the one found.
                start, own["mixture_from"] = before_search, str(searched)
            arguments = known.training_class(**training)  # only now: some of it is of the whole process
            result = known.run(known.arguments(model=str(start), **own), data, arguments)
            if stage == "search":
                searched = folder
            elif searched is None:
                before_search = folder
            on_main(shutil.copyfile, kept, folder / "recipe.yaml")
            results.append((folder, result))
    return results


def _changed(then, now):
    """What differs between two recipes, in the words of `differences`."""
    return differences(_flat(then), _flat(now))


def _flat(recipe):
    out = {"seed": recipe.seed, "components": recipe.components}
    for part in ("hybrid", "program", "data"):
        out |= {f"{part}.{key}": value for key, value in getattr(recipe, part).items()}
    out["stages"] = [stage for stage, _ in recipe.stages]
    for number, (stage, settings) in enumerate(recipe.stages):
        out |= {f"stages.{number}.{stage}.{key}": value for key, value in settings.items()}
    return out


def remember_recipe(text: str, folder: Path, allow_outside: bool = False) -> None:
    """Notes, in this user's own files, that a recipe was run by this user: what it names may be read again.

    Args:
        text: Of the recipe.
        folder: That its relative paths count from.
        allow_outside: Whether it was allowed to name what lies outside of that folder.
    """
    with contextlib.suppress(OSError):
        note, here = _note_of(text), {"folder": str(folder.resolve()), "allow_outside": allow_outside}
        note.parent.mkdir(parents=True, exist_ok=True)
        others = [run for run in (_runs(note) if note.is_file() else ()) if run["folder"] != here["folder"]]
        write_json(note, {"runs": [here, *others[:_MOST_RUNS]]})


def _note_of(text):
    return Path(constants.HF_HOME) / "manticore" / "recipes" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _runs(note):
    """[{"folder", "allow_outside"}]: from where this user ran a recipe, the last time first."""
    found = read_json(note)
    return found.get("runs", [found])  # version 0.1 kept the last run alone


def as_run(recipe: Recipe) -> Recipe | None:
    """A copy of a recipe, as stages have them, as this user ran it on this machine: from where, allowed what.

    Args:
        recipe: The copy.

    Returns:
        The Recipe; None if this user did not run it on this machine. Of several folders that it was run from, the one
        that the copy is in, else the last.
    """
    try:
        runs = _runs(_note_of(_read(recipe.path)))
    except (OSError, ManticoreError):
        return None
    above = {str(folder) for folder in recipe.path.resolve().parents}
    run = next((run for run in runs if run["folder"] in above), runs[0])
    path = Path(run["folder"]) / recipe.path.name
    return dataclasses.replace(recipe, path=path, allow_outside=run["allow_outside"])


def load_kept_recipe(path: str | Path, allow_outside: bool = False) -> Recipe:
    """The recipe that lies beside a hybrid, which may be a stranger's.

    What it names counts from where it was run if this user ran it on this machine; else from where it lies.

    Args:
        path: Its file.
        allow_outside: Whether it is trusted with what lies outside of that folder, whoever ran it.

    Raises:
        ManticoreError: The recipe is invalid.
    """
    recipe = load_recipe(path)
    recipe = as_run(recipe) or recipe
    return dataclasses.replace(recipe, allow_outside=recipe.allow_outside or allow_outside)


def load_named_recipe(path: str | Path, allow_outside: bool = False) -> Recipe:
    """A recipe that a user names: a file of theirs, or the copy that a run has left in its directories.

    What such a copy names counts from where the recipe was when this user ran it on this machine.

    Args:
        path: Its file, or the name of a shipped one (see `find_recipe`).
        allow_outside: Whether what it names on this machine may lie outside of the folder that it is in.

    Raises:
        ManticoreError: The recipe is invalid.
    """
    if any((Path(path).parent / name).exists() for name in (RESULT, "0-compose")):
        return load_kept_recipe(path, allow_outside)
    return dataclasses.replace(load_recipe(path), allow_outside=allow_outside)


def stage_data(recipe: Recipe, other: dict) -> DataArguments:
    """DataArguments of a stage; a relative path counts from the recipe's folder, or from the working directory.

    Raises:
        ManticoreError: It is not below the recipe's folder, and that is not allowed.
    """
    values = dict(other) if "data" in other else {**recipe.data, **other}
    values["data"] = find_beside(values["data"], recipe)
    return DataArguments(**values)


def find_beside(source: str, recipe: Recipe) -> str:
    """What a recipe names, as a path where it is one; else as it is.

    Args:
        source: File, folder, or address on the Hub.
        recipe: The Recipe; what is not below its folder needs its `allow_outside`.

    Raises:
        ManticoreError: It is outside of the folder, by itself or through a link.
    """
    _check_length(source, recipe)
    folder, path = recipe.path.parent, Path(source)
    found = next((one for one in (folder / path, path) if os.path.exists(one)), None)
    if found is None:
        return source
    if not recipe.allow_outside and not _all_inside(found, folder):
        raise ManticoreError(
            f"{recipe.path}: {show(source)} is not below the recipe's folder. Copy it there, or, if you wrote the "
            "recipe or trust it with this, give --allow-outside (allow_outside=True)."
        )
    return str(found)


def _check_length(source, recipe):
    """A path that is too long for the system is "not there", until something leaves out what is idle in it (`./`)."""
    if len(source) > _MAX_PATH:
        raise ManticoreError(f"{recipe.path}: a name of {len(source):,} characters cannot be a file or repository.")


def _all_inside(path, folder):
    """Whether a file, or a folder and all that is below it, is in a folder, links followed."""
    if not stays_inside(path, folder):
        return False
    return all(stays_inside(one, folder) for one in path.rglob("*")) if path.is_dir() else True
