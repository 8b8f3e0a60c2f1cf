"""Mamba-2's chunked scan against the recurrence token by token, and in Transformers' own models."""

import inspect

import pytest
import torch
from manticore_hf.modeling import mixers_manticore as mm
from manticore_hf.modeling import ssd_manticore
from manticore_hf.modeling.ssd_manticore import chunk_scan
from scans import build, chunked, mixers, modeling, own_globals, padded_inputs

NAMES = ("x", "dt", "A", "B", "C", "initial_state")
BATCH, HEADS, WIDTH, GROUPS, STATE = 2, 4, 3, 2, 5


def make_inputs(time, dtype=torch.float64, groups=GROUPS, dt=None):
    generator = torch.Generator().manual_seed(time)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    steps = draw(BATCH, time, HEADS).exp() if dt is None else torch.full((BATCH, time, HEADS), dt).double()
    tensors = (
        draw(BATCH, time, HEADS, WIDTH),
        steps,
        -draw(HEADS).exp(),
        draw(BATCH, time, groups, STATE),
        draw(BATCH, time, groups, STATE),
        draw(BATCH, HEADS, WIDTH, STATE),
    )
    return [z.to(dtype).requires_grad_() for z in tensors]


def naive(x, dt, A, B, C, state=None):
    """The recurrence as written: h[t] = exp(dt A) h[t - 1] + dt x B^T, y[t] = h[t] C."""
    per = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(per, 2), C.repeat_interleave(per, 2)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        outputs.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), state


def results(scan, inputs, **kwargs):
    """Outputs and the gradients of a fixed mixture of them."""
    y, state = scan(*inputs, **kwargs)
    weights = [torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z).cos() for z in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    return y, state, *torch.autograd.grad(loss, [z for z in inputs if z is not None])


@pytest.mark.parametrize("time, chunk", [(1, 4), (4, 4), (11, 4), (16, 4), (70, None), (9, 64)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_state", [True, False])
def test_equals_the_recurrence(time, chunk, groups, with_state):
    inputs = make_inputs(time, groups=groups)[: None if with_state else -1]
    for ours, theirs in zip(results(chunk_scan, inputs, chunk=chunk), results(naive, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_single_precision_is_near_the_double():
    exact = results(naive, make_inputs(200))
    for name, ours, theirs in zip(("y", "state", *NAMES), results(chunk_scan, make_inputs(200, torch.float32)), exact):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm(), name


def test_two_calls_equal_one():
    x, dt, A, B, C, state = (z.detach() for z in make_inputs(90))
    whole, last = chunk_scan(x, dt, A, B, C, state)
    first, middle = chunk_scan(x[:, :37], dt[:, :37], A, B[:, :37], C[:, :37], state)
    second, end = chunk_scan(x[:, 37:], dt[:, 37:], A, B[:, 37:], C[:, 37:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("dt", [1e-6, 1.0, 1e3])
def test_extreme_steps_stay_finite(dt):
    inputs = make_inputs(80, torch.float32, dt=dt)
    assert all(z.isfinite().all() for z in results(chunk_scan, inputs))


def test_long_sequences_get_longer_chunks(monkeypatch):
    seen = []
    original = ssd_manticore._chunk_scan
    monkeypatch.setattr(ssd_manticore, "_chunk_scan", lambda *args: seen.append(args[-1]) or original(*args))
    for time in (64, 4096, 4097):
        chunk_scan(*[z.detach() for z in make_inputs(time, torch.float32)])
    assert seen == [64, 64, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_state", [True, False])
def test_takes_the_place_of_upstreams(dtype, with_state):
    x, dt, A, B, C, state = (z.detach().to(dtype) for z in make_inputs(21))
    settings = {
        "D": torch.randn(HEADS, dtype=dtype),
        "dt_bias": torch.randn(HEADS, dtype=dtype),
        "dt_softplus": True,
        "dt_limit": (0.01, 2.0),
        "initial_states": state if with_state else None,
        "return_final_states": with_state,
        "z": None,
    }
    upstream = modeling("mamba2").mamba2_chunk_scan
    expected = inspect.unwrap(upstream)(x, dt, A.float(), B, C, 8, **settings)
    found = ssd_manticore.make_chunk_scan(upstream)(x, dt, A.float(), B, C, 8, **settings)
    for ours, theirs in zip(*[z if with_state else (z,) for z in (found, expected)], strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_model_with_and_without(padded, monkeypatch):
    model, (ids, mask) = build("mamba2"), padded_inputs(padded)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, use_cache=False).logits
        assert mm.repair_mixers(model) == model.config.num_hidden_layers
        calls, called = [], own_globals(mixers(model)[0])
        original = called["mamba2_chunk_scan"]
        with monkeypatch.context() as patch:
            counted = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)  # noqa: E731
            patch.setitem(called, "mamba2_chunk_scan", counted)
            ours = model(ids, attention_mask=mask, use_cache=False).logits
        pieces = chunked(model, "mamba2", ids, mask, 4)[0]
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pieces[real], ours[real], rtol=1e-4, atol=1e-5)


def test_mixed_precision_does_not_reach_the_scan():
    inputs = [z.detach() for z in make_inputs(40, torch.float32)]
    expected = chunk_scan(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunk_scan(*inputs)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
