"""`manticore-hf compose`, `calibrate`, `pretrain`, `search`, `finetune`, `prune`: their options.

Every training stage takes all options of Transformers' TrainingArguments, which `--help-all` lists; compose and
calibrate take what they make use of.
"""

import argparse
import shlex

from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.training.stage_arguments import with_direction
from manticore_hf.training.stages import Stage
from manticore_hf.utils.options import Parser, Renamed, add_fields, from_namespace, truth

_EXAMPLES = {
    "compose": "org/a org/b --num-blocks 2 --output-dir hybrid",
    "calibrate": "--model hybrid --data text.txt --output-dir calibrated",
    "pretrain": "--model hybrid --data text.txt --output-dir projectors --learning-rate 1e-3",
    "search": "--model projectors --data text.txt --output-dir searched --strategy gaea",
    "finetune": "--model projectors --mixture-from searched --data text.txt --output-dir tuned --bf16",
    "prune": "--model tuned --data text.txt --output-dir hard --path loss --max-steps 200",
}


def add_options(parser: Parser, stage: Stage, whole: bool = True) -> None:
    """Adds a stage's options.

    Args:
        parser: The command's parser.
        stage: One of STAGES.
        whole: Also those of TrainingArguments, of a stage that trains; importing them takes seconds. They are in the
            help if it is asked for as `--help-all`.
    """
    parser.description = (
        f"{stage.help[0].upper()}{stage.help[1:]}. Prints {stage.prints}. A stage that is finished is not run again."
    )
    parser.epilog = f"Example: {parser.prog} {_EXAMPLES[stage.name]}"
    parser.set_defaults(stage=stage)
    if stage.name == "compose":
        parser.add_argument("components", nargs="+", help="org/repo, org/repo@revision, directory or .gguf file")
        leave_out = ("mixture_weights", "vocab_size")  # for recipes and Python
        add_fields(parser.add_argument_group("the hybrid"), stage.arguments, leave_out)
    else:
        add_fields(parser.add_argument_group("the stage"), stage.arguments)
        add_fields(parser.add_argument_group("the text"), DataArguments)
    run = parser.add_argument_group("the run")
    # Transformers' default, ./trainer_output, is nothing that anyone has asked for
    run.add_argument(
        "--output-dir", required=True, help="directory to write; the same command resumes there after an interruption"
    )
    run.add_argument("--seed", type=int, default=42, help="random seed")
    if stage.trains is None:
        run.add_argument("--use-cpu", type=truth, nargs="?", const=True, metavar="BOOL", help="use no accelerator")
        batch = {"dest": "per_device_train_batch_size", "type": int}
        if stage.name == "calibrate":
            run.add_argument("--batch-size", default=8, metavar="N", help="rows per forward pass", **batch)
            run.add_argument("--per-device-train-batch-size", action=Renamed, new="--batch-size", type=int)
        else:  # taken since a whole experiment may have one set of options; composing has no batches
            run.add_argument("--per-device-train-batch-size", help=argparse.SUPPRESS, default=8, **batch)
        return
    text = "list also the options of Transformers' TrainingArguments, all of which are taken: --learning-rate, ..."
    run.add_argument("--help-all", action="help", help=text)
    if stage.own_training is not None:
        add_fields(parser.add_argument_group("the mixture weights"), stage.own_training)
    if whole:
        _add_training(parser, stage.training_class)


def _add_training(parser, cls):
    """Adds the options of TrainingArguments that are not there yet, as Transformers' own parser reads them."""
    from transformers import HfArgumentParser

    from manticore_hf.training.runtime import training_defaults

    group = parser.add_argument_group("TrainingArguments (see Transformers)")
    taken = {action.dest for action in parser._actions}
    for action in HfArgumentParser(cls, add_help=False)._actions:
        if action.dest not in taken:
            action.option_strings = [one for one in action.option_strings if "_" not in one]
            group._add_action(action)
    parser.set_defaults(**training_defaults())


def main(args: argparse.Namespace) -> None:
    """Runs the stage."""
    from manticore_hf.training.runtime import training_defaults
    from manticore_hf.utils.distributed import print_main

    stage, defaults = args.stage, training_defaults()
    if stage.trains is None:
        args.report_to = defaults["report_to"]
        args.use_cpu = defaults["use_cpu"] if args.use_cpu is None else args.use_cpu
    else:
        args.greater_is_better = with_direction(vars(args))["greater_is_better"]
    start, training = from_namespace(stage.arguments, args), from_namespace(stage.training_class, args)
    if stage.name == "compose":
        stage.run(args.components, training, **start.settings())
        print_main(f"measure it with: {_measuring(training.output_dir, start.tokenizer_data)}")
    else:
        stage.run(start, from_namespace(DataArguments, args), training)


def _measuring(output_dir: str, text: str | None) -> str:
    """The command that compares a new hybrid with its components, on the text that chose its tokenizer if one did."""
    command = ["manticore-hf", "evaluate", "--model", output_dir, "--data", text or "TEXT.txt"]
    if text is None:
        return shlex.join(command)
    # Short rows: of a few pages, too, there are enough for an interval. A report of the hybrid shows the same numbers
    return shlex.join([*command, "--block-size", "256", "--output-dir", output_dir])
