"""Segments: a component's layers [start, stop), run by the component's own class.

A component stays whole and registered once. A segment is a *shell*: a shallow copy of the module that owns the layer
list (`LlamaModel`, `OPTDecoder`, ...), with the list and the configuration sliced and with the children that run before
the first layer or after the last one neutralised where they do not belong. What a class does there outside of its
children (Granite scales the embeddings) is passed over: its state goes to the first layer, and is taken from the last.
Masks, positions, rotary embeddings, sliding windows, attention backends and gradient checkpointing are then
Transformers' own code. The layers are the very same objects and keep their own `layer_idx`; `SegmentCache` leaves holes
for the layers of other segments.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .anatomy_manticore import Entry, Exit, NoPosition, PassThrough, Shell, backbone_name, dissect, slice_config
from .devices_manticore import device_of, onloaded, place
from .positions_manticore import find_tables


class Segment:
    """The layers [start, stop) of a component as a callable on hidden states.

    Args:
        component: The causal LM.
        anatomy: Its `dissect`.
        start, stop: The range of layers; the first segment has start 0, the last one ends at the component's depth.
    """

    def __init__(self, component, anatomy, start, stop):
        self.anatomy, self.start, self.stop = anatomy, start, stop
        self.stack = component.get_submodule(anatomy.path)
        self.shell = Shell(self.stack)
        self.is_first, self.is_last = start == 0, stop == len(getattr(self.stack, anatomy.layers))
        self.config = slice_config(self.stack.config, start, stop)
        self.takes_float32 = bool(getattr(self.config, "residual_in_fp32", False))
        self.stand_ins = {}
        if not self.is_first:
            self.stand_ins.update({name: cls() for name, cls in anatomy.before.items()})
        if not self.is_last:
            self.stand_ins.update({name: PassThrough() for name in anatomy.after})
        self.entry = self.exit = None
        self.children = None
        self.refresh()

    def refresh(self):
        """Follows the component; cheap when nothing changed. Not for use inside a compiled graph."""
        modules = self.stack._modules
        layers = modules[self.anatomy.layers]
        children = [*modules.values(), *layers._modules.values()]
        if (
            self.children is None
            or len(children) != len(self.children)
            or any(a is not b for a, b in zip(children, self.children))
        ):
            self.children = children
            positions = [modules[n] for n, cls in self.anatomy.before.items() if self.is_first and cls is NoPosition]
            mine = list(layers)[self.start : self.stop]
            runs = [x for name, x in modules.items() if x not in (None, layers) and name not in self.stand_ins]
            beside = [*self.stack.buffers(recurse=False), *(buffer for x in runs for buffer in x.buffers())]
            self.tables = find_tables(self.stack.config, positions, mine, beside)
            if self.anatomy.enters and not self.is_first:
                mine[0] = self.entry = Entry(mine[0])
            if self.anatomy.leaves and not self.is_last:
                mine[-1] = self.exit = Exit(mine[-1])
            own = {**modules, self.anatomy.layers: nn.ModuleList(mine), **self.stand_ins}
            self.shell.own = {"_modules": own, "config": self.config}
        attention = self.stack.config._attn_implementation_internal
        if self.config._attn_implementation_internal != attention:
            self.config._attn_implementation_internal = attention
        self.device = device_of(layers[self.start])
        self.shell.follow()

    def __call__(self, hidden, attention_mask=None, position_ids=None, cache=None):
        """Runs the layers.

        Args:
            hidden: [batch, time, width].
            attention_mask: [batch, past + time], 1 for real tokens, or None.
            position_ids: [batch or 1, time].
            cache: The segment's `SegmentCache`, or None.

        Returns:
            [batch, time, width]; after the component's final norm if this is its last segment.
        """
        hidden, attention_mask, position_ids = place((hidden, attention_mask, position_ids), self.device)
        # Other components' states may come in float32; only a model that keeps its own so takes them as they are.
        if not (hidden.dtype == torch.float32 and self.takes_float32):
            hidden = hidden.to(next((p.dtype for p in self.stack.parameters() if p.is_floating_point()), hidden.dtype))
        given = hidden.clone() if self.anatomy.overwrites else hidden
        arguments = {"inputs_embeds": given, "use_cache": cache is not None}
        if self.anatomy.positions:
            arguments["position_ids"] = position_ids
        if not self.anatomy.attends and attention_mask is not None:
            attention_mask = attention_mask[:, -hidden.shape[1] :]
        if cache is not None and cache.max_cache_len is not None and not cache.is_recurrent:
            # Not every model stretches a mask to the length of a static cache (Bloom's position biases).
            if attention_mask is None:
                attention_mask = hidden.new_ones(len(hidden), cache.owner.seen + hidden.shape[1], dtype=torch.long)
            attention_mask = F.pad(attention_mask, (0, cache.max_cache_len - attention_mask.shape[1]))
        arguments["attention_mask"] = attention_mask
        if cache is not None and self.anatomy.cache_argument is not None:
            arguments[self.anatomy.cache_argument] = cache
        if self.entry is not None:
            self.entry.state = hidden
        with onloaded(self.stack):
            out = self.shell.module(**arguments)[0]
        if self.exit is not None:
            out, self.exit.found = self.exit.found, None
        return out


@dataclass
class _BackboneOutput(ModelOutput):
    """A backbone's output with nothing but the last state; whatever else a class asks for is None."""

    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Backbone(nn.Module):
    """Stands for the backbone of a causal LM: gives back the state it is handed.

    Args:
        source: The backbone, which is asked for settings (FalconH1 keeps the scale of its logits there).
        path: Names of the modules that a causal LM may reach through (OPT calls `self.model.decoder`).
    """

    def __init__(self, source, path=()):
        super().__init__()
        self.__dict__["source"] = source
        for name in path[:1]:
            self._modules[name] = _Backbone(getattr(source, name), path[1:])

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.source, name)

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        return _BackboneOutput(last_hidden_state=inputs_embeds)


class Head:
    """A component's own head on given last states: its class's forward with the backbone taken out.

    Whatever the class does to its logits (Gemma's soft cap, Granite's scale, Mamba's float32) is thereby done.

    Args:
        component: The causal LM.
        anatomy: Its `dissect`.
    """

    def __init__(self, component, anatomy):
        self.component, self.path = component, anatomy.path.split(".")[1:]
        self.backbone = None
        self.shell = Shell(component)
        self.refresh()

    def refresh(self):
        """Follows the component. Not for use inside a compiled graph."""
        prefix = backbone_name(self.component)
        source = self.component._modules[prefix]
        if self.backbone is None or self.backbone.source is not source:
            self.backbone = _Backbone(source, self.path)
        self.shell.own = {"_modules": {**self.component._modules, prefix: self.backbone}}
        self.shell.follow()

    def __call__(self, states):
        """[batch, time, width] -> logits [batch, time, vocabulary]."""
        head = self.component.get_output_embeddings()
        if head.weight.is_floating_point():
            states = states.to(head.weight.dtype)
        states = place(states, device_of(head))
        return self.shell.module.forward(inputs_embeds=states, use_cache=False).logits


class Cuts:
    """All segments and heads of a hybrid's components, made on first use and never copied or pickled with it."""

    def __init__(self):
        self._segments, self._heads, self._anatomies = {}, {}, {}
        self.plan = {}  # see RunsRoute._plan

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()

    def anatomy(self, component):
        """The component's `Anatomy`, found once."""
        if "_anatomy" in component.__dict__:  # of a component that is no longer whole
            return component._anatomy
        key = id(component)
        if key not in self._anatomies:
            self._anatomies[key] = (component, dissect(component))
        return self._anatomies[key][1]

    def segment(self, component, start, stop):
        """The component's layers [start, stop)."""
        key = (id(component), start, stop)
        if key not in self._segments:
            self._segments[key] = Segment(component, self.anatomy(component), start, stop)
        return self._segments[key]

    def head(self, component):
        """The component's head."""
        key = id(component)
        if key not in self._heads:
            self._heads[key] = Head(component, self.anatomy(component))
        return self._heads[key]

    def refresh(self):
        """Lets every shell follow its component."""
        for shell in (*self._segments.values(), *self._heads.values()):
            shell.refresh()
