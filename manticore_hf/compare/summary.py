"""From tested runs to what people read: `comparison.json`, `comparison.md`, `comparison.png`."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from manticore_hf.compare.scores import Documents
from manticore_hf.evaluation.statistics import bootstrap, mean_loss, paired_p
from manticore_hf.utils.claims import too_little
from manticore_hf.utils.files import replace_text, write_json
from manticore_hf.utils.plots import plot_differences

VERSION = 1
ORACLE = "oracle: the best tuned component for each document"


def summarise(rows: Sequence[Mapping[str, Any]], documents: Documents, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison as plain values.

    Args:
        rows: [{"contender", "runs": {seed: run}, "bases": for every run those it starts from, "nll": [seeds, units],
            "correct": [seeds, units]}].
        documents: Documents.
        facts: What is stated beside the rows.

    Returns:
        {"hybrid": name of the hybrid with the lowest validation loss, "rows": [...], ...}; a row's `difference` is its
        loss minus that hybrid's: positive where the hybrid is better.
    """
    hybrids = [row for row in rows if row["contender"].kind == "hybrid"]
    own = min(hybrids, key=lambda row: np.mean([run["validation"] for run in row["runs"].values()]))
    out = [_row(row, documents, own) for row in rows]
    tuned = [row for row in rows if row["contender"].kind == "component"]
    out.append(_oracle(tuned, documents, own, out))
    return {
        "version": VERSION,
        **facts,
        "test_tokens": int(documents.tokens.sum()),
        "test_bytes": int(documents.bytes.sum()),
        "units": documents.units,
        "test_units": len(documents),
        "hybrid": own["contender"].name,
        "rows": out,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _row(row, documents, own):
    contender, runs = row["contender"], list(row["runs"].values())
    first = runs[0]
    out = {
        "name": contender.name,
        "kind": contender.kind,
        "needs": contender.needs,
        "options": first["options"],
        "seeds": list(row["runs"]),
    }
    out |= _losses(row["nll"], documents, own, row is own)
    if row["correct"] is not None:  # a model of another tokenizer has none to compare
        out["accuracy"] = float(row["correct"].mean(0).sum() / documents.tokens.sum())
    out["validation"] = float(np.mean([run["validation"] for run in runs]))
    for key in ("parameters", "flops_per_token"):
        out[key] = first[key]
    # What a contender starts from was trained, too: its cost adds up, its tokens are read by each part at a time.
    for key, together in (("training_flops", sum), ("seconds", sum), ("training_tokens", max)):
        before = [together([base[key] for base in bases] or [0]) for bases in row["bases"]]
        out[key] = float(np.mean([run[key] + more for run, more in zip(runs, before)]))
    if "mixture_weights" in first:
        out["mixture_weights"] = np.mean([run["mixture_weights"] for run in runs], axis=0).tolist()
    return out


def _losses(nll, documents, own, is_own):
    tokens = documents.tokens
    losses = mean_loss(nll, tokens)
    out = {"loss": float(losses.mean()), "interval": bootstrap(nll, tokens), "losses": losses.tolist()}
    out["bits_per_byte"] = float(nll.mean(0).sum() / documents.bytes.sum() / np.log(2))
    if documents.kinds is not None:
        kinds = np.array(documents.kinds)
        parts = {kind: kinds == kind for kind in sorted(set(kinds))}
        out["by_kind"] = {kind: float(nll[:, part].mean(0).sum() / tokens[part].sum()) for kind, part in parts.items()}
    if not is_own:
        difference = nll - own["nll"]
        out["difference"] = float(mean_loss(difference, tokens).mean())
        out["difference_interval"] = bootstrap(difference, tokens)
        out["p"] = paired_p(difference)
        out["seeds_won"] = int((mean_loss(difference, tokens) > 0).sum())
    return out


def _oracle(tuned, documents, own, rows):
    """A router that knows the answer: for every document the tuned component with the lowest loss on it."""
    nll = np.stack([row["nll"] for row in tuned])
    best = nll.argmin(0)
    row = {"name": ORACLE, "kind": "oracle", "needs": "the answer", "options": {}, "seeds": rows[0]["seeds"]}
    row |= _losses(nll.min(0), documents, own, False)
    if all(one["correct"] is not None for one in tuned):
        correct = np.take_along_axis(np.stack([one["correct"] for one in tuned]), best[None], 0)[0]
        row["accuracy"] = float(correct.mean(0).sum() / documents.tokens.sum())
    parts = [one for one in rows if one["kind"] == "component"]
    for key in ("parameters", "training_flops", "training_tokens", "seconds"):
        row[key] = sum(one[key] for one in parts)
    row["flops_per_token"] = max(one["flops_per_token"] for one in parts)
    return row


def write_summary(result: Mapping[str, Any], output: str | os.PathLike) -> None:
    """Writes the three files, each by rename, and prints the table."""
    output = Path(output)
    table = as_markdown(result)
    write_json(output / "comparison.json", result)
    replace_text(output / "comparison.md", table)
    per_byte = result["test_tokens"] / result["test_bytes"] / np.log(2)
    plot_differences(result["rows"], result["hybrid"], output / "comparison.png", per_byte)
    print(table)


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table, best loss first, with what it says in one sentence."""
    seeds, units = len(result["seeds"]), f"{result['test_units']} {result['units']}s"
    kinds = sorted({kind for row in result["rows"] for kind in row.get("by_kind", ())})
    head = [
        "",
        "bits per byte",
        "loss",
        "95 % interval",
        *kinds,
        "accuracy",
        "baseline - hybrid",
        "95 % interval",
        "p",
        "seeds won",
        "parameters",
        "FLOPs/token",
        "training FLOPs",
        "s",
    ]
    lines = [
        f"Trained on {result['tokens']:,} tokens of {result['data']}, tested on {result['test_tokens']:,} tokens, "
        f"{result['test_bytes']:,} bytes ({units}) of {result['test']}, {seeds} seed{'s' if seeds > 1 else ''}. Loss "
        "in nats per token of the hybrid's tokenizer, also for models with other tokenizers; intervals by "
        f"the bootstrap over {result['units']}s and seeds, p by a paired randomisation test over {result['units']}s. "
        f"Hybrid: {result['hybrid']}, the best hybrid on the validation split.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    few = too_little(None, result["test_units"]) is not None

    def interval(ends, form):
        return "–" if few else " to ".join(format(end, form) for end in ends)

    for row in sorted(result["rows"], key=lambda row: row["loss"]):
        name = f"**{row['name']}**" if row["kind"] == "hybrid" else row["name"]
        name += f" (needs {row['needs']})" if row["needs"] else ""
        cells = [name, f"{row['bits_per_byte']:.4f}", f"{row['loss']:.4f}", interval(row["interval"], ".3f")]
        cells += [f"{row['by_kind'][kind]:.3f}" for kind in kinds]
        cells.append(f"{row['accuracy']:.3f}" if "accuracy" in row else "–")
        if "difference" in row:
            cells += [
                f"{row['difference']:+.4f}",
                interval(row["difference_interval"], "+.4f"),
                "–" if few else f"{row['p']:.4f}",
                f"{row['seeds_won']} of {len(row['losses'])}",
            ]
        else:
            cells += [""] * 4
        cells += [
            f"{row['parameters']:,}",
            f"{row['flops_per_token']:.3g}",
            f"{row['training_flops']:.3g}",
            f"{row['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", verdict(result), ""])


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence: the hybrid against the best baseline that needs nothing more than the components and the text."""
    own = next(row for row in result["rows"] if row["name"] == result["hybrid"])
    others = ("hybrid", "pruned", "oracle")
    baselines = [row for row in result["rows"] if row["kind"] not in others and not row["needs"]]
    best = min(baselines, key=lambda row: row["loss"])
    if (why := too_little(result["test_bytes"], result["test_units"], result["units"])) is not None:
        losses = f"{best['name']} ({best['loss']:.4f}), {own['name']} has {own['loss']:.4f}"
        return f"No claim is made: {why}. The best baseline is {losses}."
    low, high = best["difference_interval"]
    sure = "better" if low > 0 else "worse" if high < 0 else "no different"
    return (
        f"{own['name']} ({own['loss']:.4f}; {own['bits_per_byte']:.4f} bits per byte) is "
        f"{sure}{' than' if sure != 'no different' else ' from'} the best "
        f"baseline, {best['name']} ({best['loss']:.4f}): {best['difference']:+.4f} nats per token, 95 % interval "
        f"{low:+.4f} to {high:+.4f}, better in {best['seeds_won']} of {len(best['losses'])} seeds."
    )
