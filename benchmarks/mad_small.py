"""A hybrid and its baselines on easy versions of the six MAD tasks, small enough for a CPU.

    python benchmarks/mad_small.py DIR --output benchmarks/results/mad_small.jsonl    # about half an hour on one core

Sequences of 32 tokens, 3200 of them, 600 steps, width 64, one learning rate: far from the benchmark's budget (12,800
sequences of 128 or 256 tokens, 20,000 steps, the best of six settings), so what is measured is how quickly these
models learn easy versions, not what they can do. Finished runs in DIR are not repeated.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers.utils import logging

from manticore_hf.experiments import TASKS, mad_task, run_mad
from manticore_hf.experiments.baselines import Training

EASY = {name: {"seq_len": 32, "num_train": 3200, "num_test": 640} for name in TASKS}
EASY["selective-copying"] |= {"tokens_to_copy": 8}
EASY["compression"] |= {"seq_len": 16}
EASY["memorization"] |= {"num_train": 256}
EPOCHS = {"memorization": 150}  # 4 steps each


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="where each run's JSON goes")
    parser.add_argument("--output", type=Path, help="collect the results in this file, one line each")
    parser.add_argument("--tasks", nargs="+", default=list(EASY))
    parser.add_argument("--families", nargs="+", default=["llama", "mamba"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    results = []
    for seed in range(args.seeds):
        for name in args.tasks:
            task = mad_task(name, seed=seed, **EASY[name])
            training = Training(
                hidden_size=64, epochs=EPOCHS.get(name, 12), learning_rate=3e-3, batch_size=64, seed=seed
            )
            results += run_mad(task, args.families, args.directory, training)
            if args.output:
                args.output.write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
