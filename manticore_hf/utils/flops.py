"""FLOPs of what runs, as torch counts them: the one place where operations are weighed.

Matrix products, convolutions and attention count, two FLOPs a multiplication and addition; elementwise operations, and
with them the few of a recurrent scan, do not. What torch's own table (`torch.utils.flop_counter`) lacks or gets wrong
is added here, for this project's counts only.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def _attention(query, key, *args, out_val=None, **kwargs):
    return 4 * math.prod(query.shape) * key.shape[-2]


def _attention_backward(grad, query, key, *args, out_val=None, **kwargs):
    return 10 * math.prod(query.shape) * key.shape[-2]


def _convolution_backward(grad, given, weight, *args, out_val=None, **kwargs):
    wanted = args[-1]  # gradients of input, weight, bias
    return 2 * math.prod(grad.shape) * math.prod(weight.shape[1:]) * sum(wanted[:2])


FORMULAS = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""FLOPs of what torch.utils.flop_counter lacks (two products in attention, five in its backward, as it has them for
CUDA's), and of what it gets wrong (it takes the backward of a convolution in groups for one without)."""
for _formula in FORMULAS.values():
    _formula._get_raw = True  # torch's counter gives it tensors, not their shapes


def flop_formula(operation: Any) -> Callable[..., int] | None:
    """The formula of an operation.

    Args:
        operation: An overload packet, as `torch.ops.aten.mm`.

    Returns:
        A function of the operation's arguments and `out_val`, what it returned, that gives the FLOPs of one call; None
        for an operation that does not count.
    """
    return FORMULAS.get(operation) or flop_registry.get(operation)


@torch.no_grad()
def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of what a function does, without gradients.

    Args:
        run: Is called once. Its tensors may be on any device, and fake.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def reached_flops(size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s that matrix products in float32 reach on this machine's CPU, measured; it takes less than a second.

    Args:
        size: Rows and columns of the matrices.
        repeats: Products; the fastest counts.
    """
    one, best = torch.rand(size, size), math.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        one @ one
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
