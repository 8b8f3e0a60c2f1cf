"""Mixtures of predictions that spare memory, and time: no product is stored, and gradients are written by hand.

With a vocabulary of 50,000 every temporary of the logits' size costs a third of what a head does, on the CPU mostly for
the memory itself: sums are accumulated in place, and products that are summed at once are never stored.
"""

from typing import Any

import torch

from manticore_hf.modeling.mixture_manticore import rows_of_a_piece


class WeightedSum(torch.autograd.Function):
    """sum_k w_k x_k of (w_1, ..., w_K, x_1, ..., x_K), w_k scalar or [..., 1]; no product is stored, then or later."""

    @staticmethod
    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        weights, terms = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        total = weights[0] * terms[0]
        for weight, term in zip(weights[1:], terms[1:]):
            total.addcmul_(weight, term)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad  # read once: what offloads them brings back once
        count = len(saved) // 2
        weights, terms = saved[:count], saved[count:]
        dots = [_dot(grad, x, w) if need else None for w, x, need in zip(weights, terms, needed)]
        scaled = [w * grad if need else None for w, need in zip(weights, needed[count:])]
        return *dots, *scaled


def _dot(grad, term, weight):
    grad, term = grad.flatten(0, -2), term.flatten(0, -2)
    size, least = max(rows_of_a_piece(*term.shape), 1), torch.finfo(term.dtype).min
    # A token that a head rules out has no gradient, and 0 times minus infinity is no number
    pairs = zip(grad.split(size), term.split(size))
    dots = torch.cat([torch.linalg.vecdot(one, other.clamp(min=least)) for one, other in pairs])
    return dots.view(weight.shape) if weight.dim() else dots.sum()


class LogMean(torch.autograd.Function):
    """log sum_k w_k softmax(x_k) of (w_1, ..., x_1, ..., n_1, ...): w_k [rows, 1], x_k [rows, vocabulary].

    n_k [rows, 1] is what normalises x_k, its logarithm of a sum of exponentials: no variable of its own.
    """

    @staticmethod
    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        weights, logits, norms = (tensors[i * len(tensors) // 3 : (i + 1) * len(tensors) // 3] for i in range(3))
        total = torch.empty_like(logits[0])
        size = rows_of_a_piece(*total.shape)
        shifts = [weight.log() - norm for weight, norm in zip(weights, norms)]
        for out, *piece in zip(*(x.split(size) for x in (total, *logits, *shifts))):
            for k, (one, shift) in enumerate(zip(piece[: len(logits)], piece[len(logits) :])):
                torch.add(one, shift, out=out) if k == 0 else torch.logaddexp(out, one + shift, out=out)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        *inputs, total = ctx.saved_tensors
        count, needed = len(inputs) // 3, ctx.needs_input_grad
        weights, logits, norms = inputs[:count], inputs[count : 2 * count], inputs[2 * count :]
        size, out = rows_of_a_piece(*total.shape), [None] * (3 * count)
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
