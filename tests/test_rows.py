"""Several documents in one row, and padding anywhere: every document, and every row, is what it is alone."""

import pytest
import torch
from families import FAMILIES, PAIRS, hybrid, tiny, tokens
from hub_models import tiny as tiny_lm
from manticore_hf.modeling import rows_manticore as rows
from transformers import DataCollatorWithFlattening

from manticore_hf import (
    ComponentSpec,
    ManticoreError,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
)
from manticore_hf.families import contract
from manticore_hf.families.contract import close

LENGTHS = (6, 1, 5, 4)
QUICK = ("gpt_neox+mamba", "gpt_neo+mamba2+opt", "recurrent_gemma", "bloom")


def packed():
    """(ids [1, 16], position_ids, seq_idx, cu_seq_lens) of four documents."""
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None].int()
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return tokens(1, sum(LENGTHS), 3), positions, numbers, ends


def alone(model, ids, lengths=LENGTHS):
    return torch.cat([model(input_ids=one, use_cache=False).logits for one in ids.split(lengths, 1)], 1)


@pytest.mark.parametrize("few", [rows.FEW, 0], ids=["one pass", "several"])
def test_documents_are_as_alone(few, monkeypatch):
    monkeypatch.setattr(rows, "FEW", few)
    for name in QUICK:
        contract.check_documents(hybrid(name, num_blocks=1))
    contract.check_documents(hybrid(QUICK[0], preset="paper", num_blocks=3))
    contract.check_documents(hybrid(QUICK[0], num_blocks=2).train())


def test_padding_inside_is_as_if_it_were_not_there():
    for name in ("recurrent_gemma", "llama+falcon_mamba"):
        contract.check_padding_inside(hybrid(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *PAIRS])
def test_every_family(name):
    contract.check_documents(hybrid(name))
    contract.check_padding_inside(hybrid(name))
    check_gradients_through_a_cache(hybrid(name))


def check_gradients_through_a_cache(model):
    """In one call, and in two: those of a call without a cache, with padding in the middle and without."""
    ids, rest = tokens(2, 9, 1), torch.randn(2, 9, 1, generator=torch.Generator().manual_seed(0))
    gaps = torch.ones_like(ids)
    gaps[0, 4:6] = 0
    model.requires_grad_(True)

    def gradients(mask, *calls):
        cache, logits = None, []
        for start, stop, use in calls:
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache, use_cache=use)
            cache = out.cache
            logits.append(out.logits)
        model.zero_grad()
        (torch.cat(logits, 1) * rest * mask[..., None]).sum().backward()
        return {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}

    for mask in (gaps, torch.ones_like(ids)):
        right = gradients(mask, (0, 9, False))
        scale = max(float(one.abs().max()) for one in right.values())
        for calls in ([(0, 9, True)], [(0, 4, True), (4, 9, True)]):
            found = gradients(mask, *calls)
            assert found.keys() == right.keys()
            for key, one in right.items():
                torch.testing.assert_close(found[key], one, atol=1e-5 * scale, rtol=1e-3, msg=key)


def test_gradients_reach_back_through_a_cache():
    for name in ("gpt_neox+mamba", "recurrent_gemma"):
        check_gradients_through_a_cache(hybrid(name))
    # Transformers' own functions for one token overwrite the state in place
    for name, settings in (("gpt_neox+mamba", {"num_blocks": 1}), ("mamba2", {"num_blocks": 2})):
        model, ids = hybrid(name, **settings), tokens(1, 6)
        cache = model(ids[:, :5]).cache
        with pytest.raises(ManticoreError, match="single tokens.* call the model with use_cache=False"):
            model(ids[:, 5:], cache=cache).logits.sum().backward()
    cache = hybrid("llama")(ids[:, :5]).cache
    hybrid("llama")(ids[:, 5:], cache=cache).logits.sum().backward()


@torch.no_grad()
def test_all_ways_to_say_where_documents_begin():
    ids, positions, numbers, ends = packed()
    model = hybrid("gpt_neox+mamba")
    wanted = alone(model, ids)
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    given = flat([{"input_ids": one[0].tolist()} for one in ids.split(LENGTHS, 1)], return_tensors="pt")
    assert given.pop("labels") is not None and {"seq_idx", "cu_seq_lens_q", "position_ids"} <= given.keys()
    ways = [
        {"position_ids": positions},
        {"seq_idx": numbers},
        {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6},
        {"position_ids": positions, "attention_mask": torch.ones_like(ids)},
        {"seq_idx": numbers, "inputs_embeds": model.get_input_embeddings()(ids)},
        given,
    ]
    for way in ways:
        if "inputs_embeds" not in way:
            way = {"input_ids": ids, **way}
        out = model(**way, output_hidden_states=True)
        close(out.logits, wanted)
        assert out.cache is None and all(state.shape[:2] == ids.shape for state in out.hidden_states)
    # Positions that say nothing of documents change nothing
    whole = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(model(input_ids=ids, position_ids=torch.arange(16)[None], use_cache=False).logits, whole)
    assert (whole - wanted).abs().max() > 1e-2


@torch.no_grad()
def test_padding_inside_of_documents():
    ids, positions, numbers, _ = packed()
    model, mask = hybrid("gpt_neox+mamba"), torch.ones_like(ids)
    mask[0, [0, 3, 6, 9, 15]] = 0  # the second document is nothing but padding
    kept = mask[0].bool()
    wanted = alone(model, ids[:, kept], (4, 4, 3))
    got = model(input_ids=ids, attention_mask=mask, seq_idx=numbers, use_cache=False).logits
    close(got[:, kept], wanted)


def test_no_loss_leads_out_of_a_document():
    ids, positions, numbers, ends = packed()
    labels = ids.clone()
    labels[0, 2] = -100
    model = hybrid("gpt_neox+mamba", component_loss_weight=0.5)
    parts = list(zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1)))
    losses = [(model(input_ids=one, labels=own, use_cache=False), (own[:, 1:] != -100).sum()) for one, own in parts]
    total = sum(count for _, count in losses)
    wanted = sum(out.loss * count for out, count in losses if count) / total
    shifted = torch.cat([torch.nn.functional.pad(own[:, 1:], (0, 1), value=-100) for _, own in parts], 1)
    careless = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for given in (
        {"labels": labels},
        {"labels": labels, "shift_labels": shifted},
        {"labels": labels, "shift_labels": careless},
    ):
        for way in ({"position_ids": positions}, {"cu_seq_lens_q": ends}):
            close(model(input_ids=ids, **given, **way).loss, wanted)
        close(model(input_ids=ids, **given, seq_idx=numbers, num_items_in_batch=2 * total).loss, wanted / 2)


@torch.no_grad()
def test_classifiers():
    """A class per token of documents in one row and of padded rows; of padded rows one per row, too."""
    ids, positions, _, _ = packed()
    labels = ids % 3
    (rows_of_two, mask, _), gaps = contract.left_padded(), torch.ones(2, 9, dtype=torch.long)
    gaps[0, 4:6], gaps[1, 7:] = 0, 0
    for families, settings in (
        (("gpt_neox", "mamba"), {}),
        (("bloom", "mamba2"), {"num_blocks": 2}),
        (("gpt_neox", "mamba"), {"num_blocks": 2, "preset": "paper"}),
    ):
        given = {"num_labels": 3, "verify": False, **settings}
        parts = [ComponentSpec(tiny(family, seed), name=family) for seed, family in enumerate(families)]
        of_tokens, of_rows = (
            strong(cls.from_components(parts, **given).eval())
            for cls in (ManticoreForTokenClassification, ManticoreForSequenceClassification)
        )
        found = of_tokens(input_ids=ids, position_ids=positions, labels=labels)
        each = [of_tokens(input_ids=a, labels=b) for a, b in zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1))]
        close(found.logits, torch.cat([out.logits for out in each], 1))
        close(found.loss, sum(out.loss * n for out, n in zip(each, LENGTHS)) / sum(LENGTHS))
        for kept in (mask, gaps):
            lone = [row[own.bool()][None] for row, own in zip(rows_of_two, kept)]
            wanted = torch.cat([of_tokens(input_ids=row).logits[0] for row in lone])
            close(of_tokens(input_ids=rows_of_two, attention_mask=kept).logits[kept.bool()], wanted)
            wanted = torch.cat([of_rows(input_ids=row).logits for row in lone])
            close(of_rows(input_ids=rows_of_two, attention_mask=kept).logits, wanted)


def strong(model):
    """Gives a model's parameters, also those that start at zero, values that show."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return model


def test_groups_bound_the_padding():
    generator = torch.Generator().manual_seed(0)
    for low, high, count in ((1, 2000, 40), (100, 120, 30), (5, 5, 3), (1, 60, 200)):
        lengths = torch.randint(low, high + 1, (count,), generator=generator)
        documents = rows.Documents(torch.arange(int(lengths.sum())), lengths, (1, int(lengths.sum())))
        groups = documents.groups(together=False)
        assert sorted(i for group in groups for i in group) == list(range(count))
        for group in groups:
            own = lengths[group]
            assert own.max() * len(own) - own.sum() <= max(own.sum() // rows.SPARE, rows.FEW)
        assert len(documents.groups(together=True)) == 1


@torch.no_grad()
def test_masks_of_other_types():
    model, (ids, mask, _) = hybrid("gpt_neox+mamba"), contract.left_padded()
    mask[1, 4] = 0
    wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    least = torch.finfo(torch.float16).min
    added = [mask.logical_not() * value for value in (torch.finfo(torch.float32).min, -1e9, least)]
    added.append(torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask == 0, -torch.inf))
    for given in (mask.bool(), mask.float(), mask.half(), mask.int(), mask.byte(), *added):
        assert torch.equal(model(input_ids=ids, attention_mask=given, use_cache=False).logits, wanted)
    say = {"max_new_tokens": 4, "do_sample": False}
    said = model.generate(ids, attention_mask=mask, **say)
    for given in (mask.bool(), mask.float(), *added):  # which `generate` counts positions from, and lengthens
        for use_cache in (True, False):
            assert torch.equal(model.generate(ids, attention_mask=given, use_cache=use_cache, **say), said)
    for given, message in (
        (added[0] + mask, "only what is added to scores"),
        (mask * 2, "attention_mask holds 2; it may hold 1"),
        (mask.float() * 0.5, "attention_mask holds 0.5"),
        (torch.zeros_like(mask, dtype=torch.float32), "attention_mask is torch.float32 and 0 throughout"),
    ):
        with pytest.raises(ManticoreError, match=message):
            model(input_ids=ids, attention_mask=given, use_cache=False)


def test_what_cannot_be_right_is_refused():
    ids, positions, numbers, ends = packed()
    model = hybrid("gpt_neox+mamba").eval()
    for given in ({"use_cache": True}, {"cache": model.make_cache()}):
        with pytest.raises(ManticoreError, match="several documents in one row, and a cache continues only one"):
            model(input_ids=ids, position_ids=positions, **given)
    with pytest.raises(ManticoreError, match=r"cu_seq_lens_q ends at 16,.* there are 1 \* 15 tokens"):
        model(input_ids=ids[:, :15], cu_seq_lens_q=ends)
    parts = [ComponentSpec(tiny_lm("gpt_neox"), name="one")]
    with pytest.raises(ManticoreError, match="A row of several documents has no single score"):
        classifier = ManticoreForSequenceClassification.from_components(parts, num_labels=2, verify=False)
        classifier(input_ids=ids, position_ids=positions)
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    mamba = hybrid("mamba")
    cache = mamba(input_ids=ids[:, :8]).cache
    with pytest.raises(ManticoreError, match="attention_mask differs from before for tokens in the cache"):
        mamba(input_ids=ids[:, 8:], attention_mask=mask, cache=cache)
    cache = mamba(input_ids=ids[:, :8], attention_mask=mask[:, :8]).cache
    with pytest.raises(ManticoreError, match="attention_mask differs from before for tokens in the cache"):
        mamba(input_ids=ids[:, 8:], cache=cache)
    with pytest.raises(ManticoreError, match="which a static or quantised cache cannot hold"):
        model(input_ids=ids, attention_mask=mask, cache=model.make_cache(32))


def test_a_second_turn_after_rows_that_ended_at_different_times():
    """`generate` feeds a row that has ended its padding as text; then all is read again."""
    model, prompts, turn = hybrid("gpt_neox+mamba"), tokens(2, 6, 1), tokens(2, 3, 9)
    say = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "max_new_tokens": 6}
    said = model.generate(prompts, attention_mask=torch.ones_like(prompts), eos_token_id=98, **say).sequences
    end = int(said[1, 8])
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), eos_token_id=end, **say)
    stop = [int((row[6:] == end).nonzero()[0]) + 7 if (row[6:] == end).any() else len(row) for row in out.sequences]
    mask = (torch.arange(out.sequences.shape[1]) < torch.tensor(stop)[:, None]).long()
    assert mask[1].sum() < out.sequences.shape[1]
    ids, mask = torch.cat([out.sequences, turn], 1), torch.cat([mask, torch.ones_like(turn)], 1)
    cache = out.cache
    more = model.generate(ids, attention_mask=mask, cache=cache, eos_token_id=98, **say)
    assert more.cache is cache and cache.get_seq_length() == more.sequences.shape[1] - 1
    for row, before, here, after in zip(out.sequences, stop, turn, more.sequences):
        text = torch.cat([row[:before], here])[None]
        lone = model.generate(text, attention_mask=torch.ones_like(text), eos_token_id=98, **say).sequences[0]
        assert torch.equal(after[ids.shape[1] :], lone[text.shape[1] :])


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    ids, positions, _, _ = packed()
    model = hybrid("mamba", num_blocks=1)
    compiled = torch.compile(model, backend="eager")
    close(compiled(input_ids=ids, position_ids=positions, use_cache=False).logits, alone(model, ids))
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    with pytest.raises(RuntimeError, match="attention_mask has padding between a row's tokens"):
        compiled(input_ids=ids, attention_mask=mask, use_cache=False)
