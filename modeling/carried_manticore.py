"""Which files of code a repository carries: those that every hybrid needs, and by its kind some others.

`PARTS` is the one table of the others. They may import every file; nothing imports them but one another: where a hybrid
needs one, it is reached by `optional`, which says in a sentence that a repository does not carry it. Transformers
fetches what a file imports by lines that begin with `from .`, also inside of functions and of `try`: so they are
imported in `ENTRY` alone, the file that a repository's `auto_map` names. The package, which has all of them, chooses
those that a new repository gets, and writes its `ENTRY` (`manticore_hf.utils.carried`).
"""

import importlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedConfig

from .settings_manticore import ManticoreError

ENTRY = "hybrid_manticore.py"


@dataclass(frozen=True)
class Part:
    """A file that some hybrids need.

    Attributes:
        what: What it is for, as "carries no code for ..." ends.
        needed: Called with a configuration; whether its settings ask for the file. None: they do not say, and who
            carries the file needs it.
        classes: What the Auto classes load from it.
    """

    what: str
    needed: Callable[[PreTrainedConfig], bool] | None = None
    classes: tuple[str, ...] = ()


def _is_cut(config):
    return config.num_blocks > 1 or config.route is not None


def _mixes(config):
    return config.embeddings != "native"


def _some_has(key):
    return lambda config: any(entry.get(key) is not None for entry in config.components)


PARTS = {
    "modeling_manticore": Part("generating text", classes=("ManticoreForCausalLM",)),
    "outputs_manticore": Part("generating text"),
    "heads_manticore": Part(
        "classification", classes=("ManticoreForSequenceClassification", "ManticoreForTokenClassification")
    ),
    "layer_stack_manticore": Part("several blocks or bridges", lambda config: _is_cut(config) or config.bridges),
    "projectors_manticore": Part("mixed embeddings", lambda config: _is_cut(config) or _mixes(config)),
    "shared_manticore": Part("mixed embeddings", lambda config: _mixes(config) or _is_cut(config) and not config.route),
    "gate_manticore": Part("mixtures by the token", lambda config: config.mixture != "static" and not config.route),
    "path_manticore": Part("pruned hybrids", lambda config: config.route is not None),
    "code_manticore": Part("components with code of their own", _some_has("code")),
    "transplant_manticore": Part("transplanted vocabularies", _some_has("transplant")),
    "mixers_manticore": Part("recurrent components"),
    "scan_manticore": Part("Mamba and its kin"),
    "ssd_manticore": Part("Mamba-2 and its kin"),
    "recurrent_manticore": Part("RecurrentGemma"),
    "bridges": Part("bridges between components", lambda config: bool(config.bridges)),
    "gate_lag": Part("weights that are kept for several tokens", lambda config: config.holds_weights),
    "past_losses": Part("mixtures that go by past losses", lambda config: config.reads_past_losses),
    **dict.fromkeys(
        ("aligned_bytes", "aligned_mapping", "aligned_reading", "aligned_tokenizers", "aligned_hybrid"),
        Part("several tokenizers", lambda config: bool(config.aligned)),
    ),
}

CODE = re.compile(rf"(\w+_manticore|{'|'.join(PARTS)})\.py")
"""Names of the code files of hybrids."""

_loaded, _installed = {}, []


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
    needed = PARTS[name].needed
    return carries(name) if needed is None else needed(config)


def check_carried(config: PreTrainedConfig) -> None:
    """Raises ManticoreError if the settings of a hybrid ask for a file that is not here."""
    for name in PARTS:
        if is_needed(name, config) and not carries(name):
            raise _missing(name)


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


def install_copying(copy: Callable) -> None:
    """Makes `copy` the `copy_code` of this process's copy of this file."""
    _installed.append(copy)


def copy_code(directory: str | os.PathLike, config: PreTrainedConfig, made_for: tuple[str, ...] | None = None) -> None:
    """Copies the code that a hybrid needs, so that what is saved loads where the package is not installed.

    Args:
        directory: Where to.
        config: The hybrid's configuration.
        made_for: What the saved class is for, "text" or "labels"; default: by the configuration. A repository hands its
            code on as it is.

    Raises:
        ManticoreError: This code is a repository's, which does not carry a file that the hybrid needs by now.
    """
    if _installed:
        _installed[-1](directory, config, made_for)
        return
    check_carried(config)
    for file in Path(__file__).parent.glob("*.py"):
        if CODE.fullmatch(file.name):
            shutil.copyfile(file, Path(directory) / file.name)
