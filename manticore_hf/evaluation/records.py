"""Records of text: from text, jsonl, csv and parquet files, folders of them, and data sets of the Hub."""

import codecs
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.modeling.bounds_manticore import ManticoreError, show
from manticore_hf.utils.quiet import quiet_datasets

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".py": "text", ".jsonl": "json", ".json": "json", ".csv": "csv",
    ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
_IN_BRACES = re.compile(r"\{([^{}]+)\}")
KIND_COLUMN = "kind"
"""Where records have it, and it holds text, losses are also given for each kind of text."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip


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


@quiet_datasets()
def read_records(arguments: DataArguments) -> Iterable[dict[str, Any]]:
    """The records of a source: files, a folder of them, or a data set of the Hub.

    Args:
        arguments: DataArguments.

    Returns:
        Dictionaries with the columns of the source, to be read once; a text file is one record.

    Raises:
        ManticoreError: The source cannot be read (of a stream: when it is read); names it.
    """
    path = Path(arguments.data)
    if not os.path.exists(path):  # which is no error where the name is too long for one
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
        for name in ("where", "shuffle_seed", "max_records"):
            if getattr(arguments, name) is not None:
                raise ManticoreError(f"{name} is about records, and {arguments.data!r} holds plain text: drop it.")
        return [{arguments.text_column: _read_text(file, arguments.encoding)} for file in files]
    options = {"delimiter": "\t"} if any(file.suffix == ".tsv" for file in files) else {}
    if arguments.encoding is not None and kind in ("csv", "json"):
        options["encoding"] = arguments.encoding
    try:
        records = load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
        records = _chosen(records, arguments)
    except Exception as err:
        raise _unreadable(arguments, err) from err
    return _watched(records, arguments)  # whether bytes are text shows when they are read


def _read_text(file, encoding):
    """A text file's text: in the encoding that its byte order mark tells or the user says, else in UTF-8."""
    data = file.read_bytes()
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")  # UTF-32's begins with UTF-16's
    encoding = _MARKS.get(mark) or encoding or "utf-8"
    try:
        text = data[len(mark) :].decode(encoding)
        text.encode()  # some encodings write half of a pair of surrogates, which is no character
    except UnicodeEncodeError:
        raise ManticoreError(
            f"{str(file)!r} is not {encoding} text: it holds half of a character. Convert it to UTF-8, or say what "
            "it is where there is such a setting (encoding, for example latin-1)."
        ) from None
    except UnicodeDecodeError as err:
        raise ManticoreError(
            f"{str(file)!r} is not {encoding} text (byte {len(mark) + err.start:,} is 0x{err.object[err.start]:02x}): "
            "convert it to UTF-8, or say what it is where there is such a setting (encoding, for example latin-1)."
        ) from None
    except (LookupError, ValueError):  # no encoding, or one that is not of texts
        raise ManticoreError(
            f"encoding={show(encoding)} is none that Python knows for texts; give for example 'latin-1'."
        ) from None
    if "\0" in text:
        raise ManticoreError(
            f"{str(file)!r} holds zero bytes, so it is not {encoding} text: convert it to UTF-8, or say what it is "
            "where there is such a setting (encoding, for example utf-16-le)."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _hub_records(arguments):
    revision = arguments.data_revision
    # That its card names no files of elsewhere is checked by `datasets` itself (5.2; see pyproject.toml).
    # `datasets` also takes names of its readers, which read whatever lies in the working directory (one of them
    # pickles), addresses and patterns; what names the data may be a stranger's recipe.
    plain = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", arguments.data)
    named_as_file = Path(arguments.data).suffix in _FORMATS
    if not plain or named_as_file or ".." in arguments.data or arguments.data in _PACKAGED_DATASETS_MODULES:
        raise ManticoreError(
            f"data={show(arguments.data)} is no file or folder here, and no data set of the Hub ('owner/name')."
        )
    try:
        builder = load_dataset_builder(arguments.data, arguments.data_config, revision=revision)
        # Where the Hub does not answer, `datasets` takes what it prepared last, of whatever revision.
        if revision is not None and type(builder).__name__ == "Cache" and not builder.hash.startswith(revision):
            raise ManticoreError(f"the Hub gives no such revision, and the copy in the cache is of {builder.hash}")
        if arguments.streaming:
            return _watched(_chosen(builder.as_streaming_dataset(arguments.data_split), arguments), arguments)
        builder.download_and_prepare()
        return _chosen(builder.as_dataset(arguments.data_split), arguments)
    except Exception as err:
        raise _unreadable(arguments, err) from err


def _chosen(records, arguments):
    """Those of a data set's records that are asked for, in the order asked for; nothing is written into its cache."""
    here = {"keep_in_memory": True} if isinstance(records, Dataset) else {}
    if arguments.where is not None:
        column, _, text = arguments.where.partition("=")
        if column not in (records.column_names or [column]):
            raise ManticoreError(f"there is no column {column!r}; there are {sorted(records.column_names)}")
        records = records.filter(lambda one: one[column] == text, **here)
    if arguments.shuffle_seed is not None:
        records = records.shuffle(seed=arguments.shuffle_seed, **here)
    if arguments.max_records is not None:
        records = records.take(arguments.max_records)
    return records


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
    if os.path.exists(arguments.data):
        return ManticoreError(f"{arguments.data!r} cannot be read: {reason}")
    asked = ", ".join(f"{key}={getattr(arguments, key)!r}" for key in ("data_config", "data_split", "data_revision"))
    return ManticoreError(
        f"data={arguments.data!r} is no file or folder here, and cannot be read as a Hub data set with {asked}: "
        f"{reason}"
    )


def text_of(record: Mapping[str, Any], name: str, arguments: DataArguments) -> str:
    """The text in a column of a record; of several texts there (ELI5's answers), joined by spaces.

    Args:
        record: A record of `read_records`.
        name: The column; "answers.text" for what is nested in a column; or a text with columns in braces.
        arguments: DataArguments.

    Raises:
        ManticoreError: There is no such column, or no text in it.
    """
    if name not in record and _IN_BRACES.search(name):
        return _IN_BRACES.sub(lambda found: text_of(record, found[1], arguments), name)
    outer, _, inner = name.partition(".")
    nested = isinstance(record.get(outer), Mapping) and inner in record[outer]
    if name not in record and not nested:
        raise ManticoreError(f"{arguments.data!r} has no column {name!r}; it has {sorted(record)}.")
    text = record[name] if name in record else record[outer][inner]
    if isinstance(text, list) and text and all(isinstance(one, str) for one in text):
        return " ".join(text)
    if not isinstance(text, str):
        raise ManticoreError(f"{arguments.data!r}: column {name!r} holds {type(text).__name__}, not text.")
    return " ".join(text) if arguments.space_characters else text
