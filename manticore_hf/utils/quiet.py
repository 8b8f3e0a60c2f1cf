"""Silences what says nothing to whoever runs a command: start-up messages of packages, bars within a step."""

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


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Context in which Transformers shows no bars of its own ("Loading weights"), nor the Hub's client.

    For steps of a command that has one bar for all of them, and that downloads nothing within.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown, downloads = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if downloads:  # which Transformers has switched off with its own
            enable_progress_bars()
