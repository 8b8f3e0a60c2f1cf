"""Two processes (gloo, CPU) find what one finds at the same global batch: losses, alpha, weights, in every stage."""

import pytest
import torch
from distributed_cases import CASES, run
from processes import launch, results

QUICK = ["darts_bilevel", "gaea", "pretrain", "finetune", "clipped", "lora", "calibrate", "evaluate"]
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def same(one, two, where=""):
    """Plain values equal but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two)):
            same(a, b, f"{where}/{i}")
    elif isinstance(one, float):
        assert two == pytest.approx(one, abs=1e-6, rel=1e-6), where
    else:
        assert one == two, where


def compare(folder, names, *options):
    """Runs cases in this process and in two others, and compares everything."""
    for name in ("one", "two"):
        (folder / name).mkdir()
    alone = run(folder / "one", names)
    launch([CASES_FILE, folder / "two", *names, *options])
    ranks = results(folder / "two")
    assert ranks[0] == ranks[1], "the processes disagree"
    same(alone, ranks[0])
    for name in names:
        if not (folder / "one" / f"{name}.pt").exists():
            continue
        before, after = (torch.load(folder / which / f"{name}.pt") for which in ("one", "two"))
        assert before.keys() == after.keys()
        for key in before:
            torch.testing.assert_close(after[key], before[key], **CLOSE, msg=f"{name}: {key}")
    return ranks[0]


CASES_FILE = __file__.replace("test_distributed.py", "distributed_cases.py")


def test_data_parallel(tmp_path):
    found = compare(tmp_path, QUICK)
    for name in ("darts_bilevel", "gaea"):
        for values in found[name]["history"].values():
            assert abs(values[-1] - values[0]) > 1e-3, "alpha did not move: the comparison would mean nothing"


@pytest.mark.slow
def test_data_parallel_in_every_other_case(tmp_path):
    compare(tmp_path, [name for name in CASES if name not in QUICK])
