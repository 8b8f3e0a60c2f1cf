"""`manticore-hf inspect`: its options."""

import argparse

from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Prints a hybrid's settings and components; per block and component layers, alpha, parameters, "
        "FLOPs per token, bytes of cache per token and of constant state; the totals beside each component alone."
    )
    parser.add_argument("model", help="directory or Hub repo")
    parser.add_argument("--revision", help="revision of a Hub repo")
    parser.add_argument(
        "--verify", action="store_true", help="hash the components' weight files in the local cache anew (no downloads)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    """Prints what the hybrid is."""
    from manticore_hf.hub.inspection import run_inspect

    run_inspect(args.model, args.revision, args.json, args.verify)
