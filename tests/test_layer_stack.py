"""What a component does around its layers is found once for all that are equal, and anew for any other."""

import pytest
import torch
from families import FAMILIES, tiny
from manticore_hf.modeling import layer_stack_manticore
from manticore_hf.modeling.layer_stack_manticore import NoPosition, find_layout
from tiny_hybrid import neox
from torch import nn

from manticore_hf import ComponentSpec, ManticoreForCausalLM


class Unlearned(nn.Embedding):
    """Positions of a class of its own."""

    def __init__(self):
        super().__init__(64, 32)


@pytest.fixture
def looks(monkeypatch):
    """The components that are run on nothing, with what was found before forgotten."""
    seen, real = [], layer_stack_manticore.find_stack
    monkeypatch.setattr(layer_stack_manticore, "_FOUND", {})
    monkeypatch.setattr(
        layer_stack_manticore, "find_stack", lambda component: seen.append(component) or real(component)
    )
    return seen


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_once_for_all_that_are_equal(family, looks):
    one, two = tiny(family, seed=0), tiny(family, seed=1)
    two.config._name_or_path = "another/place"
    with torch.device("meta"):
        three = type(one)(one.config).to(torch.bfloat16)
    found = find_layout(one)
    assert find_layout(two) == find_layout(three) == found and looks == [one]
    layer_stack_manticore._FOUND.clear()
    assert find_layout(three) == found and looks == [one, three]


def test_other_settings_are_looked_at(looks):
    plain, projected = find_layout(tiny("opt")), find_layout(tiny("opt_projected"))
    assert "final_layer_norm" in plain.after and "final_layer_norm" not in projected.after
    assert len(looks) == 2


def test_another_child_is_looked_at(looks):
    usual, same, changed = (tiny("gpt2") for _ in range(3))
    same.transformer.wpe = nn.Embedding(64, 32)
    changed.transformer.wpe = Unlearned()
    assert find_layout(usual).before["wpe"] is NoPosition
    assert find_layout(same) == find_layout(usual) and looks == [usual]
    assert find_layout(changed).before == find_layout(usual).before and looks == [usual, changed]


def test_a_refusal_is_not_remembered(looks):
    broken = tiny("llama")
    broken.model.layers = broken.model.layers[:3]
    for _ in range(2):
        with pytest.raises(layer_stack_manticore.ManticoreError, match="no list of its 5 layers"):
            find_layout(broken)
    assert len(looks) == 2


def test_angles_that_depend_on_how_far_positions_go():
    """Transformers compares positions with numbers there, which has to be possible where nothing is computed."""
    ids = torch.randint(2, 16, (2, 20), generator=torch.Generator().manual_seed(1))
    factors = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]}
    for rope in ({"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "longrope", "factor": 4.0, **factors}):
        torch.manual_seed(0)
        rope |= {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 12}
        part = neox(rope_parameters=rope, max_position_embeddings=12, initializer_range=0.2).eval()
        with torch.device("meta"):
            find_layout(type(part)(part.config))
        spec = ComponentSpec(part, name="one")
        model = ManticoreForCausalLM.from_components([spec], num_blocks=2, projector="none", mixture="static").eval()
        for time in (8, 20, 8):
            with torch.no_grad():
                torch.testing.assert_close(model(ids[:, :time]).logits, part(ids[:, :time]).logits)
