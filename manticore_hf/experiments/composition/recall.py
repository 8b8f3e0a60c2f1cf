"""A composition of two MAD skills: fuzzy recall in one component, selective copying in the other.

Letters make keys, of one or two; what a key's value is, a row says itself. Written with spaces, `_` for a blank:

* **recall**: `a 3 c b 7 _ a 3 | c b`, pairs of which most come again, some without their value. Trained on the values
  of keys that came before.
* **copying**: `a 3 c b 7 | _ d 5 _ _ 2 > _ _`, pairs, then values among blanks. A value may bear a name, one letter or
  two, which says nothing of it. Trained on the values behind the bar, in their order, at the blanks after `>`.
* **train**, **trained-keys**: `a 3 c b 7 | _ c b _ _ a > _ _`: behind the bar are keys of the first half without their
  values. Trained on these, in the order of the keys.
* **test**: the same with keys of the other half.

No key begins as another of its row does, so that letters tell which keys they are. As in MAD (`mad.tasks`), what is
answered is read from blanks: no answer shows in the input.
"""

from dataclasses import dataclass

import numpy as np
import torch

from manticore_hf.experiments.composition.texts import IGNORE, CompositionTask, Part, stream, written
from manticore_hf.experiments.mad.tasks import first_occurrence
from manticore_hf.modeling.settings_manticore import ManticoreError

LETTERS, VALUES = range(12), range(12, 24)
BLANK, BAR, COPY = range(24, 27)
SYMBOLS = "abcdefghijkl0123456789AB_|>"
_NO_SECOND = len(LETTERS)


@dataclass(frozen=True)
class RecallTask(CompositionTask):
    """As CompositionTask: its table is recalled, its sums copied.

    Attributes:
        num_keys: Keys that there are, at most twelve for each first letter; half of them are trained on.
        pairs: Keys that a row of the task asks for, and values in a row of "copying".
        shown: Pairs that a row shows, at least as many and at most one for each letter.
        length: Tokens in a row of "recall".
        omitted: Share of the values of "recall" that are left out where a key comes again.
        num_table: Rows of "recall".
        num_sums: Rows of "copying".
    """

    num_keys: int = 144
    num_table: int = 64_000
    num_sums: int = 48_000
    shown: int = 4

    name = "recall"
    vocab_size = len(SYMBOLS)
    letters = len(LETTERS)
    texts = "recall", "copying", "train", "trained-keys", "test"
    parts = {"copying": Part("llama", "copying", "num_sums"), "recall": Part("mamba", "recall", "num_table")}
    said = VALUES
    answer = 1

    def __post_init__(self):
        super().__post_init__()
        if self.key_length != 2 or self.num_keys % (2 * self.letters):
            raise ManticoreError(
                f"num_keys={self.num_keys}, key_length={self.key_length}: keys have one letter or two (key_length=2), "
                f"and each of {self.letters} first letters as many in both halves: give a multiple of "
                f"{2 * self.letters}."
            )
        if not self.pairs <= self.shown <= self.letters:
            raise ManticoreError(
                f"shown={self.shown} must be at least pairs={self.pairs}, which are asked for, and at most "
                f"{self.letters}: no two keys of a row begin with one letter."
            )

    @property
    def positions(self) -> int:
        """The longest row, in tokens."""
        return max(self.length, self._size)

    @property
    def _size(self):
        return 3 * self.shown + 6 * self.pairs + 2  # of a row that copies: twice as many blanks as values, on average

    def write(self, text: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One of `texts`, as `generate` returns it."""
        if text == "recall":
            return self._recalled(rng, keys(self), self.num_table)
        if text == "copying":
            return self._copied(rng, keys(self), self.num_sums, True)
        trained, unseen = np.split(keys(self), 2, 1)
        rows = self.num_train if text == "train" else self.num_test
        return self._copied(rng, unseen if text == "test" else trained, rows, False)

    def told(self, ids: torch.Tensor) -> torch.Tensor:
        """What the second component knows, where a text of the task asks for it: [rows, time]; -100 elsewhere."""
        found = torch.full_like(ids, IGNORE)
        for row, tokens in enumerate(ids.tolist()):
            bar, known, read = tokens.index(BAR), {}, ()
            for place, token in enumerate(tokens[: tokens.index(COPY)]):
                read = (*read, token) if token in LETTERS else read if place < bar else ()
                if place < bar and token in VALUES:
                    known[read], read = token, ()
                elif place > bar and read in known:
                    found[row, place], read = known[read], ()
        return found

    def _dictionary(self, rng, choice, rows):
        """(first letters, second ones or none, values), each [rows, shown], of pairs that a row shows."""
        first = rng.random((rows, self.letters)).argsort(1)[:, : self.shown]
        second = choice[first, rng.integers(0, choice.shape[1], first.shape)]
        return first, second, VALUES.start + rng.random((rows, len(VALUES))).argsort(1)[:, : self.shown]

    def _recalled(self, rng, choice, rows):
        count = self.length // 2 + 1  # enough even where all keys have one letter
        which = rng.integers(0, self.shown, (rows, count))
        first, second, value = (np.take_along_axis(one, which, 1) for one in self._dictionary(rng, choice, rows))
        again = first_occurrence(which) != np.arange(count)
        signs = np.where(rng.random((2, rows, count)) < 0.1, BAR, BLANK)
        slots = np.stack([first, second, value, *signs], -1)
        there, asked = np.ones(slots.shape, bool), np.zeros(slots.shape, bool)
        there[..., 1] = second != _NO_SECOND
        there[..., 2] = ~again | (rng.random(again.shape) >= self.omitted)
        there[..., 3:] = rng.random((rows, count, 2)) < 0.5
        asked[..., 2] = again
        return written(slots, there, asked, self.length)

    def _copied(self, rng, choice, rows, valued):
        """Pairs, and behind the bar values (or only keys) among blanks, to be said (or looked up) in order."""
        first, second, value = self._dictionary(rng, choice, rows)
        shown = np.stack([first, second, value], -1)
        shown_there = np.stack([first >= 0, second != _NO_SECOND, first >= 0], -1)
        order = rng.random((rows, self.shown)).argsort(1)[:, : self.pairs]
        if valued:
            answer = VALUES.start + rng.random((rows, len(VALUES))).argsort(1)[:, : self.pairs]
            named = np.stack([rng.integers(0, self.letters, answer.shape) for _ in range(2)], -1)
            named_there = np.arange(2) < rng.integers(0, 3, answer.shape)[..., None]
        else:
            answer = np.take_along_axis(value, order, 1)
            named, named_there = (np.take_along_axis(one[..., :2], order[..., None], 1) for one in (shown, shown_there))
        used = shown_there.sum((1, 2)) + named_there.sum((1, 2)) + valued * self.pairs + 2 + self.pairs
        gaps = rng.multinomial(self._size - used, np.full(self.pairs, 1 / self.pairs))
        blanks = np.arange(gaps.max()) < gaps[..., None]
        items = np.concatenate([np.full(blanks.shape, BLANK), named, answer[..., None]], -1)
        items_there = np.concatenate([blanks, named_there, np.full((*answer.shape, 1), valued)], -1)

        def row(shown, bar, items, copy, said):
            one = np.ones((rows, 1), np.int64)
            return np.concatenate([shown.reshape(rows, -1), bar * one, items.reshape(rows, -1), copy * one, said], 1)

        slots = row(shown, BAR, items, COPY, answer)
        there = row(shown_there, 1, items_there, 1, np.ones_like(answer)).astype(bool)
        asked = np.zeros(slots.shape, bool)
        asked[:, -self.pairs :] = True
        ids, labels = written(slots[:, None], there[:, None], asked[:, None], self._size)
        return np.where(labels == IGNORE, ids, BLANK), labels


def keys(task: RecallTask) -> np.ndarray:
    """Second letters (or none: 12) of the keys of each first letter [letters, keys]; the first half is trained on."""
    rng, each = stream(task, "keys"), task.num_keys // task.letters
    return np.stack([rng.permutation(len(LETTERS) + 1)[:each] for _ in LETTERS])
