"""Trains a classifier, or a hybrid beside its baselines, from scratch on a task of the Long Range Arena and scores it.

    manticore-hf lra listops --hybrid llama,mamba --designed --min-len 10 --max-len 40 --num-train 6400 --output-dir lra

How they are trained: see `baselines`. Every model, a single one too, is a hybrid with score heads
(`ManticoreForSequenceClassification`), which with one component is that component with a linear head on its last state.
Numbers compare with each other; the benchmark's own models read in both directions, and pool in other ways.
"""

import functools
import hashlib
from pathlib import Path

import torch

from manticore_hf.compose.hybrid import ManticoreForCausalLM, ManticoreForSequenceClassification
from manticore_hf.experiments.baselines import Benchmark, Training
from manticore_hf.experiments.lra.lra_settings import LraTask
from manticore_hf.utils.renamed import takes_old_name

DEFAULTS = Training(layers=4, epochs=10, learning_rate=1e-3, weight_decay=0.01, batch_size=32)


@takes_old_name("rivals", "baselines")
def run_lra(
    task: LraTask,
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
        task: An LraTask.
        families, baselines, hybrid, designed, layers_of: As in `Benchmark.run`.
        output_dir: Where each run's JSON goes; runs that are finished there are read instead.
        training: Training; default: DEFAULTS.
        quiet: No progress bars and no table.

    Returns:
        A list of results, the asked one first: model, accuracy, chance (share of the test's most frequent label),
        parameters, settings.

    Raises:
        ManticoreError: Something in the settings or the data cannot be used.
    """
    benchmark = _LraBenchmark(task, output_dir, training or DEFAULTS, quiet)
    results = benchmark.run(families, baselines, hybrid, designed, layers_of)
    if not quiet:
        print(f"\n{task.name}: at most {task.positions:,} tokens, test accuracy (chance {results[0]['chance']:.3f})")
        for row in results:
            print(f"{row['model']:32}{row['parameters']:12,}{row['accuracy']:9.4f}")
    return results


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of rows of different lengths: padded with 0 on the right, `attention_mask` says how far."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        values = torch.as_tensor(row["input_ids"], dtype=torch.long)
        ids[i, : len(values)], mask[i, : len(values)] = values, 1
    labels = torch.tensor([int(row["label"]) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _LraBenchmark(Benchmark):
    collate = staticmethod(pad)

    @property
    def positions(self):
        return self.task.positions

    @functools.cached_property
    def num_labels(self):
        """One more than the largest label there is."""
        return {"listops": 10, "pathfinder": 2}.get(self.task.name) or 1 + max(
            max(self.data(split)["label"]) for split in ("train", "test")
        )

    def wrap(self, lm):
        cls, labels = ManticoreForSequenceClassification, self.num_labels
        if isinstance(lm, ManticoreForCausalLM):
            return cls.from_causal_lm(lm, num_labels=labels)
        return cls.from_components([lm], num_labels=labels, mixture="static", verify=False)

    def pick(self, scores, batch):
        return scores.argmax(-1).tolist(), batch["labels"].tolist()

    def measure(self, guesses, wanted):
        right = sum(one == two for one, two in zip(guesses, wanted))
        return {"accuracy": right / len(wanted), "chance": max(map(wanted.count, set(wanted))) / len(wanted)}

    def facts(self):
        return {} if self.task.generated else {"rows": self.digest}

    @functools.cached_property
    def digest(self):
        """Of all rows: data that are read may change under their name."""
        digest = hashlib.sha256()
        for split in ("train", "test"):
            for batch in self.data(split).with_format("arrow").iter(1000):
                digest.update(str(batch.to_pydict()).encode())
        return digest.hexdigest()[:16]
