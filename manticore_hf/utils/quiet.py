"""Silences output that is of no use to the user of a command: start-up messages of packages, bars within a step."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

# The third warns of torchao's classes; the last says that a Mamba is slow, whose kernels hybrids replace with their own
_OPTIONAL = ("torchao", "bitsandbytes", "torch.utils._pytree", "transformers.integrations.hub_kernels")


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
def quiet_loading(downloads: bool = False) -> Iterator[None]:
    """Context in which Transformers shows no bars of its own ("Loading weights"), for commands that have their own.

    Args:
        downloads: Whether the Hub's client shows its bars all the same.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown, hub = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if hub and downloads:  # which Transformers has switched off with its own
        enable_progress_bars()
    try:
        with _heeded_by_gguf():
            yield
    finally:
        with warnings.catch_warnings():  # which would say that HF_HUB_DISABLE_PROGRESS_BARS has the last word
            warnings.simplefilter("ignore")
            if shown:
                transformers_logging.enable_progress_bar()
            if hub:
                enable_progress_bars()


@contextlib.contextmanager
def _heeded_by_gguf():
    """Context in which Transformers' setting for bars counts for its reader of GGUF files, too."""
    from transformers.utils import logging as transformers_logging

    try:
        from transformers import modeling_gguf_pytorch_utils as reader

        theirs = reader.tqdm
    except (ImportError, AttributeError):  # of another version, which has no bar of its own
        yield
        return
    reader.tqdm = transformers_logging.tqdm
    try:
        yield
    finally:
        reader.tqdm = theirs


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Context in which `datasets` shows no bars ("Generating train split"), for reading; the Hub's client shows its."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    with warnings.catch_warnings():  # which would say that HF_DATASETS_DISABLE_PROGRESS_BARS has the last word
        warnings.simplefilter("ignore")
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
