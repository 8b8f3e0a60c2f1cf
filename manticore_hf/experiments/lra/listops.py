"""ListOps: nested operations on digits, such as [MAX 4 [MIN 2 3 ] 1 ]; the label is the value.

Source: Nangia and Bowman (arXiv 1804.06028) with the rule by which the Long Range Arena draws its trees
(`lra_benchmarks/data/listops.py`): a place of a tree is an operator with probability 1/4 above the last level, else a
digit; operators (maximum, minimum, median, sum modulo 10) and digits are uniform; an operator has 2 to `max_args`
arguments; the median of an even number is the mean of the middle two, cut to a whole number. Trees whose length is out
of range are drawn again. Parentheses, by which the benchmark's files write operators with two arguments at a time, are
no tokens there, nor here. Lengths count both ends here (500 to 2000 by default; there they do not), and no sequence
comes twice, in train and test together.

Trees are drawn a level at a time, thousands at once; lengths and values come from the last level up, places in the
sequence from the first level down.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from manticore_hf.experiments.mad.tasks import Task, stream
from manticore_hf.modeling.configuration_manticore import ManticoreError

TOKENS = ("<pad>", *"0123456789", "[MAX", "[MIN", "[MED", "[SM", "]")
_DIGIT, _OPERATOR, _END = 1, 11, 15  # ids of the first digit, of the first operator, of the closing bracket
_MAX, _MIN, _MED, _SM = range(4)
_PLACES = 1 << 17  # about so many places of trees are drawn at once
_PATIENCE = 200  # rounds without a new sequence after which there are none


def generate(task: Task, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one split; the same in every process.

    Args:
        task: An LraTask of listops.
        split: "train" or "test".

    Returns:
        (ids, ends, labels): token ids of all sequences after another, int8 [tokens]; where each ends, int64
        [sequences]; values 0 to 9, int64 [sequences].

    Raises:
        ManticoreError: There are not as many different sequences of these lengths.
    """
    # Test first, and train goes on from there, leaving out what the test has.
    wanted = task.num_test + (task.num_train if split == "train" else 0)
    rng, seen, sequences, labels, idle = stream(task, "trees"), set(), [], [], 0
    with tqdm(total=wanted, desc=f"ListOps {split}", unit=" sequences", leave=False, delay=5) as bar:
        while len(sequences) < wanted:
            before = len(sequences)
            for row, label in _round(task, rng):
                if (key := row.tobytes()) not in seen:
                    seen.add(key)
                    sequences.append(row)
                    labels.append(label)
            bar.update(len(sequences) - before)
            idle = 0 if len(sequences) > before else idle + 1
            if idle == _PATIENCE:
                raise ManticoreError(
                    f"listops: only {before} of {wanted} different sequences of {task.min_len} to {task.max_len} "
                    f"tokens were found with max_depth={task.max_depth} and max_args={task.max_args}. Give a wider "
                    "range of lengths, or ask for fewer."
                )
    part = slice(None, task.num_test) if split == "test" else slice(task.num_test, wanted)
    sequences, labels = sequences[part], labels[part]
    ends = np.cumsum([len(row) for row in sequences])
    return np.concatenate(sequences), ends, np.array(labels, dtype=np.int64)


def dataset(task: Task, split: str) -> Dataset:
    """One split as a `datasets.Dataset` with `input_ids` and `label`."""
    ids, ends, labels = generate(task, split)
    starts = pa.array(np.concatenate([[0], ends]).astype(np.int64))
    rows = pa.LargeListArray.from_arrays(starts, pa.array(ids))
    return Dataset(pa.table({"input_ids": rows, "label": pa.array(labels)}))


def as_text(ids: Iterable[int]) -> str:
    """Token ids as the benchmark writes them: "[MAX 4 [MIN 2 3 ] 1 ]"."""
    return " ".join(TOKENS[i] for i in ids)


def value(ids: Iterable[int]) -> int:
    """The value of one sequence of token ids.

    Raises:
        ManticoreError: It is no expression.
    """
    stack = [[]]
    try:
        for token in ids:
            if token == _END:
                operator, *arguments = stack.pop()
                stack[-1].append(_apply(operator, arguments))
            elif token >= _OPERATOR:
                stack.append([token - _OPERATOR])
            elif token >= _DIGIT:
                stack[-1].append(int(token - _DIGIT))
            else:
                raise ValueError
        ((result,),) = stack
    except (ValueError, IndexError, TypeError) as err:
        raise ManticoreError(f"{as_text(ids)!r} is not a ListOps expression.") from err
    return result


def _apply(operator, arguments):
    if operator in (_MAX, _MIN):
        return (max if operator == _MAX else min)(arguments)
    if operator == _SM:
        return sum(arguments) % 10
    ordered, count = sorted(arguments), len(arguments)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) // 2


def _round(task, rng):
    """Draws a batch of trees; yields (token ids, value) of those whose length is in range."""
    levels, trees, given_up = _draw(task, rng)
    sizes, values = _from_the_leaves(levels)
    good = ~given_up & (sizes[0] >= task.min_len) & (sizes[0] <= task.max_len)
    room = np.where(good, sizes[0], 0)
    places = [np.cumsum(room) - room]
    out = np.zeros(int(sizes[0][good].sum()), dtype=np.int8)
    for depth, (tokens, counts) in enumerate(levels):
        kept, operator = good[trees[depth]], counts > 0
        out[places[depth][kept]] = tokens[kept]
        ends = places[depth] + sizes[depth] - 1
        out[ends[kept & operator]] = _END
        if depth + 1 < len(levels):
            # A child begins where its elder siblings end
            before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
            first = (np.cumsum(counts) - counts)[operator]
            parents = (places[depth] + 1)[operator] - before[first]
            places.append(np.repeat(parents, counts[operator]) + before)
    for start, size, label in zip(places[0][good], sizes[0][good], values[good]):
        yield out[start : start + size], int(label)


def _draw(task, rng):
    """Draws trees from the roots down.

    Returns:
        Levels of (token ids, numbers of arguments: 0 for digits); the tree that each place of a level belongs to; which
        trees were given up because they are too long already.
    """
    count = max(16, _PLACES // task.max_len)
    levels, trees, of_tree = [], [], np.arange(count)
    length, given_up = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
    for depth in range(1, task.max_depth + 1):
        chance = 0.25 if depth < task.max_depth else 0.0
        if depth == 1 and task.min_len > 1:
            chance = 1.0  # a lone digit would be drawn again
        operator = rng.random(len(of_tree)) < chance
        counts = np.where(operator, rng.integers(2, task.max_args + 1, len(of_tree)), 0)
        digits = rng.integers(_DIGIT, _OPERATOR, len(of_tree))
        tokens = np.where(operator, rng.integers(_OPERATOR, _END, len(of_tree)), digits)
        length += np.bincount(of_tree, 1 + operator, count).astype(np.int64)
        given_up |= length + np.bincount(of_tree, counts, count) > task.max_len
        counts[given_up[of_tree]] = 0
        levels.append((tokens, counts))
        trees.append(of_tree)
        of_tree = np.repeat(of_tree, counts)
        if not len(of_tree):
            break
    return levels, trees, given_up


def _from_the_leaves(levels):
    """Lengths of all places by level, and the values of the roots."""
    sizes, below = [None] * len(levels), None
    for depth in reversed(range(len(levels))):
        tokens, counts = levels[depth]
        operator, results = counts > 0, tokens.astype(np.int64) - _DIGIT
        size = np.ones(len(tokens), dtype=np.int64)
        if operator.any():
            first = (np.cumsum(counts) - counts)[operator]
            size[operator] = 2 + np.add.reduceat(sizes[depth + 1], first)
            results[operator] = _reduce(tokens[operator] - _OPERATOR, below, first, counts[operator])
        sizes[depth], below = size, results
    return sizes, below


def _reduce(kinds, values, first, counts):
    """Results of operators (`kinds`), whose arguments stand side by side in `values` from `first` on."""
    parent = np.repeat(np.arange(len(first)), counts)
    ordered = values[np.lexsort((values, parent))]
    median = (ordered[first + (counts - 1) // 2] + ordered[first + counts // 2]) // 2
    largest, least = ordered[first + counts - 1], ordered[first]
    return np.choose(kinds, [largest, least, median, np.add.reduceat(values, first) % 10])
