"""What may be set in a comparison: contenders and grids; the options of `manticore-hf compare`.

Imports neither torch nor Transformers: a command's help is printed before they are.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.settings import CHOICES

if TYPE_CHECKING:
    from manticore_hf.training.recipe import Recipe


@dataclass
class CompareArguments:
    """Contenders and grid. What is None comes from the recipe."""

    test: str = field(metadata={"help": "Held-out documents: text, jsonl, csv or parquet file, or a Hub data set."})
    validation: str | None = field(
        default=None,
        metadata={
            "help": "Text that settings are chosen on. Default: the recipe's split, whose rows may come from "
            "documents that are also in the training rows."
        },
    )
    test_split: str = field(default="test", metadata={"help": "Split of a Hub data set."})
    encoding: str | None = field(
        default=None, metadata={"help": "Of the test and validation text, e.g. latin-1. Default: UTF-8, or its mark's."}
    )
    max_test_tokens: int | None = field(default=None, metadata={"help": "Test on at most this many tokens."})
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "Seeds of order, gates and projectors."})
    learning_rates: tuple[float, ...] | None = field(default=None, metadata={"help": "Learning rates for fine-tuning."})
    gate_learning_rates: tuple[float, ...] | None = field(
        default=None, metadata={"help": "Learning rates of gates and weights trained alone over tuned components."}
    )
    online_etas: tuple[float, ...] = field(
        default=(0.1, 0.3, 1.0),
        metadata={"help": "online_eta values of the online mixtures; the validation text chooses."},
    )
    online_decays: tuple[float, ...] = field(
        default=(0.8, 0.95), metadata={"help": "online_decay values of the online mixtures, likewise."}
    )
    epochs: tuple[float, ...] | None = field(default=None, metadata={"help": "Passes over the text in fine-tuning."})
    blocks: tuple[int, ...] | None = field(default=None, metadata={"help": "Numbers of blocks of the hybrids."})
    projectors: tuple[str, ...] | None = field(
        default=None, metadata={"help": "Kinds of projectors of hybrids of several blocks: linear, mlp, none."}
    )
    spaces: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "Spaces in which predictions are mixed, of gates and hybrids: logprob, prob. "
            "Default: both for gates; of a hybrid, what its recipe says or it chooses."
        },
    )
    loss_weights: tuple[tuple[float, float], ...] | None = field(
        default=None,
        metadata={
            "help": "Pairs mix_loss_weight:component_loss_weight of the hybrids, such as 1:0 or 0.3:1. "
            "Default: what the recipe says, or the hybrid chooses.",
            "metavar": "MIX:OWN",
        },
    )
    from_tuned: bool = field(
        default=False, metadata={"help": "Also start every hybrid from the components that were tuned alone."}
    )
    prune: bool = field(
        default=False, metadata={"help": "Also prune every hybrid, with recovery distillation on the text."}
    )
    allow_outside: bool = field(default=False, metadata={"help": "Let the recipe name files outside its own folder."})
    singles: tuple[str, ...] = field(default=(), metadata={"help": "Other models, of any tokenizer, tuned likewise."})
    all_text: str | None = field(
        default=None,
        metadata={"help": "The components' own training text: also retrain each component on all of it and the text."},
    )
    retrain: tuple[str, ...] | None = field(
        default=None, metadata={"help": "Names of the components that are retrained on all text. Default: all."}
    )

    def __post_init__(self):
        if not self.seeds:
            raise ManticoreError("seeds is empty; give at least one, three or more for a result.")
        for name in ("online_etas", "online_decays"):
            if not getattr(self, name) or not max(getattr(self, name)) <= (1 if name == "online_decays" else 1e6):
                raise ManticoreError(
                    f"{name}={list(getattr(self, name))} must be numbers, at least one, decays up to 1."
                )
        for name in (
            "seeds",
            "blocks",
            "epochs",
            "learning_rates",
            "gate_learning_rates",
            "online_etas",
            "online_decays",
        ):
            values = getattr(self, name) or ()
            low = 0 if name == "seeds" else 1 if name == "blocks" else 1e-12
            if len(set(values)) != len(values) or not all(low <= value < 2**32 for value in values):
                raise ManticoreError(f"{name}={list(values)} must be different numbers, from {low:g} to below 2**32.")
        for name, key in (("projectors", "projector"), ("spaces", "mixture_space")):
            for value in getattr(self, name) or ():
                if value not in CHOICES[key]:
                    raise ManticoreError(f"{name}: {value!r} is none of {list(CHOICES[key])}.")

    def grid(self, recipe: "Recipe") -> list[dict]:
        """Settings of fine-tuning to choose from: the same for every model of the comparison."""
        finetune = stage_settings(recipe, "finetune")
        rates = self.learning_rates or (finetune.get("learning_rate", 5e-5),)
        epochs = self.epochs or (finetune.get("num_train_epochs", 3),)
        return [{"learning_rate": rate, "num_train_epochs": passes} for rate in rates for passes in epochs]

    def gate_grid(self) -> list[dict]:
        """Settings of gates over tuned components to choose from."""
        rates = [{"gate_learning_rate": rate} for rate in self.gate_learning_rates or ()] or [{}]
        spaces = [{"mixture_space": space} for space in self.spaces or CHOICES["mixture_space"]]
        return [{**space, **rate} for space in spaces for rate in rates]

    def online_grid(self) -> list[dict]:
        """Settings of online mixtures to choose from."""
        return [{"online_eta": eta, "online_decay": decay} for eta in self.online_etas for decay in self.online_decays]

    def hybrid_grid(self, recipe: "Recipe") -> list[dict]:
        """Settings of hybrids to choose from: those of fine-tuning, with every space and pair of loss weights."""
        weights = [{"mix_loss_weight": mix, "component_loss_weight": own} for mix, own in self.loss_weights or ()]
        return [
            {**one, **space, **weight}
            for one in self.grid(recipe)
            for space in self._spaces()
            for weight in weights or [{}]
        ]

    def _spaces(self):
        return [{"mixture_space": space} for space in self.spaces or ()] or [{}]


def parse_loss_weights(text: str) -> tuple[float, float]:
    """ "0.3:1" as (0.3, 1.0)."""
    try:
        mix, own = (float(part) for part in text.split(":"))
        return mix, own
    except ValueError:
        raise ManticoreError(f"loss_weights: {text!r} is not a pair mix:own of numbers, as 1:0 or 0.3:1.") from None


def stage_settings(recipe: "Recipe", stage: str) -> dict | None:
    """The settings of the first stage of that name, or None if the recipe has none."""
    return next((dict(settings) for name, settings in recipe.stages if name == stage), None)
