"""Models trained from scratch on tasks: benchmarks/mad_small.py, lra_small.py, mad_program.py, mad_generation.py,
composition.py."""

from manticore_hf.utils.formatting import listed

from .registry import Load, Rows, Values, best_bold, bold, table, values

TASKS = (
    "in-context-recall",
    "noisy-in-context-recall",
    "fuzzy-in-context-recall",
    "selective-copying",
    "compression",
    "memorization",
)


def task_name(task: str) -> str:
    return task.replace("in-context-recall", "in-context recall").replace("-", " ").replace("in context", "in-context")


def scored(lines: list[dict], task: str) -> dict[str, dict]:
    """{llama, mamba, ensemble, hybrid, ...: its line} of a task trained from scratch."""
    mine = [line for line in lines if line["task"]["name"] == task]
    return {"ensemble" if "ensemble" in line["model"] else line["model"].partition(" ")[0]: line for line in mine}


@table("mad-small")
def mad_small(load: Load) -> Rows:
    shown = {"llama": "llama", "mamba": "mamba", "ensemble": "ensemble of the two", "hybrid": "hybrid"}
    rows = [["task", "chance", *shown.values()]]
    for task in TASKS:
        lines = scored(load("mad_small"), task)
        cells = best_bold([lines[one]["accuracy"] for one in shown], ".3f", max)
        if task.startswith("fuzzy"):  # padding makes classes of their own there, so that the mean over classes differs
            cells = [f"{cell} ({lines[one]['macro_accuracy']:.3f})" for cell, one in zip(cells, shown)]
        rows.append([task_name(task), f"{lines['llama']['chance']:.3f}", *cells])
    return rows


@table("lra-small")
def lra_small(load: Load) -> Rows:
    lines = scored(load("lra_small"), "listops")
    order = ("llama", "mamba", "ensemble", "hybrid", "jamba")
    head = ["task", "chance", "llama", "mamba", "ensemble of the two", "hybrid", "Jamba (hand-designed)"]
    cells = best_bold([lines[one]["accuracy"] for one in order], ".3f", max)
    return [head, ["short ListOps", f"{lines['llama']['chance']:.3f}", *cells]]


@table("mad-profile")
def mad_profile(load: Load) -> Rows:
    profile = load("mad_program")["profile"]
    rows = [["task", "chance", *profile["models"]]]
    for task in TASKS:
        cells = best_bold([profile["accuracy"][model][task] for model in profile["models"]], ".3f", max)
        rows.append([task_name(task), f"{profile['chance'][task]:.3f}", *cells])
    return rows


@table("mad-program")
def mad_program(load: Load) -> Rows:
    result = load("mad_program")
    families = result["programmed"]["families"]
    last = families[-1]
    head = ["task", "chance", f"mixture weight of {last} (each seed)", "the small hybrid (each seed)"]
    rows = [[*head, *(f"{family} alone" for family in families)]]
    for task in TASKS:
        runs = [run for run in result["programmed"]["runs"] if run["task"]["name"] == task]
        weights, accuracies = ([run["alpha"][0][-1] for run in runs], [run["accuracy"] for run in runs])
        cells = [", ".join(f"{one:.3f}" for one in many) for many in (weights, accuracies)]
        alone = [result["profile"]["accuracy"][family][task] for family in families]
        rows.append([task_name(task), f"{runs[0]['chance']:.3f}", *cells, *(f"{one:.3f}" for one in alone)])
    mean = result["programmed"]["alpha"][0][-1]
    return [*rows, ["mean of the six", "", f"{mean:.3f}", "", *[""] * len(families)]]


@table("mad-generation")
def mad_generation(load: Load) -> Rows:
    rows = [["task", "loop, s", "generated, s", "loop / generated", "loop / data set"]]
    lines = {line["task"]: line for line in load("mad_generation")["rows"]}
    for task in TASKS:
        line = lines[task]
        cells = [f"{line['loop']:.2f}", f"{line['generated']:.3f}"]
        cells += [f"{line['loop / generated']:.1f}", f"{line['loop / dataset']:.1f}"]
        rows.append([task_name(task), *cells])
    return rows


def composed(load: Load, name: str = "composition") -> dict[str, list[dict]]:
    """{condition: its runs, by seed}."""
    found = {}
    for row in load(name)["rows"]:
        found.setdefault(row["model"], []).append(row)
    return found


def mean(runs: list[dict], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def without_bridges(found: dict[str, list[dict]]) -> list[dict]:
    """The runs of all baselines: of every condition in which no bridge leads from the other model."""
    bridges = ("linear", "attention", "calibrated", "quiet")
    return [run for condition, runs in found.items() if not condition.startswith(bridges) for run in runs]


def seeds_of(found: dict[str, list[dict]]) -> str:
    seeds = len({run["seed"] for runs in found.values() for run in runs})
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def alone_values(load: Load, name: str) -> Values:
    """What each component does alone, in its worst seed."""
    alone = load(name)["components"]
    yield from ((f"{name}.{one}.alone", f"{min(run[one] for run in alone):.3f}") for one in alone[0] if one != "seed")


def by_keys(load: Load, name: str) -> Rows:
    """Of every condition, what it answers on keys that it was not trained on and on the others; the best in bold.

    Seeds are named, and nothing is bold, where a condition was not measured with all of them.
    """
    rows, found = [["joined by", "weights trained", "unseen keys", "each seed", "trained keys"]], composed(load, name)
    most = max(map(len, found.values()))
    best = max(mean(runs, "unseen") for runs in found.values() if len(runs) == most)
    for condition, runs in found.items():
        less, unseen = len(runs) < most, mean(runs, "unseen")
        each = ", ".join(f"{run['unseen']:.3f}" + (f" (seed {run['seed']})" if less else "") for run in runs)
        cells = [bold(f"{unseen:.3f}", unseen == best and not less), each, f"{mean(runs, 'trained'):.3f}"]
        rows.append([condition, f"{runs[0]['trained_parameters']:,}" if runs[0]["steps"] else "none", *cells])
    return rows


@table("composition")
def composition(load: Load) -> Rows:
    return by_keys(load, "composition")


@table("recall")
def recall(load: Load) -> Rows:
    return by_keys(load, "recall")


@table("glossary")
def glossary(load: Load) -> Rows:
    asked = {"known": "unseen names", "unseen": "unseen names and words", "trained": "trained names"}
    rows, found = [["joined by", "weights trained", *asked.values()]], composed(load, "glossary")
    best = {key: max(mean(runs, key) for runs in found.values()) for key in ("known", "unseen")}
    for name, runs in found.items():
        cells = []
        for key in asked:
            each = f" ({', '.join(format(run[key], '.3f') for run in runs)})" if key != "trained" and runs[1:] else ""
            cells.append(bold(f"{mean(runs, key):.3f}", mean(runs, key) == best.get(key)) + each)
        rows.append([name, f"{runs[0]['trained_parameters']:,}" if runs[0]["steps"] else "none", *cells])
    return rows


@values
def glossary_values(load: Load) -> Values:
    found = composed(load, "glossary")
    for name, runs in found.items():
        for key in ("unseen", "known", "trained"):
            yield f"glossary.{name.replace(' ', '-').replace(',', '')}.{key}", f"{mean(runs, key):.3f}"
    others = without_bridges(found)
    yield "glossary.others", f"{max(run[key] for run in others for key in ('unseen', 'known')):.3f}"
    yield from alone_values(load, "glossary")
    yield "glossary.names", str(load("glossary")["task"]["num_keys"])
    yield "glossary.steps", str(found["gate tuned"][0]["steps"])
    yield "glossary.seeds", seeds_of(found)


def keys_values(load: Load, name: str) -> Values:
    """Of a task of keys: what each condition answers on unseen keys, and what no bridge does better than."""
    found = composed(load, name)
    for condition, runs in found.items():
        yield f"{name}.{condition.replace(' ', '-')}", f"{mean(runs, 'unseen'):.3f}"
        yield f"{name}.{condition.replace(' ', '-')}.each", listed(f"{run['unseen']:.3f}" for run in runs)
    yield f"{name}.others", f"{max(run['unseen'] for run in without_bridges(found)):.3f}"
    yield f"{name}.seeds", seeds_of(found)
    yield from alone_values(load, name)
    yield f"{name}.keys", str(load(name)["task"]["num_keys"])
    yield f"{name}.steps", str(found["linear bridge"][0]["steps"])


@values
def composition_values(load: Load) -> Values:
    yield from keys_values(load, "composition")
    for condition in ("gate tuned", "table tuned"):
        runs = composed(load)[condition]
        yield f"composition.{condition.replace(' ', '-')}.trained", f"{mean(runs, 'trained'):.3f}"


@values
def recall_values(load: Load) -> Values:
    yield from keys_values(load, "recall")


@values
def task_values(load: Load) -> Values:
    training = load("mad_small")[0]["training"]
    yield "mad.steps", f"{load('mad_small')[0]['steps']}"
    yield "mad.width", f"{training['hidden_size']}"
    wins = [
        (lines["hybrid"]["accuracy"] > lines["ensemble"]["accuracy"], lines["hybrid"]["accuracy"] > alone)
        for lines in (scored(load("mad_small"), task) for task in TASKS)
        for alone in [max(lines[one]["accuracy"] for one in ("llama", "mamba"))]
    ]
    yield "mad.over-ensemble", f"{sum(one for one, _ in wins)} of {len(wins)}"
    yield "mad.over-components", f"{sum(one for _, one in wins)} of {len(wins)}"
    lines = scored(load("lra_small"), "listops")
    yield from ((f"listops.{name}", f"{line['accuracy']:.3f}") for name, line in lines.items())
    fuzzy = scored(load("mad_small"), "fuzzy-in-context-recall")
    yield from ((f"fuzzy.{name}", f"{line['accuracy']:.3f}") for name, line in fuzzy.items())
