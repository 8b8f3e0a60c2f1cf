"""Models from GGUF files: Transformers dequantises them; what it would leave out raises."""

import contextlib
import math
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from manticore_hf.compose.convert.gguf_header import Header, check_header
from manticore_hf.hub.licenses import stated_license
from manticore_hf.modeling.bounds_manticore import ManticoreError, build_component, check_component
from manticore_hf.utils.defence import check_memory


def read_gguf_header(what: str, path: str | Path) -> Header:
    """The header of a GGUF file, checked (see `check_header`); it takes a fraction of a second.

    Args:
        what: What messages call the checkpoint.
        path: The file.

    Raises:
        ManticoreError: The `gguf` package is missing, or the file is damaged.
    """
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as err:
        raise ManticoreError(
            "Reading GGUF files needs the package gguf: pip install 'manticore-hf[gguf]' (or pip install gguf)."
        ) from err
    return check_header(what, Path(path), {int(kind): two for kind, two in GGML_QUANT_SIZES.items()})


def read_gguf_config(what: str, path: str | Path) -> PreTrainedConfig:
    """The configuration of the model in a GGUF file, without its weights.

    Args:
        what: What messages call the checkpoint.
        path: The file.

    Raises:
        ManticoreError: The `gguf` package is missing, or Transformers cannot read the file.
    """
    path = Path(path)
    header = read_gguf_header(what, path)
    with _said(what, path, header.fields.get("general.architecture")):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        _check_size(what, path, header, config)
    return _plain(config)


def load_gguf(
    what: str, path: str | Path
) -> tuple[PreTrainedConfig, dict[str, torch.Tensor], GenerationConfig, str | None]:
    """The model in a GGUF file.

    Args:
        what: What messages call the checkpoint.
        path: The file.

    Returns:
        (config, {name: tensor}, generation config, licence or None), as Transformers reads them; the tensors are
        float32, which holds every quantised value.

    Raises:
        ManticoreError: The `gguf` package is missing, Transformers cannot read the file, or it would leave out some of
            its numbers.
    """
    path, config = Path(path), read_gguf_config(what, path)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    except Exception as err:  # it reads a stranger's bytes as offsets and sizes
        said = f"{path.name} is not a readable GGUF file ({_brief(err)}); fetch it again."
        raise ManticoreError(f"{what}: {said}") from err
    with _said(what, path, fields.get("general.architecture")):
        model, found = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, output_loading_info=True
        )
    missing = sorted([*found["missing_keys"], *map(str, found["mismatched_keys"])])
    if missing:
        raise ManticoreError(f"{what}: {path.name} has nothing for {missing[0]} (and {len(missing) - 1} others).")
    _check_all_read(what, path, reader, fields, model)
    license = stated_license(fields.get("general.license"))
    return _plain(model.config), model.state_dict(), model.generation_config, license


@contextlib.contextmanager
def _said(what, path, architecture):
    """Of an architecture or quantisation that it does not know, Transformers says so in many ways."""
    try:
        yield
    except ManticoreError:
        raise
    except Exception as err:
        raise ManticoreError(
            f"{what}: Transformers cannot read {path.name} (architecture {architecture!r}): "
            f"{_brief(err)} Take the model's safetensors, or upgrade Transformers and gguf."
        ) from err


def _plain(config):
    """The configuration without how the model was stored."""
    for key in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, key):
            delattr(config, key)
    return config


def _check_size(what, path, header, config):
    """Raises ManticoreError if the configuration asks for another amount of numbers than the file holds."""
    check_component("gguf", config)
    with torch.device("meta"):
        asked = sum(one.numel() for one in build_component(f"{what}: {path.name}", config).parameters())
    there = sum(math.prod(dims) for dims, *_ in header.tensors.values())
    if asked > 2 * there:
        raise ManticoreError(
            f"{what}: {path.name} holds {there:,} numbers, its configuration asks for {asked:,}: sizes are missing "
            "there or wrong. Take the model's safetensors."
        )
    check_memory(f"{what}: {path.name}", [torch.empty(asked, dtype=torch.float32, device="meta")])


def _check_all_read(what, path, reader, fields, model):
    """Transformers passes over tensors and settings that it has no name for, without a word."""
    there = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    if model.config.tie_word_embeddings:
        there.pop("output.weight", None)  # some files hold both ends of a tie
    used = sum(parameter.numel() for parameter in model.parameters())
    if sum(there.values()) != used:
        odd = ", rope_freqs.weight among them" if "rope_freqs.weight" in there else ""
        raise ManticoreError(
            f"{what}: {path.name} holds {sum(there.values()):,} numbers, of which Transformers reads {used:,}{odd}: "
            "the result would be another model. Take the model's safetensors."
        )
    scaling = {key: value for key, value in fields.items() if key.endswith(".rope.scaling.type") and value != "none"}
    turned = getattr(model.config, "rope_parameters", None) or {}
    if scaling and turned.get("rope_type", "default") == "default":
        key, value = next(iter(scaling.items()))
        raise ManticoreError(
            f"{what}: {path.name} scales its rotary positions ({key}={value!r}), which Transformers does not read from "
            "GGUF: the result would be another model. Take the model's safetensors."
        )


def _brief(err):
    return " ".join(f"{err}".split())[:300]
