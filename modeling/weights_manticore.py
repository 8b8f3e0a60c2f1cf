"""Weights by reference: loading, saving and restoring under one rule.

A tensor is written unless it is bit-equal to the referenced tensor at the pinned commit; if it cannot be compared, it
is written. Loading overlays the hybrid's own tensors on the referenced ones. Nothing a user trained is ever lost.
"""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging

from .components_manticore import WEIGHT_FILES
from .configuration_manticore import ManticoreError

logger = logging.get_logger(__name__)

# Always the hybrid's own, always saved: a state dict that has it is a whole checkpoint or the shard that ends one.
_MARKER = "hybrid_mixer.alpha_logits"

_HUB_KEYS = ("cache_dir", "token", "local_files_only", "force_download", "proxies")


def component_files(entry, hub):
    """Paths of a referenced component's safetensors files at its pinned commit, downloaded if need be.

    Args:
        entry: The component's entry in the configuration.
        hub: Keyword arguments of the Hub client.

    Raises:
        ManticoreError: Names the component, the repository and what to do.
    """
    hub = {key: value for key, value in (hub or {}).items() if key in _HUB_KEYS and value is not None}
    where = f"Component {entry['name']!r} ({entry['repo_id']}@{entry['revision'][:12]})"

    def get(file):
        return hf_hub_download(
            entry["repo_id"], file, revision=entry["revision"], subfolder=entry["subfolder"] or None, **hub
        )

    try:
        try:
            return [get(WEIGHT_FILES[0])]
        except LocalEntryNotFoundError:
            index = get(WEIGHT_FILES[1])
        except EntryNotFoundError:
            index = get(WEIGHT_FILES[1])
        import json

        shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        return [get(shard) for shard in shards]
    except LocalEntryNotFoundError as err:
        raise ManticoreError(
            f"{where}: its weights are not in the local cache and the Hub cannot be reached; go online once, or put "
            "them in the cache with `hf download`."
        ) from err
    except (HfHubHTTPError, OSError) as err:
        raise ManticoreError(
            f"{where}: its weights cannot be read: {err}. If the repository is private or gated, log in with an "
            "account that may read it; if it is gone, the hybrid cannot be loaded without a copy."
        ) from err


def _open(files, stack, prefix=""):
    """{prefix + key: lazy slice} of safetensors files, kept open by `stack`."""
    out = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except Exception as err:
            raise ManticoreError(f"{file} is no readable safetensors file ({err}); delete it and load again.") from err
        out.update({prefix + key: handle.get_slice(key) for key in handle.keys()})
    return out


class _Renamer:
    """Checkpoint keys -> keys of the model, as Transformers renames them when it loads (embed_out -> lm_head, ...)."""

    def __init__(self, model):
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if not isinstance(t, WeightRenaming)]

    def __call__(self, key):
        """(key in the model, whether the tensor itself is converted too: fused, split or transposed)."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, None, None)
        return name, pattern is not None


def _tie_groups(model):
    """Key -> the keys of its tie group (itself included)."""
    groups = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        group = groups.setdefault(source, {source})
        group.add(target)
        groups[target] = group
    return groups


def overlay(model, own, hub, stack):
    """The hybrid's own tensors over its components' referenced ones, as one lazily read state dict.

    Args:
        model: The hybrid, on the meta device or not.
        own: Own tensors by checkpoint key.
        hub: Keyword arguments of the Hub client.
        stack: ExitStack that keeps the component files open.
    """
    rename, ties = _Renamer(model), _tie_groups(model)
    covered = set()
    for key in own:
        name, _ = rename(key)
        # A component's repo may store both ends of a tie; a tuned embedding must not meet its stale twin.
        covered |= ties.get(name, {name})
    merged = {}
    wanted = set(model.state_dict())
    for entry in model.config.components:
        prefix = entry["name"] + "."
        if entry["weights"] != "reference" or not any(k.startswith(prefix) for k in wanted - covered):
            continue
        found = _open(component_files(entry, hub), stack, prefix)
        merged.update({key: value for key, value in found.items() if rename(key)[0] not in covered})
    merged.update(own)
    return merged


class ReferencedWeights:
    """Mixin of the hybrid classes, before PreTrainedModel."""

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # Private hook of Transformers (pinned >=5.23,<6; a test checks its signature): the one place where tensors
        # from several repositories can be merged before dtype, device map and quantisation are applied.
        with contextlib.ExitStack() as stack:
            if state_dict is None:
                files = list(checkpoint_files or [])
                if not files or not all(str(file).endswith(".safetensors") for file in files):
                    raise ManticoreError(f"A hybrid's own weights must be safetensors files; found {files}.")
                hub = dict(load_config.download_kwargs or {})
                model._component_cache_dir = hub.get("cache_dir")
                state_dict = overlay(model, _open(files, stack), hub, stack)
            info, offloaded = PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        _refuse_incomplete(model, info, load_config.ignore_mismatched_sizes)
        if offloaded is not None:
            # Transformers 5.23 ties disk-offloaded keys only if they are in the first checkpoint file.
            for target, source in (model.all_tied_weights_keys or {}).items():
                if source in offloaded and target not in offloaded:
                    offloaded[target] = offloaded[source]
        return info, offloaded

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """Saves what is the hybrid's own, and the code, so that the directory loads anywhere.

        The files are written beside `save_directory` and moved in when complete. Arguments as in Transformers.

        Raises:
            ManticoreError: `save_directory` is a file.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ManticoreError(f"save_pretrained({str(target)!r}): there is a file of that name; give a directory.")
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(
                save_directory, is_main_process, state_dict=state_dict, push_to_hub=push_to_hub, **kwargs
            )
        kwargs["save_original_format"] = False
        writes = self.should_save_on_this_rank(is_main_process)
        before = self._keys_to_ignore_on_save
        self._keys_to_ignore_on_save = set(before or ()) | (self.unchanged_keys(state_dict) if writes else set())
        if state_dict is not None:
            state_dict = dict(state_dict)  # Transformers deletes the ignored keys from the dict it is given
        try:
            with _whole_directory(target, writes) as directory:
                if writes:
                    copy_code(directory)
                super().save_pretrained(
                    directory, is_main_process, state_dict=state_dict, push_to_hub=push_to_hub, **kwargs
                )
        finally:
            self._keys_to_ignore_on_save = before

    @torch.no_grad()
    def unchanged_keys(self, state_dict=None):
        """Keys of the tensors that are bit-equal to the referenced ones and therefore need not be saved."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        ties, out = _tie_groups(self), set()
        with contextlib.ExitStack() as stack:
            for entry in self.config.components:
                if entry["weights"] != "reference":
                    continue
                reference = self._reference(entry, stack)
                for key, value in state_dict.items():
                    if key.startswith(entry["name"] + ".") and _comparable(value):
                        known = next((reference[k] for k in ties.get(key, {key}) if k in reference), None)
                        if known is not None and _same(known, value):
                            out.add(key)
        # One changed end of a tie is a change of both.
        return {key for key in out if ties.get(key, {key}) & set(state_dict) <= out}

    def _reference(self, entry, stack):
        """{key in this model: tensor or lazy slice} of a component's pinned checkpoint; {} if it cannot be read."""
        hub = {"cache_dir": getattr(self, "_component_cache_dir", None)}
        prefix = entry["name"] + "."
        try:
            try:
                files = component_files(entry, {**hub, "local_files_only": True})
            except ManticoreError:
                files = component_files(entry, hub)
        except ManticoreError as err:
            logger.warning(f"{err} All of this component's weights are saved with the hybrid.")
            return {}
        rename, out, converted = _Renamer(self), {}, False
        for key, value in _open(files, stack, prefix).items():
            name, changed = rename(key)
            converted |= changed
            out[name] = value
        if converted:
            # Fused or split tensors (mixtures of experts) can only be compared once Transformers has converted them.
            part = self.component(entry["name"])
            whole = AutoModelForCausalLM.from_pretrained(
                os.path.dirname(files[0]), config=part.config, dtype=part.dtype, use_safetensors=True
            )
            out = {prefix + key: value for key, value in whole.state_dict().items()}
        return out

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As in torch, for checkpoints of a hybrid: tensors that were not saved come from the references.

        The Trainer resumes through this. A sharded checkpoint arrives in several calls; the references fill in what no
        shard had.
        """
        given = dict(state_dict)
        earlier = self.__dict__.setdefault("_earlier_shards", set())
        own = self.state_dict()
        ties = _tie_groups(self)
        for key in list(given):
            for twin in ties.get(key, ()):
                given.setdefault(twin, given[key])
        if _MARKER not in given or not any(k not in given for k in own):
            earlier |= set(given)
            if _MARKER in given:
                earlier.clear()
            return super().load_state_dict(given, strict=strict, assign=assign)
        missing = set(own) - set(given) - earlier
        earlier.clear()
        with contextlib.ExitStack() as stack:
            for entry in self.config.components:
                lacking = [key for key in missing if key.startswith(entry["name"] + ".")]
                if not lacking or entry["weights"] != "reference":
                    continue
                reference = self._reference(entry, stack)
                for key in lacking:
                    known = next((reference[k] for k in ties.get(key, {key}) if k in reference), None)
                    if known is not None:
                        given[key] = known[...]
            return super().load_state_dict(given, strict=strict, assign=assign)


def _comparable(value):
    plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return plain and value.device.type != "meta"


def _same(known, value):
    known = known if isinstance(known, torch.Tensor) else known[...]
    return known.shape == value.shape and torch.equal(known.to(value.dtype), value.detach().cpu())


def _refuse_incomplete(model, info, ignore_mismatched):
    patterns = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    ties = _tie_groups(model)
    missing = {
        key for key in info.missing_keys
        if not any(p.search(key) for p in patterns) and ties.get(key, {key}) <= set(info.missing_keys)
    }  # fmt: skip
    if missing:
        raise ManticoreError(
            f"{len(missing)} tensors are neither in the hybrid's file nor in its components' repositories, for example "
            f"{min(missing)}: the repository is incomplete."
        )
    if info.mismatched_keys and not ignore_mismatched:
        key, got, expected = sorted(info.mismatched_keys)[0]
        raise ManticoreError(
            f"{len(info.mismatched_keys)} tensors have another shape than the configuration says, for example {key}: "
            f"{tuple(got)} in the file, {tuple(expected)} in the model."
        )


def copy_code(directory):
    """Copies the code files of this folder, so that the saved hybrid loads where the package is not installed."""
    for file in Path(__file__).parent.glob("*_manticore.py"):
        shutil.copyfile(file, Path(directory) / file.name)


@contextlib.contextmanager
def _whole_directory(target, active):
    """Gives a scratch directory whose files are moved into `target` when the block ends well.

    A new target appears by one rename. In an existing one each file is replaced whole, config.json last; its other
    files stay, but for shards of an earlier save.
    """
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=parent))
    try:
        inner = scratch / target.absolute().name
        inner.mkdir()
        yield str(inner)
        if not active:
            return
        if not target.exists() or not any(target.iterdir()):
            if target.exists():
                target.rmdir()
            os.replace(inner, target)
            return
        fresh = {file.name for file in inner.iterdir()}
        for file in sorted(inner.iterdir(), key=lambda f: f.name == "config.json"):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                os.replace(file, target / file.name)
        for stale in target.glob("model*.safetensors*"):
            if stale.name not in fresh:
                stale.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
