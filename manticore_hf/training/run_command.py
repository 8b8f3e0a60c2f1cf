"""`manticore-hf run`: its options."""

import argparse
import shlex

from manticore_hf.training.stage_arguments import OutsideArguments
from manticore_hf.utils.options import Parser, add_fields, from_namespace


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Runs the stages of a YAML recipe, each in a directory of its own; finished stages are skipped, so "
        "the same command resumes after an interruption."
    )
    parser.add_argument("recipe", help="the YAML file")
    parser.add_argument("--output-dir", required=True, help="directory; every stage writes a subdirectory of it")
    parser.add_argument("--seed", type=int, help="random seed instead of the recipe's")
    parser.add_argument("--allow-outside", action="store_true", help="let the recipe name files outside its own folder")
    parser.add_argument(
        "--verbose", action="store_true", help="print what the Trainer logs at every step, instead of one bar per stage"
    )
    group = parser.add_argument_group("options that act outside that directory (not allowed in a recipe)")
    add_fields(group, OutsideArguments, switches=True)


def main(args: argparse.Namespace) -> None:
    """Runs the recipe."""
    from manticore_hf.training.recipe import run_recipe
    from manticore_hf.utils.distributed import print_main

    outside = from_namespace(OutsideArguments, args)
    run_recipe(args.recipe, args.output_dir, args.seed, outside, args.allow_outside, args.verbose)
    print_main(f"\nread what it is worth: {shlex.join(['manticore-hf', 'report', args.output_dir])}")
