"""Tiny hybrids whose components are joined by bridges."""

from families import tiny

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.families import contract

EVERY = {"topology": "bridge", "bridge_blocks": 3}


def one_way(sender, receiver):
    """The last state of one component into every block of another."""
    return {**EVERY, "bridges": [{"from": sender, "to": receiver}]}


def parts_of(names):
    """Tiny components of these families, the last one deeper."""
    names = names.split("+")
    more = {names[-1]: {"num_hidden_layers": 6}} if len(names) > 1 else {}
    return [ComponentSpec(tiny(one, seed=i, **more.get(one, {})), name=one) for i, one in enumerate(names)]


def hybrid(names, drawn=True, **settings):
    """A hybrid of tiny components, everything it adds to them drawn at random."""
    model = ManticoreForCausalLM.from_components(parts_of(names), verify=False, **settings).eval()
    if drawn:
        contract.randomise(model)
    return model
