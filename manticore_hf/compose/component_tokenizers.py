"""Components' tokenizers: finding and comparing them."""

import hashlib
import json
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from manticore_hf.compose.components import Resolved
from manticore_hf.modeling.aligned_tokenizers import FILES
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.references_manticore import sha256
from manticore_hf.utils.settings import PRESETS
from manticore_hf.utils.tokenizers import check_tokens, read_tokenizer

TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"
)  # fmt: skip


_QUIETLY = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


logger = logging.get_logger(__name__)


def find_tokenizer(found: Resolved, hub: dict) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a component comes with, or None.

    Args:
        found: A Resolved component.
        hub: Keyword arguments of the Hub client.
    """
    where = found.directory or found.repo_id
    if where is None:
        return None
    kwargs = {"subfolder": found.subfolder or ""}
    if found.repo_id:
        kwargs.update(revision=found.revision, **hub)
    # Without any of its files, AutoTokenizer makes an empty tokenizer from the model type alone.
    if not any(cached_file(where, file, **_QUIETLY, **kwargs) for file in TOKENIZER_FILES):
        return None
    try:
        return read_tokenizer(where, **kwargs)
    except ManticoreError as err:
        logger.warning(
            f"Component {found.address}: its tokenizer cannot be loaded, so it is not compared with others ({err})."
        )
        return None


def can_align(settings: Mapping) -> bool:
    """Whether a hybrid's settings (keys of ManticoreConfig) allow several tokenizers: one block, native embeddings."""
    preset = PRESETS.get(settings.get("preset", "default"), {})
    native = (settings.get("embeddings") or preset.get("embeddings")) == "native"
    return native and settings.get("num_blocks", 1) == 1 and settings.get("topology", "merge") == "merge"


def align(components: list[Resolved], hub: dict, wanted: str | None, possible: bool) -> dict:
    """The tokenizers of components that are to read text each by its own.

    Args:
        components: Resolved components.
        hub: Keyword arguments of the Hub client.
        wanted: "aligned", "transplant", or None: aligned where the tokenizers differ and that is possible.
        possible: Whether the hybrid's other settings allow it.

    Returns:
        {component: its tokenizer}; empty if all have the same, or it is not wanted.

    Raises:
        ManticoreError: It is wanted and cannot be done, or is no choice.
    """
    if wanted not in (None, "aligned", "transplant"):
        raise ManticoreError(f"tokenizers={wanted!r} is unknown; choose 'aligned' or 'transplant'.")
    if wanted == "transplant" or not possible or len(components) < 2 or any(one.transplant for one in components):
        if wanted == "aligned":
            raise ManticoreError(
                "tokenizers='aligned' needs two components or more, none with a transplanted vocabulary, in one block "
                "with embeddings 'native'."
            )
        return {}
    found = {one.name: find_tokenizer(one, hub) for one in components}
    missing = [one.address for one in components if found[one.name] is None]
    if missing:
        if wanted == "aligned":
            raise ManticoreError(
                f"Component {missing[0]} comes without a tokenizer that can be read, so it cannot read text by "
                "its own; put its tokenizer files beside its weights and give the directory or repository."
            )
        return {}
    vocabularies = [one.get_vocab() for one in found.values()]
    if all(one == vocabularies[0] for one in vocabularies):
        return {}
    for one in found.values():
        check_tokens(one)
    return found


def record_tokenizer(found: Resolved, hub: dict) -> dict:
    """What a component's entry records of its tokenizer: the SHA-256 of each file; of one without an address, none."""
    if found.repo_id is None:
        return {"files": None}
    where = {"subfolder": found.subfolder or "", "revision": found.revision, **hub}
    paths = {file: cached_file(found.repo_id, file, **_QUIETLY, **where) for file in FILES}
    return {"files": {file: sha256(path) for file, path in paths.items() if path is not None}}


def check_tokenizers(components: list, hub: dict) -> int | None:
    """Raises ManticoreError if two components that come with tokenizers map tokens to ids differently.

    Returns:
        The vocabulary's size if all components have a known one (it is the same then) and embeddings for all its
        tokens: the smallest of their embeddings' sizes. Else None.
    """
    vocabularies, transplanted = {}, {}
    for found in components:
        if found.transplant is not None:
            transplanted[found.address] = found.transplant["vocabulary"]
        elif (tokenizer := find_tokenizer(found, hub)) is not None:
            vocabularies[found.address] = tokenizer.get_vocab()
    remedy = (
        "components must share one tokenizer. Transplant the others' vocabulary to one of them (manticore-hf compose "
        "--transplant auto, or manticore_hf.compose_transplanted)."
    )
    for (one, first), (two, second) in zip(list(vocabularies.items()), list(vocabularies.items())[1:]):
        if first != second:
            token = next(iter(sorted(set(first.items()) ^ set(second.items()))))[0]
            raise ManticoreError(
                f"Components {one} and {two} have different vocabularies (token {token!r} has id {first.get(token)} "
                f"and {second.get(token)}); {remedy}"
            )
    known = {address: digest(vocabulary) for address, vocabulary in vocabularies.items()} | transplanted
    for (one, first), (two, second) in zip(list(known.items()), list(known.items())[1:]):
        if first != second:
            raise ManticoreError(f"Components {one} and {two} have different vocabularies; {remedy}")
    smallest = min(found.config.vocab_size for found in components)
    largest = max(next(iter(vocabularies.values())).values()) if vocabularies else smallest - 1
    return smallest if len(known) == len(components) and largest < smallest else None


def digest(vocabulary: dict) -> str:
    """SHA-256 of a vocabulary {token: id}, by which two of them compare."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()
