"""Checks from its headers alone whether a checkpoint has what a model needs."""

import math
import re

import torch

from manticore_hf.modeling.weights_manticore import Renamer


def compare(model: torch.nn.Module, tensors: dict, rename: Renamer, ties: dict | None = None) -> tuple[list, dict]:
    """Compares a checkpoint with a model by names and shapes; nothing is read but headers.

    Args:
        model: The model, on the meta device or not.
        tensors: {checkpoint key: tensor or lazy slice of a safetensors file}.
        rename: The model's `Renamer`.
        ties: {key: the keys of its tie group, itself included}.

    Returns:
        (missing, wrong): the model's keys that no tensor covers, and {key: (shape there, shape in the model)}. Tensors
        that Transformers converts are compared by the number of their elements.
    """
    wanted = rename.known
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
