"""Whether a component's checkpoint has what its configuration asks for, told from headers alone."""

import contextlib
import copy
import json
import os
import re

import torch
from safetensors import safe_open

from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.sizes_manticore import Renamer, build_component, compare
from manticore_hf.modeling.weights_manticore import tie_groups


def check_checkpoint(address, config, files):
    """Refuses a component whose configuration and weight files differ, before anything is allocated for it.

    Args:
        address: How a message calls the component, after the word "Component".
        config: Its configuration.
        files: Paths of its safetensors files.

    Raises:
        ManticoreError: The component cannot be built, or its files lack tensors or have them in another shape.
    """
    what = f"Component {address}"
    with torch.device("meta"):
        model = build_component(what, copy.deepcopy(config))
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                tensors.update({key: handle.get_slice(key) for key in handle.keys()})
            except Exception as err:
                raise ManticoreError(f"{what}: {file} is no readable safetensors file ({err}).") from err
        missing, wrong = compare(model, tensors, Renamer(model, prefixed=True), tie_groups(model))
    bad = missing + [f"{key} ({got}, not {need})" for key, (got, need) in sorted(wrong.items())]
    if bad:
        raise ManticoreError(
            f"{what}: {len(bad)} weights are missing or of another shape in its checkpoint, for example {bad[0]}: its "
            "config.json belongs to other weights."
        )


def checkpoint_files(folder):
    """Paths of the safetensors files of a component's directory: one, or those that its index names.

    Raises:
        ManticoreError: The index names other files than safetensors files beside it.
    """
    whole, index = (os.path.join(folder, "model.safetensors" + end) for end in ("", ".index.json"))
    if os.path.isfile(whole):
        return [whole]
    try:
        with open(index, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
        plain = all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard) for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        plain = False
    if not plain:
        raise ManticoreError(f"{index} is no index of safetensors files beside it; save the component again.")
    return [os.path.join(folder, shard) for shard in shards]
