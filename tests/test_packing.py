"""Rows are what one document after the other gives, however they are batched; and nothing is written anywhere."""

import random
from pathlib import Path

import datasets
import pytest
from hub_models import tokenizer

from manticore_hf import ManticoreError
from manticore_hf.evaluation.data import _BATCH, DataArguments, mask_prompts, pack

COUNTS = (1, 2, _BATCH - 1, _BATCH, _BATCH + 1, 3 * _BATCH)
LIMITS = (None, 1, 5, 40, 10_000)


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The cache of `datasets`, where nothing may come."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    assert not Path(tmp_path / "cache").exists()


def texts(tok, rng, count, longest):
    words = [word for word in tok.get_vocab() if word.isprintable() and not word.startswith("<")]
    return [" ".join(rng.choices(words, k=rng.randint(0, longest))) for _ in range(count)]


def naive_pack(documents, tok, size, limit):
    tokens, end = [], tok.eos_token_id
    for document in documents:
        ids = tok(document)["input_ids"]
        ids = ids[1:] if ids[:1] == [end] else ids
        tokens += ids if ids[-1:] == [end] else [*ids, end]
    return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)][:limit]


@pytest.mark.parametrize("bos", [False, True], ids=["ends", "begins and ends"])
def test_blocks_are_those_of_a_plain_loop(tok, bos, monkeypatch):
    rng, end = random.Random(0), tok.eos_token_id
    if bos:  # a tokenizer with one token for beginning and end
        plain = tok.__call__
        both = lambda ids: [end, *ids, end]  # noqa: E731
        monkeypatch.setattr(
            type(tok),
            "__call__",
            lambda self, text, **options: {
                "input_ids": both(plain(text)["input_ids"])
                if isinstance(text, str)
                else [both(x) for x in plain(text)["input_ids"]]
            },
        )
    for count in COUNTS:
        documents = texts(tok, rng, count, 30)
        for limit in LIMITS:
            wanted = naive_pack(documents, tok, 8, limit)
            if not wanted:
                with pytest.raises(ManticoreError, match="fewer than one block of 8"):
                    pack(documents, tok, 8, limit)
                continue
            packed = pack(iter(documents), tok, 8, limit)
            assert packed["input_ids"] == packed["labels"] == wanted
            assert packed.column_names == ["input_ids", "labels"] and packed.cache_files == []


def test_masked_rows_are_those_of_a_plain_loop(tok):
    rng, end = random.Random(1), tok.eos_token_id
    arguments = DataArguments("chats", prompt_column="q", completion_column="a", block_size=9)
    for count in COUNTS:
        records = [{"q": q, "a": a} for q, a in zip(texts(tok, rng, count, 14), texts(tok, rng, count, 14))]
        wanted = []
        for record in records:
            prompt, answer = (tok(record[key], add_special_tokens=False)["input_ids"] for key in "qa")
            prompt = tok(record["q"])["input_ids"] if tok(record["q"])["input_ids"][-1:] != [end] else prompt
            ids = [*prompt, *answer, end][:9]
            if len(prompt) < len(ids):
                wanted.append(
                    {
                        "input_ids": ids,
                        "attention_mask": [1] * len(ids),
                        "labels": [-100] * len(prompt) + ids[len(prompt) :],
                    }
                )
        for limit in LIMITS:
            if wanted:
                assert mask_prompts(iter(records), tok, arguments, limit).to_list() == wanted[:limit]
            else:
                with pytest.raises(ManticoreError, match="has no record whose prompt leaves room"):
                    mask_prompts(records, tok, arguments, limit)


def test_no_more_is_read_than_the_limit_needs(tok):
    read = []

    def documents():
        for number, text in enumerate(texts(tok, random.Random(2), 10 * _BATCH, 30)):
            read.append(number)
            yield text

    assert len(pack(documents(), tok, 8, limit=2)) == 2
    assert len(read) <= _BATCH + 1


def test_a_failure_counts_where_it_is_reached(tok):
    words = texts(tok, random.Random(3), 20, 30)

    def documents():
        yield from words
        raise OSError("the second file is broken")

    wanted = naive_pack(words, tok, 8, None)
    for limit in (1, len(wanted)):
        assert pack(documents(), tok, 8, limit)["input_ids"] == wanted[:limit]
    for limit in (None, len(wanted) + 1):
        with pytest.raises(OSError, match="the second file is broken"):
            pack(documents(), tok, 8, limit)


def test_a_column_that_is_not_there_is_named(tok):
    with pytest.raises(ManticoreError, match="'chats' has no column 'a'"):
        mask_prompts([{"q": "x"}], tok, DataArguments("chats", prompt_column="q", completion_column="a"))
