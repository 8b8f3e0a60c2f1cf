"""Silences packages that Transformers imports if they are installed, and that print something at every start."""

import contextlib
import logging
from collections.abc import Iterator

_OPTIONAL = ("torchao", "bitsandbytes", "torch.utils._pytree")  # the last warns of torchao's classes


@contextlib.contextmanager
def quiet_optional_packages() -> Iterator[None]:
    """Context in which they do not warn of parts that this machine lacks, which no user of a hybrid asked for.

    Errors are said, and levels that the user has set stay.
    """
    changed = [one for one in map(logging.getLogger, _OPTIONAL) if one.level == logging.NOTSET]
    for logger in changed:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger in changed:
            logger.setLevel(logging.NOTSET)
