"""The stages without gradients: compose and calibrate. Each writes a hybrid that loads, with its tokenizer.

manticore-hf compose org/a org/b --num-blocks 2 --output-dir hybrid
manticore-hf calibrate --model hybrid --data text.txt --output-dir calibrated
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from transformers import TrainingArguments

from manticore_hf.compose.choose_tokenizer import MEASURED_BYTES, can_choose, measure_tokenizers
from manticore_hf.compose.components import ComponentSpec, resolve
from manticore_hf.compose.convert.converted_files import convert_files
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.compose.transplant import TransplantReport, compose_transplanted
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.evaluation.records import read_texts
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.training.calibrate import calibrate_projectors
from manticore_hf.training.freezing import fix_alpha
from manticore_hf.training.programs import program_lines
from manticore_hf.training.runtime import StageRun
from manticore_hf.training.runtime import finished as finished  # they were here, with the arguments, in version 0.1
from manticore_hf.training.runtime import record as record
from manticore_hf.training.runtime import training_defaults as training_defaults
from manticore_hf.training.stage_arguments import CalibrateArguments
from manticore_hf.training.stage_arguments import HybridArguments as HybridArguments
from manticore_hf.utils.distributed import on_main
from manticore_hf.utils.formatting import plural
from manticore_hf.utils.tokenizers import read_tokenizer, tokenizer_at

_MEASURED_BYTES = 200_000  # of text on which transplants are measured


def run_compose(
    components: Sequence[Any],
    arguments: TrainingArguments,
    program: Callable | None = None,
    text: DataArguments | None = None,
    **settings: Any,
) -> dict:
    """Joins components into a hybrid and saves it with the tokenizer of its tokenizer component.

    Args:
        components: As `ManticoreForCausalLM.from_components` takes them, or GGUF files, which are converted first.
        arguments: TrainingArguments: `output_dir`, and `seed` of the initial projectors.
        program: What finds the alpha that the hybrid is fixed at: `program_alpha` with all arguments but the model
            types of the components and `num_blocks`. Default: alpha is as ManticoreConfig says.
        text: What the hybrid is for: chooses its tokenizer where components keep theirs, which differ, and neither
            `tokenizer_component` nor `tokenizer_data` is given.
        **settings: Keys of ManticoreConfig, `dtype`, `transplant` (a method) with `transplant_data`, and
            `tokenizer_data` (each DataArguments, or a source of text), and `tokenizer`, the address of one.

    Returns:
        The stage's result: components, blocks, parameters, bytes of the hybrid's own weights, transplants; of a
        programmed hybrid also alpha and the tasks that it comes from.

    Raises:
        ManticoreError: Components or settings that cannot be joined.
    """
    work = partial(on_main, _compose, components, settings, program, text)
    return StageRun("compose", arguments).perform(work, _composed, {"components": components, **settings})


def _composed(result: dict) -> Iterator[str]:
    names = result["components"]
    yield f"\ncompose: {' + '.join(names)} in {plural(result['num_blocks'], 'block')}"
    if len(names) == 1:
        yield "this hybrid has one component, so there is nothing to mix; name two or more to join them"
    for name, bits in result.get("tokenizers", {}).items():
        chosen = "; it is the hybrid's" if bits == min(result["tokenizers"].values()) else ""
        yield f"with {name}'s tokenizer: {bits:.4f} bits per byte, untrained{chosen}"
    for name, report in result.get("transplants", {}).items():
        yield f"vocabulary of {name} transplanted by {TransplantReport(**report)}"
    if result.get("transplants") == {}:
        yield "the components share one tokenizer, so nothing was transplanted"
    own, whole = result["own_bytes"], result["whole_bytes"]
    stored = "all stored here" if own >= whole else f"{own:,} stored here, the rest referenced"
    yield f"{result['parameters']:,} parameters, {whole:,} bytes of weights: {stored}"
    if "program" in result:
        yield from program_lines(names, result["mixture_weights"], result["program"])


def _compose(components, settings, program, text, run: StageRun) -> dict:
    """Composes and writes; on rank 0."""
    method, source, reports = settings.pop("transplant", None), settings.pop("transplant_data", None), {}
    chosen_by, found = settings.pop("tokenizer_data", None), None
    if chosen_by is not None and method is not None:
        raise ManticoreError("tokenizer_data chooses among tokenizers, and transplant replaces all but one; drop one.")
    if source is not None and method is None:
        source = getattr(source, "data", source)
        raise ManticoreError(f"transplant_data={source!r} is given, but no transplant; give --transplant auto.")
    # Read before files are converted and models loaded, which takes minutes
    texts, chosen_by = _texts(source, _MEASURED_BYTES), _texts(chosen_by, MEASURED_BYTES)
    components = convert_files(components, run.output)
    open_choice = chosen_by is None and method is None and not settings.keys() & {"tokenizer", "tokenizer_component"}
    if open_choice and text is not None:
        chosen_by = _texts(text, MEASURED_BYTES) if can_choose(components, settings) else None
    given = settings.pop("tokenizer", None)
    if given is not None:
        if method is not None or chosen_by is not None or settings.get("embeddings") != "fresh":
            raise ManticoreError(
                f"tokenizer={given!r} is for embeddings 'fresh', without transplant and tokenizer_data: components "
                "that keep their embeddings read their own tokens."
            )
        run.tokenizer = tokenizer_at(given)
        hub = {"token": None, "cache_dir": None, "local_files_only": False}
        rows = min(resolve(ComponentSpec.of(one), hub, weights=False).config.vocab_size for one in components)
        if (tokens := max(run.tokenizer.get_vocab().values()) + 1) > rows:
            raise ManticoreError(
                f"tokenizer={given!r} has {tokens:,} tokens, and the smallest component's vocabulary {rows:,} rows: "
                "give a smaller tokenizer."
            )
        settings.setdefault("vocab_size", rows)
    if chosen_by is not None:
        found = measure_tokenizers(components, chosen_by, **settings)
        settings["tokenizer_component"] = min(found, key=found.get)
    if method is None:
        model = ManticoreForCausalLM.from_components(components, **settings)
    else:
        model, run.tokenizer, reports = compose_transplanted(components, method, texts=texts, **settings)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id") if given is not None else ():
        for one in (model.config, model.generation_config):
            setattr(one, key, getattr(run.tokenizer, key))
    names = model.config.component_names
    result = {"components": names, "num_blocks": model.config.num_blocks}
    if found is not None:
        result["tokenizers"] = found
    if method is not None:
        result["transplants"] = {name: report.to_dict() for name, report in reports.items()}
    result["parameters"] = model.num_parameters()
    if program is not None:
        found = program([getattr(model.config, name).model_type for name in names], num_blocks=model.config.num_blocks)
        fix_alpha(model, found.alpha)
        result |= {"mixture_weights": model.mixture_weights().tolist(), "program": found.record()}
    entry = model.config.components[names.index(model.config.tokenizer_component)]
    spec = ComponentSpec.of(components[names.index(entry["name"])])
    source = entry["repo_id"] or getattr(spec.source, "name_or_path", spec.source)

    def tokenizer_and_sizes(result):
        if run.tokenizer is None and not source:
            print(f"No tokenizer was saved: {entry['name']} was given as a model of no address.", file=sys.stderr)
        elif run.tokenizer is None:
            try:
                where = {"revision": entry["revision"] or "main", "subfolder": spec.subfolder or ""}
                read_tokenizer(source, **where).save_pretrained(run.output)
            except (OSError, ValueError) as err:
                print(f"No tokenizer was saved: {source} has none that can be read ({err}).", file=sys.stderr)
        return {
            "own_bytes": sum(file.stat().st_size for file in run.output.glob("*.safetensors")),
            "whole_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        }

    return run.write(model, result, also=tokenizer_and_sizes)


def _texts(source, size):
    """The first bytes of a source of text, or None."""
    return None if source is None else read_texts(DataArguments(source) if isinstance(source, str) else source, size)


def run_calibrate(start: CalibrateArguments, data: DataArguments, arguments: TrainingArguments) -> dict:
    """Calibrates a saved hybrid's projectors and saves the result.

    Args:
        start: CalibrateArguments.
        data: DataArguments; the ridge is chosen on tokens held out inside, the validation text is left alone.
        arguments: TrainingArguments: `output_dir`, `seed`, `use_cpu` and `per_device_train_batch_size` count.

    Returns:
        The stage's result: reference, losses of the components, R^2 of each map.

    Raises:
        ManticoreError: Something in the arguments or the text cannot be used.
    """
    return StageRun("calibrate", arguments, data).perform(partial(_calibrate, start), _calibrated, start)


def _calibrate(start: CalibrateArguments, run: StageRun) -> dict:
    model = run.load(start.model, start.dtype)
    model.to(run.arguments.device)
    options = {"tokens": start.tokens, "reference_component": start.reference_component}
    batch = run.arguments.per_device_train_batch_size
    found = calibrate_projectors(model, run.train, batch_size=batch, **options)
    return run.save(model, dataclasses.asdict(found))


def _calibrated(result: dict) -> Iterator[str]:
    yield f"\ncalibrate: {result['tokens']:,} tokens, reference {result['reference']}"
    for name, loss in result["losses"].items():
        yield f"{name:>24}  {loss:.4f} nats per token"
    for key, score in result["r2"].items():
        way, _, part = key.partition(":")
        name, _, block = part.rpartition("-")
        where = f"{way.replace('_', ' ')} {name}, block {int(block) + 1}"
        yield f"{where:>40}  R^2 {score:6.3f}  ridge {result['ridges'][key]:g}"
