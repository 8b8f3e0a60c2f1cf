"""What one run measured of a hybrid and its baselines: its own table, or the sample that a report measures."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manticore_hf.report.facts import Facts
from manticore_hf.utils.claims import CLAIM_ROWS, ORIGINAL, without_itself
from manticore_hf.utils.formatting import listed, plural


@dataclass
class OneRun:
    """What one run measured of a hybrid and its baselines.

    Args:
        losses: {name: nats per token of the hybrid's tokenizer}.
        own: The hybrid's name.
        note: What it was measured on, and how.
        bits: {name: bits per byte}, as far as known.
        size: Bytes of text, None if unknown.
        differences: {baseline: [bits per byte minus the hybrid's, low, high]}, as far as known.
        missing: {name: why it was not measured}.
        by_kind: {kind of text, or text: {name: bits per byte on it}}, where there are several.
        tokens, rows: Of that text, None if unknown.
        sample: What was measured for the report, on less text, where that is not what this is.
    """

    losses: dict[str, float]
    own: str
    note: str
    bits: dict[str, float] = field(default_factory=dict)
    size: int | None = None
    differences: dict[str, list] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens: int | None = None
    rows: int | None = None
    sample: "OneRun | None" = None

    @property
    def has_untouched(self) -> bool:
        """Whether an original component is among the baselines."""
        return any(name.startswith(ORIGINAL.format("")) for name in self.losses)

    @property
    def has_intervals(self) -> bool:
        """Whether the difference to every baseline has a confidence interval."""
        others = set(self.losses) - {self.own}
        return others <= set(self.differences) and all(None not in self.differences[name] for name in others)


def one_run(facts: Facts) -> OneRun | None:
    """What one run says, or None where no baseline was measured beside the hybrid.

    A page tells one story about a text. What the run itself measured (`evaluation.json`, `stage.json`) is shown if it
    has intervals and more tokens than the sample that was measured for the report: the same text, seen less of, would
    seem to contradict it; the sample then only serves details. Otherwise the sample is shown where only it has the
    original components, and always where the user named another text for it.
    """
    mixture = facts.found["settings"]["mixture"]
    sample, run = (one and without_itself(one, mixture) for one in (_sample(facts), _of_run(facts)))
    if sample is None or run is None:
        return run or sample
    named = facts.measured.get("named")
    if named and facts.measured["text"] not in _texts(facts):
        return sample
    if run.has_intervals and run.tokens and run.tokens > sample.tokens:
        return dataclasses.replace(run, sample=sample)
    return sample if sample.has_untouched and not run.has_untouched else run


def _sample(facts):
    """What was measured for the report, or None."""
    measured = facts.measured.get("losses")
    if not measured or len(measured["losses"]) < 2:
        return None
    note = (
        f"One run, {facts.measured['text']}, {plural(measured['tokens'], 'token')}, {measured['bytes']:,} bytes"
        f"{', ' + rows if (rows := rows_of(facts)) else ''}. Each component "
        "predicts with its own head inside this hybrid; the ensemble is their plain mean; an original "
        "component uses its own tokenizer, untrained. Nats per token are per token of the hybrid's tokenizer."
    )
    keys = ("bits_per_byte", "bytes", "differences", "missing")
    values = [measured[key] for key in keys]
    size = measured["tokens"], measured.get("rows")
    return OneRun(measured["losses"], "hybrid", note, *values, measured.get("by_kind", {}), *size)


def rows_of(facts: Facts) -> str:
    """The rows of the sample that was measured for the report, as a part of a sentence; "" where it is not known."""
    count, size = facts.measured["losses"].get("rows"), facts.measured.get("block_size")
    if not count or not size:
        return ""
    said = f"in {plural(count, 'row')} of at most {size} tokens"
    return said + (f": an interval takes at least {CLAIM_ROWS} rows" if facts.measured.get("chosen") else "")


def _results(facts):
    """Results with a baseline beside the hybrid; several only if they have the same rows, which one can sum over."""
    results = [one for one in facts.results if len(one.losses) > 1 and one.own in one.losses]
    if not results:
        return []
    first = results[0]
    alike = all(one.tokens and one.own == first.own and set(one.losses) == set(first.losses) for one in results)
    return results if alike else [first]


def _texts(facts):
    """Names of the texts that the run's table is about; what is in brackets after a name describes it."""
    return [one.data.partition(" (")[0] for one in _results(facts)]


def _of_run(facts):
    """What `evaluation.json` or `stage.json` says, or None; several texts weighted by size, without intervals."""
    some = _results(facts)
    if not some:
        return None
    first = some[0]
    told = f"One run, {listed([one.data for one in some])}. {first.note or ''}".strip()
    if len(some) == 1:
        known = (first.bits, first.size, first.differences)
        return OneRun(
            first.losses, first.own, told, *known, by_kind=first.by_kind, tokens=first.tokens, rows=first.rows
        )
    losses = _mean([one.losses for one in some], [one.tokens for one in some])
    known = all(one.size and set(one.bits) == set(first.losses) for one in some)
    bits = _mean([one.bits for one in some], [one.size for one in some]) if known else {}
    said = OneRun(losses, first.own, told, bits, sum(one.size for one in some) if known else None)
    said.by_kind = {one.data: one.bits for one in some} if known else {}
    said.tokens = sum(one.tokens for one in some)
    return said


def _mean(values, weights):
    return {name: sum(one[name] * w for one, w in zip(values, weights)) / sum(weights) for name in values[0]}


def per_byte(sample: Mapping[str, Any], nats: float) -> float | None:
    """Bits per byte of nats per token, on a sample's "tokens" and "bytes"; None where these are not known."""
    tokens, size = sample.get("tokens"), sample.get("bytes")
    return nats * tokens / size / math.log(2) if tokens and size else None
