"""What both reports tell decision makers, as texts: HTML and Markdown print the same strings."""

import re
from importlib import metadata
from typing import Any

from manticore_hf.hub.licenses import DUTIES, LICENSES
from manticore_hf.report import charts, details
from manticore_hf.report.facts import Facts
from manticore_hf.report.gains import gains, is_one_model, phrases
from manticore_hf.report.one_run import one_run
from manticore_hf.report.verdict import RULES, Verdict, perplexity, say_difference
from manticore_hf.utils.claims import ORIGINAL, UPKEEP
from manticore_hf.utils.formatting import listed, plain_value, plural, short_bytes, short_count, short_duration

_ON_TOP = 8
_CARD = 520  # width of the chart in its card, about that of the card on a page of 1,100 pixels


def make_view(facts: Facts, verdict: Verdict) -> dict[str, Any]:
    """Facts and Verdict as the templates print them."""
    settings = facts.found["settings"]
    kinds = {entry["name"]: entry["model_type"] for entry in facts.found["components"]}
    blocks, running, licences = settings["num_blocks"], _running(facts), _licences(facts)
    return {
        "name": facts.name,
        "what": f"{listed([f'{name} ({kind})' for name, kind in kinds.items()])} joined in {plural(blocks, 'block')}"
        + (", pruned to one component per block" if settings["route"] else "")
        + (", with bridges between their states" if settings.get("bridges") else ""),
        "verdict": verdict,
        "steps": [_step(step) for step in verdict.steps],
        "rules": RULES,
        "standing": _standing(facts),
        "phrases": phrases(facts, running["sentence"], " ".join((licences["sentence"], licences["commercial"]))),
        "running": running,
        "upkeep": UPKEEP,
        "making": _making(facts),
        "licences": licences,
        "mixture": details.mixture(facts),
        "why": details.why(facts),
        "where": details.where(facts),
        "curves": details.curves(facts),
        "no_curves": details.no_curves(facts),
        "comparison": details.comparison(facts),
        "settings": [{"key": key, "value": plain_value(value)} for key, value in settings.items() if value is not None],
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("manticore-hf", "transformers", "torch")),
    }


def _step(step):
    """A step of the advice as text and the command at its end, None where it has none; a page breaks it at spaces."""
    found = re.fullmatch(r"(.*?:) ((?:manticore-hf|cp) .+)", step)
    if not found:
        return {"text": step, "command": None, "words": []}
    return {"text": found[1], "command": found[2], "words": found[2].split(" ")}


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _standing(facts):
    """The hybrid among its baselines, best first: of the comparison, else of what one run measured."""
    by_kind = {}  # the table of all models has them where there is a comparison
    if facts.comparison is not None:
        rows, own = facts.comparison["rows"], facts.comparison["hybrid"]
        seeds, data = plural(len(facts.comparison["seeds"]), "seed"), facts.comparison["data"]
        size = _tokens(facts.comparison["test_tokens"])
        note = f"Tested on {facts.comparison['test']}, {size}; mean of {seeds}; trained or tuned on {data}."
        found = [(row["name"], row["loss"], row["bits_per_byte"], row) for row in rows]
    else:
        if (run := one_run(facts)) is None:
            note = "This hybrid's loss is not shown, because no baseline was measured with it."
            note = " ".join([note, *facts.notices])
            return {
                "note": note,
                "rows": [],
                "all": [],
                "chart": None,
                "kinds": [],
                "split": "",
                "has_intervals": False,
                "left_out": 0,
            }
        own, note, by_kind = run.own, run.note, run.by_kind
        note += "".join(f" {name}: not measured. {why}" for name, why in run.missing.items())
        note += "".join(f" {notice}" for notice in facts.notices)
        found = [(name, loss, run.bits.get(name), {}) for name, loss in run.losses.items()]
    said = facts.measured.get("gguf")
    note += f" {said}" if said and said not in note else ""
    found.sort(key=lambda one: one[1])
    gained, unit = gains(facts)
    digits = 4 if unit.startswith("bits") else 3

    def difference(name):
        gain, *ends = gained.get(name, (None,) * 3)
        row = {"difference": gain, "difference_interval": None if None in ends else ends}
        return say_difference(row, not facts.untrained, digits)

    rows = [
        {
            "name": name,
            "own": name == own,
            "loss": f"{loss:.3f}",
            "bits": "–" if bits is None else f"{bits:.4f}",
            "perplexity": perplexity(loss),
            "difference": "" if name == own else difference(name),
            "needs": row.get("needs", ""),
            "by_kind": [f"{bits[name]:.4f}" if name in bits else "–" for bits in by_kind.values()],
        }
        for name, loss, bits, row in found
    ]
    place = next(i for i, row in enumerate(rows) if row["own"])
    shown = rows[:_ON_TOP] if place < _ON_TOP else rows[: _ON_TOP - 1] + [rows[place]]
    bars = [(name, gain, None if None in ends else ends) for name, (gain, *ends) in gained.items()]
    label = "What the hybrid gains over each baseline"
    chart = charts.for_any_page(charts.forest, bars, label=label, unit=unit, width=_CARD) if bars else None
    return {
        "note": note,
        "left_out": len(rows) - len(shown),
        "rows": shown,
        "all": rows,
        "chart": chart,
        "has_intervals": any(None not in ends for _, *ends in gained.values()),
        "kinds": list(by_kind),
        "unit": unit,
        "split": _split(by_kind, own),
    }


def _split(by_kind, own):
    """A sentence on each kind of text: what the hybrid has there, and the best without it."""
    said = []
    for kind, bits in by_kind.items():
        others = {name: value for name, value in bits.items() if name != own}
        if own in bits and others:
            best = min(others, key=others.get)
            said.append(f"on {kind} the hybrid has {bits[own]:.4f}, the best baseline ({best}) {others[best]:.4f}")
    return f"In bits per byte, {'; '.join(said)}." if said else ""


def _running(facts):
    """Memory, FLOPs and speed of the hybrid and each component alone."""
    speed, longest = facts.measured.get("speed"), facts.found["parts"]
    rows = []
    for part in longest:
        timed = speed["models"].get(part["part"]) if speed else None
        rows.append(
            {
                "name": part["part"] if part["part"] != "hybrid" else "this hybrid",
                "own": part["part"] == "hybrid",
                "parameters": short_count(part["parameters"]),
                "weights": short_bytes(part["bytes"]),
                "working": "–" if not timed or timed["working"] is None else short_bytes(timed["working"]),
                "flops": short_count(part["flops_per_token"]),
                "cache": short_bytes(part["cache_bytes_per_token"]),
                "state": short_bytes(part["state_bytes"]),
                "read": f"{timed['prefill']:,.0f}" if timed else "–",
                "write": f"{timed['decode']:,.1f}" if timed else "–",
            }
        )
    out = {"rows": rows, "sentence": "", "note": "FLOPs are counted from tensor shapes; speed was not measured."}
    hybrid, others = longest[-1], longest[:-1]
    if others:
        one = _best_component(facts) or min(others, key=lambda part: part["bytes"])["part"]
        best = next(part for part in others if part["part"] == one)
        weights, work = (hybrid[key] / best[key] for key in ("bytes", "flops_per_token"))
        out["sentence"] = (
            f"The hybrid's weights take {weights:.1f} times the memory of {one} alone, and it needs {work:.1f} times "
            "the FLOPs per token"
        )
        if speed and one in speed["models"]:
            ratio = speed["models"]["hybrid"]["decode"] / speed["models"][one]["decode"]
            out["sentence"] += f"; it generates at {ratio:.0%} of its speed"
        out["sentence"] += "."
    elif facts.found["settings"]["route"]:
        out["sentence"] = (
            "The hybrid is pruned and costs about as much as one model. Its components are no longer complete inside "
            "it, so they are not timed for comparison."
        )
    if speed:
        out["note"] = (
            f"Measured on {speed['device']}, {plural(speed['threads'], 'thread')}, {speed['dtype']}: one sequence, a "
            f"prompt of {speed['prompt_tokens']} tokens, then {speed['new_tokens']} new ones; median of "
            f"{speed['repeats']} alternating runs."
        )
        others = {
            name: one["tokens_for_one"] for name, one in speed["models"].items() if one.get("tokens_for_one", 1) != 1
        }
        if others:
            ratios = listed([f"{ratio:.2f} of {name}'s" for name, ratio in others.items()])
            out["note"] += f" Speeds are in tokens of the hybrid's tokenizer; here, one corresponds to {ratios}."
    if speed and speed.get("reads_past_losses", facts.found["settings"]["mixture"] == "online"):
        out["note"] += (
            " Reading a prompt, the hybrid needs every component's prediction at every token, because its weights "
            "follow their losses; a component alone predicts only after the last one."
        )
    if facts.found["note"]:
        out["note"] += f" {facts.found['note']}"
    return out


def _best_component(facts):
    """The component whose cost the hybrid's is compared with: the best single model, as for gains; None if unknown."""
    names = [part["part"] for part in facts.found["parts"][:-1]]
    for row in gains(facts)[0]:  # the best baseline first
        for name in names:
            if is_one_model(row, facts) and row.removeprefix(ORIGINAL.format("")).partition(",")[0] == name:
                return name
    return None


def _making(facts):
    """What it cost to make: stage by stage, and beside the baselines where a comparison says."""
    rows, seconds, flops = [], 0.0, 0.0
    for stage in facts.stages:
        tokens = stage.result.get("tokens") if stage.result.get("stage") == "calibrate" else None
        said = [plural(stage.result["steps"], "step")] if isinstance(stage.result.get("steps"), int) else []
        said += [f"{plural(tokens, 'token')}, no training"] if isinstance(tokens, int) else []
        rows.append(
            {
                "name": stage.name,
                "what": ", ".join(said) or "no training",
                "time": short_duration(stage.seconds),
                "flops": short_count(stage.flops) if stage.flops else "not recorded",
            }
        )
        seconds, flops = seconds + (stage.seconds or 0.0), flops + (stage.flops or 0.0)
    trained = [stage for stage in facts.stages if stage.seconds is not None]
    sentences = []
    if trained:
        sentences.append(
            f"{short_duration(seconds)} of training in {plural(len(trained), 'stage')}"
            + (f", about {short_count(flops)}FLOPs by the Trainer's estimate." if flops else ".")
        )
    row = None
    if facts.comparison is not None:
        row = next(one for one in facts.comparison["rows"] if one["name"] == facts.comparison["hybrid"])
    if row and (row["training_tokens"] or row["seconds"]):
        said = [
            f"{row['training_tokens']:,.0f} training tokens" if row["training_tokens"] else None,
            short_duration(row["seconds"]) if row["seconds"] else None,
            f"{short_count(row['training_flops'])}FLOPs" if row["training_flops"] else None,
        ]
        sentences.append(f"Per seed in the comparison: {listed([one for one in said if one])}.")
    nothing = "Nothing was trained." if facts.untrained else "The directory holds no training log."
    return {"rows": rows, "sentences": sentences or [nothing]}


def _licences(facts):
    rows = []
    for entry in facts.found["components"]:
        known = LICENSES.get(entry["license"])
        duties = "unknown: read the licence, or ask the authors"
        if known:
            duties = "; ".join(DUTIES[key] for key in sorted(known.duties)) or "nothing"
        where = f"{entry['repo_id']}@{(entry['revision'] or '')[:12]}" if entry["repo_id"] else "this directory"
        rows.append(
            {"name": entry["name"], "license": entry["license"] or "not stated", "from": where, "duties": duties}
        )
    found = facts.combined
    if found.unknown:
        sentence = (
            f"The licence of {listed(found.unknown)} is unknown, and therefore so is the hybrid's: settle it before "
            "passing it on."
        )
    elif found.conflicts:
        sentence = "The components' licences conflict: as things stand, the hybrid must not be passed on."
    elif found.license == "other":
        sentence = "No single licence covers all components: each stays under its own, and you have to comply with all."
    else:
        sentence = f"The hybrid can be passed on under the licence {found.license}."
    commercial = [one for one in facts.commercial.conflicts if one not in found.conflicts]
    use = (
        "Commercial use is not permitted: " + " ".join(commercial)
        if commercial
        else ""
        if found.unknown
        else "No licence rules out commercial use."
    )
    return {
        "rows": rows,
        "sentence": sentence,
        "commercial": use,
        "conflicts": list(found.conflicts),
        "duties": [DUTIES[key] for key in sorted(found.duties)],
        "blocked": bool(found.conflicts or found.unknown),
    }


def _tokens(count):
    return "tokens not recorded" if count is None else plural(count, "token")
