"""What may be set of a hybrid: one list, from which configuration, command line, recipes and docs come.

Imports nothing else, so that a command's help can be printed without torch and Transformers.
"""

import unicodedata
from dataclasses import dataclass, field, fields


def printable(text: object, keep: str = "") -> str:
    """A text of whoever's as it may be shown: what would command a terminal or turn the reading order is written out.

    Args:
        text: Anything.
        keep: Characters that stay as they are, such as line breaks.
    """
    text = str(text)
    if text.isprintable():
        return text
    wide = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in wide)


class ManticoreError(ValueError):
    """A hybrid, component, file or setting that cannot be used; the message names it and says what to do."""

    def __init__(self, message: object = ""):
        super().__init__(printable(message, "\n"))


PRESETS = {
    # Roberts et al., section 3 and their released code (linear projectors of the framework's default initialisation,
    # gates equal to alpha, embeddings and heads mixed with the first block's alpha, loss of the mixture only).
    "paper": {
        "projector": "linear", "projector_init": "default", "gate": "alpha", "mixture": "static",
        "mixture_space": "logprob", "embeddings": "mixed", "head_mixture": "first",
        "mix_loss_weight": 1.0, "component_loss_weight": 0.0,
    },
    # What measured best so far (BENCHMARKS.md says on what).
    "default": {
        "projector": "linear", "projector_init": "calibrated", "gate": "none", "mixture": "token",
        "mixture_space": "prob", "embeddings": "native", "head_mixture": "last",
        "mix_loss_weight": 1.0, "component_loss_weight": 0.0,
    },
}  # fmt: skip


def _setting(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


def _preset(help, *choices):
    """A setting that a preset fills where it is not given."""
    return _setting(None, help, choices=choices, preset=True)


@dataclass
class HybridSettings:
    """How components are joined: keys of ManticoreConfig, options of `compose`, keys under `hybrid:` in a recipe."""

    num_blocks: int = _setting(1, "Blocks into which every component is cut; at most the depth of the shallowest.")
    block_layers: dict[str, list[int]] | None = _setting(
        None, 'Layers per block of each component, {"name": [4, 2], ...}. Default: as even as can be.'
    )
    preset: str = _setting("default", "Fills what is not given.", choices=tuple(PRESETS))
    projector: str | None = _preset(
        "Maps between feature spaces: linear (paper, section 3.1), mlp (two layers, GELU, residual), or none (pad and "
        "truncate).",
        *("linear", "mlp", "none"),
    )
    projector_init: str | None = _preset(
        "Where linear projectors start: calibrated (solved in closed form by the first stage that has text; the "
        "identity until then), identity, or default (the framework's). Others start as the identity.",
        *("default", "identity", "calibrated"),
    )
    gate: str | None = _preset(
        "Projector only (none), or projector and raw feature mixed by the block's alpha (alpha, paper).",
        *("none", "alpha"),
    )
    reference_component: str | None = _setting(
        None,
        "With gate none: component whose states are the shared space, so that its projectors are the identity. "
        "Default: the first; calibration takes the one with the lowest loss.",
    )
    mixture: str | None = _preset(
        "One weight per block and component (static, paper), a gate of the token in the last block (token), or weights "
        "that follow what each component has lost on the tokens so far, without training (online).",
        *("static", "token", "online"),
    )
    gate_past_losses: bool = _setting(
        False, "With mixture token: the gate also reads what each component has lost on the tokens so far."
    )
    gate_lag: int = _setting(1, "With mixture token or online: the weights are computed at every n-th token and kept.")
    online_eta: float = _setting(0.1, "With mixture online: weights go with exp(-eta * decayed loss in nats).")
    online_decay: float = _setting(0.95, "With mixture online: what a loss counts one token later, from 0 to 1.")
    online_share: float = _setting(0.05, "With mixture online: share of the weights that stays at alpha, from 0 to 1.")
    mixture_space: str | None = _preset(
        "Mean of the components' distributions: geometric (logprob) or arithmetic (prob).", *("logprob", "prob")
    )
    embeddings: str | None = _preset(
        "Each component's own embeddings and last state (native), all through the shared space (mixed, paper), or so "
        "with new ones drawn from N(0, 0.02) (fresh).",
        *("native", "mixed", "fresh"),
    )
    head_mixture: str | None = _preset(
        "Block whose alpha mixes the heads (the paper's code: first).", *("last", "first")
    )
    mix_loss_weight: float | None = _preset("Weight of the cross-entropy of the mixture.")
    component_loss_weight: float | None = _preset("Weight of the sum of the cross-entropies of the components' heads.")
    mixture_weights: list | None = _setting(
        None,
        "Exact mixture weights [blocks][components]; a row that is null is learned, a component at 0 is not run in "
        "that block. Default: learned.",
    )
    vocab_size: int | None = _setting(
        None, "Size of the common vocabulary; rows beyond it are padding. Default: found out."
    )
    tokenizer_component: str | None = _setting(None, "Component whose tokenizer is the hybrid's. Default: the first.")
    topology: str = _setting(
        "merge",
        "States are replaced by their mixture after each of num_blocks blocks (merge), or components run side by side "
        "as in one block, and bridges add to their states on the way (bridge).",
        choices=("merge", "bridge"),
    )
    bridge_blocks: int = _setting(2, "With topology bridge: blocks between which bridges may lead; see block_layers.")
    bridges: list | None = _setting(
        None,
        'With topology bridge: list of {"from": component, "to": component, "from_block": whose state is read, from 0, '
        'or "last" (default), "to_block": before which it is added (default: each), "kind": as bridge_kind, "weight": '
        'exact}, of "others" (each to each other, from block to next block; the default), "self" (each to itself).',
    )
    bridge_kind: str = _setting(
        "linear",
        "A linear map of the other component's state at this token, or causal cross-attention to its states so far.",
        choices=("linear", "attention"),
    )
    bridge_rank: int | None = _setting(None, "Rank of linear bridges (default: full), or width of attention.")
    bridge_heads: int = _setting(4, "Heads of bridges of kind attention.")
    bridge_alpha: bool = _setting(False, "Whether bridges have weights, over (none, those into a place), to search.")


CHOICES = {one.name: one.metadata["choices"] for one in fields(HybridSettings) if one.metadata.get("choices")}
FILLED = tuple(one.name for one in fields(HybridSettings) if one.metadata.get("preset"))  # by a preset
