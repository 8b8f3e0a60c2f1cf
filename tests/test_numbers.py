"""Mixtures, gate and losses with predictions at their limits: finite wherever the loss is, and what float64 gives."""

import copy
import itertools

import pytest
import torch
from hub_models import tiny

from manticore_hf import ComponentSpec, ManticoreForCausalLM

TEXT = torch.tensor([[5, 6, 7, 20, 21, 22, 23, 24]])
RULED_OUT = slice(40, 44)


def with_limits(component, value, dtype):
    """A copy whose head gives `value` for four tokens that the text does not hold."""
    component = copy.deepcopy(component).to(dtype)

    def limit(module, inputs, output):
        there = torch.zeros(output.shape[-1], dtype=torch.bool)
        there[RULED_OUT] = True
        return output.masked_fill(there, value)

    component.get_output_embeddings().register_forward_hook(limit)
    return component


def results(value, dtype, space, mixture, weight, saturated, both):
    torch.manual_seed(0)
    parts = [with_limits(tiny("gpt_neox"), value, dtype)]
    parts.append(with_limits(tiny("mamba"), value, dtype) if both else copy.deepcopy(tiny("mamba")).to(dtype))
    parts = [ComponentSpec(part, name=name) for part, name in zip(parts, "ab")]
    model = ManticoreForCausalLM.from_components(
        parts, mixture_space=space, mixture=mixture, component_loss_weight=weight, verify=False
    )
    if saturated:  # one component's weight is rounded to 0
        with torch.no_grad():
            bias = (
                model.hybrid_mixer.token_gate.linear.bias if mixture == "token" else model.hybrid_mixer.alpha_logits[-1]
            )
            bias.copy_(torch.tensor(saturated))
    out = model.train()(input_ids=TEXT, labels=TEXT)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("space", ["logprob", "prob"])
@pytest.mark.parametrize("mixture", ["token", "static"])
def test_gradients_are_finite_at_the_limits(space, mixture):
    values = (-torch.inf, -1e4, 1e4)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for value, dtype in itertools.product(values, dtypes):
        for weight, saturated, both in (
            (0.0, (), False),
            (1.0, (), True),
            (0.0, (-1e4, 1e4), False),
            (0.0, (1e4, -1e4), False),
        ):
            what = f"{value}, {dtype}, {weight}, {saturated}"
            out, grads = results(value, dtype, space, mixture, weight, saturated, both)
            assert out.loss.isfinite() and grads, what
            assert not [name for name, grad in grads.items() if not grad.isfinite().all()], what


@pytest.mark.parametrize("space", ["logprob", "prob"])
@pytest.mark.parametrize("mixture", ["token", "static"])
def test_what_is_ruled_out_does_as_what_is_very_unlikely(space, mixture):
    """-inf is the limit of ever smaller numbers; in float64 one that is small enough is the same."""
    (out, grads), (other, others) = (
        results(value, torch.float64, space, mixture, 0.0, (), True) for value in (-torch.inf, -1e3)
    )
    torch.testing.assert_close(out.loss, other.loss)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], msg=lambda text, name=name: f"{name}: {text}")
    assert (out.logits[..., RULED_OUT].log_softmax(-1) < -300).all()
