"""Fuzzy recall in a Mamba, selective copying in a Llama, and a task that needs both: what do bridges make of the pair?

    python benchmarks/mad_bridges.py DIR --output benchmarks/results/mad_bridges.json    # minutes of a core

Each component is trained alone on small MAD rows: the Mamba on fuzzy in-context recall (keys of one or two tokens,
values of one), the Llama on selective copying of the same tokens among blanks. In the task that needs both, the tokens
among blanks are pairs of fuzzy recall, and behind them keys that were shown, once more: behind the copy token all are
to be said in their order, but for a repeated key's last token the key's value. Asked, trained and scored are these
values alone; to say any of the values shown would be right in a third. The Llama copies the key there, the Mamba knows
the value only where the key stood.

Joined and trained as in `manticore-hf composition`; bridges lead from the Mamba's last state into the Llama. Finished
runs in DIR are not repeated; --collect writes what is there.
"""

import argparse
import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from manticore_hf.experiments import generate, mad_task
from manticore_hf.experiments.composition.models import conditions
from manticore_hf.experiments.composition.texts import IGNORE, CompositionTask, Part
from manticore_hf.experiments.composition.train import CompositionTraining, run_composition
from manticore_hf.utils.files import read_json

PLAIN = 16  # tokens of keys, then of values
BLANK, COPY = PLAIN, PLAIN + 1  # fuzzy recall's padding is selective copying's blank
PAIRS, REPEATED, BLANKS = 3, 2, 6
SAID = 3 * PAIRS + 2 * REPEATED
KEPT = ("model", "unseen", "parameters", "trained_parameters", "steps", "train_loss")
CONDITIONS = [
    name for name in conditions(2, ("copying", "recall")) if not name.startswith(("merge", "attention", "quiet"))
]


@dataclass(frozen=True)
class BothTask(CompositionTask):
    """Rows of both tasks, and of the one that needs both; of the fields, those that count rows and the seed matter."""

    num_table: int = 38_400
    num_sums: int = 38_400
    num_train: int = 6_400
    num_test: int = 640

    name = "mad-bridges"
    vocab_size = PLAIN + 2
    texts = "recall", "copying", "train", "test"
    parts = {"copying": Part("llama", "copying", "num_sums"), "recall": Part("mamba", "recall", "num_table")}
    said = range(PLAIN // 2, PLAIN)
    answer = 1
    asked = {"unseen": "test"}
    positions = 2 * SAID + BLANKS + 2

    def write(self, text, rng):
        """One of `texts`."""
        if text == "copying":
            sizes = {"vocab_size": PLAIN + 2, "seq_len": self.positions - 1, "tokens_to_copy": SAID}
            return generate(mad_task("selective-copying", num_train=self.num_sums, seed=self.seed, **sizes), "train")
        if text == "recall":
            sizes = {"vocab_size": PLAIN + 1, "seq_len": 3 * (PAIRS + REPEATED) + 3, "key_motif": 2, "value_motif": 1}
            fuzzy = mad_task("fuzzy-in-context-recall", num_train=self.num_table, seed=self.seed, **sizes)
            return generate(fuzzy, "train")
        return self._both(rng, self.num_train if text == "train" else self.num_test)

    def _both(self, rng, rows):
        half = PLAIN // 2
        codes = rng.random((rows, half * (half - 1))).argsort(1)[:, :PAIRS]  # ordered pairs of two different tokens
        first, second = codes // (half - 1), codes % (half - 1)
        shown = np.stack([first, second + (second >= first), rng.integers(half, PLAIN, (rows, PAIRS))], -1)
        again = np.take_along_axis(shown, rng.random((rows, PAIRS)).argsort(1)[:, :REPEATED, None], 1)
        tokens = np.concatenate([shown.reshape(rows, -1), again[..., :2].reshape(rows, -1)], 1)
        # Blanks stand between pairs, not inside them
        begins = np.r_[np.arange(PAIRS) * 3, 3 * PAIRS + np.arange(REPEATED) * 2]
        gaps = np.zeros_like(tokens)
        gaps[:, begins] = rng.multinomial(BLANKS, np.full(len(begins), 1 / len(begins)), rows)
        ids = np.full((rows, self.positions), BLANK)
        np.put_along_axis(ids, np.cumsum(gaps, 1) + np.arange(SAID), tokens, 1)
        ids[:, SAID + BLANKS] = COPY
        labels = np.full_like(ids, IGNORE)
        labels[:, self.positions - 2 * REPEATED + 1 :: 2] = again[..., 2]
        return ids, labels


def collected(folder: Path) -> dict:
    """All finished runs of a folder, as the pages read them: conditions in their order, seeds in theirs."""
    runs = [read_json(file) for file in sorted(folder.glob(f"{BothTask.name}-*.json"))]
    runs = [run for run in runs if "condition" in run["what"]]
    runs.sort(key=lambda run: (CONDITIONS.index(run["model"]), run["task"]["seed"]))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": version("transformers"), "peft": version("peft")},
        "command": "python benchmarks/mad_bridges.py DIR --output benchmarks/results/mad_bridges.json",
        "task": {key: value for key, value in runs[0]["task"].items() if key.startswith("num_")},
        "training": {key: value for key, value in runs[0]["training"].items() if key != "seed"},
        "rows": [{"seed": run["task"]["seed"], **{key: run[key] for key in KEPT if key in run}} for run in runs],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where each run's JSON goes")
    parser.add_argument("--output", type=Path, help="write all results to this file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="conditions, by name", default=CONDITIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    for seed in () if args.collect else args.seeds:
        training = CompositionTraining(layers=2, batch_size=64, seed=seed)
        run_composition(BothTask(seed=seed), args.directory, training, args.only)
    if args.output:
        args.output.write_text(json.dumps(collected(args.directory), indent=1) + "\n")


if __name__ == "__main__":
    main()
