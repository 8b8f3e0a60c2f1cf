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
    for add in (_add_demo, _add_compose):
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
        "knows code), trains projectors and mixture on text of Python's standard library, prints the losses, and "
        "publishes the hybrid to a Hub on this machine. Needs no network; a few minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--output-dir", help="keep the hybrids here (default: a temporary directory, removed)")
    command.add_argument("--tokens", type=int, default=150_000, help="training tokens per hybrid")
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
    from transformers import AutoTokenizer, set_seed

    from manticore_hf import ManticoreForCausalLM

    set_seed(args.seed)
    model = ManticoreForCausalLM.from_components(
        args.components, num_blocks=args.num_blocks, preset=args.preset, dtype=args.dtype
    )
    index = model.config.component_names.index(model.config.tokenizer_component)
    source, _, _ = args.components[index].partition("@")
    revision = model.config.components[index]["revision"] or "main"
    model.save_pretrained(args.output_dir)
    try:
        AutoTokenizer.from_pretrained(source, revision=revision).save_pretrained(args.output_dir)
    except (OSError, ValueError) as err:
        print(f"No tokenizer was saved: {source} has none that can be read ({err}).", file=sys.stderr)
    size = sum(entry.stat().st_size for entry in os.scandir(args.output_dir) if entry.name.endswith(".safetensors"))
    print(f"{args.output_dir}: {', '.join(model.config.component_names)} in {args.num_blocks} block(s)")
    print(f"{model.num_parameters():,} parameters, of which {size:,} bytes are the hybrid's own on disk")


if __name__ == "__main__":
    sys.exit(main())
