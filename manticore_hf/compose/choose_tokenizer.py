"""Which component's tokenizer a hybrid with several should have: the one with which it reads a text best, untrained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from manticore_hf.compose.component_tokenizers import align, can_align
from manticore_hf.compose.components import ComponentSpec, resolve
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.evaluation.losses import text_nats
from manticore_hf.evaluation.statistics import bootstrap
from manticore_hf.modeling.aligned_tokenizers import tokenizer_of
from manticore_hf.modeling.configuration_manticore import ManticoreError

MEASURED_BYTES = 6_000
"""Bytes of text that are read to choose by, at most, with each tokenizer."""
_PIECE, _LEAST = 500, 8  # characters of a piece; pieces that are read before a difference is believed


def measure_tokenizers(components: Sequence[Any], texts: Sequence[str], **settings: Any) -> dict[str, float]:
    """Bits per byte of the untrained hybrid on some texts, by which component's tokenizer it has.

    The texts are read in pieces of 500 characters, each piece with every tokenizer in turn, and no further than it
    takes: once the 95 % interval of each difference from the best leaves out zero, the rest is not read. The hybrids
    share their components' weights; nothing is trained.

    Args:
        components: As `ManticoreForCausalLM.from_components` takes them, with tokenizers that differ.
        texts: Texts.
        **settings: Of `from_components`, without `tokenizer_component`.

    Returns:
        {component: bits per byte of what was read}; `min(found, key=found.get)` is the tokenizer component to compose
        with.

    Raises:
        ManticoreError: Components that cannot be joined, or that have one tokenizer; no text.
    """
    pieces = [piece for text in texts for piece in _pieces(text)]
    if not pieces:
        raise ManticoreError("There is no text to choose a tokenizer by.")
    if "tokenizer_component" in settings:
        raise ManticoreError(
            f"tokenizer_component={settings['tokenizer_component']!r} is given, so there is no tokenizer to choose; "
            "leave out that or the text to choose by."
        )
    hybrids = _hybrids(components, settings)
    sizes, nats = [], {name: [] for name in hybrids}
    for piece in tqdm(pieces, desc="Choosing a tokenizer", unit="piece", leave=False):
        for name, model in hybrids.items():
            nats[name] += text_nats(model, tokenizer_of(model, name), [piece], progress=False).tolist()
        sizes.append(len(piece.encode()))
        if len(sizes) >= _LEAST and _is_clear(nats, sizes):
            break
    return {name: sum(values) / math.log(2) / sum(sizes) for name, values in nats.items()}


def can_choose(components: Sequence[Any], settings: Mapping[str, Any]) -> bool:
    """Whether components come with tokenizers that differ and would be joined with them; without their weights.

    Args:
        components: As `ManticoreForCausalLM.from_components` takes them.
        settings: Of `from_components`.

    Raises:
        ManticoreError: Components that cannot be joined.
    """
    found = [resolve(ComponentSpec.of(one), {}, weights=False) for one in components]
    return bool(align(found, {}, settings.get("tokenizers"), can_align(settings)))


def _hybrids(components, settings):
    """{component whose tokenizer it has: hybrid}, all of the same components."""
    hub = {key: settings.get(key) for key in ("token", "cache_dir")}
    hub["local_files_only"] = settings.get("local_files_only", False)
    specs = [ComponentSpec.of(one) for one in components]
    names, out = [resolve(spec, hub, weights=False).name for spec in specs], {}
    for name in names:
        model = ManticoreForCausalLM.from_components(specs, tokenizer_component=name, **settings)
        if not model.config.aligned:
            raise ManticoreError(
                f"Components {model.config.component_names} are joined with one tokenizer: there is none to choose."
            )
        out[name] = model
        specs = [replace(spec, name=one, model=model.component(one)) for spec, one in zip(specs, names)]
        settings = {**settings, "verify": False}  # once is enough
    return out


def _pieces(text):
    """A text in pieces that end with a space or line where there is one."""
    while text:
        end = len(text)
        if end > _PIECE:
            end = 1 + max(text.rfind(space, _PIECE // 2, _PIECE) for space in " \n") or _PIECE
        yield text[:end]
        text = text[end:]


def _is_clear(nats, sizes):
    """Whether one tokenizer is better than each other, by more than chance."""
    best = min(nats, key=lambda name: sum(nats[name]))
    gains = [np.subtract(values, nats[best]) for name, values in nats.items() if name != best]
    return all(bootstrap(gain, sizes)[0] > 0 for gain in gains)
