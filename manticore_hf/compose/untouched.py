"""The original components of a hybrid, with their own tokenizers: the baselines that a user has without it."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from manticore_hf.compose.component_tokenizers import find_tokenizer
from manticore_hf.compose.components import ComponentSpec, load, resolve
from manticore_hf.evaluation.losses import Measured, Passages, ensemble_nats, own_nats
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.mixers_manticore import repair_mixers
from manticore_hf.utils.claims import ORIGINAL

ORIGINALS = "{} of the originals"


def load_original(
    entry: Mapping, source: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A component before it was joined: the model at its address, at its commit, and the tokenizer there.

    Args:
        entry: Of `config.components`.
        source: Directory or repository, of a component that has no address (or in the place of it).
        dtype: Of the weights.

    Raises:
        ManticoreError: There is no address, no tokenizer, or nothing that can be loaded; says which.
    """
    name = entry["name"]
    if source is None and entry["repo_id"] is None:
        raise ManticoreError(
            f"Component {name!r} came from a directory or file, which is not known here or is gone: say where it is "
            "(--components)."
        )
    if entry.get("code") is not None:
        raise ManticoreError(f"Component {name!r} needs its repository's code, which is not run to measure a baseline.")
    where = {"source": source} if source is not None else {"source": entry["repo_id"], "revision": entry["revision"]}
    hub = {"token": None, "cache_dir": None, "local_files_only": False}
    found = resolve(ComponentSpec(**where, subfolder=entry["subfolder"], name=name), hub)
    tokenizer = find_tokenizer(found, hub)
    if tokenizer is None:
        raise ManticoreError(f"Component {found.address} comes without a tokenizer that can be read.")
    model = load(found, dtype, hub).eval()
    repair_mixers(model)
    return model, tokenizer


def measure_originals(
    found: Measured,
    config: PreTrainedConfig,
    passages: Passages,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str] | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    ensemble: bool = False,
) -> Measured:
    """Adds the original components to what was measured: "original NAME", one after the other.

    Args:
        found: Of the hybrid; it gets the new rows, and in `missing` why there is none.
        config: The hybrid's.
        passages: Passages.
        tokenizer: The hybrid's.
        sources: Where the components are, in order; default: the addresses that the hybrid knows.
        batch_size: Texts per forward pass.
        device: Where they are run.
        ensemble: Also "ensemble of the originals" and "online mixture of the originals", if all have the hybrid's
            vocabulary; then all of them are in memory at once.
    """
    models = []
    for entry, source in zip(config.components, sources or [None] * len(config.components)):
        label = ORIGINAL.format(entry["name"])
        try:
            model, own = load_original(entry, source)
            model.to(device)
            found.nats[label] = own_nats(model, own, passages, batch_size)
        except (ManticoreError, OSError) as err:
            found.missing[label] = str(err)
            continue
        if ensemble and own.get_vocab() == tokenizer.get_vocab():
            models.append(model)
        del model
    if ensemble and len(models) == len(config.components) > 1:
        both = ensemble_nats(models, passages, config, batch_size)
        found.nats |= {ORIGINALS.format(name): nats for name, nats in both.items()}
    return found
