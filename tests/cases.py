"""Many cases in one test: cheaper than an item each where they share a fixture, and a failure still names its case."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def case(*what: object) -> Iterator[None]:
    """Context of one case of a test; what fails in it says which one that was."""
    try:
        yield
    except BaseException as err:
        err.add_note("In the case " + ", ".join(map(repr, what)))
        raise
