"""Configuration of a hybrid: its components, how they are cut, joined and mixed.

A hybrid's `config.json` carries the full configuration of every component, so that building the model needs no other
repository; only the component *weights* are references (repo id + 40-hex commit).
"""

import copy
import re
from itertools import accumulate
from typing import Any

# First, because it says what is wrong where Transformers is too old for what follows
from .bounds_manticore import ManticoreError, build_config, check_component, check_reference, guard, show

# isort: split
from transformers import PreTrainedConfig

from .carried_manticore import ENTRY, carries, optional
from .settings_manticore import CHOICES, SETTINGS

FORMAT_VERSION = 1
"""Version of the repository layout. Raised when an older package could no longer read a newer repository."""

_ENTRY = ENTRY.removesuffix(".py")
AUTO_MAP = {
    "AutoConfig": f"{_ENTRY}.ManticoreConfig",
    "AutoModel": f"{_ENTRY}.ManticoreModel",
    "AutoModelForCausalLM": f"{_ENTRY}.ManticoreForCausalLM",
    "AutoModelForSequenceClassification": f"{_ENTRY}.ManticoreForSequenceClassification",
    "AutoModelForTokenClassification": f"{_ENTRY}.ManticoreForTokenClassification",
    # The one class by which `transformers serve` loads remote code; its decisions are read from a causal LM's logits
    "AutoModelForDecision": f"{_ENTRY}.ManticoreForCausalLM",
}


class ManticoreConfig(PreTrainedConfig):
    """Configuration of a hybrid of K components in S blocks.

    Args:
        components: One dict per component: `name` (a Python identifier), `config` (a configuration or its dict, with
            `model_type`), and where its weights live: `repo_id`, `revision` (40-hex commit), `subfolder`, `weights`
            ("reference": read from that repo; "embedded": kept in the hybrid's own file), `files` (of a reference:
            `{safetensors file: its SHA-256}`), `license` (as the component's card states it), `transplant` (how its
            embedding and head were made for another tokenizer, which are then the hybrid's own; else None), `tokenizer`
            (of a hybrid with several: `{"files": {file: its SHA-256}}`; else None).
        calibration: What the projectors were solved from (tokens and reference component), or None.
        objective: What of mixture_space and the loss weights is not given, but for the first training stage of a
            one-block hybrid to choose, by how complementary the components' errors are: {"open": [...]}; then what it
            measured, {"chosen": [...], "gain": ...}. None: all is as given.
        route: One component name per block once pruned; None for a soft hybrid.
        manticore_version: Version of the repository layout.
        **kwargs: The keys of `SETTINGS` (settings_manticore.py; S is `num_blocks`), as the package has filled them in;
            and what every configuration of Transformers takes.

    Raises:
        ManticoreError: A key has an impossible value; the message names the key, the value and the choices.
    """

    model_type, use_cache = "manticore", True
    keys_to_ignore_at_inference = [
        "cache", "past_key_values", "hidden_states", "attentions", "mixture_loss", "component_losses", "ensemble_loss",
        "weights", "head_state",
    ]  # fmt: skip
    # Transformers 5.24 asks at every read whether layers differ; decoding reads some 80 times a token, and has no such.
    __getattribute__ = object.__getattribute__

    def __init__(
        self,
        components: list[dict] | None = None,
        calibration: dict | None = None,
        objective: dict | None = None,
        route: list[str] | None = None,
        manticore_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        what = "The hybrid's configuration"
        guard().plain(what, locals())
        given = {key: kwargs.pop(key, default) for key, default in SETTINGS.items()}
        given |= {"calibration": calibration, "objective": objective, "route": route}
        guard().general(what, kwargs)
        if type(manticore_version) is not int or not 1 <= manticore_version <= FORMAT_VERSION:
            raise ManticoreError(
                f"This hybrid has format version {show(manticore_version)}; the installed code reads up to "
                f"{FORMAT_VERSION}. Upgrade manticore-hf, or load with trust_remote_code=True."
            )
        self.manticore_version = manticore_version
        for key, value in guard().given(given).items():
            if value is not None and value not in CHOICES.get(key, (value,)):
                raise ManticoreError(f"{key}={show(value)} is unknown; choose one of {list(CHOICES[key])}.")
            setattr(self, key, copy.deepcopy(value))
        guard().entries(components)
        self.components, self._component_names = [], []
        for entry in components or ():
            self._add_component(entry)
        subs = [getattr(self, name) for name in self._component_names]
        # Read by Transformers (generation, pipelines) and never free choices here: they follow from the components.
        width, widest = kwargs.pop("hidden_size", None), max((sub.hidden_size for sub in subs), default=None)
        kwargs.pop("num_hidden_layers", None), kwargs.pop("max_position_embeddings", None)
        # A pruned hybrid keeps the width its projectors were made for, whoever brought it.
        self.hidden_size = width if route and subs and type(width) is int and width >= widest else widest
        guard().hybrid(self)
        self.num_hidden_layers = self.num_blocks
        limits = [getattr(sub, "max_position_embeddings", None) for sub in subs]
        limits = [n for n in limits if type(n) is int and n > 0]  # -1: there is none
        self.max_position_embeddings = min(limits, default=None)
        kwargs.setdefault("tie_word_embeddings", False)
        # Transformers sets both on every sub-config, even to None: a component would lose the one it was loaded with.
        unset = [key for key in ("attn_implementation", "experts_implementation") if kwargs.get(key) is None]
        kept = [(sub, f"_{key}_internal", getattr(sub, f"_{key}")) for key in unset for sub in subs]
        if taken := {"_component_names", *self._component_names} & set(kwargs):
            raise ManticoreError(f"{min(taken)!r} is set beside 'components', which already says it; remove it.")
        try:
            super().__init__(**kwargs)
        except Exception as err:  # Transformers checks with as many kinds of errors as there are checks
            raise ManticoreError(f"The hybrid's configuration is invalid: {type(err).__name__}: {err}") from err
        for sub, key, value in kept:
            setattr(sub, key, value)

    def _add_component(self, entry):
        entry, name = dict(entry), entry.get("name")
        guard().entry(name, entry)
        sub = entry.pop("config", None)
        sub = sub if sub is not None else getattr(self, name, None)
        if isinstance(sub, dict):
            # Code of another component may have been registered for its model type
            if entry.get("code") is not None or carries("code_manticore"):
                optional("code_manticore").require(name, entry, sub)
            sub = build_config(name, sub)
        if not isinstance(sub, PreTrainedConfig):
            raise ManticoreError(f"Component {name!r} has no configuration (components[...]['config'] is {show(sub)}).")
        check_component(name, sub)
        weights = entry.setdefault("weights", "reference" if entry.get("repo_id") else "embedded")
        if weights == "reference" or entry.get("repo_id") is not None:
            check_reference(name, *(entry.get(key) for key in ("repo_id", "revision", "subfolder")))
        for file in entry.get("files") or ():
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors(\.index\.json)?", str(file)):
                raise ManticoreError(
                    f"Component {name!r}: {show(file)} in files is not a plain name of a safetensors file."
                )
        keys = _ENTRY_KEYS if entry.get("tokenizer") is None else (*_ENTRY_KEYS, "tokenizer")  # as earlier versions do
        entry = {key: entry.get(key) for key in keys}
        setattr(self, name, sub)
        self.components.append(entry)
        self._component_names.append(name)

    def _check_mixture_weights(self, weights):
        if weights is None:
            return None
        rows, columns = self.num_blocks, len(self._component_names)
        try:
            weights = [None if row is None else [float(w) for w in row] for row in weights]
            good = len(weights) == rows and all(
                len(row) == columns and all(0 <= w <= 1 for w in row) and abs(sum(row) - 1) < 1e-3
                for row in weights
                if row is not None
            )
        except (TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise ManticoreError(
                f"mixture_weights={show(weights)} must be {rows} rows (blocks) of {columns} weights in [0, 1] "
                f"(components {self._component_names}), each row summing to 1, or None for a block that learns them."
            )
        return None if all(row is None for row in weights) else weights

    @property
    def component_names(self) -> list[str]:
        """Names of the components, in order."""
        return list(self._component_names)

    @property
    def aligned(self) -> tuple[str, ...]:
        """Names of the components that read text by tokenizers of their own."""
        own = [entry["name"] for entry in self.__dict__.get("components", ()) if entry.get("tokenizer") is not None]
        return tuple(name for name in own if name != self.tokenizer_component)

    @property
    def reads_past_losses(self) -> bool:
        """Whether the output mixture goes by what each component has lost on the tokens so far."""
        return self.route is None and (self.mixture == "online" or self.mixture == "token" and self.gate_past_losses)

    @property
    def holds_weights(self) -> bool:
        """Whether weights per token are kept for several tokens (`gate_lag`)."""
        return self.route is None and self.mixture != "static" and self.gate_lag > 1

    @property
    def sub_configs(self) -> dict[str, type]:
        """Class of each component's configuration by component name (Transformers walks these)."""
        return {name: type(getattr(self, name)) for name in self.__dict__.get("_component_names", [])}

    def bounds(self, name: str) -> list[int]:
        """Cumulative layer bounds [0, ..., depth] of a component's S segments."""
        return [0, *accumulate(self.block_layers[name])]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> "ManticoreConfig":
        """As in Transformers, for what a file says: instructions to load code or files are not taken from it.

        Beside Transformers' arguments it takes `trust_component_code`: names of components whose own code may be run.

        Raises:
            ManticoreError: It is no configuration of a hybrid.
        """
        what = "The hybrid's config.json"
        guard().plain(what, config_dict)
        settings = guard().settings(what, config_dict, cls)
        if trusted := kwargs.pop("trust_component_code", None):
            optional("code_manticore").run_trusted(trusted, config_dict)
        # For its classes the caller decides (trust_remote_code).
        classes = {"auto_map": config_dict["auto_map"]} if isinstance(config_dict.get("auto_map"), dict) else {}
        return super().from_dict({**settings, **classes}, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> tuple[dict, dict]:
        """As in Transformers."""
        with guard().reading(pretrained_model_name_or_path):
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> "ManticoreConfig":
        """A hybrid is a text model: the configuration itself."""
        return self

    def to_dict(self) -> dict:
        """Plain dict; each component's configuration sits inside its entry of `components`."""
        out = super().to_dict()
        out.pop("_component_names", None)
        for entry in out["components"]:
            sub = copy.deepcopy(getattr(self, entry["name"])).to_dict()
            for private in ("transformers_version", "_name_or_path", "auto_map"):
                sub.pop(private, None)
            entry["config"] = sub
            out.pop(entry["name"], None)
        out["auto_map"] = dict(AUTO_MAP)
        return out


def component_depth(config: PreTrainedConfig) -> int:
    """Number of layers of a component."""
    return config.get_text_config().num_hidden_layers


_ENTRY_KEYS = "name", "repo_id", "revision", "subfolder", "weights", "files", "license", "code", "transplant"
