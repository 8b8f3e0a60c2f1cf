"""Configuration of a hybrid: its components, how they are cut, joined and mixed.

A hybrid's `config.json` carries the full configuration of every component, so that building the model needs no other
repository; only the component *weights* are references (repo id + 40-hex commit).
"""

import copy
from dataclasses import fields
from itertools import accumulate
from typing import Any

# First, because it says what is wrong where Transformers is too old for what follows
from .bounds_manticore import ManticoreError, build_config, check_component, check_dtype, check_reference, guard, show

# isort: split
from transformers import PreTrainedConfig

from .carried_manticore import ENTRY, carries, optional
from .settings_manticore import CHOICES, FILLED, PRESETS, HybridSettings

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
            one-block hybrid to choose, by whether the components' strengths differ: {"open": [...]}; then what it
            measured, {"chosen": [...], "gain": ...}. None: all is as given.
        route: One component name per block once pruned; None for a soft hybrid.
        manticore_version: Version of the repository layout.
        **kwargs: The fields of `HybridSettings` (settings_manticore.py), where each has its meaning, choices and
            default (S is `num_blocks`); and what every configuration of Transformers takes.

    Raises:
        ManticoreError: A key has an impossible value; the message names the key, the value and the choices.
    """

    model_type = "manticore"
    keys_to_ignore_at_inference = [
        "cache", "past_key_values", "hidden_states", "attentions", "mixture_loss", "component_losses", "ensemble_loss",
        "weights", "head_state",
    ]  # fmt: skip
    # Transformers 5.24 asks at every read whether layers differ; decoding reads some 80 times a token, and has no such.
    __getattribute__ = object.__getattribute__

    def __init__(
        self, components=None, calibration=None, objective=None, route=None, manticore_version=FORMAT_VERSION, **kwargs
    ):
        what = "The hybrid's configuration"
        guard().plain(what, locals())
        given = HybridSettings(**{one.name: kwargs.pop(one.name, one.default) for one in fields(HybridSettings)})
        for key in ("dtype", "torch_dtype"):
            check_dtype(what, kwargs.get(key))
        guard().general(what, kwargs)
        if type(manticore_version) is not int or not 1 <= manticore_version <= FORMAT_VERSION:
            raise ManticoreError(
                f"This hybrid has format version {show(manticore_version)}; the installed code reads up to "
                f"{FORMAT_VERSION}. Upgrade manticore-hf, or load with trust_remote_code=True."
            )
        self.manticore_version = manticore_version
        if not isinstance(given.preset, str) or given.preset not in PRESETS:
            raise ManticoreError(f"preset={show(given.preset)} is unknown; choose one of {sorted(PRESETS)}.")
        for key in FILLED:
            value = getattr(given, key)
            value = PRESETS[given.preset][key] if value is None else value
            if key in CHOICES and value not in CHOICES[key]:
                raise ManticoreError(f"{key}={show(value)} is unknown; choose one of {list(CHOICES[key])}.")
            if key not in CHOICES:
                value = _nonnegative(key, value)
            setattr(self, key, value)
        for key in ("online_eta", "online_decay", "online_share"):
            setattr(self, key, _nonnegative(key, getattr(given, key), None if key == "online_eta" else 1))
        self.gate_past_losses = given.gate_past_losses
        if not isinstance(self.gate_past_losses, bool):
            raise ManticoreError(f"gate_past_losses={show(self.gate_past_losses)} must be true or false.")
        self.gate_lag = given.gate_lag
        if type(self.gate_lag) is not int or not 1 <= self.gate_lag <= 1 << 20:
            raise ManticoreError(f"gate_lag={show(self.gate_lag)} must be a whole number of tokens, 1 to 1,048,576.")
        left = ["mixture_space"] * (given.mixture_space is None)
        left += ["loss_weights"] * (given.mix_loss_weight is given.component_loss_weight is None)
        self.objective = {"open": left} if left and given.preset == "default" else objective
        if self.projector != "linear" and given.projector_init in (None, "calibrated"):
            self.projector_init = "identity"
        self.calibration = calibration
        if self.mix_loss_weight == self.component_loss_weight == 0:
            raise ManticoreError("mix_loss_weight and component_loss_weight are both 0: nothing would be trained.")

        self._component_names = []
        self.components = []
        for entry in _list_of_dicts(components):
            self._add_component(entry)
        self.num_blocks = given.num_blocks
        for key in ("topology", *(one.name for one in fields(HybridSettings) if one.name.startswith("bridge"))):
            setattr(self, key, copy.deepcopy(getattr(given, key)))
        if self.topology not in ("merge", "bridge") or self.topology == "merge" and self.bridges is not None:
            raise ManticoreError(
                f"topology={show(self.topology)} must be 'merge', or 'bridge' where bridges are given."
            )
        for key in ("num_blocks", "bridge_blocks"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 1:
                raise ManticoreError(f"{key}={show(getattr(self, key))} must be a positive integer.")
        key = "bridge_blocks" if self.topology == "bridge" else "num_blocks"
        self.block_layers = {name: [component_depth(getattr(self, name))] for name in self._component_names}
        if getattr(self, key) > 1 or given.block_layers is not None and carries("layer_stack_manticore"):
            self.block_layers = optional("layer_stack_manticore").layers_of_blocks(self, given.block_layers, key)
        self.reference_component = given.reference_component
        if not (route and isinstance(self.reference_component, str)):  # it may be one that the route dropped
            self.reference_component = self._check_name("reference_component", self.reference_component)
        self.tokenizer_component = self._check_name("tokenizer_component", given.tokenizer_component)
        self.route = None if route is None else optional("path_manticore").check_route(self, route)
        if self.route is not None:
            given.mixture_weights = [[float(name == one) for one in self._component_names] for name in self.route]
        self.mixture_weights = self._check_mixture_weights(given.mixture_weights)
        if self.topology == "bridge" and self._component_names and carries("bridges"):
            optional("bridges").check_bridges(self)

        subs = [getattr(self, name) for name in self._component_names]
        if self.aligned:
            optional("aligned_hybrid").check_aligned(self)
        sizes = {name: getattr(self, name).vocab_size for name in self._component_names if name not in self.aligned}
        vocab_size = given.vocab_size
        if vocab_size is None and len(set(sizes.values())) == 1:
            vocab_size = min(sizes.values())
        fits = type(vocab_size) is int and 0 < vocab_size <= min(sizes.values(), default=0)
        if subs and not (fits and (route or vocab_size == min(sizes.values()))):
            raise ManticoreError(
                f"The vocabularies differ in size: {sizes}, hybrid vocab_size={show(vocab_size)}. Components must "
                "share one vocabulary. Sizes may differ in padding rows only, which shows where every component comes "
                "with the same tokenizer; for instances load each and call model.resize_token_embeddings(n) with the "
                "same n. Really different vocabularies can be transplanted (manticore_hf.compose_transplanted)."
            )
        self.vocab_size = vocab_size
        # Read by Transformers (generation, pipelines) and never free choices here: they follow from the components.
        width, widest = kwargs.pop("hidden_size", None), max((sub.hidden_size for sub in subs), default=None)
        kwargs.pop("num_hidden_layers", None), kwargs.pop("max_position_embeddings", None)
        # A pruned hybrid keeps the width its projectors were made for, whoever brought it.
        self.hidden_size = width if route and type(width) is int and width >= widest else widest
        guard().hybrid(self)
        self.num_hidden_layers = self.num_blocks
        limits = [getattr(sub, "max_position_embeddings", None) for sub in subs]
        limits = [n for n in limits if type(n) is int and n > 0]  # -1: there is none
        self.max_position_embeddings = min(limits, default=None)
        kwargs.setdefault("tie_word_embeddings", False)
        # Transformers sets both on every sub-config, even to None: a component would lose the one it was loaded with.
        kept = []
        for key in ("attn_implementation", "experts_implementation"):
            if kwargs.get(key) is None:
                kept += [(sub, f"_{key}_internal", getattr(sub, f"_{key}")) for sub in subs]
        taken = {"_component_names", *self._component_names} & set(kwargs)
        if taken:
            raise ManticoreError(f"{min(taken)!r} is set beside 'components', which already says it; remove it.")
        try:
            super().__init__(**kwargs)
        except Exception as err:  # Transformers checks with as many kinds of errors as there are checks
            raise ManticoreError(f"The hybrid's configuration is invalid: {type(err).__name__}: {err}") from err
        for sub, key, value in kept:
            setattr(sub, key, value)

    def _add_component(self, entry):
        entry = dict(entry)
        name = entry.get("name")
        guard().entry(name, entry)
        if not isinstance(name, str) or name in self._component_names:
            raise ManticoreError(
                f"Two components are named {name!r}, or one is unnamed; name each (ComponentSpec(name=...))."
            )
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
        if weights not in ("reference", "embedded"):
            raise ManticoreError(f"Component {name!r}: weights={show(weights)}; choose 'reference' or 'embedded'.")
        if weights == "reference" or entry.get("repo_id") is not None:
            check_reference(name, *(entry.get(key) for key in ("repo_id", "revision", "subfolder", "files")))
        # As earlier versions write it
        own = {} if entry.get("tokenizer") is None else {"tokenizer": entry["tokenizer"]}
        entry = {key: entry.get(key) for key in _ENTRY_KEYS} | own
        setattr(self, name, sub)
        self.components.append(entry)
        self._component_names.append(name)

    def _check_name(self, key, value):
        if value is None:
            return self._component_names[0] if self._component_names else None
        if value not in self._component_names:
            raise ManticoreError(f"{key}={show(value)} is not a component; choose one of {self._component_names}.")
        return value

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
        if not isinstance(config_dict, dict):
            raise ManticoreError(f"{what} is not a JSON object but {show(config_dict)}; damaged, or not a hybrid's.")
        trusted = kwargs.pop("trust_component_code", None)
        if trusted:
            optional("code_manticore").run_trusted(trusted, config_dict)
        # For its classes the caller decides (trust_remote_code).
        classes = {"auto_map": config_dict["auto_map"]} if isinstance(config_dict.get("auto_map"), dict) else {}
        return super().from_dict({**guard().settings(what, config_dict, cls), **classes}, **kwargs)

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


def _list_of_dicts(components):
    components = [] if components is None else components
    if not isinstance(components, (list, tuple)) or not all(isinstance(entry, dict) for entry in components):
        raise ManticoreError(f"components={show(components)} must be a list of dicts with a name and a config.")
    guard().entries(components)
    return components


def _nonnegative(key, value, most=None):
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not 0 <= value < float("inf") or (most is not None and value > most):
        raise ManticoreError(f"{key}={show(value)} must be a non-negative number{f' up to {most}' if most else ''}.")
    return float(value)
