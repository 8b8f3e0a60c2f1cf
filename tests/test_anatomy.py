"""What a component does around its layers is found once for all that are equal, and anew for any other."""

import pytest
import torch
from families import FAMILIES, tiny
from manticore_hf.modeling import anatomy_manticore
from manticore_hf.modeling.anatomy_manticore import NoPosition, dissect
from torch import nn


class Unlearned(nn.Embedding):
    """Positions of a class of its own."""

    def __init__(self):
        super().__init__(64, 32)


@pytest.fixture
def looks(monkeypatch):
    """The components that are run on nothing, with what was found before forgotten."""
    seen, real = [], anatomy_manticore._dissect
    monkeypatch.setattr(anatomy_manticore, "_FOUND", {})
    monkeypatch.setattr(anatomy_manticore, "_dissect", lambda component: seen.append(component) or real(component))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_once_for_all_that_are_equal(family, looks):
    one, two = tiny(family, seed=0), tiny(family, seed=1)
    with torch.device("meta"):
        three = type(one)(one.config).to(torch.bfloat16)
    found = dissect(one)
    assert dissect(two) == dissect(three) == found and looks == [one]
    assert anatomy_manticore._dissect(three) == found


def test_other_settings_are_looked_at(looks):
    plain, projected = dissect(tiny("opt")), dissect(tiny("opt_projected"))
    assert "final_layer_norm" in plain.after and "final_layer_norm" not in projected.after
    assert len(looks) == 2


def test_another_child_is_looked_at(looks):
    usual, same, changed = (tiny("gpt2") for _ in range(3))
    same.transformer.wpe = nn.Embedding(64, 32)
    changed.transformer.wpe = Unlearned()
    assert dissect(usual).before["wpe"] is NoPosition
    assert dissect(same) == dissect(usual) and looks == [usual]
    assert dissect(changed).before == dissect(usual).before and looks == [usual, changed]


def test_a_refusal_is_not_remembered(looks):
    broken = tiny("llama")
    broken.model.layers = broken.model.layers[:3]
    for _ in range(2):
        with pytest.raises(anatomy_manticore.ManticoreError, match="no list of its 5 layers"):
            dissect(broken)
    assert len(looks) == 2
