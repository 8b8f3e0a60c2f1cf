"""The vocabulary of one tokenizer for a model of another: what is copied, what is built, what stays."""

import copy
import json

import pytest
import torch
from tiny_hybrid import neox
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast
from two_tokenizers import FIRST, SECOND, component, first, second

from manticore_hf import ManticoreError
from manticore_hf.compose.transplant import bits_per_byte, transplant
from manticore_hf.compose.transplant.build import METHODS, Plan, match, matching_pursuit, new_rows
from manticore_hf.compose.transplant.surface import Surfaces

IDS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def permuted(tokenizer, order):
    """The tokenizer with id order[i] for what had id i."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["model"]["vocab"] = {token: order[number] for token, number in parts["model"]["vocab"].items()}
    for added in parts["added_tokens"]:
        added["id"] = order[added["id"]]
    special = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        **{key: value for key, value in special.items() if value is not None},
    )


# ---- surfaces --------------------------------------------------------------------------------------------------------


def test_byte_level_tokens_stand_for_the_bytes_they_are_written_for():
    tokenizer = first()
    surfaces = Surfaces(tokenizer)
    for text in (FIRST, "naïve — 猫\n\t  x"):
        ids = tokenizer(text)["input_ids"]
        assert b"".join(surfaces.bytes[number] for number in ids) == text.encode()
    assert surfaces.ids[b" the"] == tokenizer.convert_tokens_to_ids("Ġthe")
    assert surfaces.bytes[tokenizer.eos_token_id] is None and surfaces.roles["bos"] == surfaces.roles["eos"] == 0
    assert surfaces.spell(b" the cat")[:1] == tokenizer(" the")["input_ids"]
    assert b"".join(surfaces.bytes[i] for i in surfaces.spell("猫".encode()[:2])) == "猫".encode()[:2]


def test_sentencepiece_marks_and_byte_tokens_are_normalised():
    words = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xE7>", "<0x41>", "A", "▁", "▁cat", "cat", "▁c", "at", "c", "a", "t"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("c", "at")], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    surfaces = Surfaces(tokenizer)
    assert surfaces.bytes[3:10] == [b"\n", b"\xe7", b"A", b"A", b" ", b" cat", b"cat"]
    assert surfaces.ids[b"A"] == 6  # not the byte token of the same byte
    assert surfaces.spell(b"cat\n") == [12, 13, 14, 3]  # as the tokenizer itself cuts it: no merge makes "at"
    assert surfaces.spell(b"cat\xe7") == [9, 4]  # no text, so the longest first
    assert surfaces.spell(b"cat\xe8") == []
    plan = match(surfaces, Surfaces(second()))
    same = {"Ġ": 7, "A": 6, "c": 12, "Ċ": 3}
    assert {token: plan.copied[second().convert_tokens_to_ids(token)] for token in same} == same


def test_word_piece_marks_what_goes_on():
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "cat": 1, "##s": 2}, unk_token="[UNK]"))
    core.decoder, core.pre_tokenizer = decoders.WordPiece(), pre_tokenizers.Whitespace()
    assert Surfaces(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")).bytes == [None, b" cat", b"s"]


def test_special_tokens_go_by_role():
    one, two = Surfaces(first()), Surfaces(second())
    bos, eos, pad = (two.roles[role] for role in ("bos", "eos", "pad"))
    plan = match(one, two)
    assert plan.roles["input"] == {bos: 0, eos: 0}
    assert plan.roles["head"] == {eos: 0}  # once: else three tokens would share the end's probability
    assert plan.unmatched == [pad]
    back = match(two, one)
    assert back.roles == {"input": {0: bos}, "head": {0: eos}}  # one token begins texts and ends them


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["neox", "mamba"])
def test_the_same_tokenizer_changes_nothing(kind):
    model = component(kind, first(), extra=3)
    found, report = transplant(model, first(), first())
    state = found.state_dict()
    assert report.method == "identical" and set(state) == set(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind,tied", [("neox", False), ("neox", True), ("mamba", True)])
def test_a_permuted_vocabulary_permutes_the_logits(kind, tied, tmp_path):
    own = first()
    order = torch.randperm(310, generator=torch.Generator().manual_seed(3))
    other = permuted(own, order.tolist())
    model = component(kind, own, tie_word_embeddings=tied)
    for name, donor in (("mean", None), ("omp", model)):
        found, report = transplant(model, own, other, name, donor=donor, progress=False)
        assert report.coverage == {"copied": 309, "by role": 1, "built": 0, "none": 0}
        assert torch.equal(found(order[IDS]).logits[..., order], model(IDS).logits)
    assert found.config.eos_token_id == other.eos_token_id == order[0]
    found.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, found(IDS).logits)
    ends = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (ends[0] is ends[1]) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_copied_and_mean_rows_equal_a_plain_loop(tied):
    own, other = first(), second()
    model = component("neox", own, tie_word_embeddings=tied, extra=2)
    found, report = transplant(model, own, other, "mean")
    known, counts = {token: i for token, i in own.get_vocab().items() if i}, {"copied": 0, "built": 0}
    special = set(other.all_special_ids)
    ends = {
        "input": (model.get_input_embeddings(), found.get_input_embeddings()),
        "head": (model.get_output_embeddings(), found.get_output_embeddings()),
    }
    for token, number in other.get_vocab().items():
        if number in special:
            continue
        if token in known:
            counts["copied"] += 1
            assert all(torch.equal(a.weight[known[token]], b.weight[number]) for a, b in ends.values())
            continue
        counts["built"] += 1
        pieces = [piece.id for piece in own.backend_tokenizer.model.tokenize(token)]
        for side, (a, b) in ends.items():
            weights = [1.0 if side == "head" or tied else 2.0**i for i in range(len(pieces))]
            row = sum(w * a.weight[piece] for w, piece in zip(weights, pieces)) / sum(weights)
            torch.testing.assert_close(b.weight[number], row)
    assert counts["copied"] > 270 and counts["built"] > 20
    assert report.coverage == {**counts, "by role": 2, "none": 1}
    assert report.rows == (312, 325) and found.config.vocab_size == 325
    assert [found.config.bos_token_id, found.config.eos_token_id, found.config.pad_token_id] == [0, 1, 2]
    assert found.generation_config.eos_token_id == 1
    body = [key for key in model.state_dict() if "embed" not in key and "lm_head" not in key]
    assert len(body) > 20 and all(torch.equal(model.state_dict()[key], found.state_dict()[key]) for key in body)


def naive_pursuit(dictionary, target, atoms):
    """One vector; least squares on all chosen rows after each choice."""
    chosen, left, solution = [], target.double(), None
    directions = (dictionary / dictionary.norm(dim=1, keepdim=True)).double()
    for _ in range(atoms):
        chosen.append((directions @ left).abs().argmax().item())
        rows = dictionary[chosen].double()
        solution = torch.linalg.lstsq(rows.T, target.double()[:, None]).solution[:, 0]
        left = target.double() - solution @ rows
    return chosen, solution


def test_matching_pursuit_equals_one_vector_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(40, 12, generator=generator) * torch.rand(40, 1, generator=generator) * 5
    targets = torch.randn(30, 12, generator=generator)
    monkeypatch.setattr(
        "manticore_hf.compose.transplant.build._BATCH_ELEMENTS", 40 * 7
    )  # several batches, the last one short
    chosen, values = matching_pursuit(dictionary, targets, 5)
    for row, target in enumerate(targets):
        wanted, solution = naive_pursuit(dictionary, target, 5)
        assert chosen[row].tolist() == wanted
        torch.testing.assert_close(values[row], solution.float(), rtol=1e-3, atol=1e-4)


def test_matching_pursuit_finds_a_combination_and_then_stops():
    dictionary = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0] * 3
    wanted = torch.zeros(3, 16)
    wanted[0, 2], wanted[0, 7], wanted[1, 5], wanted[2, 1], wanted[2, 9] = 2.0, -1.0, 0.5, 1.0, 4.0
    chosen, values = matching_pursuit(torch.cat([dictionary, dictionary[:1]]), wanted @ dictionary, 6)
    found = torch.zeros(3, 17).scatter_add_(1, chosen, values)
    torch.testing.assert_close(found[:, :16], wanted, rtol=0, atol=1e-5)
    assert not matching_pursuit(dictionary, torch.zeros(2, 16), 3)[1].any()


def test_omp_applies_the_donors_coefficients():
    own, other = first(), second()
    model, donor = component("neox", own), component("mamba", other, tie_word_embeddings=False)
    plan = match(Surfaces(own), Surfaces(other))
    found, _ = transplant(model, own, other, "omp", donor=donor, atoms=3, progress=False)
    common = list(plan.copied)
    ends = [
        (getattr(one, find)().weight for one in (model, donor, found))
        for find in ("get_input_embeddings", "get_output_embeddings")
    ]
    for mine, theirs, new in ends:
        for token in list(plan.pieces)[:12]:
            chosen, values = naive_pursuit(theirs[common].detach(), theirs[token].detach(), 3)
            row = sum(value * mine[plan.copied[common[place]]] for place, value in zip(chosen, values.float()))
            torch.testing.assert_close(new[token], row, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_built_gets_the_mean_row_and_a_bias_goes_with_its_head():
    plan = Plan(4, copied={0: 2}, pieces={1: [0, 2], 3: []})
    weight = torch.randn(5, 3)
    coefficients = METHODS["mean"](plan, "head")
    rows, bias = new_rows(weight, plan, "head", coefficients), new_rows(weight[:, 0], plan, "head", coefficients)
    torch.testing.assert_close(rows, torch.stack([weight[2], weight[[0, 2]].mean(0), weight.mean(0), weight.mean(0)]))
    torch.testing.assert_close(bias, rows[:, 0])
    assert plan.coverage() == {"copied": 1, "by role": 0, "built": 1, "none": 1}

    own, other = first(), second()
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPTJForCausalLM(GPTJConfig(vocab_size=310, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, **ids)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    found, _ = transplant(model, own, other)
    token = other.convert_tokens_to_ids("Ġthe")
    assert found.lm_head.bias.shape == (325,)
    assert found.lm_head.bias[token] == model.lm_head.bias[own.convert_tokens_to_ids("Ġthe")]


# ---- quality ---------------------------------------------------------------------------------------------------------


def trained(model, tokenizer, text, steps):
    torch.manual_seed(0)
    ids = torch.tensor(tokenizer(text * 4)["input_ids"])
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_transplanted_model_still_knows_what_it_learned():
    own, other = first(), second()
    plain = {"vocab_size": 310, "tie_word_embeddings": False}
    model = trained(neox(**plain), own, FIRST + SECOND, 60)
    donor = trained(neox(**{**plain, "vocab_size": 325}), other, FIRST + SECOND, 60)
    texts = [FIRST[:150]]
    found, report = transplant(model, own, other, texts=texts, donor=donor, progress=False)
    assert set(report.bits_after) == {"mean", "omp"} and report.method == min(
        report.bits_after, key=report.bits_after.get
    )
    assert report.bits_before == bits_per_byte(model, own, texts, progress=False)
    assert report.bits_after[report.method] == bits_per_byte(found, other, texts, progress=False)
    noise = copy.deepcopy(found)
    for end in (noise.get_input_embeddings(), noise.get_output_embeddings()):
        torch.nn.init.normal_(end.weight, 0.0, 0.02)
    unknown = bits_per_byte(noise, other, texts, progress=False)
    assert report.bits_before < max(report.bits_after.values()) < unknown - 0.7
    assert 0.5 < report.text_coverage["copied"] < 1 and abs(sum(report.text_coverage.values()) - 1) < 1e-9
    assert report.method in str(report)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_transplanted_is_refused():
    own, other = first(), second()
    model = component("neox", own)
    with pytest.raises(ManticoreError, match="method='best' is unknown"):
        transplant(model, own, other, "best")
    with pytest.raises(ManticoreError, match="needs a donor"):
        transplant(model, own, other, "omp")
    with pytest.raises(ManticoreError, match="ids up to 324: give the tokenizer that belongs to it"):
        transplant(model, other, own)
    with pytest.raises(ManticoreError, match="The donor.*ids up to 324"):
        transplant(model, own, other, "omp", donor=model)
    with pytest.raises(ManticoreError, match="texts to measure on are empty"):
        transplant(model, own, other, texts=[""])
    model.register_buffer("of_tokens", torch.zeros(310))
    model.lm_head.register_parameter("scale", torch.nn.Parameter(torch.ones(310)))
    with pytest.raises(ManticoreError, match="only a plain model of its family"):
        transplant(model, own, other)
