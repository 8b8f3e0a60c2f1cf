"""What may be set of a hybrid: one list, from which command line, recipes and docs come.

Imports neither torch nor Transformers, so that a command's help can be printed without them. A published repository
has the names, defaults and choices alone (`modeling/settings_manticore.py`): its settings are given.
"""

from dataclasses import dataclass, field, fields

from manticore_hf.modeling.settings_manticore import CHOICES as ALLOWED

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

    num_blocks: int = _setting(1, "Blocks that every component is cut into; at most the depth of the shallowest.")
    block_layers: dict[str, list[int]] | None = _setting(
        None, 'Layers per block of each component, {"name": [4, 2], ...}. Default: as even as possible.'
    )
    preset: str = _setting("default", "Supplies the settings that are not given.", choices=tuple(PRESETS))
    projector: str | None = _preset(
        "Maps between feature spaces: linear (paper, section 3.1), mlp (two layers, GELU, residual), or none (pad and "
        "truncate).",
        *ALLOWED["projector"],
    )
    projector_init: str | None = _preset(
        "How linear projectors are initialised: calibrated (solved in closed form by the first stage that has text; "
        "the identity until then), identity, or default (the framework's). Others start as the identity.",
        *ALLOWED["projector_init"],
    )
    gate: str | None = _preset(
        "Projector only (none), or projector and raw feature mixed by the block's alpha (alpha, paper).",
        *ALLOWED["gate"],
    )
    reference_component: str | None = _setting(
        None,
        "With gate none: component whose states define the shared space, so its projectors are the identity. "
        "Default: the first; calibration picks the one with the lowest loss.",
    )
    mixture: str | None = _preset(
        "One weight per block and component (static, paper), a per-token gate in the last block (token), or untrained "
        "weights that follow each component's loss on the tokens so far (online).",
        *ALLOWED["mixture"],
    )
    gate_past_losses: bool = _setting(
        False, "With mixture token: the gate also reads each component's loss on the tokens so far."
    )
    gate_lag: int = _setting(1, "With mixture token or online: the weights are computed at every n-th token and kept.")
    online_eta: float = _setting(0.1, "With mixture online: weights scale with exp(-eta * decayed loss in nats).")
    online_decay: float = _setting(0.95, "With mixture online: factor by which past losses decay per token, 0 to 1.")
    online_share: float = _setting(0.05, "With mixture online: share of the weights kept at alpha, from 0 to 1.")
    mixture_space: str | None = _preset(
        "Mean of the components' distributions: geometric (logprob) or arithmetic (prob).", *ALLOWED["mixture_space"]
    )
    embeddings: str | None = _preset(
        "Each component's own embeddings and last state (native), all through the shared space (mixed, paper), or the "
        "same with new ones drawn from N(0, 0.02) (fresh).",
        *ALLOWED["embeddings"],
    )
    head_mixture: str | None = _preset(
        "Block whose alpha mixes the heads (the paper's code: first).", *ALLOWED["head_mixture"]
    )
    mix_loss_weight: float | None = _preset("Weight of the mixture's cross-entropy.")
    component_loss_weight: float | None = _preset("Weight of the summed cross-entropies of the components' heads.")
    mixture_weights: list | None = _setting(
        None,
        "Exact mixture weights [blocks][components]; a null row is learned, a component at 0 is not run in that "
        "block. Default: learned.",
    )
    vocab_size: int | None = _setting(
        None, "Size of the common vocabulary; rows beyond it are padding. Default: inferred."
    )
    tokenizer_component: str | None = _setting(None, "Component whose tokenizer is the hybrid's. Default: the first.")
    topology: str = _setting(
        "merge",
        "Replace states by their mixture after each of num_blocks blocks (merge), or run components side by side as in "
        "one block, with bridges that add to their states along the way (bridge).",
        choices=ALLOWED["topology"],
    )
    bridge_blocks: int = _setting(2, "With topology bridge: blocks that bridges may connect; see block_layers.")
    bridges: list | None = _setting(
        None,
        'With topology bridge: list of {"from": component, "to": component, "from_block": block (from 0) to read, or '
        '"last" (default), "to_block": block to add before (default: each), "kind": as bridge_kind, "weight": exact}, '
        '"others" (each component to all others, block to next block; the default) or "self" (each to itself).',
    )
    bridge_kind: str = _setting(
        "linear",
        "A linear map of the other component's state at this token, or causal cross-attention to its states so far.",
        choices=ALLOWED["bridge_kind"],
    )
    bridge_rank: int | None = _setting(None, "Rank of linear bridges (default: full), or width of attention bridges.")
    bridge_heads: int = _setting(4, "Heads of attention bridges.")
    bridge_alpha: bool = _setting(False, "Whether bridges get searchable weights, over (none, those into a place).")


CHOICES = {one.name: one.metadata["choices"] for one in fields(HybridSettings) if one.metadata.get("choices")}
FILLED = tuple(one.name for one in fields(HybridSettings) if one.metadata.get("preset"))  # by a preset
