"""Failures on demand: errors in place of a response, and responses that arrive spoiled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .messages import Response
from .repos import HubError

BODY_FAULTS = ("cut", "flip", "truncate")
FAULTS = ("status", "gated", "unauthorized", "missing", *BODY_FAULTS)


@dataclass
class Fault:
    """A failure to come, of `times` requests whose ``"METHOD path"`` the pattern is found in."""

    pattern: str
    kind: str
    times: int
    options: dict[str, Any]


def take(faults: list[Fault], method: str, path: str) -> Fault | None:
    """First fault that applies to the request, counted as used."""
    for fault in faults:
        spoils_nothing = fault.kind in BODY_FAULTS and method == "HEAD"
        if fault.times != 0 and not spoils_nothing and re.search(fault.pattern, f"{method} {path}"):
            fault.times -= 1
            return fault
    return None


def raise_error(fault: Fault) -> None:
    """Raises the error of a fault that replaces the response; returns for those that spoil it."""
    options = fault.options
    if fault.kind == "status":
        retry = {"Retry-After": str(options.get("retry_after", 0))}
        raise HubError(options.get("status", 503), "", options.get("message", "Injected fault"), retry)
    if fault.kind == "gated":
        raise HubError(options.get("status", 403), "GatedRepo", "Access to this repo is restricted.")
    if fault.kind == "unauthorized":
        # The Hub's wording: by it the client tells a bad token from a missing repo.
        raise HubError(401, "", "Invalid credentials in Authorization header")
    if fault.kind == "missing":
        raise HubError(404, options.get("code", "EntryNotFound"), "Not found")


def spoil(response: Response, fault: Fault) -> None:
    """Damages the body as a fault says; leaves it alone for those that replace the response."""
    size = len(response.body)
    if fault.kind == "cut":
        response.cut = fault.options.get("bytes", size // 2)
    elif fault.kind == "truncate":
        response.body = response.body[: fault.options.get("bytes", size // 2)]
    elif fault.kind == "flip" and size:
        at = min(fault.options.get("offset", 0), size - 1)
        response.body = response.body[:at] + bytes([response.body[at] ^ 0xFF]) + response.body[at + 1 :]
