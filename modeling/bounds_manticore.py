"""What the other files build on: errors, addresses and configurations of components, and the making of their models.

It is imported first, so it says if Transformers is too old. What a file says is believed here as Transformers believes
it, but for the addresses and code of components, which belong to another owner. Who loads with the package is better
protected, by the `Guard` that it installs.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
import transformers

TESTED = (5, 24), (5, 24)  # first and last minor version of Transformers that the tests ran with
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if VERSION < TESTED[0]:
    raise ImportError(
        f"A manticore hybrid needs Transformers 5.24 or newer; {transformers.__version__} is installed: "
        "pip install -U 'transformers>=5.24,<6'"
    )

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from .settings_manticore import ManticoreError  # noqa: E402

# What a component does with its outputs is the hybrid's to say.
_OF_THE_HYBRID = ("model_type", "return_dict", "use_return_dict", "output_hidden_states", "tie_last_hidden_states")


class Guard:
    """What is asked before a configuration is believed and a model is made; this one asks nothing.

    A published repository has no other: its author could delete one, and whoever runs its code trusts its author.
    Importing `manticore_hf` installs its own (`manticore_hf.utils.defence`), for what it loads and inspects.
    `what` is how a message calls the thing; every method may raise ManticoreError.
    """

    def plain(self, what: str, values: object) -> None:
        """Before any value is looked at."""

    def beside(self, path: str, folder: str) -> None:
        """Before a file in a hybrid's directory is read that goes into what is saved of it."""

    def reading(self, source: str) -> AbstractContextManager:
        """Context in which Transformers reads a hybrid's config.json."""
        return contextlib.nullcontext()

    def file(self, what: str, values: dict) -> None:
        """Before Transformers reads a component's config.json."""

    def settings(self, what: str, values: dict, cls: type) -> dict:
        """A copy of the settings in a config.json that may reach the configuration class `cls`."""
        return copy.deepcopy(values)

    def given(self, settings: dict) -> dict:
        """A hybrid's own settings as they are taken, of those in its configuration."""
        return {key: value for key, value in settings.items() if key != "preset"}

    def entries(self, entries: object) -> None:
        """Before the list of a hybrid's components is walked through."""

    def entry(self, name: str, entry: dict) -> None:
        """Before a component's entry in the hybrid's configuration is taken."""

    def component(self, what: str, config: PreTrainedConfig) -> None:
        """Before a component's configuration, wherever it came from, is taken."""

    def general(self, what: str, values: dict) -> None:
        """Before a hybrid's settings beyond its own (ids, dtype, ...) are taken."""

    def hybrid(self, config: PreTrainedConfig) -> None:
        """When all of a hybrid's components are known, and before its settings are used."""

    def construct(self, what: str, make: Callable, beside: tuple | list) -> torch.nn.Module:
        """The module that `make()` makes; `beside`: modules that are there already and stay."""
        return make()

    def positions(self, segments: Iterable, positions: torch.Tensor, length: int, explicit: bool) -> None:
        """Before `segments`, (component, its segment), run at [batch or 1, time] positions, given or below `length`."""

    def running(self, what: str) -> AbstractContextManager:
        """Context in which a model is made or run without storage."""
        return contextlib.nullcontext()

    def checkpoint(
        self, model: PreTrainedModel, tensors: dict, rename: Callable, ties: dict, quantizer: object, ignored: bool
    ) -> None:
        """Before a hybrid's tensors {key: tensor or lazy slice} are read; `rename` and `ties` as in `overlay`."""


_guards = [Guard()]


def guard() -> Guard:
    """The guard of this process: the one that was installed last."""
    return _guards[-1]


def install_guard(new: Guard) -> None:
    """Makes `new`, a Guard, the guard of this process."""
    _guards.append(new)


def show(value: object) -> str:
    """A value as a message shows it: not longer than a line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


def reason(err: Exception) -> str:
    """What an error that is not ours says, as part of a message."""
    return " ".join(f"{type(err).__name__}: {err}".split())[:1000]


def check_reference(name: str, repo_id: object, revision: object, subfolder: object = None) -> None:
    """Raises ManticoreError unless a component's address is one on the Hub: no path, no URL.

    Reading the weights replaces a branch or tag, which can move, by its commit.
    """
    what = f"Component {name!r}"
    named = isinstance(repo_id, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", repo_id)
    if not named or ".." in repo_id:
        raise ManticoreError(f"{what}: repo_id={show(repo_id)} is not a Hub repository id ('organisation/name').")
    named = isinstance(revision, str) and re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)*", revision)
    hashlike = named and re.fullmatch(r"[0-9a-fA-F]{7,}", revision)  # an abbreviated commit may fit several
    if not named or ".." in revision or len(revision) > 200 or hashlike and not is_commit(revision):
        raise ManticoreError(f"{what}: revision={show(revision)} of {show(repo_id)} is not a 40-hex commit.")
    plain = isinstance(subfolder, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)*", subfolder)
    if subfolder and (not plain or ".." in subfolder.split("/")):
        raise ManticoreError(f"{what}: subfolder={show(subfolder)} is not a plain sub-folder of a repository.")


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which cannot move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def check_dtype(what: str, value: object) -> None:
    """Raises ManticoreError unless a value names a dtype of torch, or is one, or None."""
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not (dtype is None and value is None or isinstance(dtype, torch.dtype)):
        raise ManticoreError(f"{what}: dtype={show(value)} is not a torch dtype; give for example 'bfloat16'.")


def is_causal_lm(model_type: str) -> bool:
    """Whether a model type that is known to the Auto classes has a causal LM, and is no hybrid."""
    known = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING
    return known and model_type != "manticore"


def build_config(name: str, values: dict, what: str | None = None) -> PreTrainedConfig:
    """The configuration of component `name` from what its config.json says.

    Raises:
        ManticoreError: Says what is wrong with it; `what` names it there, by default name and model type.
    """
    given, what = what, what or f"Component {name!r}"
    guard().file(what, values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ManticoreError(f"{what} has model_type={show(model_type)}, which this Transformers does not know.")
    if not is_causal_lm(model_type):
        raise ManticoreError(f"{what} is not a causal LM (model_type {model_type!r}); only causal LMs can be joined.")
    what, cls = given or f"Component {name!r} ({model_type})", CONFIG_MAPPING[model_type]
    values = guard().settings(what, {key: value for key, value in values.items() if key not in _OF_THE_HYBRID}, cls)
    for key in {"dtype", "torch_dtype"} & set(values):
        check_dtype(what, values[key])
        values[key] = values[key].removeprefix("torch.") if isinstance(values[key], str) else values[key]
    if values.get("quantization_config") is not None:
        raise _packed(what)
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as err:  # Transformers checks its configurations in many ways, with as many kinds of errors
        raise ManticoreError(f"{what}: its {model_type!r} configuration is invalid: {reason(err)}") from err


def check_component(name: str, config: PreTrainedConfig) -> None:
    """Raises ManticoreError unless the configuration of component `name` is one that a hybrid can be built from."""
    what = f"Component {name!r} ({config.model_type})"
    guard().component(what, config)
    if getattr(config, "quantization_config", None) is not None:
        raise _packed(what)
    check_dtype(what, config.dtype)


def _packed(what):
    return ManticoreError(
        f"{what} has a quantization_config: its weights are packed and cannot be cut or referenced. Give the "
        "repository with its weights in floating point; the hybrid can be quantised when it is loaded."
    )


# ---- making a model -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Context in which a model is made of a configuration; whatever fails is a ManticoreError that names `what`."""
    try:
        yield
    except ManticoreError:
        raise
    except ImportError as err:  # a package is missing: nothing is wrong with the model
        raise ManticoreError(f"{what} needs a package that is not installed: {err}") from err
    except Exception as err:
        raise ManticoreError(f"{what} cannot be built from its configuration: {reason(err)}") from err


@contextlib.contextmanager
def trying(what: str) -> Iterator[None]:
    """`explained`, watched by the guard: a model is made or run without storage."""
    with explained(what), guard().running(what):
        yield


def construct(what: str, make: Callable, beside: tuple | list = ()) -> torch.nn.Module:
    """The module that `make()` makes, which is called twice if the guard counts it first.

    Raises:
        ManticoreError: It cannot be made, or the guard finds it too large `beside` the modules that stay.
    """
    with explained(what):
        return guard().construct(what, make, beside)


def build_component(what: str, config: PreTrainedConfig, beside: tuple | list = ()) -> PreTrainedModel:
    """A component's module with initial weights, of Transformers' own class; ManticoreError as in `construct`."""
    make = partial(AutoModelForCausalLM.from_config, config, trust_remote_code=False)
    module = construct(what, lambda: make(dtype=torch.get_default_dtype()), beside)
    for find in ("get_input_embeddings", "get_output_embeddings"):
        if not isinstance(getattr(getattr(module, find)(), "weight", None), torch.Tensor):
            raise ManticoreError(f"{what} cannot be joined: its {find}() gives no module with a weight.")
    return module
