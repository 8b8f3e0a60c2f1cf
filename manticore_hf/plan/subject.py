"""What a plan is made for: the hybrid of a recipe, or a saved one, from configurations alone."""

import dataclasses
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError

from manticore_hf.compose.component_tokenizers import align, can_align, check_tokenizers, find_tokenizer
from manticore_hf.compose.components import ComponentSpec, Resolved, resolve
from manticore_hf.compose.convert.convert import describe
from manticore_hf.compose.convert.converted_files import converted
from manticore_hf.compose.convert.read_checkpoint import is_gguf
from manticore_hf.evaluation.records import read_texts
from manticore_hf.modeling.aligned_mapping import ByteTokenizer
from manticore_hf.modeling.bounds_manticore import ManticoreError
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from manticore_hf.plan.aligned import ASSUMED, SAMPLE, measure_amount
from manticore_hf.training.programs import program_of
from manticore_hf.training.recipe import HYBRID_SOURCES, Recipe, find_beside, load_named_recipe, stage_data

_PADDING = 0.02  # vocabularies whose sizes differ by no more are taken for one that is padded differently
_NOT_OF_THE_MODEL = ("dtype", "transplant", *HYBRID_SOURCES)


@dataclass
class Subject:
    """A hybrid and what is to be done with it.

    Attributes:
        name: What messages call it.
        config: Its ManticoreConfig.
        stages: [(stage, its settings)].
        recipe: The Recipe, or None for a saved hybrid.
        home: The Resolved component whose tokenizer is the hybrid's, or None.
        amounts: {component that reads text by a tokenizer of its own: Amount}.
        notes: What had to be assumed.
    """

    name: str
    config: ManticoreConfig
    stages: list
    recipe: Recipe | None = None
    home: Resolved | None = None
    amounts: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)


def load_subject(source: str | Path, configs: str | Path | None = None, allow_outside: bool = False) -> Subject:
    """Reads a recipe, or a saved hybrid, without weights.

    Args:
        source: A recipe (.yaml), a directory of a saved hybrid or its Hub repo. Hybrids are planned to be fine-tuned.
        configs: Directory with `org/name/config.json` of components, read instead of the Hub where they are there.
        allow_outside: Whether what a recipe names on this machine may lie outside of the folder that it is in.

    Returns:
        The Subject.

    Raises:
        ManticoreError: Something cannot be read or joined.
    """
    if Path(source).suffix in (".yaml", ".yml") or Path(source).is_file():
        recipe = load_named_recipe(source, allow_outside)
        with tempfile.TemporaryDirectory(prefix="manticore-plan-") as scratch:
            return _from_recipe(recipe, configs, scratch)
    try:
        config = ManticoreConfig.from_pretrained(source)
    except (OSError, HTTPError, ValueError) as err:
        raise ManticoreError(
            f"{str(source)!r} is neither a recipe (a .yaml file) nor readable as a hybrid (a directory or Hub repo): "
            f"{' '.join(str(err).split())}"
        ) from err
    if not config.component_names:
        raise ManticoreError(f"{str(source)!r} is not a hybrid; to plan joining models, name them in a recipe.")
    subject = Subject(str(source), config, [("finetune", {})])
    subject.amounts = _amounts(config, {}, None, subject.notes)
    return subject


def _from_recipe(recipe, configs, scratch):
    found = [_find(item, recipe, configs, scratch) for item in recipe.components]
    settings = {key: value for key, value in recipe.hybrid.items() if key not in _NOT_OF_THE_MODEL}
    notes = []
    home = found[0]
    if settings.get("tokenizer_component") is not None:
        home = next((one for one in found if one.name == settings["tokenizer_component"]), home)
    own = {} if "transplant" in recipe.hybrid else _own_tokenizers(found, home, settings, notes)
    if own and "tokenizer_component" not in settings:
        notes.append(f"the plan uses the tokenizer of {home.name}: which one the text will choose is not known yet")
    for one in found:
        one.tokenizer = {"files": None} if one.name in own else None
    entries = [one.entry() for one in found]
    if program_of(settings.get("mixture")) is not None:
        rows = settings.get("num_blocks", 1)
        settings.update(mixture="static", mixture_weights=[[1 / len(found)] * len(found)] * rows)
    if "transplant" in recipe.hybrid:
        _transplant(found, entries, home, recipe.hybrid["transplant"], notes)
    else:
        same = [one for one in found if one is home or one.name not in own]
        if len({one.config.vocab_size for one in same}) > 1 and "vocab_size" not in settings:
            settings["vocab_size"] = _common_size(same, notes)
    dtypes = {one.config.dtype for one in found}
    config = ManticoreConfig(components=entries, **settings)
    config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    stated = recipe.hybrid.get("dtype", "auto")
    if stated != "auto":
        if not isinstance(getattr(torch, stated, None), torch.dtype):
            raise ManticoreError(f"dtype={stated!r} in the recipe is not a torch dtype; give for example 'bfloat16'.")
        config.dtype = getattr(torch, stated)
    stages = recipe.stages or [("finetune", {})]
    if not recipe.stages:
        notes.append("the recipe has no stages: the plan is for finetune with Transformers' defaults")
    return Subject(recipe.name, config, stages, recipe, home, _amounts(config, own, recipe, notes), notes)


def _own_tokenizers(found, home, settings, notes):
    """{component: its tokenizer, None where it was not read}, of home and of those that read text by another; or {}."""
    own = align(found, {}, None, can_align(settings))
    if own:
        others = [name for name, one in own.items() if one.get_vocab() != own[home.name].get_vocab()]
    elif can_align(settings) and any(find_tokenizer(one, {}) is None for one in found):
        # Vocabularies of very different sizes tell
        others = [one.name for one in found if not _padded(one, home)]
        for name in others:
            notes.append(f"the tokenizers of {name} and {home.name} were not read and are assumed to differ")
    else:
        others = []
    return {name: own.get(name) for name in (home.name, *others)} if others else {}


def _amounts(config, own, recipe, notes):
    """{component: Amount} of those that read text by tokenizers of their own."""
    out, texts = {}, []
    if recipe is not None and "data" in recipe.data:
        data = stage_data(recipe, {})
        texts = read_texts(data, SAMPLE) if os.path.exists(data.data) else []
    for name in config.aligned:
        pair = [own.get(one) for one in (config.tokenizer_component, name)]
        if any(one is None for one in pair) or not any(texts):
            out[name] = ASSUMED
        else:
            sizes = [getattr(config, one).vocab_size for one in (config.tokenizer_component, name)]
            out[name] = measure_amount(*(ByteTokenizer(one, rows) for one, rows in zip(pair, sizes)), texts)
        notes.append(
            f"{name} reads {out[name].nodes:.2f} tokens for each of the hybrid's ({out[name].how}); its cache is "
            "counted per token of its own tokenizer"
        )
    return out


def _padded(one, other):
    """Whether the vocabularies of two components differ in size by no more than padding."""
    sizes = one.config.vocab_size, other.config.vocab_size
    return (max(sizes) - min(sizes)) / max(sizes) <= _PADDING


def _find(item, recipe, configs, scratch):
    item = find_beside(item, recipe)
    if is_gguf(item):
        file, item = item, str(converted(item, scratch))
        describe(file, item)
    spec = ComponentSpec.of(item)
    if configs is not None and not os.path.isdir(item):
        folder = Path(configs) / item.partition("@")[0]
        if (folder / "config.json").is_file():
            spec = dataclasses.replace(spec, source=str(folder))
    return resolve(spec, {}, weights=False)


def _transplant(found, entries, home, method, notes):
    """Gives the components whose vocabulary is not the tokenizer component's the rows that they will have."""
    tokenizers = [find_tokenizer(one, {}) for one in found]
    own = tokenizers[found.index(home)]
    size = home.config.vocab_size if own is None else max(own.get_vocab().values()) + 1
    for one, entry, tokenizer in zip(found, entries, tokenizers):
        if own is not None and tokenizer is not None:
            same = tokenizer.get_vocab() == own.get_vocab()
        else:
            same = one is home or one.config.vocab_size == home.config.vocab_size
        if same:
            continue
        rows, one.config.vocab_size = one.config.vocab_size, size
        method = method if method in ("mean", "omp") else "auto"
        entry["transplant"] = {"method": method, "vocabulary": "0" * 64, "tokenizer": None, "vocab_size": rows}
        notes.append(f"the vocabulary of {one.name} ({rows:,} rows) is replaced by {home.name}'s ({size:,} rows)")


def _common_size(found, notes):
    size = check_tokenizers(found, {})
    if size is not None:
        return size
    sizes = {one.name: one.config.vocab_size for one in found}
    least, most = min(sizes.values()), max(sizes.values())
    if (most - least) / most > _PADDING:
        raise ManticoreError(
            f"The components' vocabularies differ ({sizes}): write `hybrid: {{transplant: auto}}` into the recipe, or "
            "choose components with one tokenizer."
        )
    if any(find_tokenizer(one, {}) is None for one in found):
        notes.append(f"vocabularies of {most:,} and {least:,} rows are assumed to be one, padded (tokenizers not read)")
    return least
