"""Pathfinder: are the two dots the ends of one dashed path? Pixels in a row are the sequence.

After Linsley et al. (arXiv 1805.08315) and the Long Range Arena's 32 x 32 version of it, made anew: every image has two
long dashed paths and some short ones. Label 1: both dots are the ends of one long path; label 0: each is an end of
another. Paths, and so all else in the image, are drawn before the label is, which therefore shows nowhere but in where
the dots are. Labels are balanced exactly.

A path turns a little with every pixel, and more where it would end otherwise. Between pixels of different paths `CLEAR`
pixels stay free, more than the one that is free between dashes: what belongs together can be seen. How far apart the
dots are says a little (about 62 % of the labels by the best threshold, at the default settings): chance is not all that
a model must beat. All images of a batch are drawn at once.
"""

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from manticore_hf.experiments.mad.tasks import Task, stream
from manticore_hf.modeling.configuration_manticore import ManticoreError

DASH, GAP, CLEAR = 3, 1, 3
PATH, DOT = 128, 255  # grey levels; the background is 0
_SHORT = 3  # a short path is so many times shorter
_PLACES = 16  # that are tried for the start of a path
# Turns tried with every pixel, at most so many radians: what bends most only where nothing else is free
_TURNS = np.array([0.4, 0.4, 0.8, 1.2, 1.6, 1.6, 2.2, 2.2])
_BATCH = 512
_PATIENCE = 50  # batches without an image after which there are none
_FAR = 1 << 10  # pixels of a path are numbered from a multiple of this


def generate(task: Task, split: str, gaps: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Draws one split; the same in every process.

    Args:
        task: An LraTask of pathfinder.
        split: "train" or "test"; they draw from different streams.
        gaps: Whether paths are dashed; the same images without gaps are easy, for checks.

    Returns:
        (images, labels): grey levels, uint8 [images, height, width]; 0 or 1, int64 [images].

    Raises:
        ManticoreError: Such paths do not fit in such an image.
    """
    rng, wanted = stream(task, split), task.num_train if split == "train" else task.num_test
    labels = rng.permutation(np.arange(wanted) % 2)
    images, done, idle = [], 0, 0
    with tqdm(total=wanted, desc=f"Pathfinder {split}", unit=" images", leave=False, delay=5) as bar:
        while done < wanted:
            numbers, ends = _draw_paths(task, rng)
            numbers, ends = numbers[: wanted - done], ends[: wanted - done]
            images.append(_render(numbers, ends, labels[done : done + len(ends)], rng, gaps))
            done += len(ends)
            bar.update(len(ends))
            idle = 0 if len(ends) else idle + 1
            if idle == _PATIENCE:
                raise ManticoreError(
                    f"pathfinder: no image of image_size={task.image_size} was found that holds two paths of path_len="
                    f"{task.path_len}. Give a larger image or shorter paths."
                )
    return np.concatenate(images), labels


def dataset(task: Task, split: str) -> Dataset:
    """One split as a `datasets.Dataset` with `input_ids` (pixels, row by row) and `label`."""
    images, labels = generate(task, split)
    starts = pa.array(np.arange(0, images.size + 1, task.positions, dtype=np.int64))
    rows = pa.LargeListArray.from_arrays(starts, pa.array(images.reshape(-1)))
    return Dataset(pa.table({"input_ids": rows, "label": pa.array(labels)}))


def _draw_paths(task, rng):
    """Draws a batch of images without dots.

    Returns:
        numbers: int32 [images, height, width], 0 where there is nothing, else _FAR * path + its pixel, paths from 1;
        ends: [images, 2, 2, 2], of the two long paths both ends (row, column).
    """
    shape = (_BATCH, task.image_size + 2, task.image_size + 2)  # with a margin
    numbers, blocked = np.zeros(shape, dtype=np.int32), np.ones(shape, dtype=bool)
    blocked[:, 2:-2, 2:-2] = False  # a dot on the last free pixel ends at the border
    ends = np.zeros((_BATCH, 2, 2, 2), dtype=np.int64)
    lengths = [task.path_len] * 2 + [max(DASH, task.path_len // _SHORT)] * task.distractors
    for path, length in enumerate(lengths):
        going, place, heading = _start(blocked, rng)
        own = _FAR * (path + 1)
        for pixel in range(length):
            if pixel:
                going, place, heading = _go_on(numbers, blocked, rng, going, place, heading, own)
            rows, cell = np.nonzero(going)[0], np.rint(place).astype(np.int64)
            numbers[rows, cell[rows, 0], cell[rows, 1]] = own + pixel
            if path < 2 and pixel in (0, length - 1):
                ends[rows, path, 0 if pixel == 0 else 1] = cell[rows]
        if path < 2:  # a short path may end early; dots lie apart
            going &= np.abs(ends[:, path, 0] - ends[:, path, 1]).max(-1) > CLEAR
            numbers, blocked, ends = numbers[going], blocked[going], ends[going]
        blocked |= _grown(numbers >= own)
    return numbers[:, 1:-1, 1:-1], ends - 1


def _grown(there):
    """What is at most CLEAR pixels away."""
    for axis in (1, 2):
        grown = there.copy()
        for shift in range(1, CLEAR + 1):
            low, high = [slice(None)] * 3, [slice(None)] * 3
            low[axis], high[axis] = slice(None, -shift), slice(shift, None)
            grown[tuple(high)] |= there[tuple(low)]
            grown[tuple(low)] |= there[tuple(high)]
        there = grown
    return there


def _start(blocked, rng):
    """A free place for each image's next path, and a heading: (found, place [images, 2], heading [images])."""
    count = len(blocked)
    rows, tried = np.arange(count), rng.integers(2, blocked.shape[1] - 2, (count, _PLACES, 2))
    free = ~blocked[rows[:, None], tried[..., 0], tried[..., 1]]
    pick = free.argmax(1)
    return free[rows, pick], tried[rows, pick].astype(np.float64), rng.uniform(-np.pi, np.pi, count)


def _go_on(numbers, blocked, rng, going, place, heading, own):
    """The next pixel of each image's path, for those that find a free one; `own` is the number of its first pixel."""
    count, size = len(numbers), numbers.shape[1]
    rows = np.arange(count)
    headings = heading[:, None] + rng.uniform(-1, 1, (count, len(_TURNS))) * _TURNS
    step = np.stack([np.sin(headings), np.cos(headings)], -1)
    tried = place[:, None] + step / np.abs(step).max(-1, keepdims=True)  # to a neighbouring pixel, never the same
    y, x = np.moveaxis(np.clip(np.rint(tried).astype(np.int64), 1, size - 2), -1, 0)  # where a path that ended stands
    now = np.clip(np.rint(place).astype(np.int64), 0, size - 1)
    last = numbers[rows, now[:, 0], now[:, 1]][:, None]
    free = ~blocked[rows[:, None], y, x]
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            near = numbers[rows[:, None], y + down, x + right]
            free &= (near < own) | (near >= last - 1)  # of its own pixels only the last two may be near
    pick = free.argmax(1)
    return going & free[rows, pick], tried[rows, pick], headings[rows, pick]


def _render(numbers, ends, labels, rng, gaps):
    """Grey levels of images, with dots where the labels say."""
    drawn = (numbers > 0) & (~np.array(gaps) | (numbers % _FAR % (DASH + GAP) < DASH))
    images = np.where(drawn, PATH, 0).astype(np.uint8)
    row, (which, first, second) = np.arange(len(ends)), rng.integers(0, 2, (3, len(ends)))
    one = np.where(labels[:, None] == 1, ends[row, which, 0], ends[row, 0, first])
    two = np.where(labels[:, None] == 1, ends[row, which, 1], ends[row, 1, second])
    for dot in (one, two):
        for y in (-1, 0, 1):
            for x in (-1, 0, 1):
                images[row, dot[:, 0] + y, dot[:, 1] + x] = DOT
    return images
