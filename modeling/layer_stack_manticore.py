"""Cutting a component: what its own forward does around its layers, found by running it on nothing, and segments of it.

A `Segment` runs the layers [start, stop) by a *shell*: a shallow copy of the module that owns the layer list
(`LlamaModel`, `OPTDecoder`, ...), with the list and the configuration sliced and with the children that run before the
first layer or after the last one neutralised where they do not belong. What a class does there outside of its children
(Granite scales the embeddings) is passed over: its state goes to the first layer, and is taken from the last. All else
(masks, positions, windows, attention backends, checkpointing) is Transformers' own code. The layers are the very same
objects and keep their own `layer_idx`; `SegmentCache` leaves holes for those of others.
"""

import contextlib
import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_not

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .bounds_manticore import ManticoreError, reason
from .components_manticore import Shell, StackLayout, find_stack, uncut
from .devices_manticore import onloaded
from .segments_manticore import Whole


class NoPosition(nn.Module):
    """Stands for a position embedding: the state that enters a later segment has it already."""

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return torch.zeros(())


class PassThrough(nn.Module):
    """Stands for a norm, dropout or projection that another segment runs."""

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return first_tensor(args, kwargs)


class _Around(nn.Module):
    """Stands for a layer, and has its attributes."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.found = None

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class Entry(_Around):
    """A segment's first layer, which takes the state that it was handed (`state`) instead of the class's own.

    `found` is the class's own, kept only where there was no other.
    """

    state = None

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor | tuple:
        if self.state is None:
            self.found = args[0] if args else kwargs.get("hidden_states")
            return self.layer(*args, **kwargs)
        state, self.state = self.state, None
        if args:
            return self.layer(state, *args[1:], **kwargs)
        return self.layer(**{**kwargs, "hidden_states": state})


class Exit(_Around):
    """A segment's last layer, which keeps the state that it returns, as `found`."""

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor | tuple:
        out = self.layer(*args, **kwargs)
        self.found = out if isinstance(out, torch.Tensor) else out[0]
        return out


@dataclass
class CutLayout(StackLayout):
    """A component's layout, with what its own forward does around its layers.

    Attributes:
        before: Child name -> stand-in class, for children that change the state before the first layer.
        after: Names of the children that run after the last layer.
        shared: Names of the children that run both before the first layer and after the last one.
        enters: Whether the owner changes the state before the first layer by more than those (Granite scales it).
        leaves: The same after the last layer.
        rereads: Whether layers read the embeddings beside the state (Zamba), which only a first segment has.
    """

    before: dict = field(default_factory=dict)
    after: list = field(default_factory=list)
    shared: list = field(default_factory=list)
    enters: bool = False
    leaves: bool = False
    rereads: bool = False


_FOUND = {}  # {all that a layout depends on: CutLayout}


def find_layout(component: PreTrainedModel) -> CutLayout:
    """Finds the layout of a causal LM, on any device, by running the owner of its layers twice without computing.

    Equal components have equal layouts: it is done once for them all, since it takes longer (0.1 to 0.5 s) than all
    else that joining small models does.

    Raises:
        ManticoreError: No list of `num_hidden_layers` layers was found, or the model takes no `inputs_embeds`.
    """
    modules = tuple((name, type(module)) for name, module in component.named_modules())
    values = {**component.config.to_dict(), "_name_or_path": None}  # where it came from does not matter
    description = json.dumps(values, sort_keys=True, default=repr), modules
    if description not in _FOUND:
        layout = CutLayout(**vars(find_stack(component)))
        _watch_children(component, component.get_submodule(layout.path), layout)
        _FOUND[description] = layout
    return _FOUND[description]


def check_cut(component: PreTrainedModel, layout: CutLayout, num_blocks: int) -> None:
    """Raises ManticoreError if a component cannot be cut into so many blocks, but into one."""
    if layout.rereads and num_blocks > 1:
        why = "its layers read the embeddings again, which only the first block has; give num_blocks=1."
        raise uncut(component, why, f"cut into {num_blocks} blocks")


def _watch_children(component, stack, layout):
    """Fills in what happens around the layers: by running the owner as it is, then as a segment in the middle."""
    events, layers = [], getattr(stack, layout.layers)
    # One layer of each kind shows what happens before and after all, and that they run: without computing, each would
    # still cost 20 ms.
    kept = one_of_each(layers)

    def enter(layer, args, kwargs):
        events.append(("layer", None, None, None))
        states = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        layout.rereads |= sum(x.shape == states[0].shape for x in states) > 1

    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]

    def watch(name):
        return lambda module, args, kwargs, out: events.append(("child", name, first_tensor(args, kwargs), out))

    for name, child in stack.named_children():
        if child is not layers:
            handles.append(child.register_forward_hook(watch(name), with_kwargs=True))
    try:
        _run_on_nothing(component, stack, {layout.layers: nn.ModuleList([layers[i] for i in kept])}, kept)
    except ManticoreError:
        if not layout.rereads or len(kept) == len(layers):
            raise
        # Zamba2 asks by a layer's place among all of them which weights it shares
        events.clear()
        kept = list(range(len(layers)))
        _run_on_nothing(component, stack, {}, kept)
    finally:
        for handle in handles:
            handle.remove()
    widths = {component.get_input_embeddings().weight.shape[1], component.config.get_text_config().hidden_size}
    seen = 0
    for kind, name, given, out in events:
        if kind == "layer":
            seen += 1
        elif seen == 0 and isinstance(out, torch.Tensor) and out.is_floating_point() and out.shape[-1] in widths:
            # An embedding is read by integer ids or positions; whatever returns a tuple (rotary angles) or something
            # else than states (Llama 4's complex angles) only informs.
            indexed = given is not None and not given.is_floating_point()
            position = indexed or isinstance(stack._modules[name], nn.Embedding)
            layout.before[name] = NoPosition if position else PassThrough
        elif seen:
            layout.after.append(name)
    if seen != 1:
        raise uncut(component, f"its forward ran the first layer of {layout.path}.{layout.layers} {seen} times.")
    layout.shared = [name for name in layout.after if name in layout.before]
    for name in layout.shared:
        del layout.before[name]
    layout.after = [name for name in layout.after if name not in layout.shared]

    first, last = Entry(layers[kept[0]]), Exit(layers[kept[-1]])
    middle = [layers[i] for i in kept]
    middle[0] = first
    middle[-1] = last if len(kept) > 1 else Exit(first)
    modules = {layout.layers: nn.ModuleList(middle), **{name: cls() for name, cls in layout.before.items()}}
    modules |= {name: PassThrough() for name in layout.after}
    given, out = _run_on_nothing(component, stack, modules, kept, entering=True)
    if first.found is None or first.found.shape != given.shape:
        shape = None if first.found is None else list(first.found.shape)
        why = f"(of a state of shape {list(given.shape)} they get {shape}), so that there is nothing to translate"
        raise uncut(component, f"what its layers hand on is no [batch, time, width] {why} between components.")
    layout.overwrites = given._version > 0
    layout.enters = first.found is not given or layout.overwrites
    layout.leaves = middle[-1].found is not out


class _FindsNothing(TorchDispatchMode):
    """Lets a search for values find none where there are no values: which expert gets which token, for one.

    It knows what follows from the mask and the positions alone: rotary angles may depend on how far positions go.
    """

    def __init__(self):
        super().__init__()
        self.known = {}  # {id of a tensor without storage: (it, one on the CPU with its values)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        if func is torch.ops.aten._local_scalar_dense.default and id(args[0]) in self.known:
            with unset_fake_temporarily():
                return self.known[id(args[0])][1].item()
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and (out.is_meta or is_fake(out)) and not out.is_floating_point():
            with contextlib.suppress(KeyError), unset_fake_temporarily():
                args, kwargs = tree_map(self._value, (args, kwargs))
                self.known[id(out)] = out, func(*args, **kwargs)
        return out

    def _value(self, one):
        if isinstance(one, torch.device):
            return torch.device("cpu")
        return self.known[id(one)][1] if isinstance(one, torch.Tensor) else one


def _run_on_nothing(component, stack, modules, kept, entering=False):
    """(The state given, the one returned) of a shell of the layers' owner that runs three tokens without computing.

    The shell has other children (`modules`), and the layers of the indices `kept`. A state that is `entering` has the
    width that layers hand on, instead of that of the embeddings.
    """
    if next(stack.parameters()).is_meta:
        # As it is loaded. The meta device is ten times as fast as fake tensors; what asks for values fails there.
        with contextlib.suppress(ManticoreError):
            return _run_shell(component, stack, modules, kept, entering, _FindsNothing())
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return _run_shell(component, stack, modules, kept, entering, _FindsNothing())


def _run_shell(component, stack, modules, kept, entering, mode):
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    training, width = stack.training, component.get_input_embeddings().weight.shape[1]
    if entering:
        width = component.config.get_text_config().hidden_size
    parameter = next(stack.parameters())
    experts = stack.config._experts_implementation_internal
    try:
        stack.eval()
        shell = Shell(stack)
        shell.own = {"_modules": {**stack._modules, **modules}, "config": pick_config(stack.config, kept)}
        shell.follow()
        # The only way of running experts whose shapes do not depend on the values, of which there are none.
        stack.config._experts_implementation_internal = "batched_mm"
        with torch.no_grad(), mode:
            hidden = torch.zeros(1, 3, width, device=parameter.device, dtype=parameter.dtype)
            # A mask keeps Transformers from looking at the values of the positions (it could not, nothing is computed).
            ones = torch.ones(1, 3, dtype=torch.long, device=parameter.device)
            out = shell.module(inputs_embeds=hidden, attention_mask=ones, use_cache=False)
        return hidden, out[0]
    except (DataDependentOutputException, DynamicOutputShapeException) as err:
        why = f"depends on values of its states ({err}), so that it cannot be looked at without computing it."
        raise uncut(component, f"what {type(stack).__name__} does {why}") from err
    except Exception as err:
        why = f"embeddings alone, as the segments of a hybrid do ({reason(err)[:300]})."
        raise uncut(component, f"{type(stack).__name__} does not run on {why}") from err
    finally:
        stack.config._experts_implementation_internal = experts
        stack.train(training)


def layer_kind(layer: nn.Module) -> tuple:
    """What two layers of the same kind have in common: modules, shapes and settings (windows)."""
    kind = []
    for name, module in layer.named_modules():
        shapes = tuple((key, *tensor.shape) for key, tensor in module.named_parameters(recurse=False))
        values = [(key, x if isinstance(x, (str, bool)) else type(x)) for key, x in vars(module).items()]
        kind.append((name, type(module), shapes, tuple(values)))
    return tuple(kind)


def one_of_each(layers: nn.ModuleList) -> list[int]:
    """Indices of the layers that are the first of their kind."""
    kinds = {layer_kind(layer): i for i, layer in reversed([*enumerate(layers)])}
    return sorted(kinds.values())


def first_tensor(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The first tensor among a call's arguments, or None."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)


def pick_config(config: PreTrainedConfig, indices: Sequence[int]) -> PreTrainedConfig:
    """A copy of a component's configuration that describes the layers of these indices.

    Every per-layer list is cut, whether it is a field or a read-only property (Jamba's `layer_types`).
    """
    depth = config.num_hidden_layers
    out = copy.deepcopy(config)
    # A shell that records its outputs would hook into the component's own layers, for ever
    out.__dict__ |= {"_output_attentions": False, "output_hidden_states": False}
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


class Segment(Whole):
    """The layers [start, stop) of a component, run by a shell; the last segment ends at the component's depth."""

    is_whole = False

    def __init__(self, component: nn.Module, layout: CutLayout, start: int, stop: int) -> None:
        stack = component.get_submodule(layout.path)
        self.shell, self.entry, self.exit, self.children = Shell(stack), None, None, []
        self.is_last, self.stand_ins = stop == len(getattr(stack, layout.layers)), {}
        if start != 0:
            self.stand_ins |= {name: cls() for name, cls in layout.before.items()}
        if not self.is_last:
            self.stand_ins |= {name: PassThrough() for name in layout.after}
        self.config = pick_config(stack.config, range(start, stop))
        super().__init__(component, layout, start, stop)

    def refresh(self) -> None:
        super().refresh()
        modules = self.stack._modules
        layers = modules[self.layout.layers]
        children = [*modules.values(), *layers._modules.values()]
        if len(children) != len(self.children) or any(map(is_not, children, self.children)):
            self.children = children
            self._rebuild(modules, list(layers)[self.start : self.stop])
        self.config._attn_implementation_internal = self.stack.config._attn_implementation_internal
        self.shell.follow()

    def _rebuild(self, modules, mine):
        """Takes over replaced children of the owner of the layers."""
        if self.layout.enters and self.start != 0:
            mine[0] = self.entry = Entry(mine[0])
        if self.layout.leaves and not self.is_last:
            mine[-1] = self.exit = Exit(mine[-1])
        own = {**modules, self.layout.layers: nn.ModuleList(mine), **self.stand_ins}
        self.shell.own = {"_modules": own, "config": self.config}

    def __call__(self, hidden, attention_mask=None, position_ids=None, cache=None, attentions=None) -> torch.Tensor:
        if attentions is not None and isinstance(self.stack, PreTrainedModel):
            maybe_install_capturing_hooks(self.stack)  # once: the shell would do it again, on the same layers
            self.shell.follow()
        arguments = self.arguments(hidden, attention_mask, position_ids, cache)
        if self.entry is not None:
            self.entry.state = arguments["inputs_embeds"]
        with onloaded(self.stack):
            out = self.run(self.shell.module, arguments, attentions)
        if self.exit is not None:
            out, self.exit.found = self.exit.found, None
        return out


# ---- its cache -------------------------------------------------------------------------------------------------------


class _Hole(DummyLayer):
    """Stands at the index of a layer that belongs to another segment, so that layers keep their own `layer_idx`.

    Transformers' mask code looks for the first layer that slides, and for the first that neither slides nor is a dummy.
    """

    is_sliding = None


class SegmentCache(Cache):
    """What the segment [start, ...) of a component sees: its own layers at their own indices, and the true length."""

    def __init__(self, seen: int, layers: list, start: int) -> None:
        super().__init__(layers=[_Hole()] * start + list(layers))
        self.seen = seen
        self._attention = next((layer for layer in layers if isinstance(layer, CacheLayerMixin)), None)

    def _attention_layer(self, layer_idx):
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], CacheLayerMixin):
            return self.layers[layer_idx]
        return self._attention

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens already seen; a view without attention layers has the hybrid's count."""
        layer = self._attention_layer(layer_idx)
        return self.seen if layer is None else layer.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(key length, key offset) of the mask for `query_length` new tokens."""
        layer = self._attention_layer(layer_idx)
        return (self.seen + query_length, 0) if layer is None else layer.get_mask_sizes(query_length)
