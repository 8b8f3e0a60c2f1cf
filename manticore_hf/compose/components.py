"""From what a user names to components that can be joined: resolving, checking, loading.

Everything that is unsupported is found in `config.json` and file lists, before weights are downloaded.
"""

import json
import os
import re
from dataclasses import dataclass

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from manticore_hf.compose.unsupported import check_kind, check_type
from manticore_hf.hub.bare_names import check_bare_name
from manticore_hf.hub.licenses import read_license
from manticore_hf.modeling.bounds_manticore import ManticoreError, build_config, guard, is_causal_lm, show
from manticore_hf.modeling.code_manticore import code_of, registered, trust
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from manticore_hf.modeling.references_manticore import WEIGHT_FILES, hub_reason
from manticore_hf.utils.defence import check_component_name
from manticore_hf.utils.files import check_no_pipes, names_gguf

PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass
class ComponentSpec:
    """One component, spelled out.

    Args:
        source: Repo id ("org/name" or "org/name@revision"), local directory, or an instantiated causal LM.
        name: Attribute name in the hybrid. Default: made from the repo, directory or model type.
        revision: Branch, tag or commit; resolved to a 40-hex commit.
        subfolder: Folder of the repo that holds the model.
        embed: Keep the weights in the hybrid's own file even though a repo holds them.
        trust_remote_code: Run the code of the repo, at the commit that it resolves to, if its architecture is not
            Transformers' own. Whoever loads the hybrid has to ask for that again (`trust_component_code=[name]`).
        model: An instance made from the weights at `source`, to take instead of them: what it shares with them stays a
            reference, only what differs is the hybrid's own.
        transplant: How the model got its vocabulary, if that is not the one at `source` (see
            `manticore_hf.utils.hybrid_settings.check_transplant`).
    """

    source: object
    name: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    embed: bool = False
    trust_remote_code: bool = False
    model: PreTrainedModel | None = None
    transplant: dict | None = None

    @classmethod
    def of(cls, item: object) -> "ComponentSpec":
        """An item of `from_components([...])` as a spec."""
        spec = item if isinstance(item, cls) else cls(item)
        if not isinstance(spec.source, (str, os.PathLike, PreTrainedModel)):
            raise ManticoreError(
                f"Component {spec.source!r} is a {type(spec.source).__name__}; give a repo id, a local directory, a "
                "causal LM or a ComponentSpec."
            )
        return spec


@dataclass
class Resolved:
    """A component whose configuration is known and acceptable; its weights may not be here yet."""

    name: str
    config: PreTrainedConfig
    model: PreTrainedModel | None = None
    directory: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    embed: bool = False
    license: str | None = None
    code: dict | None = None
    transplant: dict | None = None
    tokenizer: dict | None = None

    def entry(self) -> dict:
        """The component's entry in ManticoreConfig(components=...)."""
        reference = self.repo_id is not None and not self.embed
        return {
            "name": self.name,
            "repo_id": self.repo_id,
            "revision": self.revision,
            "subfolder": self.subfolder,
            "weights": "reference" if reference else "embedded",
            "license": self.license,
            "code": self.code,
            "transplant": self.transplant,
            "tokenizer": self.tokenizer,
            "config": self.config,
        }

    @property
    def address(self) -> str:
        """What a message calls it."""
        return f"{self.name!r} ({self.repo_id or self.directory or type(self.model).__name__})"


def resolve(spec: ComponentSpec, hub: dict, weights: bool = True) -> Resolved:
    """Finds a component's configuration; what cannot be joined raises.

    Args:
        spec: A ComponentSpec.
        hub: Keyword arguments for the Hub client: token, cache_dir, local_files_only.
        weights: Whether a component without readable weights raises; only then are they asked for.

    Raises:
        ManticoreError: Names the component and the reason.
    """
    if isinstance(spec.source, PreTrainedModel):
        return _resolve_model(spec)
    found = _resolve_address(spec, hub, weights)
    if spec.model is not None:
        _replace(found, spec)
    return found


def _resolve_address(spec, hub, weights):
    source = os.fspath(spec.source)
    if os.path.isdir(source):
        found = Resolved(_name(spec, os.path.basename(os.path.abspath(source))), None, directory=source)
        found.subfolder = spec.subfolder
        folder = os.path.join(source, spec.subfolder or "")
        check_no_pipes(folder)
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise ManticoreError(f"Component {found.name!r}: the directory {folder!r} has no config.json.")
        _read_config(found, folder)
        if weights:
            _check_weight_files(found, lambda file: os.path.isfile(os.path.join(folder, file)))
            _check_no_adapter(
                found, lambda file: any(os.path.isfile(os.path.join(one, file)) for one in (folder, source))
            )
        found.license = read_license(os.path.join(source, "README.md"))
        return found
    if names_gguf(source):
        raise ManticoreError(
            f"Component {source!r} is a GGUF file, which only the commands convert; here give the directory "
            "that `manticore-hf convert` makes of it."
            if os.path.isfile(source)
            else f"Component {source!r}: there is no GGUF file of this name; check the path."
        )
    return _resolve_repo(spec, source, hub, weights)


def _resolve_model(spec):
    model = spec.source
    found = Resolved(_name(spec, model.config.model_type), model.config, model=model)
    _check_architecture(found, {**model.config.to_dict(), "architectures": [type(model).__name__]})
    check_kind(f"Component {found.address}", found.config)
    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type)
    if usual is None:
        raise ManticoreError(f"Component {found.address} uses remote code: name its repository, which has the code.")
    if type(model).__name__ != usual:
        raise ManticoreError(
            f"Component {found.address} is a {type(model).__name__}; a saved hybrid would rebuild it as {usual}. Give "
            "a model of that class."
        )
    if spec.revision:
        raise ManticoreError(
            f"Component {found.name!r} is an instantiated model: it has no revision {spec.revision!r}."
        )
    return found


def _replace(found, spec):
    """Puts the instance of a spec in the place of the weights that were found."""
    model, kind = spec.model, found.config.model_type
    if not isinstance(model, PreTrainedModel) or model.config.model_type != kind:
        raise ManticoreError(
            f"Component {found.address}: model= is a {type(model).__name__}; give a causal LM of model type {kind!r}, "
            "made from the weights there."
        )
    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if usual not in (None, type(model).__name__):
        raise ManticoreError(
            f"Component {found.address}: model= is a {type(model).__name__}; a saved hybrid would rebuild it as a "
            f"{usual}."
        )
    found.model, found.config, found.transplant = model, model.config, spec.transplant


def _resolve_repo(spec, source, hub, weights):
    repo_id, _, revision = source.partition("@")
    if revision and spec.revision and revision != spec.revision:
        raise ManticoreError(f"Component {source!r}: revision={spec.revision!r} contradicts '@{revision}'.")
    revision = revision or spec.revision or "main"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or ".." in repo_id or os.path.exists(source):
        raise ManticoreError(
            f"Component {source!r} is neither a local directory that exists nor a Hub repository id ('org/name') "
            "nor a GGUF file (.gguf)."
        )
    found = Resolved(_name(spec, repo_id.split("/")[-1]), None, repo_id=repo_id, subfolder=spec.subfolder)
    found.embed = spec.embed
    check_bare_name(f"Component {found.name!r}", repo_id, **hub)

    def get(file, required=True, commit=None, folder=spec.subfolder):
        try:
            return hf_hub_download(repo_id, file, subfolder=folder, revision=commit or revision, **hub)
        except GatedRepoError as err:
            raise ManticoreError(f"Component {found.address}: {hub_reason(err, repo_id)}") from err
        except RepositoryNotFoundError as err:
            raise ManticoreError(
                f"Component {found.address}: there is no directory of this name here and no such repository, or it is "
                "private or gated and the token given does not open it (log in with `hf auth login`)."
            ) from err
        except RevisionNotFoundError as err:
            raise ManticoreError(f"Component {found.address}: the repository has no revision {revision!r}.") from err
        except LocalEntryNotFoundError as err:
            if required:
                said = f"{file} at revision {revision!r} cannot be fetched: {hub_reason(err, repo_id)}"
                raise ManticoreError(
                    f"Component {found.address}: there is no directory of this name here, and {said}"
                ) from err
        except HfHubHTTPError as err:
            if required and err.response is not None and err.response.status_code != 404:
                raise ManticoreError(f"Component {found.address}: {file}: {hub_reason(err, repo_id)}") from err
            if required:
                raise ManticoreError(f"Component {found.address}: revision {revision!r} has no {file}.") from err
        return None

    config_file = get("config.json")
    commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", config_file)
    if commit is None:
        raise ManticoreError(f"Component {found.address}: revision {revision!r} did not resolve to a commit.")
    found.revision = commit[1]
    _read_config(found, os.path.dirname(config_file), spec.trust_remote_code, hub.get("token"))

    def exists(file, folder=spec.subfolder):
        path = os.path.join(folder, file) if folder else file
        known = try_to_load_from_cache(repo_id, path, cache_dir=hub.get("cache_dir"), revision=found.revision)
        if isinstance(known, str):
            return True
        if hub.get("local_files_only") or os.environ.get("HF_HUB_OFFLINE", "0") in ("1", "ON", "YES", "TRUE"):
            return False
        try:
            return HfApi(token=hub.get("token")).file_exists(repo_id, path, revision=found.revision)
        except HTTPError as err:
            raise ManticoreError(f"Component {found.address}: {file}: {hub_reason(err, repo_id)}") from err

    if weights:
        _check_weight_files(found, exists)
        _check_no_adapter(found, lambda file: exists(file) or spec.subfolder and exists(file, ""))
    found.license = read_license(get("README.md", required=False, commit=found.revision, folder=None))
    return found


def _name(spec, text):
    if spec.name is not None:
        check_component_name(spec.name)
        return spec.name
    name = re.sub(r"\W+", "_", text).strip("_").lower() or "component"
    name = name if name[0].isalpha() else f"c_{name}"
    try:
        check_component_name(name)
    except ManticoreError:
        name = f"{name}_lm"
    return name


def _read_config(found, folder, trusted=False, token=None):
    """Sets `found.config` to what config.json says; its repository's code is run only if it is trusted."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError, RecursionError) as err:
        raise ManticoreError(
            f"Component {found.address}: its config.json is not a JSON object ({err}); repair it or choose another."
        ) from err
    if not isinstance(values, dict):
        raise ManticoreError(
            f"Component {found.address}: its config.json is not a JSON object but {show(values)}; repair it or choose "
            "another."
        )
    guard().file(f"Component {found.address}", values)
    kind, auto_map = values.get("model_type"), values.get("auto_map")
    if kind is not None and not isinstance(kind, str):
        raise ManticoreError(f"Component {found.address}: model_type={show(kind)} in its config.json is not a name.")
    if trusted and auto_map and (kind not in CONFIG_MAPPING or kind in registered()):
        what = f"Component {found.address}"
        found.code = code_of(what, auto_map)
        trust(what, found.entry(), kind, token)
    _check_architecture(found, values)
    try:
        values, _ = PreTrainedConfig.get_config_dict(folder)  # which knows how infinities are written
    except Exception as err:
        raise ManticoreError(
            f"Component {found.address}: its config.json is invalid ({err}); repair it or choose another."
        ) from err
    found.config = build_config(found.name, values, f"Component {found.address}")
    check_kind(f"Component {found.address}", found.config)


def _check_architecture(found, values):
    kind = values.get("model_type")
    if kind == ManticoreConfig.model_type:
        raise ManticoreError(f"Component {found.address} is itself a hybrid; name its components instead.")
    if kind is None and {"d_model", "n_layer", "vocab_size"} <= set(values):
        raise ManticoreError(
            f"Component {found.address} is a checkpoint in mamba_ssm's own layout; convert it first: "
            "`manticore-hf convert`."
        )
    if kind not in CONFIG_MAPPING or kind in registered() and found.code is None:
        if values.get("auto_map"):
            raise ManticoreError(
                f"Component {found.address} needs remote code (model_type {kind!r}, auto_map {values['auto_map']}); "
                "read that code, then give ComponentSpec(..., trust_remote_code=True), or choose a component of an "
                "architecture that Transformers itself has."
            )
        raise ManticoreError(
            f"Component {found.address}: its architecture (model_type {kind!r}) is unknown to the installed "
            "Transformers; upgrade Transformers or choose another component."
        )
    if values.get("is_encoder_decoder") or getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False) is True:
        raise ManticoreError(
            f"Component {found.address} is an encoder-decoder ({kind}); only causal LMs can be joined."
        )
    if not is_causal_lm(kind):
        raise ManticoreError(f"Component {found.address} is not a causal LM (model_type {kind!r}).")
    check_type(f"Component {found.address}", kind)
    architectures = values.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    several = "text_config" in values  # which `check_kind` says better
    if architectures and not several and not any("CausalLM" in str(a) or "LMHead" in str(a) for a in architectures):
        raise ManticoreError(
            f"Component {found.address} was saved as {show(architectures[0])}, not as a causal LM; only causal LMs "
            "can be joined."
        )


def _check_weight_files(found, exists):
    if any(exists(file) for file in WEIGHT_FILES):
        return
    for file in PICKLE_FILES:
        if exists(file):
            raise ManticoreError(
                f"Component {found.address} has its weights only as a pickle ({file}), which can run code when read. "
                "Convert it to safetensors first: `manticore-hf convert`."
            )
    raise ManticoreError(f"Component {found.address} has no {WEIGHT_FILES[0]} and no {WEIGHT_FILES[1]}.")


def _check_no_adapter(found, exists):
    if exists("adapter_config.json"):
        raise ManticoreError(
            f"Component {found.address} has an adapter beside its weights (adapter_config.json), which names the model "
            "that Transformers would load in its place, wherever that is. Choose a component without one, or merge it "
            "(merge_and_unload) and save the model."
        )


def load(found: Resolved, dtype: torch.dtype, hub: dict) -> PreTrainedModel:
    """The component's causal LM, weights read from safetensors only.

    Raises:
        ManticoreError: The weights cannot be read or do not fit; names the component.
    """
    if found.model is not None:
        return _keep_untied(found.model)
    where = found.directory or found.repo_id
    kwargs = {"revision": found.revision, **hub} if found.repo_id else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            where,
            config=found.config,
            subfolder=found.subfolder or "",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **kwargs,
        )
    except Exception as err:
        raise ManticoreError(f"Component {found.address}: its weights cannot be loaded: {err}") from err
    if info["missing_keys"] or info["mismatched_keys"]:
        shapes = [f"{key} ({tuple(got)}, not {tuple(need)})" for key, got, need in sorted(info["mismatched_keys"])]
        bad = sorted(info["missing_keys"]) + shapes
        raise ManticoreError(
            f"Component {found.address}: {len(bad)} weights are missing or of another shape in its checkpoint, "
            f"for example {bad[0]}: its config.json belongs to other weights."
        )
    return _keep_untied(model)


def _keep_untied(model):
    """Corrects a configuration that ties a head to embeddings which differ, or the hybrid would tie them.

    Some repositories store both; Transformers then keeps both.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)  # some (Inkling) never tie, and do not say so
    if tied and None not in ends and not torch.equal(ends[0].weight, ends[1].weight):
        model.config.tie_word_embeddings = False
    return model
