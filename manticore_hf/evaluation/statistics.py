"""How certain a difference is: intervals by the bootstrap, and a paired test by flipping signs.

Both work on units (documents) and seeds. Losses are sums over a unit's tokens, so that means are per token.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 4000
LEVEL = 0.95


def mean_loss(nll: ArrayLike, tokens: ArrayLike) -> np.ndarray:
    """Loss per token: sums over units [..., units] divided by the tokens [units] of all."""
    return np.asarray(nll, dtype=float).sum(-1) / np.sum(tokens)


def bootstrap(nll: ArrayLike, tokens: ArrayLike, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Interval of the loss per token, over units and over seeds (Efron's percentile interval, both resampled).

    Args:
        nll: [seeds, units] sums of losses; differences of two models' for a paired interval.
        tokens: [units].
        draws: Resamples.
        seed: Of the resampling. The same for all models, so every model meets the same resamples of units.

    Returns:
        (low, high), the middle 95 %.
    """
    nll, tokens = np.atleast_2d(np.asarray(nll, dtype=float)), np.asarray(tokens, dtype=float)
    counts, shares = _resamples(*nll.shape, draws, seed)
    means = np.einsum("ds,su,du->d", shares, nll, counts, optimize=True) / (counts @ tokens)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_p(difference: ArrayLike, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of "the two models are exchangeable on every unit" (Fisher's randomisation test).

    Args:
        difference: [seeds, units] or [units] differences of losses; seeds are averaged first, so units are the sample.
        draws: Random sign flips.
        seed: Of the flips.
    """
    difference = np.atleast_2d(np.asarray(difference, dtype=float)).mean(0)
    flipped = np.abs(_signs(len(difference), draws, seed) @ difference)
    # The observed flip is one of them; what floating point makes of equal sums counts as equal.
    return float((1 + (flipped >= np.abs(difference.sum()) * (1 - 1e-12)).sum()) / (1 + draws))


@lru_cache(maxsize=2)
def _resamples(seeds, units, draws, seed):
    """How often each unit [draws, units] and what share of the time each seed [draws, seeds] was drawn."""
    draw = np.random.default_rng(seed)
    drawn_units = draw.integers(units, size=(draws, units))
    drawn_seeds = draw.integers(seeds, size=(draws, seeds))
    counts = np.stack([np.bincount(row, minlength=units) for row in drawn_units])
    return counts, np.stack([np.bincount(row, minlength=seeds) for row in drawn_seeds]) / seeds


@lru_cache(maxsize=2)
def _signs(units, draws, seed):
    """[draws, units] of 1 and -1."""
    return np.random.default_rng(seed).integers(0, 2, size=(draws, units), dtype=np.int8) * 2 - 1
