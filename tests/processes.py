"""Runs one script in several processes, as torchrun does for users, and collects what each of them found."""

import json
import os
import socket
import tempfile
import time
from pathlib import Path

import clean_process
import pytest

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def accelerate_environment(options):
    """What `accelerate launch OPTIONS` puts into the environment of what it starts, by its own functions."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    options = [*map(str, options), "--main_process_port", "0", "script"]  # a free one
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    return prepare_multi_gpu_env(args)


def launch(arguments, processes=2, launcher=(), timeout=300, environment=None):
    """Runs `python arguments` in several processes; kills them all on a timeout, and the others when one fails.

    Args:
        arguments: Script (or "-m", module) and its arguments.
        processes: How many.
        launcher: Arguments of python that start the processes: `TORCHRUN`, or accelerate's own. Default: they are
            forked here, with what torchrun puts into their environment.
        timeout: Seconds.
        environment: Theirs besides, if not this process's.

    Returns:
        What they printed.
    """
    folder = str(Path(__file__).parent)
    paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**(environment or os.environ), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    commands = [([*launcher, *arguments], environment)] if launcher else []
    if not launcher:
        with socket.socket() as one:
            one.bind(("localhost", 0))
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(one.getsockname()[1])}
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            commands.append((arguments, {**environment, **address, **place}))
    with tempfile.TemporaryFile("w+") as out:
        running = [clean_process.start(command, env=env, stdout=out, stderr=out) for command, env in commands]
        try:
            deadline = time.monotonic() + timeout
            while any(process.poll() is None for process in running):
                if any(process.returncode for process in running):
                    break
                assert time.monotonic() < deadline, f"not finished after {timeout} s"
                time.sleep(0.02)
        finally:
            codes = [process.poll() for process in running]  # before the others are killed
            for process in running:
                process.kill()
            status = [process.wait(60) for process in running]
            out.seek(0)
            printed = out.read()
            if any(status):
                print(printed[-8000:])
    assert not any(status), f"exit codes {codes}:\n{printed[-8000:]}"
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
