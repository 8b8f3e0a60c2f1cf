"""The scan in Triton, run by Triton's interpreter on the CPU where it is installed; `test_gpu.py` runs it compiled."""

import functools
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from manticore_hf.kernels import scan
from manticore_hf.kernels import triton_scan as kernels

SHAPES = [(2, 5, 3, 37), (1, 40, 16, 16), (3, 70, 8, 5)]


def check(batch, d, n, time):
    """Results and gradients of the interpreted kernels against the recurrence token by token in float64."""
    from scans import make_inputs, naive_scan

    inputs = make_inputs(batch, d, n, time, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, run = [], (functools.partial(kernels.run_triton, kernels.build()), kernels.block_count(d))
    with mock.patch.object(scan, "_find_run", lambda *_: run):
        for results, given in ((scan.selective_scan(*inputs), inputs), (naive_scan(*exact), exact)):
            weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) for x in results]
            sum((x * weight).sum() for x, weight in zip(results, weights)).backward()
            found.append([*results, *(x.grad for x in given)])
    for got, wanted in zip(*found):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_forward_and_backward_are_the_naive_ones():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["done"] * len(SHAPES), done.stderr


def test_it_is_not_taken_on_the_cpu():
    u = torch.zeros(1, 2, 3)
    assert kernels.find_triton(u, torch.float32) is None
    assert scan._find_run(u, 4, torch.float32) == (None, 1)  # and so small a scan is not worth compiling


def test_where_triton_does_not_run_torch_does(monkeypatch):
    class OnDevice(torch.Tensor):
        is_cuda = True

    def no_compiler():
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(kernels, "_found", [])
    monkeypatch.setattr(kernels, "build", no_compiler)
    u = torch.zeros(1, 2, 3).as_subclass(OnDevice)
    with pytest.warns(UserWarning, match="Triton cannot run the selective scan .*C compiler.*torch is used"):
        assert kernels.find_triton(u, torch.float32) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert scan._find_run(u, 4, torch.float32) == (None, 1)
    monkeypatch.setattr(kernels, "_found", ["found"])
    assert kernels.find_triton(u, torch.float32) == "found"
    assert kernels.find_triton(u, torch.float64) is None
    monkeypatch.setenv("MANTICORE_TRITON", "0")
    assert kernels.find_triton(u, torch.float32) is None


if __name__ == "__main__":
    for shape in SHAPES:
        check(*shape)
        print("done")
