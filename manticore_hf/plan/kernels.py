"""Which kernels a step is assumed to run on, what they allocate inside themselves, and operations torch does not count.

On the CPU: the kernels that would run here. On CUDA: attention that stores nothing of the length squared (scaled dot
product attention's flash kernels, which torch takes where the model states no mask of its own), and for state-space
layers what runs without mamba-ssm: our scan in Triton, Transformers' convolution and chunked scan. With mamba-ssm less
is stored: a quarter of the peak in the one run that was measured (BENCHMARKS).
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import masking_utils
from transformers.integrations import moe

from manticore_hf.kernels.numba_scan import find_kernel
from manticore_hf.kernels.scan import CHUNK, shared
from manticore_hf.kernels.triton_scan import CHANNELS, block_count
from manticore_hf.modeling import mixers_manticore, ssd_manticore

NOTES = {
    "cuda": "attention by scaled_dot_product_attention's flash kernels; Mamba's layers by the scan in Triton "
    "(mamba-ssm's kernels store less)",
    "cpu": "the kernels of this machine",
}


@contextlib.contextmanager
def assumed(device: str) -> Iterator[None]:
    """Context in which fake tensors take the paths that tensors on `device` ("cpu" or "cuda") would take."""
    with contextlib.ExitStack() as stack:
        # It looks at the values of positions, of which there are none. Rows of packed text have one sequence each.
        stack.enter_context(mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None))
        stack.enter_context(mock.patch.object(moe, "_grouped_mm", _one_group))
        if device == "cuda":
            for module in (mixers_manticore, ssd_manticore):
                stack.enter_context(mock.patch.object(module, "leave_to", lambda upstream, plain, *_: plain))
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _without_dropout))
        yield


def _one_group(given, weight, offs):
    """Same rows, products and gradients, whichever expert a row goes to; fake tensors lack the real one in float32."""
    with torch.autocast("cpu", enabled=False):
        return given.to(weight.dtype) @ weight[0]


_attend = F.scaled_dot_product_attention


def _without_dropout(*args, **kwargs):
    """CUDA's kernels drop out inside; the CPU's, which fake tensors would run, do not, and would store the scores."""
    return _attend(*args, **{**kwargs, "dropout_p": 0.0})


def group_experts(model: torch.nn.Module) -> None:
    """Lets experts run in groups: the only way whose sizes do not depend on where the router sends a token."""
    for name in model.config.component_names:
        if any(".experts." in key for key, _ in model.component(name).named_parameters()):
            model.component(name).set_experts_implementation("grouped_mm")


_SCAN, _SCAN_BACKWARD = (op.overloadpacket for op in shared.ops)
_device = ["cpu"]


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """Context of a step on a device: `assumed`, and its scratch."""
    _device.append(device)
    try:
        with assumed(device):
            yield
    finally:
        _device.pop()


def scratch(packet: torch._ops.OpOverloadPacket, args: tuple, kwargs: dict) -> int:
    """Bytes that an operation allocates beside its results and frees before it returns.

    Args:
        packet: The operation, without overload.
        args, kwargs: What it is called with.
    """
    if packet is _SCAN:
        return _scan_scratch(args)
    return _scan_backward_scratch(args) if packet is _SCAN_BACKWARD else 0


def _copied(tensors, order):
    """Bytes of the float32 copies that the scan makes of its inputs, unless they lie as it reads them."""
    return sum(4 * x.numel() for x in tensors if x.dtype != torch.float32 or not x.permute(order).is_contiguous())


def _portable(u, A):
    """Whether the scan takes its torch path, which copies what it reads; Triton's and numba's mostly do not."""
    return _device[-1] != "cuda" and find_kernel(u, A.shape[1], torch.float32) is None


def _scan_scratch(args):
    u, dt, A, B, C = args[:5]
    if not _portable(u, A):
        return _copied((u, dt, B, C), (0, 2, 1))
    buffers = 8 * min(CHUNK, u.shape[2]) * u.shape[0] * A.numel()
    # The inputs, their product, and the result before its dimensions are put into order
    return _copied((u, dt, B, C), (2, 0, 1)) + 4 * u.numel() + buffers


def _scan_backward_scratch(args):
    u, dt, A, B, C, _, dy = args[:7]
    if not _portable(u, A):
        copies = _copied((u, dt, B, C, dy), (0, 2, 1))
        return copies if _device[-1] != "cuda" else copies + _triton_scratch(u, A, B)
    buffers = 12 * min(CHUNK, u.shape[2]) * u.shape[0] * A.numel()
    copies = _copied((u, dt, B, C, dy), (2, 0, 1))
    return copies + max(8 * u.numel(), 4 * u.numel() + buffers)


def _triton_scratch(u, A, B):
    """A chunk's states of every program, and its share of the gradients of B and C."""
    blocks, padded = block_count(u.shape[1]), 1 << (A.shape[1] - 1).bit_length()
    return 4 * blocks * (CHUNK * padded * CHANNELS * u.shape[0] + 2 * B.numel())
