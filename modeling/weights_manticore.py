"""Weights by reference: loading, saving and restoring under one rule.

A tensor is written unless it is bit-equal to the referenced tensor at the pinned commit; if it cannot be compared, it
is written. Loading overlays the hybrid's own tensors on the referenced ones. Nothing a user trained is ever lost.
"""

import contextlib
import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging
from transformers.utils.hub import create_and_tag_model_card

from .bounds_manticore import ManticoreError, guard, is_commit
from .carried_manticore import carries, copy_code, optional
from .components_manticore import backbone_name
from .devices_manticore import present
from .dtypes_manticore import (
    check_savable,
    check_unpacked,
    check_unquantized,
    convert_unpacked,
    loaded_dtypes,
    note_kept,
)
from .references_manticore import commit_in, component_files, lfs_id, open_files, verify, where
from .saving_manticore import check_whole, whole_directory

logger = logging.get_logger(__name__)

# Always the hybrid's own, always saved: a state dict that has it is a whole checkpoint or the shard that ends one.
_MARKER = "hybrid_mixer.alpha_logits"


class Renamer:
    """Checkpoint keys -> keys of the model, as Transformers renames them when it loads (embed_out -> lm_head, ...).

    Args:
        model: The model, on any device.
        prefix: A base model's prefix that is added or removed (a component may have been saved without its head).
        packed: Transformers' quantiser of a checkpoint that is quantised: it has names of its own for what it packs.
    """

    def __init__(self, model: PreTrainedModel, prefix: str | None = None, packed: object | None = None) -> None:
        self.transforms = _sorted(get_model_conversion_mapping(model))
        self.packed = None if packed is None else _sorted(get_model_conversion_mapping(model, None, packed))
        self.known = model.state_dict(keep_vars=True)
        self.prefix = prefix, prefix and self.known

    def __call__(self, key: str) -> tuple[str, bool]:
        """(key in the model, whether the tensor itself is converted too: fused, split or transposed)."""
        name, pattern = rename_source_key(key, *self.transforms, *self.prefix)
        if name not in self.known and key in self.known:  # as Transformers does
            return key, False
        if name not in self.known and self.packed is not None:
            name, pattern = rename_source_key(key, *self.packed, *self.prefix)
        return name, pattern is not None


def _sorted(transforms):
    """Transformers' (renamings, converters)."""
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    return renamings, [one for one in transforms if not isinstance(one, WeightRenaming)]


def tie_groups(model: PreTrainedModel) -> dict[str, set]:
    """Key -> the keys of its tie group (itself included)."""
    groups = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        groups[target] = group = groups.setdefault(source, {source})
        group.add(target)
    return groups


def overlay(
    model: PreTrainedModel, own: dict, hub: dict, stack: contextlib.ExitStack, rename: Renamer, ties: dict
) -> dict:
    """A hybrid's own tensors {checkpoint key: tensor} over its components' referenced ones, which are read lazily.

    `hub` goes to the Hub's client, `stack` keeps files open; `rename` and `ties` are the model's.
    """
    # A component's repo may store both ends of a tie; a tuned embedding must not meet its stale twin.
    names = {rename(key)[0] for key in own}
    covered = names.union(*(ties.get(name, ()) for name in names))
    merged, wanted = {}, set(rename.known)
    for entry in model.config.components:
        prefix = entry["name"] + "."
        if entry["weights"] != "reference" or not any(k.startswith(prefix) for k in wanted - covered):
            continue
        found = open_files(component_files(entry, hub), stack, where(entry), prefix)
        found = with_base_prefix(model, entry, found, rename)
        transplanted = own_vocabulary(model, entry, ties)
        for key, value in found.items():
            name = rename(key)[0]
            if name in transplanted:
                optional("transplant_manticore").check_rows(entry, key, value.get_shape()[0])
            elif name in covered or model.is_gone(name):
                continue
            elif name in wanted or model.config.route is None:
                merged[key] = value
    merged.update(own)
    return merged


def with_base_prefix(model: PreTrainedModel, entry: dict, found: dict, rename: Renamer) -> dict:
    """A component's tensors by key, with the base model's prefix where its file has none (the Hub's first GPT-2)."""
    name = entry["name"]
    base, out = f"{name}.{backbone_name(model.component(name))}.", {}
    for key, value in found.items():
        longer = base + key[len(name) + 1 :]
        lacks = rename(key)[0] not in rename.known and rename(longer)[0] in rename.known
        out[longer if lacks else key] = value
    return out


class ReferencedWeights:
    """Mixin of the hybrid classes, before PreTrainedModel."""

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # Private hook of Transformers (pinned >=5.24,<6; a test checks its signature): the one place where tensors
        # from several repositories can be merged before dtype, device map and quantisation are applied.
        load = PreTrainedModel._load_pretrained_model
        if getattr(model, "_hf_peft_config_loaded", False):  # an adapter's own tensors, for a hybrid that is loaded
            return load(model, state_dict, checkpoint_files, load_config, expected_keys)
        hub = dict(load_config.download_kwargs or {})
        model._component_cache_dir = hub.get("cache_dir")
        with contextlib.ExitStack() as stack:
            if state_dict is None:
                files = [str(file) for file in checkpoint_files or []]
                if not files or not all(file.endswith(".safetensors") for file in files):
                    raise ManticoreError(f"A hybrid's own weights must be safetensors files; found {files}.")
                model._own_commit = commit_in(files[0])  # adapters pin the hybrid they were made for
                for file in files:
                    if (stated := lfs_id(file)) is not None:  # in the Hub's cache
                        verify(file, stated, f"The hybrid's own {os.path.basename(file)}")
                model._loaded_from = os.path.dirname(os.path.abspath(files[0]))
                state_dict = open_files(files, stack, "The hybrid's own weights")
                while not check_whole(model._loaded_from):  # files were moved meanwhile
                    state_dict = open_files(files, stack, "The hybrid's own weights")
            quantizer = load_config.hf_quantizer
            packed = quantizer if quantizer is not None and quantizer.pre_quantized else None
            rename, ties = Renamer(model, packed=packed), tie_groups(model)
            if packed is not None:
                check_unpacked(model, state_dict)
            own, state_dict = set(state_dict), overlay(model, state_dict, hub, stack, rename, ties)
            if packed is not None:
                convert_unpacked(state_dict, own, rename, load_config.dtype_plan)
            there = {name for key in state_dict for name in ties.get(rename(key)[0], {rename(key)[0]})}
            if carries("heads_manticore") and optional("heads_manticore").forgo(model, there):
                rename = Renamer(model, packed=packed)
                expected_keys = None if expected_keys is None else list(rename.known)
            ignored = load_config.ignore_mismatched_sizes
            guard().checkpoint(model, state_dict, rename, ties, quantizer, ignored)
            info, offloaded = load(model, state_dict, checkpoint_files, load_config, expected_keys)
        patterns = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
        missing = {key for key in info.missing_keys if ties.get(key, {key}) <= set(info.missing_keys)}
        missing -= {key for key in missing if model.starts_anew(key) or any(p.search(key) for p in patterns)}
        # What Transformers' conversions make is known only now
        check_complete(model, missing, {} if ignored else {key: shapes for key, *shapes in info.mismatched_keys})
        if quantizer is not None:
            check_unquantized(model)
            note_kept(quantizer, model)
        if offloaded is not None:
            # Transformers 5.24 ties disk-offloaded keys only if they are in the first checkpoint file.
            for target, source in (model.all_tied_weights_keys or {}).items():
                if source in offloaded and target not in offloaded:
                    offloaded[target] = offloaded[source]
        return info, offloaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in Transformers: saves what is the hybrid's own, and the code, so that the directory loads anywhere.

        The files are moved in when all are written; an upload comes after, so that a failing network costs no weights.

        Raises:
            ManticoreError: `save_directory` is a file, or the hybrid is quantised by a method that is not saved.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ManticoreError(f"save_pretrained({str(target)!r}): there is a file of that name; give a directory.")
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(target, is_main_process, state_dict, push_to_hub, **kwargs)
        check_savable(self)
        kwargs["save_original_format"] = False
        upload = {key: kwargs.pop(key, None) for key in ("repo_id", "commit_message", "create_pr", "private")}
        writes = self.should_save_on_this_rank(is_main_process)
        made_for = "labels" if hasattr(self, "score") or "_gone" in self.__dict__ else "text"
        before = self._keys_to_ignore_on_save
        self._keys_to_ignore_on_save = set(before or ()) | (self.unchanged_keys(state_dict) if writes else set())
        for entry in self.config.components if writes else ():
            if entry["weights"] == "reference" and not is_commit(entry["revision"]):
                self._keys_to_ignore_on_save = before
                raise ManticoreError(
                    f"{where(entry)} is referenced by a name that can move, and the Hub cannot be asked for its "
                    "commit: nothing was saved. Go online, or give the 40-hex commit."
                )
        if state_dict is not None:
            state_dict = dict(state_dict)  # Transformers deletes the ignored keys from the dict it is given
            for twin, source in (self.all_tied_weights_keys or {}).items():
                # Gathered from shards, both ends of a tie are tensors of their own, and would both be written.
                ends = [state_dict.get(twin), state_dict.get(source)]
                if all(_comparable(end) for end in ends) and torch.equal(*ends):
                    state_dict[twin] = state_dict[source]
        elif writes and not hasattr(self, "hf_device_map") and any(p.device.type == "meta" for p in self.parameters()):
            # Offloaded by accelerate itself: Transformers looks for such weights only where it dispatched the model
            state_dict = {key: present(self, key, value) for key, value in self.state_dict().items()}
            ties = self.all_tied_weights_keys or {}
            state_dict |= {key: state_dict[twin] for key, twin in ties.items() if key in state_dict}
        try:
            with whole_directory(target, writes) as directory:
                if writes:
                    copy_code(directory, self.config, (made_for,))
                    self._save_beside(directory, target)
                    if self.config.aligned:
                        optional("aligned_tokenizers").keep_tokenizers(self, directory)
                super().save_pretrained(directory, is_main_process, state_dict=state_dict, **kwargs)
                written = set(os.listdir(directory))
        finally:
            self._keys_to_ignore_on_save = before
        if push_to_hub and writes:
            self._upload(target, written, kwargs.get("token"), **upload)

    def _upload(self, directory, written, token, repo_id, commit_message, create_pr, private):
        """What `save_pretrained(push_to_hub=True)` of Transformers does once the files are written."""
        name = repo_id or directory.absolute().name
        name = HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id
        if not (directory / "README.md").exists() or HfApi(token=token).file_exists(name, "README.md"):
            create_and_tag_model_card(name, self.model_tags, token=token).save(directory / "README.md")
            written.add("README.md")
        others = {file: os.path.getmtime(directory / file) for file in set(os.listdir(directory)) - written}
        self._upload_modified_files(
            directory, name, others, commit_message=commit_message, token=token, create_pr=bool(create_pr)
        )

    def _save_beside(self, directory, target):
        """Writes into `directory` what else belongs to a hybrid saved in `target`; the package's classes do."""

    def aside(self) -> dict:
        """{name: buffer} of what is kept out of the state dict for the time being; the package's classes do."""
        return {}

    def starts_anew(self, key: str) -> bool:
        """Whether a checkpoint need not have a tensor of the model, which then gets an initial value."""
        return False

    @classmethod
    def is_remote_code(cls) -> bool:
        """False: `copy_code` writes the files, Transformers need not (it would copy torch's after FSDP2's wrapping)."""
        return False

    @torch.no_grad()
    def unchanged_keys(self, state_dict: dict | None = None) -> set[str]:
        """Keys of the tensors that are bit-equal to the referenced ones and therefore need not be saved."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        ties, loaded, out = tie_groups(self), loaded_dtypes(self), set()
        with contextlib.ExitStack() as stack:
            for entry in (one for one in self.config.components if one["weights"] == "reference"):
                try:
                    reference = self._reference(entry, stack)
                except ManticoreError as err:
                    logger.warning(f"{err} All of this component's weights are saved with the hybrid.")
                    continue
                for key, value in state_dict.items():
                    if not key.startswith(entry["name"] + "."):
                        continue
                    known, value = _referenced(reference, key, ties), present(self, key, value)
                    if known is not None and _comparable(value) and _same(known, value, loaded(key)):
                        out.add(key)
        # One changed end of a tie is a change of both.
        return {key for key in out if ties.get(key, {key}) & set(state_dict) <= out}

    def _reference(self, entry, stack):
        """{key in this model: tensor or lazy slice} of a component's pinned checkpoint, from the cache if it is there.

        Without a transplanted vocabulary's embedding and head. ManticoreError if it cannot be read.
        """
        hub, prefix = {"cache_dir": getattr(self, "_component_cache_dir", None)}, entry["name"] + "."
        try:
            files = component_files(entry, {**hub, "local_files_only": True})
        except ManticoreError:
            files = component_files(entry, hub)
        rename, out, converted = Renamer(self), {}, False
        found = open_files(files, stack, where(entry), prefix)
        for key, value in with_base_prefix(self, entry, found, rename).items():
            name, changed = rename(key)
            out[name], converted = value, converted or changed
        if converted:
            # Fused or split tensors (mixtures of experts) can only be compared once Transformers has converted them.
            how = {"config": copy.deepcopy(self.component(entry["name"]).config), "dtype": self.dtype}
            how |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
            whole, info = AutoModelForCausalLM.from_pretrained(os.path.dirname(files[0]), **how)
            # What the checkpoint lacks has initial values, which a trained tensor may equal (zeros, ones).
            lacking = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
            out = {prefix + key: value for key, value in whole.state_dict().items() if key not in lacking}
        for key in own_vocabulary(self, entry, tie_groups(self)):
            out.pop(key, None)
        return out

    def state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """As in torch."""
        self.__dict__.pop("_earlier_shards", None)  # Transformers asks before it loads the shards of a checkpoint
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False) -> Any:
        """As in torch, for checkpoints of a hybrid: tensors that were not saved come from the references.

        The Trainer resumes through this. Of a sharded checkpoint, which arrives in several calls, the references fill
        in what no shard had. A state dict without the hybrid's own weights is taken as it is.
        """
        given = dict(state_dict)
        earlier = self.__dict__.setdefault("_earlier_shards", set())
        own = set(super().state_dict()) - set(self.aside())
        ties = tie_groups(self)
        twins = {twin: key for key in given for twin in ties.get(key, ()) if twin not in given}
        given |= {twin: given[key] for twin, key in twins.items()}
        missing = own - set(given) - earlier if _MARKER in given else set()
        # Shards come in any order. Those after this one overwrite what it took from the references.
        earlier |= set(given)
        with contextlib.ExitStack() as stack:
            for entry in self.config.components:
                lacking = [key for key in missing if key.startswith(entry["name"] + ".")]
                if not lacking or entry["weights"] != "reference":
                    continue
                reference = self._reference(entry, stack)
                found = {key: _referenced(reference, key, ties) for key in lacking}
                given |= {key: known[...] for key, known in found.items() if known is not None}
            result = super().load_state_dict(given, strict=strict, assign=assign)
            if not strict:  # as torch says it of what was not given; safetensors' `load_model` counts on it
                result.missing_keys.extend(twins)
            return result


def keep_loaded_embeddings(component: PreTrainedModel) -> None:
    """Keeps `initialize_weights` from embeddings that were loaded: Youtu's class sets their row of padding to zero."""
    for module in component.modules():
        loaded = isinstance(module, torch.nn.Embedding) and getattr(module.weight, "_is_hf_initialized", False)
        if loaded and not module._buffers:  # which would not be filled
            module._is_hf_initialized = True


def _referenced(reference, key, ties):
    """A component's own tensor for a key, or that of its tied twin; None if it has neither."""
    if key in reference:  # some repositories store both ends of a tie, and they may differ
        return reference[key]
    return next((reference[twin] for twin in sorted(ties.get(key, ())) if twin in reference), None)


def _comparable(value):
    """Whether a tensor's bits can be compared: not on the meta device, and no subclass (DTensor, quantised)."""
    plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return plain and value.device.type != "meta" and not value.is_quantized and value.layout == torch.strided


def _same(known, value, loaded):
    """Whether a reference gives a tensor's very bits when it is loaded in the dtype `loaded`.

    If that is narrower than the tensor's own, nothing of the tensor may get lost either: it can be loaded in another.
    """
    known = known if isinstance(known, torch.Tensor) else known[...]
    if known.shape != value.shape or known.is_floating_point() != value.is_floating_point():  # packed in eight bits
        return False
    dtype = torch.promote_types(value.dtype, loaded) if value.is_floating_point() else value.dtype
    known, value = known.detach().to(dtype), value.detach().cpu().to(dtype)
    # As bytes too: 0.0 == -0.0.
    by_bytes = [one.contiguous().reshape(-1).view(torch.uint8) for one in (known, value)]
    return torch.equal(known, value) and torch.equal(*by_bytes)


class ShapeError(ManticoreError, RuntimeError):
    """Tensors of other shapes than the model's: a RuntimeError, as in Transformers."""


def check_complete(model: PreTrainedModel, missing: list | set, wrong: dict) -> None:
    """Raises ManticoreError if keys of a hybrid are missing, or wrong: {key: (shape in the file, in the model)}."""
    if carries("heads_manticore"):
        optional("heads_manticore").check_labels(model, missing, wrong)
    if missing:
        key = min(missing)
        raise ManticoreError(
            f"{part_of(model, key)}: {len(missing)} tensors are neither in the hybrid's file nor in its components' "
            f"repositories, for example {key}. It is incomplete: save or upload the hybrid again from a complete copy."
        )
    if wrong:
        key = min(wrong)
        raise ShapeError(
            f"{part_of(model, key)}: {len(wrong)} tensors have another shape than config.json says, for example {key}: "
            f"{tuple(wrong[key][0])} in the file, {tuple(wrong[key][1])} in the model. Use the config.json that was "
            "saved with these weights."
        )


def own_vocabulary(model: PreTrainedModel, entry: dict, ties: dict) -> set[str]:
    """Names in the hybrid of a transplanted component's embedding and head tensors; empty for other components."""
    if entry["transplant"] is None:
        return set()
    return optional("transplant_manticore").own_vocabulary(model, entry, ties)


def part_of(model: PreTrainedModel, key: str) -> str:
    """What a message calls the part of a hybrid that a tensor belongs to."""
    entry = next((entry for entry in model.config.components if key.startswith(entry["name"] + ".")), None)
    if entry is None:
        return "The hybrid's own weights"
    return where(entry) if entry["weights"] == "reference" else f"Component {entry['name']!r} (embedded)"
