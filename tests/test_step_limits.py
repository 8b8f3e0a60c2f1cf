"""Mamba-2's step sizes keep to a mixer's limits in calls with one token, as they do in calls with several."""

import copy
import inspect
import pickle

import pytest
import scans
import torch
from manticore_hf.modeling import fast_mixers_manticore as sm
from manticore_hf.modeling.anatomy_manticore import cache_argument
from scans import modeling
from transformers import DynamicCache

from manticore_hf.families.tiny import tiny_config, tiny_model, tokens

# Limits that random steps cross. NemotronH and Zamba2 make theirs of what initialises steps, and have no upper one.
TYPES = {
    "bamba": {"time_step_limit": (0.5, 0.9)},
    "falcon_h1": {"time_step_limit": (0.5, 0.9)},
    "granitemoehybrid": {"time_step_limit": (0.5, 0.9)},
    "mamba2": {"time_step_limit": (0.5, 0.9)},
    "nemotron_h": {"time_step_min": 0.5},
    "zamba2": {"time_step_min": 0.5},
}
NAME = "mamba2_selective_state_update"


@pytest.fixture(autouse=True)
def restored():
    """Each test starts and ends with Transformers' own steps, whatever other files' tests have installed."""
    for model_type in TYPES:
        scans.uninstall(model_type)
    yield
    for model_type in TYPES:
        scans.uninstall(model_type)
    assert getattr(sm._shared.local, "limits", None) is None


def build(model_type, limited=True, dtype=torch.float32):
    return tiny_model(tiny_config(model_type, **(TYPES[model_type] if limited else {}))).to(dtype)


@torch.no_grad()
def read(model, sizes):
    """Logits of nine tokens, read in calls of these sizes with a cache, or at once without."""
    name = cache_argument(getattr(model, "_orig_mod", model).forward)
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for part in tokens().split(sizes, 1):
        given = {name: cache, "use_cache": True} if len(sizes) > 1 else {"use_cache": False}
        if model.config.model_type == "bamba":  # it counts from 0 in every call
            given["position_ids"] = torch.arange(start, start + part.shape[1])[None]
        parts.append(model(input_ids=part, **given).logits)
        start += part.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("model_type", TYPES)
def test_upstream_still_forgets_the_limits(model_type):
    """If this fails, Transformers has fixed it, and `limit_steps` should go."""
    model = build(model_type)
    assert (read(model, [5, 1, 1, 2]) - read(model, [9])).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_step_is_limited_as_a_scan_is(model_type, dtype):
    model = build(model_type, dtype=dtype)
    before = read(model, [9])
    assert sm.install(model_type) and sm.limit_steps(model) >= 2
    whole = read(model, [9])
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.1 * whole.abs().max()}
    torch.testing.assert_close(whole, before, **close)  # what was right already stays as it was
    for sizes in ([5, 1, 1, 2], [1] * 9):
        torch.testing.assert_close(read(model, sizes), whole, **close)


def test_hooks_are_added_once_survive_copies_and_only_where_there_are_limits():
    model = build("nemotron_h")
    keys = list(model.state_dict())
    count = sm.limit_steps(model)
    for candidate in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sm.limit_steps(candidate) == count == 2
        found = [m for m in candidate.modules() if m._forward_pre_hooks]
        assert [type(m).__name__ for m in found] == ["NemotronHMamba2Mixer"] * 2
        assert all(len(m._forward_pre_hooks) == len(m._forward_hooks) == 1 for m in found)
        assert list(candidate.state_dict()) == keys
    for other in (build("mamba2", limited=False), torch.nn.Linear(2, 2)):
        assert sm.limit_steps(other) == 0
        assert not any(m._forward_pre_hooks for m in other.modules())


def test_models_beside_a_limited_one_are_left_alone():
    model, other = build("nemotron_h"), build("nemotron_h")
    wanted = read(other, [5, 1, 1, 2])
    sm.limit_steps(model)
    read(model, [5, 1, 1, 2])
    # Its scans run in chunks of ours, its steps as they were: what it misses is far more than that changes
    torch.testing.assert_close(read(other, [5, 1, 1, 2]), wanted, rtol=1e-4, atol=1e-5)


def test_a_call_that_fails_leaves_no_limits(monkeypatch):
    model = build("nemotron_h")
    sm.limit_steps(model)
    mixer = next(m for m in model.modules() if m._forward_pre_hooks)
    monkeypatch.setattr(mixer.norm, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(model, [5, 1, 1, 2])


def test_limited_steps_do_not_break_the_graph():
    model = build("mamba2")
    sm.limit_steps(model)
    wanted = read(model, [5, 1, 1, 2])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled.config = model.config
    torch.testing.assert_close(read(compiled, [5, 1, 1, 2]), wanted)


def _bind(monkeypatch, kernel):
    """Binds an implementation as Transformers does that of an importable package."""
    import functools

    module = modeling("nemotron_h")
    plain = inspect.unwrap(getattr(module, NAME))
    implementation = kernel  # the name by which `_is_bound_to_kernel` finds it

    @functools.wraps(plain)
    def wrapped(*args, **kwargs):
        return implementation(*args, **kwargs)

    monkeypatch.setattr(module, NAME, wrapped)
    return module


def _step(batch=2, heads=4, width=8, size=8):
    """Arguments of a step as mixers give them: what all channels of a head share are views."""
    generator = torch.Generator().manual_seed(0)
    state, x = (torch.randn(batch, heads, width, *tail, generator=generator) for tail in ((size,), ()))
    dt = torch.randn(batch, heads, 1, generator=generator).expand(-1, -1, width)
    a, d, bias = (torch.randn(heads, generator=generator) for _ in range(3))
    b, c = (torch.randn(batch, 1, size, generator=generator) for _ in range(2))
    a = -a.exp()[:, None, None].expand(-1, width, size)
    last = {"dt_bias": bias[:, None].expand(-1, width), "dt_softplus": True}
    return [state, x, dt, a, b, c, d[:, None].expand(-1, width)], last


def test_a_cpu_tensor_never_reaches_the_kernel(monkeypatch):
    def kernel(*args, **kwargs):
        raise AssertionError("a CPU tensor reached a CUDA kernel")

    module = _bind(monkeypatch, kernel)
    assert sm.install("nemotron_h")
    for limits in (None, (0.5, 0.9)):
        args, last = _step()
        sm._shared.local.limits = limits
        assert getattr(module, NAME)(*args, **last).isfinite().all()
    sm._shared.local.limits = None


def test_a_kernel_gets_limited_steps_as_views(monkeypatch):
    """A stand-in that only claims to be on a GPU shows what a kernel would be given."""
    seen = []

    def kernel(state, hidden_states, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
        seen.append((dt, dt_bias, dt_softplus))
        return hidden_states

    class OnDevice(torch.Tensor):
        is_cuda = True

    module = _bind(monkeypatch, kernel)
    assert sm.install("nemotron_h")
    args, last = _step()
    args[1], args[2] = args[1].as_subclass(OnDevice), args[2].bfloat16()
    getattr(module, NAME)(*args, **last)
    assert seen[0][0] is args[2] and seen[0][1] is last["dt_bias"] and seen[0][2]
    sm._shared.local.limits = (0.5, 0.9)
    getattr(module, NAME)(*args, **last)
    sm._shared.local.limits = None
    dt, bias, softplus = seen[1]
    wanted = torch.nn.functional.softplus(args[2].float() + last["dt_bias"]).clamp(0.5, 0.9)
    assert (wanted == 0.5).any() and (wanted == 0.9).any() and not softplus
    torch.testing.assert_close(dt, wanted)
    # One step per head, which kernels tell by its strides
    assert dt.stride(-1) == bias.stride(-1) == 0 and not bias.any()
