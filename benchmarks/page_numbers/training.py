"""What to train, from where and with what: objective, calibration, alpha_grid, pruning and align_stage."""

import re
import statistics

from .registry import Load, Rows, Unmade, Values, best_bold, bold, span, table, values

# What a hybrid is trained with where the components' gain is above the threshold, and elsewhere: these are
# `manticore_hf.utils.objective`'s, which needs torch; tests/test_benchmark_pages.py compares them.
DIFFERENT = 0.05
CHOICE = {True: ("prob", (1.0, 0.0)), False: ("logprob", (0.3, 1.0))}
OBJECTIVES = [(space, weights) for space in ("prob", "logprob") for weights in ((1.0, 0.0), (0.3, 1.0))]


def objective_of(load: Load, setting: str) -> tuple[float, dict[tuple, float]]:
    """A setting's gain before any training, and the test loss of each objective at the better of its two rates."""
    mine = [line for line in load("objective") if line["setting"] == setting]
    gain = next(line["strengths"]["64"]["gain"] for line in mine if line["run"] == "before")
    losses = {
        one: min(line["loss"] for line in mine if line["run"].startswith(f"{one[0]} {one[1]} ")) for one in OBJECTIVES
    }
    return gain, losses


@table("objective")
def objective(load: Load) -> Rows:
    names = [f"{space} ({weights[0]:g}, {weights[1]:g})" for space, weights in OBJECTIVES]
    rows = [["setting", "gain", *names, "chosen - best"]]
    found = {
        setting: objective_of(load, setting) for setting in dict.fromkeys(line["setting"] for line in load("objective"))
    }
    for setting, (gain, losses) in sorted(found.items(), key=lambda item: -item[1][0]):
        missed = losses[CHOICE[gain > DIFFERENT]] - min(losses.values())
        rows.append([setting, f"{gain:.3f}", *best_bold([*losses.values()], ".4f"), f"{missed:.3f}"])
    return rows


STARTS = ("paper", "default", "identity", "calibrated")
STORIES = {"stories260k-llama": "Llama", "stories-mamba-280k": "Mamba", "stories-neox-352k": "NeoX"}
BUDGETS = (0, 10_000, 30_000, 100_000, 300_000, 1_000_000)


def curves(lines: list[dict], pair: str, start: str) -> list[dict]:
    """The runs of a start, one a seed: where there is a short one and a long one, the long one counts."""
    mine = [line for line in lines if (line["pair"], line["variant"], line["purpose"]) == (pair, start, "curve")]
    seeds = sorted({line["seed"] for line in mine})
    return [max((one for one in mine if one["seed"] == seed), key=lambda one: len(one["curve"])) for seed in seeds]


def calibration_rows(lines: list[dict], fixed: bool) -> Rows:
    """Mean loss over seeds after each budget of tokens; above it the baselines, which are not trained.

    The lowest loss of a budget is bold: a start's, or the best baseline's where no start reaches it.
    """
    budgets = [n for n in BUDGETS if any(str(n) in line["curve"] for line in lines if line["purpose"] == "curve")]
    tokens = [f"{n // 1_000_000}M" if n >= 1_000_000 else f"{n // 1000}k" if n else "0" for n in budgets]
    rows = [["pair", "start (rate)", *tokens, *([] if fixed else ["weight of the first in block 1, each seed"])]]
    for pair in dict.fromkeys(line["pair"] for line in lines):
        short = " + ".join(STORIES.get(name, name) for name in pair.split(" + "))
        runs = {start: curves(lines, pair, start) for start in STARTS}
        first = runs["paper"][0]
        baselines = first.get("baselines", first.get("rivals"))  # under either name: measured before and after 0.2
        means = {}
        for start, mine in runs.items():
            reached = [[run["curve"][str(n)] for run in mine if str(n) in run["curve"]] for n in budgets]
            means[start] = [statistics.mean(losses) if losses else None for losses in reached]
        known = [[mean[i] for mean in means.values() if mean[i] is not None] for i in range(len(budgets))]
        lowest = [f"{min([*losses, *baselines.values()]):.3f}" for losses in known]
        for name, loss in baselines.items():
            label = "plain ensemble" if name == "ensemble" else STORIES.get(name.replace("_", "-"), name) + " alone"
            cell = bold(f"{loss:.3f}", f"{loss:.3f}" in lowest)
            rows.append([short, f"baseline, untrained: {label}", cell, *[""] * (len(rows[0]) - 3)])
        for start, mine in runs.items():
            texts = ["" if mean is None else f"{mean:.3f}" for mean in means[start]]
            cells = [bold(text, text == low) for text, low in zip(texts, lowest)]
            weights = [] if fixed else [", ".join(f"{run['mixture_weights'][0][0]:.2f}" for run in mine)]
            rows.append([short, f"{start} ({mine[0]['rate']:g})", *cells, *weights])
    return rows


@table("calibration")
def calibration(load: Load) -> Rows:
    return calibration_rows(load("calibration"), fixed=False)


@table("calibration-fixed")
def calibration_fixed(load: Load) -> Rows:
    return calibration_rows(load("calibration_fixed"), fixed=True)


@table("demo-rates")
def demo_rates(load: Load) -> Rows:
    lines = load("demo_rates")
    rates = sorted({line["rate"] for line in lines})
    rows = [["what is trained", *(f"{rate:.0e}".replace("e-0", "e-") for rate in rates)]]
    labels = {"neox-prose": "neox-prose alone", "mamba-code": "mamba-code alone"}
    labels |= {"gate": "gate of the one-block hybrid", "two blocks": "projectors and gate, two blocks"}
    for what, label in labels.items():
        losses = {line["rate"]: line["validation_loss"] for line in lines if line["what"] == what}
        rows.append([label, *best_bold([losses.get(rate) for rate in rates], ".3f")])
    return rows


def alpha_runs(load: Load) -> tuple[list[dict], list[dict]]:
    """(runs at the weights of the grid, runs at weights that something found)."""
    lines = load("alpha_grid")
    grid = [line for line in lines if line["how"] == str(line["alpha"])]
    return grid, [line for line in lines if line not in grid]


@table("alpha-grid")
def alpha_grid(load: Load) -> Rows:
    grid, _ = alpha_runs(load)
    head = ["weight of the Llama", *(f"{line['alpha']:g}" for line in grid)]
    return [head, ["test loss", *best_bold([line["losses"]["hybrid"] for line in grid], ".3f")]]


@table("alpha-found")
def alpha_found(load: Load) -> Rows:
    grid, found = alpha_runs(load)
    lowest = min(line["losses"]["hybrid"] for line in grid)
    mean = next(line for line in grid if line["alpha"] == 0.5)
    rows = [["found by", "weight of the Llama", "test loss", "above the best of the grid"]]
    for line in [*found, {**mean, "how": "no search: equal weights"}]:
        how = re.sub(r"^mad:(\w+)$", r"MAD, \1", line["how"])
        loss = line["losses"]["hybrid"]
        rows.append([how, f"{line['alpha']:.3f}", f"{loss:.3f}", f"{loss / lowest - 1:+.2%}"])
    return rows


def pruning_loss(load: Load, label: str) -> list[float]:
    """A model's loss for every seed."""
    found = [line["loss"] for line in load("pruning") if line["label"] == label]
    if not found:
        raise Unmade(f"benchmarks/results/pruning.jsonl has no line {label!r}.")
    return found


@table("pruning")
def pruning(load: Load) -> Rows:
    labels = {
        "as published": "{} as published",
        "taken from the tuned hybrid, 1 pass": "{} inside the soft hybrid",
        "baseline: tuned normally, 2 passes": "{}, tuned plainly, 2 passes",
        "distilled, starting from the tuned hybrid, 1 + 1 passes": "{}, distilled, from inside the hybrid, 1 pass",
        "distilled, starting as published, 2 passes": "{}, distilled, as published, 2 passes",
    }
    parts = ("neox_prose", "mamba_code")
    found = {label: [pruning_loss(load, name.format(part)) for part in parts] for label, name in labels.items()}
    lowest = [min(statistics.mean(losses[i]) for losses in found.values()) for i in range(len(parts))]
    rows = [["model, at the cost of one component", "NeoX", "Mamba"]]
    for label, each in found.items():
        means = [statistics.mean(losses) for losses in each]
        cells = [bold(f"{mean:.4f}", mean == low) for mean, low in zip(means, lowest)]
        ranges = [f" ({max(one) - min(one):.4f})" if max(one) > min(one) else "" for one in each]
        rows.append([label, *(cell + width for cell, width in zip(cells, ranges))])
    soft = pruning_loss(load, "soft hybrid, 1 block")
    cell = f"{statistics.mean(soft):.4f} ({max(soft) - min(soft):.4f})"
    return [*rows, ["for comparison, the unpruned hybrid (cost of both)", cell, cell]]


@table("paths")
def paths(load: Load) -> Rows:
    soft = statistics.mean(pruning_loss(load, "soft hybrid, 2 blocks"))
    rows = [["path through a two-block hybrid", "not pruned", "pruned", "after recovery distillation, 1 pass"]]
    for first, second in (("neox_prose", "mamba_code"), ("mamba_code", "neox_prose")):
        labels = [f"{first} > {second}, {when}" for when in ("before distillation", "distilled, 1 pass")]
        losses = [soft, *(statistics.mean(pruning_loss(load, label)) for label in labels)]
        name = f"{first}, then {second}".replace("_", " ")
        rows.append([name, *(f"{loss:.4f}" for loss in losses)])
    for part in ("neox_prose", "mamba_code"):
        loss = statistics.mean(pruning_loss(load, f"{part} as published"))
        rows.append([f"baseline: {part.replace('_', ' ')} alone, as published", "", "", f"{loss:.4f}"])
    return rows


ALIGNED = {
    "untrained": "nothing (a ridge initialisation)",
    "soft, task": "the hybrid at equal weights: the text",
    "soft, state + mixture": "the hybrid at equal weights: last states, and the one-block mixture",
    "paths, task": "the paths: the text",
    "paths, mixture": "the paths: the one-block mixture",
    "paths, state + mixture": "the paths: last states, and the one-block mixture",
    "paths, state + mixture, then task": "the paths: the same for half the tokens, then the text",
}
ALIGN_TOKENS, ALIGN_CUTS = 100_000, ("1/2", "3/4", "7/8")


def align_losses(load: Load, cut: str) -> tuple[dict[str, float], dict[str, list[list[float]]]]:
    """(loss of each component alone, {what was trained: the losses of all seeds on each path, NeoX first})."""
    runs = [one for one in load("align_stage")["runs"] if (one["cut"], one["tokens"]) == (cut, ALIGN_TOKENS)]
    runs = sorted((one for one in runs if "recovered" not in one), key=lambda one: one["seed"])
    if not runs:
        raise Unmade(f"benchmarks/results/align_stage.json has no run of the cut {cut} and {ALIGN_TOKENS} tokens.")
    losses = {
        name: [[run["paths"][name][path]["task"] for run in runs] for path in paths]
        for name, paths in runs[0]["paths"].items()
    }
    return runs[0]["alone"], losses


@table("align")
def align(load: Load) -> Rows:
    found = [align_losses(load, cut) for cut in ALIGN_CUTS]
    heads = [f"{cut}: {path}" for cut in ALIGN_CUTS for path in ("NeoX, Mamba", "Mamba, NeoX")]
    rows = [["projectors are trained on", *heads]]
    columns = {name: [seeds for _, losses in found for seeds in losses[name]] for name in ALIGNED}
    means = {name: [f"{statistics.mean(seeds):.3f}" for seeds in column] for name, column in columns.items()}
    lowest = [min(cells) for cells in zip(*means.values())]
    for name, label in ALIGNED.items():
        ranges = [f" ({max(seeds) - min(seeds):.3f})" for seeds in columns[name]]
        cells = [bold(mean, mean == low) + one for mean, low, one in zip(means[name], lowest, ranges)]
        rows.append([label, *cells])
    for name, loss in found[0][0].items():
        if name != "online mixture":
            label = "plain ensemble" if name == "ensemble" else STORIES[name.replace("_", "-")] + " alone"
            rows.append([f"baseline: {label}", *[f"{loss:.3f}"] * len(heads)])
    return rows


@values
def align_values(load: Load) -> Values:
    yield "align.tokens", f"{ALIGN_TOKENS:,}"
    alone = align_losses(load, ALIGN_CUTS[0])[0]
    found = [align_losses(load, cut)[1] for cut in ALIGN_CUTS]
    seeds = {cut: len(one["untrained"][0]) for cut, one in zip(ALIGN_CUTS, found)}
    yield "align.seeds", ", ".join(f"{count} ({cut})" for cut, count in seeds.items())
    means = [{name: [statistics.mean(seeds) for seeds in paths] for name, paths in one.items()} for one in found]
    better = min(loss for name, loss in alone.items() if name.startswith("stories"))
    yield "align.behind", f"{min(loss for one in means for paths in one.values() for loss in paths) - better:.2f}"
    for key, one, other in (
        ("states", "paths, state + mixture", "paths, mixture"),
        ("states-text", "paths, state + mixture", "paths, task"),
        ("then", "paths, state + mixture, then task", "paths, task"),
        ("mixture", "paths, mixture", "paths, task"),
        ("then-mixture", "paths, state + mixture, then task", "paths, mixture"),
        ("soft", "soft, state + mixture", "soft, task"),
    ):
        yield f"align.{key}", span([f([a - b for m in means for a, b in zip(m[one], m[other])]) for f in (min, max)])
        pairs = [pair for losses in found for paths in zip(losses[one], losses[other]) for pair in zip(*paths)]
        yield f"align.{key}.lower", f"{sum(a < b for a, b in pairs)} of {len(pairs)}"
        yield f"align.{key}.higher", f"{sum(a > b for a, b in pairs)} of {len(pairs)}"
    (rates,) = load("align_stage")["rates"].values()
    few = [min(rates[name].values()) for name in ("paths, state + mixture", "paths, task")]
    yield "align.few", " against ".join(f"{loss:.3f}" for loss in few)
    for path, key in enumerate(("neox-first", "mamba-first")):
        lowest = [min(paths[path] for paths in one.values()) for one in means]
        yield f"align.deep.{key}", ", ".join(f"{loss:.2f}" for loss in lowest)


@values
def training_values(load: Load) -> Values:
    settings = dict.fromkeys(line["setting"] for line in load("objective"))
    found = [objective_of(load, setting) for setting in settings]
    missed = [losses[CHOICE[gain > DIFFERENT]] - min(losses.values()) for gain, losses in found]
    yield "objective.mean", f"{statistics.mean(missed):.3f}"
    yield "objective.worst", f"{max(missed):.3f}"
    yield "objective.threshold", f"{DIFFERENT:g}"
    for name, one in (("prob-mixture", OBJECTIVES[0]), ("logprob-mixture", OBJECTIVES[2])):
        fixed = [losses[one] - min(losses.values()) for _, losses in found]
        yield f"objective.{name}.mean", f"{statistics.mean(fixed):.3f}"
        yield f"objective.{name}.worst", f"{max(fixed):.3f}"
    yield "pruning.seeds", str(len(pruning_loss(load, "soft hybrid, 1 block")))
    soft = statistics.mean(pruning_loss(load, "soft hybrid, 1 block"))
    yield "pruning.soft", f"{soft:.3f}"
    for short, part in (("neox", "neox_prose"), ("mamba", "mamba_code")):
        plain = statistics.mean(pruning_loss(load, f"{part}, tuned plainly, 2 passes"))
        distilled = statistics.mean(pruning_loss(load, f"{part}, distilled, as published, 2 passes"))
        yield f"pruning.{short}", f"{plain - distilled:.3f}"
        yield f"pruning.{short}.plain", f"{plain:.3f}"
        yield f"pruning.{short}.distilled", f"{distilled:.3f}"
        yield f"pruning.{short}.behind", f"{distilled - soft:.2f}"
    grid, searched = alpha_runs(load)
    lowest = min(line["losses"]["hybrid"] for line in grid)
    above = {line["how"]: line["losses"]["hybrid"] / lowest - 1 for line in searched}
    ours = [share for how, share in above.items() if not how.startswith("mad:")]
    yield "search.least", f"{min(ours):.1%}".replace("%", " %")
    yield "search.most", f"{max(ours):.1%}".replace("%", " %")
    mean = next(line["losses"]["hybrid"] for line in grid if line["alpha"] == 0.5)
    yield "search.mean", f"{mean / lowest - 1:.1%}".replace("%", " %")
    yield from ((f"search.{how}", f"{share:.1%}".replace("%", " %")) for how, share in above.items())
    weights = [
        run["mixture_weights"][0][0] for run in curves(load("calibration"), load("calibration")[0]["pair"], "paper")
    ]
    yield "calibration.paper-weights", f"{min(weights):.2f} to {max(weights):.2f}"
