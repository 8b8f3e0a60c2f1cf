"""What the reports tell engineers, as texts and charts: the mixture, why it is so, where it pays off, its training."""

import re
from typing import Any

from manticore_hf.modeling.settings_manticore import printable
from manticore_hf.report import charts
from manticore_hf.report.facts import Facts
from manticore_hf.report.one_run import one_run, per_byte, rows_of
from manticore_hf.report.verdict import gain_needed, say_difference
from manticore_hf.utils.claims import itself
from manticore_hf.utils.formatting import plural, short_count, signed

_KINDS = {
    "component": "a component, tuned on the same text", "ensemble": "a mean of the tuned components",
    "gate": "a gate trained over the tuned components", "single": "a single model",
    "designed": "a hand-designed hybrid", "oracle": "a router that knows the answer",
    "hybrid": "a hybrid", "pruned": "a pruned hybrid", "untuned": "not tuned",
}  # fmt: skip
_MOST_CHARTS = 8
_EQUAL = 0.02  # within which weights that are drawn from 0 to 1 are one line
_WEIGHTS = "Mixture weights, blocks by components"


def mixture(facts: Facts) -> dict[str, Any]:
    """Alpha as a heat map, its trajectories, and those of the gate's mean weights."""
    names = list(dict.fromkeys(row["component"] for row in facts.found["blocks"]))
    blocks, route = facts.found["settings"]["num_blocks"], facts.found["settings"]["route"]
    weights = [[None] * len(names) for _ in range(blocks)]
    for row in facts.found["blocks"]:
        weights[min(row["block"], blocks) - 1][names.index(row["component"])] = row["alpha"]
    if route:
        weights = [[float(name == one) for name in names] for one in route]
    labels, out = [f"block {b + 1}" for b in range(blocks)], []
    for stage in facts.stages:
        steps, history = stage.alpha()
        moved = any(max(v) - min(v) > 1e-3 for v in history.values()) if len(steps) > 1 else False
        for block in range(min(blocks, _MOST_CHARTS) if moved else 0):
            series = {
                name: (steps, history[f"alpha/{block}/{name}"]) for name in names if f"alpha/{block}/{name}" in history
            }
            if series:
                out.append(_trajectory(f"{stage.name}, block {block + 1}", series, f"weight in block {block + 1}"))
        logged = stage.series("gate/")
        gate = {name: logged[f"gate/{name}"] for name in names if f"gate/{name}" in logged}
        if gate and len(next(iter(gate.values()))[0]) > 1:
            title = f"{stage.name}, token gate: mean weight over the training tokens"
            out.append(_trajectory(title, gate, "mean gate weight"))
    token, online = (facts.found["settings"]["mixture"] == kind and not route for kind in ("token", "online"))
    # One row of equal weights shows nothing where they change with the token
    chart = None
    if not ((token or online) and blocks == 1):
        chart = charts.for_any_page(charts.heat, weights, labels, names, "{:.3f}", label=_WEIGHTS)
    return {
        "names": names,
        "token": token,
        "online": online,
        "weight": "gate" if token else "weight",
        "trajectories": out,
        "rows": [
            {"name": label, "weights": ["–" if w is None else f"{w:.3f}" for w in row]}
            for label, row in zip(labels, weights)
        ],
        "chart": chart,
    }


def _trajectory(title, series, what):
    """Weights over the steps of training: a chart, or a sentence where lines that coincide would show nothing."""
    values = [value for _, one in series.values() for value in one]
    if all(abs(value - 1 / len(series)) < _EQUAL for value in values):
        last = ", ".join(f"{name} {one[-1]:.3f}" for name, (_, one) in series.items())
        return {"title": title, "chart": None, "said": f"The weights stayed equal within {_EQUAL}; at the end: {last}."}
    return {
        "title": title,
        "chart": charts.for_any_page(charts.lines, series, "optimizer step", what, 0, 1, what.capitalize()),
        "said": None,
    }


def why(facts: Facts) -> dict[str, Any] | None:
    """Losses without each part, with untrained mixtures, and how alike features are."""
    measured = facts.measured
    if not measured:
        return None
    full = measured["losses"]["losses"]["hybrid"]
    mixed, scale = facts.found["settings"]["mixture"], per_byte(measured["losses"], 1)
    same = itself(measured["losses"]["losses"], measured["losses"].get("differences"), mixture=mixed)
    names = list(dict.fromkeys(row["component"] for row in facts.found["blocks"]))
    removed, table = [], []
    for block in range(facts.found["settings"]["num_blocks"]):
        row = []
        for name in names:
            one = measured.get(f"without/{block}/{name}", {"loss": None, "reason": "not measured"})
            row.append(None if one["loss"] is None else one["loss"] - full)
            removed.append(
                {
                    "block": block + 1,
                    "name": name,
                    "loss": "–" if one["loss"] is None else f"{one['loss']:.3f}",
                    "change": one["reason"] or signed(one["loss"] - full),
                }
            )
        table.append(row)
    values = [value for row in table for value in row if value is not None]
    chart = None
    if values and len(table) > 1:  # of one block the table below says as much
        chart = charts.for_any_page(
            charts.heat,
            table,
            [f"block {b + 1}" for b in range(len(table))],
            names,
            "{:+.3f}",
            max(map(abs, values)),
            "Loss added when a component is removed",
        )
    equal = facts.found["settings"]["mixture"] == "static" and _even(facts)  # another mixture would be this one
    mixtures = [
        {"name": one["name"], "loss": f"{one['loss']:.3f}", "change": signed(one["loss"] - full)}
        for one in ([] if equal else measured.get("mixtures", []))
    ]
    similarity = [
        {
            "where": "embeddings" if one["boundary"] == 0 else f"after block {one['boundary']}",
            "what": "after the projector" if one["translated"] else "hidden states",
            "pair": " and ".join(one["components"]),
            "cka": f"{one['cka']:.3f}",
            "few": one["tokens"] < 5 * one["width"],
        }
        for one in measured.get("similarity", [])
    ]
    return {
        "loss": f"{full:.3f}",
        "text": measured["text"],
        "tokens": " ".join([plural(measured["losses"]["tokens"], "token"), rows_of(facts).partition(":")[0]]).strip(),
        "scale": "" if scale is None else f"One nat per token is {scale:.4f} bits per byte here.",
        "apart": _apart(facts),
        "removed": removed,
        "chart": chart,
        "mixtures": mixtures,
        "mixtures_note": _mixtures_note(facts),
        "similarity": similarity,
        "baselines": [
            {"name": name, "loss": f"{loss:.3f}"}
            for name, loss in measured["losses"]["losses"].items()
            if name not in ("hybrid", *same)
        ],
    }


def _apart(facts):
    """Why these losses are not those of the table above, where they are not."""
    run = one_run(facts)
    if facts.comparison is None and (
        run is None or run.losses[run.own] == facts.measured["losses"]["losses"]["hybrid"]
    ):
        return ""
    return (
        "The table above is of another measurement, of other text or other rows. Every row is read by itself: in "
        "shorter ones there is less to predict from, and losses are higher."
    )


def _even(facts):
    """Whether all components weigh the same in every block, as before any training."""
    weights = [row["alpha"] for row in facts.found["blocks"]]
    return None not in weights and max(weights) - min(weights) < 1e-6


def _mixtures_note(facts):
    """What the losses with other mixtures tell."""
    kind = facts.found["settings"]["mixture"]
    if kind == "online" and _even(facts):
        return (
            "The same model with fixed weights: the change shows what it is worth that they follow the components' "
            "losses. Nothing of the mixture was trained."
        )
    if facts.untrained:
        return "The same model with other mixture weights. Nothing of the mixture was trained."
    return "The same model with untrained mixture weights: the change shows what the trained ones are worth."


def where(facts: Facts) -> list[dict[str, Any]]:
    """Tokens and passages where the hybrid gains or loses most against each baseline, texts made visible."""
    if not facts.measured:
        return []
    out, losses = [], facts.measured["losses"]
    same = itself(losses["losses"], losses.get("differences"), mixture=facts.found["settings"]["mixture"])
    for baseline, found in losses["where"].items():
        if baseline in same:
            continue

        def token(one):
            return {
                "before": visible(one["before"]),
                "token": visible(one["token"], True),
                "after": visible(one["after"]),
                "gain": signed(one["gain"], 2),
                "gate": _gate(one),
            }

        def kind(one):
            times = plural(one["tokens"], "time")
            return {"token": visible(one["token"], True), "gain": signed(one["gain"], 1), "times": times}

        def document(one):
            text = visible(one["text"]) + (" …" if one["cut"] else "")
            return {
                "text": text,
                "gain": signed(one["gain"], 1),
                "per_token": signed(one["per_token"]),
                "tokens": one["tokens"],
                "gate": _gate(one),
            }

        ways = {  # what is 0 at the precision shown is neither gain nor loss
            what: {
                way: [make(one) for one in found[what][way] if float(f"{one['gain']:.{digits}f}")]
                for way in ("gains", "loses")
            }
            for what, make, digits in (("tokens", token, 2), ("kinds", kind, 1), ("documents", document, 1))
        }
        word = "better" if found["gain"] >= 0 else "worse"
        size = f"{abs(found['gain']):.3f} nats per token {word}"
        share = f"{found['better']:.0%}"
        tokens = plural(losses["tokens"], "token")
        sentence = f"On {tokens} the hybrid is {size} than {baseline}, and predicts {share} of them better."
        out.append({"baseline": baseline, "sentence": sentence, **ways})
    return out


def _gate(one):
    return ", ".join(f"{name} {weight:.2f}" for name, weight in one["gate"].items()) if one.get("gate") else ""


def visible(text: str, alone: bool = False) -> str:
    """Text in one line whose line breaks and tabs are seen, and that commands nothing.

    Args:
        text: The text.
        alone: Also show spaces at its ends: many tokens differ by nothing else.
    """
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥")
    text = printable(text)
    return re.sub(r"^ +| +$", lambda found: "␣" * len(found[0]), text) if alone else text


def curves(facts: Facts) -> list[dict[str, Any]]:
    """Losses over the steps of each stage."""
    out = []
    for stage in facts.stages:
        found = {**stage.series("loss"), **stage.series("eval_loss")}
        # What is trained on may be more than the mixture's loss: where that was logged, it is the hybrid's.
        series = {_curve_name(key): value for key, value in found.items() if f"{key}/mixture" not in found}
        if series:
            rows = [
                {"name": name, "first": f"{ys[0]:.3f}", "last": f"{ys[-1]:.3f}", "points": len(ys), "step": xs[-1]}
                for name, (xs, ys) in series.items()
            ]
            drawn = any(len(xs) > 1 for xs, _ in series.values())
            label = f"Losses of {stage.name}"
            chart = None
            if drawn:
                what = "loss in nats per token"
                chart = charts.for_any_page(charts.lines, series, "optimizer step", what, label=label)
            out.append({"title": stage.name, "rows": rows, "chart": chart})
    return out


def no_curves(facts: Facts) -> str:
    """Why stages have no curves, as sentences; "" where all that were trained have."""
    out = []
    for stage in facts.stages:
        steps, every = stage.result.get("steps"), stage.logging_steps
        if isinstance(steps, int) and not {**stage.series("loss"), **stage.series("eval_loss")}:
            short = every is not None and steps < every
            why = f": it took {plural(steps, 'step')}, fewer than logging_steps ({every:g})" if short else ""
            out.append(f"{stage.name} logged no losses{why}.")
    if not out and not curves(facts):
        return "Nothing was trained." if facts.untrained else "The directory holds no training log."
    return " ".join(out)


def _curve_name(key):
    side = "held out" if key.startswith("eval_") else "training"
    part = key.removeprefix("eval_").removeprefix("loss").removeprefix("/")
    return f"{'hybrid' if part in ('', 'mixture') else part}, {side}"


def comparison(facts: Facts) -> dict[str, Any] | None:
    """All rows of the comparison, by kind of text too, with the forest plot."""
    if facts.comparison is None:
        return None
    rows = sorted(facts.comparison["rows"], key=lambda row: row["loss"])
    kinds = sorted({kind for row in rows for kind in row["by_kind"]})
    own = facts.comparison["hybrid"]
    baselines = [
        (row["name"], row["difference"], row["difference_interval"])
        for row in rows
        if row["name"] != own and row["difference"] is not None
    ]
    return {
        "file": facts.comparison_path.name,
        "machine": facts.comparison["machine"],
        "kinds": kinds,
        "chart": charts.for_any_page(charts.forest, baselines, gain_needed(facts.comparison)) if baselines else None,
        "rows": [
            {
                "name": row["name"],
                "own": row["name"] == own,
                "what": _KINDS[row["kind"]],
                "loss": f"{row['loss']:.3f}",
                "interval": f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}" if row["interval"] else "–",
                "difference": "" if row["name"] == own else say_difference(row),
                "p": "–" if row["p"] is None else "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}",
                "bits": "–" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}",
                "accuracy": "–" if row["accuracy"] is None else f"{row['accuracy']:.1%}",
                "by_kind": [f"{row['by_kind'][kind]:.3f}" if kind in row["by_kind"] else "–" for kind in kinds],
                "parameters": short_count(row["parameters"]) if row["parameters"] else "–",
                "flops": short_count(row["flops_per_token"]) if row["flops_per_token"] else "–",
                "made": short_count(row["training_flops"]) if row["training_flops"] else "–",
                "needs": row["needs"] or "nothing else",
            }
            for row in rows
        ],
    }
