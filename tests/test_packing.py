"""Rows are what one document after the other gives, however they are batched; and nothing is written anywhere."""

import random
from pathlib import Path

import datasets
import pytest
import two_tokenizers
from hub_models import tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from manticore_hf import ManticoreError
from manticore_hf.evaluation.data import (
    _BATCH,
    DataArguments,
    length_batches,
    mask_prompts,
    pack,
    read_records,
    separate,
)

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


def naive_pack(documents, tok, size, limit, rest=False):
    """Rows of (token, label, position), filled one token at a time; with `rest` also the last one, if it has text."""
    rows, start, end = [[]], tok(" ")["input_ids"], tok.eos_token_id
    start = start[: start.index(end)] if start.count(end) == 1 and start[-1] == end else start[:1]
    for document in documents:
        ids = tok(document, add_special_tokens=False)["input_ids"]
        position = None  # where in a text we are; None before its first token
        for token in ids if ids[-1:] == [end] else [*ids, end]:
            while True:
                if len(rows[-1]) == size:
                    rows.append([])
                    position = None
                if position is not None:
                    break
                for position, one in enumerate(start[: size - len(rows[-1])]):
                    rows[-1].append((one, -100, position))
                position = len(start) if len(rows[-1]) < size else None
                if position is not None:
                    break
            rows[-1].append((token, token if position else -100, position))
            position += 1
    text = {token for token, *_ in rows[-1]} - {end, *start}
    if len(rows[-1]) < size and not (rest and text):
        rows.pop()
    columns = ("input_ids", "labels", "position_ids")
    return [dict(zip(columns, (list(column) for column in zip(*row)))) for row in rows][:limit]


def begins(tok, template):
    """The tokenizer with what it puts around a text: "<s> $A", "<s> <pad> $A </s>", ..."""
    core = Tokenizer.from_str(tok.backend_tokenizer.to_str())
    if template is not None:
        special = [(token, tok.convert_tokens_to_ids(token)) for token in template.split() if token != "$A"]
        core.post_processor = TemplateProcessing(single=template, special_tokens=list(dict.fromkeys(special)))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_text_without_a_token_has_no_row(tok):
    """Not even a last one: its end would be all of it."""
    for documents in ([], [""], ["", ""]):
        with pytest.raises(ManticoreError, match="The text is empty; give some."):
            pack(documents, tok, 8, keep_text=True, keep_rest=True)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("template", [None, "<s> $A", "<s> <pad> $A </s>", "</s> $A </s>"])
def test_blocks_are_those_of_a_plain_loop(tok, template):
    """Also for one token for beginning and end, and for two tokens before a text."""
    rng, tok = random.Random(0), begins(tok, template)
    for count in COUNTS:
        documents = texts(tok, rng, count, 30)
        for limit in LIMITS:
            wanted, all_rows = (naive_pack(documents, tok, 8, limit, rest) for rest in (False, True))
            if all_rows:
                kept = pack(documents, tok, 8, limit, keep_text=True, keep_rest=True)
                assert kept.remove_columns(["texts", "kinds"]).to_list() == all_rows
                whole = "".join(text for row in kept["texts"] for text in row)
                assert "".join(documents).startswith(whole) and (limit == len(kept) or whole == "".join(documents))
            if not wanted:
                with pytest.raises(ManticoreError, match="fewer than one block of 8"):
                    pack(documents, tok, 8, limit)
                continue
            packed = pack(iter(documents), tok, 8, limit)
            assert packed.to_list() == wanted and packed.cache_files == []
            # Text of no start and no end is kept with its rows, and is all of the text
            kept = pack(documents, tok, 8, limit, keep_text=True)
            assert kept.remove_columns(["texts", "kinds"]).to_list() == wanted
            for row in kept.to_list():
                assert len(row["texts"]) == row["position_ids"].count(0)
                own = [i for i in row["input_ids"] if i not in tok.all_special_ids]
                assert [i for text in row["texts"] for i in tok(text, add_special_tokens=False)["input_ids"]] == own
            if limit is None:
                joined = "".join(text for row in kept["texts"] for text in row)
                assert "".join(documents).startswith(joined)


def test_kept_texts_are_the_characters_of_the_text():
    """Of tokenizers that trim spaces, and of characters that are cut into several tokens; nothing twice."""
    tok = two_tokenizers.first()
    documents = ["The  cat \n sat.\n", "", "caf\u00e9 \U0001f600\U0001f600 under the tree ", "the rain"] * 5
    for trimmed in (True, False):
        tok.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trimmed)
        for size in (2, 5, 16):
            rows = pack(documents, tok, size, keep_text=True)
            joined = "".join(text for row in rows["texts"] for text in row)
            assert "".join(documents).startswith(joined) and len(joined) > len("".join(documents)) - 3 * size
            for row in rows.to_list():  # what a row's tokens stand for, but for characters that are cut
                told = "".join(row["texts"])
                read = tok.decode(row["input_ids"], skip_special_tokens=True)
                if told.isascii() and "\ufffd" not in read:
                    assert read.strip() == told.strip()


def test_texts_in_a_row_come_apart(tok):
    tok, rng = begins(tok, "<s> $A"), random.Random(4)
    documents = texts(tok, rng, 30, 20)
    apart = separate(pack(documents, tok, 16))
    assert all(row["input_ids"][0] == 1 and row["labels"] == [-100, *row["input_ids"][1:]] for row in apart)
    read = [token for ids in apart["input_ids"] for token in ids[1:]]
    alone = [token for text in documents for token in [*tok(text, add_special_tokens=False)["input_ids"], 2]]
    assert alone[: len(read)] == read and len(read) > len(alone) - 16
    assert sum(map(len, separate(pack(documents, tok, 16), 50)["input_ids"])) in range(50, 67)
    # Rows that say nothing of texts are one text each
    plain = datasets.Dataset.from_dict({"input_ids": [[3, 4, 2, 5], [6]]})
    assert separate(plain).to_list() == [{"input_ids": [3, 4, 2, 5], "labels": [3, 4, 2, 5]}]
    batches = length_batches([3, 9, 1, 1, 8, 1], 2)
    assert sorted(sum(batches, [])) == list(range(6)) and batches[0] == [1, 4] and len(batches) == 2


def test_names_of_special_tokens_are_text(capsys):
    tok = two_tokenizers.second()
    text = "the <s> cat <pad></s> sat"
    for kind in ("text", "tokens"):
        rows = pack([text] * 4, tok, 8, special_tokens=kind, keep_text=True)
        ids = [i for row in rows["input_ids"] for i in row]
        assert (tok.pad_token_id in ids) == (tok.bos_token_id in ids) == (kind == "tokens")
        said = capsys.readouterr().err
        assert ("'</s>' in it, which is a special token's name" in said) == (kind == "text")
    assert tok.decode([i for i in pack([text] * 4, tok, 8)["input_ids"][0]]).startswith("the <s> c")
    capsys.readouterr()
    pack(["the cat"] * 20, tok, 8)
    assert "special" not in capsys.readouterr().err


def test_text_files_in_other_encodings(tmp_path, tok):
    text = "caf\u00e9 w5 w6\nw7 "
    for name, data in {
        "bom": b"\xef\xbb\xbf" + text.encode(), "utf-16": text.encode("utf-16"), "utf-32": text.encode("utf-32"),
        "big": b"\xfe\xff" + text.encode("utf-16-be"), "plain": text.replace("\n", "\r\n").encode(),
    }.items():  # fmt: skip
        (tmp_path / f"{name}.txt").write_bytes(data)
        assert [one["text"] for one in read_records(DataArguments(str(tmp_path / f"{name}.txt")))] == [text], name
    file = tmp_path / "latin.txt"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ManticoreError, match=r"latin.txt' is not utf-8 text \(byte 3 is 0xe9\): convert it to UTF-8"):
        read_records(DataArguments(str(file)))
    assert read_records(DataArguments(str(file), encoding="latin-1"))[0]["text"] == text
    with pytest.raises(ManticoreError, match="encoding='latin-one' is none that Python knows"):
        read_records(DataArguments(str(file), encoding="latin-one"))
    for encoding in ("undefined", "idna", "hex", "zlib", "rot13", "a\0b", "x" * 5000):  # of no text, or none at all
        with pytest.raises(ManticoreError, match="none that Python knows for texts|is not idna text"):
            read_records(DataArguments(str(file), encoding=encoding))
    for encoding, data in (("utf-7", b"+2AA-"), ("raw_unicode_escape", rb"\ud800")):
        file.write_bytes(data)
        with pytest.raises(ManticoreError, match="it holds half of a character|is not utf-7 text"):
            read_records(DataArguments(str(file), encoding=encoding))
    file.write_bytes("no mark".encode("utf-16-le"))
    with pytest.raises(ManticoreError, match="holds zero bytes, so it is not utf-8 text"):
        read_records(DataArguments(str(file)))
    assert read_records(DataArguments(str(file), encoding="utf-16-le"))[0]["text"] == "no mark"


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
            if len(prompt) < len(ids) and len(ids) > 1:  # of one token nothing is predicted
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
        assert pack(documents(), tok, 8, limit).to_list() == wanted[:limit]
    for limit in (None, len(wanted) + 1):
        with pytest.raises(OSError, match="the second file is broken"):
            pack(documents(), tok, 8, limit)


def test_a_column_that_is_not_there_is_named(tok):
    with pytest.raises(ManticoreError, match="'chats' has no column 'a'"):
        mask_prompts([{"q": "x"}], tok, DataArguments("chats", prompt_column="q", completion_column="a"))
