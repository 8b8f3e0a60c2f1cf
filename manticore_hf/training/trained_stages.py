"""The training stages: pretrain (projectors), search, finetune. One function, one command each.

    manticore-hf pretrain --model hybrid --data text.txt --output_dir projectors --learning_rate 1e-3
    manticore-hf search   --model projectors --data text.txt --output_dir searched --strategy gaea
    manticore-hf finetune --model projectors --mixture_from searched --data text.txt --output_dir tuned

Every option of Transformers' TrainingArguments is taken by its usual name. A stage that was killed goes on from its
last whole checkpoint when the same command is given again; a stage that is finished is not run again.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.evaluation.data import DataArguments, load_rows
from manticore_hf.evaluation.losses import compare_losses, measured_on
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.training.calibrate import awaits_calibration, calibrate_projectors
from manticore_hf.training.freezing import ComponentClipping, fix_alpha, set_stage
from manticore_hf.training.objective import ObjectiveWhenSharded, awaits_objective, choose_objective
from manticore_hf.training.search import SearchArguments, SearchTrainer, alpha_history
from manticore_hf.training.trainer import HybridLogging
from manticore_hf.training.untrained_stages import finished, record, training_defaults
from manticore_hf.utils.deepspeed import Unrounded, take_precision
from manticore_hf.utils.distributed import broadcast_object, gathered, is_main, main_first, print_main
from manticore_hf.utils.objective import OBJECTIVE, say_objective

STAGES = {"pretrain": "projectors", "search": "search", "finetune": "finetune"}


@dataclass
class StageArguments:
    """What a stage starts from."""

    model: str = field(metadata={"help": "The hybrid to start from: directory or Hub repo."})
    mixture_from: str | None = field(
        default=None,
        metadata={
            "help": "finetune: a searched hybrid whose mixture weights are taken over and fixed, while components and "
            "projectors start from --model (the paper's order)."
        },
    )
    component_max_norm: float | None = field(
        default=None, metadata={"help": "Clip the gradient of each component by its own norm (instead of over all)."}
    )
    train_dtype: str = field(
        default="float32", metadata={"help": "dtype the weights are loaded in; bf16/fp16 options autocast over it."}
    )


class HybridTrainer(HybridLogging, Trainer):
    """The standard Trainer, with the hybrid's parts in its logs."""


def run_stage(stage, start, data, arguments):
    """Runs one training stage.

    Args:
        stage: "pretrain", "search" or "finetune".
        start: StageArguments.
        data: DataArguments.
        arguments: TrainingArguments; SearchArguments for "search".

    Returns:
        The stage's result, as written to `stage.json`: losses on the validation text of the hybrid, each component and
        their ensemble, mixture weights, steps.

    Raises:
        ManticoreError: Something in the arguments cannot be used.
    """
    if stage not in STAGES:
        raise ManticoreError(f"stage={stage!r} is unknown; choose one of {list(STAGES)}.")
    output = Path(arguments.output_dir)
    if (result := finished(output)) is not None:
        _print_summary(stage, result)
        return result
    take_precision(arguments)
    set_seed(arguments.seed)
    model = ManticoreForCausalLM.from_pretrained(start.model, dtype=start.train_dtype)
    with main_first():
        tokenizer = AutoTokenizer.from_pretrained(start.model)
        train, validation = load_rows(data, tokenizer)
    if awaits_calibration(model):
        found = calibrate_projectors(model.to(arguments.device), train)
        print_main(
            f"Projectors calibrated on {found.tokens:,} tokens of the training text, reference {found.reference}."
        )
    if start.mixture_from is not None:
        take_mixture(model, start.mixture_from)
    elif stage == "finetune":
        fix_alpha(model)
    set_stage(model, STAGES[stage])
    kwargs = {"train_dataset": train, "eval_dataset": validation, "processing_class": tokenizer}
    kwargs["data_collator"] = collator(data, tokenizer)
    if start.component_max_norm is not None:
        arguments.max_grad_norm = 0.0
        kwargs["callbacks"] = [ComponentClipping(start.component_max_norm)]
    if arguments.ddp_find_unused_parameters is None:
        arguments.ddp_find_unused_parameters = True  # weights that are fixed, components at 0, heads that nothing reads
    trainer = (SearchTrainer if stage == "search" else HybridTrainer)(model=model, args=arguments, **kwargs)
    if awaits_objective(model):
        rows = arguments.per_device_train_batch_size
        if trainer.is_fsdp_enabled:
            trainer.add_callback(ObjectiveWhenSharded(train, rows, output))
        else:
            choose_objective(model.to(arguments.device), train, batch_size=rows)
            print_main(f"Objective: {say_objective(model.config)}.")
    resume = arguments.resume_from_checkpoint or broadcast_object(last_whole_checkpoint(output))
    if resume:
        print_main(f"{output}: going on from {resume}.")
    kept = Unrounded(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return _finish(stage, trainer, model, tokenizer, validation, output, data, kept)


def _finish(stage, trainer, model, tokenizer, validation, output, data, kept):
    result = {"stage": stage, "steps": trainer.state.global_step, "components": model.config.component_names}
    result["objective"] = {key: getattr(model.config, key) for key in OBJECTIVE}
    if validation is not None:
        result["losses"] = compare_losses(model, validation, trainer.args.per_device_eval_batch_size)
        result.update(measured_on(data, validation))
    state = gathered(trainer, model, kept)
    if is_main() or not trainer.is_deepspeed_enabled:  # which has the model whole on rank 0 only
        result["mixture_weights"] = model.mixture_weights().tolist()
    if is_main():
        _write(stage, trainer, model, state, tokenizer, output, result)
        _print_summary(stage, result)
    return broadcast_object(result)  # after rank 0 has written what the next stage reads


def _write(stage, trainer, model, state, tokenizer, output, result):
    model.save_pretrained(output, state_dict=state)
    tokenizer.save_pretrained(output)
    if stage == "search":
        from manticore_hf.utils.plots import plot_alpha, plot_mixture

        steps, history = alpha_history(trainer.state.log_history)
        if steps:  # a search shorter than its logging_steps has logged nothing
            plot_alpha(steps, history, output / "plots" / "alpha.png")
        plot_mixture(result["mixture_weights"], result["components"], output / "plots" / "mixture.png")
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    record(output, result)


def take_mixture(model, source):
    """Fixes a hybrid's mixture weights at those of another, searched one; a token gate goes on from the other's.

    Raises:
        ManticoreError: The other hybrid has other components or blocks.
    """
    other, mine = ManticoreConfig.from_pretrained(source), model.config
    for what in ("component_names", "num_blocks", "mixture"):
        if getattr(other, what) != getattr(mine, what):
            raise ManticoreError(
                f"{source!r} has {what} {getattr(other, what)}, this hybrid {getattr(mine, what)}: its mixture weights "
                "do not fit."
            )
    searched = ManticoreForCausalLM.from_pretrained(source)
    fix_alpha(model, searched.mixture_weights())
    if mine.mixture == "token":
        model.hybrid_mixer.token_gate.load_state_dict(searched.hybrid_mixer.token_gate.state_dict())


def last_whole_checkpoint(output):
    """The newest checkpoint of a run that was written to its end, or None.

    The Trainer writes `trainer_state.json` last; a checkpoint without it, or with half of it, was cut off by a kill.
    """
    found = []
    for folder in Path(output).glob("checkpoint-*"):
        try:
            found.append((json.loads((folder / "trainer_state.json").read_text())["global_step"], folder))
        except (OSError, ValueError, KeyError):
            continue
    return str(max(found)[1]) if found else None


def collator(data, tokenizer):
    """The data collator for rows of `load_rows`."""
    if data.prompt_column is None:
        return default_data_collator
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)


def _print_summary(stage, result):
    names = result["components"]
    print_main(f"\n{stage}: {result['steps']} steps")
    print_main(f"{'block':>8}" + "".join(f"{name:>24}" for name in names) + "   (mixture weights)")
    for block, row in enumerate(result["mixture_weights"]):
        print_main(f"{block + 1:>8}" + "".join(f"{weight:24.3f}" for weight in row))
    for name, loss in result.get("losses", {}).items():
        print_main(f"{name:>24}  {loss:.4f} nats per token on the validation text")


def main(stage, argv):
    """`manticore-hf pretrain|search|finetune ...`; returns the exit status."""
    kind = SearchArguments if stage == "search" else TrainingArguments
    parser = HfArgumentParser((StageArguments, DataArguments, kind), prog=f"manticore-hf {stage}", description=__doc__)
    parser.set_defaults(**training_defaults())
    try:
        run_stage(stage, *parser.parse_args_into_dataclasses(argv))
    except ManticoreError as err:
        print(f"manticore-hf {stage}: {err}", file=sys.stderr)
        return 2
    return 0
