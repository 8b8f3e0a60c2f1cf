"""`manticore-hf` under DeepSpeed on CPUs, one command after another: torchrun deepspeed_stage.py COMMANDS.json

The file has a list of commands, each {"argv": [...]}; "die_at": N kills the second process in its N-th step. On CPUs
DeepSpeed compiles an operation of its own for reductions in shared memory, which takes minutes; gloo does the same, and
nothing else is replaced here.
"""

import json
import os
import signal
import sys
from pathlib import Path

import deepspeed.comm.torch  # noqa: F401
import torch

from manticore_hf.cli import main
from manticore_hf.training.trained_stages import HybridTrainer


def without_shared_memory():
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # the attribute of that name is torch itself


def dying_at(step):
    """A training step that ends this process, as a machine that fails does, once so many steps are done."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super(HybridTrainer, self).training_step(*args, **kwargs)

    return training_step


if __name__ == "__main__":
    torch.set_num_threads(1)
    without_shared_memory()
    for command in json.loads(Path(sys.argv[1]).read_text()):
        if "die_at" in command:
            HybridTrainer.training_step = dying_at(command["die_at"])
        if main(command["argv"]) != 0:
            sys.exit(f"failed: {command}")
