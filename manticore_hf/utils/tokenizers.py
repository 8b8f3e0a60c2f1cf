"""Tokenizers of hybrids and components, which may be strangers': no code of theirs is run, and nobody is asked to."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from manticore_hf.modeling.bounds_manticore import ManticoreError, reason
from manticore_hf.utils.files import check_link

_MOST_IDS = 2**25
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> BatchEncoding:
    """What a tokenizer makes of text, which may be a stranger's that cannot cut any.

    Args:
        tokenizer: The tokenizer.
        text: One text, or several.
        options: Of its call.

    Raises:
        ManticoreError: It fails, in whatever way.
    """
    try:
        return tokenizer(text, verbose=False, **options)
    except Exception as err:  # of the tokenizers library, which has a kind for all
        raise ManticoreError(
            f"The tokenizer {tokenizer.name_or_path!r} cannot encode a text: {reason(err)}. Repair it, or give another."
        ) from err


def check_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ManticoreError unless what the tokens of a tokenizer stand for can be told, and has a size."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ManticoreError(
            f"{type(tokenizer).__name__} is not backed by the tokenizers library, which is needed to tell what "
            "its tokens stand for; load it with AutoTokenizer, from a repository with tokenizer.json."
        )
    most = max(tokenizer.get_vocab().values(), default=None)
    if most is None:
        raise ManticoreError(f"The tokenizer {tokenizer.name_or_path!r} is empty: it has no tokens.")
    if most >= _MOST_IDS:
        raise ManticoreError(
            f"The tokenizer {tokenizer.name_or_path!r} has a token with the id {most}, beyond the rows of any model "
            f"({_MOST_IDS})."
        )


def tokenizer_at(address: str) -> PreTrainedTokenizerBase:
    """A tokenizer by its address: a directory, or "owner/name" or "owner/name@revision" of the Hub.

    Args:
        address: The address.

    Raises:
        ManticoreError: As `read_tokenizer`.
    """
    where, _, revision = (address, "", "") if os.path.isdir(address) else address.partition("@")
    return read_tokenizer(where, revision=revision or "main")


def read_tokenizer(source: str | os.PathLike, **options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory or repository.

    Args:
        source: Directory, or repository of the Hub.
        options: For the Hub's client (revision, subfolder, token), or gguf_file.

    Raises:
        ManticoreError: It cannot be read, needs code of its repository, or is a link out of its directory.
    """
    folder = Path(source, options.get("subfolder") or "")
    for path in folder.iterdir() if os.path.isdir(folder) else ():  # what is read is saved, and then pushed
        if path.suffix not in _WEIGHTS:
            check_link(path, source)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as err:  # a stranger's files fail in many ways, in two libraries
        what = f"The tokenizer {str(source)!r} cannot be read"
        if "trust_remote_code" in str(err):
            raise ManticoreError(
                f"{what}: it needs code of its own repository, which is not run. Put a tokenizer of Transformers' own "
                "classes in its place."
            ) from err
        raise ManticoreError(f"{what}: {reason(err)}") from err
