"""The command line: `manticore-hf COMMAND --help`.

Commands import what they need when they run, so that `--help` is quick.
"""

import argparse
import os
import subprocess
import sys
import tempfile

TRAINING = {
    "pretrain": "train projectors and mixture, components frozen",
    "search": "search the mixture weights",
    "finetune": "fine-tune everything at fixed mixture weights",
}


def main(argv=None):
    """Entry point of `manticore-hf`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="manticore-hf", description="Pretrained hybrids.")
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in TRAINING:  # these take every option of TrainingArguments
        from manticore_hf.train import main as train

        return train(argv[0], argv[1:])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_compose, _add_calibrate, _add_run):
        add(commands)
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)
    args = parser.parse_args(argv)
    from manticore_hf.modeling.configuration_manticore import ManticoreError

    try:
        return args.run(args) or 0
    except ManticoreError as err:
        print(f"manticore-hf {args.command}: {err}", file=sys.stderr)
        return 2


def _add_demo(commands):
    command = commands.add_parser(
        "demo",
        help="join two tiny pretrained models, train the joint, publish it to a local Hub, load it back",
        description="Joins the two tiny components shipped with the package (a GPT-NeoX that knows prose, a Mamba that "
        "knows code), trains projectors and mixture, then everything, on text of Python's standard library, prints "
        "the losses beside those of every rival on the same tokens, and publishes the hybrid to a Hub on this machine. "
        "Needs no network; a few minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--output-dir", help="keep the hybrids here (default: a temporary directory, removed)")
    command.add_argument("--tokens", type=int, default=80_000, help="training tokens of every model")
    command.add_argument("--seed", type=int, default=0, help="random seed")
    command.set_defaults(run=_demo)


def _demo(args):
    from manticore_hf.local_hub import LocalHub

    with tempfile.TemporaryDirectory(prefix="manticore-demo-") as scratch, LocalHub() as hub:
        output = args.output_dir or os.path.join(scratch, "hybrids")
        # A process of its own: huggingface_hub reads the address of the Hub when it is imported, which it is by now.
        command = [sys.executable, "-m", "manticore_hf.demo", "--output-dir", output]
        command += ["--tokens", str(args.tokens), "--seed", str(args.seed)]
        return subprocess.run(command, env={**os.environ, **hub.environment(os.path.join(scratch, "home"))}).returncode


def _add_compose(commands):
    command = commands.add_parser(
        "compose",
        help="join pretrained models into a hybrid",
        description="Resolves the components, checks that they fit, and writes a hybrid that loads. Repositories are "
        "pinned to their commit and referenced; the weights of local directories are embedded.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("components", nargs="+", metavar="COMPONENT", help="org/repo, org/repo@revision or directory")
    command.add_argument("--output-dir", required=True, help="where to write the hybrid")
    command.add_argument("--num-blocks", type=int, default=1, help="blocks into which every component is cut")
    command.add_argument("--preset", default="default", choices=("default", "paper"), help="settings of the hybrid")
    command.add_argument("--dtype", default="auto", help="dtype of the weights, for example bfloat16")
    command.add_argument("--seed", type=int, default=0, help="random seed (initial projectors)")
    command.set_defaults(run=_compose)


def _compose(args):
    from manticore_hf.prepare import run_compose

    settings = {"num_blocks": args.num_blocks, "preset": args.preset}
    run_compose(args.components, args.output_dir, args.seed, args.dtype, **settings)


def _add_calibrate(commands):
    command = commands.add_parser(
        "calibrate",
        help="solve for a hybrid's projectors in closed form",
        description="Runs each component alone on plain text and solves ridge regressions between their states.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--model", required=True, help="the hybrid: directory or Hub repo")
    command.add_argument("--data", required=True, help="text, jsonl, csv or parquet file, or a Hub data set")
    command.add_argument("--output-dir", required=True, help="where to write the calibrated hybrid")
    command.add_argument("--tokens", type=int, default=40_000, help="tokens to use")
    command.add_argument("--block-size", type=int, default=512, help="tokens per row")
    command.add_argument("--batch-size", type=int, default=8, help="rows per forward pass")
    command.add_argument("--reference", help="reference component (default: the one with the lowest loss)")
    command.set_defaults(run=_calibrate)


def _calibrate(args):
    from manticore_hf.data import DataArguments
    from manticore_hf.prepare import run_calibrate

    data = DataArguments(data=args.data, block_size=args.block_size, validation_fraction=0.0)
    run_calibrate(args.model, data, args.output_dir, args.tokens, args.batch_size, args.reference)


def _add_run(commands):
    command = commands.add_parser(
        "run",
        help="run all stages of a recipe",
        description="Runs the stages of a YAML recipe, each in a directory of its own; finished stages are skipped, so "
        "the same command goes on after a kill.",
    )
    command.add_argument("recipe", help="the YAML file")
    command.add_argument("--output-dir", required=True, help="directory below which every stage writes its own")
    command.set_defaults(run=_run)


def _run(args):
    from manticore_hf.recipe import run_recipe

    run_recipe(args.recipe, args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
