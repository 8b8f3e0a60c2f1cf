"""Text to blocks of tokens that every causal LM trainer takes.

Plain text is packed into blocks; records with a prompt and a completion become one row each, the prompt masked out of
the loss. Where the records come from is in `records.py`.
Every row, and every document in it, begins with what the tokenizer begins texts with, and is closed by the end-of-text
token; documents in one row are separate texts: their `position_ids` begin at 0. (The paper's code joins the characters
of Penn Treebank and of FineWeb with spaces; `space_characters` does that, and numbers made with it compare with no
others.)
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.iterable_dataset import ExamplesIterable
from transformers import PreTrainedTokenizerBase

from manticore_hf.evaluation.data_arguments import DataArguments as DataArguments
from manticore_hf.evaluation.records import KIND_COLUMN, read_records, text_of
from manticore_hf.evaluation.records import read_texts as read_texts
from manticore_hf.evaluation.starts import start_tokens
from manticore_hf.modeling.bounds_manticore import ManticoreError
from manticore_hf.utils.distributed import bar, is_main
from manticore_hf.utils.formatting import plural
from manticore_hf.utils.tokenizers import tokenise

_BATCH = 64  # documents tokenised at once: enough for a tokenizer's threads, and few to read beyond a limit
NO_LOSS = -100


def load_rows(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, keep_text: bool = False, keep_rest: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Reads, tokenises and splits the text of a stage.

    Args:
        arguments: DataArguments.
        tokenizer: The hybrid's tokenizer.
        keep_text: Also keep what the rows stand for, so that they can be measured in bits per byte, by models of
            other tokenizers too (see `pack`, `mask_prompts`).
        keep_rest: Also keep what is left at the end of packed text, as a shorter row: for text that is only measured.

    Returns:
        (training rows, validation rows or None): Datasets with `input_ids`, `labels` and `position_ids`; instruction
        data has `attention_mask` instead of positions, and rows of different lengths.

    Raises:
        ManticoreError: The source cannot be read, has no such column, or is too short; names it.
    """
    if arguments.validation_split is not None:
        if os.path.exists(arguments.data):
            raise ManticoreError(
                f"validation_split={arguments.validation_split!r}: {arguments.data!r} is no data set of the Hub, so it "
                "has no splits; give validation_fraction."
            )
        whole = dataclasses.replace(arguments, validation_split=None, validation_fraction=0.0)
        held_out = dataclasses.replace(whole, data_split=arguments.validation_split)
        return tuple(load_rows(one, tokenizer, keep_text, keep_rest)[0] for one in (whole, held_out))
    records = read_records(arguments)
    limit = None if arguments.max_tokens is None else max(1, arguments.max_tokens // arguments.block_size)
    if arguments.one_per_row:
        texts = (text_of(one, arguments.text_column, arguments) for one in records)
        pairs = ({"prompt": "", "answer": text} for text in texts)
        rows = _rows_of_pairs(pairs, tokenizer, arguments, limit, keep_text)
    elif arguments.prompt_column is None:
        texts = ((text_of(one, arguments.text_column, arguments), one.get(KIND_COLUMN)) for one in records)
        how = {"special_tokens": arguments.special_tokens, "keep_text": keep_text, "keep_rest": keep_rest}
        rows = pack(texts, tokenizer, arguments.block_size, limit, **how)
    else:
        rows = mask_prompts(records, tokenizer, arguments, limit, keep_text)
    if not arguments.validation_fraction:
        return rows, None
    held_out = max(1, round(len(rows) * arguments.validation_fraction))
    if held_out >= len(rows):
        raise ManticoreError(
            f"{arguments.data!r} gives {plural(len(rows), 'row')} of {arguments.block_size} tokens: too short to hold "
            f"out {arguments.validation_fraction:.0%} for validation. Give more text, a smaller block_size, or "
            "validation_fraction 0."
        )
    parts = rows.train_test_split(test_size=held_out, seed=arguments.split_seed)
    return parts["train"], parts["test"]


def pack(
    documents: Iterable[str | tuple[str, str | None]],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    limit: int | None = None,
    desc: str = "Tokenising",
    special_tokens: str = "text",
    keep_text: bool = False,
    keep_rest: bool = False,
) -> Dataset:
    """Documents one after the other in blocks of equal length, each begun and closed as the model knows texts.

    Before every document, and before what a new block holds of a document that did not fit, stands what the tokenizer
    begins texts with (`start_tokens`; nothing for some); after it the end-of-text token. A start has no loss, and
    neither has the first token of a text that nothing stands before. The rows are kept in memory, and nothing is
    written into the cache of `datasets`.

    Args:
        documents: Texts, or pairs of a text and the kind of text that it is; they are read 64 at a time.
        tokenizer: A Transformers tokenizer with an `eos_token_id`.
        block_size: Tokens per block.
        limit: Largest number of blocks, or None for all.
        desc: Label of the progress bar.
        special_tokens: What a special token's name in a text is: "text", the characters it is written with, which is
            said once; or "tokens", the token.
        keep_text: Also keep the texts and their kinds.
        keep_rest: Make a shorter row of what is left at the end, where the limit leaves room for one; otherwise it is
            dropped.

    Returns:
        A Dataset of rows [block_size]: `input_ids`, `labels` (the same ids, -100 where there is no loss; the model
        shifts), `position_ids` (0 where a text begins); and with `keep_text` `texts`, a list with the text of each
        piece of the row (a character that is cut by the end of a block belongs to the piece that has its beginning),
        and `kinds`, the kind of each piece, None where it is unknown.

    Raises:
        ManticoreError: The text is too short for one block, or the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ManticoreError("The tokenizer has no eos_token: documents cannot be told apart once they are packed.")
    packer = _Packer(tokenizer, block_size, special_tokens, keep_text)
    pairs = ((one, None) if isinstance(one, str) else one for one in bar(documents, desc=desc, unit="doc", leave=False))
    texts = ({"text": text, "kind": kind if isinstance(kind, str) else None} for text, kind in pairs)
    rows = _collect(texts, packer, limit, packer.features)
    if keep_rest and (limit is None or rows is None or len(rows) < limit) and packer.has_text:
        rest = Dataset.from_dict({key: [values] for key, values in packer.row.items()}, features=packer.features)
        rows = rest if rows is None else concatenate_datasets([rows, rest])
    if rows is None and not packer.has_text:
        raise ManticoreError("The text is empty; give some.")
    if rows is None:
        raise ManticoreError(
            f"The text has {plural(len(packer.row['input_ids']), 'token')}, fewer than one block of {block_size}: give "
            "more text or smaller blocks."
        )
    return rows


def without_text(rows: Dataset | None) -> Dataset | None:
    """Rows with nothing but what collators take: the tokens."""
    return rows and rows.select_columns(
        [name for name in rows.column_names if name not in ("texts", "kinds", "prompt")]
    )


def cut_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, special_tokens: str = "text"
) -> Iterator[tuple[list[int], Callable[[int, int], str]]]:
    """(ids, function from a range of them to the text they stand for) of each text, without special tokens.

    Args:
        texts, tokenizer, special_tokens: As `pack` takes them.
    """
    read, texts = _Reader(tokenizer, special_tokens, True), iter(texts)
    while batch := list(islice(texts, _BATCH)):
        yield from zip(*read(batch))


class _Packer:
    """Fills blocks with documents, batch by batch; `row` is the block that is not full yet."""

    def __init__(self, tokenizer, size, special_tokens, keep_text):
        self.size, self.end, self.start = size, tokenizer.eos_token_id, start_tokens(tokenizer)
        self.read, self.keep_text = _Reader(tokenizer, special_tokens, keep_text), keep_text
        if len(self.start) >= size:
            raise ManticoreError(f"block_size={size} leaves no room after the {len(self.start)} start tokens.")
        self.features = Features({key: List(Value("int32")) for key in ("input_ids", "labels", "position_ids")})
        if keep_text:
            self.features |= dict.fromkeys(("texts", "kinds"), List(Value("string")))
        self.row, self.full = {key: [] for key in self.features}, []

    def __call__(self, batch):
        self.full = []
        count = len(batch["text"])
        kinds, closed = batch.get("kind", [None] * count), batch.get("closed", [True] * count)
        for ids, pieces, kind, ends in zip(*self.read(batch["text"]), kinds, closed):
            ids, done = [*ids, self.end] if ends and ids[-1:] != [self.end] else ids, 0
            while done < len(ids):
                room = self.size - len(self.row["input_ids"]) - len(self.start)
                if room <= 0:  # for a start, or a part of it, and nothing else
                    self._add(self.start[: room + len(self.start)], [], "", kind)
                    continue
                part = ids[done : done + room]
                self._add(self.start, part, pieces(done, done + len(part)), kind)
                done += len(part)
        return {key: [row[key] for row in self.full] for key in self.features}

    @property
    def has_text(self):
        """Whether there is more in the block that is not full than what begins and ends texts."""
        return not set(self.row["input_ids"]) <= {self.end, *self.start}

    def _add(self, start, ids, text, kind):
        labels = [NO_LOSS] * len(start) + ids if start else [NO_LOSS] + ids[1:]
        added = {"input_ids": start + ids, "labels": labels, "position_ids": range(len(labels))}
        added |= {"texts": [text], "kinds": [kind]}
        for key, values in self.row.items():
            values.extend(added[key])
        if len(self.row["input_ids"]) == self.size:
            self.full.append(self.row)
            self.row = {key: [] for key in self.features}


class _Reader:
    """Texts as (lists of ids, functions from a range of those tokens to the text they stand for)."""

    def __init__(self, tokenizer, special_tokens, keep_text):
        self.tokenizer, self.split, self.keep_text = tokenizer, special_tokens == "text", keep_text
        self.names = sorted({*tokenizer.all_special_tokens, *_special_names(tokenizer)} - {""})
        self.told = False

    def __call__(self, texts):
        options = {"add_special_tokens": False, "split_special_tokens": self.split}
        if fast := self.keep_text and self.tokenizer.is_fast:
            options["return_offsets_mapping"] = True
        found = tokenise(self.tokenizer, list(texts), **options)
        self._tell(texts)
        if not self.keep_text:
            return found["input_ids"], [lambda start, stop: None] * len(texts)
        if not fast:
            return found["input_ids"], [self._decoded(ids) for ids in found["input_ids"]]
        return found["input_ids"], [self._cut(*one) for one in zip(texts, found["offset_mapping"])]

    @staticmethod
    def _cut(text, offsets):
        """Every character to one piece: what offsets leave out (spaces, where they are trimmed) goes before a token."""
        ends = [0]
        for _, end in offsets:
            ends.append(max(end, ends[-1]))
        ends[-1] = len(text)
        return lambda start, stop: text[ends[min(start, len(ends) - 1)] : ends[min(stop, len(ends) - 1)]]

    def _decoded(self, ids):
        return lambda start, stop: self.tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)

    def _tell(self, texts):
        if self.told or not self.split or not self.names:
            return
        for text in texts:
            if name := next((name for name in self.names if name in text), None):
                self.told = True
                if is_main():
                    print(
                        f"The text has {name!r} in it, which is a special token's name; it is read as the characters "
                        "it is written with (special_tokens: tokens reads it as the token).",
                        file=sys.stderr,
                    )
                return


def _special_names(tokenizer):
    return (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _collect(
    records: Iterable[dict[str, Any]],
    function: Callable[[dict[str, list]], dict[str, list]],
    limit: int | None,
    features: Features,
) -> Dataset | None:
    """Maps records batch by batch, and keeps the rows that come out in memory, as Arrow's buffers.

    As a stream, which reads no further than the limit and of which one batch at a time exists as Python objects. A
    `Dataset` that is mapped, or made by `from_generator`, would be written into the user's cache.

    Args:
        records: Of the same keys; read once, `_BATCH` at a time.
        function: From lists, one for each key, to lists of rows; as many rows as it likes.
        limit: Largest number of rows, or None for all.
        features: Of the rows.

    Returns:
        The Dataset, None if there is no row.

    Raises:
        Whatever reading the records raises, if the rows before it are too few.
    """
    records, failure = iter(records), []
    first = next(records, None)
    if first is None:
        return None

    def up_to_failure():
        try:
            yield from enumerate(chain([first], records))
        except Exception as err:
            failure.append(err)

    stream = IterableDataset(ExamplesIterable(up_to_failure, {}))
    stream = stream.map(function, batched=True, batch_size=_BATCH, remove_columns=list(first))
    stream = stream if limit is None else stream.take(limit)
    parts = [Dataset.from_dict(rows, features=features) for rows in stream.iter(batch_size=_BATCH)]
    if failure and (limit is None or sum(map(len, parts)) < limit):
        raise failure[0]  # more was read than is needed, so it counts only where what comes before does not suffice
    return concatenate_datasets(parts) if parts else None


def separate(rows: Dataset, tokens: int | None = None) -> Dataset:
    """Each text of packed rows as a row of its own, as a model reads it that knows nothing of packing.

    Args:
        rows: A Dataset of `input_ids`; `labels` and `position_ids` as `pack` makes them, where it has them.
        tokens: Stop once so many are there; None for all.

    Returns:
        A Dataset of `input_ids` and `labels` (the ids, where the rows have none), in order, of different lengths;
        texts of which nothing is predicted are left out. A row without positions is one text.
    """
    out, seen = {"input_ids": [], "labels": []}, 0
    for _, ids, labels in _pieces(rows):
        if any(label != NO_LOSS for label in labels[1:]):
            out["input_ids"].append(ids)
            out["labels"].append(labels)
            seen += len(ids)
            if tokens is not None and seen >= tokens:
                break
    return Dataset.from_dict(out, Features({key: List(Value("int32")) for key in out}))


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches that waste little: the longest first, each batch at most as large as `batch_size` longest rows.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of the longest kind in a batch.

    Returns:
        Lists of row numbers; every row is in one.
    """
    out, size = [], batch_size * max(lengths, default=0)
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not out or (len(out[-1]) + 1) * lengths[out[-1][0]] > size:
            out.append([])
        out[-1].append(number)
    return out


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows as one tensor [rows, longest], filled on the right, where causal models do not look back from."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def text_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, str | None, str, list[int], list[int]]]:
    """What packed rows, or rows of prompts and answers, stand for.

    Args:
        rows: Made with `keep_text`.
        tokenizer: That they were made with.

    Yields:
        (text, its kind or None, prompt or "", the prompt's tokens, the text's tokens), without what stands before and
        after a text; only where there is text.
    """
    start, end = start_tokens(tokenizer), tokenizer.eos_token_id
    prompts = rows["prompt"] if "prompt" in rows.column_names else None
    for number, text, kind, ids, labels in _kept_texts(rows):
        first = len(start)
        if prompts is not None:
            first = next(i for i, label in enumerate(labels) if label != NO_LOSS)
        read = ids[first : -1 if ids[-1] == end else None]
        if text and read:
            yield text, kind, prompts[number] if prompts is not None else "", ids[len(start) : first], read


def rows_for(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, arguments: DataArguments
) -> Dataset:
    """The text of rows as rows of another tokenizer: the same characters, in blocks of as many of its tokens.

    Args:
        rows: Made with `keep_text`.
        tokenizer: That they were made with.
        other: The other one.
        arguments: DataArguments of the rows.
    """
    if "prompt" in rows.column_names:
        pairs = (
            {"prompt": row["prompt"], "answer": row["texts"][0]} for row in rows.select_columns(["prompt", "texts"])
        )
        return _rows_of_pairs(pairs, other, arguments)
    end = tokenizer.eos_token_id
    pieces = ({"text": text, "closed": ids[-1] == end} for _, text, _, ids, _ in _kept_texts(rows) if text)
    packer = _Packer(other, arguments.block_size, arguments.special_tokens, False)
    found = _collect(pieces, packer, None, packer.features)
    if found is None:
        raise ManticoreError(
            f"{arguments.data!r} is shorter than one row of {arguments.block_size} tokens of {other.name_or_path!r}."
        )
    return found


def _kept_texts(rows):
    """(row, text, its kind or None, ids, labels) of each text in rows made with `keep_text`."""
    texts, last, place = rows["texts"], None, 0
    kinds = rows["kinds"] if "kinds" in rows.column_names else None
    for number, ids, labels in _pieces(rows):
        last, place = number, place + 1 if number == last else 0
        yield number, texts[number][place], kinds and kinds[number][place], ids, labels


def _pieces(rows):
    """(row, ids, labels) of each text in packed rows."""
    columns = [key for key in ("input_ids", "labels", "position_ids") if key in rows.column_names]
    for number, row in enumerate(rows.select_columns(columns).with_format(None)):
        ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
        starts = [0] + [i for i, position in enumerate(row.get("position_ids", ())) if i and position == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)]):
            yield number, ids[start:stop], labels[start:stop]


def mask_prompts(
    records: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    limit: int | None = None,
    keep_text: bool = False,
) -> Dataset:
    """Instruction records as rows whose loss is on the completion only.

    Args:
        records: With the columns `prompt_column` and `completion_column`; they are read 64 at a time.
        tokenizer: A Transformers tokenizer with an `eos_token_id`, which ends every answer.
        arguments: DataArguments.
        limit: Largest number of rows, or None for all.
        keep_text: Also keep `prompt` and `texts`, a list of one text: what is left of the answer.

    Returns:
        A Dataset with `input_ids`, `attention_mask` and `labels` (-100 on the prompt), at most block_size long; records
        whose prompt alone fills the block are left out.

    Raises:
        ManticoreError: A column is missing, or no record has room for its answer.
    """
    columns = {"prompt": arguments.prompt_column, "answer": arguments.completion_column}
    pairs = ({key: text_of(record, name, arguments) for key, name in columns.items()} for record in records)
    return _rows_of_pairs(pairs, tokenizer, arguments, limit, keep_text)


def _rows_of_pairs(pairs, tokenizer, arguments, limit=None, keep_text=False):
    """As `mask_prompts`, of {"prompt": text, "answer": text}; a prompt may be empty."""
    end = tokenizer.eos_token_id
    start, read = start_tokens(tokenizer), _Reader(tokenizer, arguments.special_tokens, keep_text)
    features = Features({key: List(Value("int32")) for key in ("input_ids", "attention_mask", "labels")})
    if keep_text:
        features |= {"prompt": Value("string"), "texts": List(Value("string"))}

    def mask(batch):
        rows = {key: [] for key in features}
        prompts, (answers, pieces) = read(batch["prompt"])[0], read(batch["answer"])
        for number, (prompt, answer, piece) in enumerate(zip(prompts, answers, pieces)):
            prompt = start + prompt
            ids = (prompt + answer + [end])[: arguments.block_size]
            if len(prompt) < len(ids) and len(ids) > 1:
                row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
                row["labels"] = [NO_LOSS] * len(prompt) + ids[len(prompt) :]
                row["prompt"], row["texts"] = batch["prompt"][number], [piece(0, len(ids) - len(prompt))]
                for key in features:
                    rows[key].append(row[key])
        return rows

    rows = _collect(bar(pairs, desc="Tokenising", unit="record", leave=False), mask, limit, features)
    if rows is None:
        raise ManticoreError(
            f"{arguments.data!r} has no record whose prompt leaves room for an answer in {arguments.block_size} tokens."
        )
    return rows
