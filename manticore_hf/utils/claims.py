"""What may be claimed about a difference: nothing on too little text, without an interval, or against oneself."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from manticore_hf.utils.formatting import plural, signed

CLAIM_BYTES = 5_000
"""Fewest bytes of text on which a difference is called one."""
CLAIM_ROWS = 8
"""Fewest rows of text from which a confidence interval is drawn."""
ORIGINAL = "original {}"
"""What the row of a component is called that was measured before it was joined, with its own tokenizer."""
ONLINE = "online mixture"
"""What the row of the components' online mixture is called."""
UPKEEP = (
    "Components stay as they were when they were joined. Join them anew when one has a new version or your text has "
    "changed, and let `manticore-hf compare` say, on new documents, whether the hybrid still pays."
)
"""Who reads a card or a report on whether it needs looking after."""
_ROUNDING = 2e-5  # nats per token: what the same mixture differs by, calculated in another order
_EQUAL = 2e-4  # where an interval shows that no row differs by more, either


def claim(
    name: str, difference: Sequence[float | None] | None, size: int | None, what: str = "It", rows: int | None = None
) -> str:
    """A sentence on a hybrid and a baseline that claims no more than was measured.

    Args:
        name: The baseline.
        difference: [bits per byte of the baseline minus the hybrid's, low, high], the ends None where there is no
            interval; None if nothing is known.
        size: Bytes of text, None if unknown.
        what: Who is compared.
        rows: Rows of text, None if unknown: says why there is no interval.
    """
    if size is not None and size < CLAIM_BYTES:
        return f"No claim is made against {name}: {too_little(size, None)}."
    if size is None or difference is None or None in difference:
        return f"No claim is made against {name}: {_why_none(size, rows)}."
    gain, low, high = difference
    if low <= 0 <= high:
        interval = f"95 % confidence: {signed(low, 4)} to {signed(high, 4)}"
        return f"{what} shows no clear difference from {name}: {signed(gain, 4)} bits per byte ({interval})."
    word, ends = "better" if gain > 0 else "worse", sorted(map(abs, (low, high)))
    interval = f"95 % confidence: {ends[0]:.4f} to {ends[1]:.4f}"
    return f"{what} is {abs(gain):.4f} bits per byte {word} than {name} ({interval})."


def too_little(size: int | None, rows: int | None, unit: str = "row") -> str | None:
    """Why a text carries no claim, as the end of a sentence; None where it is enough, or how much it is is not known.

    Args:
        size: Bytes of text.
        rows: Rows, or documents, over which an interval is drawn.
        unit: What these are.
    """
    if size is not None and size < CLAIM_BYTES:
        return f"{size:,} bytes of text are too few (at least {CLAIM_BYTES:,})"
    if rows is not None and rows < CLAIM_ROWS:
        are = "is" if rows == 1 else "are"
        return f"{plural(rows, unit)} of text {are} too few for an interval (at least {CLAIM_ROWS})"
    return None


def _why_none(size, rows):
    """Why there is no confidence interval, as a part of a sentence."""
    if rows is not None and rows < CLAIM_ROWS:
        return f"there is no confidence interval, which takes at least {CLAIM_ROWS} rows of text ({rows} here)"
    return "there is no confidence interval" + (", and how much text it was is not known" if size is None else "")


def more_rows(rows: int | None, size: int | None = None) -> str:
    """What to do about too little text for a claim, as a sentence; "" where it is enough, or unknown.

    Args:
        rows: Rows of text.
        size: Bytes of text, None if unknown: where they are too few, shorter rows do not help.
    """
    few = size is not None and size < CLAIM_BYTES
    if not few and (rows is None or rows >= CLAIM_ROWS):
        return ""
    return "Use more text." if few else "Use more text, or a smaller --block-size."


def itself(
    losses: Mapping[str, float],
    differences: Mapping[str, Sequence[float | None]] | None = None,
    own: str = "hybrid",
    mixture: str | None = None,
) -> list[str]:
    """Names of the untrained mixtures of the components that a hybrid is itself: those are no baselines.

    Losses alone do not tell: of components that lose the same everywhere, every mixture loses that, too.

    Args:
        losses: {name: nats per token}.
        differences: {name: [bits per byte minus the hybrid's, low, high]}, as far as known.
        own: The hybrid's name.
        mixture: The hybrid's setting; None if it is not known.
    """
    kinds = {None: ("ensemble", ONLINE), "online": (ONLINE,)}.get(mixture, ("ensemble",))

    def same(name):
        ends = [end for end in (differences or {}).get(name, ()) if end is not None]
        apart = abs(losses[name] - losses[own])
        return apart < (_EQUAL if len(ends) == 3 else _ROUNDING) and all(abs(end) < _EQUAL for end in ends)

    return [name for name in kinds if name in losses and own in losses and same(name)]


def without_itself(result: Any, mixture: str | None) -> Any:
    """A result without the untrained mixture that the hybrid is itself; its note then says so.

    Args:
        result: A dataclass with `losses`, `own`, `bits`, `differences`, `by_kind` and `note`, as OneRun and Result.
        mixture: As `itself` takes it.
    """
    same = itself(result.losses, result.differences, result.own, mixture)
    if not same or len(result.losses) < 3:
        return result

    def left(values):
        return {name: value for name, value in values.items() if name not in same}

    kinds = {kind: left(bits) for kind, bits in result.by_kind.items()}
    said = f"The hybrid is the {same[0]} of its components, which is therefore no baseline."
    kept = {key: left(getattr(result, key)) for key in ("losses", "bits", "differences")}
    return dataclasses.replace(result, **kept, by_kind=kinds, note=f"{result.note or ''} {said}".strip())
