"""Where fused kernels are wrong training goes step by step: rows with padding on the left, and all of FalconMamba.

The kernels can mask neither what their convolution makes of padding nor their steps.
"""

import inspect

import pytest
import torch
from manticore_hf.modeling import mixers_manticore as mm
from scans import bind, mixers, modeling

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
    module, name = modeling(model_type), FUSED[model_type]

    def kernel(*args, **kwargs):
        calls.append(1)

    monkeypatch.setattr(module, name, bind(inspect.unwrap(getattr(module, name)), kernel))
    monkeypatch.setattr(mm, "_kernel_takes", lambda tensor: True)
    model = tiny_model(tiny_config(model_type)).train()
    assert mm.repair_mixers(model) > 0
    return model, calls


def test_only_padding_on_the_left_is_kept_from_the_kernel(fused):
    model, calls = fused
    ids, mask, positions = left_padded()
    where = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False, **where).logits
    assert not calls
    for given in (None, torch.ones_like(mask), mask.flip(1)):
        calls.clear()
        model(input_ids=ids, attention_mask=given, use_cache=False)
        assert len(calls) == (0 if is_wrong(model) else len(mixers(model)))
    alone = model(input_ids=ids[:1, PADDING:], use_cache=False).logits
    torch.testing.assert_close(padded[:1, PADDING:], alone, rtol=1e-4, atol=1e-4)


def test_a_mask_is_looked_at_once_for_all_layers(fused, monkeypatch):
    """A GPU waits for every look; a mask that was written over is another one."""
    model, calls = fused
    looks, look = [], mm._look
    monkeypatch.setattr(mm, "_look", lambda mask: looks.append(1) or look(mask))
    ids, mask, _ = left_padded()
    mask = torch.ones_like(mask)
    mask[1, -1] = 0  # Transformers drops a mask of ones
    for count, left in enumerate((1, 0), 1):
        mask[0, 0] = left
        calls.clear()
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert len(looks) == count and bool(calls) == (left == 1 and not is_wrong(model))


def test_without_kernels_no_mask_is_looked_at(monkeypatch):
    monkeypatch.setattr(mm, "_look", lambda mask: pytest.fail("a GPU would wait"))
    ids, mask, _ = left_padded()
    for model_type in FUSED:
        model = tiny_model(tiny_config(model_type)).train()
        mm.repair_mixers(model)
        assert all(mixer.forward.stepwise is None for mixer in mixers(model))
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def test_a_call_that_fails_leaves_nothing(fused, monkeypatch):
    model, calls = fused
    mixer = mixers(model)[0]
    ids, mask, _ = left_padded()
    with monkeypatch.context() as patch:
        patch.setattr(mixer.in_proj, "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    model(input_ids=ids, use_cache=False)
    assert calls or is_wrong(model)
