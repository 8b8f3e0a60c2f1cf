"""A hybrid takes and gives its cache as Transformers' own models do since 5.24: as `cache`, and under its old name."""

import importlib.util
import inspect
import sys

import pytest
import torch
from classifiers import BOTH
from families import hybrid, tokens
from manticore_hf.modeling import bounds_manticore
from manticore_hf.modeling.components_manticore import cache_argument
from test_heads import made
from transformers import LlamaForCausalLM, MambaForCausalLM

from manticore_hf import ManticoreForCausalLM, ManticoreModel

CLASSES = [ManticoreModel, ManticoreForCausalLM, *BOTH.values()]
NAMES = ("cache", "past_key_values")


@pytest.fixture(scope="module")
def model():
    return hybrid("gpt_neox+mamba")


def test_the_name_is_that_of_plain_models():
    assert cache_argument(LlamaForCausalLM.forward) == cache_argument(MambaForCausalLM.forward) == "cache"
    assert (
        cache_argument(lambda past_key_values=None: None) == "past_key_values"
    )  # as a component's own code may have it
    assert cache_argument(torch.nn.Linear.forward) is None


@pytest.mark.parametrize("cls", CLASSES)
def test_signatures_show_the_new_name(cls):
    names = list(inspect.signature(cls.forward).parameters)
    assert names[:6] == ["self", "input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds"]
    assert set(NAMES).intersection(names) == {"cache"}
    assert set(NAMES) <= set(cls.config_class.keys_to_ignore_at_inference)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_taken_under_both_names_as_plain_models_do(model, name):
    ids = tokens()
    whole = model(ids, use_cache=False).logits
    cache = model.make_cache()
    model(ids[:, :5], **{name: cache})
    out = model(ids[:, 5:], **{name: cache})
    torch.testing.assert_close(out.logits, whole[:, 5:], rtol=1e-4, atol=1e-5)
    assert out["cache"] is cache and out.cache is cache and cache.get_seq_length() == ids.shape[1]
    # By position, as in any release
    assert torch.equal(model(ids, None, None, model.make_cache()).logits, model(ids).logits)
    plain = model.component(model.config.component_names[0])
    cache = plain(ids[:, :5], use_cache=True).cache
    assert plain(ids[:, 5:], **{name: cache}).cache is cache and cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", BOTH)
def test_classifiers_take_both_names(kind, name):
    model, ids = made(kind), tokens()
    mask, cache = torch.ones_like(ids), model.make_cache()
    model(ids[:, :5], attention_mask=mask[:, :5], **{name: cache}, use_cache=True)
    rest = model(ids[:, 5:], attention_mask=mask, **{name: cache}, use_cache=True).logits
    whole = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(rest, whole[:, 5:] if kind == "token" else whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_on_from_a_cache(model, name):
    ids = tokens()[:1]
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    cache = model.make_cache()
    model(ids[:, :-1], cache=cache)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, **{name: cache}), wanted)


def test_two_caches_are_refused(model):
    with pytest.raises(ValueError, match="Both `past_key_values` and `cache` are set"):
        model(tokens(), cache=model.make_cache(), past_key_values=model.make_cache())
    cache = model.make_cache()
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        model(tokens(), past_key_values=cache)
    assert cache.get_seq_length() == tokens().shape[1]


@pytest.mark.parametrize("version, refused", [("4.57.1", True), ("5.23.9", True), ("5.24.0.dev0", False)])
def test_a_transformers_that_is_too_old_is_named(version, refused, monkeypatch):
    """A published hybrid is loaded by whatever Transformers its user has."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    # Beside its sibling, as in a repository
    spec = importlib.util.spec_from_file_location("manticore_hf.modeling.bounds_again", bounds_manticore.__file__)
    module = importlib.util.module_from_spec(spec)
    if not refused:
        return spec.loader.exec_module(module)
    with pytest.raises(ImportError, match=rf"needs Transformers 5.24 or newer; {version} is installed: pip install"):
        spec.loader.exec_module(module)
