"""A tiny hybrid of each kind of which a repository carries other code; `root` is a folder for their components."""

from collections.abc import Callable
from pathlib import Path

import aligned_pairs
from hub_models import tiny
from transformers import PreTrainedModel

from manticore_hf import ComponentSpec, ManticoreForCausalLM, ManticoreForSequenceClassification, prune


def joined(*families: str, cls: type = ManticoreForCausalLM, **settings: object) -> PreTrainedModel:
    """A hybrid of tiny components, named by their families."""
    return cls.from_components([ComponentSpec(tiny(family), name=family) for family in families], **settings)


KINDS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "one block, attention only": lambda root: joined("gpt_neox", "llama"),
    "one block, a Mamba": lambda root: joined("gpt_neox", "mamba"),
    "one block, a Mamba-2": lambda root: joined("gpt_neox", "mamba2"),
    "K = 3, one block": lambda root: joined("gpt_neox", "mamba", "llama"),
    "classifier, a Mamba": lambda root: joined(
        "gpt_neox", "mamba", cls=ManticoreForSequenceClassification, num_labels=3
    ),
    "online, a Mamba": lambda root: joined("gpt_neox", "mamba", mixture="online"),
    "bridges, a Mamba": lambda root: joined("gpt_neox", "mamba", topology="bridge"),
    "aligned, attention only": lambda root: aligned_pairs.hybrid(root),
    "two blocks, attention only": lambda root: joined("gpt_neox", "llama", num_blocks=2),
    "two blocks, a Mamba": lambda root: joined("gpt_neox", "mamba", num_blocks=2),
    "pruned, a Mamba": lambda root: prune(joined("gpt_neox", "mamba", num_blocks=2), ["gpt_neox", "mamba"]),
    "K = 3, two blocks": lambda root: joined("gpt_neox", "mamba", "llama", num_blocks=2),
}
