"""Making a model from its configuration, and which of its tensors is which of a checkpoint's."""

import contextlib

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from .bounds_manticore import ManticoreError, guard


@contextlib.contextmanager
def explained(what):
    """Context in which a model is made of a configuration; whatever fails is a ManticoreError.

    Args:
        what: How a message calls the model.
    """
    try:
        yield
    except ManticoreError:
        raise
    except ImportError as err:  # a package is missing: nothing is wrong with the model
        raise ManticoreError(f"{what} needs a package that is not installed: {err}") from err
    except Exception as err:
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise ManticoreError(f"{what} cannot be built from its configuration: {reason[:1000]}") from err


@contextlib.contextmanager
def trying(what):
    """`explained`, watched by the guard: a model is made or run without storage."""
    with explained(what), guard().running(what):
        yield


def construct(what, make, beside=()):
    """The module that `make()` makes, which is called twice if the guard counts it first.

    Args:
        what: How a message calls the module.
        make: Function that makes it.
        beside: Modules that are there already and stay.

    Raises:
        ManticoreError: It cannot be made, or the guard finds it too large.
    """
    with explained(what):
        return guard().construct(what, make, beside)


def build_component(what, config, beside=()):
    """A component's module with initial weights, of Transformers' own class.

    Args:
        what: How a message calls the component.
        config: Its configuration.
        beside: Modules that are there already and stay.

    Raises:
        ManticoreError: It cannot be built, or there is not enough memory.
    """

    def make():
        return AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False)

    module = construct(what, make, beside)
    for find in ("get_input_embeddings", "get_output_embeddings"):
        if not isinstance(getattr(getattr(module, find)(), "weight", None), torch.Tensor):
            raise ManticoreError(f"{what} cannot be joined: its {find}() gives no module with a weight.")
    return module


class Renamer:
    """Checkpoint keys -> keys of the model, as Transformers renames them when it loads (embed_out -> lm_head, ...).

    Args:
        model: The model, on any device.
        prefixed: Whether a base model's prefix is added or removed where the model needs that (a component's own
            checkpoint may have been saved without its head).
        packed: Transformers' quantiser of a checkpoint that is quantised: it has names of its own for what it packs.
    """

    def __init__(self, model, prefixed=False, packed=None):
        self.transforms = _sorted(get_model_conversion_mapping(model))
        self.packed = None if packed is None else _sorted(get_model_conversion_mapping(model, None, packed))
        self.known = model.state_dict()
        self.prefix = (model.base_model_prefix, self.known) if prefixed else (None, None)

    def __call__(self, key):
        """(key in the model, whether the tensor itself is converted too: fused, split or transposed)."""
        name, pattern = rename_source_key(key, *self.transforms, *self.prefix)
        if name not in self.known and key in self.known:  # as Transformers does
            return key, False
        if name not in self.known and self.packed is not None:
            name, pattern = rename_source_key(key, *self.packed, *self.prefix)
        return name, pattern is not None


def _sorted(transforms):
    """Transformers' (renamings, converters)."""
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    return renamings, [one for one in transforms if not isinstance(one, WeightRenaming)]


def tie_groups(model):
    """Key -> the keys of its tie group (itself included)."""
    groups = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        group = groups.setdefault(source, {source})
        group.add(target)
        groups[target] = group
    return groups
