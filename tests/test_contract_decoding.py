"""Contract: decoding with a cache gives what decoding without one gives, tokens and logits, for every family."""

import pytest
import torch
from families import FAMILIES, PAIRS, hybrid, tokens

from manticore_hf import ManticoreError

PRESETS = {"default": {}, "paper": {"preset": "paper", "num_blocks": 3}}
CASES = [(name, "default") for name in FAMILIES] + [(name, preset) for name in PAIRS for preset in PRESETS]
PADDING = 3


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request):
    name, preset = request.param
    return hybrid(name, **PRESETS[preset])


@pytest.fixture
def padded():
    """Two rows of 8 tokens, the first with `PADDING` tokens of left padding: (ids, mask)."""
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    ids[0, :PADDING], mask[0, :PADDING] = 0, 0
    return ids, mask


def close(got, wanted):
    """Equal up to the rounding of sums taken in another order; the logits are of order 1."""
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def naive_greedy(model, ids, mask, steps):
    """Greedy decoding that runs the whole sequence each time. Returns (tokens, logits [batch, steps, vocabulary])."""
    logits = []
    for _ in range(steps):
        logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].float())
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], -1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return ids, torch.stack(logits, 1)


def generate(model, ids, mask=None, steps=6, **kwargs):
    """Returns (tokens, logits [batch, steps, vocabulary], output)."""
    kwargs = {"do_sample": False, "max_new_tokens": steps, **kwargs}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, return_dict_in_generate=True,
        output_logits=True, **kwargs,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1), out


def test_greedy_with_left_padding(model, padded):
    ids, mask = padded
    wanted, wanted_logits = naive_greedy(model, ids, mask, 6)
    got, logits, out = generate(model, ids, mask)
    assert torch.equal(got, wanted)
    close(logits, wanted_logits)
    assert out.past_key_values.get_seq_length() == ids.shape[1] + 5


def test_a_padded_row_is_the_row_alone(model, padded):
    ids, mask = padded
    alone, alone_logits = naive_greedy(model, ids[:1, PADDING:], mask[:1, PADDING:], 6)
    got, logits, _ = generate(model, ids, mask)
    assert torch.equal(got[:1, PADDING:], alone)
    close(logits[:1], alone_logits)
    # A batch of one may take other paths upstream
    got, logits, _ = generate(model, ids[:1], mask[:1])
    assert torch.equal(got[:, PADDING:], alone)
    close(logits, alone_logits)


def test_sampling_with_several_returned_sequences(model, padded):
    kwargs = {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 0.7}
    torch.manual_seed(3)
    wanted, wanted_logits, _ = generate(model, *padded, use_cache=False, **kwargs)
    torch.manual_seed(3)
    got, logits, _ = generate(model, *padded, **kwargs)
    assert torch.equal(got, wanted) and len(got) == 6
    close(logits, wanted_logits)


def test_beams(model, padded):
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    wanted, wanted_logits, uncached = generate(model, *padded, use_cache=False, **kwargs)
    got, logits, cached = generate(model, *padded, **kwargs)
    assert torch.equal(got, wanted)
    assert torch.equal(cached.beam_indices, uncached.beam_indices)
    close(cached.sequences_scores, uncached.sequences_scores)
    close(logits, wanted_logits)


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (4,), (5,), (4, 1, 1, 3, 2)], ids=str)
@torch.no_grad()
def test_prefill_in_chunks(model, sizes):
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache, start, parts, i = model.make_cache(), 0, [], 0
    while start < 11:
        stop = min(start + sizes[i % len(sizes)], 11)
        out = model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        parts.append(out.logits)
        start, i = stop, i + 1
    real = mask.bool()
    close(torch.cat(parts, 1)[real], whole[real])
    assert out.past_key_values is cache and cache.get_seq_length() == 11


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


@torch.no_grad()
def test_two_sequences_decoded_by_turns(model):
    """Nothing of one sequence may live outside its cache."""
    one, two = tokens(1, 6, seed=3), tokens(1, 6, seed=4)
    whole = [model(input_ids=x, use_cache=False).logits for x in (one, two)]
    caches, parts = [model.make_cache(), model.make_cache()], [[], []]
    for start, stop in [(0, 4), (4, 5), (5, 6)]:
        for i, ids in enumerate((one, two)):
            parts[i].append(model(input_ids=ids[:, start:stop], past_key_values=caches[i]).logits)
    for part, wanted in zip(parts, whole):
        close(torch.cat(part, 1), wanted)


# Their classes say (`_can_compile_fullgraph`) that they do not support it; gpt_neo's logits would be wrong.
NO_STATIC_CACHE = {"gpt_neo", "recurrent_gemma"}


def test_static_cache(model, padded):
    if NO_STATIC_CACHE & set(model.config.component_names):
        with pytest.raises(ManticoreError, match="does not support a static cache"):
            generate(model, *padded, cache_implementation="static")
        return
    wanted, wanted_logits = naive_greedy(model, *padded, 6)
    got, logits, out = generate(model, *padded, cache_implementation="static")
    assert torch.equal(got, wanted)
    close(logits, wanted_logits)
    assert out.past_key_values.max_cache_len >= got.shape[1] - 1
    # Straight, without a mask, with room to spare, in chunks
    ids, cache = tokens(1, 10), model.make_cache(16)
    with torch.no_grad():
        parts = [model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in [(0, 6), (6, 7), (7, 10)]]
        close(torch.cat(parts, 1), model(input_ids=ids, use_cache=False).logits)


def test_other_caches_are_refused(model, padded):
    with pytest.raises(ManticoreError, match="cache_implementation='quantized'"):
        generate(model, *padded, cache_implementation="quantized")
