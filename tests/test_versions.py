"""Transformers renamed the cache in 5.24: a hybrid takes both names, and gives what the installed release asks for."""

import importlib.util
import inspect
import sys

import pytest
import torch
from classifiers import BOTH
from families import hybrid, tokens
from manticore_hf.modeling import bounds_manticore
from manticore_hf.modeling.versions_manticore import CACHE, CACHE_NAMES, cache_argument, takes_cache
from test_heads import made
from transformers import LlamaForCausalLM, MambaForCausalLM

from manticore_hf import ManticoreError, ManticoreForCausalLM, ManticoreModel

CLASSES = [ManticoreModel, ManticoreForCausalLM, *BOTH.values()]


@pytest.fixture(scope="module")
def model():
    return hybrid("gpt_neox+mamba")


def test_the_name_is_that_of_plain_models():
    assert cache_argument(LlamaForCausalLM.forward) == CACHE
    assert cache_argument(MambaForCausalLM.forward) in (CACHE, "cache_params")
    assert cache_argument(torch.nn.Linear.forward) is None


@pytest.mark.parametrize("cls", CLASSES)
def test_signatures_show_the_name_of_the_installed_release(cls):
    names = list(inspect.signature(cls.forward).parameters)
    assert names[:6] == ["self", "input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds"]
    assert set(CACHE_NAMES).intersection(names) == {CACHE}
    assert set(CACHE_NAMES) <= set(cls.config_class.keys_to_ignore_at_inference)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_taken_under_both_names(model, name):
    ids = tokens()
    whole = model(ids, use_cache=False).logits
    cache = model.make_cache()
    model(ids[:, :5], **{name: cache})
    out = model(ids[:, 5:], **{name: cache})
    torch.testing.assert_close(out.logits, whole[:, 5:], rtol=1e-4, atol=1e-5)
    assert out[CACHE] is cache and getattr(out, CACHE) is cache and cache.get_seq_length() == ids.shape[1]
    # By position, as in any release
    assert torch.equal(model(ids, None, None, model.make_cache()).logits, model(ids).logits)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", BOTH)
def test_classifiers_take_both_names(kind, name):
    model, ids = made(kind), tokens()
    mask, cache = torch.ones_like(ids), model.make_cache()
    model(ids[:, :5], attention_mask=mask[:, :5], **{name: cache}, use_cache=True)
    rest = model(ids[:, 5:], attention_mask=mask, **{name: cache}, use_cache=True).logits
    whole = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(rest, whole[:, 5:] if kind == "token" else whole, rtol=1e-4, atol=1e-5)


# 5.23's `generate` knows the old name only, 5.24's both
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_generate_goes_on_from_a_cache(model, name):
    ids = tokens()[:1]
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    cache = model.make_cache()
    model(ids[:, :-1], cache=cache)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, **{name: cache}), wanted)


def test_two_caches_are_refused(model):
    one, two = model.make_cache(), model.make_cache()
    with pytest.raises(ManticoreError, match="Give one cache"):
        model(tokens(), cache=one, past_key_values=two)
    model(tokens(), cache=one, past_key_values=one)
    model(tokens(), cache=two, past_key_values=None)
    assert one.get_seq_length() == two.get_seq_length() == tokens().shape[1]


def test_what_takes_a_cache_keeps_its_name_and_documentation():
    def forward(self, cache=None, **kwargs):
        """Text."""
        return cache, kwargs

    wrapped = takes_cache(forward)
    assert wrapped.__doc__ == "Text." and wrapped(None, past_key_values=3, other=1) == (3, {"other": 1})


@pytest.mark.parametrize("version, refused", [("4.57.1", True), ("5.22.9", True), ("5.23.0.dev0", False)])
def test_a_transformers_that_is_too_old_is_named(version, refused, monkeypatch):
    """A published hybrid is loaded by whatever Transformers its user has."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    spec = importlib.util.spec_from_file_location("bounds_of_another_copy", bounds_manticore.__file__)
    module = importlib.util.module_from_spec(spec)
    if not refused:
        return spec.loader.exec_module(module)
    with pytest.raises(ImportError, match=rf"needs Transformers 5.23 or newer; {version} is installed: pip install"):
        spec.loader.exec_module(module)
