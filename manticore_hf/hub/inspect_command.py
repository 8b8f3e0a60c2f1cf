"""`manticore-hf inspect`: its options."""

import argparse
import sys

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
        "--verify",
        action="store_true",
        help="rehash the weight files in the local cache (no downloads); exit status 1 if one is damaged",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Prints what the hybrid is; the exit status is 1 where files were found to be damaged."""
    from manticore_hf.hub.inspection import run_inspect

    damage = run_inspect(args.model, args.revision, args.json, args.verify)
    if not damage:
        return 0
    print(f"manticore-hf inspect: DAMAGED, removed from the cache: {'; '.join(damage)}. Load again.", file=sys.stderr)
    return 1
