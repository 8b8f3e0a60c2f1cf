"""A component as a hybrid needs it: repaired where Transformers is wrong, with its own attention; where its layers are.

Transformers refuses an attention implementation that one sub-model lacks. A hybrid joins models that attend with others
that do not attend at all (Mamba) or in their own way (Bloom, Gemma 2), so these keep theirs.

`Shell` is what segments and heads are made of: a shallow copy of a module that follows the original, with other
children or another configuration.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .carried_manticore import is_needed, optional
from .configuration_manticore import ManticoreError, component_depth

# Engines that keep the keys and values themselves: Transformers' continuous batching, vLLM, SGLang
ENGINES = ("paged", "vllm", "sglang")


class EngineError(ManticoreError):
    """A hybrid cannot run in an engine; `what` belongs to it or is its name."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} keeps keys and values outside of the hybrid's cache, for one list of layers of one size, and has "
            "no recurrent states: a hybrid cannot run in that engine. Use generate() with a batch padded on the left, "
            "a pipeline or `transformers serve`; a hybrid pruned to one component can run as that component, saved by "
            "itself."
        )


def prepare(component: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Repairs what Transformers gets wrong for a component of a hybrid of this configuration: mixers, and experts."""
    # Experts run in groups by default, which torch cannot do where a row of weights is no multiple of 16 bytes
    experts = [tensor for name, tensor in component.named_parameters() if ".experts." in name and tensor.ndim == 3]
    if any(size * tensor.element_size() % 16 for tensor in experts for size in tensor.shape[1:]):
        component.set_experts_implementation("eager")
    if is_needed("mixers_manticore", config):
        optional("mixers_manticore").repair_mixers(component)
    if component.config.model_type == "recurrent_gemma":
        optional("recurrent_manticore").keep_state_in_cache(component)


def check_engine(implementation: str | dict | None) -> None:
    """Raises EngineError for an attention that keeps keys and values outside of the cache it is given."""
    for one in implementation.values() if isinstance(implementation, dict) else (implementation,):
        if isinstance(one, str) and one.partition("|")[0] in ENGINES:
            raise EngineError(f"attn_implementation={one!r}")


def supports_attention(cls: type, implementation: str | None) -> bool:
    """Whether a model class has an attention implementation ("sdpa", "flash_attention_2", "flex_attention", ...)."""
    flags = {"sdpa": "_supports_sdpa", "flex": "_supports_flex_attn", "flash": "_supports_flash_attn"}
    return all(getattr(cls, flag) for word, flag in flags.items() if word in (implementation or "eager"))


def settle_attention(config: PreTrainedConfig) -> None:
    """Lets components whose class lacks the implementation in their configuration use their default."""
    for name in config.component_names:
        sub = getattr(config, name)
        check_engine(sub._attn_implementation)
        cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(sub), None)
        if cls is not None and not supports_attention(cls, sub._attn_implementation):
            sub._attn_implementation = None


def choose_attention(components: dict, implementation: str | dict) -> str | dict:
    """What Transformers' `set_attn_implementation` is to be given so that components that lack one keep theirs.

    `components` are {name: causal LM}; {component name: implementation} is taken literally.
    """
    check_engine(implementation)
    if not isinstance(implementation, str):
        return implementation
    able = [name for name, part in components.items() if supports_attention(type(part), implementation)]
    if len(able) in (0, len(components)):
        return implementation
    kept = {name: part.config._attn_implementation for name, part in components.items()}
    return {"": implementation} | kept | dict.fromkeys(able, implementation)


# ---- where its layers are --------------------------------------------------------------------------------------------


@dataclass
class StackLayout:
    """Where a component keeps its layers; what its own forward does around them is in a `CutLayout` (layer_stack).

    Attributes:
        path: Path of the module that owns the layer list, from the causal LM.
        layers: Name of the layer list.
        cache_argument: Name under which the owner takes a cache, or None.
        positions: Whether the owner takes `position_ids`.
        attends: Whether it has attention: what has not (Mamba) masks the given tokens, not those it has seen.
        overwrites: Whether the owner may overwrite the embeddings that it is given (CTRL does).
    """

    path: str
    layers: str
    cache_argument: str | None
    positions: bool
    attends: bool
    overwrites: bool = True


def find_stack(component: PreTrainedModel) -> StackLayout:
    """The layout of a causal LM whose layers all run in one go, so that what is done around them does not matter.

    Raises:
        ManticoreError: No list of `num_hidden_layers` layers was found, or the model takes no `inputs_embeds`.
    """
    path, layers = find_layers(component, component_depth(component.config))
    stack = component.get_submodule(path)
    parameters, cache = inspect.signature(type(stack).forward).parameters, cache_argument(type(stack).forward)
    if "inputs_embeds" not in parameters:
        raise uncut(component, f"{type(stack).__name__} takes no inputs_embeds.")
    return StackLayout(path, layers, cache, "position_ids" in parameters, _attends(stack.config))


def uncut(component: PreTrainedModel, reason: str, cut: str = "cut") -> ManticoreError:
    """The error for an architecture that cannot be cut."""
    return ManticoreError(f"Architecture {component.config.model_type!r} cannot be {cut}: {reason}")


def cache_argument(forward: Callable) -> str | None:
    """The name under which a model's forward takes its cache, or None; older remote code has older names."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in parameters), None)


def _attends(config):
    try:
        return hasattr(config, "num_attention_heads")
    except Exception:  # "per layer, and not the same in all" (Dots 3) is no AttributeError
        return True


def backbone_name(component: PreTrainedModel) -> str:
    """Name of a causal LM's child that is its model without head.

    That is what its class says, where it is true (of Llama 4 it is not).
    """
    if component.base_model_prefix in component._modules:
        return component.base_model_prefix
    found = [name for name, child in component.named_children() if isinstance(child, PreTrainedModel)]
    return found[0] if len(found) == 1 else component.base_model_prefix


def find_layers(component: PreTrainedModel, depth: int) -> tuple[str, str]:
    """Where a causal LM keeps its layers: path of the module that has their list, and the list's name there.

    Raises:
        ManticoreError: There is no list of `depth` modules.
    """
    prefix = backbone_name(component)
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
    raise uncut(component, f"no list of its {depth} layers was found.")


# Put there by accelerate when it dispatches a model: bound to the original module, they would run all of its layers.
_NEVER_COPIED = ("forward", "_old_forward", "_hf_hook")


class Shell:
    """A shallow copy of a module that follows the original: same parameters, hooks, mode; other children or config."""

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.module = source.__class__.__new__(source.__class__)
        self.own = {}
        self.follow()

    def follow(self) -> None:
        """Takes over what changed in the original: training mode, checkpointing, hooks, replaced children."""
        state = self.module.__dict__
        state.update(self.source.__dict__)
        for name in _NEVER_COPIED:
            state.pop(name, None)
        state.update(self.own)
