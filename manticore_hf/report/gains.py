"""What a hybrid gains over each baseline, as numbers for a chart and as sentences to quote."""

from manticore_hf.report.facts import Facts
from manticore_hf.report.one_run import one_run, per_byte
from manticore_hf.utils.claims import ORIGINAL, claim
from manticore_hf.utils.formatting import plural


def gains(facts: Facts) -> tuple[dict[str, list[float | None]], str]:
    """What the hybrid gains over each baseline.

    Returns:
        {baseline: [gain, low, high]}, the best baseline first, the ends None where there is no interval; and the unit,
        bits per byte if they are known, else nats per token.
    """
    if facts.comparison is not None:
        rows = {row["name"]: row for row in sorted(facts.comparison["rows"], key=lambda row: row["loss"])}
        own = rows.pop(facts.comparison["hybrid"])
        known = own["bits_per_byte"] is not None and own["loss"] > 0
        unit = own["bits_per_byte"] / own["loss"] if known else 1.0  # all rows are of one text
        found = {}
        for name, row in rows.items():
            if row["difference"] is not None:
                low, high = row["difference_interval"] or (None, None)
                found[name] = [None if one is None else one * unit for one in (row["difference"], low, high)]
        return found, "bits per byte" if known else "nats per token"
    run = one_run(facts)
    if run is None:
        return {}, "bits per byte"
    names = [name for name in sorted(run.losses, key=run.losses.get) if name != run.own]
    known = set(run.bits) == set(run.losses)
    losses = run.bits if known else run.losses
    found = {name: [losses[name] - losses[run.own], None, None] for name in names if known or not run.differences}
    found |= {name: list(run.differences[name]) for name in names if name in run.differences}
    return {name: found[name] for name in names if name in found}, (
        "bits per byte" if known or run.differences else "nats per token"
    )


def phrases(facts: Facts, costs: str, licence: str) -> list[str]:
    """What may be said of a hybrid to others, with its numbers, where it loses as well as where it gains.

    Args:
        facts: Facts.
        costs: A sentence on what it costs to run; "" if nothing is known.
        licence: On what may be done with it.
    """
    found, unit = gains(facts)
    out = []
    if found and unit == "bits per byte":
        run = None if facts.comparison is not None else one_run(facts)
        size = facts.comparison["test_bytes"] if run is None else run.size
        needs = {row["name"]: row.get("needs") for row in facts.comparison["rows"]} if facts.comparison else {}
        best, usable = next(iter(found)), [name for name in found if not needs.get(name)]
        free, one = next(iter(usable), None), next((name for name in usable if is_one_model(name, facts)), None)
        named = f"{best}, which needs {needs[best]}" if needs.get(best) else best
        told = {}
        for name, what in (
            (best, f"the best baseline ({named})"),
            (free, f"the best baseline that needs nothing else ({free})"),
            (one, f"the best single model ({one})"),
        ):
            told.setdefault(name, what)
        rows = None if run is None else run.rows
        out += [claim(what, found[name], size, "The hybrid", rows) for name, what in told.items() if name is not None]
    out += [costs] if costs else []
    worth = _worth(facts)
    if worth:
        added, name, block = max(worth)
        less, other, at = min(worth)
        told = f"{less:.3f} worse" if less > 0 else f"{-less:.3f} better"
        said = f"Without {name} in block {block}, the hybrid is {added:.3f} nats per token worse"
        if (bits := per_byte(facts.measured["losses"], added)) is not None:
            said += f" ({bits:.4f} bits per byte)"
        out.append(f"{said}; without {other} in block {at}, it is {told}{_on_sample(facts)}.")
    return [*out, licence.strip()]


def _on_sample(facts):
    """On how much text, where that is not what the page's claims are about."""
    run = None if facts.comparison is not None else one_run(facts)
    tokens = facts.measured["losses"].get("tokens")
    told = run is not None and run.sample is None and run.tokens == tokens
    return "" if told or not tokens else f" (on a sample of {plural(tokens, 'token')})"


def _worth(facts):
    """[(nats per token that the hybrid loses without it, component, block)]."""
    out = []
    for key, value in facts.measured.items():
        if key.startswith("without/") and value["loss"] is not None:
            _, block, name = key.split("/")
            out.append((value["loss"] - facts.measured["losses"]["losses"]["hybrid"], name, int(block) + 1))
    return out


def is_one_model(name: str, facts: Facts) -> bool:
    """Whether a baseline is a single model that one could use instead: original, tuned or retrained."""
    if facts.comparison is not None:
        row = next(row for row in facts.comparison["rows"] if row["name"] == name)
        if row["kind"] != "untuned":
            return row["kind"] in ("component", "single")
    parts = [entry["name"] for entry in facts.found["components"]]
    return any(name in (part, f"{part}, untuned", f"{part}, tuned alone", ORIGINAL.format(part)) for part in parts)
