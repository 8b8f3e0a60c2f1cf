"""Ctrl-C ends a command with exit status 130 and no traceback, in its own process and in those that it starts."""

import contextlib
import sys
from collections.abc import Iterator

STATUS = 130  # as shells have it: 128 and the signal's number


@contextlib.contextmanager
def ends_if_interrupted(say: str | None = None) -> Iterator[None]:
    """Context that an interrupt ends with the process, without a traceback.

    Args:
        say: A line for stderr; None where the process that started this one says it.

    Raises:
        SystemExit: With status 130, after an interrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        if say is not None:
            print(f"\n{say}", file=sys.stderr)  # a bar or ^C may stand in the line
        raise SystemExit(STATUS) from None
