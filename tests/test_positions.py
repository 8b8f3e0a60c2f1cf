"""Beyond the end of a component's table of positions: refused in one sentence, unless that component is not run."""

import pytest
import torch
from families import FAMILIES, randomise, tiny, tokens

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM, ManticoreForSequenceClassification, prune
from manticore_hf.families.examine import Examined

LIMIT = 12
SIZES = {"mamba": {"hidden_size": 48, "num_hidden_layers": 6}}
# What the family calls them is mapped by `tiny_config`; GPT-Neo's masks have an end, too
TABLES = ["gpt2", "opt", "opt_projected", "gptj", "gpt_neo"]


def joined(family="gpt2", other="llama", **settings):
    """A hybrid of a component with a table of LIMIT positions and another one."""
    parts = {"short": tiny(family, max_position_embeddings=LIMIT), "long": tiny(other, seed=1, **SIZES.get(other, {}))}
    parts = [ComponentSpec(model, name=name) for name, model in parts.items()]
    model = ManticoreForCausalLM.from_components(parts, **{"num_blocks": 2, **settings}).eval()
    randomise(model)
    return model


def refused(call, *texts):
    with pytest.raises(ManticoreError) as err:
        call()
    for text in ("'short'", f"{LIMIT} positions", "set_mixture_weights", *texts):
        assert text in str(err.value)


def test_the_smallest_limit_that_is_stated_is_the_hybrids():
    assert joined().config.max_position_embeddings == LIMIT
    assert joined(other="mamba").config.max_position_embeddings == LIMIT
    both = [tiny("llama"), ComponentSpec(tiny("gpt_neox", max_position_embeddings=32), name="b")]
    assert ManticoreForCausalLM.from_components(both).config.max_position_embeddings == 32
    alone = [ComponentSpec(tiny("mamba", seed=i, vocab_size=99), name=n) for i, n in enumerate("ab")]
    for one in alone:
        del one.source.config.max_position_embeddings  # which the tests' configurations all have, Mamba's do not
    assert ManticoreForCausalLM.from_components(alone).config.max_position_embeddings is None


@pytest.mark.parametrize("settings", [{}, {"preset": "paper"}], ids=["default", "paper"])
@pytest.mark.parametrize("family", TABLES)
@torch.no_grad()
def test_longer_input_is_refused(family, settings):
    model, ids = joined(family, "mamba", **settings), tokens(time=LIMIT + 1)
    model(ids[:, :LIMIT])
    refused(lambda: model(ids), f"{LIMIT + 1} tokens")
    refused(lambda: model(ids, labels=ids), f"{LIMIT + 1} tokens")
    refused(lambda: model(inputs_embeds=model.get_input_embeddings()(ids)), f"{LIMIT + 1} tokens")


@pytest.mark.parametrize("family", ["ctrl", "codegen"])
@torch.no_grad()
def test_tables_of_angles_are_found_wherever_they_are(family):
    """CTRL keeps its own beside the layers; CodeGen and GPT-J in them, and from Transformers 5.24 on beside them."""
    part = Examined(family).component
    limit = part.config.max_position_embeddings
    model = ManticoreForCausalLM.from_components([ComponentSpec(part, name="short")], num_blocks=2).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, limit + 1), generator=torch.Generator().manual_seed(0))
    assert model(ids[:, :limit]).logits.isfinite().all()
    with pytest.raises(ManticoreError, match=f"'short' has a table of {limit} positions; position {limit}, "):
        model(ids)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*TABLES}))
@torch.no_grad()
def test_components_without_a_table_limit_nothing(family):
    parts = [ComponentSpec(tiny(family, max_position_embeddings=LIMIT), name="a")]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2).eval()
    assert model.config.max_position_embeddings == LIMIT
    ids = tokens(time=LIMIT + 3)
    assert torch.allclose(model(ids).logits, model.component("a")(ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", TABLES)
@torch.no_grad()
def test_cached_decoding_is_refused_at_the_limit(family):
    model, ids = joined(family, "mamba"), tokens(time=LIMIT)
    prompt = ids[:, : LIMIT - 4]
    made = model.generate(prompt, max_new_tokens=5, do_sample=False)  # the last token is not read
    assert made.shape[1] == LIMIT + 1
    assert torch.equal(made, model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False))
    refused(lambda: model.generate(prompt, max_new_tokens=6, do_sample=False), f"{LIMIT + 1} tokens")
    cache = model(ids).past_key_values
    refused(lambda: model(ids[:, :1], past_key_values=cache), f"{LIMIT + 1} tokens")
    refused(lambda: model.generate(prompt, max_new_tokens=6, do_sample=False, num_beams=2), f"{LIMIT + 1} tokens")


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
@torch.no_grad()
def test_padding_on_the_left_is_no_position(family):
    model, ids = joined(family), tokens(batch=1, time=LIMIT)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], -1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], -1)
    logits = model(padded, attention_mask=mask).logits[:, 4:]
    assert torch.allclose(logits, model(ids).logits, atol=1e-4)
    more, wider = torch.cat([padded, ids[:, :1]], -1), torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], -1)
    refused(lambda: model(more, attention_mask=wider), f"position {LIMIT}, that is {LIMIT + 1} tokens")
    options = {"attention_mask": mask[:, :-3], "do_sample": False}
    given = model.generate(padded[:, :-3], max_new_tokens=4, **options)[:, 4:]
    assert torch.equal(given, model.generate(ids[:, :-3], max_new_tokens=4, do_sample=False))
    refused(lambda: model.generate(padded[:, :-3], max_new_tokens=5, **options), f"{LIMIT + 1} tokens")


@torch.no_grad()
def test_masks_with_an_end_count_padding():
    model, ids = joined("gpt_neo"), tokens(batch=1, time=LIMIT)
    mask = torch.tensor([[0, *[1] * LIMIT]])
    refused(lambda: model(torch.cat([ids[:, :1], ids], -1), attention_mask=mask), "padding and cached ones included")
    cache = model(ids[:, :-1], attention_mask=mask[:, :-2]).past_key_values
    last = model(ids[:, -1:], attention_mask=mask[:, :-1], past_key_values=cache)
    refused(lambda: model(ids[:, :1], attention_mask=mask, past_key_values=last.past_key_values), "padding and cached")


@torch.no_grad()
def test_positions_that_are_given():
    model, ids = joined(), tokens(batch=1, time=3)
    assert model(ids, position_ids=torch.tensor([[LIMIT - 3, LIMIT - 2, LIMIT - 1]])).logits.isfinite().all()
    refused(lambda: model(ids, position_ids=torch.tensor([[0, 1, LIMIT]])), f"position {LIMIT}")


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("other", ["llama", "mamba"])
@torch.no_grad()
def test_a_component_of_weight_zero_limits_nothing(family, other):
    model, ids = joined(family, other, gate="alpha"), tokens(time=LIMIT + 5)
    model.set_mixture_weights("long")
    alone = model.component("long")
    assert torch.allclose(model(ids).logits, alone(ids).logits, atol=1e-5)
    expected = alone.generate(ids[:, :4], max_new_tokens=LIMIT, do_sample=False)
    assert torch.equal(model.generate(ids[:, :4], max_new_tokens=LIMIT, do_sample=False), expected)
    model.set_mixture_weights([[1e-6, 1 - 1e-6], [0.0, 1.0]])
    refused(lambda: model(ids), f"{LIMIT + 5} tokens")


@torch.no_grad()
def test_a_route_is_limited_by_what_it_runs():
    soft, ids = joined(), tokens(time=LIMIT + 1)
    rows = None
    assert prune(soft, "long", rows)(ids).logits.isfinite().all()
    refused(lambda: prune(joined(), ["short", "long"], rows)(ids), f"{LIMIT + 1} tokens")
    # The positions are read in its first block, which is not there
    assert prune(joined(), ["long", "short"], rows)(ids).logits.isfinite().all()


@pytest.mark.parametrize("other", ["llama", "mamba"])
@torch.no_grad()
def test_a_component_dropped_at_the_end_of_its_table(other):
    """Both read up to the limit; there the caller takes the short one out, and the same cache goes on without it."""
    model, ids = joined("gpt2", other, num_blocks=1, mixture="token"), tokens(time=LIMIT + 6)
    both, alone = model(ids[:, :LIMIT]), model.component("long")(ids).logits
    refused(lambda: model(ids[:, LIMIT:], past_key_values=both.past_key_values), f"{LIMIT + 6} tokens")
    assert not torch.allclose(both.logits, alone[:, :LIMIT], atol=1e-2)  # it did count
    model.set_mixture_weights("long")
    rest = [model(one, past_key_values=both.past_key_values).logits for one in ids[:, LIMIT:].split([4, 1, 1], -1)]
    torch.testing.assert_close(torch.cat(rest, 1), alone[:, LIMIT:], rtol=1e-4, atol=1e-4)
    model.set_mixture_weights(None)
    cache = model(ids[:, :LIMIT]).past_key_values
    model.set_mixture_weights("long")
    made = model.generate(ids[:, : LIMIT + 1], past_key_values=cache, max_new_tokens=5, do_sample=False)
    wanted = model.component("long").generate(ids[:, : LIMIT + 1], max_new_tokens=5, do_sample=False)
    torch.testing.assert_close(made, wanted)


@torch.no_grad()
def test_classifiers_have_the_same_end():
    model, ids = ManticoreForSequenceClassification.from_causal_lm(joined(), 2), tokens(time=LIMIT + 1)
    mask = torch.ones_like(ids)
    refused(lambda: model(ids, attention_mask=mask), f"{LIMIT + 1} tokens")
    model.set_mixture_weights("long")
    assert model(ids, attention_mask=mask).logits.isfinite().all()
