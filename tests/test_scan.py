"""The selective scan against a float64 loop, and whole models against Transformers' own path."""

import copy
import importlib.util
import inspect
import pickle
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from manticore_hf.modeling import scan_kernel_manticore as sk
from manticore_hf.modeling import scan_manticore as sm
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

BATCH, D, N, TIME = 2, 5, 3, 37
NAMES = ("y", "last_state", "u", "dt", "A", "B", "C", "initial_state")
NEEDS_NUMBA = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is optional")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive_scan(u, dt, A, B, C, state=None):
    """The recurrence token by token, as written in the paper."""
    state = u.new_zeros(u.shape[0], *A.shape) if state is None else state
    outputs = []
    for t in range(u.shape[2]):
        state = torch.exp(dt[:, :, t, None] * A) * state + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(outputs, -1), state


def make_inputs(batch=BATCH, d=D, n=N, time=TIME, dtype=torch.float64, dt=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    steps = F.softplus(draw(batch, d, time)) if dt is None else torch.full((batch, d, time), dt, dtype=torch.float64)
    tensors = (draw(batch, d, time), steps, -torch.exp(draw(d, n)), draw(batch, n, time), draw(batch, n, time))
    return [x.to(dtype).requires_grad_() for x in (*tensors, draw(batch, d, n))]


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


# --- the scan -----------------------------------------------------------------------------------------------------


SHAPES = [(2, 37, 16), (1, 1, 16), (2, 16, 16), (1, 17, 16), (2, 5, 1), (1, 9, 64)]


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


def load_copy(name):
    """Imports the file once more under another name, as transformers' remote code does."""
    spec = importlib.util.spec_from_file_location(name, sm.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def second_copy():
    name = sm.__name__ + "_copy"
    yield load_copy(name)
    del sys.modules[name]


def test_a_second_copy_shares_the_operators(second_copy):
    assert second_copy._FORWARD is sm._FORWARD
    inputs = make_inputs()
    expected = outputs_and_gradients(naive_scan, inputs)
    assert_close(outputs_and_gradients(second_copy.selective_scan, inputs), expected, 1e-10)


# --- in Transformers ----------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
CONFIGS = {
    "mamba": {"state_size": 4, "expand": 2, "time_step_rank": 2},
    "falcon_mamba": {"state_size": 4, "expand": 2, "time_step_rank": 2},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "jamba": {
        "num_hidden_layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
    },
}
SCANNING = ("mamba", "falcon_mamba", "jamba")
CACHE_NAME = dict.fromkeys(CONFIGS, "cache_params") | {"jamba": "past_key_values"}


def modeling(model_type):
    return sm._modeling_module(model_type)


def uninstall(model_type):
    for name, function in list(vars(modeling(model_type)).items()):
        if inspect.isfunction(function) and hasattr(function, sm._MARK):
            setattr(modeling(model_type), name, getattr(function, sm._MARK))


def build(model_type, dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SMALL | CONFIGS[model_type] | overrides))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the default scale is so small that a lost state would hardly show
        for name, parameter in model.named_parameters():
            if name.endswith(("_proj.weight", "conv1d.weight", "embeddings.weight")):
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def mixers(model):
    return [m for m in model.modules() if type(m).__name__ in sm._SCAN_MIXERS]


@pytest.fixture(autouse=True)
def restored():
    yield
    for model_type in CONFIGS:
        uninstall(model_type)
    assert getattr(sm._shared.local, "state", None) is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", SCANNING)
def test_model_equals_upstream(model_type, training):
    model = build(model_type).train(training)
    ids = torch.randint(1, 61, (2, 21))
    results = []
    for installed in (False, True):
        if installed:
            assert sm.install(model_type)
        model.zero_grad()
        logits = model(ids, labels=ids, use_cache=False)
        logits.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits.logits.detach(), grads))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


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


def chunked(model, model_type, ids, mask, size, full_mask=False):
    """Logits from prefilling `size` tokens at a time into one cache."""
    cache = DynamicCache(config=model.config)
    trims_itself = model_type in ("mamba2", "jamba") or full_mask
    bounds = list(range(0, ids.shape[1], size)) + [ids.shape[1]]
    if size == 1 and mask is not None and model_type in ("mamba2", "jamba"):
        # Their models drop the mask of single tokens, "a generated token is never padding": padding needs one prefill
        bounds = bounds[:1] + bounds[5:]
    outputs = []
    for s, e in zip(bounds, bounds[1:]):
        kwargs = {CACHE_NAME[model_type]: cache, "use_cache": True}
        if mask is not None:
            kwargs["attention_mask"] = mask[:, :e] if trims_itself else mask[:, s:e]
            if model_type == "jamba":
                kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, s:e]
        outputs.append(model(ids[:, s:e], **kwargs).logits)
    return torch.cat(outputs, 1), cache


def padded_inputs(padded, length=11):
    ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(3))
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # longer than the shortest chunks: whole chunks of one row are padding
    return ids * mask, mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_chunked_prefill_equals_the_full_forward(model_type, size, padded):
    model = build(model_type)
    sm.install(model_type)
    assert sm.carry_state(model) == (0 if model_type == "mamba2" else 2)
    ids, mask = padded_inputs(padded)
    with torch.no_grad():
        position_ids = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if padded and model_type == "jamba" else {}
        full = model(ids, attention_mask=mask, use_cache=False, **position_ids).logits
        once, whole = chunked(model, model_type, ids, mask, ids.shape[1])
        logits, cache = chunked(model, model_type, ids, mask, size)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(once[real], full[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[real], full[real], rtol=1e-4, atol=1e-5)
    for a, b in zip(cache.layers, whole.layers):
        if hasattr(a, "recurrent_states"):
            torch.testing.assert_close(a.recurrent_states[0], b.recurrent_states[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a.conv_states[0], b.conv_states[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", SCANNING)
def test_upstream_still_loses_the_state(model_type):
    """If this fails, Transformers has fixed it, and `carry_state` should go."""
    model = build(model_type)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        logits, _ = chunked(model, model_type, ids, None, 5)
    assert (logits - full).abs().max() > 1e-3


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_mask_over_the_whole_history(model_type, size):
    model = build(model_type)
    sm.carry_state(model)
    ids, mask = padded_inputs(True)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, use_cache=False).logits
        logits, _ = chunked(model, model_type, ids, mask, size, full_mask=True)
    torch.testing.assert_close(logits[mask.bool()], full[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", SCANNING)
def test_bfloat16_keeps_the_state_in_float32(model_type):
    model = build(model_type, torch.bfloat16)
    sm.carry_state(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        logits, cache = chunked(model, model_type, ids, None, 3)
    states = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
    assert states and all(state.dtype == torch.float32 for state in states)
    assert (logits - full).abs().max() < 0.05 * full.abs().max()


def test_gradient_flows_through_a_cached_continuation():
    model = build("mamba")
    sm.carry_state(model)
    ids, _ = padded_inputs(False)
    grads = []
    for logits in (model(ids, use_cache=False).logits, chunked(model, "mamba", ids, None, 4)[0]):
        model.zero_grad()
        logits.square().sum().backward()
        grads.append(model.backbone.layers[0].mixer.A_log.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_reordered_cache():
    model = build("mamba")
    sm.carry_state(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).cache_params
        cache.reorder_cache(torch.tensor([1, 0]))
        logits = model(ids.flip(0)[:, 6:], cache_params=cache, use_cache=True).logits
        full = model(ids.flip(0), use_cache=False).logits[:, 6:]
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-5)


def test_shallow_copies_with_another_layer_index():
    model = build("mamba")
    sm.carry_state(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    for i, block in enumerate(model.backbone.layers):
        mixer = copy.copy(block.mixer)
        assert mixer._forward_pre_hooks is block.mixer._forward_pre_hooks
        mixer.layer_idx = 1 - i
        block.mixer = mixer
    assert sm.carry_state(model) == 2
    with torch.no_grad():
        logits, _ = chunked(model, "mamba", ids, None, 4)
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-5)


def test_hooks_are_added_once_and_survive_copies():
    model = build("mamba")
    keys = list(model.state_dict())
    assert sm.carry_state(model) == sm.carry_state(model) == 2
    for candidate in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sm.carry_state(candidate) == 2
        assert all(len(m._forward_pre_hooks) == len(m._forward_hooks) == 1 for m in mixers(candidate))
        assert list(candidate.state_dict()) == keys
    assert sm.carry_state(torch.nn.Linear(2, 2)) == 0


def test_state_is_dropped_when_the_forward_raises():
    model = build("mamba")
    sm.carry_state(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = model(ids[:, :4], use_cache=True).cache_params
        out_proj, model.backbone.layers[0].mixer.x_proj = model.backbone.layers[0].mixer.x_proj, torch.nn.Linear(3, 3)
        with pytest.raises(RuntimeError):
            model(ids[:, 4:], cache_params=cache, use_cache=True)
        assert getattr(sm._shared.local, "state", None) is None
        model.backbone.layers[0].mixer.x_proj = out_proj
        torch.testing.assert_close(model(ids, use_cache=False).logits, full)


def test_interrupted_forward_leaves_nothing_behind():
    model = build("mamba")
    sm.carry_state(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = model(ids[:, :4], use_cache=True).cache_params

        def interrupt(*args):
            raise KeyboardInterrupt

        handle = mixers(model)[0].x_proj.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 4:], cache_params=cache, use_cache=True)
        handle.remove()
        torch.testing.assert_close(model(ids, use_cache=False).logits, full)


def test_a_lost_state_is_an_error_not_a_wrong_result():
    model = build("mamba")
    sm.carry_state(model)
    uninstall("mamba")
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).cache_params
        with pytest.raises(RuntimeError, match="install"):
            model(ids[:, 4:], cache_params=cache, use_cache=True)


def test_threads_do_not_see_each_others_state():
    model = build("mamba")
    sm.carry_state(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    errors = []

    def work(size):
        with torch.no_grad():
            for _ in range(5):
                errors.append((chunked(model, "mamba", ids, None, size)[0] - full).abs().max().item())

    threads = [threading.Thread(target=work, args=(size,)) for size in (2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 15 and max(errors) < 1e-4


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
    assert not sm.install("gpt_neox") and not sm.install("no_such_model") and not sm.install("mamba2")


def test_unexpected_signature_falls_back_loudly(monkeypatch):
    def changed(hidden_states, dt, A, B, C, new_argument=None):
        raise AssertionError("not called")

    monkeypatch.setattr(modeling("jamba"), "mamba_selective_scan", changed)
    sm._shared.__dict__.pop("warned", None)
    with pytest.warns(UserWarning, match="left in place"):
        assert not sm.install("jamba")
    assert modeling("jamba").mamba_selective_scan is changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sm.install("jamba")  # once is enough


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
    u, dt, A, B, C, state = (x.detach() for x in make_inputs())

    class OnDevice(torch.Tensor):
        is_cuda = True

    fake = u.as_subclass(OnDevice)
    module.mamba_selective_scan(fake, dt, A, B, C, return_last_state=True)
    assert calls == [True]
    sm._shared.local.state = state
    y, _ = module.mamba_selective_scan(fake, dt, A, B, C, return_last_state=True)
    assert calls == [True]
    torch.testing.assert_close(y.as_subclass(torch.Tensor), naive_scan(u, dt, A, B, C, state)[0], rtol=1e-6, atol=1e-6)


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


@pytest.mark.slow
def test_compiled_continuation_from_a_cache():
    model = build("mamba")
    sm.carry_state(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        cache = compiled(ids[:, :5], use_cache=True).cache_params
        logits = compiled(ids[:, 5:], cache_params=cache, use_cache=True).logits
    torch.testing.assert_close(logits, full[:, 5:], rtol=1e-4, atol=1e-5)


def test_importing_needs_no_numba(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.setattr(sk, "_found", [])
    monkeypatch.setattr(sk, "MIN_STATES", 0)
    assert sk.find_kernel(torch.zeros(1), 1, torch.float32) is None
