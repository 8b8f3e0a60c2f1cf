"""What a hybrid's settings must be, and what they are where they are not given.

A published repository's `config.json` has all of them as they are filled in here, so that it needs none of this: its
author, who could change it there, is believed. The package asks for whatever it makes, loads or inspects.
"""

import re

from transformers import PreTrainedConfig

from manticore_hf.modeling.aligned_tokenizers import FILES
from manticore_hf.modeling.bounds_manticore import ManticoreError, check_reference, is_commit, show
from manticore_hf.modeling.configuration_manticore import component_depth
from manticore_hf.utils.bridge_settings import check_bridges
from manticore_hf.utils.settings import CHOICES, FILLED, PRESETS

MAX_SIZE = 2**25  # widths, vocabularies, positions


def fill(given: dict) -> dict:
    """A hybrid's own settings, checked, with what a preset says of those that are not given.

    Args:
        given: {name: value or default} of all `HybridSettings`, `calibration`, `objective` and `route`.

    Raises:
        ManticoreError: One has an impossible value; the message names the key, the value and the choices.
    """
    preset, out = given["preset"], {key: value for key, value in given.items() if key != "preset"}
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ManticoreError(f"preset={show(preset)} is unknown; choose one of {sorted(PRESETS)}.")
    for key in FILLED:
        out[key] = PRESETS[preset][key] if given[key] is None else given[key]
        if key not in CHOICES:  # what may be chosen is checked by the configuration itself
            out[key] = _nonnegative(key, out[key])
    for key in ("online_eta", "online_decay", "online_share"):
        out[key] = _nonnegative(key, given[key], None if key == "online_eta" else 1)
    if not isinstance(given["gate_past_losses"], bool):
        raise ManticoreError(f"gate_past_losses={show(given['gate_past_losses'])} must be true or false.")
    if type(given["gate_lag"]) is not int or not 1 <= given["gate_lag"] <= 1 << 20:
        raise ManticoreError(f"gate_lag={show(given['gate_lag'])} must be a whole number of tokens, 1 to 1,048,576.")
    left = ["mixture_space"] * (given["mixture_space"] is None)
    left += ["loss_weights"] * (given["mix_loss_weight"] is given["component_loss_weight"] is None)
    if left and preset == "default":
        out["objective"] = {"open": left}
    if out["projector"] != "linear" and given["projector_init"] in (None, "calibrated"):
        out["projector_init"] = "identity"
    if out["mix_loss_weight"] == out["component_loss_weight"] == 0:
        raise ManticoreError("mix_loss_weight and component_loss_weight are both 0: nothing would be trained.")
    return out


def _nonnegative(key, value, most=None):
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not 0 <= value < float("inf") or (most is not None and value > most):
        raise ManticoreError(f"{key}={show(value)} must be a non-negative number{f' up to {most}' if most else ''}.")
    return float(value)


def complete(config: PreTrainedConfig) -> None:
    """Checks how a hybrid's components are cut, joined and mixed, and fills in what is not given of it.

    Args:
        config: The hybrid's, which has its settings as `fill` gives them, and its components.

    Raises:
        ManticoreError: A setting that does not fit them, or components that do not fit together.
    """
    names, route = config.component_names, config.route
    if config.topology == "merge" and config.bridges is not None:
        raise ManticoreError(f"topology={show(config.topology)} must be 'merge', or 'bridge' where bridges are given.")
    for key in ("num_blocks", "bridge_blocks"):
        if type(getattr(config, key)) is not int or getattr(config, key) < 1:
            raise ManticoreError(f"{key}={show(getattr(config, key))} must be a positive integer.")
    key = "bridge_blocks" if config.topology == "bridge" else "num_blocks"
    config.block_layers = layers_of_blocks(config, config.block_layers, key)
    if not (route and isinstance(config.reference_component, str)):  # it may be one that the route dropped
        config.reference_component = check_name(names, "reference_component", config.reference_component)
    config.tokenizer_component = check_name(names, "tokenizer_component", config.tokenizer_component)
    if route is not None:
        config.route = check_route(config, route)
        config.mixture_weights = [[float(name == one) for one in names] for name in config.route]
    config.mixture_weights = config._check_mixture_weights(config.mixture_weights)
    if config.topology == "bridge" and names:
        check_bridges(config)
    if config.aligned and (config.num_blocks > 1 or config.embeddings != "native" or route):
        raise ManticoreError(
            f"Components {list(config.aligned)} have tokenizers of their own, which needs one block and "
            f"embeddings 'native'; this hybrid has num_blocks={config.num_blocks}, embeddings={config.embeddings!r}, "
            f"route={show(route)}. Transplant their vocabularies instead (tokenizers='transplant')."
        )
    sizes = {name: getattr(config, name).vocab_size for name in names if name not in config.aligned}
    if config.vocab_size is None and len(set(sizes.values())) == 1:
        config.vocab_size = min(sizes.values())
    size, least = config.vocab_size, min(sizes.values(), default=0)
    if names and not (type(size) is int and 0 < size <= least and (route or size == least)):
        raise ManticoreError(
            f"The vocabularies differ in size: {sizes}, hybrid vocab_size={show(size)}. Components must "
            "share one vocabulary. Sizes may differ in padding rows only, which shows where every component comes "
            "with the same tokenizer; for instances load each and call model.resize_token_embeddings(n) with the "
            "same n. Really different vocabularies can be transplanted (manticore_hf.compose_transplanted)."
        )


def check_name(names: list[str], key: str, value: str | None) -> str | None:
    """A component's name as a setting `key` gives it, the first for None; ManticoreError if there is none of it."""
    if value is None:
        return names[0] if names else None
    if value not in names:
        raise ManticoreError(f"{key}={show(value)} is not a component; choose one of {names}.")
    return value


def layers_of_blocks(config: PreTrainedConfig, block_layers: dict | None, key: str) -> dict[str, list[int]]:
    """{component: layers in each block}: as given, or as even as can be.

    Args:
        config: The hybrid's, which knows its components.
        block_layers: {component: layers in each block}, of some components or none.
        key: The setting that says how many blocks there are.

    Raises:
        ManticoreError: What is given does not fit the components.
    """
    blocks = getattr(config, key)
    block_layers = {} if block_layers is None else block_layers
    if not isinstance(block_layers, dict) or set(block_layers) - set(config.component_names):
        raise ManticoreError(
            f"block_layers={show(block_layers)} must map component names to layers per block; "
            f"the components are {config.component_names}."
        )
    cuts = {}
    for name in config.component_names:
        depth = component_depth(getattr(config, name))
        if blocks > depth:
            raise ManticoreError(
                f"{key}={blocks} is more than the {depth} layers of component {name!r}; choose at most {depth}."
            )
        even = [depth // blocks + (s < depth % blocks) for s in range(blocks)]
        cut = block_layers.get(name, even)
        numbers = isinstance(cut, (list, tuple)) and all(type(n) is int and n >= 1 for n in cut)
        if not numbers or len(cut) != blocks or sum(cut) != depth:
            raise ManticoreError(
                f"block_layers[{name!r}]={show(cut)} must be {blocks} positive integers that sum to the "
                f"component's {depth} layers."
            )
        cuts[name] = list(cut)
    return cuts


def check_route(config: PreTrainedConfig, route: list[str]) -> list[str]:
    """A route, if it names a component of the hybrid for each block, and all of them; else raises ManticoreError."""
    names = config.component_names
    known = isinstance(route, (list, tuple)) and all(name in names for name in route)
    if not known or len(route) != config.num_blocks or set(route) != set(names):
        raise ManticoreError(
            f"route={show(route)} must name one component for each of the {config.num_blocks} block(s) and leave "
            f"none of {names} out."
        )
    return list(route)


# ---- of a component --------------------------------------------------------------------------------------------------


def check_transplant(name: str, values: dict | None) -> None:
    """Raises ManticoreError unless what a component's entry says of its transplanted vocabulary makes sense.

    Args:
        name: The component's name.
        values: None, or {"method", "tokenizer": {"repo_id", "revision", "subfolder"} of the one it was made for, or
            None if that has no address, "vocabulary": SHA-256 of its tokens and ids, "vocab_size": rows of the
            embedding that the component's own checkpoint has}.
    """
    if values is None:
        return
    keys = {"method", "tokenizer", "vocabulary", "vocab_size"}
    if not isinstance(values, dict) or set(values) != keys:
        raise ManticoreError(f"Component {name!r}: transplant={show(values)} must have the keys {sorted(keys)}.")
    method, tokenizer, rows = values["method"], values["tokenizer"], values["vocab_size"]
    if not isinstance(method, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", method):
        raise ManticoreError(f"Component {name!r}: transplant method={show(method)} is not a name of one.")
    if not isinstance(values["vocabulary"], str) or not re.fullmatch(r"[0-9a-f]{64}", values["vocabulary"]):
        raise ManticoreError(
            f"Component {name!r}: transplant vocabulary={show(values['vocabulary'])} is not a SHA-256 of 64 hex digits."
        )
    if type(rows) is not int or not 0 < rows <= MAX_SIZE:
        raise ManticoreError(f"Component {name!r}: transplant vocab_size={show(rows)} must be a number of tokens.")
    if tokenizer is None:
        return
    if not isinstance(tokenizer, dict) or set(tokenizer) != {"repo_id", "revision", "subfolder"}:
        raise ManticoreError(
            f"Component {name!r}: transplant tokenizer={show(tokenizer)} must have a repo_id, revision and subfolder."
        )
    check_reference(name, tokenizer["repo_id"], tokenizer["revision"], tokenizer["subfolder"])
    if not is_commit(tokenizer["revision"]):
        raise ManticoreError(
            f"Component {name!r}: its transplant's tokenizer is at {show(tokenizer['revision'])}, which is not a "
            "40-hex commit."
        )


def check_files(name: str, files: dict | None) -> None:
    """Raises ManticoreError unless what an entry records of a referenced component's files are names and SHA-256s."""
    what = f"Component {name!r}"
    if files is None:
        return
    if not isinstance(files, dict) or not any(str(file).endswith(".safetensors") for file in files):
        raise ManticoreError(f"{what}: files={show(files)} must map its safetensors files to their SHA-256.")
    for file, digest in files.items():
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ManticoreError(f"{what}: {show(digest)} of {show(file)} is not a SHA-256 of 64 hex digits.")


def check_tokenizer(name: str, values: dict | None, repo_id: str | None) -> None:
    """Raises ManticoreError unless a component's entry says which files its own tokenizer has, if it has an address."""
    files = values.get("files") if isinstance(values, dict) else None
    digests = files.items() if isinstance(files, dict) else ()
    known = digests and all(file in FILES and re.fullmatch(r"[0-9a-f]{64}", str(one)) for file, one in digests)
    if values is not None and (repo_id is not None or not isinstance(values, dict)) and not known:
        raise ManticoreError(f"Component {name!r}: tokenizer={show(values)} names no tokenizer files.")


def check_objective(value: dict | None) -> None:
    """Raises ManticoreError unless it says what is left open, or what was measured."""
    known = {"mixture_space", "loss_weights"}
    if value is not None:
        keys = value.get("open", value.get("chosen")) if isinstance(value, dict) else None
        measured = isinstance(value, dict) and ("open" in value or isinstance(value.get("gain"), float))
        if not measured or not isinstance(keys, list) or not all(isinstance(k, str) and k in known for k in keys):
            raise ManticoreError(f"objective={show(value)} must be None, or what is left open or was measured.")
