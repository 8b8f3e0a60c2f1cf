"""Mamba-2's step sizes keep to a mixer's limits in calls with one token, as they do in calls with several."""

import inspect

import pytest
import torch
from manticore_hf.modeling import mixers_manticore as mm
from manticore_hf.modeling import ssd_manticore
from manticore_hf.modeling.components_manticore import cache_argument
from scans import bind, mixers, modeling
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
    """If this fails, Transformers has fixed it, and `_MISSING` need not name the step."""
    model = build(model_type)
    assert (read(model, [5, 1, 1, 2]) - read(model, [9])).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_step_is_limited_as_a_scan_is(model_type, dtype):
    model = build(model_type, dtype=dtype)
    before = read(model, [9])
    assert mm.repair_mixers(model) >= 2
    whole = read(model, [9])
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.1 * whole.abs().max()}
    torch.testing.assert_close(whole, before, **close)  # what was right already stays as it was
    for sizes in ([5, 1, 1, 2], [1] * 9):
        torch.testing.assert_close(read(model, sizes), whole, **close)


def test_without_limits_steps_are_transformers_own():
    """Bit for bit: what is limited is computed in another order."""
    model = build("mamba2", limited=False)
    args, last = _step()
    states = [args[0].clone() for _ in range(2)]
    upstream = getattr(modeling("mamba2"), NAME)
    ours = ssd_manticore.make_step(upstream)(states[0], *args[1:], **last, dt_limit=mixer_limits(model))
    assert torch.equal(ours, inspect.unwrap(upstream)(states[1], *args[1:], **last)) and torch.equal(*states)


def mixer_limits(model):
    return next(m.time_step_limit for m in model.modules() if hasattr(m, "time_step_limit"))


def test_models_beside_a_limited_one_are_left_alone():
    model, other = build("nemotron_h"), build("nemotron_h")
    wanted = read(other, [5, 1, 1, 2])
    mm.repair_mixers(model)
    read(model, [5, 1, 1, 2])
    assert torch.equal(read(other, [5, 1, 1, 2]), wanted)


def test_limits_are_read_in_every_call():
    model = build("mamba2")
    mm.repair_mixers(model)
    before = read(model, [5, 1, 1, 2])
    for mixer in mixers(model):
        mixer.time_step_limit = (0.0, float("inf"))
    wanted = read(build("mamba2", limited=False), [9])
    assert (before - wanted).abs().max() > 1e-3
    torch.testing.assert_close(read(model, [5, 1, 1, 2]), wanted, rtol=1e-4, atol=1e-5)


def test_limited_steps_do_not_break_the_graph():
    model = tiny_model(tiny_config("mamba2", num_hidden_layers=2, **TYPES["mamba2"]))
    mm.repair_mixers(model)
    wanted = read(model, [7, 1, 1])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled.config = model.config
    torch.testing.assert_close(read(compiled, [7, 1, 1]), wanted)


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


def test_a_cpu_tensor_never_reaches_the_kernel():
    def kernel(*args, **kwargs):
        raise AssertionError("a CPU tensor reached a CUDA kernel")

    step = ssd_manticore.make_step(bind(inspect.unwrap(getattr(modeling("nemotron_h"), NAME)), kernel))
    for limits in (None, (0.5, 0.9)):
        args, last = _step()
        assert step(*args, **last, dt_limit=limits).isfinite().all()


def test_a_kernel_gets_limited_steps_as_views():
    """A stand-in that only claims to be on a GPU shows what a kernel would be given."""
    seen = []

    def kernel(state, hidden_states, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
        seen.append((dt, dt_bias, dt_softplus))
        return hidden_states

    class OnDevice(torch.Tensor):
        is_cuda = True

    step = ssd_manticore.make_step(bind(inspect.unwrap(getattr(modeling("nemotron_h"), NAME)), kernel))
    args, last = _step()
    args[1], args[2] = args[1].as_subclass(OnDevice), args[2].bfloat16()
    step(*args, **last, dt_limit=(0.0, float("inf")))
    assert seen[0][0] is args[2] and seen[0][1] is last["dt_bias"] and seen[0][2]
    step(*args, **last, dt_limit=(0.5, 0.9))
    dt, bias, softplus = seen[1]
    wanted = torch.nn.functional.softplus(args[2].float() + last["dt_bias"]).clamp(0.5, 0.9)
    assert (wanted == 0.5).any() and (wanted == 0.9).any() and not softplus
    torch.testing.assert_close(dt, wanted)
    # One step per head, which kernels tell by its strides
    assert dt.stride(-1) == bias.stride(-1) == 0 and not bias.any()
