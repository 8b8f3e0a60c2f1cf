"""Mixtures, gate and losses with predictions at their limits: finite wherever the loss is, and what float64 gives."""

import copy
import itertools

import pytest
import torch
from hub_models import tiny

from manticore_hf import ComponentSpec, ManticoreForCausalLM

TEXT = torch.tensor([[5, 6, 7, 20, 21, 22, 23, 24]])
RULED_OUT = torch.arange(40, 44)


class AtLimits:
    """A hybrid whose heads give a chosen number for four tokens that the text does not hold."""

    def __init__(self, mixture, dtype):
        torch.manual_seed(0)
        self.given = {}
        parts = [ComponentSpec(self.part(name, dtype), name=name) for name in ("gpt_neox", "mamba")]
        self.model = ManticoreForCausalLM.from_components(parts, mixture=mixture, verify=False).train()

    def part(self, name, dtype):
        part = copy.deepcopy(tiny(name)).to(dtype)

        def limit(module, inputs, output):
            value = self.given.get(name)
            return output if value is None else output.index_fill(-1, RULED_OUT, value)

        part.get_output_embeddings().register_forward_hook(limit)
        return part

    def run(self, space, loss_weight, leaning, **given):
        """(output, gradients) with the mixture all on one component, if it leans."""
        model, self.given = self.model, given
        model.config.mixture_space, model.config.component_loss_weight = space, loss_weight
        gate = model.hybrid_mixer.token_gate
        with torch.no_grad():
            (model.hybrid_mixer.alpha_logits[-1] if gate is None else gate.linear.bias).copy_(torch.tensor(leaning))
        model.zero_grad()
        out = model(input_ids=TEXT, labels=TEXT)
        out.loss.backward()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("mixture", ["token", "static"])
def test_gradients_are_finite_at_the_limits(mixture):
    cases = list(itertools.product(("logprob", "prob"), ((0.0, 0.0), (-1e4, 1e4), (1e4, -1e4))))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hybrid = AtLimits(mixture, dtype)
        for value, (space, leaning) in itertools.product((-torch.inf, -1e4, 1e4), cases):
            for loss_weight, given in ((0.0, ["gpt_neox"]), (1.0, ["gpt_neox", "mamba"])):
                out, grads = hybrid.run(space, loss_weight, leaning, **dict.fromkeys(given, value))
                assert out.loss.isfinite() and grads, (dtype, space, leaning, value, given)
                wrong = [name for name, grad in grads.items() if not grad.isfinite().all()]
                assert not wrong, (dtype, space, leaning, value, given, wrong)


@pytest.mark.parametrize("mixture", ["token", "static"])
def test_what_is_ruled_out_does_as_what_is_very_unlikely(mixture):
    """-inf is the limit of ever smaller numbers; in float64 one that is small enough is the same."""
    hybrid = AtLimits(mixture, torch.float64)
    for space in ("logprob", "prob"):
        found = []
        for value in (-torch.inf, -1e3):
            out, grads = hybrid.run(space, 0.0, (0.0, 0.5), gpt_neox=value)
            found.append((out, {name: grad.clone() for name, grad in grads.items()}))
        (out, grads), (other, others) = found
        ruled_out = out.logits.log_softmax(-1)[..., RULED_OUT] < -300
        assert bool(ruled_out.all()) == (space == "logprob") and grads.keys() == others.keys()
        torch.testing.assert_close(out.loss, other.loss)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, others[name], msg=lambda text, name=name: f"{name}: {text}")
