"""What a configuration may say: a hybrid's `config.json` comes from a stranger, and Transformers believes all of it.

Configurations are checked before anything is made of them. Transformers loops over the numbers while it reads them
(a list of layer types, a dict of labels), so that a number alone can hang a process; it takes methods for settings, and
some settings for instructions to load code or files. This module holds no class of a model. It
is the first that is imported, so it says if Transformers is too old for all of them.
"""

import copy
import inspect
import keyword
import re

import torch
import transformers

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
    raise ImportError(
        f"A manticore hybrid needs Transformers 5.23 or newer; {transformers.__version__} is installed: "
        "pip install -U 'transformers>=5.23,<6'"
    )

from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402
from transformers.utils import logging  # noqa: E402

from .settings_manticore import ManticoreError  # noqa: E402

MAX_COMPONENTS = 32
MAX_LAYERS = 1024
MAX_WIDTH = 2**18
"""Layers of one component, and of all components together. Twice that of the deepest language models there are."""

_MAX_COUNT = 2**16  # heads, experts, groups, labels: each may become a Python object
_MAX_SIZE = 2**25  # widths, vocabularies, positions
_MAX_NUMBER = 2**63  # what is only calculated with
_MAX_BITS = 128  # some files say 10**30 for "no limit"
_MAX_LIST, _MAX_VALUES, _MAX_DEPTH, _MAX_TEXT = 4096, 100_000, 24, 100_000

# Said by a configuration they load code or files, or replace what Transformers' classes do; none says what a model is.
_INSTRUCTIONS = {
    "auto_map", "custom_pipelines", "code_revision", "name_or_path", "transformers_weights", "configuration_files",
    "fusion_config", "kernel_config", "use_kernels", "allow_all_kernels", "distributed_config", "device_map",
    "backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone", "gguf_file", "trust_remote_code",
    "keys_to_ignore_at_inference", "ignore_keys_at_rope_validation", "custom_generate", "output_attentions",
    *(key for key, kind in PreTrainedConfig.__annotations__.items() if "ClassVar" in str(kind) and key != "model_type"),
}  # fmt: skip

# What a component does with its outputs is the hybrid's to say.
_OF_THE_HYBRID = ("model_type", "return_dict", "use_return_dict", "output_hidden_states", "tie_last_hidden_states")

# What torchao's settings in a hybrid's file may name.
_TORCHAO = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "PerRow", "PerTensor", "MappingType")

# Implementations that come with Transformers. "org/repo" names a kernel on the Hub, and so does "flash_attention_2"
# where flash-attn is not installed: which of them runs is for the caller to say (attn_implementation=...).
_OWN_IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}

# Attributes of the hybrid's configuration and of its model: a component becomes an attribute of both.
_RESERVED = {
    "config", "generation_config", "hybrid_mixer", "input_embedding", "training", "components", "num_blocks",
    "block_layers", "reference_component", "route", "vocab_size", "tokenizer_component", "manticore_version",
    "mixture_weights", "calibration", "mix_loss_weight", "component_loss_weight", "hidden_size", "component", "score",
    "objective",
    "num_hidden_layers", "max_position_embeddings", "loss_function", "device", "dtype", "forward", "generate",
    "framework", "model_tags", "base_model", "name", "loss_type", "warnings_issued", "auto_map", "preset",
    "tie_word_embeddings", "projector", "projector_init", "gate", "mixture", "mixture_space", "embeddings",
    "head_mixture", "component_names", "sub_configs", "bounds", "bos_token_id", "eos_token_id", "pad_token_id",
    "all_tied_weights_keys", "create_masks_for_generate", "kernel_config", "keys_to_ignore_at_inference", "embed",
    "from_components", "make_cache", "mix_embeddings", "new_mixer", "renew_embeddings", "report_parts",
    "set_mixture_weights", "unchanged_keys", "verify_segments", "from_causal_lm", "is_gone", "make_score",
    "starts_anew", "composed_as",
}  # fmt: skip

logger = logging.get_logger(__name__)


def show(value):
    """A value as a message shows it: not longer than a line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


def check_component_name(name):
    """Raises ManticoreError unless `name` can be an attribute of the model and of the configuration."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,99}", name) or keyword.iskeyword(name):
        raise ManticoreError(
            f"Component name {show(name)} must be a Python identifier that starts with a letter (100 at most)."
        )
    if name in _RESERVED or any(hasattr(cls, name) for cls in (PreTrainedConfig, PreTrainedModel, GenerationMixin)):
        raise ManticoreError(f"Component name {name!r} is used by the model itself; give the component another name.")


def check_reference(name, repo_id, revision, subfolder=None, files=None):
    """Raises ManticoreError unless a component's address is one that others can reach.

    A configuration may come from a stranger's repository, so paths and URLs are refused. Reading the weights replaces a
    branch or tag, which can move, by its commit.
    """
    good = (
        isinstance(repo_id, str)
        and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", repo_id)
        and ".." not in repo_id
    )
    if not good:
        raise ManticoreError(
            f"Component {name!r}: repo_id={show(repo_id)} is no Hub repository id ('organisation/name')."
        )
    named = isinstance(revision, str) and re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)*", revision)
    hashlike = named and re.fullmatch(r"[0-9a-fA-F]{7,}", revision)  # an abbreviated commit may fit several
    if not named or ".." in revision or len(revision) > 200 or hashlike and not is_commit(revision):
        raise ManticoreError(f"Component {name!r}: revision={show(revision)} of {show(repo_id)} is no 40-hex commit.")
    plain = isinstance(subfolder, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)*", subfolder)
    if subfolder and (not plain or ".." in subfolder.split("/")):
        raise ManticoreError(f"Component {name!r}: subfolder={show(subfolder)} is no plain sub-folder of a repository.")
    if files is None:
        return
    if not isinstance(files, dict) or not any(str(file).endswith(".safetensors") for file in files):
        raise ManticoreError(
            f"Component {name!r}: files={show(files)} must map its safetensors files to their SHA-256."
        )
    for file, digest in files.items():
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors(\.index\.json)?", str(file)):
            raise ManticoreError(f"Component {name!r}: {show(file)} in files is no plain name of a safetensors file.")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ManticoreError(f"Component {name!r}: {show(digest)} of {show(file)} is no SHA-256 of 64 hex digits.")


def check_transplant(name, values):
    """Raises ManticoreError unless what a component's entry says of its transplanted vocabulary makes sense.

    Args:
        name: The component's name.
        values: None, or {"method", "tokenizer": {"repo_id", "revision", "subfolder"} of the one it was made for, or
            None if that has no address, "vocabulary": SHA-256 of its tokens and ids, "vocab_size": rows of the
            embedding that the component's own checkpoint has}.
    """
    if values is None:
        return
    keys = {"method", "tokenizer", "vocabulary", "vocab_size"}
    if not isinstance(values, dict) or set(values) != keys:
        raise ManticoreError(f"Component {name!r}: transplant={show(values)} must have the keys {sorted(keys)}.")
    method, tokenizer, rows = values["method"], values["tokenizer"], values["vocab_size"]
    if not isinstance(method, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", method):
        raise ManticoreError(f"Component {name!r}: transplant method={show(method)} is no name of one.")
    if not isinstance(values["vocabulary"], str) or not re.fullmatch(r"[0-9a-f]{64}", values["vocabulary"]):
        raise ManticoreError(
            f"Component {name!r}: transplant vocabulary={show(values['vocabulary'])} is no SHA-256 of 64 hex digits."
        )
    if type(rows) is not int or not 0 < rows <= _MAX_SIZE:
        raise ManticoreError(f"Component {name!r}: transplant vocab_size={show(rows)} must be a number of tokens.")
    if tokenizer is None:
        return
    if not isinstance(tokenizer, dict) or set(tokenizer) != {"repo_id", "revision", "subfolder"}:
        raise ManticoreError(
            f"Component {name!r}: transplant tokenizer={show(tokenizer)} must have a repo_id, revision and subfolder."
        )
    check_reference(name, tokenizer["repo_id"], tokenizer["revision"], tokenizer["subfolder"])
    if not is_commit(tokenizer["revision"]):
        raise ManticoreError(
            f"Component {name!r}: its transplant's tokenizer is at {show(tokenizer['revision'])}, which is no 40-hex "
            "commit."
        )


def is_commit(revision):
    """Whether a revision is a full commit hash, which cannot move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def check_plain(what, values):
    """Raises ManticoreError if values are nested too deep, too many or too large to be looked at at all.

    Args:
        what: How a message calls them.
        values: Dicts, lists and what is in them; other objects are not entered.
    """
    seen, todo = 0, [("", values, 0)]
    while todo:  # no recursion: it is the depth that is in question
        key, value, depth = todo.pop()
        seen += 1
        if seen > _MAX_VALUES or depth > _MAX_DEPTH:
            size = f"more than {_MAX_VALUES} values" if seen > _MAX_VALUES else f"more than {_MAX_DEPTH} levels"
            raise ManticoreError(f"{what} has {size} (at {show(key)}): no model's configuration needs that many.")
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise ManticoreError(f"{what}: {show(key)} is a text of {len(value)} characters; give at most {_MAX_TEXT}.")
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            bits = value.bit_length()
            raise ManticoreError(f"{what}: {show(key)} is an integer of {bits} bits; give at most {_MAX_BITS}.")
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, (str, int)) or isinstance(name, str) and len(name) > 1000:
                    raise ManticoreError(f"{what}: {show(key)} has the key {show(name)}, which is no name.")
            if not isinstance(value.get("dtype"), (str, int, dict, torch.dtype, type(None))):
                check_dtype(f"{what}: {show(key)}", value["dtype"])  # Transformers could not write it again
            todo += [(str(name), item, depth + 1) for name, item in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(key, item, depth + 1) for item in value]


def check_sizes(what, values, layer_keys=()):
    """Raises ManticoreError if an integer or a list is beyond what any model has under such a name.

    Args:
        what: How a message calls the configuration.
        values: Its (nested) settings, plain enough for `check_plain`.
        layer_keys: Names under which this kind of model keeps its number of layers.
    """
    todo = list(values.items())
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += [(name if isinstance(name, str) else key, item) for name, item in value.items()]
        elif isinstance(value, (list, tuple)):
            if len(value) > _MAX_LIST:
                raise ManticoreError(f"{what}: {key} is a list of {len(value)} values; give at most {_MAX_LIST}.")
            todo += [(key, item) for item in value]
        elif isinstance(value, int) and abs(value) > (most := _most(key, layer_keys)):
            raise ManticoreError(
                f"{what}: {key}={value} is more than any model has; it may be at most {most}. Repair or do not use "
                "this config.json."
            )


def check_values(what, values):
    """`check_plain` and `check_sizes` of a config.json, which must be done before Transformers reads it.

    Args:
        what: How a message calls the component.
        values: What the file says.
    """
    check_plain(what, values)
    kind = values.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    check_sizes(what, values, _layer_keys(CONFIG_MAPPING[kind]) if known else ())


def _most(key, layer_keys):
    """The largest integer that makes sense under a name."""
    if key in layer_keys or re.search(r"(^|_)(layers?|blocks|depth|types?)$", key):
        return MAX_LAYERS
    if key.endswith("max_length"):
        return 2**_MAX_BITS
    if re.search(r"(theta|base|seed|_ids?|_index|_token|scale|factor|window)$", key):
        return _MAX_NUMBER
    if key.startswith("num_") or re.search(r"heads?($|_)|experts?$|groups?$|cycles|iters|kernel|conv", key):
        return _MAX_COUNT
    return _MAX_SIZE


def clean(what, values, cls):
    """A copy of a configuration's settings without those that are none.

    What says how or with which code to run a model is dropped: that is the caller's to say, not the file's.

    Args:
        what: How a message calls the configuration.
        values: Its settings.
        cls: The configuration class that takes them.

    Raises:
        ManticoreError: A setting would replace a method of the class.
    """
    out = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ManticoreError(f"{what} has the key {show(key)}, which is no name of a setting.")
        if key.lstrip("_") in _OWN_IMPLEMENTATIONS:
            if value is None or isinstance(value, str) and value in _OWN_IMPLEMENTATIONS[key.lstrip("_")]:
                out[key.lstrip("_")] = value
            else:
                logger.warning(f"{what} asks for {key}={show(value)}: this is not taken from a file, pass it yourself.")
            continue
        if key.startswith("_") or key in _INSTRUCTIONS:
            continue
        known = inspect.getattr_static(cls, key, None)
        if key == "self" or callable(known) or isinstance(known, (classmethod, staticmethod)):
            raise ManticoreError(f"{what}: {key}={show(value)} is no setting of a configuration; remove it.")
        if isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            value = clean(what, value, object)
        out[key] = value
    return copy.deepcopy(out)


def check_dtype(what, value):
    """Raises ManticoreError unless a value names a dtype of torch, or is one, or None."""
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not (dtype is None and value is None or isinstance(dtype, torch.dtype)):
        raise ManticoreError(f"{what}: dtype={show(value)} is no dtype of torch; give for example 'bfloat16'.")


def is_causal_lm(model_type):
    """Whether a model type that is known to the Auto classes has a causal LM, and is no hybrid."""
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return model_type != "manticore"
    return model_type != "manticore" and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING  # registered


def build_config(name, values, what=None):
    """A component's configuration from its dict.

    Args:
        name: The component's name.
        values: What its config.json says, `model_type` included.
        what: How a message calls it; default: by name and model type.

    Raises:
        ManticoreError: Names the component and what is wrong with its configuration.
    """
    given, what = what, what or f"Component {name!r}"
    check_values(what, values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ManticoreError(
            f"{what} has model_type={show(model_type)}, which the installed Transformers does not know."
        )
    if not is_causal_lm(model_type):
        raise ManticoreError(f"{what} is no causal LM (model_type {model_type!r}); only causal LMs can be joined.")
    what, cls = given or f"Component {name!r} ({model_type})", CONFIG_MAPPING[model_type]
    values = clean(what, {key: value for key, value in values.items() if key not in _OF_THE_HYBRID}, cls)
    for key in ("dtype", "torch_dtype"):
        if key in values:
            check_dtype(what, values[key])
            values[key] = values[key].removeprefix("torch.") if isinstance(values[key], str) else values[key]
    if values.get("quantization_config") is not None:
        _refuse_quantized(what)
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as err:  # Transformers checks its configurations in many ways, with as many kinds of errors
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise ManticoreError(f"{what}: its {model_type!r} configuration is invalid: {reason[:1000]}") from err


def check_component(name, config):
    """Raises ManticoreError unless a component's configuration is one that a hybrid can be built from.

    Args:
        name: The component's name.
        config: The configuration, wherever it came from.
    """
    what = f"Component {name!r} ({config.model_type})"
    for values in _nested(config):
        check_plain(what, values)
        check_sizes(what, values, _layer_keys(type(config)))
    if getattr(config, "quantization_config", None) is not None:
        _refuse_quantized(what)
    check_dtype(what, config.dtype)
    try:
        found = {key: getattr(config, key) for key in ("hidden_size", "vocab_size")}
        found["num_hidden_layers"] = config.get_text_config().num_hidden_layers
    except Exception as err:
        raise ManticoreError(f"{what}: its configuration has no hidden_size, vocab_size or layers ({err}).") from err
    for key in ("sliding_window", "attention_chunk_size"):  # of the caches, which no class checks
        value = getattr(config, key, None)
        if not (value is None or type(value) is int and value >= 0):
            raise ManticoreError(f"{what}: {key}={show(value)} must be a number of tokens, or null.")
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ManticoreError(f"{what}: {key}={show(value)} must be a positive integer.")
    if found["num_hidden_layers"] > MAX_LAYERS:
        raise ManticoreError(f"{what}: it has {found['num_hidden_layers']} layers; at most {MAX_LAYERS} are allowed.")


def check_hybrid(values):
    """Raises ManticoreError if one of a hybrid's settings beyond its own (ids, dtype, ...) has an impossible value."""
    what = "The hybrid's configuration"
    check_sizes(what, values)
    for key in ("dtype", "torch_dtype"):
        check_dtype(what, values.get(key))
    for key, value in values.items():
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if key.endswith("_token_id") and not all(
            one is None or isinstance(one, int) and not isinstance(one, bool) and 0 <= one < _MAX_SIZE for one in ids
        ):
            raise ManticoreError(f"{what}: {key}={show(value)} must be a token's number (eos_token_id: or a list).")
    if values.get("is_encoder_decoder"):
        raise ManticoreError(f"{what}: is_encoder_decoder={show(values['is_encoder_decoder'])}; a hybrid is a decoder.")
    for key in ("attn_implementation", "experts_implementation"):
        value = values.get(key)
        parts = value.values() if isinstance(value, dict) else [value]
        if not all(one is None or isinstance(one, str) for one in parts):
            raise ManticoreError(f"{what}: {key}={show(value)} must be a name, or a name for each component.")
    quantization = values.get("quantization_config")
    if not (quantization is None or isinstance(quantization, dict) or hasattr(quantization, "to_dict")):
        raise ManticoreError(f"{what}: quantization_config={show(quantization)} must be a dict of settings.")
    if isinstance(quantization, dict) and (reason := unsaved_quantization(quantization)) is not None:
        raise ManticoreError(f"{what}: {reason}. Quantise the hybrid when you load it (quantization_config=...).")


def unsaved_quantization(values):
    """Why a hybrid's config.json cannot state that its weights are quantised so; None if it can.

    Args:
        values: The quantisation's settings, as a dict.
    """
    method = values.get("quant_method")
    method = getattr(method, "value", method)
    if method == "bitsandbytes":
        return None
    if method != "torchao":  # others fetch kernels from the Hub, or store tensors under names that no hybrid has
        return f"weights quantised by quant_method={show(method)} are not read from a hybrid's files"
    todo = [values.get("quant_type")]
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list)):
            todo += value.values() if isinstance(value, dict) else value
        # torchao looks the name up among all that its modules have, and calls it.
        if isinstance(value, dict) and value.get("_type", "PerRow") not in _TORCHAO:
            return f"torchao's {show(value['_type'])} is not read from a hybrid's files, only {', '.join(_TORCHAO)}"
    return None


def _nested(config):
    """The settings of a configuration and of those inside it."""
    todo, seen = [config], []
    while todo and len(seen) < MAX_COMPONENTS:
        values = vars(todo.pop())
        seen.append({key: value for key, value in values.items() if not key.startswith("_")})
        todo += [value for value in values.values() if isinstance(value, PreTrainedConfig)]
    return seen


def _layer_keys(cls):
    return {"num_hidden_layers", getattr(cls, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")}


def _refuse_quantized(what):
    raise ManticoreError(
        f"{what} has a quantization_config: its weights are packed and cannot be cut or referenced. Give the "
        "repository with its weights in floating point; the hybrid can be quantised when it is loaded."
    )
