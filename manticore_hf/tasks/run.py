"""Trains a model, or a hybrid beside its rivals, from scratch on a MAD task and scores it.

    manticore-hf mad in-context-recall --hybrid llama,mamba --epochs 20 --output-dir mad

Every model is trained by the standard Trainer on the same sequences in the same order: AdamW, cosine to 1e-6, no
clipping, float32, as the benchmark does it but for its bfloat16 and its steps of the schedule (per epoch there, per
batch here), and without its stop at 99.9 % on the test set. Families are Transformers' own, MLPs included, so the
numbers compare with each other and not with those of the MAD paper.

Every run writes one JSON file, whose name carries a digest of all its settings, when it is finished; it is not run
again. A component's trained weights lie beside its file, because the ensemble needs them.
"""

import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments, default_data_collator

from manticore_hf.metrics import load_metric
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.tasks.compression import CompressionModel
from manticore_hf.tasks.mad import IGNORE
from manticore_hf.tasks.models import from_scratch, hybrid_from_scratch, scratch_config

MIN_LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Training:
    """How every model of a comparison is built and trained; defaults are the benchmark's."""

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


def run_mad(task, families, output_dir, training=None, rivals=True, hybrid=None, quiet=False):
    """Trains and scores what is not finished yet, and prints all of it.

    Args:
        task: A MadTask.
        families: Model types. One: that model. Several: the hybrid of them.
        output_dir: Where each run's JSON goes; runs that are finished there are read instead.
        training: Training; default: the benchmark's settings.
        rivals: For a hybrid also each component alone, and the plain ensemble of those.
        hybrid: Keys of ManticoreConfig for the hybrid (num_blocks, preset, ...).
        quiet: No progress bars and no table.

    Returns:
        A list of results, the asked one first: model, accuracy (micro), macro_accuracy, chance, parameters, settings.

    Raises:
        ManticoreError: Something in the settings cannot be used.
    """
    runner = _Runner(task, Path(output_dir), training or Training(), quiet)
    for family in families:  # what cannot be built is said before anything is trained
        runner.check(family)
    if len(families) == 1:
        results = [runner.single(families[0], 0)]
    else:
        results = [runner.hybrid(families, dict(hybrid or {}))]
        if rivals:
            results += [runner.single(family, i) for i, family in enumerate(families)]
            results.append(runner.ensemble(families))
    if not quiet:
        _print_table(task, results)
    return results


class _Runner:
    """One task and training setting; the data are made when first needed."""

    def __init__(self, task, output, training, quiet):
        self.task, self.output, self.training, self.quiet = task, output, training, quiet
        try:
            self.metric = load_metric("mad_accuracy", keep_in_memory=True)
        except ImportError as err:  # before hours of training
            raise ManticoreError(str(err)) from err
        output.mkdir(parents=True, exist_ok=True)
        self.splits = {}

    @property
    def sizes(self):
        positions = self.task.seq_len + 1
        return self.task.vocab_size, self.training.layers, self.training.hidden_size, positions

    def check(self, family):
        scratch_config(family, *self.sizes)

    def single(self, family, index):
        """One component alone; `index` says which start it has, that of the hybrid's component."""
        return self._run(family, {"model": family, "start": index}, lambda: self._build(family, index), keep=True)

    def hybrid(self, families, settings):
        def build():
            lm = hybrid_from_scratch(families, *self.sizes, seed=self.training.seed, **settings)
            return self._wrap(lm)

        name = f"hybrid {'+'.join(families)}"
        return self._run(name, {"hybrid": families, "settings": settings}, build)

    def ensemble(self, families):
        """The plain ensemble of the components trained alone (geometric mean of their predictions)."""
        file, settings = self._file(f"ensemble {'+'.join(families)}", {"ensemble": families})
        if (result := self._finished(file)) is not None:
            return result
        models = []
        for index, family in enumerate(families):
            models.append(self._build(family, index))
            own, _ = self._file(family, {"model": family, "start": index})
            load_model(models[-1], own.with_suffix(".safetensors"))
        result = {"model": "ensemble of the components", "parameters": sum(map(_count, models))}
        return self._record(file, {**result, **self._score(models), **settings})

    def _build(self, family, index):
        return self._wrap(from_scratch(family, *self.sizes, seed=self.training.seed + index))

    def _wrap(self, lm):
        return for_task(lm, self.task, self.training.seed)

    def _data(self, split):
        if split not in self.splits:
            self.splits[split] = self.task.dataset(split)
        return self.splits[split]

    # ---- one run -----------------------------------------------------------------------------------------------------

    def _file(self, name, what):
        settings = {"task": dataclasses.asdict(self.task), "training": dataclasses.asdict(self.training), "what": what}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        return self.output / f"{self.task.name}-{name.replace(' ', '-')}-{digest}.json", settings

    def _finished(self, file):
        weights = file.with_suffix(".safetensors")
        if not file.is_file():
            return None
        result = json.loads(file.read_text())
        return None if result.get("weights") and not weights.is_file() else result

    def _run(self, name, what, build, keep=False):
        file, settings = self._file(name, what)
        if (result := self._finished(file)) is not None:
            self._say(f"{name}: finished before, {file}")
            return result
        self._say(f"{name}: training on {self.task.num_train:,} sequences, {self.training.epochs} epochs")
        model, start = build(), time.time()
        trainer = Trainer(
            model=model,
            args=self._arguments(),
            train_dataset=self._data("train"),
            data_collator=default_data_collator,
        )
        model.train()
        state = trainer.train()
        result = {"model": name, "parameters": _count(model), "steps": state.global_step, "weights": keep}
        result |= {"train_loss": state.training_loss, "seconds": round(time.time() - start, 1)}
        lm = getattr(model, "model", model) if not self.task.shifted else model
        if hasattr(lm, "mixture_weights"):
            result["mixture_weights"] = lm.mixture_weights().tolist()
        result |= self._score([model])
        if keep:
            save_model(model, file.with_suffix(".safetensors"))
        return self._record(file, {**result, **settings})

    def _arguments(self):
        one = self.training
        return TrainingArguments(
            output_dir=str(self.output),
            num_train_epochs=one.epochs,
            learning_rate=one.learning_rate,
            weight_decay=one.weight_decay,
            per_device_train_batch_size=one.batch_size,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": MIN_LEARNING_RATE},
            max_grad_norm=0.0,
            seed=one.seed,
            data_seed=one.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.accelerator.is_available(),
            disable_tqdm=self.quiet,
        )

    def _score(self, models):
        """Accuracy at the labelled positions of the test set; of several models, of the mean of their predictions."""
        guesses, wanted = answers(models, self.task, self._data("test"), self.training.batch_size, self.quiet)
        return {**self.metric.compute(predictions=guesses, references=wanted), "chance": self.task.chance}

    def _record(self, file, result):
        """Last: the file says that the run is finished."""
        write_json(file, result)
        return result

    def _say(self, text):
        if not self.quiet:
            print(text, flush=True)


def for_task(lm, task, seed):
    """A causal LM as the task trains it: itself, or inside compression's autoencoder, its decoder drawn from `seed`."""
    if task.shifted:
        return lm
    torch.manual_seed(seed)  # the same for all models
    return CompressionModel(lm, task.seq_len, task.vocab_size)


@torch.no_grad()
def answers(models, task, rows, batch_size, quiet=False):
    """What models say at the labelled positions of a data set.

    Args:
        models: Models of the task; of several, the mean of their log-probabilities counts. They are put into
            evaluation mode.
        task: The MadTask.
        rows: Its data set, of one split.
        batch_size: Sequences per forward pass.
        quiet: No progress bar.

    Returns:
        (said, wanted): per sequence, the list of tokens said and the list of labels.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    for model in models:
        model.eval().to(device)
    said, wanted = [], []
    loader = DataLoader(rows.with_format("torch"), batch_size=batch_size)
    for batch in tqdm(loader, desc="Testing", unit="batch", leave=False, disable=quiet):
        labels, mean = batch["labels"], 0.0
        for model in models:
            kwargs = {"use_cache": False} if task.shifted else {}
            out = model(input_ids=batch["input_ids"].to(device), **kwargs)
            mean = mean + out["logits"].float().log_softmax(-1) / len(models)
        guess = mean.argmax(-1).cpu()
        if task.shifted:
            guess, labels = guess[:, :-1], labels[:, 1:]
        for one, label in zip(guess, labels):
            asked = label != IGNORE
            said.append(one[asked].tolist())
            wanted.append(label[asked].tolist())
    return said, wanted


def write_json(file, values):
    """Writes by rename, so that a file that is there is whole."""
    scratch = file.with_name(f".{file.name}")
    scratch.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(scratch, file)


def _count(model):
    return sum(p.numel() for p in model.parameters())


def _print_table(task, results):
    print(f"\n{task.name}: vocabulary {task.vocab_size}, {task.seq_len} tokens, {task.num_train:,} training and "
          f"{task.num_test:,} test sequences")  # fmt: skip
    print(f"{'':32}{'parameters':>12}{'micro':>9}{'macro':>9}   (accuracy; chance {task.chance:.3f})")
    for row in results:
        print(f"{row['model']:32}{row['parameters']:12,}{row['accuracy']:9.4f}{row['macro_accuracy']:9.4f}")


def main(args):
    """`manticore-hf mad`: from parsed arguments to `run_mad`."""
    from transformers.utils import logging

    from manticore_hf.tasks.settings import mad_task

    logging.set_verbosity_error()
    names = ("vocab_size", "seq_len", "num_train", "num_test", "frac_noise", "noise_vocab_size", "tokens_to_copy")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    task = mad_task(args.task, seed=args.seed, **given)
    training = Training(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Training)})
    families = [args.model] if args.model else [name.strip() for name in args.hybrid.split(",")]
    if args.hybrid and len(families) < 2:
        raise ManticoreError(f"--hybrid {args.hybrid} names one model; give at least two, or --model {args.hybrid}.")
    hybrid = {"num_blocks": args.num_blocks, "preset": args.preset}
    run_mad(task, families, args.output_dir, training, args.rivals, hybrid)
