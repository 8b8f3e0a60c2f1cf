"""Are the components of a hybrid good at different things? Measured before any training, forward only.

What a hybrid should be trained on depends on it (BENCHMARKS.md). Where each component is strong on a different part of
the text, the mixture's loss alone lets them stay specialists, and a mean of probabilities silences the one that is
wrong. Where they are alike, their own losses keep all good, and a mean of log-probabilities does at least as well.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manticore_hf.evaluation.data import NO_LOSS, pad, separate
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.distributed import bar, broadcast_object, component_runner, is_main, print_main
from manticore_hf.utils.files import read_json, write_json
from manticore_hf.utils.objective import ALIKE, DIFFERENT, OBJECTIVE, SPECIALISTS, say_objective
from manticore_hf.utils.unwrap import hybrid_of

WINDOW = 64


@dataclass
class ComplementaryErrors:
    """How much the better component depends on the place in the text.

    Attributes:
        gain: Nats per token that are saved by taking, in every window, the component that was better on the other half
            of that window's tokens, instead of the component that is better over all. Near 0 (or below, by chance)
            where one component is the better one everywhere, or where which one is better cannot be told.
        losses: Loss of each component alone, nats per token.
        shares: Share of the windows that each component would be given.
        tokens: Predicted tokens it was measured on.
        window: Tokens of a window.
    """

    gain: float
    losses: dict
    shares: dict
    tokens: int
    window: int

    def to_dict(self) -> dict:
        """Plain values by attribute."""
        return dataclasses.asdict(self)


def awaits_objective(model: torch.nn.Module) -> bool:
    """Whether a hybrid's objective is still to be chosen, and can be: one block, own embeddings, two components."""
    config = model.config
    alone = config.num_blocks == 1 and config.embeddings == "native" and len(config.component_names) > 1
    return "open" in (config.objective or {}) and alone and config.route is None


def choose_objective(model: torch.nn.Module, rows: Dataset, **measuring: int) -> ComplementaryErrors:
    """Sets what a hybrid is trained on by whether its components make complementary errors on a text, before training.

    Args:
        model: A hybrid.
        rows: As `measure_complementary_errors` takes them; what it will be trained on.
        **measuring: tokens, window, batch_size.

    Returns:
        ComplementaryErrors. Of `mixture_space` and the loss weights the model's config gets what it says is open
        (`config.objective`; both, where nothing is), and notes what was measured.
    """
    config = model.config
    found = measure_complementary_errors(model, rows, **measuring)
    values = SPECIALISTS if found.gain > DIFFERENT else ALIKE
    chosen = (config.objective or {}).get("open", list(values))
    if "mixture_space" in chosen:
        config.mixture_space = values["mixture_space"]
    if "loss_weights" in chosen:
        config.mix_loss_weight, config.component_loss_weight = values["loss_weights"]
    config.objective = {"chosen": chosen, "gain": found.gain, "tokens": found.tokens, "window": found.window}
    return found


class ObjectiveWhenSharded(TrainerCallback):
    """Chooses the objective once the Trainer has sharded the hybrid: before, it may be too large for any device.

    What was chosen is kept in a file: a run that goes on after a kill has trained components to measure.

    Args:
        rows, batch_size: As `choose_objective` takes them.
        output: The run's directory.
    """

    FILE = "objective.json"

    def __init__(self, rows: Dataset, batch_size: int, output: str | Path):
        self.rows, self.batch_size, self.file = rows, batch_size, Path(output) / self.FILE

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Measures and chooses, or takes what was chosen before a kill; on every rank."""
        hybrid = hybrid_of(model)
        if not awaits_objective(hybrid):
            return
        config = hybrid.config
        known = broadcast_object(read_json(self.file) if is_main() and self.file.is_file() else None)
        if known is None:
            choose_objective(hybrid, self.rows, batch_size=self.batch_size)
            if is_main():
                write_json(self.file, {key: getattr(config, key) for key in OBJECTIVE})
        else:
            for key in OBJECTIVE:
                setattr(config, key, known[key])
        print_main(f"Objective: {say_objective(config)}.")


@torch.no_grad()
def measure_complementary_errors(
    model: torch.nn.Module, rows: Dataset, tokens: int = 16_384, window: int = WINDOW, batch_size: int = 8
) -> ComplementaryErrors:
    """Measures how complementary the components' errors on a text are.

    Every window's even tokens choose a component and its odd tokens count, and the other way round, so that chance
    alone gives no gain: a minimum over the same tokens would.

    Args:
        model: A soft hybrid, or any object with `component(name)`, `device` and in its `config` component_names and
            vocab_size.
        rows: Dataset of `input_ids` (and `labels`, whose -100 do not count), as `load_rows` makes them.
        tokens: Tokens to use, about.
        window: Predicted tokens within which one component is chosen.
        batch_size: Rows per forward pass.

    Returns:
        ComplementaryErrors.

    Raises:
        ManticoreError: No row has two predicted tokens.
    """
    names, sums, counts = model.config.component_names, [], []
    parts = [component_runner(model, name) for name in names]
    was_training = model.training
    model.eval()
    try:
        for batch in bar(_batches(rows, tokens, batch_size), desc="Comparing components", unit="batch", leave=False):
            ids, labels = (batch[key].to(model.device) for key in ("input_ids", "labels"))
            losses = torch.stack([_token_losses(part, ids, labels, model.config.vocab_size) for part in parts])
            kept = (labels[:, 1:] != -100).to(losses.dtype)
            halves = [_windows(losses * kept, window, half) for half in (0, 1)]
            sums.append(torch.stack(halves))  # [half, component, windows]
            counts.append(torch.stack([_windows(kept[None], window, half)[0] for half in (0, 1)]))
    finally:
        model.train(was_training)
    counts = torch.cat(counts, -1) if counts else torch.zeros(2, 0)
    whole = (counts > 0).all(0)  # a window of which one half predicts nothing chooses nothing
    if not whole.any():
        raise ManticoreError("No row has two tokens to predict: the components cannot be compared.")
    sums, counts = torch.cat(sums, -1)[..., whole].double(), counts[..., whole].double()
    chosen = sums.argmin(1)  # [half, windows]
    crossed = sums.gather(1, chosen.flip(0)[:, None])[:, 0]
    losses = sums.sum((0, 2)) / counts.sum()
    gain = losses.min() - crossed.sum() / counts.sum()
    shares = torch.stack([(chosen == k).double().mean() for k in range(len(names))])
    return ComplementaryErrors(
        gain.item(), dict(zip(names, losses.tolist())), dict(zip(names, shares.tolist())), int(counts.sum()), window
    )


def _batches(rows, tokens, batch_size):
    """Batches of rows spread evenly over the whole text, padded to one length."""
    wanted = max(1, tokens // max(1, max(map(len, rows[: min(len(rows), 64)]["input_ids"]))))
    step = max(1, len(rows) // wanted)
    chosen = separate(rows.select(range(0, len(rows), step)))
    return DataLoader(chosen, batch_size=batch_size, collate_fn=_pad)


def _pad(records):
    fill = {"input_ids": 0, "labels": NO_LOSS}
    return {key: pad([record[key] for record in records], value) for key, value in fill.items()}


def _token_losses(component, ids, labels, size):
    """[batch, time - 1] losses of the next token among `size` (the rest is padding); 0 where it does not count."""
    logits = component(input_ids=ids, use_cache=False).logits[:, :-1, :size].float()
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)


def _windows(values, window, half):
    """Sums over every other token of each window: [components, batch, time] to [components, batch * windows]."""
    values = F.pad(values, (0, -values.shape[-1] % window))
    return values.unflatten(-1, (-1, window))[..., half::2].sum(-1).flatten(1)
