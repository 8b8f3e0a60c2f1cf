"""A hybrid and its baselines on short ListOps and small Pathfinder images, small enough for a CPU.

    python benchmarks/lra_small.py DIR --output benchmarks/results/lra_small.jsonl

ListOps of 10 to 40 tokens and 16 x 16 pixels instead of 500 to 2000 and 32 x 32, two layers of width 64, a few hundred
steps: what is measured is how quickly these models learn short versions, not what they can do. Finished runs in DIR are
not repeated.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers.utils import logging

from manticore_hf.experiments import lra_task, run_lra
from manticore_hf.experiments.baselines import Training

EASY = {
    "listops": {"num_train": 6400, "num_test": 1000, "min_len": 10, "max_len": 40, "max_depth": 4},
    "pathfinder": {"num_train": 6400, "num_test": 1000, "image_size": 16, "path_len": 12, "distractors": 1},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="where each run's JSON goes")
    parser.add_argument("--output", type=Path, help="collect the results in this file, one line each")
    parser.add_argument("--tasks", nargs="+", default=list(EASY))
    parser.add_argument("--families", nargs="+", default=["llama", "mamba"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    results = []
    for seed in range(args.seeds):
        for name in args.tasks:
            training = Training(hidden_size=64, epochs=args.epochs, learning_rate=2e-3, batch_size=32, seed=seed)
            task = lra_task(name, seed=seed, **EASY[name])
            results += run_lra(task, args.families, args.directory, training, designed=True)
            if args.output:
                args.output.write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
