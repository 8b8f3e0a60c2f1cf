"""The tokenizers of an aligned hybrid's components: from pinned commits, checked like weights, without remote code.

A component's entry in the configuration records the SHA-256 of each of its tokenizer's files. The tokenizer of a
component that has no address is kept in the hybrid's own directory.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .bounds_manticore import ManticoreError, guard, reason
from .references_manticore import asking, fetch

FILES = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FILES += "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"


def folder_of(name: str) -> str:
    """Where in a hybrid's directory the tokenizer of a component without an address is."""
    return f"tokenizer_{name}"


def tokenizer_of(model: PreTrainedModel, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a component.

    Raises:
        ManticoreError: It cannot be had, or is not the one that the hybrid was made with.
    """
    held = model.__dict__.setdefault("_tokenizers", {})
    if name not in held:
        entry = next(one for one in model.config.components if one["name"] == name)
        with tempfile.TemporaryDirectory() as folder:
            if entry["repo_id"] is not None:
                _from_component(entry, model._component_cache_dir, folder)
            else:
                _from_hybrid(model, name, folder)
            kind = {"model_type": getattr(model.config, name).model_type}
            Path(folder, "config.json").write_text(json.dumps(kind))
            try:
                held[name] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            except Exception as err:  # of the tokenizers library
                raise ManticoreError(f"Component {name!r}: its tokenizer cannot be loaded: {reason(err)}") from err
    return held[name]


def _from_component(entry, cache_dir, folder):
    files = entry["tokenizer"]["files"]
    for file in files:
        with asking(entry, f"{file} of its tokenizer"):
            path = fetch({**entry, "files": files}, file, {} if cache_dir is None else {"cache_dir": cache_dir})
        shutil.copyfile(path, Path(folder) / file)


def _from_hybrid(model, name, folder):
    home, commit = (model.__dict__.get(key) for key in ("_loaded_from", "_own_commit"))
    hub = {"subfolder": folder_of(name), "revision": commit, "cache_dir": getattr(model, "_component_cache_dir", None)}
    for file in FILES:
        path = home and os.path.join(home, folder_of(name), file)
        if commit and not (path and os.path.isfile(path)):
            try:
                path = hf_hub_download(model.name_or_path, file, **hub)
            except Exception:  # it has no such file, or the Hub is out of reach
                path = None
        if path and os.path.isfile(path):
            guard().beside(path, path.rpartition(folder_of(name))[0])
            shutil.copyfile(path, Path(folder) / file)
    if not os.listdir(folder):
        raise ManticoreError(
            f"Component {name!r} reads text by a tokenizer that was kept in {folder_of(name)}/ of the hybrid's "
            "directory, which is not there; copy it from where the hybrid was saved."
        )


def keep_tokenizers(model: PreTrainedModel, directory: str | os.PathLike) -> None:
    """Writes the tokenizers that a saved hybrid needs and that have no address."""
    for entry in model.config.components if model.config.aligned else ():
        if entry.get("tokenizer") is not None and entry["repo_id"] is None:
            tokenizer_of(model, entry["name"]).save_pretrained(os.path.join(directory, folder_of(entry["name"])))
