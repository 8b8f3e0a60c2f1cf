"""A model with fewer layers that stands for the original: of layers that repeat, three periods are kept.

The first and the last are as they are, with what is before and after them; the one in between stands for all others.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.modeling.layer_stack_manticore import layer_kind, pick_config
from manticore_hf.plan.ledger import Ledger


class Marked(nn.Module):
    """A layer before which a section begins or ends, and so after it, in the backward pass.

    Args:
        layer: The layer.
        ledger: The Ledger that is told.
        before, after: Keys of the sections before and after the state that enters it.
    """

    def __init__(self, layer: nn.Module, ledger: Ledger, before: Hashable, after: Hashable):
        super().__init__()
        self.layer, self.ledger, self.before, self.after = layer, ledger, before, after

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, after the ledger was told of the state that enters it."""
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())
        state = next(tensors)
        if state.requires_grad:  # its gradient is complete when the backward pass has left this layer
            state.register_hook(lambda grad: self.ledger.mark(self.before, grad))
        self.ledger.mark(self.after, state)
        del tensors, state
        return self.layer(*args, **kwargs)


def shrink(model: ManticoreForCausalLM, ledger: Ledger, label: str | None = None) -> None:
    """Shortens a hybrid in place.

    Args:
        model: A hybrid on the meta device, not run yet.
        ledger: The Ledger that will watch it, and is told what its sections stand for.
        label: First part of its keys, if the ledger watches another model, too.
    """
    ranges, shorter = model.segments.ranges, {}
    for name in model.config.component_names:
        component = model.component(name)
        layout = model.segments.layout(name)
        component.__dict__["_layout"] = layout  # its layers are no longer all there
        stack = component.get_submodule(layout.path)
        layers = list(getattr(stack, layout.layers))
        dropped, marks = set(), {}
        for (other, block), (start, stop) in ranges.items():
            found = None if other != name else find_period([layer_kind(layer) for layer in layers[start:stop]])
            if found is None:
                continue
            first, length, count = found
            key, middle = (label, name, block), start + first + length
            ledger.repeats[key] = count - 2
            dropped |= set(range(middle + length, start + first + (count - 1) * length))
            marks[middle], marks[start + first + (count - 1) * length] = (None, key), (key, None)
        kept = [i for i in range(len(layers)) if i not in dropped]
        for (other, block), (start, stop) in ranges.items():
            if other == name:
                shorter[other, block] = (kept.index(start), kept.index(stop - 1) + 1)
        if dropped:
            left = [Marked(layers[i], ledger, *marks[i]) if i in marks else layers[i] for i in kept]
            setattr(stack, layout.layers, nn.ModuleList(left))
            stack.config = pick_config(stack.config, kept)
    model.segments.recut({key: shorter[key] for key in ranges})


def find_period(kinds: Sequence[Hashable]) -> tuple[int, int, int] | None:
    """The stretch of a list that repeats and whose repetition saves most.

    Args:
        kinds: What is compared, one for each layer.

    Returns:
        (where it begins, length of a period, number of whole periods), or None where there are no four of them.
    """
    best, saved = None, 0
    for first in range(min(len(kinds), 8)):
        for length in range(1, (len(kinds) - first) // 4 + 1):
            stop = first + length
            while stop < len(kinds) and kinds[stop] == kinds[stop - length]:
                stop += 1
            count = (stop - first) // length
            if count > 3 and (count - 3) * length > saved:
                best, saved = (first, length, count), (count - 3) * length
    return best
