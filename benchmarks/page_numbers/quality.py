"""Is a hybrid better: the study (benchmarks/study.py), and a real pretrained model (benchmarks/smollm2.py)."""

from .registry import Load, Rows, Values, best_bold, bold, span, table, values, versions

SETTINGS = ("two-60k", "other-60k", "three-60k", "alike-60k", "demo-40k")
OWN = "hybrid, 1 block"
NOT_BASELINES = ("hybrid", "pruned", "hardened", "oracle")  # "hardened" in results before 0.2


def named(rows: list[dict], name: str) -> dict:
    """The row of a name."""
    return next(row for row in rows if row["name"] == name)


def best(rows: list[dict], kind: str | None = None) -> dict:
    """The row of lowest loss among those that need nothing but components and text, of a kind or of all baselines.

    The per-document oracle needs the answer and is found by its kind alone.
    """
    if kind == "oracle":
        return min((row for row in rows if row["kind"] == kind), key=lambda row: row["loss"])
    able = [row for row in rows if not row["needs"] and row["kind"] not in NOT_BASELINES]
    return min((row for row in able if kind in (None, row["kind"])), key=lambda row: row["loss"])


def against(row: dict) -> list[str]:
    """How far a contender is behind the hybrid: difference, interval, p, seeds that the hybrid won."""
    cells = [f"{row['difference']:+.3f}", span(row["difference_interval"]), f"{row['p']:.4f}"]
    return [*cells, f"{row['seeds_won']} of {len(row['losses'])}"]


WON = "seeds the hybrid won"
AGAINST = ["best baseline - hybrid", "95 % interval", "p", WON]


@table("study")
def study(load: Load) -> Rows:
    shown = {"best component, tuned": "component", "the same, K times as long": "single"}
    shown |= {"ensemble": "ensemble", "token gate": "gate", OWN: None}
    rows = [["setting", *shown, "per-document oracle", *AGAINST]]
    for name in SETTINGS:
        result = load(f"study/{name}")["rows"]
        losses = [(best(result, kind) if kind else named(result, OWN))["loss"] for kind in shown.values()]
        cells = [*best_bold(losses, ".3f"), f"{best(result, 'oracle')['loss']:.3f}"]  # which nobody has
        rows.append([name, *cells, *against(best(result))])
    return rows


@table("study-short")
def study_short(load: Load) -> Rows:
    rows = [["setting", "components", "hybrid", "best baseline", "its loss", *AGAINST[:2], WON]]
    for name in SETTINGS:
        result = load(f"study/{name}")
        baseline, own = best(result["rows"]), named(result["rows"], OWN)
        losses = best_bold([own["loss"], baseline["loss"]], ".3f")
        difference, interval, _, seeds = against(baseline)
        parts = ", ".join(part.replace("_", " ") for part in result["components"])
        rows.append([name, parts, losses[0], baseline["name"], losses[1], difference, interval, seeds])
    return rows


@table("retrain")
def retrain(load: Load) -> Rows:
    rows = load("study/all-text-60k")["rows"]
    kinds = [next(row for row in rows if row["needs"] == "the components' training text"), named(rows, OWN)]
    kinds += [best(rows, kind) for kind in ("gate", "ensemble", "single", "component")]
    out = [["model", "loss", "training FLOPs", "FLOPs per token", "its loss - the hybrid's", "95 % interval", WON]]
    for row in kinds:
        difference, interval, _, seeds = against(row) if row["name"] != OWN else [""] * 4
        name = row["name"] + (f" (needs {row['needs']})" if row["needs"] else "")
        loss = bold(f"{row['loss']:.3f}", row is min(kinds, key=lambda one: one["loss"]))
        flops = [f"{row['training_flops']:.1e}", f"{row['flops_per_token']:.1e}"]
        out.append([name, loss, *flops, difference, interval, seeds])
    return out


@table("blocks")
def blocks(load: Load) -> Rows:
    result = load("study/blocks-40k")["rows"]
    head = ["model", "loss", "from components tuned first", "its loss - that of 1 block", "95 % interval"]
    rows = [[*head, "seeds that 1 block won"]]
    hybrids = [row for row in result if row["kind"] == "hybrid" and "from tuned" not in row["name"]]
    ensemble = named(result, "ensemble of the tuned components")
    baselines = [*(best(result, kind) for kind in ("gate", "ensemble")), ensemble, best(result, "single")]
    lowest = min(row["loss"] for row in hybrids + baselines)
    for row in [*hybrids, *baselines, best(result, "oracle")]:
        tuned = f"{named(result, row['name'] + ', from tuned components')['loss']:.3f}" if row in hybrids else ""
        difference, interval, _, seeds = against(row) if row["name"] != OWN else [""] * 4
        name = row["name"] if row in hybrids else f"baseline: {row['name']}"
        name = "per-document oracle (needs the answer)" if row["kind"] == "oracle" else name
        rows.append([name, bold(f"{row['loss']:.3f}", row["loss"] == lowest), tuned, difference, interval, seeds])
    return rows


def _bridged(load: Load) -> list[tuple[dict, str, dict]]:
    """(row, name of its best control, {contender: what was measured}) of benchmarks/study_bridges.py."""
    out = []
    for row in load("study_bridges")["rows"]:
        found = row["contenders"]
        out.append((row, min(found.keys() - {"bridges"}, key=lambda name: found[name]["loss"]), found))
    return out


@table("bridges-text")
def bridges_text(load: Load) -> Rows:
    names = ["bridges", "one block", "self-bridges", "LoRA"]
    rows = [["setting", "blocks", "components", *names, "best control - bridges", *AGAINST[1:3], "seeds bridges won"]]
    for row, control, found in _bridged(load):
        best_one, many = found[control], len(found["bridges"]["losses"])
        losses = best_bold([found[name]["loss"] if name in found else None for name in names], ".3f")
        cells = [f"{best_one['behind']:+.3f}", span(best_one["behind_interval"]), f"{best_one['p']:.4f}"]
        won = sum(one > 0 for one in best_one["behind_each"])
        rows.append([row["setting"], str(row["blocks"]), row["trained"], *losses, *cells, f"{won} of {many}"])
    return rows


@values
def bridged_values(load: Load) -> Values:
    result = load("study_bridges")
    yield "bridged.versions", versions(result)
    for name, facts in result["settings"].items():
        yield f"bridged.{name}.tokens", f"{facts['train_tokens']:,}"
    for row, control, found in _bridged(load):
        key = f"bridged.{row['setting']}.{row['blocks']}.{row['trained']}"
        yield f"{key}.behind", f"{-found[control]['behind']:+.3f}"
        yield f"{key}.interval", span(sorted(-end for end in found[control]["behind_interval"]))
        yield f"{key}.one", f"{found['one block']['loss']:.3f}"
        yield f"{key}.added", f"{found['bridges']['added'] - found['one block']['added']:,}"


@table("smollm2")
def smollm2(load: Load) -> Rows:
    result = load("smollm2")
    composed, calibrated = result["composed"]["losses"], result["calibrated"]["losses"]
    losses = {
        "SmolLM2 alone": composed["smollm2"],
        "Mamba alone": composed["mamba"],
        "plain ensemble, untrained": composed["ensemble"],
        "hybrid, composed (projectors at the identity)": composed["hybrid"],
        "hybrid, projectors by ridge regression, mixture weights 1/2": calibrated["hybrid"],
    }
    return [["model", "loss"], *([name, cell] for name, cell in zip(losses, best_bold([*losses.values()], ".3f")))]


@values
def quality_values(load: Load) -> Values:
    for name in (*SETTINGS, "blocks-40k", "all-text-60k"):
        result = load(f"study/{name}")
        rows = result["rows"]
        baseline, own = best(rows), named(rows, OWN)
        yield f"{name}.tokens", f"{result['tokens']:,}"
        yield f"{name}.seeds", str(len(result["seeds"]))
        yield f"{name}.versions", versions(result)
        yield f"{name}.flops", f"{own['flops_per_token'] / best(rows, 'component')['flops_per_token']:.1f}"
        yield f"{name}.hybrid", f"{own['loss']:.3f}"
        yield f"{name}.baseline", f"{baseline['loss']:.3f}"
        for kind in ("component", "single", "ensemble", "gate", "oracle"):
            yield f"{name}.{kind}", f"{best(rows, kind)['loss']:.3f}"
        cells = dict(zip(("gain", "interval", "p", "won"), against(baseline)))
        yield from ((f"{name}.{key}", cell) for key, cell in cells.items())
        yield f"{name}.behind", f"{-baseline['difference']:.3f}"  # of a hybrid that loses
    rows = load("study/all-text-60k")["rows"]
    own, whole = named(rows, OWN), next(row for row in rows if row["needs"] == "the components' training text")
    yield "retrain.loss", f"{whole['loss']:.3f}"
    yield "retrain.ahead", f"{-whole['difference']:.3f}"
    yield "retrain.training", f"{whole['training_flops'] / own['training_flops']:.1f}"
    yield "retrain.running", f"{whole['flops_per_token'] / own['flops_per_token']:.2f}"
    rows = load("study/two-60k")["rows"]
    yield "two-60k.pruned", f"{named(rows, OWN + ', hardened')['loss']:.3f}"
    rows = load("study/blocks-40k")["rows"]
    for many in (2, 4):
        difference, interval, *_ = against(named(rows, f"hybrid, {many} blocks"))
        yield f"blocks.{many}", difference
        yield f"blocks.{many}.interval", interval
        worth = (
            named(rows, f"hybrid, {many} blocks, no projectors")["loss"] - named(rows, f"hybrid, {many} blocks")["loss"]
        )
        yield f"blocks.{many}.projectors", f"{worth:.2f}"
    result = load("smollm2")
    yield "smollm2.tokens", f"{result['training_tokens']:,}"
    yield "smollm2.parameters", f"{result['parameters']['smollm2']:,}"
    yield "smollm2.mamba", f"{result['parameters']['mamba']:,}"
    losses = result["calibrated"]["losses"]
    yield "smollm2.alone", f"{losses['smollm2']:.3f}"
    yield "smollm2.ensemble", f"{losses['ensemble']:.3f}"
    yield "smollm2.hybrid", f"{losses['hybrid']:.3f}"
    yield "smollm2.r2", f"{result['calibration']['r2']['out_of:mamba-0']:.3f}"
    yield "smollm2.predicted", f"{result['calibrated']['tokens']:,}"


# ---- weights from past losses (benchmarks/past_losses.py) ------------------------------------------------------------

TEXTS = ("mixed", "shifted")


def _past(load: Load, what: str, **wanted) -> list[dict]:
    """The lines of benchmarks/past_losses.py of a kind, with these values."""
    wanted |= {"what": what}
    return [line for line in load("past_losses") if all(line.get(key) == value for key, value in wanted.items())]


@table("past-losses")
def past_losses(load: Load) -> Rows:
    found = {text: {line["name"]: line for line in _past(load, "untrained", text=text)} for text in TEXTS}
    names = {name: name.replace("-", " ") + " alone" for name in ("neox-prose", "mamba-code")}
    rows = [["mixture, untrained", *(f"{text} text" for text in TEXTS)]]
    for name in found["mixed"]:
        losses = [found[text][name]["loss"] for text in TEXTS]
        least = [min(line["loss"] for line in found[text].values()) for text in TEXTS]
        rows.append([names.get(name, name), *(bold(f"{x:.3f}", x == low) for x, low in zip(losses, least))])
    return rows


@table("past-losses-gate")
def past_losses_gate(load: Load) -> Rows:
    rows = [
        ["text", "training tokens", "gate without past losses", "with them", "gain", "95 % interval", "p", "seeds won"]
    ]
    for text in TEXTS:
        for line in _past(load, "past", text=text):
            pair = [
                _past(load, "gate", text=text, tokens=line["tokens"], past_losses=past)[0] for past in (False, True)
            ]
            cells = best_bold([one["loss"] for one in pair], ".3f")
            won = f"{line['seeds_won']} of {line['seeds']}"
            numbers = [f"{line['gain']:+.3f}", span(line["interval"]), f"{line['p']:.4f}", won]
            rows.append([text, f"{line['tokens']:,}", *cells, *numbers])
    return rows


@table("gate-variants")
def gate_variants(load: Load) -> Rows:
    """What a gate gains by each variant, with the interval and in how many seeds."""
    lines = _past(load, "variant")
    names = list(dict.fromkeys(line["variant"] for line in lines))
    rows = [["text", "training tokens", "past losses", "gate unchanged", *names]]
    for key in dict.fromkeys((line["text"], line["tokens"], line["past_losses"]) for line in lines):
        found = {line["variant"]: line for line in lines if (line["text"], line["tokens"], line["past_losses"]) == key}
        gains = [
            f"{one['gain']:+.4f} ({span(one['interval'], '+.4f')}), {one['seeds_won']} of {one['seeds']}"
            for one in (found[name] for name in names if name in found)
        ]
        gains += [""] * (len(names) - len(gains))  # of a run that goes on
        rows.append([key[0], f"{key[1]:,}", "yes" if key[2] else "no", f"{found[names[0]]['plain']:.3f}", *gains])
    return rows


@values
def past_losses_values(load: Load) -> Values:
    for text in TEXTS:
        for line in _past(load, "over static", text=text):
            name = "default" if "default" in line["name"] else "chosen"
            yield f"online.{text}.{name}", f"{line['gain']:+.3f}"
            yield f"online.{text}.{name}.interval", span(line["interval"])
        chosen = _past(load, "untrained", text=text, name="online, chosen on validation text")[0]["settings"]
        for key, value in chosen.items():
            yield f"online.{text}.{key}", f"{value:g}"
        for line in _past(load, "past", text=text):
            yield f"past.{text}.{line['tokens']}", f"{line['gain']:+.3f}"
        for line in _past(load, "users", text=text):  # float32 sums of a row do not show less
            yield f"past.{text}.users", f"{max(1e-6, *line['difference'].values()):.0e}"
    for line in _past(load, "variant", past_losses=False):
        yield f"variant.{line['text']}.{line['tokens']}.{line['variant'].replace(' ', '-')}", f"{line['gain']:+.4f}"
    yield "variant.error", f"{_past(load, 'interpolation')[0]['error']:.0e}"
    for key, value in _past(load, "untrained", text="mixed", name="online, defaults")[0]["settings"].items():
        yield f"online.{key}", f"{value:g}"


UNTUNED = ", as it came"  # how benchmarks/real_pair.py marks a model with its own tokenizer


@table("real-pair")
def real_pair(load: Load) -> Rows:
    """Bits per byte of two real models, by kind of text."""
    result = load("real_pair")
    kinds = [*result["bytes"], "all"]
    head = [*kinds, "all: fewer than the best single model", "worst kind of text: more than the best single model"]
    rows = [["contender", *head]]
    for label, row in result["rows"].items():
        least = [min(one[kind]["bits"] for one in result["rows"].values()) for kind in kinds]
        bits = [
            bold(f"{row[k]['bits']:.3f}") if row[k]["bits"] == low else f"{row[k]['bits']:.3f}"
            for k, low in zip(kinds, least)
        ]
        gain = "" if label == result["single"] else f"{row['gain']['percent']:+.1f} %"
        name = f"original {label.removesuffix(UNTUNED)}" if label.endswith(UNTUNED) else label
        rows.append([name, *bits, gain, gain and f"{row['worst']:+.1f} %"])
    return rows


@table("real-pair-speed")
def real_pair_speed(load: Load) -> Rows:
    """Speed and memory of the two real models and of both together."""
    result = load("real_pair_speed")
    rows = [["model", "prefill, tokens/s", "decode, tokens/s", "weights, GB", "beside them while running, GB"]]
    for name, row in result["models"].items():
        sizes = (row["weights"], row["working"] or 0)
        rows.append([name, f"{row['prefill']:.0f}", f"{row['decode']:.1f}", *(f"{one / 1e9:.2f}" for one in sizes)])
    return rows


@values
def real_pair_values(load: Load) -> Values:
    result = load("real_pair")
    single = result["rows"][result["single"]]["all"]["bits"]
    yield "real-pair.single", result["single"].removesuffix(UNTUNED)
    yield "real-pair.date", result["date"]
    yield "real-pair.versions", result["versions"]
    yield "real-pair.bytes", f"{sum(result['bytes'].values()):,}"
    for name, label in (
        ("uniform", "uniform mixture"),
        ("online", "online mixture"),
        ("static", "static, chosen on validation text"),
    ):
        row = result["rows"][label]
        yield f"real-pair.{name}", f"{row['gain']['percent']:.1f} %"
        low, high = row["gain"]["bits"]["interval"]
        yield f"real-pair.{name}.interval", f"{100 * low / single:.1f} to {100 * high / single:.1f} %"
        yield f"real-pair.{name}.worst", f"{row['worst']:+.1f} %"
    gates = [label for label in result["rows"] if label.startswith("token gate")]
    for label in gates:
        row, name = result["rows"][label], label.replace("token gate, ", "").replace(" tokens", "").replace(", ", "-")
        yield f"real-pair.gate.{name.replace(',', '').replace(' ', '-')}", f"{row['gain']['percent']:.1f} %"
    best = result["rows"]["geometric token gate, 60,000 tokens"]["gain"]["percent"]
    yield "real-pair.geometric.60000", f"{best:.1f} %"
    speed = load("real_pair_speed")
    for key in ("date", "dtype", "threads", "prompt_tokens", "new_tokens"):
        yield f"real-pair-speed.{key.replace('_', '-')}", f"{speed[key]}"
    hybrid, parts = speed["models"]["hybrid"], [row for name, row in speed["models"].items() if name != "hybrid"]
    for key in ("prefill", "decode"):
        yield f"real-pair-speed.{key}", f"{1 / hybrid[key] / sum(1 / row[key] for row in parts):.2f}"
    yield "real-pair.cost", f"{result['cost']['hybrid / components']:.1f}"
