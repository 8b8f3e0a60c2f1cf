"""The fast scans and convolution in half precision: no less exact than Transformers' own."""

import copy
import inspect

import pytest
import scans
import torch
from manticore_hf.modeling import fast_mixers_manticore as fm
from scans import build, modeling, padded_inputs

restored = scans.restored

REPLACED = ("mamba_selective_scan", "mamba2_chunk_scan", "causal_conv1d_fn")


def run(model, ids):
    """Logits, and every gradient in one vector, in float64."""
    model.zero_grad()
    out = model(ids, labels=ids, use_cache=False)
    out.loss.float().backward()
    gradients = [p.grad.double().flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return out.logits.detach().double(), torch.cat(gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", list(scans.CONFIGS))
def test_no_less_exact_than_upstream(model_type, dtype, monkeypatch):
    """Distance from exact arithmetic on the same rounded weights: of ours, and of what it replaces."""
    half, errors = build(model_type, dtype).train(), {"ours": 0.0, "upstream": 0.0}
    exact = copy.deepcopy(half).to(torch.float32 if model_type == "jamba" else torch.float64)
    assert fm.install(model_type)
    module = modeling(model_type)
    ours = {name: getattr(module, name) for name in REPLACED if hasattr(module, name)}
    theirs = {name: inspect.unwrap(getattr(function, fm._MARK)) for name, function in ours.items()}
    assert len(ours) == 2
    for seed in range(4):
        ids = padded_inputs(False)[0] if seed == 0 else torch.randint(3, 60, (2, 24 + 9 * seed))
        wanted, found = None, {}
        for name, functions, model in (("", theirs, exact), ("upstream", theirs, half), ("ours", ours, half)):
            for key, function in functions.items():
                monkeypatch.setattr(module, key, function)
            if wanted is None:
                wanted = run(model, ids)
                continue
            found[name] = run(model, ids)
            errors[name] += sum(((a - b).norm() / b.norm()).item() for a, b in zip(found[name], wanted))
        assert all(one.isfinite().all() for one in found["ours"])
    print(f"{model_type}, {dtype}: " + ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
    assert 0 < errors["ours"] < 1.1 * errors["upstream"]
