"""Results as the Hub's model pages and leaderboards read them: `.eval_results/*.yaml`, beside the card's model-index.

The Hub takes results on benchmarks: data sets that name their tasks in an `eval.yaml` (its documentation:
hub/eval-results). Others are in the card only. Only the hybrid's own numbers go there, each with its best baseline's in
the notes.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, HfApi, constants, eval_result_entries_to_yaml, hf_hub_download
from huggingface_hub.errors import HTTPError

from manticore_hf.hub.card import Result
from manticore_hf.utils.bounded_yaml import load_yaml
from manticore_hf.utils.formatting import is_number, printable

FILE = ".eval_results/manticore-hf.yaml"
"""The one file of ours; others there are other people's."""
TASKS = "tasks.json"
_LONGEST, _LARGEST = 100_000, 50_000_000
_MOST_TASKS, _MOST_METRICS = 200, 20  # each data set among them is asked for once
_DATASET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HIGHER = ("acc", "exact_match", "f1", "mcc", "bleu", "rouge", "em", "pass@")


def eval_results(
    directory: str | os.PathLike, results: Sequence[Result], repo_id: str, api: HfApi
) -> tuple[str | None, list[str]]:
    """The file of a hybrid's results.

    Args:
        directory: Where the hybrid is; what `manticore-hf evaluate --tasks` wrote is there as `tasks.json`.
        results: Losses that are shown on its card; a benchmark's task "bits_per_byte" takes them.
        repo_id: Its repository, to which the results point as their source.
        api: Is asked which data sets are benchmarks.

    Returns:
        (text of FILE or None where there is nothing to say, sentences for the publisher).
    """
    about = {"source_url": f"{constants.ENDPOINT}/{repo_id}", "source_name": "Model card"}
    found, notices = _of_tasks(Path(directory) / TASKS)
    for result in results:
        if result.own in result.bits and _DATASET.fullmatch(result.data) and not os.path.exists(result.data):
            notes = "bits per byte, lower is better" + _best(result.bits, result.own, lower=True)
            found.append((result.data, None, "bits_per_byte", round(result.bits[result.own], 4), notes))
    known, entries = {}, []
    for data, config, task, value, notes in found:
        if data not in known:
            known[data] = benchmark_tasks(data, api)
        for name, of in known[data]:
            if name == task or task is None and (of or "default") == config:
                entries.append(EvalResultEntry(data, name, value, notes=notes, **about))
                break
    if not entries:
        return None, notices
    values = eval_result_entries_to_yaml(entries)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True), notices


def benchmark_tasks(data: str, api: HfApi) -> list[tuple[str, str | None]]:
    """[(task, configuration of the data set or None)] of a benchmark, [] of a data set that is none."""
    try:
        path = hf_hub_download(data, "eval.yaml", repo_type="dataset", token=api.token)
        with open(path, encoding="utf-8") as file:
            tasks = load_yaml(file.read(_LONGEST))["tasks"]
        return [(one["id"], one.get("config")) for one in tasks if isinstance(one["id"], str)]
    except (OSError, HTTPError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []  # not there, not ours to read, or of another form


def _of_tasks(path):
    """([((data set, task), value, notes)] of a file of scores, sentences); the file may be anyone's."""
    other = f"{path.name} has another form than `manticore-hf evaluate --tasks` writes; it is passed over."
    try:
        if path.stat().st_size > _LARGEST:
            return [], [other]
        kept = json.loads(path.read_text(encoding="utf-8"))
        if (limit := kept["settings"].get("limit")) is not None:
            said = f"{path.name} is of {printable(limit)[:20]} documents of each task only"
            return [], [f"{said}: no result of the Hub's kind is made of it."]
        return _results(kept["scores"], kept.get("datasets") or {}, kept["settings"].get("num_fewshot")), []
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return [], [other]


def _results(scores, sources, shots):
    """[((data set, task), value, notes)] of the hybrid's scores."""
    out = []
    for task, metrics in list(scores["hybrid"].items())[:_MOST_TASKS]:
        source = sources.get(task)
        if not _is_source(source):
            continue
        for metric, pair in list(metrics.items())[:_MOST_METRICS]:
            if not isinstance(pair, list) or not pair or not is_number(pair[0]):
                continue
            others = {name: one.get(task, {}).get(metric) for name, one in scores.items()}
            values = {
                name: one[0] for name, one in others.items() if isinstance(one, list) and one and is_number(one[0])
            }
            lower = not str(metric).startswith(_HIGHER)
            notes = f"lm-evaluation-harness {task}, {metric}" + ("" if shots is None else f", {shots}-shot")
            notes += "" if lower else _best(values, "hybrid", lower=False)
            out.append((source[0], source[1] or "default", None, pair[0], printable(notes)[:500]))
    return out


def _is_source(source):
    """Whether it is [data set on the Hub, its configuration or None]."""
    pair = isinstance(source, list) and len(source) == 2
    named = pair and isinstance(source[0], str) and _DATASET.fullmatch(source[0])
    return bool(named) and (source[1] is None or isinstance(source[1], str) and len(source[1]) < 200)


def _best(values, own, lower):
    """What the best of the others has, as the end of a note."""
    others = {name: value for name, value in values.items() if name != own}
    if not others:
        return ""
    name = (min if lower else max)(others, key=others.get)
    return f"; best baseline: {printable(name)} {others[name]:.4f}"
