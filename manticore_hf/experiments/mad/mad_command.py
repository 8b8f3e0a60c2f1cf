"""`manticore-hf mad`: its options."""

import argparse

from manticore_hf.experiments.scratch_options import add_models, add_training, hybrid_of_options, layers_of_options
from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Trains a small model from scratch on one of the MAD tasks (in-context recall, fuzzy and noisy "
        "recall, selective copying, compression, memorization) and prints its accuracy, micro and macro; for a hybrid "
        "beside each component trained alone on the same sequences, and their ensemble. A finished run is not "
        "repeated. Defaults are the benchmark's; on a CPU give fewer epochs."
    )
    parser.add_argument(
        "task",
        help="in-context-recall, fuzzy-in-context-recall, noisy-in-context-recall, "
        "selective-copying, compression or memorization",
    )
    add_models(parser, layers=2)
    for name, kind, text in (
        ("vocab-size", int, "token ids, special and noise tokens included"),
        ("seq-len", int, "tokens per sequence"),
        ("num-train", int, "training sequences"),
        ("num-test", int, "test sequences"),
        ("frac-noise", float, "share of pairs (compression: tokens) that are noise"),
        ("noise-vocab-size", int, "token ids that only noise uses"),
        ("tokens-to-copy", int, "tokens to copy (selective copying)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: the task's)")
    add_training(parser, epochs=200, learning_rate=5e-4, batch_size=128)


def main(args: argparse.Namespace) -> None:
    """Trains and scores the models."""
    from transformers.utils import logging

    from manticore_hf.experiments.baselines import families_of, training_of
    from manticore_hf.experiments.mad.mad_settings import mad_task
    from manticore_hf.experiments.mad.train_mad import run_mad

    logging.set_verbosity_error()
    names = ("vocab_size", "seq_len", "num_train", "num_test", "frac_noise", "noise_vocab_size", "tokens_to_copy")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    task = mad_task(args.task, seed=args.seed, **given)
    training, families = training_of(args), families_of(args)
    more = {"designed": args.designed, "layers_of": layers_of_options(args)}
    run_mad(task, families, args.output_dir, training, args.baselines, hybrid_of_options(args), **more)
