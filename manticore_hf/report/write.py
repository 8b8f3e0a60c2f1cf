"""`manticore-hf report DIR`: measures what is not known yet, decides by rules, writes report.html and report.md.

manticore-hf run recipes/poc.yaml --output-dir poc && manticore-hf report poc
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.compose.untouched import measure_originals
from manticore_hf.evaluation.data import load_rows
from manticore_hf.evaluation.gguf_sources import say_gguf
from manticore_hf.evaluation.losses import Measured, make_passages
from manticore_hf.evaluation.starts import scored_after
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.report import measure
from manticore_hf.report.comparison import FOLDER
from manticore_hf.report.facts import Facts, gather, held_out
from manticore_hf.report.one_run import OneRun, one_run
from manticore_hf.report.passages import where_it_differs
from manticore_hf.report.render import render
from manticore_hf.report.speed import measure_speed
from manticore_hf.report.store import Store, kept, stamp
from manticore_hf.report.verdict import Verdict, decide
from manticore_hf.training.originals import find_originals
from manticore_hf.training.recipe import find_beside, find_recipe, load_kept_recipe
from manticore_hf.utils.claims import CLAIM_BYTES, CLAIM_ROWS, itself, more_rows
from manticore_hf.utils.files import replace_text
from manticore_hf.utils.formatting import listed, plural
from manticore_hf.utils.task_types import check_generates
from manticore_hf.utils.tokenizers import read_tokenizer

NAMES = ("report.html", "report.md", "report.json")
_PROMPT, _NEW_TOKENS, _REPEATS = 256, 32, 5
_SHIPPED, _OWN_RECIPE, _TRAINED = "poc.yaml", "my.yaml", "trained"  # of a hybrid that came without a recipe
_OTHER_TEXT = "HELD_OUT.txt"  # stands for text that nothing was trained on
_SHORTEST = 32  # tokens per row, where the rows are made short to be enough


def write_report(
    directory: str | os.PathLike,
    data: str | os.PathLike | None = None,
    comparison: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    max_tokens: int = 20_000,
    block_size: int | None = None,
    batch_size: int = 8,
    measured: bool = True,
    allow_outside: bool = False,
    components: Sequence[str] | None = None,
) -> tuple[Verdict, Path, Path]:
    """Writes the report of a hybrid: one HTML file that needs nothing else, and its Markdown twin.

    Args:
        directory: Of a saved hybrid, or the output directory of `manticore-hf run`.
        data: File of held-out text; default: the validation split of the recipe's data.
        comparison: Directory of a `manticore-hf compare` run; default: one in the directory or above it, or in
            `compared` there.
        output: Directory to write to; default: `directory`.
        max_tokens: Measure on at most so many tokens, rows evenly spaced over the text.
        block_size: Tokens per row of `data`; default: the recipe's, else 512, halved until there are as many rows as an
            interval takes.
        batch_size: Rows per forward pass.
        measured: False to load no model and measure nothing: the report shows what an earlier one measured.
        allow_outside: Whether a recipe that was not run by this user, on this machine, may name text outside of the
            directory.
        components: Where the components are, in order, to measure them as they came; default: the addresses that the
            hybrid knows.

    Returns:
        (Verdict, path of the HTML file, path of the Markdown file).

    Raises:
        ManticoreError: There is no hybrid, or one that classifies; no held-out text; a comparison, or what an earlier
            report has measured, cannot be used.
    """
    facts = gather(directory, comparison)
    check_generates(ManticoreConfig.from_pretrained(facts.folder), "A report")
    output = Path(output or directory)
    output.mkdir(parents=True, exist_ok=True)
    if measured:
        arguments, split = held_out(facts, data, block_size, allow_outside)
        settings = {"max_tokens": max_tokens, "batch_size": batch_size, "components": components}
        shortens = data is not None and block_size is None
        facts.measured = _measure(facts, arguments, split, output / NAMES[2], shortens, **settings)
        verdict, html, markdown = _told(facts, data, components)
    else:
        path = next(
            (one for one in (output / NAMES[2], Path(directory) / NAMES[2]) if one.is_file()), output / NAMES[2]
        )
        facts.measured, why_not = kept(path, facts.folder)
        facts.notices += [why_not] if why_not else []
        try:
            verdict, html, markdown = _told(facts, data, components)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as err:  # it may be anyone's
            if not facts.measured:
                raise
            raise ManticoreError(f"{str(path)!r} cannot be shown: remove it, or measure again.") from err
    for name, text in zip(NAMES, (html, markdown)):
        replace_text(output / name, text)
    return verdict, output / NAMES[0], output / NAMES[1]


def _told(facts, data, components):
    """(Verdict, HTML, Markdown)."""
    data = data or _here(facts.measured.get("data"))  # what an earlier report was given
    command, run = compare_command(facts, data), one_run(facts)
    steps, settings = next_steps(facts, run, data, components), facts.found["settings"]
    places = _places(facts, components)
    verdict = decide(facts.comparison, settings, command, run, facts.untrained, steps, places)
    return verdict, *render(facts, verdict)


def compare_command(facts: Facts, test: str | os.PathLike | None = None) -> str:
    """The command that makes the comparison this report lacks, where the report will find it.

    Args:
        facts: Facts.
        test: Text that was not trained on; without a recipe none is known, because the whole text may be trained on.
    """
    test = test if facts.recipe is not None and test and not _is_trained_on(facts, test) else _OTHER_TEXT
    run = facts.folder.parent if (facts.folder.parent / "recipe.yaml").is_file() else facts.folder
    recipe, output = facts.recipe or _OWN_RECIPE, run / FOLDER if facts.recipe else Path(_TRAINED) / FOLDER
    output, test = (shlex.quote(str(one)) for one in (output, test))
    return f"manticore-hf compare {shlex.quote(str(recipe))} --test {test} --output-dir {output}"


def next_steps(
    facts: Facts, run: OneRun | None, data: str | os.PathLike | None = None, components: Sequence[str] | None = None
) -> list[str]:
    """What to do where there is no comparison, most useful first; commands that work as they are printed.

    Args:
        facts: Facts.
        run: What `one_run` says.
        data: The text that was measured on, if it was named.
        components: Where the components are, if that was said.
    """
    more = _more_text(facts, run, data, components)
    if facts.recipe is not None:
        return [*more, f"Measure it: {compare_command(facts, data)}"]
    names = listed(_places(facts, components))
    what = "To train it" if facts.untrained else "To make one like it"
    shipped = shlex.quote(str(find_recipe(_SHIPPED)))
    return [
        *more,
        f"{what} on text of yours, copy a recipe, then enter the components ({names}) and the text there, keep some of "
        f"it back for the last step, and for a small text on a CPU change the lines marked small: cp -i {shipped} "
        f"{_OWN_RECIPE}",
        f"Run the recipe: manticore-hf run {_OWN_RECIPE} --output-dir {_TRAINED}",
        f"Train every baseline on the same text, for a verdict; {_OTHER_TEXT} stands for what you kept back: "
        f"{compare_command(facts)}",
    ]


def _places(facts, components=None):
    """Where the components are, as commands take them; a name in capitals where that is not known."""
    entries, found = facts.found["components"], components or facts.measured.get("components")
    kept = map(_here, found) if _are_places(found, len(entries)) else [None] * len(entries)
    given = map(str, found) if components else kept
    return [
        place or entry["repo_id"] or f"DIRECTORY_OF_{entry['name']}"
        for place, entry in zip(given, entries, strict=True)
    ]


def _here(place):
    """A place of an earlier report, None where it was a path that leads nowhere from where this one is written."""
    if not isinstance(place, str):
        return None
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", place) and not Path(place).suffix
    return place if on_hub or os.path.exists(place) else None


def _are_places(values, count):
    """Whether what an earlier report kept may be places: its file may be anyone's."""
    fits = isinstance(values, list) and len(values) == count
    return fits and all(one is None or isinstance(one, str) for one in values)


def _is_trained_on(facts, text):
    """Whether a file is the text of the recipe, which `compare` does not test on."""
    try:
        recipe = load_kept_recipe(facts.recipe, True)
        sources = [recipe.data, *(settings.get("data") or {} for _, settings in recipe.stages)]
        found = {os.path.realpath(find_beside(one["data"], recipe)) for one in sources if one.get("data")}
    except ManticoreError:  # of one that cannot be read nothing is known
        return False
    return os.path.realpath(text) in found


def _more_text(facts, run, data, components):
    """[what to do where a sample was too small for a claim]."""
    if run is None or ((run.size or 0) >= CLAIM_BYTES and (run.rows or CLAIM_ROWS) >= CLAIM_ROWS):
        return []
    if data is None or facts.measured.get("whole", 0) < 1.5 * (run.tokens or 0):
        return ["Measure on more text: give a longer file with --data."]
    command = ["manticore-hf", "report", str(facts.folder), "--data", str(data)]
    command += ["--components", *map(str, components)] if components else []
    return [f"Measure on more of the text: {shlex.join(command)}"]


def _measure(facts, arguments, split, path, shortens, max_tokens, batch_size, components):
    """{name: measurement} on held-out text; what `path` holds already is not measured again."""
    tokenizer = read_tokenizer(facts.folder)

    def load():
        train, validation = load_rows(arguments, tokenizer, keep_text=True, keep_rest=not split)
        return validation if split else train

    try:
        all_rows = load()
        smaller = _enough(all_rows, arguments.block_size, max_tokens) if shortens else arguments.block_size
        if chosen := smaller < arguments.block_size:
            arguments = dataclasses.replace(arguments, block_size=smaller)
            all_rows = load()
    except ManticoreError as err:
        raise ManticoreError(f"The held-out text cannot be used: {err} Give another with --data FILE.") from err
    sample = _spread(all_rows, max_tokens)
    passages = make_passages(sample, tokenizer)
    if (count := len(passages)) < CLAIM_ROWS:
        advice = "Give a longer text with --data FILE."
        if len(sample) < len(all_rows):
            advice = "Give a larger --max-tokens."
        elif not (split or shortens):
            advice = more_rows(count, int(passages.bytes.sum()))
        print(
            f"Note: {plural(count, 'row')} of text cannot give a confidence interval (at least {CLAIM_ROWS} can), and "
            f"without one no claim is made. {advice}",
            file=sys.stderr,
        )
    rows = passages.rows
    config = ManticoreConfig.from_pretrained(facts.folder)
    names, blocks = config.component_names, facts.found["settings"]["num_blocks"]
    sources = find_originals(facts.folder, config, components)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = Path(arguments.data).name if os.path.exists(arguments.data) else arguments.data
    about = {"text": f"{text}{', validation split' if split else ''}", "named": not split}
    about |= {"block_size": arguments.block_size, "chosen": chosen, "whole": sum(map(len, all_rows["input_ids"]))}
    about |= {} if split else {"data": str(arguments.data)}
    about |= {} if sources is None else {"components": sources, "gguf": say_gguf(sources)}
    store = Store(
        path,
        {
            "hybrid": stamp(facts.folder),
            "text": _digest(rows),
            "batch_size": batch_size,
            "names": names,
            "components": sources,
            "machine": [
                torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
                torch.get_num_threads(),
            ],
            "versions": [metadata.version(package) for package in ("torch", "transformers")],
        },
        about,
    )

    @functools.cache
    def model(dtype="float32"):
        return ManticoreForCausalLM.from_pretrained(facts.folder, dtype=dtype).to(device).eval()

    def losses():
        found, gate = measure.token_losses(model(), rows, batch_size)
        where, _ = measure.scored_positions(rows)
        nats = {name: np.bincount(where, one.numpy(), len(rows)) for name, one in found.items()}
        whole = Measured(nats, passages.tokens, passages.bytes, kinds=passages.kinds)
        fresh = config.embeddings == "fresh"
        measure_originals(whole, config, passages, tokenizer, sources, batch_size, device, ensemble=fresh)
        start = scored_after(tokenizer)  # before every row, and no part of its text
        for name in itself(whole.losses, whole.differences(), mixture=config.mixture):
            del found[name]
        return {
            **whole.to_dict(),
            "rows": len(rows),
            "where": where_it_differs(found, rows, tokenizer, gate, names, len(start)),
        }

    def without(block, name):
        if (reason := measure.cannot_remove(model(), name, block)) is not None:
            return {"loss": None, "reason": reason}
        with measure.removed(model(), name, block):
            return {"loss": measure.hybrid_loss(model(), rows, batch_size), "reason": None}

    def mixtures():
        out = []
        for name, context in measure.other_mixtures(model()):
            with context:
                out.append({"name": name, "loss": measure.hybrid_loss(model(), rows, batch_size)})
        return out

    def similarity():
        if facts.found["settings"]["route"]:  # one component per block: nothing to compare
            return []
        return measure.feature_similarity(model(), rows, batch_size)

    def speed():
        dtype = str(ManticoreConfig.from_pretrained(facts.folder).dtype or "float32").removeprefix("torch.")
        if dtype != "float32":
            model.cache_clear()  # one of them at a time
        prompt = [token for ids in rows["input_ids"] for token in ids][:_PROMPT]
        longest = facts.found["settings"]["max_position_embeddings"] or len(prompt) + _NEW_TOKENS + 1
        return measure_speed(model(dtype), prompt[: max(1, longest - _NEW_TOKENS - 1)], _NEW_TOKENS, _REPEATS)

    steps = {
        "losses": losses,
        **{f"without/{b}/{name}": functools.partial(without, b, name) for b in range(blocks) for name in names},
        "mixtures": mixtures,
        "similarity": similarity,
        "speed": speed,
    }
    for name in tqdm(steps, desc="Measuring", unit="step"):
        store.get(name, steps[name])
    return {**store.parts, **about}


def _enough(rows, block_size, max_tokens):
    """Tokens per row with which a sample has as many rows as an interval takes; shorter ones would hardly be read."""
    tokens = min(sum(map(len, rows["input_ids"])), max_tokens)
    while block_size > _SHORTEST and tokens < CLAIM_ROWS * block_size:
        block_size = max(_SHORTEST, block_size // 2)
    return block_size


def _spread(rows, max_tokens):
    """Rows evenly spaced over all, of about `max_tokens` tokens."""
    length = sum(map(len, rows["input_ids"])) / len(rows)
    count = min(len(rows), max(1, int(max_tokens / length)))
    return rows.select([i * len(rows) // count for i in range(count)])


def _digest(rows):
    values = [[list(map(int, one)) for one in rows[key]] for key in ("input_ids", "labels") if key in rows.column_names]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
