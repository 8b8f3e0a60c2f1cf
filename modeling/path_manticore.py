"""Pruned hybrids: one component per block.

Consecutive blocks on the same component run as one segment; layers, embeddings and heads that the path does not need
are replaced by modules without parameters, so that what stays keeps its name in the component's own checkpoint.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .carried_manticore import optional
from .configuration_manticore import ManticoreError
from .layer_stack_manticore import CutLayout
from .mixing_manticore import HybridMixer, resize
from .projectors_manticore import PROJECTORS, LinearProjector, MLPProjector, Resize, gated
from .running_manticore import Inputs, Pass, mix_native, native_inputs
from .segments_manticore import Segments


@dataclass(frozen=True)
class Stretch:
    """What runs in one go: layers [start, stop) of component `name`, in blocks `first` to `last`."""

    name: str
    first: int
    last: int
    start: int
    stop: int


def stretches(config: PreTrainedConfig) -> list[Stretch]:
    """The Stretches of a configuration with a route, in order."""
    out = []
    for name, blocks in groupby(range(len(config.route)), key=config.route.__getitem__):
        first, *_ = blocks = list(blocks)
        bounds = config.bounds(name)
        out.append(Stretch(name, first, blocks[-1], bounds[first], bounds[blocks[-1] + 1]))
    return out


class Dropped(nn.Module):
    """Stands where a module was that the path of a pruned hybrid does not use."""

    is_dropped = True
    weight = torch.empty(0, 0)  # of an embedding or head: its width is 0

    def forward(self, *args: object, **kwargs: object) -> None:
        raise ManticoreError("This part of a component was pruned: only the layers of the hybrid's path are left.")


def prune(segments: Segments) -> None:
    """Drops what the path of a pruned hybrid does not use, once."""
    config = segments.model.config
    writer = config.route[-1 if config.head_mixture == "last" or config.embeddings == "native" else 0]
    for name in config.component_names:
        component = segments.model.component(name)
        if "_layout" not in component.__dict__:
            component.__dict__["_layout"] = segments.layout(name)
            mine = [pair for (other, _), pair in segments.ranges.items() if other == name]
            drop_unused(component, component._layout, mine, name == config.route[0], name == writer)


def drop_unused(component: nn.Module, layout: CutLayout, mine: list, reads: bool, writes: bool) -> None:
    """Replaces what a path does not use of a component, in place.

    Of its layers it runs `mine`, [(start, stop)]; it `reads` by its embeddings and `writes` by its head, or not.
    """
    stack = component.get_submodule(layout.path)
    layers = getattr(stack, layout.layers)
    used = {i for start, stop in mine for i in range(start, stop)}
    for i in set(range(len(layers))) - used:
        layers[i] = Dropped()
    tied = bool(component.all_tied_weights_keys)  # on the meta device they are not one tensor yet
    if tied:
        reads = writes = reads or writes  # both ends are one tensor: keeping the other costs nothing
    embedding, head = component.get_input_embeddings(), component.get_output_embeddings()
    for keep, module in ((reads, embedding), (writes, head)):
        if not keep:
            _replace(component, module)
    if tied and not reads:
        component._tied_weights_keys, component.all_tied_weights_keys = None, {}
        component.config.tie_word_embeddings = False
    embedding = embedding if reads else None
    gone = [name for name in layout.before if 0 not in used and getattr(stack, name) is not embedding]
    gone += layout.after if len(layers) - 1 not in used else []
    gone += layout.shared if not used & {0, len(layers) - 1} else []
    for name in gone:
        setattr(stack, name, Dropped())


def _replace(component, module):
    for parent in component.modules():
        for name, child in list(parent.named_children()):
            if child is module:
                setattr(parent, name, Dropped())


# ---- its mixer -------------------------------------------------------------------------------------------------------


class Chain(nn.Sequential):
    """Two projectors in a row, where they cannot be one (MLPs)."""

    def reset(self, kind: str) -> None:
        """(Re-)initialises both; `kind` is the configuration's `projector_init`."""
        for projector in self:
            projector.reset(kind)


def add_crossings(mixer: nn.Module, config: PreTrainedConfig, widths_in: dict, widths: dict, widths_out: dict) -> None:
    """Makes the projectors of a pruned hybrid's mixer; arguments as in `HybridMixer`."""
    route, last = config.route, config.num_blocks - 1
    del mixer.alpha_logits
    zeros = torch.zeros(config.num_blocks, len(mixer.names), dtype=torch.float32)
    mixer.register_buffer("alpha_logits", zeros)  # kept for the record
    for block, (name, after) in enumerate(zip(route, route[1:]), 1):
        if name != after:
            mixer.across[str(block)] = make_crossing(config, name, after, widths)
    if config.embeddings != "native":
        for kept, name, block, sizes in (
            (mixer.into, route[0], 0, (mixer.width, widths_in[route[0]])),
            (mixer.out_of, route[-1], last, (widths_out[route[-1]] or widths[route[-1]], mixer.width)),
        ):
            reference = config.gate == "none" and name == config.reference_component
            kept[f"{name}-{block}"] = (Resize if reference else PROJECTORS[config.projector])(*sizes)


def make_crossing(config: PreTrainedConfig, name: str, after: str, widths: dict[str, int]) -> nn.Module:
    """The map that takes a pruned hybrid's state from component `name` to component `after`."""
    if config.gate == "alpha" or config.projector == "none":  # at alpha = 1 the paper's projectors vanish
        return Resize(widths[name], widths[after])
    if config.projector == "linear":
        return LinearProjector(widths[name], widths[after])
    sizes = ((name, widths[name], config.hidden_size), (after, config.hidden_size, widths[after]))
    return Chain(*[(Resize if one == config.reference_component else MLPProjector)(*size) for one, *size in sizes])


def cross(mixer: HybridMixer, block: int, state: torch.Tensor) -> torch.Tensor:
    """A pruned hybrid's state [batch, time, d_j] -> what the component of `block` reads [batch, time, d_k]."""
    return gated(mixer, mixer.across[str(block)], state, 0.0)


# ---- running ---------------------------------------------------------------------------------------------------------


def run_path(model: PreTrainedModel, inputs: Inputs, weights: list, shared: bool) -> Pass:
    """A pruned hybrid: one component after the other, each state as it is until the next takes over."""
    config, mixer, segments = model.config, model.hybrid_mixer, model.segments
    native, width, name = config.embeddings == "native", config.hidden_size, config.route[0]
    if native:
        own = native_inputs(model, inputs, weights[0])
        state, boundaries = own[name], [mix_native(model, weights[0], own)] if inputs.keep else []
    else:
        space = optional("shared_manticore")
        mixed = space.mixed_inputs(model, inputs)
        state, boundaries = mixer(space.enter, 0, name, mixed, 1.0), [mixed]
    for name, block in segments.ranges:
        if block > 0:
            state = mixer(cross, block, state)
        state = segments.segment(name, block)(state, *inputs.around(name, block))
        if inputs.keep:
            boundaries.append(resize(state, width))
    mixed = resize(state, width) if native else mixer(space.leave, config.num_blocks - 1, name, state, 1.0)
    return Pass({name: state}, weights, mixed, tuple(boundaries) if inputs.keep else None)
