"""How the scan gets into Transformers: once, reversibly, and out of the way of kernels, tracing and other copies."""

import copy
import inspect
import pickle
import warnings

import pytest
import scans
import torch
from manticore_hf.modeling import fast_mixers_manticore as sm
from scans import BATCH, TIME, D, build, chunked, make_inputs, mixers, modeling, naive_scan, padded_inputs, uninstall
from torch._subclasses.fake_tensor import FakeTensorMode

restored, second_copy = scans.restored, scans.second_copy


def test_hooks_are_added_once_and_survive_copies():
    model = build("mamba")
    keys = list(model.state_dict())
    assert sm.carry_state(model) == sm.carry_state(model) == 2
    for candidate in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sm.carry_state(candidate) == 2
        assert all(len(m._forward_pre_hooks) == len(m._forward_hooks) == 1 for m in mixers(candidate))
        assert list(candidate.state_dict()) == keys
    assert sm.carry_state(torch.nn.Linear(2, 2)) == 0


def test_install_is_idempotent():
    upstream = modeling("mamba").mamba_selective_scan
    assert sm.install("mamba")
    dispatcher = modeling("mamba").mamba_selective_scan
    assert dispatcher is not upstream and sm.install("mamba")
    assert modeling("mamba").mamba_selective_scan is dispatcher
    uninstall("mamba")
    assert modeling("mamba").mamba_selective_scan is upstream


def test_two_copies_do_not_stack(second_copy):
    upstream = modeling("mamba").mamba_selective_scan
    model = build("mamba")
    sm.carry_state(model)
    assert second_copy.install("mamba")
    assert getattr(modeling("mamba").mamba_selective_scan, sm._MARK) is upstream
    assert second_copy.carry_state(model) == 2
    assert all(len(m._forward_pre_hooks) == 1 for m in mixers(model))
    # the hook of one copy hands the state to the dispatcher of the other
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        torch.testing.assert_close(chunked(model, "mamba", ids, None, 4)[0], full, rtol=1e-4, atol=1e-5)


def test_other_model_types_are_left_alone():
    assert not sm.install("gpt_neox") and not sm.install("no_such_model")


@pytest.mark.parametrize(
    "model_type, name",
    [
        ("jamba", "mamba_selective_scan"),
        ("mamba2", "causal_conv1d_fn"),
        ("mamba2", "mamba2_chunk_scan"),
        ("mamba2", "mamba2_selective_state_update"),
    ],
)
def test_unexpected_signature_falls_back_loudly(monkeypatch, model_type, name):
    def changed(hidden_states, dt, A, B, C, new_argument=None):
        raise AssertionError("not called")

    monkeypatch.setattr(modeling(model_type), name, changed)
    sm._shared.__dict__.pop("warned", None)
    with pytest.warns(UserWarning, match=f"{name} has the signature.*left in place"):
        assert not sm.install(model_type)
    assert getattr(modeling(model_type), name) is changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sm.install(model_type)  # once is enough


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_D, with_z, with_last", [(True, True, True), (False, False, False), (True, False, True)])
def test_dispatcher_keeps_upstreams_types(dtype, with_D, with_z, with_last):
    inputs = make_inputs(dtype=dtype)
    u, dt, _, B, C, _ = (x.detach() for x in inputs)
    kwargs = {"delta_bias": torch.randn(D), "delta_softplus": True, "return_last_state": with_last}
    kwargs |= {"D": torch.randn(D) if with_D else None, "z": torch.randn_like(u) if with_z else None}
    args = (u, dt, inputs[2].detach().float(), B, C)
    expected = inspect.unwrap(modeling("mamba").mamba_selective_scan)(*args, **kwargs)
    assert sm.install("mamba")
    results = modeling("mamba").mamba_selective_scan(*args, **kwargs)
    if not with_last:
        expected, results = (expected,), (results,)
    for result, reference in zip(results, expected):
        assert result.dtype == reference.dtype and result.shape == reference.shape
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(result, reference, rtol=tolerance, atol=tolerance)


def bind(torch_function, implementation):
    """Mimics how Transformers binds the function of an importable package, without a device check."""
    import functools

    @functools.wraps(torch_function)
    def wrapped(*args, **kwargs):
        return implementation(*args, **kwargs)

    return wrapped


def test_upstream_binds_kernels_as_expected():
    """`_is_bound_to_kernel` reads this private closure; if it goes, CUDA kernels are neither found nor guarded."""
    assert "implementation" in inspect.getclosurevars(modeling("mamba").mamba_selective_scan).nonlocals


def test_cpu_tensors_never_reach_cuda_kernels(monkeypatch):
    def kernel(*args, **kwargs):
        raise AssertionError("a CPU tensor reached a CUDA kernel")

    module = modeling("mamba")
    names = ("mamba_selective_scan", "mamba_inner_fn", "mamba_selective_state_update", "causal_conv1d_fn")
    for name in (*names, "causal_conv1d_update"):
        monkeypatch.setattr(module, name, bind(inspect.unwrap(getattr(module, name)), kernel))
    model = build("mamba")
    ids, _ = padded_inputs(False)
    with pytest.raises(AssertionError, match="CUDA kernel"):
        model(ids)
    sm.carry_state(model)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        torch.testing.assert_close(chunked(model, "mamba", ids, None, 1)[0], full, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(chunked(model, "mamba", ids, None, 4)[0], full, rtol=1e-4, atol=1e-5)
    model.train()(ids, labels=ids).loss.backward()


def test_cuda_tensors_use_the_kernel_unless_a_state_is_needed(monkeypatch):
    """A stand-in that only claims to be on a GPU shows which way the dispatcher takes."""
    module, calls = modeling("mamba"), []
    plain = inspect.unwrap(module.mamba_selective_scan)

    def kernel(*args, **kwargs):
        calls.append(kwargs["return_last_state"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, "mamba_selective_scan", bind(plain, kernel))
    sm.install("mamba")
    u, dt, A, B, C, state = (x.detach() for x in make_inputs(dtype=torch.float32))

    class OnDevice(torch.Tensor):
        is_cuda = True

    fake = u.as_subclass(OnDevice)
    module.mamba_selective_scan(fake, dt, A, B, C, return_last_state=True)
    assert calls == [True]
    sm._shared.local.state = state
    y, _ = module.mamba_selective_scan(fake, dt, A, B, C, return_last_state=True)
    assert calls == [True]
    torch.testing.assert_close(y.as_subclass(torch.Tensor), naive_scan(u, dt, A, B, C, state)[0], rtol=1e-5, atol=1e-5)
    sm._shared.local.state = None
    module.mamba_selective_scan(fake.double(), dt, A, B, C)
    assert calls == [True]  # no kernel takes float64


def test_fake_tensors_of_a_gpu_reach_no_kernel():
    """A kernel would read and write where they say they are, and take the process with it."""
    with FakeTensorMode():
        assert torch.empty(2, 3, device="cuda").is_cuda
        assert not sm._kernel_takes(torch.empty(2, 3, device="cuda"))


def test_a_convolution_kernel_gets_what_it_calls_by_name(monkeypatch):
    """Its parameters come in another order than those of Transformers' version."""
    module, seen = modeling("mamba"), []

    def causal_conv1d(
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        seen.append((bias, seq_idx, initial_states, activation))
        return x

    monkeypatch.setattr(module, "causal_conv1d_fn", bind(inspect.unwrap(module.causal_conv1d_fn), causal_conv1d))
    sm.install("mamba")
    monkeypatch.setattr(sm, "_kernel_takes", lambda tensor: True)
    bias = torch.ones(4)
    module.causal_conv1d_fn(torch.ones(2, 4, 9), torch.ones(4, 4), bias, "silu")
    module.causal_conv1d_fn(torch.ones(2, 4, 9), torch.ones(4, 4), bias, activation="silu", seq_idx=bias)
    assert seen[0][0] is bias and seen[0][1:] == (None, None, "silu")
    assert seen[1][0] is seen[1][1] is bias and seen[1][3] == "silu"


def test_packed_sequences_are_left_to_upstream():
    sm.install("mamba")
    u, dt, A, B, C, _ = (x.detach() for x in make_inputs())
    with pytest.raises(ValueError, match="packed"):
        modeling("mamba").mamba_selective_scan(u, dt, A, B, C, seq_idx=torch.zeros(BATCH, TIME))


def test_tracing_uses_upstreams_path():
    sm.install("mamba")
    inputs = tuple(x.detach() for x in make_inputs(time=3)[:5])
    traced = torch.jit.trace(lambda *x: modeling("mamba").mamba_selective_scan(*x), inputs)
    assert "manticore" not in str(traced.graph)


def test_hooks_do_not_break_the_graph():
    model = build("mamba")
    sm.carry_state(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(lambda x: model(x, use_cache=False).logits, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids), expected)
