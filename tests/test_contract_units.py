"""Contract: the cache's own operations, and what a configuration refuses."""

import copy

import pytest
import torch
from families import hybrid, tiny_config, tokens
from transformers import DynamicCache

from manticore_hf import ManticoreConfig, ManticoreError

PAIR = "gpt_neox+mamba"


@pytest.fixture(scope="module")
def model():
    return hybrid(PAIR)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def filled(model, ids):
    return model(input_ids=ids, use_cache=True).past_key_values


def next_logits(model, cache, ids):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache).logits[:, -1]


@torch.no_grad()
def last_logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits[:, -1]


def test_rows_are_repeated_selected_and_reordered(model):
    ids, new = tokens(3, 6), tokens(3, 1, seed=5)
    order = torch.tensor([2, 0, 2])
    for change, rows in (
        (lambda cache: cache.reorder_cache(order), order),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), torch.tensor([1])),
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        cache = filled(model, ids)
        change(cache)
        wanted = last_logits(model, torch.cat([ids[rows], new[rows]], -1))
        close(next_logits(model, cache, new[rows]), wanted)


def test_crop_of_a_cache_of_attention_only():
    model = hybrid("llama")
    ids, cache = tokens(2, 8), None
    cache = filled(model, ids)
    cache.crop(-3)
    assert cache.get_seq_length() == 5
    close(next_logits(model, cache, ids[:, 5:]), last_logits(model, ids))


@torch.no_grad()
def test_crop_of_recurrent_states_is_refused(model):
    """Recorded or not: Transformers records convolutions, and leaves what was scanned as it is."""
    ids, other = tokens(), tokens()[:, :1]
    for record in (False, True):
        cache = model.make_cache()
        if record:
            cache.activate_past_recording()
        model(ids, cache=cache)
        with pytest.raises(
            ManticoreError, match=r"recurrent or quantised layers, or of .* cannot undo .* copy.deepcopy"
        ):
            cache.crop(-2)
        assert not cache.is_croppable and cache.get_seq_length() == ids.shape[1]
        copied = copy.deepcopy(cache)
        close(next_logits(model, copied, other), last_logits(model, torch.cat([ids, other], -1)))


def test_no_more_is_cropped_than_was_read():
    model, ids = hybrid("llama"), tokens(1, 5)
    cache = filled(model, ids)
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    close(next_logits(model, cache, ids), last_logits(model, ids))


@torch.no_grad()
def test_crop_of_a_sliding_window_keeps_what_the_next_token_reads():
    """Right where the window's keys are there still, refused before anything is cut where they are not."""
    model, ids = hybrid("gemma3_text"), tokens(1, 12)  # windows of 4 tokens
    for record, read, removed, fits in (
        (False, [3], 2, True),
        (False, [12], 3, False),
        (True, [12], 3, True),
        (True, [12], 11, True),
        (True, [8, 2, 2], 3, True),
    ):
        cache = model.make_cache()
        if record:
            cache.activate_past_recording()
        for part in ids[:, : sum(read)].split(read, -1):
            model(part, cache=cache)
        left = sum(read) - removed
        if fits:
            cache.crop(-removed)
            close(next_logits(model, cache, ids[:, left:]), last_logits(model, ids))
        else:
            with pytest.raises(ManticoreError, match=r"sliding windows .*activate_past_recording.* cannot undo"):
                cache.crop(-removed)
            assert {layer.get_seq_length() for layer in cache.layers} == {12} == {cache.get_seq_length()}
    cache = model.make_cache()  # recorded, cropped, and cropped again by more than what came in between
    cache.activate_past_recording()
    model(ids, cache=cache)
    cache.crop(-1)
    with pytest.raises(ManticoreError, match="sliding window"):
        cache.crop(-2)
    model(ids[:, 11:], cache=cache)
    cache.crop(-1)
    close(next_logits(model, cache, ids[:, 11:]), last_logits(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_neo"])
def test_crop_of_rows_with_padding_inside(name):
    """A row that was padded keeps its tokens at other places than the rest: only what all rows read can be removed."""
    model, ids = hybrid(name), tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, 6:9] = 0
    for read, removed, fits in ((9, 1, False), (12, 2, True), (12, 4, False)):
        cache = model.make_cache()
        cache.activate_past_recording()
        model(ids[:, :read], attention_mask=mask[:, :read], cache=cache)
        if not fits:
            with pytest.raises(ManticoreError, match="rows with padding inside cannot undo"):
                cache.crop(-removed)
            continue
        cache.crop(-removed)
        found = model(ids[:, read - removed :], attention_mask=mask, cache=cache).logits[:, -1]
        close(found, model(ids, attention_mask=mask, use_cache=False).logits[:, -1])


def test_no_more_is_cropped_beyond_a_window_than_was_read():
    model, ids = hybrid("gemma3_text"), tokens(1, 9)
    cache = model.make_cache()
    cache.crop(0)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
    cache.crop(-7)
    assert cache.get_seq_length() == 0
    close(next_logits(model, cache, ids), last_logits(model, ids))
    cache = filled(model, ids)
    cache.crop(0)  # nothing, though Transformers' own layers would ask for records of the past
    assert cache.get_seq_length() == 9


def test_crop_takes_no_length():
    """In earlier versions of Transformers a positive number was the length that stays."""
    for name in ("llama", PAIR):
        cache = filled(hybrid(name), tokens())
        with pytest.raises(ManticoreError, match=r"crop\(7\): .* crop\(-1\)"):
            cache.crop(7)


@pytest.mark.parametrize("name", [PAIR, "recurrent_gemma", "gemma2+jamba"])
def test_reset_forgets_everything(name):
    model = hybrid(name)
    cache = filled(model, tokens(2, 6))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert all(not layer.has_previous_state[0] for layer in cache.layers if hasattr(layer, "has_previous_state"))


def test_a_copied_cache_is_independent(model):
    ids = tokens(2, 6)
    cache = filled(model, ids)
    twin = copy.deepcopy(cache)
    new = tokens(2, 1, seed=6)
    one = next_logits(model, cache, new)
    close(next_logits(model, twin, new), one)
    assert cache.get_seq_length() == twin.get_seq_length() == 7


def test_a_foreign_cache_is_refused(model):
    from transformers import DynamicCache

    with pytest.raises(ManticoreError, match="^cache is a DynamicCache"):
        model(input_ids=tokens(), past_key_values=DynamicCache())


def entries(**changes):
    one = {"name": "one", "config": tiny_config("gpt_neox")}
    two = {"name": "two", "config": tiny_config("mamba")}
    return [{**one, **changes}, two]


COMMIT = "0" * 40


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_blocks": 0}, "num_blocks=0 must be a positive integer"),
        ({"num_blocks": 6}, "more than the 5 layers of component 'one'"),
        ({"num_blocks": True}, "positive integer"),
        ({"block_layers": {"one": [2, 2]}, "num_blocks": 2}, "sum to the component's 5 layers"),
        ({"block_layers": {"one": [5, 0]}, "num_blocks": 2}, "positive integers"),
        ({"block_layers": {"three": [5]}}, "must map component names"),
        ({"projector": "conv"}, "projector='conv' is unknown; choose one of"),
        ({"gate": "learned"}, "gate='learned' is unknown"),
        ({"mixture": "both"}, "mixture='both' is unknown"),
        ({"mixture_space": "logit"}, "mixture_space='logit' is unknown"),
        ({"embeddings": "shared"}, "embeddings='shared' is unknown"),
        ({"head_mixture": "middle"}, "head_mixture='middle' is unknown"),
        ({"preset": "best"}, "preset='best' is unknown"),
        ({"mix_loss_weight": -1}, "mix_loss_weight=-1 must be a non-negative number"),
        ({"mix_loss_weight": 0, "component_loss_weight": 0}, "nothing would be trained"),
        ({"reference_component": "three"}, "reference_component='three' is not a component"),
        ({"tokenizer_component": "three"}, "tokenizer_component='three' is not a component"),
        ({"mixture_weights": [[0.5, 0.6]]}, "each row summing to 1"),
        ({"manticore_version": 99}, "format version 99"),
        ({"components": entries(name="two")}, "Two components are named 'two'"),
        ({"components": entries(name="not a name")}, "must be a Python identifier"),
        ({"components": entries(name="generate")}, "used by the model itself"),
        ({"components": entries(config=None)}, "has no configuration"),
        ({"components": entries(config={"model_type": "no_such"})}, "model_type='no_such'"),
        ({"components": entries(weights="somewhere")}, "choose 'reference' or 'embedded'"),
        ({"components": entries(repo_id="a/b", revision="abc1234")}, "not a 40-hex commit"),
        ({"components": entries(repo_id="../b", revision=COMMIT)}, "not a Hub repository id"),
        ({"components": "gpt2"}, "must be a list of dicts"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused_by_name(settings, message):
    with pytest.raises(ManticoreError, match=message):
        ManticoreConfig(**{"components": entries(), **settings})


def test_cuts_are_as_even_as_possible():
    config = ManticoreConfig(components=entries(), num_blocks=3)
    assert config.block_layers == {"one": [2, 2, 1], "two": [2, 2, 1]}
    assert config.bounds("one") == [0, 2, 4, 5]


def test_a_configuration_survives_its_dict():
    config = ManticoreConfig(components=entries(), num_blocks=2, preset="paper", mixture_weights=[[1, 0], [0.5, 0.5]])
    again = ManticoreConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert type(again.one) is type(config.one) and again.mixture_weights == [[1.0, 0.0], [0.5, 0.5]]


def test_input_that_is_no_row_of_tokens_is_refused(model):
    for wrong in (tokens().float(), tokens().bool(), tokens()[0], tokens()[None]):
        with pytest.raises(ManticoreError, match=r"input_ids is torch\..* of shape .*give integers \[batch, time\]"):
            model(wrong)


def test_drafts_with_a_cache_of_the_users_own():
    """Layers with a sliding window have to keep what a refused draft pushed out, from the first call on."""
    model, ids = hybrid("gemma3_text"), tokens(1, 9)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    found = model.generate(ids, prompt_lookup_num_tokens=3, past_key_values=DynamicCache(), **given)
    assert torch.equal(found, model.generate(ids, **given))
