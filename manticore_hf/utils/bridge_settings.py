"""Bridges as a user gives them, checked, as a hybrid's configuration lists them (one edge each, with all keys), and
their weights."""

from graphlib import CycleError

import torch
from transformers import PreTrainedModel

from manticore_hf.modeling.bounds_manticore import ManticoreError, show
from manticore_hf.modeling.bridges import inner_width, order
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from manticore_hf.modeling.devices_manticore import onloaded
from manticore_hf.modeling.mixing_manticore import gathered

MOST = 1024
"""Bridges of one hybrid."""
KINDS = "linear", "attention"
_KEYS = "from", "to", "from_block", "to_block", "kind", "weight"


def check_bridges(config: ManticoreConfig) -> None:
    """Checks a configuration with topology="bridge", and makes of its `bridges` a list of edges with all keys.

    Raises:
        ManticoreError: A setting that cannot be, or that does not go with bridges.
    """
    if config.num_blocks != 1:
        raise ManticoreError(
            f"topology='bridge' mixes what components predict as one block does: give bridge_blocks={config.num_blocks}"
            f" instead of num_blocks={config.num_blocks}."
        )
    if config.embeddings != "native" or config.route is not None:
        raise ManticoreError(
            f"topology='bridge' keeps each component's own states: give embeddings='native' and no path (now "
            f"embeddings={config.embeddings!r}, route={show(config.route)})."
        )
    if config.aligned:
        raise ManticoreError(
            f"topology='bridge' adds states token by token, and components {list(config.aligned)} have tokenizers of "
            "their own: transplant their vocabularies instead (tokenizers='transplant')."
        )
    if config.bridge_kind not in KINDS:
        raise ManticoreError(f"bridge_kind={show(config.bridge_kind)} is unknown; choose one of {list(KINDS)}.")
    for key in ("bridge_rank", "bridge_heads"):
        value = getattr(config, key)
        if not (type(value) is int and value > 0 or value is None and key == "bridge_rank"):
            raise ManticoreError(f"{key}={show(value)} must be a positive integer.")
    if not isinstance(config.bridge_alpha, bool):
        raise ManticoreError(f"bridge_alpha={show(config.bridge_alpha)} must be true or false.")
    given, names, last = config.bridges, config.component_names, config.bridge_blocks - 1
    given = ["others"] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(given, (list, tuple)):
        raise ManticoreError(f"bridges={show(given)} must be a list of bridges, of 'others' or of 'self'.")
    edges = []
    for one in given:
        if one in ("others", "self"):
            pairs = [(a, b) for a in names for b in names if (a == b) == (one == "self")]
            if len(pairs) * last > MOST:
                raise ManticoreError(f"bridges={show(given)}: these are {len(pairs) * last}; at most {MOST} can be.")
            edges += [
                {"from": a, "to": b, "from_block": t - 1, "to_block": t} for a, b in pairs for t in range(1, last + 1)
            ]
        else:
            edges += _expanded(one, names, last)
        if len(edges) > MOST:
            raise ManticoreError(f"bridges={show(given)}: there are more than {MOST}; give fewer.")
    config.bridges = [{"kind": config.bridge_kind, "weight": None, **edge} for edge in edges]
    seen = set()
    for edge in config.bridges:
        _check_attention(config, edge)
        if (ends := (edge["from"], edge["from_block"], edge["to"], edge["to_block"], edge["kind"])) in seen:
            raise ManticoreError("bridges: from {!r}, block {}, to {!r}, block {}, {}: there are two.".format(*ends))
        seen.add(ends)
    try:
        order(config)
    except CycleError as err:
        said = ", ".join(f"{name!r} from block {block} on" for name, block in err.args[1][1:])
        raise ManticoreError(
            f"bridges go round in a circle: {said} would each have to run before the next. Let a bridge begin from an "
            "earlier block, or lead into a later one."
        ) from None
    if not edges:  # a hybrid of one block like any other
        config.topology, config.bridges = "merge", None
        config.block_layers = {name: [sum(sizes)] for name, sizes in config.block_layers.items()}


def _expanded(edge, names, last):
    """The edges, one for each block it leads to, that a user's one stands for."""
    if not isinstance(edge, dict) or not set(edge) <= set(_KEYS) or not {"from", "to"} <= set(edge):
        raise ManticoreError(
            f"bridges: {show(edge)} must have the keys 'from' and 'to', and may have {list(_KEYS[2:])}."
        )
    for key in ("from", "to"):
        if edge[key] not in names:
            raise ManticoreError(f"bridges: {key}={show(edge[key])} is not a component; choose one of {names}.")
    start, stop = edge.get("from_block", "last"), edge.get("to_block")
    start = last if start == "last" else start
    for key, block in (("from_block", start), ("to_block", 0 if stop is None else stop)):
        if type(block) is not int or not 0 <= block <= last:
            raise ManticoreError(
                f"bridges: {key}={show(block)} from {edge['from']!r} to {edge['to']!r} is not a block; with "
                f"bridge_blocks={last + 1} they are 0 to {last} (or 'last', to begin from)."
            )
    if edge.get("kind", KINDS[0]) not in KINDS:
        raise ManticoreError(f"bridges: kind={show(edge['kind'])} is unknown; choose one of {list(KINDS)}.")
    weight = edge.get("weight")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1
    ):
        raise ManticoreError(f"bridges: weight={show(weight)} must be a number from 0 to 1, or left out.")
    full = {**edge, "from_block": start, "weight": None if weight is None else float(weight)}
    return [{**full, "to_block": block} for block in (range(last + 1) if stop is None else [stop])]


def _check_attention(config, edge):
    width, heads = inner_width(config, edge, getattr(config, edge["to"]).hidden_size), config.bridge_heads
    if edge["kind"] == "attention" and (not width or width % heads):
        raise ManticoreError(
            f"bridge_rank={config.bridge_rank} is the width of bridge_heads={heads} heads into {edge['to']!r}: give a "
            "multiple of their number."
        )


@torch.no_grad()
def bridge_weights(model: PreTrainedModel) -> list[float]:
    """The weight of each of a hybrid's bridges, in the order of its configuration; [] without bridges."""
    bridges = model.hybrid_mixer.bridges
    if bridges is None:
        return []
    with onloaded(bridges):
        logits = None if bridges.alpha_logits is None else gathered(bridges.alpha_logits)
        return [float(one) for one in bridges.edge_weights(None if logits is None else bridges.softmax(logits))]
