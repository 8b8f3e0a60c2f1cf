"""The six MAD tasks, generated for all sequences at once.

Source: Poli et al. (arXiv 2403.17844) and the code that its numbers come from (github.com/athms/mad-lab,
`mad/data/instances.py`); here is what was read there, in our words. Tokens are numbered keys, values, noise, special.

* **In-context recall**: pairs of a key and a value, the value fixed per sequence and key. Asked: the value of every key
  that was shown before. The last pair repeats a key (uniform over those shown). No separator: "multi-query".
* **Noisy recall**: some pairs are two tokens of noise instead.
* **Fuzzy recall**: a key is one to `key_motif` different tokens, a value one to `value_motif`; keys of the test are
  always of the full length. Padded on the left.
* **Selective copying**: tokens among blanks, then the copy token, then as many blanks, at which the tokens are to be
  said in order. The gaps before the tokens are multinomial; none follows the last token, which so always stands
  directly before the copy token.
* **Compression**: random tokens and the compression token; all of them are to be read off the model's last state
  (`compression.CompressionModel`). The compression token itself counts, too, as it does there.
* **Memorization**: a key, then the insert token, at which the key's value is asked. The map from keys to values is
  the same in all sequences of train and test, and nowhere in the inputs.

**Alignment.** mad-lab's targets are what a model must say after having read up to that position. A causal LM of
Transformers drops the first label and the last position's logits, so `labels[:, 1:]` are the benchmark's targets and
`input_ids[:, :-1]` its inputs. Therefore a sequence is one token longer here than what is read; no prediction depends
on the last token. (Compression: no shift, `labels` are aligned with the tokens to reconstruct.)

**Training labels.** In the three recall tasks the benchmark trains on every next token (fuzzy recall: padding, too) and
tests on the values asked for; so do "train" and "test" here. In the other tasks both are masked alike.

What was wrong there is not repeated: selective copying drew blanks from numpy's global state; compression returned the
noise among its targets; a noisy sequence could be left without any pair (then it crashed), because the pair that is
kept could be the one after the last; in fuzzy recall the pair that is asked for at the end could be missing from the
sequence (by its rules in 2.5 % of the test at the default settings), which made its value unknowable; memorization with
noise drew values from the noise tokens.
"""

import zlib
from typing import Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset

from manticore_hf.modeling.configuration_manticore import ManticoreError

IGNORE = -100
SPLITS = ("train", "test")
# Sequences are made in parts of about so many tokens: temporaries stay in the processor's cache, and memory bounded
_PART = 1 << 18


class Task(Protocol):
    """What every task has, a MadTask or an LraTask; their modules import those that generate, so not the other way."""

    name: str
    vocab_size: int
    num_train: int
    num_test: int
    seed: int


def generate(task: Task, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Generates one split of a task; the same arrays in every process, whatever global random state there is.

    Args:
        task: A MadTask.
        split: "train" or "test"; they draw from different streams.

    Returns:
        (input_ids, labels): int64 [sequences, tokens]; labels are -100 where nothing is asked, aligned as Transformers
        expects them (module docstring).

    Raises:
        ManticoreError: There is no such split.
    """
    if split not in SPLITS:
        raise ManticoreError(f"split={split!r} is unknown; choose one of {list(SPLITS)}.")
    draw, rng = _GENERATORS[task.name], stream(task, split)
    count = task.num_train if split == "train" else task.num_test
    part = max(1, _PART // task.seq_len)
    parts = [draw(task, rng, min(part, count - done), split == "train") for done in range(0, count, part)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts))


def dataset(task: Task, split: str) -> Dataset:
    """One split of a task as a `datasets.Dataset` with `input_ids` and `labels`."""
    columns = {}
    for name, values in zip(("input_ids", "labels"), generate(task, split)):
        starts = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
        columns[name] = pa.ListArray.from_arrays(pa.array(starts), pa.array(values.reshape(-1)))
    return Dataset(pa.table(columns))


def memorized(task: Task) -> np.ndarray:
    """Memorization's fixed map: [number of keys], the value token of each key."""
    values = stream(task, "map").permutation(np.array(task.answers))
    return values[: len(task.keys)]


def stream(task: Task, use: str) -> np.random.Generator:
    """A random generator of a task's seed and name, and of what it is for; the same in every process."""
    # crc32, not hash(): that differs between processes
    words = [task.seed & 0xFFFFFFFF, task.seed >> 32, zlib.crc32(task.name.encode()), zlib.crc32(use.encode())]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def first_occurrence(codes: np.ndarray) -> np.ndarray:
    """For every entry of [rows, slots], the first slot of its row with the same code."""
    if codes.size and codes.max() < 2**15:
        codes = codes.astype(np.int16)  # which numpy sorts by radix
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, 1)
    starts = np.zeros(codes.shape, dtype=np.int64)
    starts[:, 1:] = np.where(ordered[:, 1:] != ordered[:, :-1], np.arange(1, codes.shape[1]), 0)
    firsts = np.take_along_axis(order, np.maximum.accumulate(starts, axis=1), 1)
    out = np.empty_like(firsts)
    np.put_along_axis(out, order, firsts, 1)
    return out


def _uniform(rng, tokens, shape):
    return rng.integers(tokens.start, tokens.stop, shape)


def _noise_among(task, rng, rows, slots):
    """Which of [rows, slots] are noise; one of every row, drawn at random, never is."""
    noise = rng.random((rows, slots)) < task.frac_noise
    noise[np.arange(rows), rng.integers(0, slots, rows)] = False
    return noise


def _recall(task, rng, rows, training):
    keys, pairs = len(task.keys), task.seq_len // 2
    shown = rng.integers(0, keys, (rows, pairs))
    value_of = _uniform(rng, task.answers, (rows, keys))
    noise = np.zeros((rows, pairs), dtype=bool)
    if task.frac_noise:
        noise[:, :-1] = _noise_among(task, rng, rows, pairs - 1)
    # The last key is uniform over the different keys shown before it, not over the pairs
    known = np.zeros((rows, keys), dtype=bool)
    row, slot = np.nonzero(~noise[:, :-1])
    known[row, shown[row, slot]] = True
    shown[:, -1] = np.where(known, rng.random((rows, keys)), -1.0).argmax(1)

    tokens = np.stack([shown, np.take_along_axis(value_of, shown, 1)], -1)
    asked = first_occurrence(np.where(noise, keys + np.arange(pairs), shown)) != np.arange(pairs)
    if task.frac_noise:
        tokens[noise] = _uniform(rng, task.noise, (int(noise.sum()), 2))
    labels = np.full_like(tokens, IGNORE)
    labels[..., 1] = np.where(asked, tokens[..., 1], IGNORE)
    return _finish(tokens.reshape(rows, -1), labels.reshape(rows, -1), training)


def _finish(input_ids, labels, training):
    """Recall trains on every next token; the first token is nobody's next."""
    if training:
        labels = input_ids.copy()
    labels[:, 0] = IGNORE
    return input_ids, labels


def _motifs(rng, tokens, shape, longest):
    """Ordered draws of `longest` different tokens, one array per place; the first n of them are such draws, too."""
    chosen, taken = [], []
    for j in range(longest):
        draw = rng.integers(0, len(tokens) - j, shape, dtype=np.int32)
        # The n-th token that is still free: step over the taken ones in ascending order
        for other in taken:
            draw += draw >= other
        chosen.append(draw + np.int32(tokens.start))
        for i, other in enumerate(taken):
            taken[i], draw = np.minimum(other, draw), np.maximum(other, draw)
        taken.append(draw)
    return chosen


def _fuzzy(task, rng, rows, training):
    longest_key, longest_value = task.key_motif, task.value_motif
    shortest_pair = 1 + (1 if training else longest_key)
    room = task.seq_len - shortest_pair - longest_key - longest_value
    slots = -(-room // shortest_pair)  # as many as can begin in the room
    row = np.arange(rows)

    # Slot 0 stands for the pair that is asked for at the end; it is not laid out, but its value is its key's.
    shape = (rows, slots + 1)
    keys = _motifs(rng, task.keys, shape, longest_key)
    values = _motifs(rng, task.answers, shape, longest_value)
    key_size = rng.integers(1 if training else longest_key, longest_key + 1, shape, dtype=np.int32)
    drawn_size = rng.integers(1, longest_value + 1, shape, dtype=np.int32)
    codes = sum((keys[j] + np.int64(1)) * (j < key_size) * (len(task.keys) + 1) ** j for j in range(longest_key))
    limit = task.seq_len - key_size[:, 0] - drawn_size[:, 0] - longest_key - longest_value

    def lay_out():
        first = first_occurrence(codes)
        size = np.take_along_axis(drawn_size, first, 1)
        length = key_size[:, 1:] + size[:, 1:]
        ends = np.cumsum(length, 1)
        begin = ends - length
        return first, size, begin, begin < limit[:, None], ends

    # The pair takes the first slot from a random place on, unless chance has shown its key by then.
    first, _, begin, used, _ = lay_out()
    reached = used & (begin >= rng.integers(0, limit)[:, None])
    place = np.where(reached.any(1), reached.argmax(1), used.sum(1) - 1)
    missing = ~((first[:, 1:] == 0) & (np.arange(slots) <= place[:, None])).any(1)
    at = (row[missing], place[missing] + 1)
    for array in (*keys, key_size, codes):
        array[at] = array[missing, 0]
    first, size, begin, used, ends = lay_out()

    of_last = first[:, 1:] == 0
    asked = np.where(of_last, np.cumsum(of_last, 1) > 1, first[:, 1:] != np.arange(1, slots + 1))
    # The last pair: slot 0, behind all that were used
    total = np.where(used, ends, 0).max(1)
    begin, used, asked = (
        np.concatenate([last[:, None], rest], 1)
        for last, rest in ((total, begin), (np.ones(rows, bool), used), (np.ones(rows, bool), asked))
    )
    width = task.seq_len + 1
    begin += (width - total - key_size[:, 0] - size[:, 0] + row * width)[:, None]
    input_ids = np.full((rows, width), task.vocab_size - 1)
    labels = np.full_like(input_ids, IGNORE)
    for j, token in enumerate(keys):
        there = used & (j < key_size)
        input_ids.reshape(-1)[(begin + j)[there]] = token[there]
    begin += key_size
    for j, token in enumerate(values):
        token, there = np.take_along_axis(token, first, 1), used & (j < size)
        input_ids.reshape(-1)[(begin + j)[there]] = token[there]
        there &= asked
        labels.reshape(-1)[(begin + j)[there]] = token[there]
    return _finish(input_ids, labels, training)


def _copying(task, rng, rows, training):
    count, blank, copy = task.tokens_to_copy, task.vocab_size - 2, task.vocab_size - 1
    before = task.seq_len - count - 1  # tokens and blanks before the copy token
    tokens = _uniform(rng, task.answers, (rows, count))
    gaps = rng.multinomial(before - count, np.full(count, 1 / count), rows)
    input_ids = np.full((rows, task.seq_len + 1), blank)
    np.put_along_axis(input_ids, np.cumsum(gaps, 1) + np.arange(count), tokens, 1)
    input_ids[:, before] = copy
    labels = np.full_like(input_ids, IGNORE)
    labels[:, before + 2 :] = tokens  # said after reading the blanks behind the copy token
    return input_ids, labels


def _memorization(task, rng, rows, training):
    pairs, insert = task.seq_len // 2, task.vocab_size - 1
    shown = rng.integers(0, len(task.keys), (rows, pairs))
    tokens = np.stack([shown, np.full_like(shown, insert)], -1)
    said = memorized(task)[shown]
    if task.frac_noise:
        noise = _noise_among(task, rng, rows, pairs)
        tokens[noise] = _uniform(rng, task.noise, (int(noise.sum()), 2))
        said[noise] = IGNORE
    input_ids = np.full((rows, task.seq_len + 1), insert)
    input_ids[:, :-1] = tokens.reshape(rows, -1)
    labels = np.full_like(input_ids, IGNORE)
    labels[:, 2::2] = said
    return input_ids, labels


def _compression(task, rng, rows, training):
    input_ids = np.full((rows, task.seq_len), task.vocab_size - 1)
    input_ids[:, :-1] = _uniform(rng, task.answers, (rows, task.seq_len - 1))
    labels = input_ids.copy()
    if task.frac_noise:
        noise = np.zeros(input_ids.shape, dtype=bool)
        noise[:, :-1] = rng.random((rows, task.seq_len - 1)) < task.frac_noise
        input_ids[noise] = _uniform(rng, task.noise, int(noise.sum()))
        labels[noise] = IGNORE
    return input_ids, labels


_GENERATORS = {
    "in-context-recall": _recall,
    "noisy-in-context-recall": _recall,
    "fuzzy-in-context-recall": _fuzzy,
    "selective-copying": _copying,
    "compression": _compression,
    "memorization": _memorization,
}
