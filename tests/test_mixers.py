"""Mixers get forwards of their own: nothing else in the process changes, and copies, pickles and hooks keep them."""

import copy
import functools
import inspect
import pickle
import sys
import types
import warnings

import clean_process
import pytest
import torch
from manticore_hf.modeling import mixers_manticore as mm
from manticore_hf.modeling import scan_manticore, ssd_manticore
from scans import (
    BATCH,
    SMALL,
    TIME,
    D,
    another_package,
    bind,
    build,
    chunked,
    make_inputs,
    mixers,
    modeling,
    naive_scan,
    own_globals,
    padded_inputs,
    read,
    read_elsewhere,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.utils import is_kernels_available

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.families.tiny import tiny_config, tiny_model, tokens

FAMILIES = (
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "mamba",
    "mamba2",
    "nemotron_h",
    "zamba2",
)


def identities(model):
    """All that a module of Transformers' defines, and what its classes define: by identity."""
    found = {}
    for key, value in vars(sys.modules[type(model).__module__]).items():
        found[key] = value
        if inspect.isclass(value):
            found |= {f"{key}.{name}": own for name, own in vars(value).items()}
    return found


# ---- nothing else changes --------------------------------------------------------------------------------------------


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_beside_a_hybrid_is_untouched(family, monkeypatch):
    plain = tiny_model(tiny_config(family))
    component, before = copy.deepcopy(plain), identities(plain)
    wanted = [read(plain, sizes) for sizes in ([9], [5, 1, 1, 1, 1])]
    hybrid = ManticoreForCausalLM.from_components([ComponentSpec(component, name="a")], num_blocks=1)
    own = mixers(hybrid)
    assert own and all(type(mixer).forward is before[f"{type(mixer).__name__}.forward"] for mixer in own)
    found = read(hybrid, [5, 2, 1, 1])
    torch.testing.assert_close(found.log_softmax(-1), wanted[0].log_softmax(-1), rtol=1e-4, atol=1e-4)

    after = identities(plain)
    assert after.keys() == before.keys() and all(after[key] is value for key, value in before.items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in plain.modules())
    monkeypatch.setattr(scan_manticore._shared, "scan", lambda *args: pytest.fail("the plain model runs our scan"))
    monkeypatch.setattr(ssd_manticore, "chunk_scan", lambda *args: pytest.fail("the plain model runs our scan"))
    monkeypatch.setattr(mm._shared, "causal_conv1d", lambda *args: pytest.fail("the plain model runs our convolution"))
    for sizes, logits in zip(([9], [5, 1, 1, 1, 1]), wanted):
        assert torch.equal(read(plain, sizes), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixer_of_every_family_is_repaired(family):
    model = tiny_model(tiny_config(family))
    kinds = {id(module): type(module) for module in model.modules()}
    wanted, keys = read(model, [9]), list(model.state_dict())
    scanning = [m for m in model.modules() if hasattr(m, "A_log")]
    assert mm.repair_mixers(model) == len(scanning) > 0
    assert mixers(model) == scanning
    assert {id(module): type(module) for module in model.modules()} == kinds and list(model.state_dict()) == keys
    for sizes in ([9], [4, 3, 1, 1], [1] * 9):
        torch.testing.assert_close(read(model, sizes), wanted, rtol=1e-4, atol=1e-5)


def test_repairing_again_changes_nothing():
    model = build("mamba")
    assert mm.repair_mixers(model) == 2
    forwards = [mixer.forward for mixer in mixers(model)]
    assert mm.repair_mixers(model) == 2
    assert all(mixer.forward is forward for mixer, forward in zip(mixers(model), forwards, strict=True))
    for other in (torch.nn.Linear(2, 2), tiny_model(tiny_config("llama")), tiny_model(tiny_config("lfm2"))):
        assert mm.repair_mixers(other) == 0 and not mixers(other)


def test_two_copies_of_the_code_do_not_stack():
    """Remote code beside the package: whichever comes second leaves a mixer's forward as it is, also when copied."""
    ids, _ = padded_inputs(False)
    with another_package(mm) as other, torch.no_grad():
        assert other is not mm and other.OwnForward is not mm.OwnForward
        for first, second in ((mm, other), (other, mm)):
            model = build("mamba")
            full = model(ids, use_cache=False).logits
            assert first.repair_mixers(model) == 2
            own = [m.forward for m in model.modules() if "forward" in vars(m)]
            assert second.repair_mixers(model) == 2
            assert [m.forward for m in model.modules() if "forward" in vars(m)] == own
            torch.testing.assert_close(chunked(model, "mamba", ids, None, 4)[0], full, rtol=1e-4, atol=1e-5)
            beside = build("mamba")
            assert second.repair_mixers(beside) == 2
            assert torch.equal(chunked(beside, "mamba", ids, None, 4)[0], chunked(model, "mamba", ids, None, 4)[0])


def test_what_older_copies_of_the_code_replaced_is_not_used(monkeypatch):
    """A repo published before 0.2 puts its functions into Transformers' modules, marked with what was there."""
    module = modeling("mamba")

    def dispatcher(*args, **kwargs):
        raise AssertionError("called")

    for name in ("mamba_selective_scan", "causal_conv1d_fn"):
        old = types.FunctionType(dispatcher.__code__, dispatcher.__globals__)
        old._manticore_upstream = getattr(module, name)
        monkeypatch.setattr(module, name, old)
    model = build("mamba")
    mm.repair_mixers(model)
    read(model)


# ---- copies, pickles, processes, and who else replaces forwards ------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_have_forwards_of_their_own(family):
    model = tiny_model(tiny_config(family))
    count = mm.repair_mixers(model)
    wanted = read(model)
    for candidate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(mixers(candidate)) == count
        for mixer in mixers(candidate):
            assert mixer.forward.mixer is mixer
        assert mm.repair_mixers(candidate) == count
        assert torch.equal(read(candidate), wanted)
        with torch.no_grad():  # its own weights are read
            next(p for name, p in candidate.named_parameters() if name.endswith("A_log")).add_(1.0)
        assert not torch.equal(read(candidate), wanted) and torch.equal(read(model), wanted)


def test_a_forward_alone_is_pickled_with_its_mixer():
    model = build("mamba")
    mm.repair_mixers(model)
    mixer = mixers(model)[1]
    for twin in (pickle.loads(pickle.dumps(mixer)), pickle.loads(pickle.dumps(mixer.forward)).mixer):
        assert type(twin) is type(mixer) and twin.forward.mixer is twin and twin.layer_idx == 1


def test_a_fresh_process_restores_the_forwards(tmp_path):
    model = tiny_model(tiny_config("nemotron_h"))
    mm.repair_mixers(model)
    torch.save({"model": model, "wanted": read(model)}, tmp_path / "model.pt")
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); from scans import mixers, read\n"
        "found = torch.load(sys.argv[1], weights_only=False)\n"
        "assert len(mixers(found['model'])) == 2\n"
        "torch.testing.assert_close(read(found['model']), found['wanted']); print('same')"
    )
    folder = str(next(path for path in sys.path if path.endswith("tests")))
    done = clean_process.run(["-c", program, tmp_path / "model.pt", folder])
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.slow
def test_spawned_processes(tmp_path):
    """The model is an argument of the process: a pool that loses its worker while unpickling a task waits for ever."""
    model = build("mamba")
    mm.repair_mixers(model)
    torch.multiprocessing.spawn(read_elsewhere, (model, tmp_path / "read.pt"))
    count, logits = torch.load(tmp_path / "read.pt")
    assert count == 2
    torch.testing.assert_close(logits, read(model))


def test_a_shallow_copy_gets_its_own_when_repaired():
    model = build("mamba")
    mm.repair_mixers(model)
    mixer = mixers(model)[0]
    other = copy.copy(mixer)
    other.layer_idx = 1
    assert other.forward is mixer.forward
    assert mm.repair_mixers(other) == 1 and other.forward.mixer is other and mixer.forward.mixer is mixer


@pytest.mark.parametrize("hooked_first", [False, True])
def test_accelerates_hooks_run_over_it(hooked_first):
    """It replaces a module's forward by one that calls what it found, and puts that back."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    calls = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model = build("mamba")
    wanted = read(model, [9])
    if not hooked_first:
        mm.repair_mixers(model)
    targets = [module for module in model.modules() if hasattr(module, "A_log")]
    for module in targets:
        add_hook_to_module(module, Hook())
    assert mm.repair_mixers(model) == 2
    torch.testing.assert_close(read(model), wanted, rtol=1e-4, atol=1e-5)
    assert calls[:2] == targets
    for twin in (copy.deepcopy(model), model):
        for module in twin.modules():
            remove_hook_from_module(module)
        assert len(mixers(twin)) == 2
        torch.testing.assert_close(read(twin), wanted, rtol=1e-4, atol=1e-5)


def test_a_forward_that_somebody_else_gave_a_mixer_stays():
    model = build("mamba")
    mixer = next(module for module in model.modules() if hasattr(module, "A_log"))
    mixer.forward = given = functools.partial(type(mixer).forward, mixer)
    mm.repair_mixers(model)
    assert mixer.forward is given


# ---- which function runs ---------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(mm, "_warned", set())
    model = build(model_type)
    with pytest.warns(UserWarning, match=f"{name} has the signature.*left in place"):
        mm.repair_mixers(model)
    assert own_globals(mixers(model)[0])[name] is changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm.repair_mixers(build(model_type))  # once is enough


def test_a_lost_state_is_an_error_not_a_wrong_result(monkeypatch):
    plain = inspect.unwrap(modeling("mamba").mamba_selective_scan)

    def changed(hidden_states, dt, A, B, C, D, z, delta_bias, **kwargs):
        return plain(hidden_states, dt, A, B, C, D, z, delta_bias, **kwargs)

    monkeypatch.setattr(modeling("mamba"), "mamba_selective_scan", changed)
    model = build("mamba")
    with pytest.warns(UserWarning, match="cannot continue from a cache"):
        monkeypatch.setattr(mm, "_warned", set())
        mm.repair_mixers(model)
    torch.testing.assert_close(read(model, [6, 1, 1, 1]), read(model, [9]), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="silently wrong"):
        read(model, [4, 3, 2])


def test_without_source_that_is_said_and_nothing_is_silently_wrong(monkeypatch):
    monkeypatch.setattr(mm.linecache, "getlines", lambda *args: [])
    mm._ways.cache_clear()
    model = build("mamba")
    with pytest.warns(UserWarning, match="The source of MambaMixer.forward cannot be read"):
        mm.repair_mixers(model)
    monkeypatch.undo()
    mm._ways.cache_clear()
    torch.testing.assert_close(read(model, [6, 1, 1, 1]), read(model, [9]), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="silently wrong"):
        read(model, [4, 3, 2])


def test_errors_in_a_mixer_point_to_transformers_source(monkeypatch):
    model = build("mamba")
    mm.repair_mixers(model)
    mixer = mixers(model)[0]
    monkeypatch.setattr(mixer.x_proj, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        model(padded_inputs(False)[0])
    entry = next(
        one
        for one in error.traceback
        if one.path and one.path.name == "modeling_mamba.py" and "x_proj" in str(one.statement)
    )
    assert entry.frame.code.name == "forward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_D, with_z, with_last", [(True, True, True), (False, False, False), (True, False, True)])
def test_our_scan_keeps_upstreams_types(dtype, with_D, with_z, with_last):
    inputs = make_inputs(dtype=dtype)
    u, dt, _, B, C, _ = (x.detach() for x in inputs)
    kwargs = {"delta_bias": torch.randn(D), "delta_softplus": True, "return_last_state": with_last}
    kwargs |= {"D": torch.randn(D) if with_D else None, "z": torch.randn_like(u) if with_z else None}
    args, upstream = (u, dt, inputs[2].detach().float(), B, C), modeling("mamba").mamba_selective_scan
    expected = inspect.unwrap(upstream)(*args, **kwargs)
    results = mm._make_scan(upstream)(*args, **kwargs)
    if not with_last:
        expected, results = (expected,), (results,)
    for result, reference in zip(results, expected):
        assert result.dtype == reference.dtype and result.shape == reference.shape
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(result, reference, rtol=tolerance, atol=tolerance)


def test_upstream_binds_kernels_as_expected():
    """`_implementation` reads this private closure; if it goes, CUDA kernels are neither found nor guarded."""
    assert mm._implementation(modeling("mamba").mamba_selective_scan) is not None
    assert not mm.has_kernel(modeling("mamba").mamba_selective_scan)


KERNELS = (
    "mamba_selective_scan",
    "mamba_inner_fn",
    "mamba_selective_state_update",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)


def test_cpu_tensors_never_reach_cuda_kernels(monkeypatch):
    def kernel(*args, **kwargs):
        raise AssertionError("a CPU tensor reached a CUDA kernel")

    module = modeling("mamba")
    for name in KERNELS:
        monkeypatch.setattr(module, name, bind(inspect.unwrap(getattr(module, name)), kernel))
    model = build("mamba")
    ids, _ = padded_inputs(False)
    with pytest.raises(AssertionError, match="CUDA kernel"):
        model(ids)
    mm.repair_mixers(model)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        torch.testing.assert_close(chunked(model, "mamba", ids, None, 1)[0], full, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(chunked(model, "mamba", ids, None, 4)[0], full, rtol=1e-4, atol=1e-5)
    model.train()(ids, labels=ids).loss.backward()


class OnDevice(torch.Tensor):
    """A stand-in that only claims to be on a GPU, which shows which way a call takes."""

    is_cuda = True


def test_cuda_tensors_use_the_kernel_unless_a_state_is_needed():
    calls, plain = [], inspect.unwrap(modeling("mamba").mamba_selective_scan)

    def kernel(*args, **kwargs):
        calls.append(kwargs["return_last_state"])
        return plain(*args, **kwargs)

    scan = mm._make_scan(bind(plain, kernel))
    u, dt, A, B, C, state = (x.detach() for x in make_inputs(dtype=torch.float32))
    fake = u.as_subclass(OnDevice)
    scan(fake, dt, A, B, C, return_last_state=True)
    assert calls == [True]
    y, _ = scan(fake, dt, A, B, C, return_last_state=True, initial_states=state)
    assert calls == [True]
    torch.testing.assert_close(y.as_subclass(torch.Tensor), naive_scan(u, dt, A, B, C, state)[0], rtol=1e-5, atol=1e-5)
    scan(fake.double(), dt, A, B, C)
    assert calls == [True]  # no kernel takes float64


def test_fake_tensors_of_a_gpu_reach_no_kernel():
    """A kernel would read and write where they say they are, and take the process with it."""
    with FakeTensorMode():
        assert torch.empty(2, 3, device="cuda").is_cuda
        assert not mm._kernel_takes(torch.empty(2, 3, device="cuda"))


def test_a_convolution_kernel_gets_what_it_calls_by_name(monkeypatch):
    """Its parameters come in another order than those of Transformers' version."""
    seen = []

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

    conv = mm._make_conv(bind(inspect.unwrap(modeling("mamba").causal_conv1d_fn), causal_conv1d))
    monkeypatch.setattr(mm, "_kernel_takes", lambda tensor: True)
    bias = torch.ones(4)
    conv(torch.ones(2, 4, 9), torch.ones(4, 4), bias, "silu")
    conv(torch.ones(2, 4, 9), torch.ones(4, 4), bias, activation="silu", seq_idx=bias)
    assert seen[0][0] is bias and seen[0][1:] == (None, None, "silu")
    assert seen[1][0] is seen[1][1] is bias and seen[1][3] == "silu"


def test_packed_sequences_are_left_to_upstream():
    u, dt, A, B, C, _ = (x.detach() for x in make_inputs())
    with pytest.raises(ValueError, match="packed"):
        mm._make_scan(modeling("mamba").mamba_selective_scan)(u, dt, A, B, C, seq_idx=torch.zeros(BATCH, TIME))


def test_tracing_uses_upstreams_path():
    scan = mm._make_scan(modeling("mamba").mamba_selective_scan)
    inputs = tuple(x.detach() for x in make_inputs(time=3)[:5])
    traced = torch.jit.trace(lambda *x: scan(*x), inputs)
    assert "manticore" not in str(traced.graph)


# The scans of Mamba and Mamba-2, and both layers and attention; a family's own forward comes with the slow tests
COMPILED = [
    family if family in ("jamba", "mamba", "mamba2") else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES
]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("family", COMPILED)
def test_the_graph_is_as_whole_as_it_was(family):
    model = tiny_model(tiny_config(family))
    mm.repair_mixers(model)
    expected, forward = read(model, [9]), model.forward
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda x: forward(x, use_cache=False).logits, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens() % SMALL["vocab_size"]), expected)


# ---- with the package `kernels` --------------------------------------------------------------------------------------


def as_kernels_does(function):
    """What the package's `use_kernel_forward_from_hub` makes of a function."""

    class Func(torch.nn.Module):
        can_torch_compile = False
        has_backward = True

        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    Func.forward.__signature__ = inspect.Signature([own, *inspect.signature(function).parameters.values()])
    return Func()


@pytest.fixture
def with_kernels(monkeypatch):
    """Makes a model type's module as it is when `kernels` is installed; gives its functions, which are modules then."""

    def wrap(model_type):
        module, wrapped = modeling(model_type), {}
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and mm._implementation(value) is not None:
                wrapped[name] = as_kernels_does(value)
                monkeypatch.setattr(module, name, wrapped[name])
        assert any("scan" in name for name in wrapped)
        return wrapped

    return wrap


def kernelize(function, kernel):
    """What `use_kernels` does to it: the kernel's forward on the instance."""
    function.forward = types.MethodType(lambda self, *args, **kwargs: kernel(*args, **kwargs), function)


@pytest.mark.parametrize("family", FAMILIES)
def test_hybrids_compose_with_the_package_kernels(family, with_kernels):
    wrapped = with_kernels(family)
    plain = tiny_model(tiny_config(family))
    wanted, component = read(plain, [9]), copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hybrid = ManticoreForCausalLM.from_components([ComponentSpec(component, name="a")], num_blocks=1)
    torch.testing.assert_close(read(hybrid).log_softmax(-1), wanted.log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert len(mixers(hybrid)) == sum(hasattr(m, "A_log") for m in plain.modules())
    assert torch.equal(read(plain, [9]), wanted)
    assert all(getattr(modeling(family), name) is function for name, function in wrapped.items())


def test_kernels_of_the_hub_run_where_they_can(with_kernels):
    """Brought by `use_kernels` before or after: on their device, and only there."""
    wrapped, calls = with_kernels("mamba"), []
    model, ids = build("mamba"), padded_inputs(False)[0]
    full = model(ids, use_cache=False).logits
    mm.repair_mixers(model)
    before = [mixer.forward for mixer in mixers(model)]
    for name in KERNELS:
        plain = mm.plain_of(wrapped[name])
        kernelize(wrapped[name], lambda *args, plain=plain, name=name, **kw: calls.append(name) or plain(*args, **kw))
    assert mm.repair_mixers(model) == 2
    assert not any(mixer.forward is old for mixer, old in zip(mixers(model), before))
    with torch.no_grad():
        torch.testing.assert_close(chunked(model, "mamba", ids, None, 4)[0], full, rtol=1e-4, atol=1e-5)
        chunked(model, "mamba", ids, None, 1)
    assert not calls  # nothing here is on a GPU
    u, dt, A, B, C, _ = (x.detach() for x in make_inputs(dtype=torch.float32))
    own_globals(mixers(model)[0])["mamba_selective_scan"](u.as_subclass(OnDevice), dt, A, B, C)
    own_globals(mixers(model)[0])["causal_conv1d_update"](
        u.as_subclass(OnDevice), torch.zeros(BATCH, D, 3), torch.ones(D, 4)
    )
    assert calls == ["mamba_selective_scan", "causal_conv1d_update"]


def test_use_kernels_says_what_the_hub_does_not_give(with_kernels, monkeypatch):
    """Transformers falls back without a word. Here nothing is on a GPU, and then one function has a kernel."""
    wrapped = with_kernels("mamba")
    parts = [ComponentSpec(tiny_model(tiny_config(kind)), name=kind) for kind in ("llama", "mamba")]
    hybrid = ManticoreForCausalLM.from_components(parts, num_blocks=1)
    if not is_kernels_available():
        with pytest.raises(ValueError, match="Kernels are not available. Please install"):
            hybrid.set_use_kernels(True)
    wanted = read(hybrid)
    monkeypatch.setattr(PreTrainedModel, "set_use_kernels", lambda self, *args, **kwargs: None)
    with pytest.warns(UserWarning, match="no kernel for causal_conv1d_fn, .*mamba_selective_scan.*device cpu"):
        hybrid.set_use_kernels(True)
    kernelize(wrapped["mamba_selective_scan"], lambda *args, **kwargs: pytest.fail("not on the CPU"))
    with pytest.warns(UserWarning) as said:
        hybrid.set_use_kernels(True)
    assert len(said) == 1 and "mamba_selective_scan" not in str(said[0].message)
    for name in KERNELS:
        kernelize(wrapped[name], lambda *args, **kwargs: pytest.fail("not on the CPU"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hybrid.set_use_kernels(True)
        hybrid.set_use_kernels(False)
    assert torch.equal(read(hybrid), wanted)


def test_compiled_with_the_package_kernels(with_kernels):
    with_kernels("mamba")
    model, ids = build("mamba"), padded_inputs(False)[0]
    mm.repair_mixers(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(lambda x: model(x, use_cache=False).logits, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids), expected)
