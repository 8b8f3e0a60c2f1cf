"""Segments: a component's layers [start, stop), run by the component's own class.

A component stays whole and registered once. A segment is a *shell*: a shallow copy of the module that owns the layer
list (`LlamaModel`, `OPTDecoder`, ...), with the list and the configuration sliced and with the children that run before
the first layer or after the last one neutralised where they do not belong. Masks, positions, rotary embeddings, sliding
windows, attention backends and gradient checkpointing are then Transformers' own code. The layers are the very same
objects and keep their own `layer_idx`; `SegmentCache` leaves holes for the layers of other segments.
"""

import copy
import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput

from .configuration_manticore import ManticoreError, component_depth
from .devices_manticore import device_of, onloaded, place
from .positions_manticore import find_tables

_CACHE_ARGUMENTS = ("past_key_values", "cache_params")

# Scales that some models apply to the embeddings outside of any child: the later segments must not apply them again.
_INPUT_SCALES = ("embedding_multiplier", "normalizer")

# Put there by accelerate when it dispatches a model: bound to the original module, they would run all of its layers.
_NEVER_COPIED = ("forward", "_old_forward", "_hf_hook")


class _NoPosition(nn.Module):
    """Stands for a position embedding: the state that enters a later segment has it already."""

    def forward(self, *args, **kwargs):
        return torch.zeros(())


class _PassThrough(nn.Module):
    """Stands for a norm, dropout or projection that another segment runs."""

    def forward(self, hidden, *args, **kwargs):
        return hidden


@dataclass
class Anatomy:
    """Where a component keeps its layers, and what its own forward does around them.

    Attributes:
        path: Path of the module that owns the layer list, from the causal LM.
        layers: Name of the layer list.
        cache_argument: Name under which the owner takes a cache, or None.
        positions: Whether the owner takes `position_ids`.
        before: Child name -> stand-in class, for children that change the state before the first layer.
        after: Names of the children that run after the last layer.
    """

    path: str
    layers: str
    cache_argument: str | None
    positions: bool
    before: dict = field(default_factory=dict)
    after: list = field(default_factory=list)


def dissect(component):
    """Finds a component's anatomy by running the owner of its layers once, without computing anything.

    Args:
        component: A causal LM of Transformers, on any device ("meta" included).

    Raises:
        ManticoreError: No list of `num_hidden_layers` layers was found, or the model takes no `inputs_embeds`.
    """
    kind = component.config.model_type
    depth = component_depth(component.config)
    path, layers = _find_layers(component, depth)
    stack = component.get_submodule(path)
    parameters = inspect.signature(type(stack).forward).parameters
    if "inputs_embeds" not in parameters:
        raise ManticoreError(f"Architecture {kind!r} cannot be cut: {type(stack).__name__} takes no inputs_embeds.")
    anatomy = Anatomy(
        path=path,
        layers=layers,
        cache_argument=next((name for name in _CACHE_ARGUMENTS if name in parameters), None),
        positions="position_ids" in parameters,
    )
    _watch_children(component, stack, anatomy)
    return anatomy


def _find_layers(component, depth):
    prefix = component.base_model_prefix
    todo = [(prefix, getattr(component, prefix, None))]
    while todo:
        path, module = todo.pop(0)
        if module is None:
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                if len(child) == depth:
                    return path, name
            else:
                todo.append((f"{path}.{name}", child))
    raise ManticoreError(
        f"Architecture {component.config.model_type!r} cannot be cut: no list of its {depth} layers was found."
    )


def _watch_children(component, stack, anatomy):
    from torch._subclasses.fake_tensor import FakeTensorMode

    events, layers = [], getattr(stack, anatomy.layers)
    handles = [layers[0].register_forward_pre_hook(lambda *_: events.append(("layer", None, None, None)))]

    def watch(name):
        return lambda module, args, kwargs, out: events.append(("child", name, _first_tensor(args, kwargs), out))

    for name, child in stack.named_children():
        if child is not layers:
            handles.append(child.register_forward_hook(watch(name), with_kwargs=True))
    training, width = stack.training, component.get_input_embeddings().weight.shape[1]
    parameter = next(stack.parameters())
    experts = stack.config._experts_implementation_internal
    try:
        stack.eval()
        # One layer of each kind shows what happens before and after all, and that they run: without computing, each
        # would still cost 20 ms.
        kept = _one_of_each(layers)
        shell = _Shell(stack)
        shell.own = {
            "_modules": {**stack._modules, anatomy.layers: nn.ModuleList([layers[i] for i in kept])},
            "config": pick_config(stack.config, kept),
        }
        shell.follow()
        # The only way of running experts whose shapes do not depend on the values, of which there are none.
        stack.config._experts_implementation_internal = "batched_mm"
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            hidden = torch.zeros(1, 3, width, device=parameter.device, dtype=parameter.dtype)
            # A mask keeps Transformers from looking at the values of the positions (it could not, nothing is computed).
            ones = torch.ones(1, 3, dtype=torch.long, device=parameter.device)
            shell.module(inputs_embeds=hidden, attention_mask=ones, use_cache=False)
    finally:
        stack.config._experts_implementation_internal = experts
        stack.train(training)
        for handle in handles:
            handle.remove()
    seen = 0
    for kind, name, given, out in events:
        if kind == "layer":
            seen += 1
        elif seen == 0 and isinstance(out, torch.Tensor):
            # An embedding is read by integer ids or positions; whatever returns a tuple (rotary angles) only informs.
            indexed = given is not None and not given.is_floating_point()
            position = indexed or isinstance(stack._modules[name], nn.Embedding)
            anatomy.before[name] = _NoPosition if position else _PassThrough
        elif seen:
            anatomy.after.append(name)
    if seen != 1:
        raise ManticoreError(
            f"Architecture {component.config.model_type!r} cannot be cut: its forward ran the first layer of "
            f"{anatomy.path}.{anatomy.layers} {seen} times."
        )


def layer_kind(layer):
    """What two layers of the same kind have in common: modules, shapes and settings (windows)."""
    kind = []
    for name, module in layer.named_modules():
        shapes = tuple((key, *tensor.shape) for key, tensor in module.named_parameters(recurse=False))
        values = [(key, x if isinstance(x, (str, bool)) else type(x)) for key, x in vars(module).items()]
        kind.append((name, type(module), shapes, tuple(values)))
    return tuple(kind)


def _one_of_each(layers):
    """Indices of the layers that are the first of their kind."""
    kinds = {}
    for i, layer in enumerate(layers):
        kinds.setdefault(layer_kind(layer), i)
    return sorted(kinds.values())


def _first_tensor(args, kwargs):
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)


def slice_config(config, start, stop):
    """A copy of a component's configuration that describes its layers [start, stop)."""
    return pick_config(config, range(start, stop))


def pick_config(config, indices):
    """A copy of a component's configuration that describes the layers of these indices.

    Every per-layer list is cut, whether it is a field or a read-only property (Jamba's `layer_types`).
    """
    depth = config.num_hidden_layers
    out = copy.deepcopy(config)
    frozen = {}
    for name in dir(type(config)):
        if hasattr(PreTrainedConfig, name):  # nothing there is per layer, and asking some of it warns
            continue
        if isinstance(inspect.getattr_static(type(config), name), property):
            try:
                value = getattr(config, name)
            except Exception:  # a property of another kind of model: none of this one's layers
                continue
            if isinstance(value, (list, tuple)) and len(value) == depth:
                frozen[name] = [value[i] for i in indices]
    if frozen:
        cls = type(config)
        out.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, **frozen})
    for name, value in list(vars(out).items()):
        if name in frozen or name.startswith("_") or name == "architectures":
            continue
        if isinstance(value, (list, tuple)) and len(value) == depth:
            out.__dict__[name] = type(value)(value[i] for i in indices)
    out.__dict__[type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(indices)
    return out


class _Shell:
    """A shallow copy of a module that follows the original: same parameters, hooks, mode; other children or config."""

    def __init__(self, source):
        self.source = source
        self.module = source.__class__.__new__(source.__class__)
        self.own = {}
        self.follow()

    def follow(self):
        """Takes over what changed in the original: training mode, checkpointing, hooks, replaced children."""
        state = self.module.__dict__
        state.update(self.source.__dict__)
        for name in _NEVER_COPIED:
            state.pop(name, None)
        state.update(self.own)


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
        self.shell = _Shell(self.stack)
        self.is_first, self.is_last = start == 0, stop == len(getattr(self.stack, anatomy.layers))
        self.config = slice_config(self.stack.config, start, stop)
        self.takes_float32 = bool(getattr(self.config, "residual_in_fp32", False))
        self.stand_ins = {}
        if not self.is_first:
            self.stand_ins.update({name: cls() for name, cls in anatomy.before.items()})
        if not self.is_last:
            self.stand_ins.update({name: _PassThrough() for name in anatomy.after})
        self.children = None
        self.refresh()

    def refresh(self):
        """Follows the component; cheap when nothing changed. Not for use inside a compiled graph."""
        modules = self.stack._modules
        layers = modules[self.anatomy.layers]
        children = [*modules.values(), *layers._modules.values()]
        if self.children is None or len(children) != len(self.children) or any(
            a is not b for a, b in zip(children, self.children)
        ):
            self.children = children
            positions = [modules[n] for n, cls in self.anatomy.before.items() if self.is_first and cls is _NoPosition]
            self.tables = find_tables(self.stack.config, positions, list(layers)[self.start : self.stop])
            own = dict(modules)
            own[self.anatomy.layers] = nn.ModuleList(list(layers)[self.start : self.stop])
            own.update(self.stand_ins)
            self.shell.own = {"_modules": own, "config": self.config}
            if not self.is_first:
                for name in _INPUT_SCALES:
                    if hasattr(self.stack, name) and name not in self.stack._buffers:
                        self.shell.own[name] = 1.0
        scaled = [] if self.is_first else [name for name in _INPUT_SCALES if name in self.stack._buffers]
        if scaled:
            # Anew each time: what was copied from a model that was still on the meta device would stay there. The one
            # needs no device of the model's: it has no dimensions.
            self.shell.own["_buffers"] = {**self.stack._buffers, **{n: torch.ones((), device="cpu") for n in scaled}}
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
        arguments = {"inputs_embeds": hidden, "use_cache": cache is not None}
        if self.anatomy.positions:
            arguments["position_ids"] = position_ids
        if self.anatomy.cache_argument == "cache_params" and attention_mask is not None:
            # Recurrent models mask the tokens they are given, not the ones they have seen.
            attention_mask = attention_mask[:, -hidden.shape[1] :]
        if cache is not None and cache.max_cache_len is not None and not cache.is_recurrent:
            # Not every model stretches a mask to the length of a static cache (Bloom's position biases).
            if attention_mask is None:
                attention_mask = hidden.new_ones(len(hidden), cache.owner.seen + hidden.shape[1], dtype=torch.long)
            attention_mask = F.pad(attention_mask, (0, cache.max_cache_len - attention_mask.shape[1]))
        arguments["attention_mask"] = attention_mask
        if cache is not None and self.anatomy.cache_argument is not None:
            arguments[self.anatomy.cache_argument] = cache
        with onloaded(self.stack):
            return self.shell.module(**arguments)[0]


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
        path: Names of the modules that a causal LM may reach through (OPT calls `self.model.decoder`).
    """

    def __init__(self, path=()):
        super().__init__()
        for name in path[:1]:
            self.add_module(name, _Backbone(path[1:]))

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
        self.component = component
        self.backbone = _Backbone(anatomy.path.split(".")[1:])
        self.shell = _Shell(component)
        self.refresh()

    def refresh(self):
        """Follows the component. Not for use inside a compiled graph."""
        prefix = self.component.base_model_prefix
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
