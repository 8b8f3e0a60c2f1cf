"""Which component's tokenizer a hybrid with several should have: the one with which it reads a text best, untrained."""

import math
from collections.abc import Sequence
from typing import Any

from manticore_hf.compose.components import ComponentSpec, resolve
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.evaluation.losses import text_nats
from manticore_hf.modeling.aligned_tokenizers import tokenizer_of
from manticore_hf.modeling.configuration_manticore import ManticoreError

MEASURED_BYTES = 20_000
"""Bytes of text that are read to choose by, for each component."""


def measure_tokenizers(
    components: Sequence[Any], texts: Sequence[str], batch_size: int = 4, **settings: Any
) -> dict[str, float]:
    """Bits per byte of the untrained hybrid on some texts, by which component's tokenizer it has.

    The hybrids are composed one after the other; nothing is trained.

    Args:
        components: As `ManticoreForCausalLM.from_components` takes them, with tokenizers that differ.
        texts: Texts, each read by itself.
        batch_size: Texts per forward pass.
        **settings: Of `from_components`, without `tokenizer_component`.

    Returns:
        {component: bits per byte}; `min(found, key=found.get)` is the tokenizer component to compose with.

    Raises:
        ManticoreError: Components that cannot be joined, or that have one tokenizer; no text.
    """
    size, found = sum(len(text.encode()) for text in texts), {}
    if not size:
        raise ManticoreError("There is no text to choose a tokenizer by.")
    if "tokenizer_component" in settings:
        raise ManticoreError(
            f"tokenizer_component={settings['tokenizer_component']!r} is given, so there is no tokenizer to choose; "
            "leave out that or the text to choose by."
        )
    hub = {key: settings.get(key) for key in ("token", "cache_dir")}
    hub["local_files_only"] = settings.get("local_files_only", False)
    for name in [resolve(ComponentSpec.of(one), hub, weights=False).name for one in components]:
        model = ManticoreForCausalLM.from_components(list(components), tokenizer_component=name, **settings)
        if not model.config.aligned:
            raise ManticoreError(
                f"Components {model.config.component_names} are joined with one tokenizer: there is none to choose."
            )
        nats = text_nats(model, tokenizer_of(model, name), texts, batch_size)
        found[name] = float(nats.sum()) / math.log(2) / size
        del model
    return found
