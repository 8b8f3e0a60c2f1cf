"""Mixtures of the components' predictions. These run over the whole vocabulary, so they are made to spare memory.

With a vocabulary of 50,000 every temporary of the logits' size costs a third of what a head does, on the CPU mostly for
the memory itself: sums are accumulated in place, products that are summed at once are never stored, and statistics are
taken in pieces that stay in the processor's cache.
"""

import math

import torch

PIECES, PIECE = 32, 1 << 18  # at most so many pieces, of at least so many numbers


def is_active(weight):
    """Whether a mixture weight lets its component run: a number that is zero does not."""
    return not (isinstance(weight, float) and weight == 0.0)


class _WeightedSum(torch.autograd.Function):
    """sum_k w_k x_k of (w_1, ..., w_K, x_1, ..., x_K), w_k scalar or [..., 1]; no product is stored, then or later."""

    @staticmethod
    def forward(*tensors):
        weights, terms = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        total = weights[0] * terms[0]
        for weight, term in zip(weights[1:], terms[1:]):
            total.addcmul_(weight, term)
        return total

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        count, needed = len(ctx.saved_tensors) // 2, ctx.needs_input_grad
        weights, terms = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        dots = [_dot(grad, x, w) if need else None for w, x, need in zip(weights, terms, needed)]
        scaled = [w * grad if need else None for w, need in zip(weights, needed[count:])]
        return *dots, *scaled


def _dot(grad, term, weight):
    dots = torch.linalg.vecdot(grad, term)
    return dots[..., None] if weight.dim() else dots.sum()


def weighted_sum(weights, terms):
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
    one_type = len({term.dtype for term in terms}) == 1
    if any(floats) or not one_type or torch.compiler.is_compiling():  # a compiler joins the terms by itself
        return sum(weight * term for weight, term in zip(weights, terms))
    return _WeightedSum.apply(*weights, *terms)


def mix_prob(weights, logits):
    """log sum_k w_k p_k: the arithmetic mean, which can silence a component that is badly wrong. See `weighted_sum`."""
    terms = []
    for weight, one in zip(weights, logits):
        scale = math.log(weight) if isinstance(weight, float) else weight.log()
        terms.append(one.log_softmax(-1) + scale)
    return torch.stack(terms).logsumexp(0)


SPACES = {"logprob": weighted_sum, "prob": mix_prob}


@torch.no_grad()
def sureness(logits):
    """Entropy (nats) and largest log-probability of each prediction: [batch, time, vocabulary] -> [batch, time, 2]."""
    rows = logits.flatten(0, -2)
    size = len(rows)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        size = max(-(-len(rows) // PIECES), PIECE // rows.shape[1], 1)
    out = []
    for piece in rows.split(max(size, 1)):
        piece = piece.float().clamp(min=torch.finfo(torch.float32).min)  # 0 times minus infinity is no number
        probs = piece.softmax(-1)  # the only exponential: with log p = x - c, the largest p gives c
        largest = probs.amax(-1).log()
        entropy = piece.amax(-1) - largest - torch.linalg.vecdot(probs, piece)
        out.append(torch.stack([entropy, largest], -1))
    return torch.cat(out).view(*logits.shape[:-1], 2)
