"""Causal depthwise convolution for the mixers of state-space models, fast on the CPU.

PyTorch's grouped convolution is slow there in the layout the mixers use: [batch, channels, time] as a transposed view
of a projection's [batch, time, channels]. With kernels of a few taps, as many shifted multiply-adds over contiguous
channels cost a fraction of it, and the gradients are the same sums read backwards.
"""

import torch


class _DepthwiseConv(torch.autograd.Function):
    """x [batch, time, channels], weight [channels, taps] and bias [channels] or None, all of one type."""

    @staticmethod
    def forward(x, weight, bias):
        taps, time = weight.t().contiguous(), x.shape[1]
        y = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
        for shift, tap in enumerate(reversed(taps[:-1].unbind()), 1):
            if shift < time:
                y[:, shift:].addcmul_(x[:, :-shift], tap)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        taps, time = weight.t().contiguous(), x.shape[1]
        dx = dy * taps[-1] if wants_x else None
        columns = [(dy * x).sum((0, 1))] if wants_weight else None
        for shift, tap in enumerate(reversed(taps[:-1].unbind()), 1):
            late, early = dy[:, shift:], x[:, : max(time - shift, 0)]
            if wants_x and shift < time:
                dx[:, :-shift].addcmul_(late, tap)
            if wants_weight:
                columns.append((late * early).sum((0, 1)))
        dweight = torch.stack(columns[::-1], 1) if wants_weight else None
        return dx, dweight, dy.sum((0, 1)) if wants_bias and ctx.has_bias else None


def causal_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolves every channel with its own filter; position t sees positions t - taps + 1 to t, zeros before the first.

    Args:
        x: [batch, channels, time].
        weight: [channels, taps]; the last tap is the present's.
        bias: [channels], or None.

    Returns:
        [batch, channels, time], in the type of the weight; lower precisions are summed in float32.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    y = _DepthwiseConv.apply(x.transpose(1, 2).to(dtype), weight.to(dtype), bias)
    return y.to(weight.dtype).transpose(1, 2)
