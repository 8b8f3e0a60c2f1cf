"""The MAD tasks generated at once, against the same definitions as a loop over sequences and tokens.

    python benchmarks/mad_generation.py --output benchmarks/results/mad_generation.json       # about 1 minute

12,800 sequences of 128 tokens of every task. The loop is that of `tests/naive_mad.py`, which the tests compare with the
generators. Each repeat runs the loop on a tenth of the sequences (it is linear in them) and the generator on all, in
turn; the ratio is the median over repeats. "dataset" includes making the `datasets.Dataset`.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from manticore_hf.experiments import TASKS, generate, mad_task

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import naive_mad  # noqa: E402

COUNT, LENGTH, SHARE = 12_800, 128, 10


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name, repeats):
    """Median seconds of loop, generator and data set of a task's training split, and the ratios to the loop."""
    task = mad_task(name, num_train=COUNT, seq_len=LENGTH)

    def loop():
        rng = np.random.default_rng(0)
        rows = [naive_mad.draw(task, rng, True) for _ in range(COUNT // SHARE)]
        return tuple(np.array(part) for part in zip(*rows))

    generate(task, "train")  # what is imported and allocated once
    times = {"loop": [], "generated": [], "dataset": []}
    for _ in tqdm(range(repeats), desc=name, leave=False):
        times["loop"].append(SHARE * seconds(loop))
        times["generated"].append(seconds(lambda: generate(task, "train")))
        times["dataset"].append(seconds(lambda: task.dataset("train")))
    row = {"task": name, **{key: round(statistics.median(values), 4) for key, values in times.items()}}
    for key in ("generated", "dataset"):
        row[f"loop / {key}"] = round(statistics.median(a / b for a, b in zip(times["loop"], times[key])), 1)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rows = [measure(name, args.repeats) for name in TASKS]
    for row in rows:
        print(row)
    if args.output:
        out = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.machine(),
            "numpy": np.__version__,
            "sequences": COUNT,
            "tokens": LENGTH,
            "repeats": args.repeats,
            "rows": rows,
        }
        args.output.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
