"""The model is composed: what `model.segments` gives, what is not cut, and how few base classes a hybrid mixes in."""

import ast
import copy
import inspect
import pickle
import textwrap

import pytest
import torch
from families import hybrid, tokens
from manticore_hf.modeling import base_manticore, modeling_manticore
from manticore_hf.modeling.components_manticore import Shell
from manticore_hf.modeling.layer_stack_manticore import Segment
from manticore_hf.modeling.segments_manticore import Whole
from transformers import DynamicCache, PreTrainedModel, StaticCache

from manticore_hf import ManticoreForCausalLM
from manticore_hf.training.prune import prune

CHAIN = {
    modeling_manticore.ManticoreForCausalLM,
    base_manticore.ManticoreModel,
    base_manticore.ManticorePreTrainedModel,
}
MIXINS = [
    cls
    for cls in modeling_manticore.ManticoreForCausalLM.__mro__
    if cls.__module__.startswith("manticore_hf") and cls not in CHAIN
]


def test_at_most_four_classes_are_mixed_in():
    assert len(MIXINS) <= 4
    assert all(any(hasattr(PreTrainedModel, name) for name in vars(cls) if name[0] != "_") for cls in MIXINS)


@pytest.mark.parametrize("cls", MIXINS, ids=lambda cls: cls.__name__)
def test_no_mixin_needs_another(cls):
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "model")
    }
    for other in set(MIXINS) - {cls}:
        alone = {name for name in vars(other) if not hasattr(PreTrainedModel, name) and name not in vars(cls)}
        assert not used & alone, f"{cls.__name__} needs {used & alone} of {other.__name__}"


@pytest.mark.parametrize(
    "settings", [{}, {"mixture": "static"}, {"mixture": "static", "mixture_weights": [[0.0, 1.0]]}]
)
@torch.no_grad()
def test_one_native_block_cuts_nothing(settings, monkeypatch):
    """The components' own forwards, which read the tokens, and their own caches, on the layers of the hybrid's."""
    model, ids = hybrid("gpt_neox+mamba", num_blocks=1, **settings), tokens()
    wanted = model(input_ids=ids, use_cache=False).logits
    monkeypatch.setattr(Segment, "__init__", lambda self, *args: pytest.fail("a component was cut"))
    read = {}
    for name in model.config.component_names:
        whole = model.segments.segment(name, 0)
        assert type(whole) is Whole and whole.stack in list(model.component(name).modules())
        whole.stack.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: read.update({name: kwargs}), with_kwargs=True
        )
    out = model(input_ids=ids, use_cache=True)
    assert torch.equal(out.logits, wanted)
    running = [name for name in model.config.component_names if name != "gpt_neox" or "mixture_weights" not in settings]
    assert list(read) == running and all(torch.equal(kwargs["input_ids"], ids) for kwargs in read.values())
    for cls, cache in ((DynamicCache, out.cache), (StaticCache, model.make_cache(16))):
        views = [cache.view(name, 0) for name in model.config.component_names]
        assert [type(view) for view in views] == [cls, cls]
        assert [layer for view in views for layer in view.layers] == cache.layers
    for name in running:
        assert read[name]["cache"].layers == out.cache.view(name, 0).layers


@torch.no_grad()
def test_pruned_to_one_component_cuts_nothing(monkeypatch):
    soft = hybrid("gpt_neox+mamba", num_blocks=2)
    monkeypatch.setattr(Segment, "__init__", lambda self, *args: pytest.fail("a component was cut"))
    hard = prune(soft, "mamba")
    assert list(hard.segments.ranges) == [("mamba", 0)] and hard.segments.segment("mamba", 0).is_whole
    assert torch.equal(hard(tokens()).logits, soft.component("mamba")(tokens()).logits)
    assert type(hard.make_cache().view("mamba", 0)) is DynamicCache


def test_segments_are_public_and_say_what_runs_where():
    model = hybrid("gpt_neox+mamba", num_blocks=2)
    neox, mamba = model.config.component_names
    assert list(model.segments.ranges) == [(neox, 0), (neox, 1), (mamba, 0), (mamba, 1)]
    assert model.segments.ranges[neox, 1] == tuple(model.config.bounds(neox)[1:])
    assert [block for name, block in model.segments.ranges if name == mamba] == [0, 1]
    layers = [layer for block in (0, 1) for layer in model.segments.segment(mamba, block).layers]
    assert layers == list(model.component(mamba).backbone.layers)
    assert model.segments.running([[1.0, 0.0], [0.5, 0.5]]) == [(neox, 0), (neox, 1), (mamba, 1)]
    hard = prune(model, [mamba, neox])
    assert hard.segments.running(hard.config.mixture_weights) == list(hard.segments.ranges) == [(mamba, 0), (neox, 1)]


@pytest.mark.parametrize("blocks", [1, 2])
@torch.no_grad()
def test_a_copy_has_segments_of_its_own(blocks):
    model, ids = hybrid("gpt_neox+mamba", num_blocks=blocks), tokens()
    wanted = model(ids).logits
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone.segments is clone.segments is not model.segments
        for name in clone.config.component_names:
            assert clone.segments.segment(name, 0).component is clone.component(name)
        assert torch.equal(clone(ids).logits, wanted)
    # A component that is replaced is cut anew
    name = model.config.component_names[0]
    before, model._modules[name] = model.segments.segment(name, 0), copy.deepcopy(model.component(name))
    assert model.segments.segment(name, 0) is not before and torch.equal(model(ids).logits, wanted)


def test_a_shell_follows_what_it_copies():
    linear = torch.nn.Linear(2, 2)
    shell = Shell(linear)
    linear.eval()
    assert shell.module.training
    shell.follow()
    assert not shell.module.training and shell.module.weight is linear.weight
    assert isinstance(ManticoreForCausalLM.segments, property)
