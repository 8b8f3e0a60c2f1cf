"""`model.segments`: a hybrid's cut components, their heads, and which layers run where.

A component stays whole and registered once. One that runs all its layers in one go is `Whole`: called as it is. Of
others a `Segment` (layer_stack_manticore) runs some. A pruned hybrid has one component per block (path_manticore).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .carried_manticore import is_needed, optional
from .components_manticore import Shell, StackLayout, backbone_name, find_stack
from .devices_manticore import device_of, place
from .mixture_manticore import is_active


class Segments:
    """The cut components of a hybrid, made on first use; neither copied nor pickled with it.

    Args:
        model: The hybrid; None: of a copy that has not asked for its own yet.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self._ranges, self._layouts, self._runs, self._heads = None, {}, {}, {}

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()

    @property
    def ranges(self) -> dict[tuple[str, int], tuple[int, int]]:
        """{(component, block its segment begins in): (start, stop)}; of a pruned hybrid in the order they run in."""
        if self._ranges is None:
            config = self.model.config
            if config.route is not None:
                found = optional("path_manticore").stretches(config)
                self._ranges = {(one.name, one.first): (one.start, one.stop) for one in found}
            elif config.bridges:
                self._ranges = optional("bridges").ranges(config)
            else:
                pairs = {name: enumerate(pairwise(config.bounds(name))) for name in config.component_names}
                self._ranges = {(name, block): pair for name in pairs for block, pair in pairs[name]}
        return self._ranges

    def running(self, weights: list) -> list[tuple[str, int]]:
        """[(component, block)] of the segments that run under S rows of K mixture weights."""
        if self.model.config.route is not None:
            return list(self.ranges)
        if self.model.config.bridges:
            return optional("bridges").running(self.model.config, weights[0])
        names = self.model.config.component_names
        return [(name, block) for block, row in enumerate(weights) for name, w in zip(names, row) if is_active(w)]

    def layout(self, name: str) -> StackLayout:
        """A component's `StackLayout`, found once."""
        component = self.model.component(name)
        if "_layout" in component.__dict__:  # of a component that is no longer whole
            return component._layout
        if name not in self._layouts or self._layouts[name][0] is not component:
            cut = is_needed("layer_stack_manticore", self.model.config)
            find = optional("layer_stack_manticore").find_layout if cut else find_stack
            self._layouts[name] = (component, find(component))
        return self._layouts[name][1]

    def blocks(self, name: str) -> list[int]:
        """The blocks in which a component's segments begin."""
        return [block for one, block in self.ranges if one == name]

    def segment(self, name: str, block: int) -> "Whole":
        """The `Segment` (or `Whole`) of a component that begins in a block."""
        return self.stretch(name, *self.ranges[name, block])

    def stretch(self, name: str, start: int, stop: int) -> "Whole":
        """A component's layers [start, stop), whatever the cut."""
        found, component = self._runs.get((name, start, stop)), self.model._modules[name]
        if found is None or found.component is not component:
            layout = self.layout(name)
            whole = (start, stop) == (0, len(getattr(component.get_submodule(layout.path), layout.layers)))
            make = Whole if whole else optional("layer_stack_manticore").Segment
            found = self._runs[name, start, stop] = make(component, layout, start, stop)
        return found

    def head(self, name: str) -> "Head":
        """A component's `Head`."""
        found, component = self._heads.get(name), self.model._modules[name]
        if found is None or found.component is not component:
            found = self._heads[name] = Head(component, self.layout(name))
        return found

    def logits(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """A component's own logits [batch, time, vocabulary], without those of rows that only pad its vocabulary."""
        logits, size = self.model.together(self.head(name)(states)), self.model.config.vocab_size
        return logits if logits.shape[-1] == size else logits[..., :size]

    def follow(self) -> None:
        """Makes all segments and heads, or lets them follow changes in the components (adapters, dtypes, devices)."""
        if torch.compiler.is_compiling():
            return
        for name, block in self.ranges:
            self.segment(name, block)
        for name in self.model.config.component_names:
            self.head(name)
        for one in (*self._runs.values(), *self._heads.values()):
            one.refresh()

    def recut(self, ranges: dict) -> None:
        """Takes over the ranges of components whose lists of layers were shortened by hand."""
        self._ranges = dict(ranges)
        self._runs.clear()


# ---- running layers --------------------------------------------------------------------------------------------------


class Whole:
    """All layers of a component, run by its own class as they are; it reads token ids as well as embeddings."""

    is_whole = True

    def __init__(self, component: nn.Module, layout: StackLayout, start: int, stop: int) -> None:
        self.component, self.layout, self.start, self.stop = component, layout, start, stop
        self.stack = component.get_submodule(layout.path)
        self.takes_float32 = bool(getattr(self.stack.config, "residual_in_fp32", False))
        self.refresh()

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, as the component has them."""
        return getattr(self.stack, self.layout.layers)[self.start : self.stop]

    def refresh(self) -> None:
        """Follows the component; cheap when nothing changed. Not for use inside a compiled graph."""
        self.device = device_of(self.stack._modules[self.layout.layers][self.start])

    def __call__(self, hidden, attention_mask=None, position_ids=None, cache=None, attentions=None) -> torch.Tensor:
        """Runs the layers.

        Args:
            hidden: [batch, time, width]; or token ids [batch, time], where the component is whole.
            attention_mask: [batch, past + time], 1 for real tokens, or None.
            position_ids: [batch or 1, time].
            cache: The view of a ManticoreCache that belongs to these layers, or None.
            attentions: List that takes their attention weights [batch, heads, time, past + time], or None.

        Returns:
            [batch, time, width]; after the component's final norm if the last layer is among these.
        """
        return self.run(self.stack, self.arguments(hidden, attention_mask, position_ids, cache), attentions)

    def run(self, stack: nn.Module, arguments: dict, attentions: list | None) -> torch.Tensor:
        """Calls the owner of the layers, or its shell."""
        if self.layout.overwrites and "inputs_embeds" in arguments:
            arguments["inputs_embeds"] = arguments["inputs_embeds"].clone()
        if attentions is None or not self.layout.attends:
            return stack(**arguments)[0]
        out = stack(**arguments, output_attentions=True)
        attentions.extend(getattr(out, "attentions", None) or ())
        return out[0]

    def arguments(self, hidden: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Any) -> dict[str, Any]:
        """What the owner of the layers is called with."""
        hidden, attention_mask, position_ids = place((hidden, attention_mask, position_ids), self.device)
        arguments = {"use_cache": cache is not None}
        if not hidden.is_floating_point():
            arguments["input_ids"] = hidden
        else:
            # Other components' states may come in float32; only a model that keeps its own so takes them as they are.
            if not (hidden.dtype == torch.float32 and self.takes_float32):
                kept = (p.dtype for p in self.stack.parameters() if p.is_floating_point())
                hidden = hidden.to(next(kept, hidden.dtype))
            arguments["inputs_embeds"] = hidden
        if self.layout.positions:
            arguments["position_ids"] = position_ids
        if not self.layout.attends and attention_mask is not None:
            attention_mask = attention_mask[:, -hidden.shape[1] :]
        arguments["attention_mask"] = attention_mask
        if cache is not None and self.layout.cache_argument is not None:
            arguments[self.layout.cache_argument] = cache
        return arguments


# ---- heads -----------------------------------------------------------------------------------------------------------


class _BackboneOutput:
    """A backbone's output with nothing but the last state; whatever else a class asks for is None."""

    def __init__(self, state):
        self.last_hidden_state = state

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]

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
        return _BackboneOutput(inputs_embeds)


# What classes do to their logits after the matrix
_LOGITS = (
    "final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier",
    "output_multiplier",
)  # fmt: skip


class Head:
    """A component's own head on given last states: its class's forward with the backbone taken out.

    The output matrix alone would not do: what a class does to its logits (Gemma's soft cap, Granite's and FalconH1's
    scales, Mamba's float32) stands in that forward, and nowhere else. Nor would a whole component's forward: gate and
    classifiers read the last states, which many classes do not give beside the logits.
    """

    def __init__(self, component: nn.Module, layout: StackLayout) -> None:
        self.component, self.path = component, layout.path.split(".")[1:]
        self.backbone = None
        self.shell = Shell(component)
        self.refresh()

    def refresh(self) -> None:
        """Follows the component. Not for use inside a compiled graph."""
        prefix = backbone_name(self.component)
        source = self.component._modules[prefix]
        if self.backbone is None or self.backbone.source is not source:
            self.backbone = _Backbone(source, self.path)
        self.shell.own = {"_modules": {**self.component._modules, prefix: self.backbone}}
        self.shell.follow()

    @property
    def is_linear(self) -> bool:
        """Whether its matrix (and bias) alone give the logits."""
        config = self.component.config.get_text_config()
        return all(getattr(config, key, None) in (None, 1.0) for key in _LOGITS)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, time, width] -> logits [batch, time, vocabulary]."""
        head = self.component.get_output_embeddings()
        if head.weight.is_floating_point():
            states = states.to(head.weight.dtype)
        states = place(states, device_of(head))
        return self.shell.module.forward(inputs_embeds=states, use_cache=False).logits
