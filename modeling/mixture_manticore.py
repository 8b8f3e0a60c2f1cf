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


class _LogMean(torch.autograd.Function):
    """log sum_k w_k softmax(x_k) of (w_1, ..., w_K, x_1, ..., x_K), w_k [..., 1]; one temporary of the logits' size."""

    @staticmethod
    def forward(*tensors):
        weights, logits = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        total, norms = None, []
        for weight, one in zip(weights, logits):
            norms.append(one.logsumexp(-1, keepdim=True))
            term = one + (weight.log() - norms[-1])
            total = term if total is None else torch.logaddexp(total, term, out=total)
        return total, *norms

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        count, needed = (len(ctx.saved_tensors) - 1) // 3, ctx.needs_input_grad
        weights, logits = ctx.saved_tensors[:count], ctx.saved_tensors[count : 2 * count]
        total, norms = ctx.saved_tensors[2 * count], ctx.saved_tensors[2 * count + 1 :]
        # A token that no component thinks possible has no gradient.
        grad = grad.masked_fill(total == -torch.inf, 0) if torch.isinf(total).any() else grad
        out = [None] * (2 * count)
        for k, (weight, one, norm) in enumerate(zip(weights, logits, norms)):
            share = (one - norm - total).nan_to_num_(nan=-torch.inf).exp_().mul_(grad)  # p_k / p, times the gradient
            dot = share.sum(-1, keepdim=True)
            out[k] = dot if needed[k] else None
            if needed[count + k]:
                own = (one - norm).exp_().mul_(dot)
                out[count + k] = share.sub_(own).mul_(weight)
        return tuple(out)


def mix_prob(weights, logits):
    """log sum_k w_k p_k: the arithmetic mean, which can silence a component that is badly wrong. See `weighted_sum`."""
    per_token = all(not isinstance(w, float) and w.dim() == x.dim() for w, x in zip(weights, logits))
    if per_token and len({x.dtype for x in (*weights, *logits)}) == 1 and not torch.compiler.is_compiling():
        return _LogMean.apply(*weights, *logits)[0]
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
