"""What works: the sweep of model types, other tokenizers (transplant, aligned), servers (serving, vllm_engine)."""

import re
from collections import Counter

from .registry import Load, Rows, Values, bold, span, table, values, versions

REASONS = {
    "an encoder-decoder, or saved as another task type": r"encoder-decoder|not as a causal LM",
    "a model of several parts, or one that reads more than text": r"several parts|more than text",
    "its layers cannot be found, or do not run on embeddings alone": r"cannot be cut|run in \d+ segments",
    "wrong with a cache or with padding in Transformers itself": r"a cache|padding on the left|window|empty state",
    "a part of another model, or bytes in patches": r"drafts for another model|in patches",
}


@table("families")
def families(load: Load) -> Rows:
    types = load("families")["types"]
    rows = [["model types", "number"], ["pass the contract", str(sum(one["verdict"] == "passes" for one in types))]]
    found = Counter(
        next((label for label, pattern in REASONS.items() if re.search(pattern, one["reason"])), "another reason")
        for one in types
        if one["verdict"] != "passes"
    )
    return [*rows, *([f"unsupported: {label}", str(number)] for label, number in found.most_common())]


@table("transplant")
def transplant(load: Load) -> Rows:
    labels = {"copied": "the mean of all rows", "random": "all rows random"}
    rows = [["head", "rows that are not copied", "its own tokenizer (baseline)", "transplanted", "tuned"]]
    for line in load("transplant"):
        cells = [f"{line[when]:.3f}" for when in ("before", "after", "tuned")]
        rows.append([line["head"], labels.get(line["rows"], f"`{line['rows']}`"), *cells])
    return rows


@table("aligned")
def aligned(load: Load) -> Rows:
    """Bits per byte of each text and direction that was measured."""
    head = ["text", "bytes", "mapped model", "its own tokenizer", "mapped", "loss", "home model", "both, mixed"]
    rows = [[*head, "nodes read / own tokens"]]
    for key, one in load("aligned").items():
        pair, _, text = key.partition(": ")
        size = f"{one['bytes']:,}"
        bits = [f"{one['own']:.3f}", f"{one['mapped']:.3f}", bold(f"{one['loss']:+.4f}")]
        bits += [f"{one['home']:.3f}", f"{one['mixture']:.3f}"]
        rows.append([text, size, pair, *bits, f"{one['nodes'] / one['own_tokens']:.2f}"])
    return rows


@table("aligned-tokenizers")
def aligned_tokenizers(load: Load) -> Rows:
    """What a perfect model loses by being mapped, and the worst of what must hold of any weights, in each direction."""
    found = load("aligned_tokenizers")
    rows = [["measured", *found]]
    for name in next(iter(found.values()))["lost"]:
        pairs = [one["lost"][name] for one in found.values()]
        cells = [f"{round(lost, 3) + 0.0:.3f} of {entropy:.2f}" for lost, entropy in pairs]  # a rounded -0 is 0
        rows.append([f"bits that a perfect model loses, {name}", *cells])
    labels = {
        "sum": "error of the probabilities' sum",
        "cached": "error with a cache, token by token",
        "chunks": "error with a cache, in chunks",
        "future": "error with a different future",
    }
    rows += [[label, *(f"{one[key]:.0e}" for one in found.values())] for key, label in labels.items()]
    rows.append(["same greedy tokens with and without a cache", *(one["generated"] for one in found.values())])
    rows.append(["edge-case rows with finite values only", *(one["odd_rows"] for one in found.values())])
    return rows


@values
def aligned_values(load: Load) -> Values:
    cost, lost = load("aligned_cost"), load("aligned")
    for text in ("prose", "code", "german"):
        worst = max(one["loss"] for key, one in lost.items() if key.endswith(text))
        yield f"aligned.{text}", f"{worst:+.3f}"
    for home, other in (("SmolLM2", "Gemma"), ("Gemma", "SmolLM2")):
        training, decoding = cost[home]["training"], cost[home]["decoding"]
        yield f"aligned.training.{home}", f"{training['ratio']:.2f}"
        yield f"aligned.first.{home}", f"{training['first'] / sum(training['components'].values()):.1f}"
        yield f"aligned.nodes.{home}", f"{training['nodes'] / training['tokens'][other] - 1:.0%}"
        yield f"aligned.decoding.{home}", f"{decoding['ratio']:.2f}"


@values
def family_values(load: Load) -> Values:
    sweep = load("families")
    passed = sum(one["verdict"] == "passes" for one in sweep["types"])
    yield "families.passed", str(passed)
    yield "families.all", str(len(sweep["types"]))
    yield "families.unsupported", str(len(sweep["types"]) - passed)
    yield "families.versions", versions(sweep)
    lines = load("transplant")
    after = min(line["after"] for line in lines)
    yield "transplant.before", f"{lines[0]['before']:.3f}"
    yield "transplant.after", f"{after:.3f}"
    yield "transplant.loss", f"{after - lines[0]['before']:.2f}"
    yield "transplant.tuned", f"{min(line['tuned'] for line in lines):.3f}"


@table("serving")
def serving(load: Load) -> Rows:
    result = load("serving")
    rows = [["clients", "answers", "wrong", "tokens/s", "median latency, s", "95th percentile, s"]]
    for one in result["served"]:
        latencies = [f"{one['median_latency']:.1f}", f"{one['p95_latency']:.1f}"]
        answers = [str(one["requests"]), bold(str(one["wrong"]))]
        rows.append([f"{one['clients']}", *answers, f"{one['tokens_per_second']:.1f}", *latencies])
    for one, when in zip(result["offline_before_and_after"], ("before", "after")):
        rows.append(
            [f"baseline: offline, one prompt at a time, {when}", "", "", f"{one['tokens_per_second']:.1f}", "", ""]
        )
    for one in result["offline_batched"]:
        name = f"baseline: offline, padded batches of {one['batch']}"
        rows.append([name, "", bold(str(one["wrong"])), f"{one['tokens_per_second']:.1f}", "", ""])
    return rows


@table("vllm")
def vllm(load: Load) -> Rows:
    result = load("vllm_engine")
    rows = [["what is loaded", "implementation", "result"]]
    for name, one in result["hybrid"].items():
        rows.append(["hybrid", name, f"an error of {one['lines_printed']} lines that says why"])
    for name, one in result["component"].items():
        found = (
            f"{one['different']} of {one['answers']} answers of {one['tokens_each']} tokens differ from `generate`'s"
        )
        rows.append(["the component of a pruned hybrid, saved by itself", name, found])
    return rows


@table("mixture-sampling-lag")
def sampling_lag(load: Load) -> Rows:
    rows = [["gate trained", "gate evaluated every", "seed 0", "seed 1", "seed 2"]]
    ways = {
        "lag": "as usual",
        "trained": "with the lag",
        "past": "with the lag and past losses",
        "online": "online mixture",
    }
    for what, said in ways.items():
        lines = [line for line in load("mixture_sampling") if line["what"] == what]
        one, *lags = lines[0]["losses"]
        none = [""] * (3 - len(lines))
        rows.append([said, "token (the loss)", *(f"{line['losses'][one]:.4f}" for line in lines), *none])
        for lag in lags:
            costs = [line["losses"][lag] - line["losses"][one] for line in lines]
            ends = [span(line["cost_95"][lag], "+.3f") for line in lines]
            rows.append([said, f"{lag} tokens", *(f"{cost:+.4f} ({end})" for cost, end in zip(costs, ends)), *none])
    return rows


SPEEDS = {"speed": "two", "speed, three": "three", "speed, aligned": "two tokenizers"}


def sampling_took(load):
    """{case: ({way: seconds per token of the hybrid's}, those of one component)}."""
    out = {}
    for line in load("mixture_sampling"):
        if line["what"] in SPEEDS:
            took = line["seconds_per_token"]
            alone = list(took)[: list(took).index("hybrid")]
            out[line["what"]] = took, sum(took[name] for name in alone) / len(alone)
    return {what: out[what] for what in SPEEDS if what in out}


@table("mixture-sampling-speed")
def sampling_speed(load: Load) -> Rows:
    rows = [["components", "generation", "ms per token", "relative to one component"]]
    for what, (took, one) in sampling_took(load).items():
        rows += [
            [SPEEDS[what], name.replace("asked", "evaluated"), f"{1000 * value:.1f}", f"{value / one:.2f}"]
            for name, value in took.items()
        ]
    return rows


@values
def sampling_values(load: Load) -> Values:
    lines = load("mixture_sampling")
    for draws in lines:
        if draws["what"].startswith("draws"):
            key = "sampling.aligned_" if "aligned" in draws["what"] else "sampling."
            yield f"{key}draws", f"{draws['drawn']:,}"
            yield f"{key}chi", ", ".join(f"{value:.1f}" for value in draws["chi_square"])
            yield f"{key}limit", f"{draws['limit_95']:.1f}"
    for what, key in (("lag", "lost"), ("trained", "lost_trained"), ("past", "lost_past"), ("online", "lost_online")):
        costs = [line["losses"]["16"] - line["losses"]["1"] for line in lines if line["what"] == what]
        yield f"sampling.{key}", f"{sum(costs) / len(costs):.3f}"

    def mean(what, lag):
        found = [line["losses"][lag] for line in lines if line["what"] == what]
        return sum(found) / len(found)

    yield "sampling.past_behind", f"{mean('past', '16') - mean('lag', '1'):.3f}"
    for what, (took, one) in sampling_took(load).items():
        key = "_" + what.split(", ")[1] if ", " in what else ""
        yield f"sampling.ratio{key}", f"{took['drawn, gate asked every 16'] / one:.2f}"
        yield f"sampling.static{key}", f"{took['drawn, static'] / one:.2f}"
        yield f"sampling.saved{key}", f"{took['hybrid'] / took['drawn, gate asked every 16']:.2f}"


@values
def serving_values(load: Load) -> Values:
    served = load("serving")["served"]
    yield "serving.answers", str(sum(one["requests"] for one in served))
    yield "serving.wrong", str(sum(one["wrong"] for one in served))
    yield "serving.slowest", f"{served[0]['tokens_per_second']:.1f}"
    yield "serving.fastest", f"{served[-1]['tokens_per_second']:.1f}"
    yield "serving.batched", f"{load('serving')['offline_batched'][-1]['tokens_per_second']:.1f}"
    yield "vllm.version", load("vllm_engine")["vllm"]
