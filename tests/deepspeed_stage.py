"""`manticore-hf` under DeepSpeed on CPUs, as torchrun starts it: python deepspeed_stage.py STAGE OPTION...

On CPUs DeepSpeed compiles an operation of its own for reductions in shared memory, which takes minutes; gloo does the
same. Its process group is otherwise made by accelerate, on accelerators only.
"""

import sys

import deepspeed
import deepspeed.comm.torch
import torch

from manticore_hf.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # the attribute of that name is torch itself
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    sys.exit(main())
