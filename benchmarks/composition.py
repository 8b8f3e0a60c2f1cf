"""A task that no mixture of outputs can do, by all conditions and over several seeds.

    python benchmarks/composition.py DIR --output benchmarks/results/composition.json    # minutes of a core

At the defaults of `manticore-hf composition`. Finished runs in DIR are not repeated; --collect writes what is there.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging

from manticore_hf.experiments import CompositionTask, run_composition
from manticore_hf.experiments.composition.models import conditions
from manticore_hf.experiments.composition.train import Composition, CompositionTraining
from manticore_hf.utils.files import read_json

KEPT = ("model", "unseen", "trained", "parameters", "trained_parameters", "steps", "train_loss")


def collected(folder: Path) -> dict:
    """All finished runs of a folder, as the pages read them: conditions in their order, seeds in theirs."""
    runs = [read_json(file) for file in sorted(folder.glob("*.json"))]
    order = [*conditions(3)]
    runs = sorted(
        (run for run in runs if "condition" in run["what"]),
        key=lambda run: (order.index(run["model"]), run["task"]["seed"]),
    )
    seeds = sorted({run["task"]["seed"] for run in runs})
    alone = [
        Composition(CompositionTask(seed=one), folder, CompositionTraining(seed=one), True).alone() for one in seeds
    ]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": version("transformers"), "peft": version("peft")},
        "command": "python benchmarks/composition.py DIR --output benchmarks/results/composition.json",
        "task": {key: value for key, value in runs[0]["task"].items() if key != "seed"},
        "training": {key: value for key, value in runs[0]["training"].items() if key != "seed"},
        "components": [{"seed": one, **found} for one, found in zip(seeds, alone)],
        "rows": [
            {"seed": run["task"]["seed"], **{key: run.get(key) for key in KEPT}, "condition": run["what"]["condition"]}
            for run in runs
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where each run's JSON goes")
    parser.add_argument("--output", type=Path, help="write all results to this file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="conditions, by name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    for seed in () if args.collect else args.seeds:
        run_composition(CompositionTask(seed=seed), args.directory, only=args.only)
    if args.output:
        args.output.write_text(json.dumps(collected(args.directory), indent=1) + "\n")


if __name__ == "__main__":
    main()
