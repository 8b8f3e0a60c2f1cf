"""The models of a composition: the two components joined in every way that there is, and what of them is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from manticore_hf.compose.components import ComponentSpec
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.training.calibrate import Moments, solve_ridge

_GATE = {"mixture": "token", "mixture_space": "prob"}
_MERGE = {**_GATE, "projector_init": "identity"}
_BRIDGE = {"topology": "bridge", "mixture": "static"}


@dataclass(frozen=True)
class Condition:
    """One way to join the components.

    Attributes:
        parts: The components that take part, by name; one alone is an ordinary model, twice the same: it and its copy.
        tuned: Those of them whose weights are trained beside what joins them.
        hybrid: Keys of ManticoreConfig for several.
        reads: The component whose head alone is read; None: the mixture of all.
        lora: Whether a component alone is trained by LoRA, of about the size of the linear bridges.
        calibrated: Whether bridges into the first block start from `calibrate`, not from zero.
        quiet: Whether that reads the receiver's own text, too, in which they are to say nothing.
        gates: Whether of what joins them the bridges' gates alone are trained: a number each.
        learning_rate: Of AdamW, at the start; None: the task trains nothing.
    """

    parts: tuple[str, ...]
    tuned: tuple[str, ...] = ()
    hybrid: dict[str, Any] = field(default_factory=dict)
    reads: str | None = None
    lora: bool = False
    calibrated: bool = False
    quiet: bool = False
    gates: bool = False
    learning_rate: float | None = 3e-3


def conditions(blocks: int, parts: Sequence[str] = ("adder", "table")) -> dict[str, Condition]:
    """All conditions by name, the baselines first.

    Args:
        blocks: Of bridges: places in the receiver that they lead into.
        parts: Names of the two components, the receiver first.
    """
    both, slow, (receiver, sender) = tuple(parts), 2e-3, parts
    bridge, told = {**_BRIDGE, "bridge_blocks": blocks}, [{"from": sender, "to": receiver}]
    copied = [{"from": "copy", "to": receiver}]
    found = {
        f"{receiver} tuned": Condition((receiver,), (receiver,), learning_rate=slow),
        f"{sender} tuned": Condition((sender,), (sender,), learning_rate=slow),
        f"{receiver} LoRA": Condition((receiver,), lora=True, learning_rate=1e-2),
        "gate frozen": Condition(both, (), {"num_blocks": 1, **_GATE}, learning_rate=1e-2),
        "gate tuned": Condition(both, both, {"num_blocks": 1, **_GATE}, learning_rate=slow),
    }
    for count in (2, 3):
        for word, tuned, rate in (("frozen", (), 3e-3), ("tuned", both, slow)):
            found[f"merge {count} {word}"] = Condition(both, tuned, {"num_blocks": count, **_MERGE}, learning_rate=rate)
    found["self-bridge"] = Condition((receiver,) * 2, (receiver,), {**bridge, "bridges": copied}, receiver)
    for kind in ("linear", "attention"):
        settings = {**bridge, "bridges": told, "bridge_kind": kind}
        found[f"{kind} bridge frozen"] = Condition(both, (), settings, receiver, learning_rate=2e-2)
        found[f"{kind} bridge"] = Condition(both, (receiver,), settings, receiver)
    bridge = {**bridge, "bridges": told}
    found["calibrated bridge frozen"] = Condition(both, (), bridge, receiver, calibrated=True, learning_rate=3e-3)
    found["calibrated bridge"] = Condition(both, (receiver,), bridge, receiver, calibrated=True)
    found["calibrated bridge untrained"] = Condition(both, (), bridge, receiver, calibrated=True, learning_rate=None)
    gates = Condition(both, (), bridge, receiver, calibrated=True, gates=True, learning_rate=5e-2)
    found["calibrated bridge, gates"] = gates
    quiet = {
        name.replace("calibrated", "quiet"): replace(one, quiet=True) for name, one in found.items() if one.calibrated
    }
    return found | quiet


def build(condition: Condition, component: Callable[[str], PreTrainedModel], seed: int) -> nn.Module:
    """A condition's model, with what it trains ready to be trained and all else frozen.

    Args:
        condition: Which.
        component: Gives a trained component, by name, anew at every call.
        seed: Of new weights that do not start at zero.

    Returns:
        A causal LM, in float32.
    """
    torch.manual_seed(seed)
    if len(condition.parts) == 1:
        model = component(condition.parts[0])
        return _with_lora(model) if condition.lora else model.requires_grad_(True)
    specs = []
    for name in condition.parts:
        taken = any(spec.name == name for spec in specs)
        specs.append(ComponentSpec(component(name), name="copy" if taken else name))
    model = ManticoreForCausalLM.from_components(specs, verify=False, **condition.hybrid)
    if condition.reads:
        model.set_mixture_weights(condition.reads)
    model.requires_grad_(False)
    (model.hybrid_mixer.bridges.gates if condition.gates else model.hybrid_mixer).requires_grad_(True)
    for name in condition.tuned:
        model.component(name).requires_grad_(True)
    return model


@torch.no_grad()
def calibrate(model: ManticoreForCausalLM, ids: torch.Tensor, own: torch.Tensor | None = None) -> float:
    """Lets linear bridges into a receiver's first block say what the sender expects next, in the receiver's embeddings.

    Ridge regression, on the sender's own text, from its last state at a token to the receiver's embedding of the token
    after it, divided as the bridge multiplies it. Neither model changes, and the task is not read.

    With the receiver's own text the regression is to zero there: what the sender, which has not learned that text,
    makes of it would only disturb. Tokens then weigh as the square of the sender's highest probability after them, for
    where it does not know what comes its state has nothing to say of it.

    Args:
        model: A hybrid with linear bridges of full rank that begin at a last state.
        ids: [rows, time], at least ten rows; a tenth of them, the last, choose the ridge.
        own: [rows, time], as many rows of the receiver's own text, or None.

    Returns:
        R^2 of the last such bridge, on the rows that chose the ridge.
    """
    fit, found = len(ids) - len(ids) // 10, 0.0
    for edge, bridge in zip(model.config.bridges, model.hybrid_mixer.bridges.edges):
        if edge["to_block"] == 0:
            moments = []
            for part in (slice(fit), slice(fit, None)):
                state, target = _said(model, edge, ids[part], own is not None)
                moments.append(Moments(state.shape[-1], target.shape[-1], ids.device))
                moments[-1].add(state, target)
                if own is not None:
                    state, target = _said(model, edge, own[part], True)
                    moments[-1].add(state, torch.zeros_like(target))
            weight, _, _, found = solve_ridge(*moments)
            bridge.up.weight.copy_(weight)
    return found


def _said(model, edge, ids, weighted):
    """(states, targets) [tokens, width] of a sender's text, and once more with their negatives."""
    out = model.component(edge["from"])(input_ids=ids, use_cache=False, output_hidden_states=True)
    state, target = _normed(out.hidden_states[-1][:, :-1])[0], model.embed(edge["to"], ids)
    target = target[:, 1:] / _normed(target[:, :-1])[1]
    if weighted:
        confidence = out.logits[:, :-1].softmax(-1).amax(-1, keepdim=True)
        state, target = confidence * state, confidence * target
    state, target = state.flatten(0, 1), target.flatten(0, 1)
    # With its negative each row leaves means of zero: bridges have no bias
    return torch.cat([state, -state]), torch.cat([target, -target])


def _normed(state):
    size = (state.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return state / size, size


def _with_lora(model):
    from peft import LoraConfig, get_peft_model

    maps = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    rank = max(1, round(layers * width**2 / sum(m.in_features + m.out_features for m in maps)))
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
