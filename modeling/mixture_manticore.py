"""Mixtures of the components' predictions. These run over the whole vocabulary, so they are made to spare memory.

With a vocabulary of 50,000 every temporary of the logits' size costs a third of what a head does, on the CPU mostly for
the memory itself: sums are accumulated in place, products that are summed at once are never stored, and statistics are
taken in pieces that stay in the processor's cache.
"""

import contextlib
import sys
import types
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

PIECES, PIECE = 32, 1 << 18  # at most so many pieces, of at least so many numbers


# What all copies of this file in the process share
_shared = sys.modules.setdefault("_manticore_mixtures", types.ModuleType("_manticore_mixtures"))


def register_mixtures(weighted_sum: Callable, log_mean: Callable) -> None:
    """Registers ways that spare time and memory in training, of terms [..., n] of one dtype; results are the same.

    They take (w_1, ..., x_1, ...): weights, scalar or [..., 1], and terms for a sum; [rows, 1] and [rows, vocabulary],
    and then what normalises each of those logits [rows, 1], for log sum_k w_k softmax(x_k).
    """
    _shared.weighted_sum, _shared.log_mean = weighted_sum, log_mean


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, or in float64 if it is in that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def sum_to_one(weights: torch.Tensor) -> torch.Tensor:
    """Mixture weights over the last dimension; rounded ones, as FSDP2's mixed precision makes them, add up again."""
    if weights.dtype.itemsize >= 4:
        return weights
    weights = widen(weights)
    return weights / weights.sum(-1, keepdim=True)


def is_active(weight: float | torch.Tensor) -> bool:
    """Whether a mixture weight lets its component run: a number that is zero does not."""
    return not (isinstance(weight, float) and weight == 0.0)


def weighted_sum(weights: list[float | torch.Tensor], terms: list[torch.Tensor]) -> torch.Tensor:
    """sum_k w_k x_k; a single term of weight 1 is returned as it is, to the last bit.

    Args:
        weights: K numbers, K scalar tensors, or K tensors [batch, time, 1].
        terms: K tensors [batch, time, n].

    Returns:
        [batch, time, n]. Of logits in this sum, the logits of the geometric mean of their distributions, prod_k p_k^w_k
        up to a factor: what normalises logits is a constant per token, which changes neither the distribution nor any
        gradient, so they may come as they are.
    """
    if len(terms) == 1 and isinstance(weights[0], float) and weights[0] == 1.0:
        return terms[0]
    floats = [isinstance(weight, float) for weight in weights]
    weights = [w if isinstance(w, float) else w.to(x.dtype) for w, x in zip(weights, terms)]
    if any(floats):
        return sum(weight * term for weight, term in zip(weights, terms))
    same = len({term.dtype for term in terms}) == 1
    if same and hasattr(_shared, "weighted_sum") and not torch.compiler.is_compiling():  # which joins them by itself
        return _shared.weighted_sum(*weights, *terms)
    # Autograd must not multiply a gradient of 0 by what a head rules out
    return sum(weight * term.clamp(min=torch.finfo(term.dtype).min) for weight, term in zip(weights, terms))


def rows_of_a_piece(rows: int, size: int) -> int:
    """How many rows of `size` numbers are worked on at once: temporaries are then no more than 1/PIECES of a tensor."""
    return max(-(-rows // PIECES), PIECE // size, 1)


def mix_logprob(weights: list, logits: list[torch.Tensor], norms: list[torch.Tensor] | None = None) -> torch.Tensor:
    """sum_k w_k log p_k up to a constant per token: the geometric mean. See `weighted_sum`; norms are not needed."""
    return weighted_sum([_above_zero(weight) for weight in weights], logits)


def _above_zero(weight):
    """A mixture weight that has not been rounded to nothing, by which no infinity may be multiplied."""
    return weight if isinstance(weight, float) else widen(weight).clamp(min=torch.finfo(torch.float32).tiny)


def mix_prob(weights: list, logits: list[torch.Tensor], norms: list[torch.Tensor] | None = None) -> torch.Tensor:
    """log sum_k w_k p_k: the arithmetic mean, which can silence a component that is badly wrong.

    Args:
        weights, logits: As in `weighted_sum`.
        norms: What normalises each of the logits [batch, time, 1], where it is known (`confidence`).
    """
    weights = [torch.as_tensor(_above_zero(w), device=x.device) for w, x in zip(weights, logits)]
    weights = [w.expand(*x.shape[:-1], 1) for w, x in zip(weights, logits)]
    same, compiling = len({x.dtype for x in logits}) == 1, torch.compiler.is_compiling()
    if same and hasattr(_shared, "log_mean") and not compiling:
        norms = norms or [one.detach().logsumexp(-1, keepdim=True) for one in logits]
        flat = [x.flatten(0, -2).to(logits[0].dtype) for x in (*weights, *logits, *norms)]
        return _shared.log_mean(*flat).view(logits[0].shape)
    if compiling or not torch.is_grad_enabled():
        return _log_mean(*weights, *logits)
    flat = [x.flatten(0, -2) for x in (*weights, *logits)]
    pieces = zip(*(x.split(rows_of_a_piece(*flat[-1].shape)) for x in flat))
    # In pieces that are computed again in the backward pass: what they keep is as large as all logits, several times
    out = [checkpoint(_log_mean, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.cat(out).view(logits[0].shape)


def _log_mean(*tensors):
    """log sum_k w_k softmax(x_k) of (w_1, ..., x_1, ...): w_k [..., 1], x_k [..., vocabulary]."""
    weights, logits = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    terms = [one.log_softmax(-1) + weight.log() for weight, one in zip(weights, logits)]
    return torch.stack([one.clamp(min=torch.finfo(one.dtype).min) for one in terms]).logsumexp(0)  # see `weighted_sum`


SPACES = {"logprob": mix_logprob, "prob": mix_prob}


def without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Context in which nothing is rounded by autocast on a kind of device ("cpu", "cuda")."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


@torch.no_grad()
def confidence(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a gate may know of predictions [batch, time, vocabulary], and what normalises them.

    Returns:
        ([batch, time, 2]: entropy in nats and largest log-probability; [batch, time, 1]: the logarithm of the sum of
        the exponentials), in float32 or wider.
    """
    rows = logits.flatten(0, -2)
    # Numbers are looked at where that costs no waiting and they are there: on the CPU, of plain tensors.
    at_hand = logits.device.type == "cpu" and not torch.compiler.is_compiling() and type(rows) is torch.Tensor
    size = rows_of_a_piece(*rows.shape) if at_hand else len(rows)
    out = []
    with without_autocast(logits.device.type):
        for piece in rows.split(max(size, 1)):
            piece = widen(piece)
            found = _confidence(piece) if at_hand else None
            if found is None or not found.isfinite().all():  # 0 times minus infinity is no number
                found = _confidence(piece.clamp(min=torch.finfo(torch.float32).min))
            out.append(found)
    out = torch.cat(out).view(*logits.shape[:-1], 3)
    return out[..., :2], out[..., 2:]


def _confidence(rows):
    probs = rows.softmax(-1)  # the only exponential: with log p = x - c, the largest p gives c
    largest = probs.amax(-1).log()
    norm = rows.amax(-1) - largest
    return torch.stack([norm - torch.linalg.vecdot(probs, rows), largest, norm], -1)
