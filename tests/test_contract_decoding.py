"""Contract: decoding with a cache gives what decoding without one gives, tokens and logits, for every family."""

import pytest
import torch
from families import FAMILIES, PAIRS, hybrid, representatives, tokens

from manticore_hf import ManticoreError
from manticore_hf.families import contract
from manticore_hf.families.contract import close, generate, naive_greedy

PRESETS = {"default": {}, "paper": {"preset": "paper", "num_blocks": 3}}
# The paper's way of joining does not depend on the family: the quick tests have it with two components and with three.
QUICK = [(name, "default") for name in representatives([*FAMILIES, *PAIRS]) if isinstance(name, str)]
QUICK += [(name, "paper") for name in ("gpt_neox+mamba", "gpt_neo+mamba2+opt")]
ALL = [(name, "default") for name in [*FAMILIES, *PAIRS]] + [(name, "paper") for name in PAIRS]
CASES = [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in ALL]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request):
    name, preset = request.param
    return hybrid(name, **PRESETS[preset])


@pytest.fixture
def padded():
    """Two rows of 8 tokens, the first with left padding: (ids, mask)."""
    return contract.left_padded(8)[:2]


@pytest.mark.quick(every=2)
def test_greedy_with_left_padding(model):
    contract.check_greedy(model)


@pytest.mark.quick(every=2)
def test_a_padded_row_is_the_row_alone(model):
    contract.check_padding(model)


@pytest.mark.quick(every=2)
def test_sampling_with_several_returned_sequences(model, padded):
    kwargs = {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 0.7}
    torch.manual_seed(3)
    wanted, wanted_logits, _ = generate(model, *padded, use_cache=False, **kwargs)
    torch.manual_seed(3)
    got, logits, _ = generate(model, *padded, **kwargs)
    assert torch.equal(got, wanted) and len(got) == 6
    close(logits, wanted_logits)


@pytest.mark.quick(every=2)
def test_beams(model):
    contract.check_beams(model)


@pytest.mark.quick(every=2)
def test_prefill_in_chunks(model):
    """Of one token, of less than a window and a convolution's kernel hold, of more, and of all sizes in turn."""
    for sizes in ((1,), (3,), (5,), (4, 1, 1, 3, 2)):
        contract.check_chunks(model, sizes)


@pytest.mark.slow
def test_prefill_in_chunks_of_more_sizes(model):
    for sizes in ((2,), (4,)):
        contract.check_chunks(model, sizes)


@torch.no_grad()
def test_prefill_in_chunks_without_a_mask(model):
    ids = tokens(1, 10)
    cache = model.make_cache()
    parts = [model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in [(0, 6), (6, 8), (8, 9), (9, 10)]]
    close(torch.cat(parts, 1), model(input_ids=ids, use_cache=False).logits)


def test_generate_with_prefill_chunk_size(model, padded):
    wanted, wanted_logits = naive_greedy(model, *padded, 5)
    got, logits, _ = generate(model, *padded, steps=5, prefill_chunk_size=3)
    assert torch.equal(got, wanted)
    close(logits, wanted_logits)


def test_a_second_turn_continues_from_the_cache(model, padded):
    ids, mask = padded
    first, _, out = generate(model, ids, mask, steps=4)
    ids = torch.cat([first, tokens(2, 5, seed=2)], -1)
    mask = torch.cat([mask, torch.ones(2, 9, dtype=torch.long)], -1)
    wanted, wanted_logits = naive_greedy(model, ids, mask, 4)
    got, logits, _ = generate(model, ids, mask, steps=4, past_key_values=out.past_key_values)
    assert torch.equal(got, wanted)
    close(logits, wanted_logits)


def test_two_sequences_decoded_by_turns(model):
    contract.check_turns(model)


# Their classes say (`_can_compile_fullgraph`) that they do not support it; gpt_neo's logits would be wrong.
NO_STATIC_CACHE = {"gpt_neo", "recurrent_gemma"}


def test_static_cache(model, padded):
    if NO_STATIC_CACHE & set(model.config.component_names):
        with pytest.raises(ManticoreError, match="does not support a static cache"):
            generate(model, *padded, cache_implementation="static")
        return
    contract.check_static_cache(model)


def test_other_caches_are_refused(model, padded):
    for kind, said in (("offloaded", "cache_implementation='offloaded'"), ("paged", "Continuous batching keeps")):
        with pytest.raises(ManticoreError, match=said):
            generate(model, *padded, cache_implementation=kind)
