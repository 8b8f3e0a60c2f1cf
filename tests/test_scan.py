"""The selective scan against a float64 loop."""

import importlib.util
import sys
from pathlib import Path

import clean_process
import pytest
import scans
import torch
from manticore_hf.modeling import scan_manticore
from scans import BATCH, D, make_inputs, naive_scan
from torch.utils.checkpoint import checkpoint

from manticore_hf.kernels import numba_scan as sk
from manticore_hf.kernels import scan as sm

NAMES = ("y", "last_state", "u", "dt", "A", "B", "C", "initial_state")
NEEDS_NUMBA = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is optional")
SHAPES = [(2, 37, 16), (1, 1, 16), (2, 16, 16), (1, 17, 16), (2, 5, 1), (1, 9, 64)]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outputs_and_gradients(scan, inputs, **kwargs):
    y, last = scan(*inputs, **kwargs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) for x in (y, last)]
    loss = (y * weights[0]).sum() + (last * weights[1]).sum()
    for x in inputs:
        x.grad = None
    loss.backward()  # reentrant checkpointing refuses autograd.grad
    return [y.detach(), last.detach(), *(x.grad for x in inputs)]


def assert_close(results, expected, tolerance):
    for name, a, b in zip(NAMES, results, expected):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-20)
        assert torch.isfinite(a).all() and error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 3e-6)])
@pytest.mark.parametrize("batch, time, chunk", SHAPES)
def test_scan_equals_float64_loop(dtype, tolerance, batch, time, chunk):
    expected = outputs_and_gradients(naive_scan, make_inputs(batch, time=time))
    results = outputs_and_gradients(sm.selective_scan, make_inputs(batch, time=time, dtype=dtype), chunk=chunk)
    assert results[0].dtype == results[1].dtype == dtype
    assert_close(results, expected, tolerance)


@NEEDS_NUMBA
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch, d, n, time", [(2, 5, 3, 37), (1, 70, 16, 33), (3, 130, 4, 1)])
def test_compiled_kernel_equals_float64_loop(monkeypatch, threads, batch, d, n, time):
    monkeypatch.setattr(sk, "MIN_STATES", 0)
    monkeypatch.delenv("MANTICORE_NUMBA", raising=False)
    assert sk.find_kernel(torch.zeros(1), 1, torch.float32) is not None
    torch.set_num_threads(threads)
    expected = outputs_and_gradients(naive_scan, make_inputs(batch, d, n, time))
    results = outputs_and_gradients(sm.selective_scan, make_inputs(batch, d, n, time, torch.float32))
    assert_close(results, expected, 3e-6)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_NUMBA)])
@pytest.mark.parametrize("dt", [1e-6, 1e-3, 1.0, 1e3])
def test_extreme_step_sizes_stay_finite(monkeypatch, dt, compiled):
    monkeypatch.setattr(sk, "MIN_STATES", 0 if compiled else sys.maxsize)
    expected = outputs_and_gradients(naive_scan, make_inputs(dt=dt))
    assert_close(outputs_and_gradients(sm.selective_scan, make_inputs(dt=dt, dtype=torch.float32)), expected, 1e-5)


@NEEDS_NUMBA
def test_compiled_kernel_keeps_nan(monkeypatch):
    monkeypatch.setattr(sk, "MIN_STATES", 0)
    for i in range(6):
        inputs = [x.detach() for x in make_inputs(dtype=torch.float32)]
        inputs[i][0, 0] = float("nan")
        assert sm.selective_scan(*inputs)[0].isnan().any(), NAMES[i + 2]


def test_gradcheck():
    inputs = make_inputs(1, 2, 2, 5)
    assert torch.autograd.gradcheck(lambda *x: sm.selective_scan(*x, chunk=2), inputs)
    assert torch.autograd.gradcheck(lambda *x: sm.selective_scan(*x, chunk=2)[0], inputs[:5])
    assert torch.autograd.gradcheck(lambda *x: sm.selective_scan(*x, chunk=2)[1], inputs)


def test_only_the_required_gradients():
    inputs = make_inputs()
    u = inputs[0]
    others = [x.detach() for x in inputs[1:]]
    y, _ = sm.selective_scan(u, *others)
    expected, _ = naive_scan(u, *others)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), u), torch.autograd.grad(expected.sum(), u))


def test_empty_sequence_returns_the_state():
    inputs = make_inputs(time=0)
    y, last = sm.selective_scan(*inputs)
    assert y.shape == (BATCH, D, 0)
    torch.testing.assert_close(last, inputs[-1])
    torch.testing.assert_close(torch.autograd.grad(last.sum(), inputs[-1])[0], torch.ones_like(inputs[-1]))


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk"):
        sm.selective_scan(*make_inputs(), chunk=0)


def test_non_contiguous_inputs():
    inputs = make_inputs()
    strided = [x.detach().flip(-1).contiguous().flip(-1).transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    strided = [x.requires_grad_() for x in strided]
    assert not strided[0].is_contiguous()
    assert_close(outputs_and_gradients(sm.selective_scan, strided), outputs_and_gradients(naive_scan, inputs), 1e-10)


def test_state_splits_the_sequence():
    u, dt, A, B, C, state = make_inputs()
    y, last = sm.selective_scan(u, dt, A, B, C, state)
    head, middle = sm.selective_scan(u[..., :11], dt[..., :11], A, B[..., :11], C[..., :11], state)
    tail, end = sm.selective_scan(u[..., 11:], dt[..., 11:], A, B[..., 11:], C[..., 11:], middle)
    torch.testing.assert_close(torch.cat((head, tail), -1), y)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    inputs = [x.detach().to(dtype) for x in make_inputs()]
    y, last = sm.selective_scan(*inputs)
    assert y.dtype == last.dtype == torch.float32
    expected = naive_scan(*(x.double() for x in inputs))
    torch.testing.assert_close(y.double(), expected[0], rtol=1e-5, atol=1e-5)
    leaf = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(sm.selective_scan(*leaf)[0].sum(), leaf)
    assert all(g.dtype == dtype and torch.isfinite(g).all() for g in grads)


def test_autocast_does_not_reach_the_scan():
    inputs = make_inputs(dtype=torch.float32)
    expected = outputs_and_gradients(sm.selective_scan, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = outputs_and_gradients(sm.selective_scan, inputs)
    assert_close(results, expected, 0.0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    inputs = make_inputs()

    def checkpointed(*x):
        return checkpoint(sm.selective_scan, *x, use_reentrant=use_reentrant)

    assert_close(outputs_and_gradients(checkpointed, inputs), outputs_and_gradients(sm.selective_scan, inputs), 0.0)


def test_no_grad_and_inference_mode():
    inputs = make_inputs()
    expected = sm.selective_scan(*inputs)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            results = sm.selective_scan(*inputs)
        assert not any(x.requires_grad for x in results)
        assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_inputs_are_left_alone():
    inputs = make_inputs()
    copies = [x.detach().clone() for x in inputs]
    outputs_and_gradients(sm.selective_scan, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))


def test_saved_memory_is_the_inputs_and_one_state_per_chunk():
    batch, d, n, time, chunk = 1, 8, 16, 256, 16
    inputs = make_inputs(batch, d, n, time, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        sm.selective_scan(*inputs, chunk=chunk)
    assert sum(saved) == sum(x.nbytes for x in inputs[:5]) + 4 * batch * d * n * (time // chunk + 1)


@pytest.mark.slow
def test_torch_compile_keeps_one_node():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    inputs = make_inputs()
    expected = outputs_and_gradients(sm.selective_scan, inputs)
    traced = torch.compile(sm.selective_scan, fullgraph=True, backend=backend)
    torch.testing.assert_close(traced(*inputs)[0], expected[0])
    assert sum("selective_scan" in str(node.target) for node in graphs[0].graph.nodes) == 1
    compiled = torch.compile(lambda *x: sm.selective_scan(*(2 * t for t in x)), fullgraph=True)
    expected = outputs_and_gradients(lambda *x: sm.selective_scan(*(2 * t for t in x)), inputs)
    assert_close(outputs_and_gradients(compiled, inputs), expected, 1e-10)


@pytest.mark.parametrize("differentiable", [True, False])
def test_operator_contract(differentiable):
    inputs = [x.detach().requires_grad_(differentiable) for x in make_inputs()]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(sm._FORWARD, (*inputs, 16), test_utils=tests)


def test_a_second_copy_shares_the_operators():
    inputs = make_inputs()
    expected = outputs_and_gradients(naive_scan, inputs)
    with scans.another_copy(sm) as copy:
        assert copy._FORWARD is sm._FORWARD
        assert_close(outputs_and_gradients(copy.selective_scan, inputs), expected, 1e-10)


def test_importing_needs_no_numba(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.setattr(sk, "_found", [])
    monkeypatch.setattr(sk, "MIN_STATES", 0)
    assert sk.find_kernel(torch.zeros(1), 1, torch.float32) is None


# ---- faster scans are registered by the package ----------------------------------------------------------------------


@NEEDS_NUMBA
@pytest.mark.parametrize("batch, d, n, time", [(2, 5, 3, 37), (1, 70, 16, 33)])
def test_results_are_the_same_without_numba(monkeypatch, batch, d, n, time):
    calls, find = [], sm.shared.scans["cpu"]
    monkeypatch.setattr(sk, "MIN_STATES", 0)
    monkeypatch.setitem(sm.shared.scans, "cpu", lambda *args: calls.append(1) or find(*args))
    found = outputs_and_gradients(sm.selective_scan, make_inputs(batch, d, n, time, torch.float32))
    assert len(calls) == 2 and find(torch.zeros(1, d, time), n, torch.float32) is not None
    monkeypatch.setattr(sm.shared, "scans", {})
    alone = outputs_and_gradients(sm.selective_scan, make_inputs(batch, d, n, time, torch.float32))
    assert_close(found, alone, 3e-6)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("batch, time", [(2, 37), (1, 1)])
def test_results_are_the_same_without_the_package(monkeypatch, dtype, tolerance, batch, time):
    """A repository's own code runs token by token."""
    calls, scan = [], scan_manticore._shared.scan
    monkeypatch.setattr(scan_manticore._shared, "scan", lambda *args: calls.append(1) or scan(*args))

    def given():
        return [x.detach().to(dtype).requires_grad_() for x in make_inputs(batch, time=time)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_gradients(scan_manticore.selective_scan, given())
        assert calls == [1]
        monkeypatch.delattr(scan_manticore._shared, "scan")
        alone = outputs_and_gradients(scan_manticore.selective_scan, given())
        no_state = scan_manticore.selective_scan(*given()[:5])
    assert calls == [1] and [x.dtype for x in alone] == [x.dtype for x in found]
    assert_close(alone, found, tolerance)
    assert_close(no_state, naive_scan(*(x.double() for x in given()[:5])), max(tolerance, 1e-5))
    compiled = torch.compile(scan_manticore.selective_scan, fullgraph=True, backend="eager")
    assert_close(compiled(*given()), scan_manticore.selective_scan(*given()), 1e-5)
    y, last = scan_manticore.selective_scan(*(make_inputs(batch, time=0)))
    assert y.shape == (batch, D, 0) and torch.equal(last, make_inputs(batch, time=0)[-1])


REMOTE_FIRST = """
import importlib.util, sys, torch
from pathlib import Path
folder = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location(
    "remote", folder / "__init__.py", submodule_search_locations=[str(folder)]
)
sys.modules["remote"] = importlib.util.module_from_spec(spec)
import remote.scan_manticore as scan
torch.manual_seed(0)
inputs = [torch.rand(1, 128, 64), torch.rand(1, 128, 64), -torch.rand(128, 64)]
inputs += [torch.rand(1, 64, 64), torch.rand(1, 64, 64)]
alone = scan.selective_scan(*inputs)
assert "manticore_hf" not in sys.modules
import manticore_hf
assert "manticore_hf.kernels.numba_scan" not in sys.modules and "numba" not in sys.modules
found = scan.selective_scan(*inputs)
assert "manticore_hf.kernels.numba_scan" in sys.modules
for a, b in zip(found, alone):
    torch.testing.assert_close(a, b)
from manticore_hf.kernels import numba_scan
print(numba_scan._found != [])
"""


def test_remote_code_finds_what_the_package_registers():
    """A hybrid that runs its repo's code, before the package is imported: nothing is missing, and nothing is stale."""
    folder = Path(scan_manticore.__file__).parent
    done = clean_process.run(["-c", REMOTE_FIRST, folder], modules=clean_process.TRANSFORMERS)
    assert done.stdout.strip() == "True", done.stderr
