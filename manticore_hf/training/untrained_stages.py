"""The stages without gradients: compose and calibrate. Each writes a hybrid that loads, with its tokenizer.

    manticore-hf compose org/a org/b --num_blocks 2 --output_dir hybrid
    manticore-hf calibrate --model hybrid --data text.txt --output_dir calibrated

Both take TrainingArguments like the other stages, so that one set of options serves a whole experiment; what they use
of it is the output directory, the seed, the device, and (calibrate) per_device_train_batch_size.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.compose.transplant import TransplantReport, compose_transplanted
from manticore_hf.evaluation.data import DataArguments, load_rows, read_texts
from manticore_hf.modeling.configuration_manticore import CHOICES, ManticoreError
from manticore_hf.training.calibrate import calibrate_projectors
from manticore_hf.training.freezing import fix_alpha
from manticore_hf.training.programs import print_program
from manticore_hf.utils.distributed import broadcast_object, is_main, main_first, on_main, print_main
from manticore_hf.utils.files import write_json

RESULT = "stage.json"
_MEASURED_BYTES = 200_000  # of text on which transplants are measured


def _choice(key, text):
    return field(default=None, metadata={"help": f"{text}: {', '.join(CHOICES[key])}. Default: the preset's."})


@dataclass
class HybridArguments:
    """How the components are joined; see ManticoreConfig."""

    num_blocks: int = field(default=1, metadata={"help": "Blocks into which every component is cut."})
    block_layers: str | None = field(
        default=None, metadata={"help": 'Layers per block, as JSON: {"name": [4, 2], ...}. Default: as even as can be.'}
    )
    preset: str = field(default="default", metadata={"help": "Fills what is not given: default or paper."})
    projector: str | None = _choice("projector", "Maps between feature spaces")
    projector_init: str | None = _choice("projector_init", "Where they start")
    gate: str | None = _choice("gate", "Gate of the projectors")
    reference_component: str | None = field(
        default=None,
        metadata={
            "help": "Component whose states are the shared space. Default: the first; calibration "
            "takes the one with the lowest loss."
        },
    )
    mixture: str | None = _choice("mixture", "Output mixture")
    mixture_space: str | None = _choice("mixture_space", "What the output mixture averages")
    embeddings: str | None = _choice("embeddings", "Embeddings and heads")
    head_mixture: str | None = _choice("head_mixture", "Block whose weights mix the heads")
    mix_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the mixture's loss."})
    component_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the parts' own losses."})
    tokenizer_component: str | None = field(
        default=None, metadata={"help": "Component whose tokenizer is the hybrid's. Default: the first."}
    )
    transplant: str | None = field(
        default=None,
        metadata={
            "help": "Give components with other tokenizers the vocabulary of the tokenizer "
            "component: mean, omp or auto. Default: refuse them."
        },
    )
    transplant_data: str | None = field(
        default=None,
        metadata={
            "help": "Text to measure transplants on, and to choose the method by: a file, folder "
            "or Hub data set. Default: none; in a recipe, its data."
        },
    )
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights, for example bfloat16."})

    def settings(self):
        """What was given, as keyword arguments of `from_components`."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = {key: value for key, value in given.items() if value is not None}
        if "block_layers" in given:
            try:
                given["block_layers"] = json.loads(given["block_layers"])
            except ValueError as err:
                raise ManticoreError(f"block_layers={given['block_layers']!r} is no JSON: {err}.") from None
        if self.mixture is not None and self.mixture.startswith("mad"):
            raise ManticoreError(
                f"mixture={self.mixture!r} is programmed by a recipe: write it under `hybrid:` there and give the "
                "recipe to `manticore-hf run` (or use manticore_hf.experiments.program_alpha and set_mixture_weights)."
            )
        return given


@dataclass
class CalibrateArguments:
    """What calibration starts from."""

    model: str = field(metadata={"help": "The hybrid to start from: directory or Hub repo."})
    tokens: int = field(default=40_000, metadata={"help": "Tokens to use; a few ten thousand."})
    reference: str | None = field(
        default=None, metadata={"help": "Reference component. Default: the one with the lowest loss on this text."}
    )
    calibration_dtype: str = field(default="float32", metadata={"help": "dtype the weights are loaded in."})


def training_defaults():
    """What the stages set in TrainingArguments where nothing is given: no trackers; the CPU where there is no other."""
    return {"report_to": "none", "use_cpu": not torch.accelerator.is_available()}


def finished(output):
    """The result of a stage that has ended in this directory, or None; on every rank the same."""
    file = Path(output) / RESULT
    result = broadcast_object(json.loads(file.read_text()) if is_main() and file.is_file() else None)
    if result is not None:
        print_main(f"{output}: this stage is finished; delete {RESULT} there to run it again.")
    return result


def record(output, result):
    """Writes a stage's result; by rename and last, because its presence says that the stage has ended."""
    write_json(Path(output) / RESULT, result)
    return result


def run_compose(components, arguments, program=None, **settings):
    """Joins components into a hybrid and saves it with the tokenizer of its tokenizer component.

    Args:
        components: As `ManticoreForCausalLM.from_components` takes them.
        arguments: TrainingArguments: `output_dir`, and `seed` of the initial projectors.
        program: What finds the alpha that the hybrid is fixed at: `program_alpha` with all arguments but the model
            types of the components and `num_blocks`. Default: alpha is as ManticoreConfig says.
        **settings: Keys of ManticoreConfig, `dtype`, and `transplant` (a method) with `transplant_data` (DataArguments,
            or a source of text).

    Returns:
        The stage's result: components, blocks, parameters, bytes of the hybrid's own weights, transplants; of a
        programmed hybrid also alpha and the tasks that it comes from.
    """
    output = Path(arguments.output_dir)
    result = finished(output)
    if result is None:
        result = on_main(_compose, components, arguments, settings, output, program)
    if is_main():
        _print_compose(result)
    return result


def _print_compose(result):
    names = result["components"]
    print(f"\ncompose: {' + '.join(names)} in {result['num_blocks']} block(s)")
    for name, report in result.get("transplants", {}).items():
        print(f"vocabulary of {name} transplanted by {TransplantReport(**report)}")
    print(
        f"{result['parameters']:,} parameters; {result['own_bytes']:,} bytes of weights written, "
        f"{result['whole_bytes']:,} with all components"
    )
    if "program" in result:
        print_program(names, result["mixture_weights"], result["program"])


def _compose(components, arguments, settings, output, program):
    set_seed(arguments.seed)
    method, source, reports = settings.pop("transplant", None), settings.pop("transplant_data", None), {}
    if method is None:
        if source is not None:
            raise ManticoreError(f"transplant_data={source!r} is given, but no transplant; give --transplant auto.")
        model, tokenizer = ManticoreForCausalLM.from_components(components, **settings), None
    else:
        source = DataArguments(source) if isinstance(source, str) else source
        texts = None if source is None else read_texts(source, _MEASURED_BYTES)
        model, tokenizer, reports = compose_transplanted(components, method, texts=texts, **settings)
    names = model.config.component_names
    programmed = {}
    if program is not None:
        found = program([getattr(model.config, name).model_type for name in names], num_blocks=model.config.num_blocks)
        fix_alpha(model, found.alpha)
        programmed = {"mixture_weights": model.mixture_weights().tolist(), "program": found.record()}
    entry = model.config.components[names.index(model.config.tokenizer_component)]
    source = entry["repo_id"] or components[names.index(entry["name"])]
    model.save_pretrained(output)
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, revision=entry["revision"] or "main")
        tokenizer.save_pretrained(output)
    except (OSError, ValueError) as err:
        print(f"No tokenizer was saved: {source} has none that can be read ({err}).", file=sys.stderr)
    result = {"stage": "compose", "components": names, "num_blocks": model.config.num_blocks}
    if reports:
        result["transplants"] = {name: report.to_dict() for name, report in reports.items()}
    result["parameters"] = model.num_parameters()
    result["own_bytes"] = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    result["whole_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    return record(output, {**result, **programmed})


def run_calibrate(start, data, arguments):
    """Calibrates a saved hybrid's projectors and saves the result.

    Args:
        start: CalibrateArguments.
        data: DataArguments; the ridge is chosen on tokens held out inside, the validation text is left alone.
        arguments: TrainingArguments: `output_dir`, `seed`, `use_cpu` and `per_device_train_batch_size` count.

    Returns:
        The stage's result: reference, losses of the components, R^2 of each map.
    """
    output = Path(arguments.output_dir)
    result = finished(output)
    if result is None:
        set_seed(arguments.seed)
        model = ManticoreForCausalLM.from_pretrained(start.model, dtype=start.calibration_dtype)
        with main_first():
            tokenizer = AutoTokenizer.from_pretrained(start.model)
            rows, _ = load_rows(data, tokenizer)
        model.to(arguments.device)
        options = {"tokens": start.tokens, "reference": start.reference}
        found = calibrate_projectors(model, rows, batch_size=arguments.per_device_train_batch_size, **options)
        result = on_main(_write_calibrated, model, tokenizer, found, output)
    print_main(f"\ncalibrate: {result['tokens']:,} tokens, reference {result['reference']}")
    for name, loss in result["losses"].items():
        print_main(f"{name:>24}  {loss:.4f} nats per token")
    for key, score in result["r2"].items():
        print_main(f"{key:>32}  R^2 {score:6.3f}  ridge {result['ridges'][key]:g}")
    return result


def _write_calibrated(model, tokenizer, found, output):
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return record(output, {"stage": "calibrate", **dataclasses.asdict(found)})


def main(stage, argv):
    """`manticore-hf compose|calibrate ...`; returns the exit status."""
    kinds = (HybridArguments,) if stage == "compose" else (CalibrateArguments, DataArguments)
    parser = HfArgumentParser((*kinds, TrainingArguments), prog=f"manticore-hf {stage}", description=__doc__)
    if stage == "compose":
        parser.add_argument("components", nargs="+", help="org/repo, org/repo@revision or directory")
    parser.set_defaults(**training_defaults())
    try:
        parsed = parser.parse_args_into_dataclasses(argv)
        if stage == "compose":
            run_compose(parsed[2].components, parsed[1], **parsed[0].settings())
        else:
            run_calibrate(*parsed)
    except ManticoreError as err:
        print(f"manticore-hf {stage}: {err}", file=sys.stderr)
        return 2
    return 0
