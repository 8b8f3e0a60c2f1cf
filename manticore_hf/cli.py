"""The command line: `manticore-hf COMMAND --help`.

One table says which command is where. Each has its options and its `main` in its own module of its subpackage, which
imports neither torch nor Transformers before it runs, so that help is printed at once (see `manticore_hf_cli`).
`python -m manticore_hf.cli` is the same, for torchrun and accelerate.
"""

import glob
import importlib
import os
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from typing import NamedTuple

import manticore_hf
from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.training.stage_arguments import OLD_NAMES, wrong_setting
from manticore_hf.training.stages import STAGES
from manticore_hf.utils.files import names_gguf
from manticore_hf.utils.formatting import printable_output
from manticore_hf.utils.interrupted import ends_if_interrupted
from manticore_hf.utils.options import Parser, RawHelp
from manticore_hf.utils.quiet import quiet_loading, quiet_optional_packages
from manticore_hf.utils.renamed import warn_renamed, warned_in_a_sentence


class Command(NamedTuple):
    """Where a command is, and its line in the list of all.

    Attributes:
        module: Has `add_options(parser)`, or of a stage `add_options(parser, stage, whole)`, and `main(args)`, which
            returns the exit status (None: 0).
        help: What it does, in a line.
    """

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "manticore_hf.demo.demo_command",
        "join two tiny pretrained models, train the hybrid, publish it to a local Hub and load it back",
    ),
    "families": Command(
        "manticore_hf.families.families_command",
        "which model types of Transformers can be components, and why others are unsupported",
    ),
    "convert": Command(
        "manticore_hf.compose.convert.convert_command",
        "make a component of a checkpoint in mamba_ssm's layout, a GGUF file or a pickle",
    ),
    "plan": Command(
        "manticore_hf.plan.plan_command",
        "does a recipe fit, on which engine, and how long does it take, before weights are downloaded",
    ),
    "run": Command("manticore_hf.training.run_command", "run all stages of a recipe"),
    **{name: Command("manticore_hf.training.stage_command", stage.help) for name, stage in STAGES.items()},
    "compare": Command(
        "manticore_hf.compare.compare_command",
        "train and test a recipe's hybrid and every baseline at equal budget, over seeds",
    ),
    "report": Command(
        "manticore_hf.report.report_command",
        "is a hybrid worth it, what does it cost, why this mixture, what next: one HTML file, and Markdown",
    ),
    "app": Command(
        "manticore_hf.app.app_command",
        "a page to try a hybrid in a browser, here or as a Space: each component's weight, guesses and text",
    ),
    "evaluate": Command(
        "manticore_hf.compare.evaluate_command",
        "losses or task scores of a hybrid beside those of its components, their ensemble and their online mixture",
    ),
    "mad": Command(
        "manticore_hf.experiments.mad.mad_command",
        "train a model or a hybrid from scratch on a MAD task, and print its accuracy",
    ),
    "mad-profile": Command(
        "manticore_hf.experiments.mad.profile_command",
        "what architectures are good at: each trained from scratch on all MAD tasks, as a table and a radar plot",
    ),
    "lra": Command(
        "manticore_hf.experiments.lra.lra_command",
        "train a model or a hybrid from scratch on a task of the Long Range Arena, and print its accuracy",
    ),
    "composition": Command(
        "manticore_hf.experiments.composition.composition_command",
        "a task that no mixture of outputs can do: two components joined in every way, and each alone, on unseen keys",
    ),
    "inspect": Command(
        "manticore_hf.hub.inspect_command",
        "what a hybrid is and costs, without running its code or downloading weights",
    ),
    "push": Command(
        "manticore_hf.hub.push_command",
        "publish a hybrid: weights, code, tokenizer, recipe, card and plots in one commit",
    ),
}

_GO_ON = {"demo", "run", "compare", "report", "families", "mad-profile", "composition"} | {
    name for name, stage in STAGES.items() if stage.trains is not None
}
"""Commands that keep what they have done when they are interrupted, as does `evaluate --tasks`; others begin again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Command and options; default: those of the process.

    Returns:
        The exit status: 2 where something that was given cannot be used, which is then said in a sentence on stderr.

    Raises:
        SystemExit: The help was asked for, there is no such command or option (status 2), or the command was
            interrupted (130).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    said = "Interrupted; run the same command again to go on." if _goes_on(argv) else "Interrupted."
    with printable_output(), ends_if_interrupted(said), quiet_optional_packages(), warned_in_a_sentence():
        return _main(argv)


def _goes_on(argv):
    words = {one.partition("=")[0].replace("_", "-") for one in argv}
    command = OLD_NAMES.get(argv[0], argv[0]) if argv else None
    return command in _GO_ON or command == "evaluate" and words >= {"--tasks", "--output-dir"}


def _main(argv: list[str]) -> int:
    if argv and argv[0] in OLD_NAMES:
        warn_renamed(f"manticore-hf {argv[0]}", OLD_NAMES[argv[0]])
        argv[0] = OLD_NAMES[argv[0]]
    if not argv:
        print(_overview().format_help(), file=sys.stderr)
        return 2
    command, *given = _overview().parse_args(argv[:1]).command, *argv[1:]
    parser = parser_of(command, whole="--help-all" in given or not {"-h", "--help"} & set(given))
    try:
        args = parser.parse_args(given)
        _check_numbers(args, parser, command)
        _check_names(args, COMMANDS[command].module)
        manticore_hf.register()
        with quiet_loading(downloads=True):
            return importlib.import_module(COMMANDS[command].module).main(args) or 0
    except Exception as err:
        from safetensors import SafetensorError  # so says a full disk when weights are written

        if not isinstance(err, (ManticoreError, OSError, SafetensorError)):  # files that are not there, no connection
            raise
        if isinstance(err, BrokenPipeError):  # `manticore-hf ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"{parser.prog}: {' '.join(str(err).split())}", file=sys.stderr)
        return 2


def _check_numbers(args, parser, command):
    """Whether numbers make sense, before anything is imported; named by the option that the help shows."""
    shown = {one.dest: one.option_strings[0] for one in parser._actions if one.option_strings and one.help != SUPPRESS}
    for key, value in vars(args).items():
        if key in shown and (message := wrong_setting(key, value, command)) is not None:
            raise ManticoreError(f"{shown[key]} is {value}, {message}.")


def _check_names(args, module):
    """What can be told of directories before anything is imported or the Hub is asked."""
    output, model = getattr(args, "output_dir", None), getattr(args, "model", None)
    if output is not None and os.path.lexists(output) and not os.path.isdir(output):
        raise ManticoreError(f"--output-dir {output!r} is a file; give a directory, new or existing.")
    if not model or module.startswith("manticore_hf.experiments"):  # where it is a model type
        return
    if names_gguf(model) and not os.path.isdir(model):
        raise ManticoreError(
            f"{model!r} is a GGUF file and no hybrid: `manticore-hf compose` makes a hybrid of such files, and "
            "`manticore-hf convert` a model of one."
        )
    stages = sorted(stage for stage in glob.glob(f"{glob.escape(model)}/[0-9]-*") if os.path.isdir(stage))
    if stages and not os.path.exists(os.path.join(model, "config.json")):
        raise ManticoreError(
            f"{model!r} holds the stages of a run, each of them a hybrid: give one, for example the last, {stages[-1]}"
        )
    if "/" not in model and not os.path.exists(model):
        raise ManticoreError(
            f"There is no directory {model!r}; give a hybrid's directory, or its repository ('owner/name')."
        )


def parser_of(command: str, whole: bool = True) -> Parser:
    """The parser of a command's options.

    Args:
        command: A key of COMMANDS.
        whole: False: of a stage, without the options of TrainingArguments, which import Transformers.
    """
    module = importlib.import_module(COMMANDS[command].module)
    parser = Parser(prog=f"manticore-hf {command}")
    if command in STAGES:
        module.add_options(parser, STAGES[command], whole)
    else:
        module.add_options(parser)
    return parser


def _overview() -> Parser:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.help}" for name, command in COMMANDS.items()]
    parser = Parser(
        prog="manticore-hf",
        usage="manticore-hf COMMAND ...",
        description="Pretrained hybrids. `manticore-hf COMMAND --help` lists the options of a command:\n\n"
        + "\n".join(lines),
        formatter_class=RawHelp,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of these")
    return parser


if __name__ == "__main__":
    sys.exit(main())
