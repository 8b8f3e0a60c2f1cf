"""Checkpoints that hybrids do not read, as local directories that they do: `manticore-hf convert SOURCE`.

    manticore-hf convert state-spaces/mamba-130m --output-dir mamba-130m       # mamba_ssm's own layout, and pickle
    manticore-hf convert model.gguf --output-dir model                         # dequantised by Transformers
    manticore-hf convert org/old --output-dir old                              # Transformers' layout, but a pickle

Hybrids read safetensors only, because reading a pickle can run code; converting is the step that a user takes on
purpose. Pickles are read with weights_only, and must hold nothing but tensors. Each tensor of the source
is used exactly once, each of the model's is filled, and what was written, read back, gives the same logits to the bit.
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from manticore_hf.compose.component_tokenizers import TOKENIZER_FILES
from manticore_hf.compose.convert.gguf import load_gguf, read_gguf_config
from manticore_hf.compose.convert.gguf_tokenizer import SAMPLE, read_gguf_tokenizer
from manticore_hf.compose.convert.mamba_ssm import TOKENIZER, is_mamba_ssm, mamba_config, mamba_weights
from manticore_hf.compose.convert.read_checkpoint import find_source, read_tensors
from manticore_hf.hub.licenses import read_license
from manticore_hf.modeling.bounds_manticore import build_config, guard
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.references_manticore import WEIGHT_FILES
from manticore_hf.utils.formatting import escape
from manticore_hf.utils.quiet import quiet_loading
from manticore_hf.utils.saving import whole_directory
from manticore_hf.utils.tokenizers import read_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CARD = """\
# {title}

Converted by manticore-hf from {source} ({how}). The weights are the source's{rounded}.

* Source: {source}
* Revision: {revision}
* Licence, as stated there: {license}
* Tokenizer: {tokenizer}
{note}"""


def convert(
    source: str | Path,
    output_dir: str | Path,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
) -> dict:
    """Converts a checkpoint to a directory with config.json, model.safetensors and tokenizer.

    Args:
        source: Directory, .gguf file, or Hub repository ("org/name", "org/name@revision"): a checkpoint in mamba_ssm's
            layout, a GGUF file, or a pickle of a model that Transformers has.
        output_dir: Directory to write, new or empty; it appears whole or not at all.
        tokenizer: Directory or repository of the tokenizer. Default: the source's; for mamba_ssm's layout, which has
            none, that of GPT-NeoX-20B.
        dtype: "float32", "bfloat16" or "float16". Default: the widest that is stored; for GGUF float32.
        gguf_file: A GGUF file in the directory or repository.
        revision: Branch, tag or commit of a repository.

    Returns:
        {"source", "revision" (commit, or None), "how", "model_type", "parameters", "dtype", "license" (or None),
        "tokenizer", "note" (what is not known of the tokenizer, or None)}.

    Raises:
        ManticoreError: Names the source and why it cannot be converted; nothing is written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ManticoreError(f"dtype={dtype!r} is unknown; choose one of {sorted(DTYPES)}.")
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ManticoreError(f"The output directory {str(output)!r} is there and not empty; choose another.")
    with _steps() as step:
        return _convert(step, source, output, tokenizer, dtype, gguf_file, revision)


def describe(source: str | os.PathLike, output_dir: str | os.PathLike) -> None:
    """Writes what a GGUF file says of its model, without the weights: configuration and tokenizer.

    Args:
        source: The file.
        output_dir: Directory to write.

    Raises:
        ManticoreError: The file cannot be read.
    """
    what = f"The checkpoint {os.fspath(source)!r}"
    with _alone(source) as stored, quiet_loading():
        config, (tokenizer, _) = read_gguf_config(what, stored), read_gguf_tokenizer(what, stored)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        config.dtype = torch.float32  # as `convert` writes it
        config.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)


def _convert(step, source, output, tokenizer, dtype, gguf_file, revision):
    step("looking at the source")
    found, gguf_file = find_source(source, revision, gguf_file)
    stored = None if gguf_file is None else found.file(gguf_file, needed=True)
    values = _read_config(found) if stored is None else None
    with contextlib.nullcontext() if stored is None else _alone(stored) as stored:
        if stored is not None:
            step("reading the tensors")  # whether a GGUF file can be read shows here
        read = None if stored is None else _read(found, values, stored)
        step("reading and checking the tokenizer")
        tokens, tokens_from, note = _tokenizer(found, values, stored, tokenizer)
    if read is None:
        step("reading the tensors")
    how, config, tensors, generation, license = read or _read(found, values, stored)
    if values is not None and is_mamba_ssm(values):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the classes' defaults are of other tokenizers
            setattr(config, key, getattr(tokens, key))
    stored_in = _widest(found.what, tensors)
    step("filling the model")
    model = _fill(found.what, config, tensors, DTYPES.get(dtype) or stored_in)
    if generation is not None:
        model.generation_config = generation
    largest = max(tokens.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise ManticoreError(
            f"{found.what}: its vocabulary has {config.vocab_size} rows, too few for the tokenizer {tokens_from!r} "
            f"with ids up to {largest}; give the tokenizer that the model was trained with."
        )
    result = {
        "source": found.repo_id or gguf_file or found.folder.resolve().name,
        "revision": found.revision,
        "how": how,
        "model_type": config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "license": license or read_license(found.file("README.md")),
        "tokenizer": tokens_from,
        "note": note,
    }
    step("writing")
    with whole_directory(output, True) as scratch, quiet_loading():
        model.save_pretrained(scratch)
        tokens.save_pretrained(scratch)
        rounded = "" if torch.promote_types(model.dtype, stored_in) == model.dtype else f", rounded to {dtype}"
        Path(scratch, "README.md").write_text(_card(result, output.resolve().name, rounded))
        step("reading back what was written")
        _check_saved(found.what, model, scratch)
        _check_saved_tokenizer(found.what, tokens, scratch)
    return result


@contextlib.contextmanager
def _steps():
    """One bar for the whole conversion, which says what it is at; gives the function that begins a step."""
    with tqdm(total=6, unit="step", leave=False, bar_format="convert: {n_fmt}/{total_fmt} {desc} [{elapsed}]") as bar:

        def step(what):
            bar.n = min(bar.n + 1, bar.total)
            bar.set_description_str(what)

        yield step


@contextlib.contextmanager
def _alone(file):
    """A GGUF file in a folder of its own: Transformers believes other files beside it (an adapter's, a tokenizer's)."""
    with tempfile.TemporaryDirectory(prefix="manticore-convert-") as folder:
        place = Path(folder) / Path(file).name
        try:
            place.symlink_to(os.path.realpath(file))
        except OSError:  # Windows, without the right to make links
            shutil.copyfile(file, place)
        yield place


def _read_config(source):
    path = source.file("config.json", needed=True)
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as err:
        raise ManticoreError(f"{source.what}: its config.json is not a JSON object ({err}).") from err
    if not isinstance(values, dict):
        raise ManticoreError(f"{source.what}: its config.json is not a JSON object.")
    guard().plain(source.what, values)
    if not is_mamba_ssm(values) and any(source.file(name) for name in WEIGHT_FILES):
        raise ManticoreError(f"{source.what} has safetensors already: name it as a component as it is.")
    return values


def _read(source, values, stored):
    """(what it is, config, {name of Transformers: tensor}, generation config or None, licence or None)."""
    if stored is not None:
        with quiet_loading():
            return f"the GGUF file {stored.name}", *load_gguf(source.what, stored)
    if is_mamba_ssm(values):
        config = mamba_config(source.what, values)
        tensors = mamba_weights(source.what, read_tensors(source), config.tie_word_embeddings)
        return "mamba_ssm's layout", config, tensors, None, None
    config = build_config("source", values, source.what)
    generation = source.file("generation_config.json")
    if generation is not None:
        try:
            generation = GenerationConfig.from_pretrained(generation.parent)
        except Exception as err:
            raise ManticoreError(f"{source.what}: its generation_config.json is invalid ({err}).") from err
    return "a pickle", config, read_tensors(source), generation, None


def _tokenizer(source, values, stored, given):
    """(the tokenizer, what it is called, a sentence on what is not known of it or None)."""
    if given is None and stored is not None:
        tokenizer, note = read_gguf_tokenizer(source.what, stored)
        return tokenizer, stored.name, note
    name, options = given, {}
    if given is None:
        has_one = any([source.file(file) is not None for file in TOKENIZER_FILES])  # fetches all there are
        if not has_one and not is_mamba_ssm(values):
            raise ManticoreError(f"{source.what} has no tokenizer; give one (--tokenizer DIRECTORY_OR_REPO).")
        name, options = source.address if has_one else (TOKENIZER, {})
    try:
        tokenizer = read_tokenizer(name, **options)
    except ManticoreError as err:
        why = " It is the default where a checkpoint has none." if name == TOKENIZER and given is None else ""
        raise ManticoreError(
            f"{source.what}: {str(err)[:500]}{why} Give another, or a directory (--tokenizer)."
        ) from err
    # A directory's place is no one else's business: the card says its name
    return tokenizer, os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else str(name), None


def _widest(what, tensors):
    dtype = None
    for tensor in tensors.values():
        if tensor.is_floating_point():
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    if dtype not in DTYPES.values():
        raise ManticoreError(f"{what} stores its weights as {dtype}; one of {sorted(DTYPES)} can be converted.")
    return dtype


def _fill(what, config, tensors, dtype):
    """The model of a configuration, made of these tensors and nothing else."""
    try:
        with quiet_loading():
            model, found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as err:  # whatever an architecture asks of its tensors
        raise ManticoreError(
            f"{what}: its tensors do not fit its configuration ({' '.join(str(err).split())[:500]})."
        ) from err
    for problem, keys in (
        ("has no tensor for", found["missing_keys"]),
        ("has a tensor that its architecture has no place for:", found["unexpected_keys"]),
        ("has a tensor of another shape than its configuration says:", [one[0] for one in found["mismatched_keys"]]),
    ):
        if keys:
            first, others = min(keys), len(keys) - 1
            raise ManticoreError(f"{what} {problem} {first}{f' (and {others} more)' if others else ''}.")
    return model.eval()


@torch.no_grad()
def _check_saved(what, model, directory):
    """Raises ManticoreError unless what was written, read back, is the model to the last bit."""
    ids = torch.arange(24).remainder(model.config.vocab_size)[None]
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=model.dtype, use_safetensors=True).eval()
    ours, theirs = model.state_dict(), loaded.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    if not same or not torch.equal(model(ids).logits, loaded(ids).logits):
        raise ManticoreError(
            f"{what}: what was written is not what was read, so it was removed; please report this architecture "
            f"({model.config.model_type})."
        )


def _check_saved_tokenizer(what, tokenizer, directory):
    """Raises ManticoreError unless the tokenizer that was written, read back, cuts text as it did."""
    loaded = read_tokenizer(directory)
    if loaded(SAMPLE)["input_ids"] != tokenizer(SAMPLE)["input_ids"]:
        raise ManticoreError(
            f"{what}: its tokenizer, a {type(tokenizer).__name__}, splits text differently once saved and reloaded: "
            "give another (--tokenizer)."
        )


def _card(result, title, rounded):
    license, source = result["license"], result["source"]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if license is not None:
        lines.append(f"license: {json.dumps(license)}")
    if result["revision"] is not None:
        lines.append(f"base_model: {source}")
    body = _CARD.format(
        title=escape(title),
        how=escape(result["how"]),
        source=escape(source),
        revision=result["revision"] or "none (local files)",
        license=escape(license or "none"),
        tokenizer=escape(result["tokenizer"]),
        rounded=rounded,
        note=f"\n{result['note']}\n" if result["note"] else "",
    )
    return "\n".join([*lines, "---", "", body])
