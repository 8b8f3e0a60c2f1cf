"""Where a hybrid's components are, as they were before they were joined: what it is measured against."""

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from manticore_hf.compose.components import ComponentSpec, resolve
from manticore_hf.compose.convert.converted_files import convert_files
from manticore_hf.compose.convert.read_checkpoint import is_gguf
from manticore_hf.modeling.bounds_manticore import ManticoreError
from manticore_hf.training.asked import composed_from
from manticore_hf.training.recipe import find_beside, load_kept_recipe
from manticore_hf.utils.formatting import listed

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers")  # of a component: what training leaves as it was


def find_originals(
    folder: str | Path, config: PreTrainedConfig, components: Sequence[str] | None = None
) -> list[str | None] | None:
    """Where a hybrid's components are, to measure them as they came.

    Args:
        folder: Directory of the hybrid, or its Hub repo.
        config: Its configuration.
        components: Directories, repositories or GGUF files, in the hybrid's order, as a user names them. Default: by
            what `compose` was asked for, or else by the recipe.

    Returns:
        For each component its directory or repository, or None where the hybrid knows the address, or nothing is there
        any more. None if nothing is known.

    Raises:
        ManticoreError: As many as the hybrid has are not named, or one is of another kind than the hybrid's.
    """
    names = config.component_names
    if components is None:
        return _known_sources(folder, config)
    if len(components) != len(names):
        raise ManticoreError(f"components: {listed(components)} are given; the hybrid has {names}.")
    if any(map(is_gguf, components)) and not os.path.isdir(folder):
        raise ManticoreError(
            f"components: GGUF files are converted in the hybrid's directory, and {folder} is none: give the "
            "directories that `manticore-hf convert` makes of them."
        )
    found = [os.fspath(one) for one in convert_files(components, folder)]
    for source, entry in zip(found, config.components):
        name, spec = entry["name"], ComponentSpec(source, subfolder=entry["subfolder"])
        one, own = resolve(spec, {}, weights=False), getattr(config, name)
        same = all(getattr(one.config, key, None) == getattr(own, key, None) for key in _SHAPE)
        if not same or one.name != name and one.name in names:
            raise ManticoreError(
                f"components: {source!r} ({_shape(one.config)}) is given for {name!r} ({_shape(own)}): name them "
                f"in the hybrid's order, {names}."
            )
    return found


def _shape(config):
    return ", ".join(str(getattr(config, key, None)) for key in _SHAPE)


def _known_sources(folder, config):
    if all(entry["repo_id"] for entry in config.components):
        return None
    file = Path(folder) / "recipe.yaml"
    try:
        found = composed_from(folder)
        if not any(found or ()) and file.is_file():
            recipe = load_kept_recipe(file)
            found = [find_beside(source, recipe) for source in recipe.components]
    except ManticoreError:
        return None
    if found is None or len(found) != len(config.components):
        return None
    pairs = zip(found, config.components)
    return [one if entry["repo_id"] is None and one and os.path.isdir(one) else None for one, entry in pairs]
