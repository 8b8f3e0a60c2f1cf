"""Text to blocks of tokens that every causal LM trainer takes.

Sources: a text, jsonl, csv or parquet file (or a folder of them), or a data set of the Hub. Plain text is packed into
blocks; records with a prompt and a completion become one row each, the prompt masked out of the loss.
Texts are joined by the end-of-text token and by nothing else (the paper's code joins the characters of Penn Treebank
with spaces; numbers made that way compare with nothing).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_dataset_builder
from datasets.iterable_dataset import ExamplesIterable
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from transformers import PreTrainedTokenizerBase

from manticore_hf.evaluation.data_arguments import DataArguments as DataArguments
from manticore_hf.modeling.bounds_manticore import ManticoreError, show
from manticore_hf.utils.distributed import bar

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".py": "text", ".jsonl": "json", ".json": "json", ".csv": "csv",
    ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
_BATCH = 64  # documents tokenised at once: enough for a tokenizer's threads, and few to read beyond a limit


def load_rows(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset | None]:
    """Reads, tokenises and splits the text of a stage.

    Args:
        arguments: DataArguments.
        tokenizer: The hybrid's tokenizer.

    Returns:
        (training rows, validation rows or None): Datasets with `input_ids` and `labels`; instruction data also has
        `attention_mask` and rows of different lengths.

    Raises:
        ManticoreError: The source cannot be read, has no such column, or is too short; names it.
    """
    records = read_records(arguments)
    limit = None if arguments.max_tokens is None else max(1, arguments.max_tokens // arguments.block_size)
    if arguments.prompt_column is None:
        texts = (text_of(record, arguments.text_column, arguments) for record in records)
        rows = pack(texts, tokenizer, arguments.block_size, limit)
    else:
        rows = mask_prompts(records, tokenizer, arguments, limit)
    if not arguments.validation_fraction:
        return rows, None
    held_out = max(1, round(len(rows) * arguments.validation_fraction))
    if held_out >= len(rows):
        raise ManticoreError(
            f"{arguments.data!r} gives {len(rows)} row(s) of {arguments.block_size} tokens: too short to hold out "
            f"{arguments.validation_fraction:.0%} for validation. Give more text, a smaller block_size, or "
            "validation_fraction 0."
        )
    parts = rows.train_test_split(test_size=held_out, seed=arguments.split_seed)
    return parts["train"], parts["test"]


def read_texts(arguments: DataArguments, size: int) -> list[str]:
    """The first documents of a source, as they are; the last one cut.

    Args:
        arguments: DataArguments; prompts and their completions are joined by nothing.
        size: Bytes to read.

    Returns:
        List of texts.

    Raises:
        ManticoreError: The source cannot be read or has no such column; names it.
    """
    names = [arguments.text_column]
    if arguments.prompt_column is not None:
        names = [arguments.prompt_column, arguments.completion_column]
    texts = []
    for record in read_records(arguments):
        text = "".join(text_of(record, name, arguments) for name in names)
        texts.append(text.encode()[:size].decode(errors="ignore"))
        size -= len(text.encode())
        if size <= 0:
            break
    return texts


def read_records(arguments: DataArguments) -> Iterable[dict[str, Any]]:
    """The records of a source: files, a folder of them, or a data set of the Hub.

    Args:
        arguments: DataArguments.

    Returns:
        Dictionaries with the columns of the source; a text file is one record. What is streamed can be read once.

    Raises:
        ManticoreError: The source cannot be read (of a stream: when it is read); names it.
    """
    path = Path(arguments.data)
    if not path.exists():
        return _hub_records(arguments)
    files = sorted(f for f in path.rglob("*") if f.suffix in _FORMATS) if path.is_dir() else [path]
    kinds = {_FORMATS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ManticoreError(
            f"{arguments.data!r} holds no files of one known format (found {sorted({f.suffix for f in files})}); "
            f"known are {sorted(_FORMATS)}."
        )
    kind = kinds.pop()
    if kind == "text":  # whole files: a line is no document
        return [{arguments.text_column: file.read_text(encoding="utf-8")} for file in files]
    options = {"delimiter": "\t"} if any(file.suffix == ".tsv" for file in files) else {}
    try:
        return load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    except Exception as err:
        raise _unreadable(arguments, err) from err


def _hub_records(arguments):
    revision = arguments.data_revision
    # `datasets` also takes names of its readers, which read whatever lies in the working directory (one of them
    # pickles), addresses and patterns; what names the data may be a stranger's recipe.
    plain = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", arguments.data)
    if not plain or ".." in arguments.data or arguments.data in _PACKAGED_DATASETS_MODULES:
        raise ManticoreError(
            f"data={show(arguments.data)} is no file or folder here, and no data set of the Hub ('owner/name')."
        )
    try:
        builder = load_dataset_builder(arguments.data, arguments.data_config, revision=revision)
        # Where the Hub does not answer, `datasets` takes what it prepared last, of whatever revision.
        if revision is not None and type(builder).__name__ == "Cache" and not builder.hash.startswith(revision):
            raise ManticoreError(f"the Hub gives no such revision, and the copy in the cache is of {builder.hash}")
        if arguments.streaming:
            return _watched(builder.as_streaming_dataset(arguments.data_split), arguments)
        builder.download_and_prepare()
        return builder.as_dataset(arguments.data_split)
    except Exception as err:
        raise _unreadable(arguments, err) from err


def _watched(records, arguments):
    """The records of a stream, one by one: much of what can go wrong there goes wrong only when they are read."""
    try:
        yield from records
    except Exception as err:
        raise _unreadable(arguments, err) from err


def _unreadable(arguments, err):
    cause = err.__cause__ if type(err).__name__ == "DatasetGenerationError" and err.__cause__ else err
    # In one line, and without the client's advice on calls that the user did not write.
    reason = " ".join(str(cause).partition("Example of usage")[0].split())
    if Path(arguments.data).exists():
        return ManticoreError(f"{arguments.data!r} cannot be read: {reason}")
    asked = ", ".join(f"{key}={getattr(arguments, key)!r}" for key in ("data_config", "data_split", "data_revision"))
    return ManticoreError(
        f"data={arguments.data!r} is no file or folder here, and cannot be read as a Hub data set with {asked}: "
        f"{reason}"
    )


def text_of(record: Mapping[str, Any], name: str, arguments: DataArguments) -> str:
    """The text in a column of a record.

    Args:
        record: A record of `read_records`.
        name: The column.
        arguments: DataArguments, for the message.

    Raises:
        ManticoreError: There is no such column, or no text in it.
    """
    if name not in record:
        raise ManticoreError(f"{arguments.data!r} has no column {name!r}; it has {sorted(record)}.")
    if not isinstance(record[name], str):
        raise ManticoreError(f"{arguments.data!r}: column {name!r} holds {type(record[name]).__name__}, not text.")
    return record[name]


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    limit: int | None = None,
    desc: str = "Tokenising",
) -> Dataset:
    """Documents end to end, each closed by the end-of-text token, cut into blocks of equal length.

    A tokenizer that begins every text with a token of its own (Llama's, Gemma's) does so here, too. The rows are kept
    in memory, and nothing is written into the cache of `datasets`.

    Args:
        documents: Texts; they are read 64 at a time.
        tokenizer: A Transformers tokenizer with an `eos_token_id`.
        block_size: Tokens per block; what is left at the end is dropped.
        limit: Largest number of blocks, or None for all.
        desc: Label of the progress bar.

    Returns:
        A Dataset with `input_ids` and `labels` (equal; the model shifts), [block_size] each.

    Raises:
        ManticoreError: The text is too short for one block, or the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ManticoreError("The tokenizer has no eos_token: documents cannot be told apart once they are packed.")
    left, end = [], tokenizer.eos_token_id  # what no block is full of yet

    def blocks(batch):
        for ids in tokenizer(batch["text"], verbose=False)["input_ids"]:
            if ids[:1] == [end]:  # one token for beginning and end: once between two documents
                ids = ids[1:]
            left.extend(ids if ids[-1:] == [end] else [*ids, end])
        whole = len(left) // block_size * block_size
        out = [left[start : start + block_size] for start in range(0, whole, block_size)]
        del left[:whole]
        return {"input_ids": out, "labels": out}

    texts = ({"text": document} for document in bar(documents, desc=desc, unit="doc", leave=False))
    rows = _collect(texts, blocks, limit)
    if rows is None:
        raise ManticoreError(
            f"The text has {len(left)} tokens, fewer than one block of {block_size}: give more text or smaller blocks."
        )
    return rows


def _collect(
    records: Iterable[dict[str, Any]], function: Callable[[dict[str, list]], dict[str, list]], limit: int | None
) -> Dataset | None:
    """Maps records batch by batch, and keeps the rows that come out in memory, as Arrow's buffers.

    As a stream, which reads no further than the limit and of which one batch at a time exists as Python objects. A
    `Dataset` that is mapped, or made by `from_generator`, would be written into the user's cache.

    Args:
        records: Of the same keys; read once, `_BATCH` at a time.
        function: From lists, one for each key, to lists of rows; as many rows as it likes.
        limit: Largest number of rows, or None for all.

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
    parts = [Dataset.from_dict(rows) for rows in stream.iter(batch_size=_BATCH)]
    if failure and (limit is None or sum(map(len, parts)) < limit):
        raise failure[0]  # more was read than is needed, so it counts only where what comes before does not suffice
    return concatenate_datasets(parts) if parts else None


def repack(rows: Dataset, tokens: int) -> Dataset:
    """Rows of different lengths as blocks of one length.

    Args:
        rows: A Dataset with `input_ids`.
        tokens: About how many tokens are kept.

    Returns:
        A Dataset with `input_ids`, each as long as the longest row was; what is left at the end is dropped.
    """
    block_size, joined = max(map(len, rows["input_ids"])), []
    for ids in rows["input_ids"]:
        joined += ids
        if len(joined) >= tokens + block_size:
            break
    starts = range(0, len(joined) - block_size + 1, block_size)
    return Dataset.from_dict({"input_ids": [joined[start : start + block_size] for start in starts]})


def mask_prompts(
    records: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    limit: int | None = None,
) -> Dataset:
    """Instruction records as rows whose loss is on the completion only.

    Args:
        records: With the columns `prompt_column` and `completion_column`; they are read 64 at a time.
        tokenizer: A Transformers tokenizer with an `eos_token_id`, which ends every answer.
        arguments: DataArguments.
        limit: Largest number of rows, or None for all.

    Returns:
        A Dataset with `input_ids`, `attention_mask` and `labels` (-100 on the prompt), at most block_size long; records
        whose prompt alone fills the block are left out.

    Raises:
        ManticoreError: A column is missing, or no record has room for its answer.
    """
    end, columns = tokenizer.eos_token_id, {"prompt": arguments.prompt_column, "answer": arguments.completion_column}

    def mask(batch):
        rows = {"input_ids": [], "attention_mask": [], "labels": []}
        prompts = tokenizer(batch["prompt"], verbose=False)["input_ids"]
        answers = tokenizer(batch["answer"], add_special_tokens=False, verbose=False)["input_ids"]
        for prompt, answer in zip(prompts, answers):
            prompt = prompt[:-1] if prompt[-1:] == [end] else prompt
            ids = (prompt + answer + [end])[: arguments.block_size]
            if len(prompt) < len(ids):
                rows["input_ids"].append(ids)
                rows["attention_mask"].append([1] * len(ids))
                rows["labels"].append([-100] * len(prompt) + ids[len(prompt) :])
        return rows

    texts = (
        {key: text_of(record, name, arguments) for key, name in columns.items()}
        for record in bar(records, desc="Tokenising", unit="record", leave=False)
    )
    rows = _collect(texts, mask, limit)
    if rows is None:
        raise ManticoreError(
            f"{arguments.data!r} has no record whose prompt leaves room for an answer in {arguments.block_size} tokens."
        )
    return rows
