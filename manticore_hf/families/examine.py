"""One model type through the contract, as a component alone and beside a Llama of other width and depth."""

import json
import re
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from manticore_hf.compose.components import ComponentSpec, resolve
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.families import contract
from manticore_hf.families.precision import Float64, as_asked, doubled
from manticore_hf.families.tiny import tiny_config, tiny_model, tokens
from manticore_hf.modeling.configuration_manticore import ManticoreError, component_depth
from manticore_hf.modeling.references_manticore import WEIGHT_FILES

LARGEST = 1_000_000
"""Parameters of a tiny model; one that has more is not tiny, but has settings that `tiny.py` does not know."""

PASSES, UNSUPPORTED, WRONG, UNKNOWN = "passes", "unsupported", "wrong", "unknown"
"""Does what the contract says; from_components raises; joined but breaks the contract; no tiny model could be made."""


class Examined:
    """A type's tiny models, made anew for every check that asks: some checks change them.

    Args:
        model_type: Transformers' name.
        double: Models in float64, of the same weights: for use within `Float64`.
        device: Where they are.
        **settings: Of the type's configuration, beyond `tiny_config`'s.
    """

    def __init__(self, model_type: str, double: bool = False, device: torch.device | str = "cpu", **settings: Any):
        self.config, self.double, self.device = tiny_config(model_type, **settings), double, device

    @property
    def component(self) -> PreTrainedModel:
        """A tiny causal LM of the type, always the same."""
        return self._tiny(self.config.__class__.from_dict(self.config.to_dict()), 0)

    @property
    def llama(self) -> PreTrainedModel:
        """A tiny Llama of other width and depth to stand beside it."""
        return self._tiny(tiny_config("llama", hidden_size=24, head_dim=6, num_hidden_layers=4), 1)

    def _tiny(self, config, seed):
        with as_asked():
            model = tiny_model(config, seed).to(self.device)
        return doubled(model) if self.double else model

    @cached_property
    def depth(self) -> int:
        """Its number of layers."""
        return component_depth(self.config)

    def hybrid(self, beside: bool = True, **settings: Any) -> ManticoreForCausalLM:
        """A hybrid of the type, in two blocks; `beside` a Llama or alone."""
        parts = [ComponentSpec(self.component, name="one")]
        if beside:
            parts.append(ComponentSpec(self.llama, name="other"))
        model = ManticoreForCausalLM.from_components(parts, **{"num_blocks": 2, **settings})
        contract.randomise(model)
        return model

    @cached_property
    def alone(self) -> ManticoreForCausalLM:
        """One that checks of decoding share: they change nothing."""
        return self.hybrid(beside=False)

    @cached_property
    def pair(self) -> ManticoreForCausalLM:
        """One that checks of decoding share: they change nothing."""
        return self.hybrid()


def _saved(examined):
    with tempfile.TemporaryDirectory(prefix="manticore-families-") as folder:
        contract.check_saved(examined.pair, folder)


def _static(examined):
    try:
        contract.check_static_cache(examined.alone)
    except ManticoreError as err:
        if "does not support a static cache" not in str(err):
            raise


def _one_hot(examined):
    for settings, blocks in ((contract.PAPER, (1, 3)), (contract.NATIVE, (2,))):
        parts = [ComponentSpec(examined.component, name="one"), ComponentSpec(examined.llama, name="other")]
        contract.check_one_hot(parts, settings, blocks)


def _segments(examined):
    for bounds in ((0, examined.depth), (0, 2, examined.depth), (0, 1, 3, examined.depth)):
        contract.check_segments(examined.component, bounds)


CHECKS = {
    "segments": _segments,
    "one_hot": _one_hot,
    "padding": lambda examined: contract.check_padding(examined.alone),
    "inside": lambda examined: contract.check_padding_inside(examined.alone),
    "documents": lambda examined: (contract.check_documents(examined.alone), contract.check_documents(examined.pair)),
    "greedy": lambda examined: (contract.check_greedy(examined.alone), contract.check_greedy(examined.pair)),
    "turns": lambda examined: contract.check_turns(examined.alone),
    "chunks": lambda examined: contract.check_chunks(examined.alone, (4, 1, 1, 3, 2)),
    "beams": lambda examined: contract.check_beams(examined.alone),
    "static": _static,
    "gradients": lambda examined: contract.check_gradients(examined.component),
    "saved": _saved,
}
"""What a type is put through, in this order."""

ROUNDED = ("padding", "inside", "documents", "greedy", "turns", "chunks", "beams", "static", "gradients")
"""Those that compare up to rounding."""


def examine(model_type: str, device: torch.device | str = "cpu", **settings: Any) -> dict[str, Any]:
    """Puts one type through the contract.

    Args:
        model_type: Transformers' name.
        device: Where its models run.
        **settings: Of its tiny configuration.

    Returns:
        {"type", "class", "verdict", "reason" (one sentence, "" if it passes), "checks" ({name: "" or what broke}),
        "seconds"}
    """
    began = time.time()
    out = {"type": model_type, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "checks": {}}
    out["verdict"], out["reason"] = _judge(model_type, out["checks"], device=device, **settings)
    return {**out, "seconds": round(time.time() - began, 1)}


def _judge(model_type, checks, **given):
    try:
        check_configuration(model_type)
    except ManticoreError as err:
        return UNSUPPORTED, sentence(err)
    try:
        examined = Examined(model_type, **given)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(examined.config).num_parameters()
        if size > LARGEST:
            return UNKNOWN, f"its smallest model that could be found has {size} parameters"
        with torch.no_grad():
            logits = examined.component(input_ids=tokens(device=examined.device), use_cache=False).logits
        if not logits.isfinite().all() or logits.std() < 1e-3:
            return UNKNOWN, "a tiny model's logits are not finite or all alike"
    except Exception as err:
        return UNKNOWN, f"no tiny model could be made and run ({type(err).__name__}: {first_line(err)})"
    try:
        for blocks in (1, 2, 3):
            examined.hybrid(beside=False, num_blocks=blocks)
    except ManticoreError as err:
        return UNSUPPORTED, sentence(err)
    except Exception as err:
        return WRONG, f"from_components fails with {type(err).__name__}: {first_line(err)}"
    for name, check in CHECKS.items():
        checks[name] = _what_breaks(check, examined)
        if checks[name] and name in ROUNDED:
            # Rounding, or a choice that it made; what is wrong is wrong in float64, too
            with Float64():
                exact = _what_breaks(check, Examined(model_type, double=True, **given))
            checks[name] = exact and f"{checks[name]}; in float64: {exact}"
    broken = {name: text for name, text in checks.items() if text}
    if broken:
        name, text = next(iter(broken.items()))
        return WRONG, f"{name}: {text}"
    return PASSES, ""


def _what_breaks(check, examined):
    """What a check finds, or ""."""
    try:
        check(examined)
        return ""
    except contract.Broken as err:
        return first_line(err)
    except Exception as err:
        return f"{type(err).__name__}: {first_line(err)}"


def check_configuration(model_type: str) -> None:
    """Raises ManticoreError if a repository with this type's usual config.json is unsupported."""
    try:
        config = CONFIG_MAPPING[model_type]()
        values = json.loads(config.to_json_string(use_diff=False))
    except Exception:  # some have no defaults that agree with each other
        values = {}
    values |= {"model_type": model_type, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]}
    if "is_decoder" in values and not values.get("is_encoder_decoder"):
        values["is_decoder"] = True  # as the checkpoints that are causal LMs have it
    with tempfile.TemporaryDirectory(prefix="manticore-families-") as folder:
        Path(folder, "config.json").write_text(json.dumps(values), encoding="utf-8")
        Path(folder, WEIGHT_FILES[0]).touch()
        resolve(ComponentSpec(folder, name="one"), {})


def sentence(err: BaseException) -> str:
    """A message, of which component it speaks left out."""
    text = " ".join(str(err).split())
    named = re.match(r"Component '\w+'(?: \([^)]*\))?(:?) (.*)", text)
    if named is None:
        return text
    return named[2][0].upper() + named[2][1:] if named[1] else f"It {named[2]}"


def first_line(err: BaseException) -> str:
    """What an error says first, not longer than a line."""
    text = " ".join(str(err).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
