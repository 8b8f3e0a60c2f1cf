"""Contract: the hybrid computes what `naive.py` computes, for every way of joining and mixing."""

import itertools

import naive
import pytest
import torch
from families import components, randomise, tiny, tokens

from manticore_hf import ComponentSpec, ManticoreForCausalLM

# Members of unequal widths, depths and embedding widths; of these families naive.py knows the layers.
GROUPS = {
    "gpt_neox+mamba": ("gpt_neox", "mamba"),
    "opt+llama": ("opt", "llama"),
    "gpt2+mamba2+opt": ("gpt2", "mamba2", "opt"),
}
SIZES = {
    "mamba": {"hidden_size": 48, "num_hidden_layers": 6},
    "mamba2": {"hidden_size": 48, "num_hidden_layers": 4, "num_heads": 12},
    "opt": {"hidden_size": 40, "word_embed_proj_dim": 24, "num_hidden_layers": 6},
}


@pytest.fixture(scope="module")
def parts():
    return {
        name: [ComponentSpec(tiny(f, seed=i, **SIZES.get(f, {})), name=f) for i, f in enumerate(families)]
        for name, families in GROUPS.items()
    }


def compose(parts, **settings):
    model = ManticoreForCausalLM.from_components(parts, verify=False, **settings)
    randomise(model, scale=0.3)
    return model


def check(model, alpha=None):
    """Logits (up to a constant per token, which no probability depends on), weights, and losses with gradients."""
    ids = tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    wanted = naive.forward(model, ids, labels, alpha)
    got = model(input_ids=ids, labels=labels, use_cache=False)
    tolerance = {"atol": 3e-5, "rtol": 1e-4}
    torch.testing.assert_close(got.logits.log_softmax(-1), wanted["logits"].log_softmax(-1), **tolerance)
    if wanted["weights"] is not None:
        torch.testing.assert_close(got.weights, wanted["weights"], **tolerance)
    torch.testing.assert_close(got.loss, wanted["loss"], **tolerance)
    torch.testing.assert_close(got.mixture_loss, wanted["mixture_loss"], **tolerance)
    if model.config.component_loss_weight > 0 and alpha is None:
        torch.testing.assert_close(got.component_losses, wanted["component_losses"].detach(), **tolerance)
    own = [p for p in model.parameters() if p.requires_grad]
    got, wanted = (torch.autograd.grad(out["loss"], own, allow_unused=True) for out in (got, wanted))
    for mine, theirs in zip(got, wanted):
        if mine is None or theirs is None:
            # Not every formula reaches every parameter (heads of a mixture that is fixed, alpha under a token gate)
            assert all(x is None or not x.any() for x in (mine, theirs))
        else:
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("embeddings", ["native", "mixed", "fresh"])
@pytest.mark.parametrize("mixture, space", itertools.product(["static", "token"], ["logprob", "prob"]))
def test_mixtures_and_embeddings(parts, mixture, space, embeddings):
    for group, gate, head_mixture in (("gpt_neox+mamba", "alpha", "first"), ("gpt2+mamba2+opt", "none", "last")):
        model = compose(
            parts[group],
            num_blocks=2,
            embeddings=embeddings,
            mixture=mixture,
            mixture_space=space,
            gate=gate,
            head_mixture=head_mixture,
            projector="linear",
            mix_loss_weight=0.3,
            component_loss_weight=0.5,
        )
        check(model)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("projector", ["linear", "mlp", "none"])
@pytest.mark.parametrize("gate", ["none", "alpha"])
def test_projectors_gates_and_blocks(parts, gate, projector, blocks):
    check(
        compose(
            parts["opt+llama"],
            num_blocks=blocks,
            projector=projector,
            gate=gate,
            mixture="static",
            embeddings="native" if blocks == 3 else "mixed",
            head_mixture="last",
            reference_component="llama",
        )
    )


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_presets(parts, preset):
    check(compose(parts["opt+llama"], num_blocks=4, preset=preset))


@pytest.mark.parametrize("embeddings", ["native", "mixed"])
@pytest.mark.parametrize("space", ["logprob", "prob"])
def test_fixed_weights(parts, space, embeddings):
    model = compose(parts["gpt_neox+mamba"], num_blocks=2, mixture_space=space, embeddings=embeddings, gate="alpha")
    weights = torch.tensor([[0.25, 0.75], [0.625, 0.375]])
    model.set_mixture_weights(weights)
    check(model, weights)


def test_the_naive_components_are_the_components():
    for family in ("gpt_neox", "llama", "gpt2", "opt", "opt_projected", "mamba", "mamba2"):
        component = components(family)[family]
        state = naive.layers(component, naive.embeddings(component, tokens()), 0, 5)
        wanted = component(input_ids=tokens(), use_cache=False).logits
        torch.testing.assert_close(naive.head(component, state), wanted, atol=2e-5, rtol=1e-5)
