"""`manticore-hf composition`: its options."""

import argparse

from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Trains a small Llama to add digits and a small Mamba on a private table of keys, joins them in every way "
        "(gate, merged blocks, bridges, and each component alone), trains each to add the values of two keys with half "
        "of the keys, and prints how often the sum is right for the other half. With --task glossary the Llama learns "
        "a dictionary and the Mamba what names mean, and the hybrid is asked what a name means in another language. "
        "With --task recall the Mamba learns to recall pairs and the Llama to copy values from among blanks, and the "
        "hybrid is asked for the values of keys among blanks. A finished run is not repeated."
    )
    parser.add_argument(
        "--task",
        choices=["sums", "glossary", "recall"],
        default="sums",
        help="a table and sums, a glossary and a dictionary, or MAD's fuzzy recall and selective copying",
    )
    parser.add_argument("--output-dir", required=True, help="directory of the results, one JSON file per run")
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="conditions to run, by name (default: all)")
    for name, text in (
        ("num-keys", "keys of the table, or names (default: 600; recall: 144); half of them are trained on"),
        ("num-table", "rows of table, glossary or recall that one component is trained on (12,800; recall: 64,000)"),
        ("num-sums", "rows of sums, dictionary or copying that the other is trained on (14,400; recall: 48,000)"),
        ("num-train", "rows of the task that every condition is trained on (9,600)"),
        ("num-test", "rows of the test, and of trained keys (125)"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text)
    for name, default, text in (
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

    from manticore_hf.experiments.composition.train_composition import TASKS, CompositionTraining, run_composition

    logging.set_verbosity_error()
    sizes = {name: getattr(args, name) for name in ("layers", "hidden_size", "batch_size", "smoothing", "noise")}
    texts = {name: getattr(args, name) for name in ("num_keys", "num_table", "num_sums", "num_train", "num_test")}
    texts = {name: value for name, value in texts.items() if value is not None}
    for seed in args.seeds:
        task, training = TASKS[args.task](**texts, seed=seed), CompositionTraining(**sizes, seed=seed)
        run_composition(task, args.output_dir, training, args.only)
