"""Four texts of a composition: a private table, sums, and keys to be added, of which half are kept for the test.

Characters are tokens. A key is a word, its value a digit, and only the table says which belongs to which:

* **table**: `ab:4` and then one of `;+=`, all keys. Some values are left out (`ab:+cd:7;`), so that whoever knows the
  table knows it whatever stood before. Trained on every next character, but on none where a value is left out.
* **sums**: `3+5=08;`. A number may bear a name (`a:3+xy5=08;`), a random word that says nothing of it. Trained on the
  results.
* **train**, **trained-keys**: `ab:+cd:=08;`, pairs of the first half of the keys. Trained on the results.
* **test**: the same of the other half.

The keys of a row are all different, so that a row tells nothing of its later pairs.
"""

import zlib
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from manticore_hf.modeling.settings_manticore import ManticoreError

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz:+=;"
DIGITS, LETTERS = range(10), range(10, 36)
COLON, PLUS, EQUALS, SEMICOLON = range(36, 40)
IGNORE = -100
TEXTS = ("table", "sums", "train", "trained-keys", "test")


@dataclass(frozen=True)
class Part:
    """A component of a composition: its model type, the text that it is trained on, and the field with its rows."""

    family: str
    text: str
    rows: str


@dataclass(frozen=True)
class CompositionTask:
    """What is written, and how much of it.

    Attributes:
        num_keys: Words in the table; the first half is trained on.
        key_length: Letters of a key.
        pairs: Pairs of keys in a row of the task, at most a quarter of the keys.
        length: Characters in a row of table or sums.
        omitted: Share of the table's values that are left out.
        num_table: Rows of "table".
        num_sums: Rows of "sums".
        num_train: Rows of "train".
        num_test: Rows of "test" and of "trained-keys".
        seed: Of all texts, and of the table itself.
    """

    num_keys: int = 600
    key_length: int = 2
    pairs: int = 4
    length: int = 48
    omitted: float = 0.25
    num_table: int = 12_800
    num_sums: int = 14_400
    num_train: int = 9_600
    num_test: int = 125
    seed: int = 0

    name = "composition"
    vocab_size = len(CHARACTERS)
    letters = len(LETTERS)
    texts = TEXTS
    # First the component that bridges lead into, then the one that they begin from
    parts = {"adder": Part("llama", "sums", "num_sums"), "table": Part("mamba", "table", "num_table")}
    said = DIGITS  # what the second one knows of a key
    answer = 2  # tokens asked for at a time
    asked = {"unseen": "test", "trained": "trained-keys"}

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "omitted":
                if not 0 <= value < 1:
                    raise ManticoreError(f"omitted={value} must be a share in [0, 1).")
            elif not isinstance(value, int) or value < (0 if field.name == "seed" else 1):
                raise ManticoreError(f"{field.name}={value!r} must be a whole number, at least 1 (seed: 0).")
        if self.num_keys % 2 or self.num_keys > self.letters**self.key_length:
            raise ManticoreError(
                f"num_keys={self.num_keys} must be even, and at most {self.letters**self.key_length}: there are no "
                f"more words of {self.key_length} letter(s)."
            )
        if 4 * self.pairs > self.num_keys:
            raise ManticoreError(
                f"pairs={self.pairs}: a row's keys are all different and of one half, so that num_keys={self.num_keys} "
                f"is too few; give at least {4 * self.pairs}."
            )

    @property
    def positions(self) -> int:
        """The longest row, in characters."""
        return max(self.length, self.pairs * (2 * self.key_length + 7))

    def dataset(self, text: str) -> Dataset:
        """One of `texts` as a `datasets.Dataset` with `input_ids` and `labels`."""
        columns = {}
        for name, values in zip(("input_ids", "labels"), generate(self, text)):
            starts = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
            columns[name] = pa.ListArray.from_arrays(pa.array(starts), pa.array(values.reshape(-1)))
        return Dataset(pa.table(columns))

    def write(self, text: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One of `texts`, as `generate` returns it."""
        if text == "table":
            return _table(self, rng, self.num_table)
        if text == "sums":
            return _sums(self, rng, self.num_sums)
        return _pairs(self, rng, self.num_train if text == "train" else self.num_test, text == "test")

    def told(self, ids: torch.Tensor) -> torch.Tensor:
        """What the second component knows, where a text of the task asks for it: [rows, time]; -100 elsewhere."""
        known = {tuple(key): int(value) for key, value in zip(*(one.tolist() for one in table(self)))}
        found = torch.full_like(ids, IGNORE)
        for row, colon in (ids == COLON).nonzero().tolist():
            found[row, colon] = known[tuple(ids[row, colon - self.key_length : colon].tolist())]
        return found


def table(task: CompositionTask) -> tuple[np.ndarray, np.ndarray]:
    """The private table; in each half of it every digit is the value of as many keys, give or take one.

    Returns:
        (keys, values): token ids [num_keys, key_length] and digits [num_keys].
    """
    rng = stream(task, "keys")
    codes = rng.permutation(len(LETTERS) ** task.key_length)[: task.num_keys]
    letters = codes[:, None] // len(LETTERS) ** np.arange(task.key_length) % len(LETTERS)
    values = np.concatenate([rng.permutation(np.arange(task.num_keys // 2) % 10) for _ in range(2)])
    return letters + LETTERS.start, values


def generate(task: CompositionTask, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Writes one text; the same in every process.

    Args:
        task: What is written.
        text: One of its `texts`.

    Returns:
        (input_ids, labels): int64 [rows, characters]; labels are -100 where nothing is asked, aligned with the inputs,
        as Transformers expects them.

    Raises:
        ManticoreError: There is no such text.
    """
    if text not in task.texts:
        raise ManticoreError(f"text={text!r} is unknown; choose one of {list(task.texts)}.")
    return task.write(text, stream(task, text))


def stream(task: CompositionTask, use: str) -> np.random.Generator:
    """A random generator of a task's seed and of what it is for; the same in every process."""
    return np.random.default_rng([task.seed, zlib.crc32(use.encode())])


def _table(task, rng, rows):
    keys, values = table(task)
    count = -(-task.length // (task.key_length + 2))  # enough even where every value is left out
    chosen = rng.integers(0, task.num_keys, (rows, count))
    slots = np.concatenate(
        [
            keys[chosen],
            np.full((rows, count, 1), COLON),
            values[chosen][..., None],
            rng.choice([SEMICOLON, PLUS, EQUALS], (rows, count, 1)),
        ],
        -1,
    )
    there = np.ones(slots.shape, bool)
    there[..., -2] = rng.random((rows, count)) >= task.omitted
    asked = np.ones(slots.shape, bool)
    asked[..., -1] = there[..., -2]
    return written(slots, there, asked, task.length)


def _sums(task, rng, rows):
    count, letters = -(-task.length // 7), task.key_length
    numbers = rng.integers(0, 10, (2, rows, count))
    parts, there = [], []
    for number, after in zip(numbers, (PLUS, EQUALS)):
        parts.append(rng.integers(LETTERS.start, LETTERS.stop, (rows, count, letters)))
        parts.append(np.full((rows, count, 1), COLON))
        parts += [number[..., None], np.full((rows, count, 1), after)]
        size = rng.integers(0, letters + 1, (rows, count, 1))  # 0: a number without a name
        colon = (size > 0) & (rng.random(size.shape) < 0.5)
        there += [np.arange(letters) < size, colon, np.ones((rows, count, 2), bool)]
    total = numbers.sum(0)
    parts.append(np.stack([total // 10, total % 10, np.full_like(total, SEMICOLON)], -1))
    there.append(np.ones((rows, count, 3), bool))
    slots = np.concatenate(parts, -1)
    asked = np.zeros(slots.shape, bool)
    asked[..., -3:-1] = True
    return written(slots, np.concatenate(there, -1), asked, task.length)


def written(
    slots: np.ndarray, there: np.ndarray, asked: np.ndarray, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """[rows, items, slots] as rows of `length` tokens, without the slots that are not there, and their labels."""
    labels = np.where(asked, slots, IGNORE)
    order = np.argsort(~there.reshape(len(slots), -1), axis=1, kind="stable")[:, :length]
    return tuple(np.take_along_axis(one.reshape(len(slots), -1), order, 1) for one in (slots, labels))


def _pairs(task, rng, rows, unseen):
    keys, values = table(task)
    half = task.num_keys // 2
    chosen = rng.random((rows, half)).argpartition(2 * task.pairs, axis=1)[:, : 2 * task.pairs] + half * unseen
    chosen = rng.permuted(chosen, axis=1).reshape(rows, task.pairs, 2)
    total = values[chosen].sum(-1)

    def same(token):
        return np.full((rows, task.pairs, 1), token)

    one, other = keys[chosen[:, :, 0]], keys[chosen[:, :, 1]]
    result = np.stack([total // 10, total % 10], -1)
    ids = [one, same(COLON), same(PLUS), other, same(COLON), same(EQUALS), result, same(SEMICOLON)]
    ids = np.concatenate(ids, -1)
    labels = np.full_like(ids, IGNORE)
    labels[..., -3:-1] = result
    return ids.reshape(rows, -1), labels.reshape(rows, -1)
