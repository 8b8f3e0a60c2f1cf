"""Trains models of one task from scratch, a hybrid beside its baselines, and saves each run's result.

Every model is trained by the standard Trainer on the same sequences in the same order: AdamW, cosine to 1e-6, no
clipping, float32. What a task is, how it reads a model and how it is scored is said by subclasses of `Benchmark`.

Every run writes one JSON file, whose name carries a digest of all its settings, when it is finished; it is not run
again. A component's trained weights lie beside its file, because the ensemble needs them.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_model
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, default_data_collator

from manticore_hf.experiments.scratch_models import DESIGNED, from_scratch, hybrid_from_scratch, scratch_config
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.files import read_json, write_json

MIN_LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Training:
    """How every model of a comparison is built and trained; defaults are those of the MAD benchmark."""

    layers: int = 2  # of Transformers' kind, mixer and MLP: the benchmark's two mixers and two MLPs
    hidden_size: int = 128
    epochs: int = 200
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self):
        for name in ("layers", "hidden_size", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ManticoreError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.learning_rate > MIN_LEARNING_RATE:
            raise ManticoreError(
                f"learning_rate={self.learning_rate} must be above {MIN_LEARNING_RATE}, where its schedule ends."
            )


class Benchmark:
    """Models of one task and training setting; the data are made when first needed.

    Args:
        task: A dataclass with `name`, `vocab_size`, `num_train` and `dataset(split)`.
        output: Directory of the results.
        training: Training.
        quiet: No progress bars and no messages.
    """

    forward_arguments = {"use_cache": False}
    collate = staticmethod(default_data_collator)

    def __init__(self, task: Any, output: str | Path, training: Training, quiet: bool):
        self.task, self.output, self.training, self.quiet = task, Path(output), training, quiet
        self.output.mkdir(parents=True, exist_ok=True)
        self.splits, self.layers_of = {}, {}

    # ---- what a task says --------------------------------------------------------------------------------------------

    @property
    def positions(self) -> int:
        """Longest sequence that the models read."""
        raise NotImplementedError

    def wrap(self, lm: PreTrainedModel) -> nn.Module:
        """The model that is trained, of a causal LM or hybrid from scratch."""
        raise NotImplementedError

    def pick(self, scores: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[list, list]:
        """Predicted and wanted labels of a batch, each a list.

        Args:
            scores: [batch, ..., labels], of one model or of the ensemble.
            batch: What the model read, and its labels.

        Returns:
            (predicted, wanted): lists of as many entries.
        """
        raise NotImplementedError

    def measure(self, guesses: list, wanted: list) -> dict[str, float]:
        """The measures of all predicted and wanted labels: {"accuracy": share in [0, 1], ...}."""
        raise NotImplementedError

    def depends_on(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """The task's settings that a run depends on: all of them."""
        return dataclasses.asdict(self.task)

    def facts(self) -> dict[str, Any]:
        """What a result must be filed under beside the task's and the training's own settings."""
        return {}

    # ---- the models --------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Vocabulary, layers, width and longest sequence, as `scratch_config` takes them."""
        return self.task.vocab_size, self.training.layers, self.training.hidden_size, self.positions

    def sizes_of(self, family: str) -> tuple[int, int, int, int]:
        """`sizes` of a family, which may have layers of its own number."""
        vocabulary, layers, *rest = self.sizes
        return vocabulary, self.layers_of.get(family, layers), *rest

    def run(
        self,
        families: Sequence[str],
        baselines: bool = True,
        hybrid: Mapping[str, Any] | None = None,
        designed: bool = False,
        layers_of: Mapping[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        """Trains and scores what is not finished yet.

        Args:
            families: Model types. One: that model. Several: the hybrid of them.
            baselines: For a hybrid also each component alone, and the plain ensemble of those.
            hybrid: Keys of ManticoreConfig for the hybrid (num_blocks, preset, ...), and `alpha_learning_rate`, of its
                static mixture weights.
            layers_of: {model type: its layers}, of those that have others than the training says.
            designed: Also a hybrid that was designed by hand: `models.DESIGNED`.

        Returns:
            A list of results, the asked one first.

        Raises:
            ManticoreError: Something in the settings cannot be used.
        """
        families, self.layers_of = list(families), dict(layers_of or {})
        for family in self.layers_of.keys() - set(families):
            raise ManticoreError(f"layers_of: there is no model of type {family!r} here; there are {families}.")
        others = [DESIGNED] if designed and families != [DESIGNED] else []
        for family in families + others:  # what cannot be built is said before anything is trained
            scratch_config(family, *self.sizes_of(family))
        if len(families) == 1:
            results = [self.single(families[0], 0)]
        else:
            results = [self.hybrid(families, dict(hybrid or {}))]
            if baselines:
                results += [self.single(family, i) for i, family in enumerate(families)]
                results.append(self.ensemble(families))
        return results + [self.single(family, 0) for family in others]

    def single(self, family: str, index: int) -> dict[str, Any]:
        """Trains and scores one component alone.

        Args:
            family: Model type.
            index: Which start it has: that of the hybrid's component with this number.

        Returns:
            The result, as its JSON file has it.
        """
        return self._run(family, {"model": family, "start": index}, lambda: self._build(family, index), keep=True)

    def hybrid(self, families: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Trains and scores the hybrid of some families.

        Args:
            families: Model types, at least two.
            settings: Keys of ManticoreConfig.

        Returns:
            The result, as its JSON file has it.
        """

        wiring = {key: value for key, value in settings.items() if key != "alpha_learning_rate"}

        def build():
            layers = {family: self.sizes_of(family)[1] for family in families}
            lm = hybrid_from_scratch(families, *self.sizes, seed=self.training.seed, layers_of=layers, **wiring)
            return self._wrap(lm)

        name, rate = f"hybrid {'+'.join(families)}", settings.get("alpha_learning_rate")
        return self._run(name, {"hybrid": families, "settings": settings}, build, alpha_rate=rate)

    def ensemble(self, families: Sequence[str]) -> dict[str, Any]:
        """Scores the plain ensemble of the components trained alone (geometric mean of their predictions).

        Args:
            families: Model types, each trained by `single` before.

        Returns:
            The result, as its JSON file has it.
        """
        file, settings = self._file(f"ensemble {'+'.join(families)}", {"ensemble": families})
        if (result := self._finished(file)) is not None:
            return result
        models = []
        for index, family in enumerate(families):
            models.append(self._build(family, index))
            own, _ = self._file(family, {"model": family, "start": index})
            # Not strict: of tied tensors the file has one (which safetensors' own loading does not expect of hybrids)
            models[-1].load_state_dict(load_file(own.with_suffix(".safetensors")), strict=False)
        result = {"model": "ensemble of the components", "parameters": sum(map(_count, models))}
        return self._record(file, {**result, **self._score(models), **settings})

    def _build(self, family, index):
        return self._wrap(from_scratch(family, *self.sizes_of(family), seed=self.training.seed + index))

    def _wrap(self, lm):
        torch.manual_seed(self.training.seed)  # of what is put on top, the same for all
        return self.wrap(lm)

    def data(self, split: str) -> Dataset:
        """The split "train" or "test", made when it is first asked for."""
        if split not in self.splits:
            self.splits[split] = self.task.dataset(split)
        return self.splits[split]

    # ---- one run -----------------------------------------------------------------------------------------------------

    def _file(self, name, what):
        settings = {"task": self.depends_on(what), "training": dataclasses.asdict(self.training), "what": what}
        settings |= self.facts() | ({"layers_of": self.layers_of} if self.layers_of else {})
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        return self.output / f"{self.task.name}-{name.replace(' ', '-')}-{digest}.json", settings

    def _finished(self, file):
        weights = file.with_suffix(".safetensors")
        if not file.is_file():
            return None
        result = read_json(file)
        return None if result.get("weights") and not weights.is_file() else result

    def _run(self, name, what, build, keep=False, split="train", callbacks=None, alpha_rate=None, **own):
        """Scores a model, trained on a split (None: not at all); `own` are fields of TrainingArguments for it alone."""
        file, settings = self._file(name, what)
        if (result := self._finished(file)) is not None:
            self._say(f"{name}: finished before, {file}")
            return result
        model, start = build(), time.time()
        result = {"model": name, "parameters": _count(model), "steps": 0, "weights": keep}
        if split is not None:
            self._say(f"{name}: training on {len(self.data(split)):,} sequences, {self.training.epochs} epochs")
            trainer = Trainer(model, self._arguments(**own), self.collate, self.data(split), callbacks=callbacks)
            if alpha_rate is not None:
                _own_rate(trainer, alpha_rate)
            trainer.remove_callback(PrinterCallback)  # which stands in for a bar that nobody wants
            model.train()
            state = trainer.train()
            result |= {"steps": state.global_step, "train_loss": state.training_loss}
            result["seconds"] = round(time.time() - start, 1)
        mixing = [part for part in model.modules() if hasattr(part, "mixture_weights")]
        if mixing and len(mixing[0].config.component_names) > 1:
            result["mixture_weights"] = mixing[0].mixture_weights().tolist()
        result |= self._score([model])
        if keep:
            save_model(model, file.with_suffix(".safetensors"))
        return self._record(file, {**result, **settings})

    def _arguments(self, **own):
        one = self.training
        settings = {
            "output_dir": str(self.output),
            "num_train_epochs": one.epochs,
            "learning_rate": one.learning_rate,
            "weight_decay": one.weight_decay,
            "per_device_train_batch_size": one.batch_size,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": MIN_LEARNING_RATE},
            "max_grad_norm": 0.0,
            "seed": one.seed,
            "data_seed": one.seed,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "use_cpu": not torch.accelerator.is_available(),
            "dataloader_pin_memory": torch.accelerator.is_available(),
            "disable_tqdm": self.quiet,
        }
        return TrainingArguments(**settings | own)

    def _score(self, models):
        """The measures on the test set; of several models, of the mean of their log-probabilities."""
        options = {"collate": self.collate, "arguments": self.forward_arguments, "quiet": self.quiet}
        return self.measure(*answers(models, self.data("test"), self.pick, self.training.batch_size, **options))

    def _record(self, file, result):
        """Last: the file says that the run is finished."""
        write_json(file, result)
        return result

    def _say(self, text):
        if not self.quiet:
            print(text, flush=True)


def _own_rate(trainer, rate):
    """Makes a Trainer's optimizer, with the mixture weights of the hybrid in it as a group of their own."""
    hybrid = next(part for part in trainer.model.modules() if hasattr(part, "mixture_weights"))
    alpha = hybrid.hybrid_mixer.alpha_logits
    if hybrid.config.num_blocks == 1 and hybrid.config.mixture != "static":
        raise ManticoreError(
            f"alpha_learning_rate={rate}: a hybrid of one block with mixture {hybrid.config.mixture!r} has no alpha; "
            "give preset 'paper', or more blocks."
        )
    if not rate > MIN_LEARNING_RATE:
        raise ManticoreError(f"alpha_learning_rate={rate} must be above {MIN_LEARNING_RATE}, where its schedule ends.")
    alpha.requires_grad_(False)  # out of the groups that Trainer makes
    trainer.create_optimizer()
    alpha.requires_grad_(True)
    trainer.optimizer.add_param_group({"params": [alpha], "lr": rate, "weight_decay": trainer.args.weight_decay})


@torch.no_grad()
def answers(
    models: Sequence[nn.Module],
    rows: Dataset,
    pick: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], Sequence[list]],
    batch_size: int,
    collate: Callable[[list], Mapping[str, torch.Tensor]] = default_data_collator,
    arguments: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> tuple[list, list]:
    """What models say on a data set, and what they should.

    Args:
        models: Models of one task; of several, the mean of their log-probabilities counts. They are put into evaluation
            mode.
        rows: The data set.
        pick: As `Benchmark.pick`.
        batch_size: Rows per forward pass.
        collate: Makes batches of rows.
        arguments: Further arguments of the models' forward.
        quiet: No progress bar.

    Returns:
        (predicted, wanted): lists, as `pick` gives them.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    for model in models:
        model.eval().to(device)
    guesses, wanted = [], []
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collate)
    for batch in tqdm(loader, desc="Testing", unit="batch", leave=False, disable=quiet):
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask") if key in batch}
        mean = 0.0
        for model in models:
            out = model(**inputs, **(arguments or {}))
            mean = mean + out["logits"].float().log_softmax(-1) / len(models)
        for found, new in zip((guesses, wanted), pick(mean.cpu(), batch)):
            found += new
    return guesses, wanted


def families_of(args: argparse.Namespace) -> list[str]:
    """The model types that a command line names.

    Args:
        args: Parsed arguments, with `model` or `hybrid` ("llama,mamba").

    Raises:
        ManticoreError: A hybrid of one model.
    """
    families = [args.model] if args.model else [name.strip() for name in args.hybrid.split(",")]
    if args.hybrid and len(families) < 2:
        raise ManticoreError(f"--hybrid {args.hybrid} names one model; give at least two, or --model {args.hybrid}.")
    return families


def training_of(args: argparse.Namespace) -> Training:
    """The Training that a command line says."""
    return Training(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Training)})


def _count(model):
    return sum(p.numel() for p in model.parameters())
