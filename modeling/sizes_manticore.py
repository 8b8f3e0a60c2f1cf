"""Making a model from its configuration, and whether a checkpoint has what the model needs, told from headers alone."""

import contextlib
import math
import re

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


# ---- checkpoints -----------------------------------------------------------------------------------------------------


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


def compare(model, tensors, rename, ties=None):
    """Compares a checkpoint with a model by names and shapes; nothing is read but headers.

    Args:
        model: The model, on the meta device or not.
        tensors: {checkpoint key: tensor or lazy slice of a safetensors file}.
        rename: Function from a checkpoint's key to (key in the model, whether the tensor itself is converted).
        ties: {key: the keys of its tie group, itself included}.

    Returns:
        (missing, wrong): the model's keys that no tensor covers, and {key: (shape there, shape in the model)}. Tensors
        that Transformers converts are compared by the number of their elements.
    """
    wanted = model.state_dict(keep_vars=True)
    ties, covered, wrong, parts, given = ties or {}, set(), {}, {}, {}
    for key, tensor in sorted(tensors.items()):  # some renamings wait for a key that sorts before theirs
        name, converted = rename(key)
        shape = tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
        if converted:  # one may become several beside each other (a fused projection that is split)
            parent = name.rsplit(".", 2)[0]
            given[parent] = given.get(parent, 0) + math.prod(shape)
            parts.setdefault(parent, name)
            continue
        covered |= ties.get(name, {name})
        if name in wanted and shape != (need := tuple(getattr(wanted[name], "ds_shape", wanted[name].shape))):
            wrong[name] = (shape, need)
    for parent, name in parts.items():
        made = [key for key in wanted if key.startswith(parent + ".") and key not in covered]
        asked = sum(wanted[key].numel() for key in made)
        if asked > given[parent]:
            wrong[name] = ((given[parent],), (asked,))
        covered |= set(made)
    patterns = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    missing = sorted(key for key in wanted if key not in covered and not any(p.search(key) for p in patterns))
    return missing, wrong


def check_tensors(model, tensors, rename, ties, owner, quantizer=None, ignore_mismatched=False):
    """Refuses a hybrid's checkpoint before anything is allocated for it.

    Args:
        model, tensors, rename, ties: As in `compare`.
        owner: Function from a model's key to what a message calls the part that has it.
        quantizer: Transformers' quantizer of the model, if it has one.
        ignore_mismatched: Accept other shapes (`ignore_mismatched_sizes`), if there is memory for the new tensors.

    Raises:
        ManticoreError: As `refuse`.
    """
    missing, wrong = compare(model, tensors, rename, ties)
    missing = [key for key in missing if not model.starts_anew(key)]
    if quantizer is not None:  # it packs tensors, and turns some round before
        packed = quantizer.pre_quantized
        wrong = {key: two for key, two in wrong.items() if not packed and math.prod(two[0]) != math.prod(two[1])}
    if wrong and ignore_mismatched:
        state = model.state_dict(keep_vars=True)
        guard().memory(
            f"{owner(min(wrong))}: its tensors of another shape", [state[key] for key in wrong if key in state]
        )
    refuse(missing, {} if ignore_mismatched else wrong, owner)


def refuse(missing, wrong, owner):
    """Raises ManticoreError if a checkpoint lacks tensors or has them in other shapes, which `compare` found.

    Args:
        missing: Keys of the model.
        wrong: {key: (shape in the file, shape in the model)}.
        owner: As in `check_tensors`.
    """
    if missing:
        key = min(missing)
        raise ManticoreError(
            f"{owner(key)}: {len(missing)} tensors are neither in the hybrid's file nor in its components' "
            f"repositories, for example {key}. The repository is incomplete: save or upload the hybrid again from "
            "where it is whole."
        )
    if wrong:
        key = min(wrong)
        got, need = wrong[key]
        raise ManticoreError(
            f"{owner(key)}: {len(wrong)} tensors have another shape than config.json says, for example {key}: "
            f"{tuple(got)} in the file, {tuple(need)} in the model. Use the config.json that was saved with these "
            "weights."
        )


def tie_groups(model):
    """Key -> the keys of its tie group (itself included)."""
    groups = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        group = groups.setdefault(source, {source})
        group.add(target)
        groups[target] = group
    return groups
