"""Hardened hybrids: one component per block, and nothing that this route does not use.

Consecutive blocks on the same component run as one segment, so a route that stays on one component is that component.
Where the route changes component one map takes the state across (the out- and in-projector multiplied); everything else
is dropped: layers, embeddings and heads of the components that do not need them are replaced by modules without
parameters, so that what stays keeps its name in the component's own checkpoint.
"""

from dataclasses import dataclass

from torch import nn

from .configuration_manticore import ManticoreError
from .mixing_manticore import resize


@dataclass(frozen=True)
class Stretch:
    """What runs in one go: layers [start, stop) of component `name`, in blocks `first` to `last`."""

    name: str
    first: int
    last: int
    start: int
    stop: int


def stretches(config):
    """The Stretches of a configuration with a route, in order."""
    out = []
    for block, name in enumerate(config.route):
        bounds = config.bounds(name)
        if out and out[-1].name == name:
            one = out.pop()
            out.append(Stretch(name, one.first, block, one.start, bounds[block + 1]))
        else:
            out.append(Stretch(name, block, block, bounds[block], bounds[block + 1]))
    return out


class Dropped(nn.Module):
    """Stands where a module was that the route does not use."""

    def forward(self, *args, **kwargs):
        raise ManticoreError(
            "This part of a component was dropped when the hybrid was hardened: it cannot be run alone, and only the "
            "route's layers are left."
        )


def drop_unused(component, anatomy, mine, reads, writes):
    """Replaces what a route does not use of a component, in place.

    Args:
        component: The causal LM.
        anatomy: Its `dissect`, made while it was whole.
        mine: The component's Stretches.
        reads: Whether the route enters through its embeddings.
        writes: Whether the route leaves through its head.
    """
    stack = component.get_submodule(anatomy.path)
    layers = getattr(stack, anatomy.layers)
    used = {i for one in mine for i in range(one.start, one.stop)}
    for i in set(range(len(layers))) - used:
        layers[i] = Dropped()
    tied = bool(component.all_tied_weights_keys)  # on the meta device they are not one tensor yet
    # Both ends of a tie are one tensor: keeping the other costs nothing.
    if not (reads or (writes and tied)):
        _replace(component, component.get_input_embeddings())
    if not (writes or (reads and tied)):
        _replace(component, component.get_output_embeddings())
    if tied and not (reads or writes):
        component._tied_weights_keys, component.all_tied_weights_keys = None, {}
        component.config.tie_word_embeddings = False
    embedding = component.get_input_embeddings() if reads or (writes and tied) else None
    for name in anatomy.before if 0 not in used else ():
        if getattr(stack, name) is not embedding:
            setattr(stack, name, Dropped())
    for name in anatomy.after if len(layers) - 1 not in used else ():
        setattr(stack, name, Dropped())
    for name in anatomy.shared if not used & {0, len(layers) - 1} else ():
        setattr(stack, name, Dropped())


def _replace(component, module):
    for parent in component.modules():
        for name, child in list(parent.named_children()):
            if child is module:
                setattr(parent, name, Dropped())


class RunsRoute:
    """Mixin of ManticoreModel: which layers run where, with a route and without."""

    def _harden(self):
        """Drops what the route does not use."""
        route = self.config.route
        writer = route[-1 if self.config.head_mixture == "last" or self.config.embeddings == "native" else 0]
        for name in self.config.component_names:
            component = self._modules[name]
            if "_anatomy" not in component.__dict__:
                component.__dict__["_anatomy"] = self._cuts.anatomy(component)
                mine = [one for one in stretches(self.config) if one.name == name]
                drop_unused(component, component._anatomy, mine, name == route[0], name == writer)

    def _blocks_of(self, name):
        """The blocks in which a component's segments begin."""
        return [block for (other, block) in self._plan() if other == name]

    def _range(self, name, block):
        """(start, stop): the layers that a component runs from `block` on, in one go."""
        return self._plan()[name, block]

    def _plan(self):
        """{(component, block its segment begins in): (start, stop)}; made once, since every step asks for it."""
        if not self._cuts.plan:
            config, plan = self.config, self._cuts.plan
            if config.route is not None:
                plan.update({(one.name, one.first): (one.start, one.stop) for one in stretches(config)})
            else:
                for name in config.component_names:
                    bounds = config.bounds(name)
                    plan.update({(name, block): pair for block, pair in enumerate(zip(bounds, bounds[1:]))})
        return self._cuts.plan

    def _run_route(self, own, state, mask, positions, cache, keep, boundaries):
        """A hardened hybrid's blocks: one component after the other, each state as it is until the next takes over."""
        native, width, name = self.config.embeddings == "native", self.config.hidden_size, None
        for after, block in self._plan():
            if name is not None:
                state = self.hybrid_mixer("cross", block, state)
            else:
                state = own[after] if native else self.hybrid_mixer("enter", 0, after, state, 1.0)
            name, view = after, None if cache is None else cache.view(after, block)
            state = self._segment(name, block)(state, mask, positions, view)
            boundaries += (resize(state, width),) if keep else ()
        states, time, last = {name: state}, state.shape[1], self.config.num_blocks - 1
        shared = resize(state, width) if native else self.hybrid_mixer("leave", last, name, state, 1.0)
        weights = self.config.mixture_weights
        return self._ran(shared, states, weights, cache, boundaries if keep else None, mask, time)
