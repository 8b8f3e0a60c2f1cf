"""Checks from its headers alone whether a component's checkpoint has what its configuration asks for."""

import contextlib
import copy
import os
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from manticore_hf.modeling.bounds_manticore import build_component
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.references_manticore import WEIGHT_FILES, lfs_id, open_files, sha256, shards
from manticore_hf.modeling.weights_manticore import Renamer, tie_groups
from manticore_hf.utils.headers import compare


def check_checkpoint(address: str, config: PreTrainedConfig, files: list) -> None:
    """Raises for a component whose configuration and weight files differ, before anything is allocated for it.

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
        tensors = open_files(files, stack, what)
        missing, wrong = compare(model, tensors, Renamer(model, model.base_model_prefix), tie_groups(model))
    bad = missing + [f"{key} ({got}, not {need})" for key, (got, need) in sorted(wrong.items())]
    if bad:
        raise ManticoreError(
            f"{what}: {len(bad)} weights are missing or of another shape in its checkpoint, for example {bad[0]}: its "
            "config.json belongs to other weights."
        )


def checkpoint_files(folder: str | os.PathLike) -> list[str]:
    """Paths of the safetensors files of a component's directory: one, or those that its index names.

    Raises:
        ManticoreError: The index names other files than safetensors files beside it.
    """
    whole, index = (os.path.join(folder, file) for file in WEIGHT_FILES)
    if os.path.isfile(whole):
        return [whole]
    return [os.path.join(folder, shard) for shard in shards(index, (index, "save the component again."))]


def record(files: list) -> dict[str, str]:
    """{file: SHA-256} of a component's fetched safetensors files (and their index), for its entry.

    Args:
        files: Paths of them, in the Hub's cache.
    """
    index = Path(files[0]).with_name(WEIGHT_FILES[1])
    if Path(files[0]).name != WEIGHT_FILES[0] and index.is_file():
        files = [*files, index]
    return {os.path.basename(file): lfs_id(file) or sha256(file) for file in files}
