"""The defence against hostile configurations: a hybrid's `config.json` comes from a stranger.

Transformers believes all of it. It loops over the numbers while it reads them (a list of layer types, a dict of
labels), so that a number alone can hang a process; it takes methods for settings, and some settings for instructions to
load code or files. Configurations are checked before anything is made of them. Models are counted on the meta device,
where tensors have no storage, before they are made: a trillion parameters raise an error with numbers instead of ending
the process. A checkpoint is compared by its headers before it is read. `import manticore_hf` installs this for all that
the package loads and inspects; in a published repository its author could delete it.
"""

import contextlib
import copy
import inspect
import keyword
import math
import os
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available, logging

from manticore_hf.modeling.bounds_manticore import (
    Guard,
    ManticoreError,
    check_dtype,
    guard,
    install_guard,
    reason,
    show,
)
from manticore_hf.modeling.dtypes_manticore import unsaved_quantization
from manticore_hf.modeling.references_manticore import shards
from manticore_hf.modeling.weights_manticore import Renamer, check_complete, part_of
from manticore_hf.utils.files import check_link, check_no_pipes
from manticore_hf.utils.formatting import short_bytes
from manticore_hf.utils.headers import compare
from manticore_hf.utils.hybrid_settings import (
    MAX_SIZE,
    check_files,
    check_objective,
    check_tokenizer,
    check_transplant,
    complete,
    fill,
)
from manticore_hf.utils.positions import check_positions
from manticore_hf.utils.settings import HybridSettings

MAX_COMPONENTS = 32
MAX_LAYERS = 1024
MAX_WIDTH = 2**18
MAX_ELEMENTS = 10**12
"""Elements of one component. (Layers: of one, and of all components together; twice the deepest language models'.)"""

_MAX_TENSORS = 2**17
_MAX_STEPS = 2**16  # operations of a dry run
_USABLE = 0.9  # of the memory; the rest is the system's and the interpreter's

_MAX_COUNT = 2**16  # heads, experts, groups, labels: each may become a Python object
_MAX_NUMBER = 2**63  # what is only calculated with
_MAX_BITS = 128  # some files say 10**30 for "no limit"
_MAX_LIST, _MAX_VALUES, _MAX_DEPTH, _MAX_TEXT = 4096, 100_000, 24, 100_000

# Said by a configuration they load code or files, or replace what Transformers' classes do; none says what a model is.
_INSTRUCTIONS = {
    "auto_map", "custom_pipelines", "code_revision", "name_or_path", "transformers_weights", "configuration_files",
    "fusion_config", "kernel_config", "use_kernels", "allow_all_kernels", "distributed_config", "device_map",
    "backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone", "gguf_file", "trust_remote_code",
    "keys_to_ignore_at_inference", "ignore_keys_at_rope_validation", "custom_generate", "output_attentions",
    "attn_implementation_internal", "experts_implementation_internal",
    *(key for key, kind in PreTrainedConfig.__annotations__.items() if "ClassVar" in str(kind) and key != "model_type"),
}  # fmt: skip

# Implementations that come with Transformers. "org/repo" names a kernel on the Hub, and so does "flash_attention_2"
# where flash-attn is not installed: which of them runs is for the caller to say (attn_implementation=...).
_OWN_IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}

logger = logging.get_logger(__name__)


def check_plain(what: str, values: object) -> None:
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
                    raise ManticoreError(f"{what}: {show(key)} has the key {show(name)}, which is not a name.")
            if not isinstance(value.get("dtype"), (str, int, dict, torch.dtype, type(None))):
                check_dtype(f"{what}: {show(key)}", value["dtype"])  # Transformers could not write it again
            todo += [(str(name), item, depth + 1) for name, item in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(key, item, depth + 1) for item in value]


def check_sizes(what: str, values: dict, layer_keys: tuple | set = ()) -> None:
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


def check_values(what: str, values: dict) -> None:
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
    return MAX_SIZE


def clean(what: str, values: dict, cls: type) -> dict:
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
            raise ManticoreError(f"{what} has the key {show(key)}, which is not a name of a setting.")
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
            raise ManticoreError(f"{what}: {key}={show(value)} is not a setting of a configuration; remove it.")
        if isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            value = clean(what, value, object)
        out[key] = value
    return copy.deepcopy(out)


def check_hybrid(what: str, values: dict) -> None:
    """Raises ManticoreError if one of a hybrid's settings beyond its own (ids, dtype, ...) has an impossible value."""
    check_sizes(what, values)
    for key, value in values.items():
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if key.endswith("_token_id") and not all(
            one is None or isinstance(one, int) and not isinstance(one, bool) and 0 <= one < MAX_SIZE for one in ids
        ):
            raise ManticoreError(f"{what}: {key}={show(value)} must be a token's number (eos_token_id: or a list).")
    kept = values.get("output_hidden_states")
    if not (kept is None or isinstance(kept, int) or isinstance(kept, list) and all(type(one) is int for one in kept)):
        raise ManticoreError(f"{what}: output_hidden_states={show(kept)} must be true, false, or numbers of states.")
    names = values.get("architectures")
    if not (names is None or isinstance(names, list) and all(isinstance(one, str) for one in names)):
        raise ManticoreError(f"{what}: architectures={show(names)} must be a list of names.")
    if not isinstance(values.get("model_type"), (str, type(None))):
        raise ManticoreError(f"{what}: model_type={show(values['model_type'])} must be a name.")
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


_MOST_ROWS = 1024  # that generation may make of one


def check_generation(what: str, values: dict) -> None:
    """Raises ManticoreError if what generation is to do by a repository's generation_config.json is beyond any sense.

    Args:
        what: How a message calls the model.
        values: The settings.
    """
    check_plain(what, values)
    for key in ("num_beams", "num_beam_groups", "num_return_sequences", "num_assistant_tokens"):
        value = values.get(key)
        if value is not None and not (type(value) is int and value <= _MOST_ROWS):
            raise ManticoreError(
                f"{what}: {key}={show(value)} is not a sensible number for generation; it may be at most {_MOST_ROWS}. "
                "Repair or do not use this file."
            )
    check_sizes(what, values)


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


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has, None where that cannot be told."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


_FILLS = {getattr(torch.ops.aten, name).default for name in ("uniform_", "normal_", "zero_")}
_FILLS |= {torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor}


class Meter(TorchDispatchMode):
    """Raises for tensors beyond any sense while a model is made or run on the meta device.

    Args:
        what: How a message calls the model.
        steps: Operations after which it counts as endless.
    """

    def __init__(self, what: str, steps: int):
        super().__init__()
        self.what, self.steps, self.done, self.elements = what, steps, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.done += 1
        if self.done > self.steps:
            raise ManticoreError(f"{self.what} is endless: it takes more than {self.steps} operations. Do not use it.")
        if func in _FILLS and args[0].is_meta:  # there is nothing to fill, and torch takes its time to find that out
            return args[0]
        device = kwargs.get("device")
        made = not any(isinstance(one, torch.Tensor) for one in args)
        if made and device is not None and torch.device(device).type != "meta":
            self.measure(func(*args, **{**kwargs, "device": torch.device("meta")}), made)  # before it is taken
        out = func(*args, **kwargs)
        self.measure(out, made)
        return out

    def measure(self, out: object, made: bool) -> None:
        """Adds the elements of an operation's results; `made` says that they are new and no view."""
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.elements += one.numel() if made else 0
                if max(self.elements, one.numel()) > MAX_ELEMENTS:
                    raise ManticoreError(
                        f"{self.what} asks for {max(self.elements, one.numel()):.1e} parameters (a tensor of shape "
                        f"{tuple(one.shape)} among them); at most {MAX_ELEMENTS:.1e} are allowed. Repair or do not use "
                        "its configuration."
                    )


def check_memory(what: str, tensors: list, more: str = "", device: str | torch.device = "cpu") -> None:
    """Raises ManticoreError if tensors, of whatever device, are more than the memory of `device`."""
    there = memory_of(torch.device(device))
    asked, count = sum(one.nbytes for one in tensors), sum(one.numel() for one in tensors)
    if there is not None and asked > _USABLE * there:
        raise ManticoreError(
            f"{what}{more} asks for {count:.2e} parameters, {short_bytes(asked)}; this machine has "
            f"{short_bytes(there)} of memory. Use a larger machine, or repair its configuration if it is wrong."
        )


def _tensors(module):
    yield from module.parameters()
    yield from module.buffers()


# Attributes of the hybrid's configuration and of its model: a component becomes an attribute of both.
_RESERVED = {one.name for one in fields(HybridSettings)} | {
    "config", "generation_config", "hybrid_mixer", "input_embedding", "training", "components", "route", "score",
    "manticore_version", "calibration", "hidden_size", "component", "objective", "num_hidden_layers", "segments",
    "max_position_embeddings", "framework", "name", "loss_type", "warnings_issued", "keys_to_ignore_at_inference",
    "auto_map", "tie_word_embeddings", "component_names", "bounds", "bos_token_id", "eos_token_id", "pad_token_id",
    "all_tied_weights_keys", "kernel_config", "embed", "from_components", "make_cache", "mix_embeddings", "new_mixer",
    "renew_embeddings", "report_parts", "set_mixture_weights", "unchanged_keys", "verify_segments", "from_causal_lm",
    "is_gone", "make_score", "starts_anew", "composed_as", "together", "mix", "create_masks_for_generate",
    "reads_past_losses", "holds_weights",
}  # fmt: skip


def check_component_name(name: object) -> None:
    """Raises ManticoreError unless `name` can be an attribute of the model and of the configuration."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,99}", name) or keyword.iskeyword(name):
        raise ManticoreError(
            f"Component name {show(name)} must be a Python identifier that starts with a letter (100 at most)."
        )
    if name in _RESERVED or any(hasattr(cls, name) for cls in (PreTrainedConfig, PreTrainedModel, GenerationMixin)):
        raise ManticoreError(f"Component name {name!r} is used by the model itself; give the component another name.")


def _check_no_adapter(source, options):
    """Of a repository Transformers would load the model that an adapter names, wherever that is, in the hybrid's place;
    in a directory it would put the adapter into the hybrid, without a word."""
    keys = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
    at = {key: options[key] for key in keys if options.get(key) is not None}
    at.update(options.get("adapter_kwargs") or {})
    source = at.pop("_adapter_model_path", None) or source  # what the caller has said to an Auto class
    if source is None or not is_peft_available() or find_adapter_config_file(source, **at) is None:
        return
    if cached_file(source, "config.json", **at, _raise_exceptions_for_missing_entries=False) is not None:
        raise ManticoreError(
            f"{str(source)!r} has an adapter beside its hybrid (adapter_config.json): Transformers would silently "
            "load it, or the model that it names. Move it to a directory of its own, and load it from there with "
            "PeftModel.from_pretrained(hybrid, ...)."
        )


@contextlib.contextmanager
def loading(source: str | os.PathLike | None, options: dict) -> Iterator[None]:
    """Context in which a hybrid is loaded by `from_pretrained(source, **options)`.

    Raises:
        ManticoreError: An adapter lies beside it, or its index of weight files, which Transformers believes, is none or
            names files elsewhere.
    """
    _check_no_adapter(source, options)
    folder = Path(source or "", options.get("subfolder") or "")
    for index in folder.glob("model.safetensors.index*.json") if source and os.path.isdir(folder) else ():
        shards(index, (repr(str(index)), "save the hybrid again."))
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as err:
        inside = [frame.name for frame in traceback.extract_tb(err.__traceback__)]
        if isinstance(err, ManticoreError) or "get_checkpoint_shard_files" not in inside:
            raise
        raise ManticoreError(
            f"{str(source)!r}: its index of weight files is damaged ({reason(err)}); save the hybrid again."
        ) from err


class Defence(Guard):
    """The package's guard."""

    def plain(self, what: str, values: object) -> None:
        check_plain(what, values)

    def beside(self, path: str, folder: str) -> None:
        check_link(path, folder)

    @contextlib.contextmanager
    def reading(self, source: str | os.PathLike) -> Iterator[None]:
        """Transformers reads files that hold anything but a JSON object with odd errors."""
        check_no_pipes(source)
        try:
            yield
        except ManticoreError:
            raise
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as err:
            if isinstance(err, OSError) and isinstance(err.__context__, HFValidationError):
                raise OSError(
                    f"{str(source)!r} is not there: it is neither a directory nor a Hub repository id "
                    "('organisation/name')."
                ) from err
            if isinstance(err, OSError) and not isinstance(err.__context__, ValueError):
                raise  # there is no such file, or no connection
            raise ManticoreError(
                f"{str(source)!r}: its config.json is not a JSON object of settings ({type(err).__name__}); it is "
                "damaged or not a hybrid's."
            ) from err

    def file(self, what: str, values: dict) -> None:
        check_values(what, values)

    def settings(self, what: str, values: dict, cls: type) -> dict:
        if not isinstance(values, dict):
            raise ManticoreError(f"{what} is not a JSON object but {show(values)}; damaged, or not a hybrid's.")
        return clean(what, values, cls)

    def given(self, settings: dict) -> dict:
        return fill(settings)

    def entry(self, name: str, entry: dict) -> None:
        check_component_name(name)
        if (weights := entry.get("weights", "reference")) not in ("reference", "embedded"):
            raise ManticoreError(f"Component {name!r}: weights={show(weights)}; choose 'reference' or 'embedded'.")
        said = entry.get("license")
        if said is not None and not (isinstance(said, str) and len(said) < 200 and said.isprintable()):
            raise ManticoreError(f"Component {name!r}: license={show(said)} must be the short name of one, or null.")
        if entry.get("weights") == "reference" or entry.get("repo_id") is not None or entry.get("files"):
            check_files(name, entry.get("files"))
        check_transplant(name, entry.get("transplant"))
        check_tokenizer(name, entry.get("tokenizer"), entry.get("repo_id"))

    def component(self, what: str, config: PreTrainedConfig) -> None:
        for values in _nested(config):
            check_plain(what, values)
            check_sizes(what, values, _layer_keys(type(config)))
        for key in ("sliding_window", "attention_chunk_size"):  # of the caches, which no class checks
            value = getattr(config, key, None)
            if not (value is None or type(value) is int and value >= 0):
                raise ManticoreError(f"{what}: {key}={show(value)} must be a number of tokens, or null.")
        for key in ("time_step_min", "time_step_max"):  # of which a mixer's initial weights are logarithms
            value = getattr(config, key, None)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise ManticoreError(f"{what}: {key}={show(value)} must be a number above 0.")
        try:
            found = {key: getattr(config, key) for key in ("hidden_size", "vocab_size")}
            found["num_hidden_layers"] = config.get_text_config().num_hidden_layers
        except Exception as err:
            raise ManticoreError(f"{what}: its configuration lacks hidden_size, vocab_size or layers ({err}).") from err
        for key, value in found.items():
            if type(value) is not int or value < 1:
                raise ManticoreError(f"{what}: {key}={show(value)} must be a positive integer.")

    def general(self, what: str, values: dict) -> None:
        for key in ("dtype", "torch_dtype"):
            check_dtype(what, values.get(key))
        check_hybrid(what, values)

    def entries(self, entries: object) -> None:
        found = [] if entries is None else entries
        if not isinstance(found, (list, tuple)) or not all(isinstance(entry, dict) for entry in found):
            raise ManticoreError(f"components={show(entries)} must be a list of dicts with a name and a config.")
        if len(found) > MAX_COMPONENTS:
            raise ManticoreError(f"{len(found)} components are too many for a hybrid; join at most {MAX_COMPONENTS}.")
        names = [entry.get("name") for entry in found]
        for i, name in enumerate(names):
            if isinstance(name, str) and name in names[:i]:
                raise ManticoreError(
                    f"Two components are named {name!r}: name each (ComponentSpec(name=...)), or give a link to one of "
                    "the directories that has another name."
                )

    def hybrid(self, config: PreTrainedConfig) -> None:
        complete(config)
        check_objective(config.objective)
        depths = [getattr(config, name).get_text_config().num_hidden_layers for name in config.component_names]
        if sum(depths) > MAX_LAYERS:
            raise ManticoreError(f"The components have more than {MAX_LAYERS} layers in all; join fewer, or smaller.")
        if depths and config.hidden_size > MAX_WIDTH:
            raise ManticoreError(
                f"The hybrid's hidden_size={config.hidden_size} is more than any model has; give at most {MAX_WIDTH}."
            )

    def construct(self, what: str, make: Callable, beside: tuple | list) -> torch.nn.Module:
        """Makes a module after its size was counted on the meta device; twice where the default device has storage.

        Raises:
            ManticoreError: There is not enough memory; the message has the numbers.
        """
        device = torch.get_default_device()
        if device.type != "meta" and is_deepspeed_zero3_enabled():  # it divides every tensor as soon as it is made
            return make()
        with contextlib.nullcontext() if device.type == "meta" else torch.device("meta"):
            with Meter(what, 4 * _MAX_TENSORS):
                module = make()
        tensors = list(_tensors(module))
        if len(tensors) > _MAX_TENSORS:
            raise ManticoreError(f"{what} has {len(tensors)} tensors; at most {_MAX_TENSORS} are allowed.")
        if device.type == "meta":
            # What no checkpoint holds is made at its full size, whatever a checkpoint's headers say.
            own = {name for part in module.modules() for name in part._non_persistent_buffers_set}
            check_memory(what, [tensor for name, tensor in module.named_buffers() if name.rpartition(".")[2] in own])
            return module
        there = [tensor for one in beside for tensor in _tensors(one)]
        check_memory(what, tensors + there, " with what is built before it" if there else "", device)
        return make()  # only tensors with storage get initial values

    positions = staticmethod(check_positions)

    def running(self, what: str) -> Meter:
        return Meter(what, _MAX_STEPS)

    def checkpoint(
        self,
        model: torch.nn.Module,
        tensors: dict,
        rename: Renamer,
        ties: dict,
        quantizer: object | None,
        ignore_mismatched: bool,
    ) -> None:
        missing, wrong = compare(model, tensors, rename, ties)
        missing = [key for key in missing if not model.starts_anew(key)]
        if quantizer is not None:  # it packs tensors, and turns some round before
            packed = quantizer.pre_quantized
            wrong = {key: two for key, two in wrong.items() if not packed and math.prod(two[0]) != math.prod(two[1])}
        if wrong and ignore_mismatched:
            made = [rename.known[key] for key in wrong if key in rename.known]
            check_memory(f"{part_of(model, min(wrong))}: its tensors of another shape", made)
        check_complete(model, missing, {} if ignore_mismatched else wrong)


def install() -> None:
    """Makes this defence the one of this process, for all that is loaded with the package's own code."""
    if not isinstance(guard(), Defence):
        install_guard(Defence())
