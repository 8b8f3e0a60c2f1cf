"""`manticore-hf compare`: its options, which are the fields of CompareArguments."""

import argparse

from manticore_hf.compare.arguments import CompareArguments, parse_loss_weights
from manticore_hf.utils.options import Parser, RenamedSwitch, add_fields, from_namespace


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Trains the hybrid of a recipe and every baseline a user has (each component tuned alone, also for as "
        "many FLOPs as the hybrid; their ensemble, plain, weighted, and with a per-token gate; their online mixture) "
        "on the same tokens with the same grid of settings, chosen on a validation split, and tests them on the same "
        "documents: losses with intervals, paired tests, FLOPs and time. Finished runs are not repeated."
    )
    parser.add_argument("recipe", help="the YAML file; all models are tuned with its finetune stage's settings")
    parser.add_argument("--output-dir", required=True, help="directory of the runs and the comparison")
    add_fields(parser, CompareArguments, switches=True)
    parser.add_argument("--harden", action=RenamedSwitch, new="--prune")


def main(args: argparse.Namespace) -> None:
    """Runs the comparison."""
    from transformers.utils import logging

    from manticore_hf.compare.compare import run_compare

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.loss_weights is not None:
        args.loss_weights = [parse_loss_weights(text) for text in args.loss_weights]
    run_compare(args.recipe, from_namespace(CompareArguments, args), args.output_dir)
