"""Whose vocabulary a hybrid reads: components' tokenizers compared, and components whose vocabulary was transplanted.

A transplanted component keeps its body by reference; its embedding and head have rows for another tokenizer's tokens
and are the hybrid's own. The tensors of its checkpoint under the same names are never read: not where the hybrid's file
lacks them, and not where they have the same shape by chance.
"""

import hashlib
import json

from transformers import AutoTokenizer
from transformers.utils import cached_file, logging

from .configuration_manticore import ManticoreError

TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"
)  # fmt: skip
_QUIETLY = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}

logger = logging.get_logger(__name__)


def find_tokenizer(found, hub):
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
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **kwargs)
    except Exception as err:
        logger.warning(
            f"Component {found.address}: its tokenizer cannot be loaded, so it is not compared with others ({err})."
        )
        return None


def check_tokenizers(components, hub):
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


def digest(vocabulary):
    """SHA-256 of a vocabulary {token: id}, by which two of them compare."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def end_names(component):
    """Names of a causal LM's embedding and head tensors."""
    ends = {id(component.get_input_embeddings()), id(component.get_output_embeddings())}
    return {
        f"{path}.{name}" for path, module in component.named_modules() if id(module) in ends
        for name, _ in module.named_parameters(recurse=False)
    }  # fmt: skip


def own_vocabulary(model, entry, ties):
    """Names of a transplanted component's embedding and head tensors in the hybrid; empty for other components.

    Args:
        model: The hybrid.
        entry: The component's entry in the configuration.
        ties: The model's `tie_groups`.
    """
    if entry["transplant"] is None:
        return set()
    names = {f"{entry['name']}.{name}" for name in end_names(model.component(entry["name"]))}
    return names.union(*(ties.get(name, ()) for name in names))


def check_rows(entry, key, tensor, owner):
    """Raises ManticoreError unless a referenced embedding or head has the rows that the transplant was made from."""
    rows, recorded = tensor.get_shape()[0], entry["transplant"]["vocab_size"]
    if rows != recorded:
        raise ManticoreError(
            f"{owner}: {key} has {rows} rows; its vocabulary was transplanted from one of {recorded}. The "
            "configuration belongs to another commit of the component: use the config.json that was saved with these "
            "weights."
        )
