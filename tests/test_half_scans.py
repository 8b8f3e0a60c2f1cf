"""The fast scans and convolution in half precision: no less exact than Transformers' own."""

import copy

import pytest
import torch
from manticore_hf.modeling.mixers_manticore import repair_mixers
from scans import CONFIGS, build, mixers, own_globals, padded_inputs

REPLACED = ("mamba_selective_scan", "mamba2_chunk_scan", "causal_conv1d_fn")


def run(model, ids):
    """Logits, and every gradient in one vector, in float64."""
    model.zero_grad()
    out = model(ids, labels=ids, use_cache=False)
    out.loss.float().backward()
    gradients = [p.grad.double().flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return out.logits.detach().double(), torch.cat(gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_no_less_exact_than_upstream(model_type, dtype):
    """Distance from exact arithmetic on the same rounded weights: of ours, and of what it replaces."""
    half, errors = build(model_type, dtype).train(), {"ours": 0.0, "upstream": 0.0}
    exact, ours = copy.deepcopy(half).to(torch.float32 if model_type == "jamba" else torch.float64), copy.deepcopy(half)
    assert repair_mixers(ours)
    called = own_globals(mixers(ours)[0])
    assert sum("manticore" in called[name].__module__ for name in REPLACED if name in called) == 2
    for seed in range(4):
        ids = padded_inputs(False)[0] if seed == 0 else torch.randint(3, 60, (2, 24 + 9 * seed))
        wanted, found = run(exact, ids), {"upstream": run(half, ids), "ours": run(ours, ids)}
        for name, results in found.items():
            errors[name] += sum(((a - b).norm() / b.norm()).item() for a, b in zip(results, wanted))
        assert all(one.isfinite().all() for one in found["ours"])
    print(f"{model_type}, {dtype}: " + ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
    assert 0 < errors["ours"] < 1.1 * errors["upstream"]
