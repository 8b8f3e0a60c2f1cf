"""What a hybrid costs: benchmarks/speed.py, parts.py, scan.py, packing.py, drafting.py."""

import re

from .registry import Load, Rows, Unmade, Values, bold, table, values, versions


def in_our_words(what: str) -> str:
    """What a result calls a measurement, in the words of the pages."""
    what = re.sub(r"\b1 (block|token)\(s\)", r"1 \1", what)
    return what.replace("(s)", "s")


@table("speed")
def speed(load: Load) -> Rows:
    rows = [["ratio", "measured", "target", "met"]]
    for one in load("speed")["results"]:
        cells = [bold(f"{one['ratio']:.3f}", not one["reached"]), one["aim"], "yes" if one["reached"] else bold("no")]
        rows.append([in_our_words(one["what"]), *cells])
    return rows


@table("parts")
def parts(load: Load) -> Rows:
    rows = [["what", "milliseconds"]]
    for name, found in load("parts")["ms"].items():
        if name.startswith("one forward"):
            rows += [[f"{name}: {part}", f"{ms:.1f}"] for part, ms in sorted(found.items(), key=lambda item: -item[1])]
        else:
            rows += [[f"{name}: {part}", f"{ms:.1f}"] for part, ms in found.items()]
    return rows


@table("scan")
def scan(load: Load) -> Rows:
    kinds = [("mamba scan", "Mamba scan"), ("mamba layer", "Mamba layer")]
    kinds += [("mamba2 scan", "Mamba-2 scan"), ("mamba2 layer", "Mamba-2 layer")]
    head = ["kernel", "batch x tokens", *(f"{label}, theirs / ours" for _, label in kinds)]
    rows = [[*head, "Mamba / GPT-NeoX layer", "Mamba-2 / GPT-NeoX layer"]]
    for name in ("scan_numba", "scan_torch"):
        result = load(name)
        for row in result["rows"]:
            ours = [
                format(row["theirs / ours"][kind], ".2f") if kind in row["theirs / ours"] else "" for kind, _ in kinds
            ]
            layers = [f"{row['layer / gpt_neox layer'][kind]:.2f}" for kind in ("mamba", "mamba2")]
            rows.append([result["kernel"], f"{row['batch']} x {row['tokens']}", *ours, *layers])
    return rows


@table("packing")
def packing(load: Load) -> Rows:
    rows = [["documents", "tokens", "packed / padded batch", "packed / one at a time", "packed / one text"]]
    for one in load("packing")["rows"]:
        ratios = [f"{one['packed /'][way]:.2f}" for way in ("padded", "one by one", "one text")]
        rows.append([one["documents"], str(one["tokens"]), *ratios])
    return rows


@table("drafting")
def drafting(load: Load) -> Rows:
    rows = [
        [
            "draft",
            "acceptance, greedy / sampling",
            "speed-up, greedy, with 2 / 3 / 4 drafts",
            "bound, greedy / sampling",
        ]
    ]
    for many in ("one_block", "two_blocks"):
        result = load(f"drafting_{many}")
        for part in ("neox_prose", "mamba_code"):
            plain = {one["decoding"]: one for one in result["results"] if (one["draft"], one["way"]) == (part, "plain")}
            measured = [result["greedy, measured"][f"{part}, {n} drafts"]["speed-up"] for n in (2, 3, 4)]
            cells = [
                [plain[decoding][key] for decoding in ("greedy", "sampling")]
                for key in ("acceptance", "speed-up at most")
            ]
            texts = [" / ".join(f"{one:.2f}" for one in many) for many in (cells[0], measured, cells[1])]
            rows.append([f"{part.replace('_', ' ')}, {many.replace('_', ' ')}", *texts])
    return rows


@values
def cost_values(load: Load) -> Values:
    result = load("speed")
    yield "speed.date", result["date"]
    yield "speed.versions", versions(result)
    yield "speed.tokens", result["settings"]["tokens"]
    yield "speed.layers", result["settings"]["layers"]
    yield "speed.width", result["settings"]["width"]
    yield "speed.repeats", result["settings"]["repeats"]
    ratios = {one["what"]: one for one in result["results"]}
    names = {
        "forward.1": "forward / sum of the components, 1 block(s), default preset",
        "forward.2": "forward / sum of the components, 2 block(s), default preset",
        "training.1": "forward+backward / sum of the components, 1 block(s), default preset",
        "training.2": "forward+backward / sum of the components, 2 block(s), default preset",
        "decoding.1": "cached decoding, 64 tokens / sum of the components', 1 block(s)",
        "decoding.2": "cached decoding, 64 tokens / sum of the components', 2 block(s)",
        "pruned": "pruned to one component: cached decoding / the component's",
        "loading.1": "loading / sum of the components, one block",
        "loading.2": "loading / sum of the components, two blocks",
    }
    for name, what in names.items():
        one = next((one for key, one in ratios.items() if key.startswith(what)), None)
        if one is None:
            raise Unmade(f"benchmarks/results/speed.json has no ratio {what!r}.")
        yield f"speed.{name}", f"{one['ratio']:.2f}"
        yield f"speed.{name}.aim", one["aim"]
    reached = [one["reached"] for one in ratios.values()]
    yield "speed.reached", f"{sum(reached)} of {len(reached)}"
    layers = {row["tokens"]: row for row in load("scan_numba")["rows"] if row["batch"] == 1}
    yield "scan.1024", f"{layers[1024]['layer / gpt_neox layer']['mamba']:.1f}"
    yield "scan.128", f"{layers[128]['theirs / ours']['mamba scan']:.1f}"
    yield "scan.versions", versions(load("scan_numba"))
    speeds = [
        one["speed-up"]
        for many in ("one_block", "two_blocks")
        for one in load(f"drafting_{many}")["greedy, measured"].values()
    ]
    yield "drafting.best", f"{max(speeds):.2f}"
    yield "drafting.worst", f"{min(speeds):.2f}"
    forward = next(found for name, found in load("parts")["ms"].items() if name.startswith("one forward"))
    for part in ("hybrid", "components", "segments", "heads", "output mixture"):
        yield f"parts.{part.replace(' ', '-')}", f"{forward[part]:.0f}"
