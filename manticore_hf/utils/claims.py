"""What may be claimed about a difference: nothing on too little text, and nothing without an interval."""

from collections.abc import Sequence

CLAIM_BYTES = 5_000
"""Fewest bytes of text on which a difference is called one."""
ORIGINAL = "original {}"
"""What the row of a component is called that was measured before it was joined, with its own tokenizer."""


def claim(name: str, difference: Sequence[float | None] | None, size: int | None, what: str = "It") -> str:
    """A sentence on a hybrid and a baseline that claims no more than was measured.

    Args:
        name: The baseline.
        difference: [bits per byte of the baseline minus the hybrid's, low, high], the ends None where there is no
            interval; None if nothing is known.
        size: Bytes of text, None if unknown.
        what: Who is compared.
    """
    if size is not None and size < CLAIM_BYTES:
        return f"No claim is made against {name}: {size:,} bytes of text are too few (at least {CLAIM_BYTES:,})."
    if size is None or difference is None or None in difference:
        return f"No claim is made against {name}: there is no confidence interval."
    gain, low, high = difference
    interval = f"95 % confidence: {low:+.4f} to {high:+.4f}"
    if low <= 0 <= high:
        return f"{what} shows no difference from {name}: {gain:+.4f} bits per byte ({interval})."
    word = "better" if gain > 0 else "worse"
    return f"{what} is {abs(gain):.4f} bits per byte {word} than {name} ({interval})."
