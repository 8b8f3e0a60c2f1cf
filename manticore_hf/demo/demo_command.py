"""`manticore-hf demo`: its options, and the Hub on this machine that it runs against."""

import argparse
import os
import subprocess
import sys
import tempfile

from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Joins the two tiny components shipped with the package (a GPT-NeoX that knows prose, a Mamba that "
        "knows code), trains projectors and mixture, then everything, on text of Python's standard library, prints "
        "the losses beside those of every baseline on the same tokens, and publishes the hybrid to a Hub on this "
        "machine. Needs no network; a few minutes on two cores."
    )
    parser.add_argument("--output-dir", help="keep the hybrids here (default: a temporary directory, removed)")
    parser.add_argument("--tokens", type=int, default=80_000, help="training tokens of every model")
    parser.add_argument("--seed", type=int, default=0, help="random seed")


def main(args: argparse.Namespace) -> int:
    """Runs the demo against a Hub of its own; returns its exit status."""
    from manticore_hf.testing.local_hub import LocalHub

    with tempfile.TemporaryDirectory(prefix="manticore-demo-") as scratch, LocalHub() as hub:
        output = args.output_dir or os.path.join(scratch, "hybrids")
        # A process of its own: huggingface_hub reads the address of the Hub when it is imported, which it is by now.
        command = [sys.executable, "-m", "manticore_hf.demo.demo", "--output-dir", output]
        command += ["--tokens", str(args.tokens), "--seed", str(args.seed)]
        return subprocess.run(command, env={**os.environ, **hub.environment(os.path.join(scratch, "home"))}).returncode
