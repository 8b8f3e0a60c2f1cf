"""Configuration of a hybrid: its components, how they are cut, joined and mixed.

A hybrid's `config.json` carries the full configuration of every component, so that building the model needs no other
repository; only the component *weights* are references (repo id + 40-hex commit).
"""

import copy

# First, because it says what is wrong where Transformers is too old for what follows
from .bounds_manticore import (
    ManticoreError,
    build_config,
    check_component,
    check_component_name,
    check_dtype,
    check_reference,
    guard,
    show,
)

# isort: split
from transformers import PreTrainedConfig

from .references_manticore import require, run_trusted
from .settings_manticore import CHOICES, FILLED, PRESETS

FORMAT_VERSION = 1
"""Version of the repository layout. Raised when an older package could no longer read a newer repository."""

AUTO_MAP = {
    "AutoConfig": "configuration_manticore.ManticoreConfig",
    "AutoModel": "modeling_manticore.ManticoreModel",
    "AutoModelForCausalLM": "modeling_manticore.ManticoreForCausalLM",
    "AutoModelForSequenceClassification": "modeling_manticore.ManticoreForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_manticore.ManticoreForTokenClassification",
    # The one class by which `transformers serve` loads remote code; its decisions are read from a causal LM's logits
    "AutoModelForDecision": "modeling_manticore.ManticoreForCausalLM",
}


class ManticoreConfig(PreTrainedConfig):
    """Configuration of a hybrid of K components in S blocks.

    Args:
        components: One dict per component: `name` (a Python identifier), `config` (a configuration or its dict, with
            `model_type`), and where its weights live: `repo_id`, `revision` (40-hex commit), `subfolder`, `weights`
            ("reference": read from that repo; "embedded": kept in the hybrid's own file), `files` (of a reference:
            `{safetensors file: its SHA-256}`), `license` (as the component's card states it), `transplant` (how its
            embedding and head were made for another tokenizer, which are then the hybrid's own; else None).
        calibration: What the projectors were solved from (tokens and reference component), or None.
        objective: What of mixture_space and the loss weights is not given, but for the first training stage of a
            one-block hybrid to choose, by whether the components' strengths differ: {"open": [...]}; then what it
            measured, {"chosen": [...], "gain": ...}. None: all is as given.
        route: One component name per block once hardened; None for a soft hybrid.
        manticore_version: Version of the repository layout.
        num_blocks, and all that follows it: The fields of `HybridSettings` (settings_manticore.py), where each has its
            meaning, choices and default; S is the number of blocks, K that of the components.

    Raises:
        ManticoreError: A key has an impossible value; the message names the key, the value and the choices.
    """

    model_type = "manticore"
    keys_to_ignore_at_inference = [
        "cache", "past_key_values", "hidden_states", "attentions", "mixture_loss", "component_losses", "ensemble_loss",
        "weights",
    ]  # fmt: skip

    def __init__(
        self,
        components=None,
        num_blocks=1,
        block_layers=None,
        projector=None,
        projector_init=None,
        calibration=None,
        gate=None,
        reference_component=None,
        mixture=None,
        mixture_space=None,
        embeddings=None,
        head_mixture=None,
        mix_loss_weight=None,
        component_loss_weight=None,
        objective=None,
        mixture_weights=None,
        vocab_size=None,
        tokenizer_component=None,
        route=None,
        preset="default",
        manticore_version=FORMAT_VERSION,
        **kwargs,
    ):
        given, what = {key: value for key, value in locals().items() if key != "self"}, "The hybrid's configuration"
        guard().plain(what, given)
        for key in ("dtype", "torch_dtype"):
            check_dtype(what, kwargs.get(key))
        guard().general(what, kwargs)
        if type(manticore_version) is not int or not 1 <= manticore_version <= FORMAT_VERSION:
            raise ManticoreError(
                f"This hybrid has format version {show(manticore_version)}; the installed code reads up to "
                f"{FORMAT_VERSION}. Upgrade manticore-hf, or load with trust_remote_code=True."
            )
        self.manticore_version = manticore_version
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ManticoreError(f"preset={show(preset)} is unknown; choose one of {sorted(PRESETS)}.")
        given = locals()
        for key in FILLED:
            value = PRESETS[preset][key] if given[key] is None else given[key]
            if key in CHOICES and value not in CHOICES[key]:
                raise ManticoreError(f"{key}={show(value)} is unknown; choose one of {list(CHOICES[key])}.")
            if key not in CHOICES:
                value = _nonnegative(key, value)
            setattr(self, key, value)
        left = ["mixture_space"] if mixture_space is None else []
        left += ["loss_weights"] if mix_loss_weight is None and component_loss_weight is None else []
        left = left if preset == "default" else []
        self.objective = {"open": left} if left else objective
        if self.projector != "linear" and projector_init in (None, "calibrated"):
            self.projector_init = "identity"
        self.calibration = calibration
        if self.mix_loss_weight == self.component_loss_weight == 0:
            raise ManticoreError("mix_loss_weight and component_loss_weight are both 0: nothing would be trained.")

        self._component_names = []
        self.components = []
        for entry in _list_of_dicts(components):
            self._add_component(entry)
        self.num_blocks = _positive_int("num_blocks", num_blocks)
        self.block_layers = self._check_block_layers(block_layers)
        if route and isinstance(reference_component, str):  # it may be one that the route dropped
            check_component_name(reference_component)
            self.reference_component = reference_component
        else:
            self.reference_component = self._check_name("reference_component", reference_component)
        self.tokenizer_component = self._check_name("tokenizer_component", tokenizer_component)
        self.route = self._check_route(route)
        if self.route is not None:
            mixture_weights = [[float(name == one) for one in self._component_names] for name in self.route]
        self.mixture_weights = self._check_mixture_weights(mixture_weights)

        subs = [getattr(self, name) for name in self._component_names]
        sizes = {name: getattr(self, name).vocab_size for name in self._component_names}
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
        for derived in ("num_hidden_layers", "max_position_embeddings"):
            kwargs.pop(derived, None)
        # A hardened hybrid keeps the width its projectors were made for, whoever brought it.
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
            raise ManticoreError(f"{min(taken)!r} is set beside 'components', which says all of it; remove it.")
        try:
            super().__init__(**kwargs)
        except Exception as err:  # Transformers checks with as many kinds of errors as there are checks
            raise ManticoreError(f"The hybrid's configuration is invalid: {type(err).__name__}: {err}") from err
        for sub, key, value in kept:
            setattr(sub, key, value)

    def _add_component(self, entry):
        entry = dict(entry)
        name = entry.get("name")
        check_component_name(name)
        if name in self._component_names:
            raise ManticoreError(f"Two components are named {name!r}; give one another name (ComponentSpec(name=...)).")
        sub = entry.pop("config", None)
        sub = sub if sub is not None else getattr(self, name, None)
        if isinstance(sub, dict):
            require(name, entry, sub)
            sub = build_config(name, sub)
        if not isinstance(sub, PreTrainedConfig):
            raise ManticoreError(f"Component {name!r} has no configuration (components[...]['config'] is {show(sub)}).")
        check_component(name, sub)
        weights = entry.setdefault("weights", "reference" if entry.get("repo_id") else "embedded")
        if weights not in ("reference", "embedded"):
            raise ManticoreError(f"Component {name!r}: weights={show(weights)}; choose 'reference' or 'embedded'.")
        guard().entry(name, entry)
        if weights == "reference" or entry.get("repo_id") is not None:
            check_reference(name, *(entry.get(key) for key in ("repo_id", "revision", "subfolder", "files")))
        entry = {key: entry.get(key) for key in _ENTRY_KEYS}
        setattr(self, name, sub)
        self.components.append(entry)
        self._component_names.append(name)

    def _check_name(self, key, value):
        if value is None:
            return self._component_names[0] if self._component_names else None
        if value not in self._component_names:
            raise ManticoreError(f"{key}={show(value)} is no component; choose one of {self._component_names}.")
        return value

    def _check_block_layers(self, block_layers):
        block_layers = {} if block_layers is None else block_layers
        if not isinstance(block_layers, dict) or set(block_layers) - set(self._component_names):
            raise ManticoreError(
                f"block_layers={show(block_layers)} must map component names to layers per block; "
                f"the components are {self._component_names}."
            )
        cuts = {}
        for name in self._component_names:
            depth = component_depth(getattr(self, name))
            if self.num_blocks > depth:
                raise ManticoreError(
                    f"num_blocks={self.num_blocks} is more than the {depth} layers of component {name!r}; "
                    f"choose at most {depth}."
                )
            even = [depth // self.num_blocks + (s < depth % self.num_blocks) for s in range(self.num_blocks)]
            cut = block_layers.get(name, even)
            if (
                not isinstance(cut, (list, tuple))
                or len(cut) != self.num_blocks
                or not all(type(n) is int and n >= 1 for n in cut)
                or sum(cut) != depth
            ):
                raise ManticoreError(
                    f"block_layers[{name!r}]={show(cut)} must be {self.num_blocks} positive integers that sum to the "
                    f"component's {depth} layers."
                )
            cuts[name] = [int(n) for n in cut]
        return cuts

    def _check_route(self, route):
        if route is None:
            return None
        names = self._component_names
        known = isinstance(route, (list, tuple)) and all(name in names for name in route)
        if not known or len(route) != self.num_blocks or set(route) != set(names):
            raise ManticoreError(
                f"route={show(route)} must name one component for each of the {self.num_blocks} block(s) and leave "
                f"none of {names} out."
            )
        return list(route)

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
    def sub_configs(self) -> dict[str, type]:
        """Class of each component's configuration by component name (Transformers walks these)."""
        return {name: type(getattr(self, name)) for name in self.__dict__.get("_component_names", [])}

    def bounds(self, name: str) -> list[int]:
        """Cumulative layer bounds [0, ..., depth] of a component's S segments."""
        out = [0]
        for n in self.block_layers[name]:
            out.append(out[-1] + n)
        return out

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in Transformers, for what a file says: instructions to load code or files are not taken from it.

        Args:
            config_dict: What the file says.
            **kwargs: As in Transformers, and `trust_component_code`: names of components whose own code may be run.

        Raises:
            ManticoreError: It is no configuration of a hybrid.
        """
        what = "The hybrid's config.json"
        guard().plain(what, config_dict)
        if not isinstance(config_dict, dict):
            raise ManticoreError(f"{what} is no JSON object but {show(config_dict)}; it is damaged or no hybrid's.")
        run_trusted(kwargs.pop("trust_component_code", None) or (), config_dict)
        # For its classes the caller decides (trust_remote_code).
        classes = {"auto_map": config_dict["auto_map"]} if isinstance(config_dict.get("auto_map"), dict) else {}
        return super().from_dict({**guard().settings(what, config_dict, cls), **classes}, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in Transformers."""
        with guard().reading(pretrained_model_name_or_path):
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    def get_text_config(self, *args, **kwargs):
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


_ENTRY_KEYS = ("name", "repo_id", "revision", "subfolder", "weights", "files", "license", "code", "transplant")


def _list_of_dicts(components):
    components = [] if components is None else components
    if not isinstance(components, (list, tuple)) or not all(isinstance(entry, dict) for entry in components):
        raise ManticoreError(f"components={show(components)} must be a list of dicts with a name and a config.")
    guard().entries(components)
    return components


def _positive_int(key, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ManticoreError(f"{key}={show(value)} must be a positive integer.")
    return value


def _nonnegative(key, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ManticoreError(f"{key}={show(value)} must be a non-negative number.")
    return float(value)
