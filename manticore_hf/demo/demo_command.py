"""`manticore-hf demo`: its options, and the Hub on this machine that it publishes to."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from manticore_hf.utils.options import Parser

TOKENS = 32_000
_INSIDE = """
from manticore_hf.utils.interrupted import ends_if_interrupted
from manticore_hf.utils.quiet import quiet_optional_packages
with ends_if_interrupted(), quiet_optional_packages():
    from manticore_hf.demo.demo import main
    main()
"""


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Joins the two tiny components shipped with the package (a GPT-NeoX that knows prose, a Mamba that "
        "knows code), trains projectors and mixture, then everything, on text of Python's standard library, prints "
        "the losses next to those of every baseline trained on the same tokens, publishes the hybrid to a Hub on this "
        "machine, writes a report, and suggests what to do next. Needs no network; takes about two and a half minutes "
        "on two cores."
    )
    parser.add_argument("--output-dir", default="manticore-demo", help="keep everything here (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="training tokens of every model")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--verbose", action="store_true", help="print what the training stages log at every step")


def main(args: argparse.Namespace) -> int:
    """Runs the demo with a Hub of its own; returns its exit status."""
    from manticore_hf.testing.local_hub import LocalHub
    from manticore_hf.training.recipe import remember_recipe

    output = Path(args.output_dir)
    with tempfile.TemporaryDirectory(prefix="manticore-demo-") as scratch, LocalHub() as hub:
        # A process of its own: huggingface_hub reads the address of the Hub when it is imported, which it is by now.
        command = [sys.executable, "-c", _INSIDE, "--output-dir", args.output_dir]
        command += ["--tokens", str(args.tokens), "--seed", str(args.seed), *["--verbose"] * args.verbose]
        environment = {**os.environ, **hub.environment(os.path.join(scratch, "home"))}
        status = subprocess.run(command, env=environment).returncode
    for kept in output.glob("*/recipe.yaml"):  # this user has run them, if in a process with another HF_HOME
        remember_recipe(kept.read_text(encoding="utf-8"), output)
    return status
