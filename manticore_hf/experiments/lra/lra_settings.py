"""The tasks of the Long Range Arena (Tay et al., arXiv 2011.04006): defaults, and which settings raise.

ListOps and Pathfinder are generated; texts (bytes) and images (grey pixels) come from files or data sets of the user's.
ListOps is the benchmark's own rule; Pathfinder is made anew here (see `pathfinder`), so its numbers compare with
each other only. Every row has `input_ids` and a `label` for the whole sequence.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manticore_hf.modeling.configuration_manticore import ManticoreError

if TYPE_CHECKING:
    from datasets import Dataset

# What a task can be told, with its defaults: the benchmark's, without its validation sets
TASKS = {
    "listops": {
        "num_train": 96_000, "num_test": 2_000, "min_len": 500, "max_len": 2_000, "max_depth": 10, "max_args": 10,
    },
    "pathfinder": {"num_train": 160_000, "num_test": 20_000, "image_size": 32, "path_len": 24, "distractors": 4},
    "text": {
        "num_train": 10**9, "num_test": 10**9, "max_len": 4_096, "data": "stanfordnlp/imdb", "test_data": None,
        "input_column": "text", "label_column": "label",
    },
    "image": {
        "num_train": 10**9, "num_test": 10**9, "image_size": 32, "data": "uoft-cs/cifar10", "test_data": None,
        "input_column": "img", "label_column": "label",
    },
}  # fmt: skip
VOCABULARIES = {"listops": 16, "pathfinder": 256, "text": 257, "image": 256}
LEAST = {"min_len": 1, "max_len": 1, "max_depth": 2, "max_args": 2, "image_size": 8, "path_len": 6, "distractors": 0}


@dataclass(frozen=True)
class LraTask:
    """One task at one difficulty. Make it with `lra_task`; settings that a task does not have are None."""

    name: str = dataclasses.field(metadata={"help": "One of TASKS."})
    num_train: int = dataclasses.field(metadata={"help": "Training sequences (text, image: at most)."})
    num_test: int = dataclasses.field(metadata={"help": "Test sequences (text, image: at most)."})
    seed: int = dataclasses.field(default=0, metadata={"help": "Random seed of what is generated."})
    min_len: int | None = dataclasses.field(default=None, metadata={"help": "Fewest tokens of a sequence (listops)."})
    max_len: int | None = dataclasses.field(default=None, metadata={"help": "Most tokens of a sequence."})
    max_depth: int | None = dataclasses.field(
        default=None, metadata={"help": "Levels of nesting, the numbers' included (listops)."}
    )
    max_args: int | None = dataclasses.field(default=None, metadata={"help": "Most arguments of an operator."})
    image_size: int | None = dataclasses.field(default=None, metadata={"help": "Height and width in pixels."})
    path_len: int | None = dataclasses.field(default=None, metadata={"help": "Pixels of the two long paths."})
    distractors: int | None = dataclasses.field(default=None, metadata={"help": "Short paths (pathfinder)."})
    data: str | None = dataclasses.field(default=None, metadata={"help": "Training file, or data set with splits."})
    test_data: str | None = dataclasses.field(default=None, metadata={"help": "Test file, if data is a file."})
    input_column: str | None = dataclasses.field(default=None, metadata={"help": "Column of the text or image."})
    label_column: str | None = dataclasses.field(default=None, metadata={"help": "Column of the label."})

    def __post_init__(self):
        if self.name not in TASKS:
            raise ManticoreError(f"task={self.name!r} is unknown; choose one of {list(TASKS)}.")
        for key, least in {"num_train": 1, "num_test": 1, "seed": 0, **LEAST}.items():
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ManticoreError(f"{self.name}: {key}={value!r} must be a whole number from {least} on.")
        if self.name == "listops" and self.min_len > self.max_len:
            raise ManticoreError(f"listops: min_len={self.min_len} is more than max_len={self.max_len}.")
        if self.name == "pathfinder" and self.path_len > 2 * self.image_size:
            raise ManticoreError(
                f"pathfinder: two paths of path_len={self.path_len} pixels hardly fit an image of image_size="
                f"{self.image_size}; give at most {2 * self.image_size}."
            )

    @property
    def vocab_size(self) -> int:
        """Token ids; 0 pads texts and ListOps."""
        return VOCABULARIES[self.name]

    @property
    def positions(self) -> int:
        """Longest sequence in tokens."""
        return self.max_len if self.image_size is None else self.image_size**2

    @property
    def generated(self) -> bool:
        """Whether the task needs no data."""
        return self.data is None

    def dataset(self, split: str) -> "Dataset":
        """The split "train" or "test" as a `datasets.Dataset` of `input_ids` and `label`.

        Raises:
            ManticoreError: There is no such split, or the data cannot be read.
        """
        if split not in ("train", "test"):
            raise ManticoreError(f"split={split!r} is unknown; choose 'train' or 'test'.")
        if self.name == "listops":
            from manticore_hf.experiments.lra.listops import dataset
        elif self.name == "pathfinder":
            from manticore_hf.experiments.lra.pathfinder import dataset
        else:
            from manticore_hf.experiments.lra.texts_and_images import dataset
        return dataset(self, split)


def lra_task(name: str, **settings: Any) -> LraTask:
    """A task with its defaults, but for what is given.

    Args:
        name: listops, pathfinder, text or image.
        **settings: Fields of LraTask that the task has, and `seed`.

    Raises:
        ManticoreError: An unknown task or setting, or settings that do not fit together.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(str(name), TASKS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {list(TASKS)}."
        raise ManticoreError(f"task={name!r} is unknown; {hint}")
    for key in settings:
        if key != "seed" and key not in TASKS[name]:
            known = [*TASKS[name], "seed"]
            raise ManticoreError(f"{name}: there is no setting {key!r} (={settings[key]!r}); choose from {known}.")
    return LraTask(name, **{**TASKS[name], **settings})
