"""Mixtures of the components' predictions. These run over the whole vocabulary, so they are made to spare memory.

With a vocabulary of 50,000 every temporary of the logits' size costs a third of what a head does, on the CPU mostly for
the memory itself: sums are accumulated in place, products that are summed at once are never stored, and statistics are
taken in pieces that stay in the processor's cache.
"""

import contextlib

import torch

PIECES, PIECE = 32, 1 << 18  # at most so many pieces, of at least so many numbers


def widen(tensor):
    """A tensor in float32, or in float64 if it is in that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def sum_to_one(weights):
    """Mixture weights over the last dimension; rounded ones, as FSDP2's mixed precision makes them, add up again."""
    if weights.dtype.itemsize >= 4:
        return weights
    weights = widen(weights)
    return weights / weights.sum(-1, keepdim=True)


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
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad  # read once: what offloads them brings back once
        count = len(saved) // 2
        weights, terms = saved[:count], saved[count:]
        dots = [_dot(grad, x, w) if need else None for w, x, need in zip(weights, terms, needed)]
        scaled = [w * grad if need else None for w, need in zip(weights, needed[count:])]
        return *dots, *scaled


def _dot(grad, term, weight):
    grad, term = grad.flatten(0, -2), term.flatten(0, -2)
    size, least = max(_rows_of_a_piece(*term.shape), 1), torch.finfo(term.dtype).min
    # A token that a head rules out has no gradient, and 0 times minus infinity is no number
    pairs = zip(grad.split(size), term.split(size))
    dots = torch.cat([torch.linalg.vecdot(one, other.clamp(min=least)) for one, other in pairs])
    return dots.view(weight.shape) if weight.dim() else dots.sum()


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
    if any(floats):
        return sum(weight * term for weight, term in zip(weights, terms))
    if len({term.dtype for term in terms}) > 1 or torch.compiler.is_compiling():  # a compiler joins the terms by itself
        # As in `_dot`, autograd must not multiply a gradient of 0 by what a head rules out
        return sum(weight * term.clamp(min=torch.finfo(term.dtype).min) for weight, term in zip(weights, terms))
    return _WeightedSum.apply(*weights, *terms)


def _rows_of_a_piece(rows, size):
    """How many rows of `size` numbers are worked on at once: temporaries are then no more than 1/PIECES of a tensor."""
    return max(-(-rows // PIECES), PIECE // size, 1)


class _LogMean(torch.autograd.Function):
    """log sum_k w_k softmax(x_k) of (w_1, ..., x_1, ..., n_1, ...): w_k [rows, 1], x_k [rows, vocabulary].

    n_k [rows, 1] is what normalises x_k, its logarithm of a sum of exponentials: no variable of its own.
    """

    @staticmethod
    def forward(*tensors):
        weights, logits, norms = (tensors[i * len(tensors) // 3 : (i + 1) * len(tensors) // 3] for i in range(3))
        total = torch.empty_like(logits[0])
        size = _rows_of_a_piece(*total.shape)
        shifts = [weight.log() - norm for weight, norm in zip(weights, norms)]
        for out, *piece in zip(*(x.split(size) for x in (total, *logits, *shifts))):
            for k, (one, shift) in enumerate(zip(piece[: len(logits)], piece[len(logits) :])):
                torch.add(one, shift, out=out) if k == 0 else torch.logaddexp(out, one + shift, out=out)
        return total

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *inputs, total = ctx.saved_tensors
        count, needed = len(inputs) // 3, ctx.needs_input_grad
        weights, logits, norms = inputs[:count], inputs[count : 2 * count], inputs[2 * count :]
        size, out = _rows_of_a_piece(*total.shape), [None] * (3 * count)
        for k, (weight, one, norm) in enumerate(zip(weights, logits, norms)):
            dots, found = [], torch.empty_like(one) if needed[count + k] else None
            for start in range(0, len(total), size):
                rows = slice(start, start + size)
                # p_k / p, times the gradient; a token that no component thinks possible has none.
                share = (one[rows] - norm[rows]).sub_(total[rows]).nan_to_num_(nan=-torch.inf).clamp_(max=80).exp_()
                share.mul_(grad[rows])
                dots.append(share.sum(-1, keepdim=True))
                if found is not None:
                    own = (one[rows] - norm[rows]).exp_().mul_(dots[-1])
                    torch.mul(share.sub_(own), weight[rows], out=found[rows])
            out[k] = torch.cat(dots) if needed[k] and dots else torch.zeros_like(weight) if needed[k] else None
            out[count + k] = found
        return tuple(out)


def mix_logprob(weights, logits, norms=None):
    """sum_k w_k log p_k up to a constant per token: the geometric mean. See `weighted_sum`; norms are not needed."""
    return weighted_sum([_above_zero(weight) for weight in weights], logits)


def _above_zero(weight):
    """A mixture weight that has not been rounded to nothing, by which no infinity may be multiplied."""
    return weight if isinstance(weight, float) else widen(weight).clamp(min=torch.finfo(torch.float32).tiny)


def mix_prob(weights, logits, norms=None):
    """log sum_k w_k p_k: the arithmetic mean, which can silence a component that is badly wrong.

    Args:
        weights, logits: As in `weighted_sum`.
        norms: What normalises each of the logits [batch, time, 1], where it is known (`sureness`).
    """
    weights = [_above_zero(weight) for weight in weights]
    if len({x.dtype for x in logits}) == 1 and not torch.compiler.is_compiling():
        norms = norms or [one.detach().logsumexp(-1, keepdim=True) for one in logits]
        weights = [torch.as_tensor(w, device=x.device).expand(*x.shape[:-1], 1) for w, x in zip(weights, logits)]
        flat = [x.flatten(0, -2).to(logits[0].dtype) for x in (*weights, *logits, *norms)]
        return _LogMean.apply(*flat).view(logits[0].shape)
    terms = [one.log_softmax(-1) + torch.as_tensor(weight).log() for weight, one in zip(weights, logits)]
    return torch.stack([one.clamp(min=torch.finfo(one.dtype).min) for one in terms]).logsumexp(0)  # see `weighted_sum`


SPACES = {"logprob": mix_logprob, "prob": mix_prob}


def without_autocast(kind):
    """Context in which nothing is rounded by autocast on a kind of device ("cpu", "cuda")."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


@torch.no_grad()
def sureness(logits):
    """What a gate may know of predictions [batch, time, vocabulary], and what normalises them.

    Returns:
        ([batch, time, 2]: entropy in nats and largest log-probability; [batch, time, 1]: the logarithm of the sum of
        the exponentials), in float32 or wider.
    """
    rows = logits.flatten(0, -2)
    # Numbers are looked at where that costs no waiting and they are there: on the CPU, of plain tensors.
    at_hand = logits.device.type == "cpu" and not torch.compiler.is_compiling() and type(rows) is torch.Tensor
    size = _rows_of_a_piece(*rows.shape) if at_hand else len(rows)
    out = []
    with without_autocast(logits.device.type):
        for piece in rows.split(max(size, 1)):
            piece = widen(piece)
            found = _sureness(piece) if at_hand else None
            if found is None or not found.isfinite().all():  # 0 times minus infinity is no number
                found = _sureness(piece.clamp(min=torch.finfo(torch.float32).min))
            out.append(found)
    out = torch.cat(out).view(*logits.shape[:-1], 3)
    return out[..., :2], out[..., 2:]


def _sureness(rows):
    probs = rows.softmax(-1)  # the only exponential: with log p = x - c, the largest p gives c
    largest = probs.amax(-1).log()
    norm = rows.amax(-1) - largest
    return torch.stack([norm - torch.linalg.vecdot(probs, rows), largest, norm], -1)
