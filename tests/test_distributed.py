"""Two processes (gloo, CPU) find what one finds at the same global batch: losses, alpha, weights, in every stage."""

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from distributed_cases import CASES, run
from processes import launch, results, same

from manticore_hf.utils import distributed

QUICK = ["darts_bilevel", "finetune", "lora", "calibrate", "evaluate", "repeated"]
QUICK_SHARDED = ["sharded", "buffers"]  # the quick test of a recipe has "gaea", "pretrain" and "clipped"
ALIGNED = ["aligned", "aligned_mamba", "aligned_checkpointed"]
PRECISE = [name for name in CASES if name not in ["mixed", *ALIGNED]]  # in bf16 the processes round otherwise
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


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


def alpha_moved(found, name):
    for values in found[name]["history"].values():
        assert abs(values[-1] - values[0]) > 1e-3, "alpha did not move: the comparison would mean nothing"


def test_data_parallel(tmp_path):
    alpha_moved(compare(tmp_path, QUICK), "darts_bilevel")


def test_sharded(tmp_path):
    compare(tmp_path, QUICK_SHARDED, "--fsdp")


@pytest.mark.slow
def test_data_parallel_in_every_other_case(tmp_path):
    compare(tmp_path, [name for name in PRECISE if name not in QUICK])


@pytest.mark.slow
def test_sharded_in_every_other_case(tmp_path):
    not_sharded = ["calibrate", "evaluate", "repeated", "told"]
    found = compare(tmp_path, [name for name in PRECISE if name not in QUICK_SHARDED + not_sharded], "--fsdp")
    alpha_moved(found, "gaea")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIGNED)
def test_data_parallel_of_aligned_hybrids(tmp_path, name):
    compare(tmp_path, [name])


@pytest.mark.slow
def test_sharded_aligned_hybrids(tmp_path):
    """Attention reads a text in one pass; what reads it in pieces would wait for weights in one process only."""
    compare(tmp_path, ["aligned"], "--fsdp")
    (tmp_path / "refused").mkdir()
    with pytest.raises(AssertionError, match="'mamba_gpt' .mamba. reads text in as many passes .* train with DDP"):
        launch([CASES_FILE, tmp_path / "refused", "aligned_mamba", "--fsdp"])


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--ddp", "--fsdp"])
def test_mixed_precision_and_checkpointed_activations(tmp_path, option):
    """Rounding differs between one process and two; far less than a step changes, and the ranks stay as one."""
    alone = run(tmp_path, ["mixed"])["mixed"]
    (tmp_path / "two").mkdir()
    launch([CASES_FILE, tmp_path / "two", "mixed", option])
    ranks = results(tmp_path / "two")
    assert ranks[0] == ranks[1]
    losses = [[row["loss"] for row in found["log"] if "loss" in row] for found in (alone, ranks[0]["mixed"])]
    assert abs(losses[0][-1] - losses[0][0]) > 0.1
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


@pytest.fixture
def no_state():
    """accelerate as it is in a process that has not used it."""
    before = dict(PartialState._shared_state)
    PartialState._reset_state()
    yield PartialState._shared_state
    PartialState._shared_state.update(before)


def test_a_single_process_asks_nothing_of_accelerate(no_state, capsys):
    """It would form a process group, or settle a device, before the user's TrainingArguments say which."""
    number = torch.tensor([2.0, 3.0])
    distributed.print_main("printed", flush=True)
    with distributed.main_first():
        assert distributed.world() == (0, 1) and distributed.is_main()
    assert distributed.broadcast_object("x") == "x" and distributed.on_main(max, 2, 3) == 3
    assert distributed.all_reduce(number) is distributed.broadcast(number) is number
    assert distributed.all_reduce_dict({"a": 1, "b": torch.tensor(2)}, torch.device("cpu")) == {"a": 1.0, "b": 2.0}
    assert list(distributed.shares("abc")) == [("a", 1), ("b", 1), ("c", 1)]
    with pytest.raises(ZeroDivisionError):
        distributed.on_main(divmod, 1, 0)
    assert no_state == {} and capsys.readouterr().out == "printed\n"


def test_processes_that_accelerate_does_not_count_are_counted(no_state, monkeypatch):
    """Two processes on a machine without an accelerator, or started by something else than torchrun."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert distributed.world() == (1, 2) and not distributed.is_main()
    assert PartialState().num_processes == 1, "accelerate counts them now: ask it"
