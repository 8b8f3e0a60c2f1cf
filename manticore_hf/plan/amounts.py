"""Bytes and counts, read from what people type; `utils.formatting` writes them."""

import re

from manticore_hf.modeling.bounds_manticore import ManticoreError, show

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50}


def parse_bytes(text: str | int | float, name: str = "memory") -> int:
    """ "80GB" (10**9), "24GiB" (2**30), "80G" or a plain number of bytes -> bytes.

    Args:
        text: What was typed.
        name: The option, for the message.

    Raises:
        ManticoreError: It is no positive amount.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmgtp]i?)?b?\s*", str(text).lower())
    value = float(found[1]) * (_UNITS | _BINARY)[found[2] or ""] if found else 0
    if not 0 < value < 10**18:
        raise ManticoreError(f"{name}={show(text)} is not an amount of memory; give for example 80GB, 24GiB or 8e10.")
    return int(value)


def parse_count(text: str | int | float, name: str) -> int:
    """ "5e8", "500M", "1.2B" or a plain number -> integer.

    Args:
        text: What was typed.
        name: The option, for the message.

    Raises:
        ManticoreError: It is no positive number.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmbt])?\s*", str(text).lower())
    value = float(found[1]) * {**_UNITS, "b": 10**9}[found[2] or ""] if found else 0
    if not 1 <= value < 10**18:
        raise ManticoreError(f"{name}={show(text)} is not a number of tokens; give for example 500M or 5e8.")
    return int(value)
