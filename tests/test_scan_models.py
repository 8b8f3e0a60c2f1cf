"""Whole models that scan, against Transformers' own path and through a cache."""

import copy
import threading

import pytest
import torch
from manticore_hf.modeling.components_manticore import cache_argument
from manticore_hf.modeling.mixers_manticore import repair_mixers
from scans import CONFIGS, SCANNING, build, chunked, mixers, padded_inputs
from transformers import MambaForCausalLM

CACHE = cache_argument(MambaForCausalLM.forward)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", SCANNING)
def test_model_equals_upstream(model_type, training):
    model = build(model_type).train(training)
    ids = torch.randint(1, 61, (2, 21))
    results = []
    for installed in (False, True):
        if installed:
            assert repair_mixers(model) == 2
        model.zero_grad()
        logits = model(ids, labels=ids, use_cache=False)
        logits.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits.logits.detach(), grads))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_chunked_prefill_equals_the_full_forward(model_type, size, padded):
    model = build(model_type)
    assert repair_mixers(model) == 2
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
    """If this fails, Transformers has fixed it, and `_MISSING` need not name the scan."""
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
    repair_mixers(model)
    ids, mask = padded_inputs(True)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, use_cache=False).logits
        logits, _ = chunked(model, model_type, ids, mask, size, full_mask=True)
    torch.testing.assert_close(logits[mask.bool()], full[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", SCANNING)
def test_bfloat16_keeps_the_state_in_float32(model_type):
    model = build(model_type, torch.bfloat16)
    repair_mixers(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        logits, cache = chunked(model, model_type, ids, None, 3)
    states = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
    assert states and all(state.dtype == torch.float32 for state in states)
    assert (logits - full).abs().max() < 0.05 * full.abs().max()


def test_gradient_flows_through_a_cached_continuation():
    model = build("mamba")
    repair_mixers(model)
    ids, _ = padded_inputs(False)
    grads = []
    for logits in (model(ids, use_cache=False).logits, chunked(model, "mamba", ids, None, 4)[0]):
        model.zero_grad()
        logits.square().sum().backward()
        grads.append(model.backbone.layers[0].mixer.A_log.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_reordered_cache():
    model = build("mamba")
    repair_mixers(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        cache = getattr(model(ids[:, :6], use_cache=True), CACHE)
        cache.reorder_cache(torch.tensor([1, 0]))
        logits = model(ids.flip(0)[:, 6:], **{CACHE: cache}, use_cache=True).logits
        full = model(ids.flip(0), use_cache=False).logits[:, 6:]
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-5)


def test_shallow_copies_with_another_layer_index():
    model = build("mamba")
    repair_mixers(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    for i, block in enumerate(model.backbone.layers):
        mixer = copy.copy(block.mixer)
        assert mixer.forward is block.mixer.forward
        mixer.layer_idx = 1 - i
        block.mixer = mixer
    assert repair_mixers(model) == 2
    with torch.no_grad():
        logits, _ = chunked(model, "mamba", ids, None, 4)
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-5)


def test_state_is_dropped_when_the_forward_raises():
    model = build("mamba")
    repair_mixers(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = getattr(model(ids[:, :4], use_cache=True), CACHE)
        out_proj, model.backbone.layers[0].mixer.x_proj = model.backbone.layers[0].mixer.x_proj, torch.nn.Linear(3, 3)
        with pytest.raises(RuntimeError):
            model(ids[:, 4:], **{CACHE: cache}, use_cache=True)
        model.backbone.layers[0].mixer.x_proj = out_proj
        torch.testing.assert_close(model(ids, use_cache=False).logits, full)


def test_interrupted_forward_leaves_nothing_behind():
    model = build("mamba")
    repair_mixers(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = getattr(model(ids[:, :4], use_cache=True), CACHE)

        def interrupt(*args):
            raise KeyboardInterrupt

        handle = mixers(model)[0].x_proj.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 4:], **{CACHE: cache}, use_cache=True)
        handle.remove()
        torch.testing.assert_close(model(ids, use_cache=False).logits, full)


def test_threads_do_not_see_each_others_state():
    model = build("mamba")
    repair_mixers(model)
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


@pytest.mark.slow
def test_compiled_continuation_from_a_cache():
    model = build("mamba")
    repair_mixers(model)
    ids, _ = padded_inputs(False)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        cache = getattr(compiled(ids[:, :5], use_cache=True), CACHE)
        logits = compiled(ids[:, 5:], **{CACHE: cache}, use_cache=True).logits
    torch.testing.assert_close(logits, full[:, 5:], rtol=1e-4, atol=1e-5)
