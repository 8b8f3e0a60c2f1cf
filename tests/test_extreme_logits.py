"""Heads that rule tokens out, or are far too sure: every mixture, gate and loss stays a number, and the right one."""

import itertools

import pytest
import torch
from cases import case
from tiny_hybrid import mixed_hybrid

EXTREMES = {
    "a token ruled out": (3, -torch.inf),
    "a token as good as ruled out": (3, -1e4),
    "a token as good as certain": (2, 1e4),
}
MIXTURES = {
    "static": {"mixture": "static"},
    "gate": {"mixture": "token"},
    "gate, past losses": {"mixture": "token", "gate_past_losses": True},
    "online": {"mixture": "online"},
}
LOSSES = {"mixture": (1.0, 0.0), "both": (0.3, 1.0), "components": (0.0, 1.0)}
IDS = torch.tensor([[1, 4, 5, 2, 6, 7, 2, 1], [5, 5, 1, 7, 4, 6, 2, 2]])  # 3 is never read


def naive(model, heads, out):
    """Nats per token of the mixture, by its definition, in float64."""
    if out.weights is None:
        weights = model.mixture_weights()[-1].to(torch.float64).expand(*IDS.shape, -1)
    else:
        weights = out.weights.detach().to(torch.float64)
    logs = torch.stack(
        [heads[name].detach().to(torch.float64).log_softmax(-1) for name in model.config.component_names]
    )
    weights = weights.permute(2, 0, 1)[..., None]
    if model.config.mixture_space == "prob":
        mixed = (logs + weights.log()).logsumexp(0)
    else:
        mixed = torch.where(weights > 0, weights * logs, 0.0).sum(0).log_softmax(-1)
    return -mixed[:, :-1].gather(-1, IDS[:, 1:, None]).mean()


def watch(heads, name, token, value):
    """A hook of a head that changes one token's logit, and keeps what the mixture gets."""

    def hook(module, args, logits):
        if token is not None:
            hit = torch.arange(logits.shape[-1]) == token
            logits = torch.where(hit, torch.tensor(value, dtype=logits.dtype), logits)
        heads[name] = logits
        return logits

    return hook


HALVES = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("space", ["prob", "logprob"])
def test_losses_and_gradients_are_numbers(space, dtype):
    for (how, (token, value)), (kind, settings), who in itertools.product(
        EXTREMES.items(), MIXTURES.items(), ("one", "all")
    ):
        model = mixed_hybrid(num_blocks=1, mixture_space=space, **settings).to(dtype).train()
        heads = {}

        for k, name in enumerate(model.config.component_names):
            change = (token, value) if k == 0 or who == "all" else (None, None)
            model.component(name).get_output_embeddings().register_forward_hook(watch(heads, name, *change))
        for loss, (mix, own) in LOSSES.items():
            with case(f"{how}, {kind}, {who}, {loss}"):
                model.config.mix_loss_weight, model.config.component_loss_weight = mix, own
                model.zero_grad()
                out = model(input_ids=IDS, labels=IDS)
                out.loss.backward()
                assert out.loss.isfinite() and out.mixture_loss.isfinite()
                wrong = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
                assert not wrong
                if dtype == torch.float32:
                    assert out.mixture_loss.item() == pytest.approx(naive(model, heads, out).item(), rel=1e-4)
