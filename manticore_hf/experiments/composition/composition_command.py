"""`manticore-hf composition`: its options."""

import argparse

from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Trains a small Llama to add digits and a small Mamba on a private table of keys, joins them in every way "
        "(gate, merged blocks, bridges, and each component alone), trains each to add the values of two keys with half "
        "of the keys, and prints how often the sum is right for the other half. With --task glossary the Llama learns "
        "a dictionary and the Mamba what names mean, and asked is what a name means in another language. A finished "
        "run is not repeated."
    )
    parser.add_argument(
        "--task", choices=["sums", "glossary"], default="sums", help="a table and sums, or a glossary and a dictionary"
    )
    parser.add_argument("--output-dir", required=True, help="directory of the results, one JSON file per run")
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="conditions to run, by name (default: all)")
    for name, default, text in (
        ("num-keys", 600, "keys of the table, or names; half of them are trained on"),
        ("num-table", 12_800, "rows of the table or glossary that one component is trained on"),
        ("num-sums", 14_400, "rows of sums or dictionary that the other is trained on"),
        ("num-train", 9_600, "rows of the task that every condition is trained on"),
        ("num-test", 125, "rows of the test, and of trained keys"),
        ("layers", 3, "layers of each component"),
        ("hidden-size", 64, "width of each component"),
        ("batch-size", 16, "rows per step"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--smoothing", type=float, default=0.1, help="label smoothing while learning the table")
    parser.add_argument("--noise", type=float, default=2.0, help="NEFTune alpha while learning the sums")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="random seeds: of texts, weights, order")


def main(args: argparse.Namespace) -> None:
    """Trains and scores the models."""
    from transformers.utils import logging

    from manticore_hf.experiments.composition.glossary import GlossaryTask
    from manticore_hf.experiments.composition.texts import CompositionTask
    from manticore_hf.experiments.composition.train import CompositionTraining, run_composition

    logging.set_verbosity_error()
    sizes = {name: getattr(args, name) for name in ("layers", "hidden_size", "batch_size", "smoothing", "noise")}
    texts = {name: getattr(args, name) for name in ("num_keys", "num_table", "num_sums", "num_train", "num_test")}
    kind = GlossaryTask if args.task == "glossary" else CompositionTask
    for seed in args.seeds:
        task, training = kind(**texts, seed=seed), CompositionTraining(**sizes, seed=seed)
        run_composition(task, args.output_dir, training, args.only)
