"""Trains a model, or a hybrid beside its baselines, from scratch on a MAD task and scores it.

    manticore-hf mad in-context-recall --hybrid llama,mamba --num-train-epochs 20 --output-dir mad

As the benchmark does it (see `baselines`) but for its bfloat16 and its steps of the schedule (per epoch there, per
batch here), and without its stop at 99.9 % on the test set. Families are Transformers' own, MLPs included, so the
numbers compare with each other and not with those of the MAD paper.
"""

from pathlib import Path

import torch

from manticore_hf.evaluation.metrics import load_metric
from manticore_hf.experiments.baselines import Benchmark, Training
from manticore_hf.experiments.mad.compression import CompressionModel
from manticore_hf.experiments.mad.mad_settings import MadTask
from manticore_hf.experiments.mad.tasks import IGNORE
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.renamed import takes_old_name


@takes_old_name("rivals", "baselines")
def run_mad(
    task: MadTask,
    families: list[str],
    output_dir: str | Path,
    training: Training | None = None,
    baselines: bool = True,
    hybrid: dict | None = None,
    quiet: bool = False,
    designed: bool = False,
    layers_of: dict[str, int] | None = None,
) -> list[dict]:
    """Trains and scores what is not finished yet, and prints all of it.

    Args:
        task: A MadTask.
        families, baselines, hybrid, designed, layers_of: As in `Benchmark.run`.
        output_dir: Where each run's JSON goes; runs that are finished there are read instead.
        training: Training; default: the benchmark's settings.
        quiet: No progress bars and no table.

    Returns:
        A list of results, the asked one first: model, accuracy (micro), macro_accuracy, chance, parameters, settings.

    Raises:
        ManticoreError: Something in the settings cannot be used.
    """
    benchmark = _MadBenchmark(task, output_dir, training or Training(), quiet)
    results = benchmark.run(families, baselines, hybrid, designed, layers_of)
    if not quiet:
        _print_table(task, results)
    return results


class _MadBenchmark(Benchmark):
    def __init__(self, task, output, training, quiet):
        try:
            self.metric = load_metric("mad_accuracy", keep_in_memory=True)
        except ImportError as err:  # before hours of training
            raise ManticoreError(str(err)) from err
        super().__init__(task, output, training, quiet)
        self.forward_arguments = forward_arguments(task)

    @property
    def positions(self):
        return self.task.seq_len + 1

    def wrap(self, lm):
        return for_task(lm, self.task)

    def pick(self, scores, batch):
        return pick(self.task, scores, batch)

    def measure(self, guesses, wanted):
        return {**self.metric.compute(predictions=guesses, references=wanted), "chance": self.task.chance}


def for_task(lm: torch.nn.Module, task: MadTask) -> torch.nn.Module:
    """A causal LM as the task trains it: itself, or inside compression's autoencoder, its decoder newly drawn."""
    return lm if task.shifted else CompressionModel(lm, task.seq_len, task.vocab_size)


def forward_arguments(task: MadTask) -> dict:
    """What a model of the task is called with beside its input."""
    return {"use_cache": False} if task.shifted else {}


def pick(task: MadTask, scores: torch.Tensor, batch: dict) -> list[list]:
    """Predicted and wanted labels of a batch: of every sequence, those at its labelled positions."""
    guess, labels = scores.argmax(-1), batch["labels"]
    if task.shifted:
        guess, labels = guess[:, :-1], labels[:, 1:]
    asked = [label != IGNORE for label in labels]
    return [[row[there].tolist() for row, there in zip(rows, asked)] for rows in (guess, labels)]


def _print_table(task, results):
    print(
        f"\n{task.name}: vocabulary {task.vocab_size}, {task.seq_len} tokens, {task.num_train:,} training and "
        f"{task.num_test:,} test sequences"
    )
    print(f"{'':32}{'parameters':>12}{'micro':>9}{'macro':>9}   (accuracy; chance {task.chance:.3f})")
    for row in results:
        print(f"{row['model']:32}{row['parameters']:12,}{row['accuracy']:9.4f}{row['macro_accuracy']:9.4f}")
