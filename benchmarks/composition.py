"""Tasks that no mixture of outputs can do, by all conditions and over several seeds.

    python benchmarks/composition.py DIR --output benchmarks/results/composition.json    # minutes of a core
    python benchmarks/composition.py DIR --task glossary --output benchmarks/results/glossary.json
    python benchmarks/composition.py DIR --task recall --output benchmarks/results/recall.json

Sums and recall at the defaults of `manticore-hf composition`, the glossary with fewer names, rows and steps (SIZES).
Finished runs in DIR are not repeated; --collect writes what is there. Runs of the output file that DIR has not, of the
same task and training, are kept in it.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging

from manticore_hf.experiments.composition.conditions import conditions
from manticore_hf.experiments.composition.train_composition import (
    TASKS,
    Composition,
    CompositionTraining,
    run_composition,
)
from manticore_hf.utils.files import read_json

SIZES = {
    "sums": {},
    "glossary": {"num_keys": 288, "num_table": 7200, "num_sums": 6400, "num_train": 2400},
    "recall": {},
}
KEPT = ("model", "unseen", "known", "trained", "parameters", "trained_parameters", "steps", "train_loss")


def collected(folder: Path, name: str) -> dict:
    """All finished runs of a task in a folder, as the pages read them: conditions in their order, seeds in theirs."""
    kind = TASKS[name]
    runs = [read_json(file) for file in sorted(folder.glob(f"{kind.name}-*.json"))]
    order = [*conditions(3, tuple(kind.parts))]
    runs = sorted(
        (run for run in runs if "condition" in run["what"]),
        key=lambda run: (order.index(run["model"]), run["task"]["seed"]),
    )
    seeds = sorted({run["task"]["seed"] for run in runs})
    alone = [
        Composition(kind(**SIZES[name], seed=one), folder, CompositionTraining(seed=one), True).alone() for one in seeds
    ]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": version("transformers"), "peft": version("peft")},
        "command": f"python benchmarks/composition.py DIR --task {name} --output benchmarks/results/{kind.name}.json",
        "task": {key: value for key, value in runs[0]["task"].items() if key != "seed"},
        "training": {key: value for key, value in runs[0]["training"].items() if key != "seed"},
        "components": [{"seed": one, **found} for one, found in zip(seeds, alone)],
        "rows": [
            {
                "seed": run["task"]["seed"],
                **{key: run[key] for key in KEPT if key in run},
                "condition": run["what"]["condition"],
            }
            for run in runs
        ],
    }


def merged(before: dict, now: dict, name: str) -> dict:
    """Results of a task with those of an earlier file that are not made again.

    Raises:
        ValueError: The earlier file is of another task or training.
    """
    for key in ("task", "training"):
        if before[key] != now[key]:
            raise ValueError(f"{key} was {before[key]}, and is {now[key]}: write to another file.")
    rows = {(row["model"], row["seed"]): row for row in (*before["rows"], *now["rows"])}
    order = [*conditions(3, tuple(TASKS[name].parts))]
    alone = {one["seed"]: one for one in (*before["components"], *now["components"])}
    return {
        **now,
        "components": [alone[seed] for seed in sorted(alone)],
        "rows": [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), key[1]))],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where each run's JSON goes")
    parser.add_argument("--task", choices=TASKS, default="sums")
    parser.add_argument("--output", type=Path, help="write all results to this file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="conditions, by name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    for seed in () if args.collect else args.seeds:
        run_composition(TASKS[args.task](**SIZES[args.task], seed=seed), args.directory, only=args.only)
    if args.output:
        found = collected(args.directory, args.task)
        if args.output.exists():
            found = merged(read_json(args.output), found, args.task)
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
