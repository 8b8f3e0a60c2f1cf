"""Which code a repository gets: what its hybrid needs of the files of `modeling/`, and the file that imports them.

A repository's own code cannot choose: it hands on what it carries (`modeling/carried_manticore.py`).
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from manticore_hf.modeling import carried_manticore
from manticore_hf.modeling.carried_manticore import CODE, ENTRY, PARTS, install_copying

ALWAYS = {"configuration_manticore": ("ManticoreConfig",), "base_manticore": ("ManticoreModel",)}
"""Classes for the Auto classes, in files that every repository has."""
MADE_FOR = "text", "labels"


def _calls(*names):
    return lambda config: any(name in code for code in map(vars, _modules(config)) for name in names)


def _may_run_kernels(config):
    """Whether Transformers runs installed packages' kernels, or those that `kernels` brings, in functions' places."""
    found = [one for code in map(vars, _modules(config)) for one in code.values()]
    functions = any(isinstance(one, FunctionType) and "implementation" in one.__code__.co_freevars for one in found)
    return functions or any(isinstance(one, nn.Module) and type(one).forward.__closure__ for one in found)


def _modules(config):
    """The modules of Transformers that hold the components' architectures."""
    for name in config.component_names:
        sub = getattr(config, name)
        for one, mapping in ((sub, MODEL_FOR_CAUSAL_LM_MAPPING), (sub.get_text_config(), MODEL_MAPPING)):
            found = mapping.get(type(one), ())
            yield from (sys.modules[cls.__module__] for cls in (found if isinstance(found, tuple) else (found,)))


BY_ARCHITECTURE: dict[str, Callable[[PreTrainedConfig], bool]] = {
    "mixers_manticore": _may_run_kernels,
    "scan_manticore": _calls("mamba_selective_scan"),
    "ssd_manticore": _calls("mamba2_chunk_scan", "mamba2_selective_state_update"),
    "recurrent_manticore": _calls("RecurrentGemmaRecurrentBlock"),
}
"""Whether the components' classes ask for a file of `PARTS`."""
BY_CLASS = {"modeling_manticore": "text", "outputs_manticore": "text", "heads_manticore": "labels"}
"""Which of MADE_FOR a file of `PARTS` is for."""


def carried(config: PreTrainedConfig, made_for: tuple[str, ...] | None = None) -> list[str]:
    """Names of the files of `PARTS` that a hybrid needs.

    Args:
        config: Its configuration.
        made_for: Some of `MADE_FOR`; default: by the classes that were saved.
    """
    made_for = _made_for(config) if made_for is None else made_for
    needed = {name: one.needed or BY_ARCHITECTURE.get(name) for name, one in PARTS.items()}
    return [name for name in PARTS if (BY_CLASS[name] in made_for if name in BY_CLASS else needed[name](config))]


def _made_for(config):
    """Of what is saved, which of MADE_FOR: both, where the class alone does not say it."""
    saved = {str(name) for name in config.architectures or ("ManticoreForCausalLM",)}
    return tuple(kind for file, kind in BY_CLASS.items() if saved & set(PARTS[file].classes)) or MADE_FOR


def entry_code(names: list[str]) -> str:
    """The text of `ENTRY` for a hybrid that carries these files of `PARTS`."""
    imported = ALWAYS | {name: PARTS[name].classes for name in names}
    return "\n".join(
        [
            '"""The classes of this hybrid, and the code that it needs beside what all hybrids have."""',
            "",
            "# ruff: noqa: F401",
            "from .carried_manticore import absent as __getattr__  # of classes that are not here",
            *(f"from .{name} import {', '.join(classes) or '__name__ as _'}" for name, classes in imported.items()),
            "",
        ]
    )


def copy_code(directory: str | os.PathLike, config: PreTrainedConfig, made_for: tuple[str, ...] | None = None) -> None:
    """Copies the code that a hybrid needs; see `carried_manticore.copy_code`."""
    names = carried(config, made_for)
    for file in Path(carried_manticore.__file__).parent.glob("*.py"):
        if file.stem in names or (CODE.fullmatch(file.name) and file.stem not in PARTS):
            shutil.copyfile(file, Path(directory) / file.name)
    (Path(directory) / ENTRY).write_text(entry_code(names), encoding="utf-8")


def install() -> None:
    """Lets the package's hybrids be saved with the code they need; again changes nothing."""
    install_copying(copy_code)
