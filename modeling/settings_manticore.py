"""The settings of a hybrid with their defaults, and the error for what cannot be used. Imports nothing else."""

import unicodedata


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

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, "\n"))


SETTINGS = {
    "num_blocks": 1,
    "block_layers": None,
    "preset": "default",
    "projector": None,
    "projector_init": None,
    "gate": None,
    "reference_component": None,
    "mixture": None,
    "gate_past_losses": False,
    "gate_lag": 1,
    "online_eta": 0.1,
    "online_decay": 0.95,
    "online_share": 0.05,
    "mixture_space": None,
    "embeddings": None,
    "head_mixture": None,
    "mix_loss_weight": None,
    "component_loss_weight": None,
    "mixture_weights": None,
    "vocab_size": None,
    "tokenizer_component": None,
    "topology": "merge",
    "bridge_blocks": 2,
    "bridges": None,
    "bridge_kind": "linear",
    "bridge_rank": None,
    "bridge_heads": 4,
    "bridge_alpha": False,
}
"""Keys of a configuration and their defaults. What they mean stands where they are given: `HybridSettings` of the
package (manticore_hf.utils.settings), and its docs/composing.md."""

CHOICES = {
    "projector": ("linear", "mlp", "none"),
    "projector_init": ("default", "identity", "calibrated"),
    "gate": ("none", "alpha"),
    "mixture": ("static", "token", "online"),
    "mixture_space": ("logprob", "prob"),
    "embeddings": ("native", "mixed", "fresh"),
    "head_mixture": ("last", "first"),
    "topology": ("merge", "bridge"),
    "bridge_kind": ("linear", "attention"),
}
"""What some of them may be."""
