"""Contract: segments in sequence are the component, and a hybrid pruned to one component is that component."""

import pytest
import torch
from families import FAMILIES, PAIRS, components, hybrid, tiny, tokens, uneven
from manticore_hf.modeling.layer_stack_manticore import Entry, Exit, Segment, find_layout, pick_config

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM
from manticore_hf.families import contract
from manticore_hf.families.contract import NATIVE, PAPER


@pytest.fixture(scope="module", params=FAMILIES)
def component(request):
    return tiny(request.param)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("bounds", [(0, 5), (0, 2, 5), (0, 2, 4, 5), (0, 1, 2, 5), (0, 1, 2, 3, 4, 5)], ids=str)
def test_segments_in_sequence_are_the_uncut_stack(component, bounds):
    contract.check_segments(component, bounds)


def bare(layer):
    """A layer without what may stand around it."""
    return bare(layer.layer) if isinstance(layer, (Entry, Exit)) else layer


def test_a_segment_holds_no_weights_of_its_own(component):
    known = {id(p) for p in component.parameters()} | {id(b) for b in component.buffers()}
    before = set(component.state_dict())
    for start, stop in [(0, 2), (2, 5)]:
        segment = Segment(component, find_layout(component), start, stop)
        assert all(id(p) in known for p in segment.shell.module.parameters())
        layers = [bare(layer) for layer in getattr(segment.shell.module, segment.layout.layers)]
        assert layers == list(getattr(segment.stack, segment.layout.layers))[start:stop]
    assert set(component.state_dict()) == before


def test_slice_config_cuts_every_list_of_layers(component):
    config = component.config
    sliced = pick_config(config, range(1, 3))
    assert (sliced.num_hidden_layers, config.num_hidden_layers) == (2, 5)
    for key in ("layer_types", "layers_block_type", "attention_layers"):
        if isinstance(getattr(config, key, None), (list, tuple)) and len(getattr(config, key)) == 5:
            assert list(getattr(sliced, key)) == list(getattr(config, key))[1:3], key


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("settings", [PAPER, NATIVE], ids=["paper", "native"])
@pytest.mark.parametrize("hybrid_name", [*FAMILIES, *PAIRS])
def test_one_hot_is_the_component(hybrid_name, settings):
    parts = [ComponentSpec(part, name=name) for name, part in components(hybrid_name).items()]
    contract.check_one_hot(parts, settings, blocks=(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PAPER, NATIVE], ids=["paper", "native"])
@pytest.mark.parametrize("hybrid_name", [*FAMILIES, *PAIRS])
def test_one_hot_in_two_blocks_is_the_component(hybrid_name, settings):
    parts = [ComponentSpec(part, name=name) for name, part in components(hybrid_name).items()]
    contract.check_one_hot(parts, settings, blocks=(2,))


@pytest.mark.parametrize("blocks", [2, 3])
@torch.no_grad()
def test_an_uneven_cut_is_still_the_component(blocks):
    parts = [ComponentSpec(tiny("gemma2"), name="a"), ComponentSpec(tiny("mamba", num_hidden_layers=6), name="b")]
    cuts = {"a": uneven(5, blocks), "b": uneven(6, blocks)[::-1]}
    model = ManticoreForCausalLM.from_components(parts, num_blocks=blocks, block_layers=cuts, **PAPER)
    assert model.config.bounds("a")[1] == 1 and model.config.bounds("b")[-2] == 5
    for name in "ab":
        model.set_mixture_weights(name)
        assert torch.equal(
            model(input_ids=tokens(), use_cache=False).logits,
            model.component(name)(input_ids=tokens(), use_cache=False).logits,
        )


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("space", ["logprob", "prob"])
@pytest.mark.parametrize("mixture", ["static", "token"])
@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_native_hybrid_of_one_block_starts_as_the_ensemble(pair, mixture, space):
    model = hybrid(pair, num_blocks=1, embeddings="native", gate="none", mixture=mixture, mixture_space=space)
    model.hybrid_mixer.reset()  # undoes the random perturbation of `hybrid`
    ids = tokens()
    parts = [model.component(n)(input_ids=ids, use_cache=False).logits.log_softmax(-1) for n in PAIRS[pair]]
    parts = torch.stack(parts)
    wanted = parts.mean(0) if space == "logprob" else parts.exp().mean(0).log()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    # Equal as distributions: what normalises the components' logits is a constant per token, and left out.
    torch.testing.assert_close(out.logits.log_softmax(-1), wanted.log_softmax(-1), atol=1e-5, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, loss)
    if mixture == "token":
        assert torch.equal(out.weights, torch.full_like(out.weights, 1 / len(parts)))


@pytest.mark.parametrize("settings", [PAPER, {}], ids=["paper", "default"])
def test_a_component_of_weight_zero_is_not_run(settings):
    model = hybrid("gpt_neo+mamba2+opt", num_blocks=2, **settings)
    calls = {}
    for name in model.config.component_names:
        calls[name] = [0] * model.component(name).config.num_hidden_layers
        path = model.segments.layout(name)
        layers = getattr(model.component(name).get_submodule(path.path), path.layers)
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, name=name, i=i: calls[name].__setitem__(i, calls[name][i] + 1))
    model.set_mixture_weights(torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]))
    assert model.mixture_weights().tolist() == [[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]
    with torch.no_grad():
        out = model(input_ids=tokens(), labels=tokens())
    assert out.loss.isfinite()
    assert calls == {"gpt_neo": [1, 1, 1, 0, 0], "mamba2": [1, 1, 0, 0], "opt": [0, 0, 0, 1, 1, 1]}
    # A weight of None learns again
    model.set_mixture_weights(None)
    weights = model.mixture_weights()
    assert (weights > 0).all() and torch.allclose(weights.sum(-1), torch.ones(2))


def test_impossible_mixture_weights_are_refused():
    model = hybrid("gpt_neox+mamba", num_blocks=2)
    for bad in ([[1.0, 0.0]], [[0.5, 0.6], [0.5, 0.5]], [[1.5, -0.5], [0.5, 0.5]], [["a", "b"], [1, 0]], 3):
        with pytest.raises(ManticoreError, match="mixture_weights=.*must be 2 rows"):
            model.set_mixture_weights(bad)
    with pytest.raises(ManticoreError, match="No component is named 'opt'.*gpt_neox"):
        model.set_mixture_weights("opt")
