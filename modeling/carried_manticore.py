"""Which files of code a repository carries: those that every hybrid needs, and by its configuration some others.

`PARTS` is the one table of the others. They may import every file; nothing imports them but one another: where a hybrid
needs one, it is reached by `optional`, which says in a sentence that a repository does not carry it. `copy_code` writes
the files, and `ENTRY`, the file that a repository's `auto_map` names. Transformers fetches what a file imports by lines
that begin with `from .`, also inside of functions and of `try`: so the others are imported there and nowhere else.
"""

import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from .settings_manticore import ManticoreError

ENTRY = "hybrid_manticore.py"
ALWAYS = {"configuration_manticore": ("ManticoreConfig",), "base_manticore": ("ManticoreModel",)}
"""Classes for the Auto classes, in files that every repository has."""


@dataclass(frozen=True)
class Part:
    """A file that some hybrids need.

    Attributes:
        what: What it is for, as "carries no code for ..." ends.
        needed: Called with a configuration and what a hybrid is made for (`MADE_FOR`); whether the hybrid needs it.
        classes: What the Auto classes load from it.
    """

    what: str
    needed: Callable[[PreTrainedConfig, tuple[str, ...]], bool]
    classes: tuple[str, ...] = ()


def _is_cut(config, made_for=()):
    return config.num_blocks > 1 or config.route is not None


def _some_has(key):
    return lambda config, made_for: any(entry.get(key) is not None for entry in config.components)


def _is_for(kind):
    return lambda config, made_for: kind in made_for


def _calls(*names):
    return lambda config, made_for: any(name in code for code in map(vars, _modules(config)) for name in names)


def _may_run_kernels(config, made_for=()):
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


MADE_FOR = "text", "labels"

PARTS = {
    "modeling_manticore": Part("generating text", _is_for("text"), ("ManticoreForCausalLM",)),
    "outputs_manticore": Part("generating text", _is_for("text")),
    "heads_manticore": Part(
        "classification", _is_for("labels"), ("ManticoreForSequenceClassification", "ManticoreForTokenClassification")
    ),
    "layer_stack_manticore": Part(
        "several blocks or bridges", lambda *of: _is_cut(*of) or PARTS["bridges"].needed(*of)
    ),
    "shared_manticore": Part(
        "several blocks or mixed embeddings", lambda config, made_for: _is_cut(config) or config.embeddings != "native"
    ),
    "path_manticore": Part("pruned hybrids", lambda config, made_for: config.route is not None),
    "code_manticore": Part("components with code of their own", _some_has("code")),
    "transplant_manticore": Part("transplanted vocabularies", _some_has("transplant")),
    "mixers_manticore": Part("recurrent components", _may_run_kernels),
    "scan_manticore": Part("Mamba and its kin", _calls("mamba_selective_scan")),
    "ssd_manticore": Part("Mamba-2 and its kin", _calls("mamba2_chunk_scan", "mamba2_selective_state_update")),
    "recurrent_manticore": Part("RecurrentGemma", _calls("RecurrentGemmaRecurrentBlock")),
    "bridges": Part("bridges between components", lambda config, made_for: bool(config.bridges)),
    "gate_lag": Part("weights that are kept for several tokens", lambda config, made_for: config.holds_weights),
    "past_losses": Part("mixtures that go by past losses", lambda config, made_for: config.reads_past_losses),
    **dict.fromkeys(
        ("aligned_bytes", "aligned_mapping", "aligned_reading", "aligned_tokenizers", "aligned_hybrid"),
        Part("several tokenizers", lambda config, made_for: bool(config.aligned)),
    ),
}

CODE = re.compile(rf"(\w+_manticore|{'|'.join(PARTS)})\.py")
"""Names of the code files of hybrids."""

_loaded = {}


def carries(name: str) -> bool:
    """Whether the file of `PARTS` of this name is here."""
    return (Path(__file__).parent / f"{name}.py").is_file()


def optional(name: str) -> ModuleType:
    """The file of `PARTS` of this name, as a module.

    Raises:
        ManticoreError: This repository does not carry it.
    """
    if name not in _loaded:
        if not carries(name):
            raise _missing(name)
        _loaded[name] = importlib.import_module(f".{name}", __package__)
    return _loaded[name]


def is_needed(name: str, config: PreTrainedConfig) -> bool:
    """Whether a hybrid of this configuration needs the file of `PARTS` of this name."""
    return PARTS[name].needed(config, _made_for(config))


def absent(name: str) -> object:
    """For an entry file's `__getattr__`: what a repository says of a class that it carries no code for."""
    for file, one in PARTS.items():
        if name in one.classes:
            raise _missing(file)
    raise AttributeError(name)


def _missing(name):
    return ManticoreError(
        f"This repository carries no code for {PARTS[name].what} ({name}.py): load the hybrid with the package "
        "(pip install manticore-hf; import manticore_hf) and save it again with it."
    )


def _made_for(config):
    """Of what is saved, which of MADE_FOR: both, where the class alone does not say it."""
    saved = {str(name) for name in config.architectures or ("ManticoreForCausalLM",)}
    known = {"text": "modeling_manticore", "labels": "heads_manticore"}
    return tuple(kind for kind, file in known.items() if saved & set(PARTS[file].classes)) or MADE_FOR


def carried(config: PreTrainedConfig, made_for: tuple[str, ...] | None = None) -> list[str]:
    """Names of the files of `PARTS` that a hybrid needs.

    Args:
        config: Its configuration.
        made_for: Some of `MADE_FOR`; default: by the classes that were saved.
    """
    made_for = _made_for(config) if made_for is None else made_for
    return [name for name, one in PARTS.items() if one.needed(config, made_for)]


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
    """Copies the code that a hybrid needs, so that what is saved loads where the package is not installed.

    Args:
        directory: Where to.
        config: The hybrid's configuration.
        made_for: As in `carried`.

    Raises:
        ManticoreError: This code is a repository's, which does not carry a file that the hybrid needs by now.
    """
    names = carried(config, made_for)
    for name in names:
        if not carries(name):
            raise _missing(name)
    for file in Path(__file__).parent.glob("*.py"):
        if file.stem in names or (CODE.fullmatch(file.name) and file.stem not in PARTS and file.name != ENTRY):
            shutil.copyfile(file, Path(directory) / file.name)
    (Path(directory) / ENTRY).write_text(entry_code(names), encoding="utf-8")
