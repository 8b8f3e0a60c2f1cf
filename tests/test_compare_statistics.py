"""Held-out documents, their scores, and the statistics of a comparison, each beside its slow twin."""

import itertools
import json

import numpy as np
import pytest
import torch
from tiny_hybrid import WORDS, neox, word_tokenizer, write_text

from manticore_hf import ManticoreError
from manticore_hf.compare.scores import forward_flops, load_documents, score
from manticore_hf.evaluation.data import DataArguments, load_rows
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.evaluation.statistics import bootstrap, mean_loss, paired_p


def _arguments(path, **settings):
    return DataArguments(**{"data": str(path), "block_size": 8, "validation_fraction": 0.0, **settings})


def _write(path, texts, **columns):
    records = [{"text": text, **{key: values[i] for key, values in columns.items()}} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _texts(number, seed=0):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(1, 30))) for _ in range(number)]


def test_every_token_of_every_document_is_predicted_once(tmp_path):
    texts, tokenizer = _texts(25), word_tokenizer()
    documents = load_documents(_arguments(_write(tmp_path / "t.jsonl", texts)), tokenizer)
    assert documents.units == "document" and len(documents) == 25
    for place, text in enumerate(texts):
        rows = [ids for unit, ids in documents.rows if unit == place]
        assert all(len(row) <= 8 for row in rows)
        assert rows[0][0] == tokenizer.eos_token_id
        assert [one for row in rows for one in row[1:]] == tokenizer(text)["input_ids"]
        # A later row begins as a text does, too
        assert all(row[0] == tokenizer.eos_token_id for row in rows)
        assert documents.tokens[place] == len(tokenizer(text)["input_ids"])
        assert documents.bytes[place] == len(text.encode())


def test_few_documents_are_resampled_by_rows(tmp_path):
    texts = _texts(3)
    documents = load_documents(_arguments(_write(tmp_path / "t.jsonl", texts, kind=["a", "b", "b"])), word_tokenizer())
    assert documents.units == "row" and len(documents) == len(documents.rows)
    assert [unit for unit, _ in documents.rows] == list(range(len(documents)))
    assert documents.bytes.sum() == sum(len(text.encode()) for text in texts)
    assert documents.tokens.sum() == sum(len(text.split()) for text in texts)
    assert documents.kinds.count("a") == -(-len(texts[0].split()) // 7)


def test_test_tokens_are_bounded_and_bytes_are_theirs(tmp_path):
    path = _write(tmp_path / "t.jsonl", _texts(25))
    documents = load_documents(_arguments(path, max_tokens=40), word_tokenizer())
    assert documents.tokens.sum() == 40 == sum(len(text.split()) for text in documents.texts)
    assert documents.bytes.sum() == sum(len(text.encode()) for text in documents.texts)


def test_instruction_data_is_refused(tmp_path):
    arguments = _arguments(_write(tmp_path / "t.jsonl", _texts(2)), prompt_column="text")
    with pytest.raises(ManticoreError, match="prompt_column"):
        load_documents(arguments, word_tokenizer())


def test_scores_are_those_of_every_row_alone(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = neox(initializer_range=0.5).eval(), word_tokenizer()
    documents = load_documents(_arguments(_write(tmp_path / "t.jsonl", _texts(25))), tokenizer)
    found = score(model, documents, batch_size=7)
    nll, correct = np.zeros(25), np.zeros(25, dtype=int)
    for unit, ids in documents.rows:
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, token in enumerate(ids[1:]):
            nll[unit] -= logprobs[place, token].item()
            correct[unit] += int(logprobs[place].argmax() == token)
    assert found["nll"] == pytest.approx(nll.tolist(), abs=1e-4)
    assert found["correct"] == correct.tolist() and 0 < sum(found["correct"]) < documents.tokens.sum()


def test_validation_loss_is_the_models_own_on_equal_rows(tmp_path):
    torch.manual_seed(0)
    model = neox(initializer_range=0.5).train()
    rows, _ = load_rows(_arguments(write_text(tmp_path / "t.txt", 200)), word_tokenizer())
    ids = torch.tensor(rows["input_ids"])
    with torch.no_grad():
        found = compare_losses(model, rows, 5, baselines=False)["hybrid"]
        assert found == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)
    assert model.training


def test_flops_grow_with_the_layers():
    one, two = (forward_flops(neox(num_hidden_layers=n)) for n in (1, 2))
    head = 2 * 24 * 16
    layer = 2 * (24 * 72 + 24 * 24 + 2 * 24 * 48)  # qkv, output, MLP
    attention = 2 * 2 * 128 * 24  # scores and values, over all 128 positions, as torch counts them
    assert two - one == layer + attention and one == layer + attention + head


def test_the_bootstrap_is_that_of_the_loop():
    draw = np.random.default_rng(1)
    nll, tokens = draw.gamma(2.0, 10.0, size=(3, 12)), draw.integers(1, 20, size=12)
    low, high = bootstrap(nll, tokens, draws=200, seed=5)
    again = np.random.default_rng(5)
    units, seeds = again.integers(12, size=(200, 12)), again.integers(3, size=(200, 3))
    means = []
    for one, which in zip(units, seeds):
        total = sum(np.mean([nll[s, unit] for s in which]) for unit in one)
        means.append(total / sum(tokens[unit] for unit in one))
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert low < mean_loss(nll, tokens).mean() < high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw, hits = np.random.default_rng(2), 0
    for trial in range(200):
        nll = draw.normal(0.3, 1.0, size=(1, 60))
        low, high = bootstrap(nll, np.ones(60), draws=400, seed=trial)
        hits += low < 0.3 < high
    assert 0.88 < hits / 200 <= 0.99


def test_the_paired_test_is_that_of_all_flips():
    difference = np.random.default_rng(3).normal(0.4, 1.0, size=9)
    sums = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=9)]
    exact = np.mean([one >= abs(difference.sum()) - 1e-12 for one in sums])
    assert paired_p(difference, draws=40_000) == pytest.approx(exact, abs=0.01)


def test_equal_models_are_not_told_apart():
    assert paired_p(np.zeros((3, 20))) == 1.0
    assert bootstrap(np.zeros((3, 20)), np.ones(20)) == (0.0, 0.0)
