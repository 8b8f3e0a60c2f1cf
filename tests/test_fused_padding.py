"""Where fused kernels are wrong training goes step by step: rows with padding on the left, and all of FalconMamba.

The kernels can mask neither what their convolution makes of padding nor their steps.
"""

import functools
import inspect

import pytest
import torch
from manticore_hf.modeling import fast_mixers_manticore as sm
from manticore_hf.modeling import padding_manticore
from manticore_hf.modeling.padding_manticore import unfuse_padded
from scans import modeling, uninstall

from manticore_hf.families.contract import PADDING, left_padded
from manticore_hf.families.tiny import tiny_config, tiny_model

FUSED = {"mamba": "mamba_inner_fn", "falcon_mamba": "mamba_inner_fn"} | dict.fromkeys(
    ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"), "mamba2_split_conv1d_scan_combined"
)


def is_wrong(model):
    """FalconMamba's fused kernel, which normalises step sizes after their projection, is not used at all."""
    return model.config.model_type == "falcon_mamba"


@pytest.fixture(params=FUSED)
def fused(request, monkeypatch):
    """A training model of each type, and a list that grows with every call of its fused kernel.

    The stand-in for the kernel only counts, and gives None, as Transformers' own version does; CPU tensors are let in.
    """
    model_type, calls = request.param, []
    uninstall(model_type)
    module, name = modeling(model_type), FUSED[model_type]

    def kernel(*args, **kwargs):
        calls.append(1)

    plain = inspect.unwrap(getattr(module, name))
    implementation = kernel

    @functools.wraps(plain)
    def bound(*args, **kwargs):
        return implementation(*args, **kwargs)

    monkeypatch.setattr(module, name, bound)
    monkeypatch.setattr(sm, "_kernel_takes", lambda tensor: True)
    model = tiny_model(tiny_config(model_type)).train()
    assert unfuse_padded(model) > 0
    yield model, calls
    uninstall(model_type)
    assert not getattr(sm._shared.local, "is_padded", False)


def test_only_padding_on_the_left_is_kept_from_the_kernel(fused):
    model, calls = fused
    ids, mask, positions = left_padded()
    where = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False, **where).logits
    assert not calls
    for given in (None, torch.ones_like(mask), mask.flip(1)):
        calls.clear()
        model(input_ids=ids, attention_mask=given, use_cache=False)
        assert len(calls) == (0 if is_wrong(model) else unfuse_padded(model))
    alone = model(input_ids=ids[:1, PADDING:], use_cache=False).logits
    torch.testing.assert_close(padded[:1, PADDING:], alone, rtol=1e-4, atol=1e-4)


def test_a_mask_is_looked_at_once_for_all_layers(fused, monkeypatch):
    """A GPU waits for every look; a mask that was written over is another one."""
    model, calls = fused
    looks, look = [], padding_manticore._look
    monkeypatch.setattr(padding_manticore, "_look", lambda mask: looks.append(1) or look(mask))
    ids, mask, _ = left_padded()
    mask = torch.ones_like(mask)
    mask[1, -1] = 0  # Transformers drops a mask of ones
    for count, left in enumerate((1, 0), 1):
        mask[0, 0] = left
        calls.clear()
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert len(looks) == count and bool(calls) == (left == 1 and not is_wrong(model))


def test_without_kernels_nothing_is_hooked():
    for model_type in FUSED:
        uninstall(model_type)
        assert unfuse_padded(tiny_model(tiny_config(model_type))) == 0


def test_a_call_that_fails_leaves_nothing(fused, monkeypatch):
    model, calls = fused
    mixer = next(
        m for m in model.modules() if any(getattr(h, "_manticore_padding", 0) for h in m._forward_pre_hooks.values())
    )
    ids, mask, _ = left_padded()
    with monkeypatch.context() as patch:
        patch.setattr(mixer.in_proj, "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    model(input_ids=ids, use_cache=False)
    assert calls or is_wrong(model)
