"""What a hybrid's settings must be, and what they are where they are not given.

A published repository's `config.json` has all of them as they are filled in here, so that it needs none of this: its
author, who could change it there, is believed. The package asks for whatever it makes, loads or inspects.
"""

from transformers import PreTrainedConfig

from manticore_hf.modeling.bounds_manticore import ManticoreError, show
from manticore_hf.modeling.configuration_manticore import FORMAT_VERSION, component_depth
from manticore_hf.utils.bridge_settings import check_bridges
from manticore_hf.utils.settings import CHOICES, FILLED, PRESETS


def fill(given: dict, version: object) -> dict:
    """A hybrid's own settings, checked, with what a preset says of those that are not given.

    Args:
        given: {name: value or default} of all `HybridSettings`, `calibration`, `objective` and `route`.
        version: Of the repository layout, as the configuration states it.

    Raises:
        ManticoreError: One has an impossible value; the message names the key, the value and the choices.
    """
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ManticoreError(
            f"This hybrid has format version {show(version)}; the installed code reads up to "
            f"{FORMAT_VERSION}. Upgrade manticore-hf, or load with trust_remote_code=True."
        )
    preset, out = given["preset"], {key: value for key, value in given.items() if key != "preset"}
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ManticoreError(f"preset={show(preset)} is unknown; choose one of {sorted(PRESETS)}.")
    for key in FILLED:
        out[key] = value = PRESETS[preset][key] if given[key] is None else given[key]
        if key not in CHOICES:
            out[key] = _nonnegative(key, value)
        elif value not in CHOICES[key]:
            raise ManticoreError(f"{key}={show(value)} is unknown; choose one of {list(CHOICES[key])}.")
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
    if config.topology not in ("merge", "bridge") or config.topology == "merge" and config.bridges is not None:
        raise ManticoreError(f"topology={show(config.topology)} must be 'merge', or 'bridge' where bridges are given.")
    for key in ("num_blocks", "bridge_blocks"):
        if type(getattr(config, key)) is not int or getattr(config, key) < 1:
            raise ManticoreError(f"{key}={show(getattr(config, key))} must be a positive integer.")
    key = "bridge_blocks" if config.topology == "bridge" else "num_blocks"
    config.block_layers = layers_of_blocks(config, config.block_layers, key)
    if not (route and isinstance(config.reference_component, str)):  # it may be one that the route dropped
        config.reference_component = _check_name(names, "reference_component", config.reference_component)
    config.tokenizer_component = _check_name(names, "tokenizer_component", config.tokenizer_component)
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


def _check_name(names, key, value):
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
