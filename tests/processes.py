"""Runs one script in several processes, as torchrun does for users, and collects what each of them found."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def launch(arguments, processes=2, launcher=(), timeout=300):
    """Runs `python -m torch.distributed.run ... arguments`; kills the whole group on a timeout.

    Args:
        arguments: Script (or "-m", module) and its arguments.
        processes: How many.
        launcher: Command that starts the processes, instead of torchrun.
        timeout: Seconds.

    Returns:
        What they printed.
    """
    command = list(launcher) or ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *command, *map(str, arguments)]
    folder = str(Path(__file__).parent)
    paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        print(printed[-5000:])
        raise
    assert process.returncode == 0, printed[-8000:]
    return printed


def results(folder, processes=2):
    """What `report` wrote there, by rank."""
    return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(processes)]


def report(folder, values):
    """Writes plain values of this process, for `results`."""
    (Path(folder) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(values))


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
