"""The user's texts and images, or the Hub's, as sequences: bytes and grey pixels.

As the Long Range Arena reads IMDb (bytes, cut to a length) and CIFAR-10 (grey pixels, row by row). The data are
whatever `datasets` reads that has a column of texts or images, and one of labels (numbers or names).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, DatasetDict, Features, Sequence, Value, load_dataset

from manticore_hf.experiments.mad.tasks import Task
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.quiet import quiet_datasets

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def dataset(task: Task, split: str) -> Dataset:
    """One split of a task as a `datasets.Dataset` with `input_ids` and `label`.

    Args:
        task: An LraTask of text or image.
        split: "train" or "test".

    Raises:
        ManticoreError: The data cannot be read, or are not what the task needs; names them.
    """
    both = {name: _read(task, name) for name in ("train", "test")}
    for name, rows in both.items():
        for column in (task.input_column, task.label_column):
            if column not in rows.column_names:
                raise ManticoreError(
                    f"{task.data!r} ({name}) has no column {column!r} (it has {rows.column_names}): give input_column "
                    "and label_column."
                )
    # By their order, over both splits: a name has one number
    names = sorted({*both["train"][task.label_column][:], *both["test"][task.label_column][:]})
    if len(names) < 2:
        raise ManticoreError(f"{task.data!r} has only the label {names} in {task.label_column!r}: give data with more.")
    rows, most = both[split], task.num_train if split == "train" else task.num_test
    if len(rows) > most:
        rows = rows.shuffle(seed=task.seed).select(range(most))
    return encode(rows, task, {name: i for i, name in enumerate(names)})


def encode(rows: Dataset, task: Task, numbers: Mapping[str | int, int]) -> Dataset:
    """Rows with a text or image and a label as rows of `input_ids` and `label`.

    Args:
        rows: A Dataset.
        task: An LraTask of text or image.
        numbers: {label: its number from 0}.

    Raises:
        ManticoreError: An image has another size than the task's.
    """
    read = text_tokens if task.name == "text" else image_tokens
    size = task.max_len if task.name == "text" else task.image_size
    return rows.map(
        lambda row: {"input_ids": read(row[task.input_column], size), "label": numbers[row[task.label_column]]},
        remove_columns=rows.column_names,
        features=Features({"input_ids": Sequence(Value("int16")), "label": Value("int64")}),
        desc=f"Reading {task.name}",
        load_from_cache_file=False,
        keep_in_memory=True,
    )


def text_tokens(text: str | None, longest: int) -> list[int]:
    """The bytes of a text (UTF-8) plus 1, as 0 pads; cut to `longest`. An empty text is a line feed."""
    return [byte + 1 for byte in (text or "\n").encode("utf-8")[:longest]]


def image_tokens(image: "Image", size: int) -> list[int]:
    """The grey levels 0 to 255 of a PIL image, row by row."""
    if image.size != (size, size):
        width, height = image.size
        raise ManticoreError(
            f"An image has {width} x {height} pixels; image_size={size} was given. Images must be squares of one size."
        )
    return np.asarray(image.convert("L")).reshape(-1).tolist()


@quiet_datasets()
def _read(task, split):
    source = task.data if split == "train" or not Path(task.data).is_file() else task.test_data
    if source is None:
        raise ManticoreError(f"{task.data!r} is one file: give test_data, the file that is tested on.")
    kind = _FORMATS.get(Path(source).suffix) if Path(source).is_file() else None
    if Path(source).is_file() and kind is None:
        raise ManticoreError(f"{source!r} is of no known format; known are {sorted(_FORMATS)}.")
    try:
        if kind is not None:
            return load_dataset(kind, data_files=source, split="train")
        if Path(source, "dataset_dict.json").is_file():
            return DatasetDict.load_from_disk(source)[split]
        return load_dataset(source, split=split)
    except Exception as err:  # of `datasets`, of the Hub's client and of the formats
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise ManticoreError(
            f"The {split} data of {source!r} cannot be read ({reason[:300]}). Give a file, a folder or a repository of "
            "the Hub with the splits train and test."
        ) from err
