"""The model card of a hybrid, made from its directory: its contents, worth, cost and obligations.

Metadata follow the Hub's conventions. The body comes from a template whose blocks are the card's sections. Whatever was
written by strangers (names, licences, recipes) is escaped: it is shown, and formats nothing.
"""

import json
import math
import os
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData, constants

from manticore_hf.hub.card_merge import Card
from manticore_hf.hub.inspection import inspect_hybrid
from manticore_hf.hub.licenses import DUTIES, LICENSES, Combined, combine
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from manticore_hf.utils.bounded_yaml import load_yaml
from manticore_hf.utils.claims import ORIGINAL, UPKEEP, claim, without_itself
from manticore_hf.utils.formatting import (
    Safe,
    escape,
    is_number,
    link,
    listed,
    markdown_environment,
    plain_value,
    plural,
    short_bytes,
    short_count,
)
from manticore_hf.utils.task_types import task_type_of

TAGS = ("manticore", "hybrid", "merge")
LICENSE_FILE = "LICENSE.md"
_FLOP_TOKENS = 128
_SHOWN_LABELS = 100


@dataclass
class Result:
    """Losses of a hybrid and its baselines on one text.

    Args:
        data: The text.
        losses: {label: nats per token}.
        own: Label of the hybrid itself.
        tokens: Tokens it was measured on, if known.
        note: A sentence on how it was measured.
        bits: {label: bits per byte}, as far as known.
        size: Bytes of text, if known.
        differences: {baseline: [bits per byte minus the hybrid's, low, high]}, as far as known.
        by_kind: {kind of text: {label: bits per byte on it}}, as far as known.
        rows: Rows of text, if known.
    """

    data: str
    losses: dict
    own: str = "hybrid"
    tokens: int | None = None
    note: str | None = None
    bits: dict = field(default_factory=dict)
    size: int | None = None
    differences: dict = field(default_factory=dict)
    by_kind: dict = field(default_factory=dict)
    rows: int | None = None


@dataclass
class CardFacts:
    """What a card says, beside what can be read from the hybrid's directory.

    Args:
        repo_id: Repository it is for.
        licenses: {component: licence or None}.
        license: The hybrid's own licence, None for the one that follows from `licenses`.
        own_bytes, referenced_bytes: Of weights in this repository, and of those it references.
        tuned: Names of the referenced components of which tensors were changed, and are in this repository.
        access: Sentences on components that not everyone can read.
        datasets, tags: To add to what is known.
        combined: What follows from the licences; default: `combine(licenses)`.
    """

    repo_id: str
    licenses: dict
    license: str | None = None
    own_bytes: int = 0
    referenced_bytes: int = 0
    tuned: set = field(default_factory=set)
    access: list = field(default_factory=list)
    datasets: list = field(default_factory=list)
    tags: list = field(default_factory=list)
    combined: Combined | None = None


def make_card(
    directory: str | os.PathLike, facts: CardFacts
) -> tuple[Card, str | None, list[list[float]] | None, list[str]]:
    """Makes the card of a saved hybrid.

    Args:
        directory: Where the hybrid is.
        facts: CardFacts.

    Returns:
        (Card, text of the licence file or None where one licence covers all, alpha [S][K] or None, notices).

    Raises:
        ManticoreError: The directory's configuration is no hybrid's.
    """
    directory = Path(directory)
    config, found = ManticoreConfig.from_pretrained(directory), inspect_hybrid(directory, _FLOP_TOKENS)
    recipe, task_type = _read(directory / "recipe.yaml"), task_type_of(config)
    results, notices = shown_results(directory)
    combined = facts.combined or combine(facts.licenses)
    alpha = _alpha(config, found)
    context = {
        **_numbers(config, found, facts, alpha),
        **_licenses(facts, combined),
        "repo_id": facts.repo_id,
        "name": facts.repo_id.split("/")[-1],
        "access": facts.access,
        "recipe": recipe,
        "results": [_show(result) for result in results],
        "one_gate": one_gate(config),
        "joined_by": _joined_by(config, found, alpha),
    }
    template = markdown_environment().get_template("model_card.md.jinja")
    shown = {name: "".join(block(template.new_context(context))).strip() for name, block in template.blocks.items()}
    if not results:
        del shown["results"]
    if not task_type.labels:
        del shown["labels"]
    if alpha is None:
        shown["mixture"] = shown["mixture"].partition("\n\n")[0] + "\n\nIts weights could not be read."
    own_license = facts.license or combined.license
    license_text = None
    if own_license == "other":
        license_text = markdown_environment().get_template("license.md.jinja").render(context)
    card = Card(_metadata(config, task_type, facts, results, recipe, own_license, combined.name), shown)
    return card, license_text, alpha, notices


_MOST_RESULTS = 200  # texts, and models on each
_LONGEST_NAME = 2_000  # of a text, a model, a note


def shown_results(directory: str | os.PathLike) -> tuple[list[Result], list[str]]:
    """Of what was measured in a hybrid's directory, what may be shown; and sentences on what may not, and why."""
    config, results, notices = ManticoreConfig.from_pretrained(directory), [], []
    task_type = task_type_of(config)
    for result in (without_itself(one, config.mixture) for one in read_results(directory)):
        if task_type.labels:
            notices.append(
                f"The loss on {result.data!r} is not shown: it is that of a language model, and this hybrid is a "
                "classifier."
            )
        elif set(result.losses) - {result.own} and result.own in result.losses:
            results.append(result)
        else:
            notices.append(f"The loss on {result.data!r} is not shown: no baseline was measured with it.")
    return results, notices


def read_results(directory: str | os.PathLike) -> list[Result]:
    """What was measured in a directory: `evaluation.json`, and the `stage.json` of the stage that made it.

    Files of another form are passed over, and so is what is too much or too long to be anyone's results: they are
    optional, and may be anyone's.

    Args:
        directory: Of a saved hybrid.

    Returns:
        [Result], one for each text; losses in nats per token.
    """
    out = []
    for name in ("evaluation.json", "stage.json"):
        try:
            values = json.loads(_read(Path(directory) / name) or "[]")
        except (ValueError, RecursionError):
            continue
        for value in (values if isinstance(values, list) else [values])[:_MOST_RESULTS]:
            losses = value.get("losses") if isinstance(value, dict) else None
            if not isinstance(losses, dict) or not losses or not all(map(is_number, losses.values())):
                continue
            tokens, note = value.get("tokens"), value.get("note")
            data = str(value.get("data") or "the validation text")
            texts = [data, note, value.get("own"), *losses, *_known(value.get("bits_per_byte"), is_number)]
            if len(losses) > _MOST_RESULTS or max(len(str(text)) for text in texts) > _LONGEST_NAME:
                continue
            if any(result.data == data for result in out):
                continue
            out.append(
                Result(
                    data,
                    {str(label): float(loss) for label, loss in losses.items()},
                    str(value.get("own", "hybrid")),
                    tokens if _is_count(tokens) else None,
                    note if isinstance(note, str) else None,
                    _known(value.get("bits_per_byte"), is_number),
                    value["bytes"] if _is_count(value.get("bytes")) else None,
                    _known(value.get("differences"), _is_difference),
                    {kind: _known(bits, is_number) for kind, bits in _known(value.get("by_kind"), _is_dict).items()},
                    value["rows"] if _is_count(value.get("rows")) else None,
                )
            )
    return out


def _known(values, fits):
    """The values of a dictionary that have the right form."""
    values = values if isinstance(values, dict) else {}
    return {str(key): value for key, value in values.items() if fits(value)}


def _is_count(value):
    return type(value) is int and is_number(value) and value > 0


def _is_dict(value):
    return isinstance(value, dict)


def _is_difference(value):
    return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))


def _metadata(config, task_type, facts, results, recipe, license, license_name):
    bases = [entry["repo_id"] for entry in config.components if entry["repo_id"]]
    evaluations = [
        EvalResult(
            task_type=task_type.task,
            dataset_type=_dataset_type(result.data),
            dataset_name=result.data,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for result in results
        for metric, name, value in (
            ("loss", "nats per token", result.losses[result.own]),
            ("perplexity", "perplexity", math.exp(min(result.losses[result.own], 700.0))),
            ("bits_per_byte", "bits per byte", result.bits.get(result.own)),
        )
        if value is not None
    ]
    datasets = list(dict.fromkeys([*facts.datasets, *_datasets_of(recipe)]))
    other = {"license_name": license_name or "other", "license_link": LICENSE_FILE}
    return ModelCardData(
        base_model=list(dict.fromkeys(bases)) or None,
        base_model_relation="merge" if bases else None,
        library_name="transformers",
        pipeline_tag=task_type.task,
        tags=[*TAGS, *(tag for tag in facts.tags if tag not in TAGS)],
        license=license,
        **(other if license == "other" else {}),
        datasets=datasets or None,
        model_name=facts.repo_id.split("/")[-1],
        eval_results=evaluations or None,
    ).to_dict()


def _numbers(config, found, facts, alpha):
    """What the inspection says, as the template prints it."""
    sizes, task_type = {row["part"]: row["parameters"] for row in found["parts"]}, task_type_of(config)
    how = {(False, False): ", unchanged", (False, True): ", changed ones here", (True, False): ", copied here"}
    components = []
    for entry in found["components"]:
        name, reference = entry["name"], entry["weights"] == "reference"
        rows = [row for row in found["blocks"] if row["component"] == name]
        left = sum(row["parameters"] for row in rows)
        page = f"{constants.ENDPOINT}/{entry['repo_id']}"
        components.append(
            {
                "name": name,
                "model_type": entry["model_type"],
                "weights": link(entry["repo_id"], page) + how[not reference, name in facts.tuned]
                if entry["repo_id"]
                else "in this repository",
                "commit": link(entry["revision"][:12], f"{page}/tree/{entry['revision']}") if entry["repo_id"] else "-",
                "parameters": short_count(sizes.get(name, left)),
                "license": facts.licenses.get(name) or "not stated",
                "layers": ", ".join(f"{row['layers']}" for row in rows),
            }
        )
    cost = [
        {
            "part": Safe("**this hybrid**") if row["part"] == "hybrid" else f"{row['part']} alone",
            "parameters": short_count(row["parameters"]),
            "memory": short_bytes(row["bytes"]),
            "flops": short_count(row["flops_per_token"]),
            "cache": short_bytes(row["cache_bytes_per_token"]),
            "state": short_bytes(row["state_bytes"]),
        }
        for row in found["parts"]
    ]
    settings = {"preset": config.preset} if getattr(config, "preset", None) else {}
    settings.update(found["settings"])
    names = list(dict.fromkeys(entry["name"] for entry in found["components"]))
    transplanted = [entry["name"] for entry in found["components"] if entry["transplant"] is not None]
    home = config.components[names.index(config.tokenizer_component)]["transplant"]  # of another model, then
    return {
        "components": components,
        "cost": cost,
        "upkeep": Safe(UPKEEP),
        "cost_note": found["note"],
        "names": names,
        "route": config.route,
        "bridges": len(config.bridges or ()),
        "tokens": _FLOP_TOKENS,
        "parts": listed([f"{row['name']} ({row['model_type']})" for row in components]),
        "own_bytes": short_bytes(facts.own_bytes),
        "referenced_bytes": facts.referenced_bytes and short_bytes(facts.referenced_bytes),
        "alpha": [[f"{w:.3f}" for w in row] for row in alpha or []],
        "task_type": task_type,
        "labels": _labels(found["task"]),
        "quantization": found["quantization"],
        # A classifier's mixture is the part of the gate that does not depend on the token.
        "token": config.mixture == "token" and not config.route and not task_type.labels,
        "online": config.mixture == "online" and not config.route and not task_type.labels,
        "context": config.max_position_embeddings,
        "tokenizer_component": None if home else config.tokenizer_component,
        "new_embeddings": config.embeddings == "fresh",
        "vocab_size": config.vocab_size,
        "transplanted": transplanted and listed(transplanted),
        "prompt": "A text to read." if task_type.labels else "The",
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "settings": [{"key": key, "value": plain_value(value)} for key, value in settings.items() if value is not None],
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("manticore-hf", "transformers", "torch")),
    }


def _labels(task):
    """What a classifier gives, as the template prints it."""
    names = task.get("labels", [])
    rows = [{"number": number, "name": name} for number, name in enumerate(names[:_SHOWN_LABELS])]
    return {"rows": rows, "count": len(names), "problem": task.get("problem")}


def _licenses(facts, combined):
    rows = []
    for name, stated in facts.licenses.items():
        known = LICENSES.get(stated)
        rows.append(
            {
                "name": name,
                "license": link(known.id, known.link) if known else stated or "not stated",
                "spdx": (known.spdx or "none") if known else "-",
                "duties": ("; ".join(DUTIES[key] for key in sorted(known.duties)) or "nothing")
                if known
                else "unknown: read the licence"
                if stated
                else "unknown: ask the authors",
            }
        )
    if combined.unknown:
        sentence = f"The hybrid's licence is unknown, because that of {listed(combined.unknown)} is."
    elif combined.license == "other":
        sentence = "None of these licences covers all components."
    else:
        sentence = f"The licence {combined.license} satisfies all of them."
    if facts.license and facts.license != combined.license:
        sentence += f" The publisher states {facts.license} for the hybrid."
    return {"licenses": rows, "license_sentence": sentence, "conflicts": combined.conflicts}


def _show(result):
    """A Result as the template prints it: best first, with what may be said of the best baseline."""
    baselines = {k: v for k, v in result.losses.items() if k != result.own}
    order = result.bits if set(result.losses) <= set(result.bits) else result.losses
    best = min(baselines, key=order.get)
    rows = [
        {
            "label": Safe(f"**{escape(label)} (this model)**") if label == result.own else label,
            "bits": f"{result.bits[label]:.4f}" if label in result.bits else "–",
            "loss": f"{result.losses[label]:.4f}",
            "perplexity": f"{math.exp(min(result.losses[label], 700.0)):.2f}",
            "by_kind": [f"{bits[label]:.4f}" if label in bits else "–" for bits in result.by_kind.values()],
        }
        for label in sorted(result.losses, key=order.get)
    ]
    size = f", {plural(result.tokens, 'token')}" if result.tokens else ""
    size += f", {result.size:,} bytes" if result.size else ""
    note = f" {result.note}" if result.note else ""
    named, difference = f"the best baseline listed ({best})", result.differences.get(best)
    verdict = claim(named, difference, result.size, "This hybrid", result.rows)
    if not any(label.startswith(ORIGINAL.format("")) for label in baselines):
        verdict += (
            " The original components, with their own tokenizers, were not measured on this text; "
            "manticore-hf evaluate does that."
        )
    title = f"On {result.data}{size}.{note}"
    kinds = [f"{kind}: bits per byte" for kind in result.by_kind]
    return {"title": title, "rows": rows, "kinds": kinds, "verdict": verdict, "drawn": bool(result.differences)}


def one_gate(config: ManticoreConfig) -> bool:
    """Whether all that mixes is one gate, or an online mixture: one block, in which every token has its own weights."""
    return config.num_blocks == 1 and config.mixture != "static" and not (config.route or config.mixture_weights)


def _joined_by(config, found, alpha):
    """What joins the components, as a part of a sentence."""
    if one_gate(config) and not task_type_of(config).labels:
        if config.mixture == "token":
            return "a small gate that weights their predictions for each token"
        return "an online mixture: untrained weights that follow each component's losses on the text so far"
    equal = alpha is not None and all(max(row) - min(row) < 1e-6 for row in alpha)
    weights = "equal mixture weights" if equal else "mixture weights"
    if not found["settings"]["projector"]:
        return weights
    return "small projectors" if config.route else f"small projectors and {weights}"


def _alpha(config, found):
    """[S][K] mixture weights, None where they cannot be read; a pruned block has all of its own component."""
    if config.route:
        return [[float(name == one) for one in config.component_names] for name in config.route]
    out = [[0.0] * len(config.component_names) for _ in range(config.num_blocks)]
    for row in found["blocks"]:
        if row["alpha"] is None:
            return None
        block = min(row["block"], config.num_blocks)  # of one with bridges there is one row
        out[block - 1][config.component_names.index(row["component"])] = row["alpha"]
    return out


def _datasets_of(recipe):
    """Data sets of the Hub that a recipe trains on."""
    try:
        values = load_yaml(recipe or "") or {}
        sources = [values.get("data") or {}]
        sources += [(settings or {}).get("data") or {} for stage in values["stages"] for settings in stage.values()]
        return [one["data"] for one in sources if isinstance(one.get("data"), str) and _is_dataset(one["data"])]
    except (ValueError, AttributeError, KeyError, TypeError):
        return []


def _dataset_type(text):
    """A data set's id, or a name in its place: results of the same type are of the same data set."""
    return text if _is_dataset(text) else "-".join(re.findall(r"\w+", text.lower())) or "custom"


def _is_dataset(text):
    """Whether it reads as a data set's id on the Hub, and not as a path."""
    known_file = re.search(r"\.(txt|text|md|py|jsonl?|[ct]sv|parquet)$", text)
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text)) and not known_file and not os.path.exists(text)


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _read(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
