"""Trains two components, joins them in every way, trains each on the task with half of the keys, and asks the others.

    manticore-hf composition --output-dir composition

One component adds, the other knows a private table; the task is to add what the table says of two keys. Whoever has
only what the models predict cannot do it for keys that were not trained on: neither prediction, nor any mixture of
them, has anything to do with the sum. All models are trained by the Trainer on the same rows in the same order; a
finished run is not run again, and both components are trained once for a seed.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from manticore_hf.experiments.baselines import Benchmark, Training, answers
from manticore_hf.experiments.composition.conditions import Condition, build, calibrate, conditions
from manticore_hf.experiments.composition.glossary import GlossaryTask
from manticore_hf.experiments.composition.recall import RecallTask
from manticore_hf.experiments.composition.texts import IGNORE, CompositionTask
from manticore_hf.experiments.scratch_models import from_scratch
from manticore_hf.modeling.settings_manticore import ManticoreError

TASKS = {"sums": CompositionTask, "glossary": GlossaryTask, "recall": RecallTask}  # by their names in commands
TRAINED = {"warmup_steps": 50, "max_grad_norm": 1.0, "disable_tqdm": True}
CALIBRATED_ON = 2500  # rows of a component's text


@dataclass(frozen=True)
class CompositionTraining(Training):
    """How both components are built, and all models trained.

    Attributes:
        smoothing: Share of the table's labels that goes to all tokens: it draws the states at all keys of one value
            together, so that a linear map can read them (Müller et al., arXiv 1906.02629).
        noise: NEFTune's alpha for the adder (Jain et al., arXiv 2310.05914), which then understands what is not quite
            a digit.
    """

    layers: int = 3
    hidden_size: int = 64
    epochs: int = 1
    learning_rate: float = 4e-3  # of the components; each condition has its own
    weight_decay: float = 0.01
    batch_size: int = 16
    smoothing: float = 0.1
    noise: float = 2.0


def run_composition(
    task: CompositionTask,
    output_dir: str | Path,
    training: CompositionTraining | None = None,
    only: list[str] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Trains and scores what is not finished yet, and prints all of it.

    Args:
        task: What is written; its seed should be that of the training.
        output_dir: Where each run's JSON goes; runs that are finished there are read instead.
        training: CompositionTraining; default: that.
        only: Names of the conditions to run; default: all of `models.conditions`.
        quiet: No progress bar and no table.

    Returns:
        A result for each condition: model, unseen and trained (shares of the answers that are right), settings.

    Raises:
        ManticoreError: There is no such condition, or something in the settings cannot be used.
    """
    training = training or CompositionTraining(seed=task.seed)
    known = conditions(training.layers, tuple(task.parts))
    if unknown := set(only or ()) - set(known):
        raise ManticoreError(f"{sorted(unknown)} are not conditions; choose from {list(known)}.")
    wanted = {name: known[name] for name in only or known}
    if training.layers < (most := max(one.hybrid.get("num_blocks", 1) for one in wanted.values())):
        raise ManticoreError(f"layers={training.layers}: {most} blocks are merged, so that at least {most} are needed.")
    results = Composition(task, output_dir, training, quiet).compare(wanted)
    if not quiet:
        print(f"\n{task.num_keys} keys, seed {task.seed}; shares of answers that are right")
        print(f"{'':28}{'trained':>12}", *(f"{name + ' keys':>14}" for name in task.asked), sep="")
        for row in results:
            shares = (f"{row[name]:14.3f}" for name in task.asked)
            print(f"{row['model']:28}{row['trained_parameters']:12,}", *shares, sep="")
    return results


class Composition(Benchmark):
    """The components and conditions of one task and seed."""

    @property
    def positions(self) -> int:
        """The longest row of any text."""
        return self.task.positions

    def wrap(self, lm: nn.Module) -> nn.Module:
        """The model itself."""
        return lm

    def compare(self, wanted: dict[str, Condition]) -> list[dict[str, Any]]:
        """Runs what is not finished; returns a result for each condition, by name, that is wanted."""
        missing = [one for name, one in wanted.items() if self._is_missing(name, one)]
        texts = ["train"] * sum(one.learning_rate is not None for one in missing)
        texts += [part.text for name, part in self.task.parts.items() if missing and self._is_missing(name)]
        steps = sum(-(-len(self.data(text)) // self.training.batch_size) for text in texts)
        with tqdm(total=self.training.epochs * steps, unit="step", disable=self.quiet or not steps) as self.bar:
            if missing:
                for name in self.task.parts:
                    self._part(name)
            return [self._condition(name, one) for name, one in wanted.items()]

    def _is_missing(self, name, condition=None):
        return self._finished(self._file(name, self._what(name, condition))[0]) is None

    def component(self, name: str) -> PreTrainedModel:
        """A trained component, as an ordinary model of its own."""
        model = from_scratch(self.task.parts[name].family, *self.sizes, seed=self.training.seed)
        weights = self._file(name, self._what(name))[0].with_suffix(".safetensors")
        model.load_state_dict(load_file(weights), strict=False)  # of tied tensors the file has one
        return model

    @torch.no_grad()
    def alone(self) -> dict[str, float]:
        """What each component can of the test by itself, once it is trained.

        Returns:
            By name: of the one that bridges begin from the share of the keys whose value it says, whichever of a row;
            of the other the share of the answers that are right where it is told the values, in the keys' last token.
        """
        (receiver, sender), asked = self.task.parts, self.data("test")
        ids, values = torch.tensor(asked["input_ids"]), self.task.said
        known = self.task.told(ids)
        there = known != IGNORE
        said = self.component(sender).eval()(input_ids=ids).logits[..., values.start : values.stop].argmax(-1)
        right = (said + values.start == known)[there]
        answer = self.component(receiver).eval()(input_ids=torch.where(there, known, ids)).logits
        found = [torch.tensor(one) for one in self.pick(answer, {"labels": torch.tensor(asked["labels"])})]
        shares = right, (found[0] == found[1]).all(-1)
        return {name: share.float().mean().item() for name, share in zip((sender, receiver), shares)}

    def depends_on(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """As in the base; a component depends on nothing that the task is trained and asked with."""
        used = dataclasses.asdict(self.task)
        if "component" in what:
            others = {"num_train", "num_test", "pairs", "num_sums", "num_table"} - {self.task.parts[what["name"]].rows}
            used = {key: value for key, value in used.items() if key not in others}
        return used

    def _what(self, name, condition=None):
        if condition is None:
            return {"name": name, "component": self.task.parts[name].family}
        return {"condition": dataclasses.asdict(condition)}

    def _part(self, name):
        start, one = (
            partial(from_scratch, self.task.parts[name].family, *self.sizes, seed=self.training.seed),
            self.training,
        )
        own = {"neftune_noise_alpha": one.noise or None}, {"label_smoothing_factor": one.smoothing}
        own = dict(zip(self.task.parts, own))[name] | TRAINED
        self._run(name, self._what(name), start, True, self.task.parts[name].text, [_Bar(self.bar)], **own)

    def _condition(self, name, condition):
        def start():
            model = build(condition, self.component, self.training.seed)
            if condition.calibrated:
                own, text = (
                    torch.tensor(self.data(self.task.parts[name].text)[:CALIBRATED_ON]["input_ids"])
                    for name in self.task.parts
                )
                calibrate(model, text, own if condition.quiet else None)
            return model

        split, own = (None, {}) if condition.learning_rate is None else ("train", TRAINED)
        own = own | {"learning_rate": condition.learning_rate}
        return self._run(name, self._what(name, condition), start, split=split, callbacks=[_Bar(self.bar)], **own)

    def _score(self, models):
        """The share of right answers of each text of `task.asked`, and the number of weights that were trained."""
        found = {"trained_parameters": sum(p.numel() for p in models[0].parameters() if p.requires_grad)}
        for name, text in self.task.asked.items():
            said, wanted = answers(models, self.data(text), self.pick, 50, arguments=self.forward_arguments, quiet=True)
            found[name] = sum(one == other for one, other in zip(said, wanted)) / len(wanted)
        return found

    def pick(self, scores: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[list, list]:
        """The tokens of every answer, as said and as they are."""
        asked = batch["labels"][:, 1:] != -100
        return tuple(
            one[asked].view(-1, self.task.answer).tolist()
            for one in (scores.argmax(-1)[:, :-1], batch["labels"][:, 1:])
        )

    def _say(self, text):
        self.bar.set_description(text.partition(":")[0])


class _Bar(TrainerCallback):
    """Moves a bar that several runs share."""

    def __init__(self, bar):
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
