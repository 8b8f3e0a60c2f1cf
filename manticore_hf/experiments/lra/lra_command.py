"""`manticore-hf lra`: its options."""

import argparse

from manticore_hf.experiments.scratch_options import add_models, add_training, hybrid_of_options, layers_of_options
from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Trains a small classifier from scratch on ListOps or Pathfinder, which are generated, or on texts "
        "(bytes) or images (grey pixels) of yours or of the Hub, and prints its accuracy; for a hybrid beside each "
        "component trained alone on the same sequences, and their ensemble. A finished run is not repeated. Defaults "
        "are long sequences and many: on a CPU give fewer and shorter ones."
    )
    parser.add_argument("task", help="listops, pathfinder, text or image")
    add_models(parser, layers=4)
    for name, kind, text in (
        ("num-train", int, "training sequences (text, image: at most)"),
        ("num-test", int, "test sequences (text, image: at most)"),
        ("min-len", int, "fewest tokens of a sequence (listops)"),
        ("max-len", int, "most tokens of a sequence (listops, text)"),
        ("max-depth", int, "levels of nesting, the numbers' included (listops)"),
        ("max-args", int, "most arguments of an operator (listops)"),
        ("image-size", int, "height and width in pixels (pathfinder, image)"),
        ("path-len", int, "pixels of the two long paths (pathfinder)"),
        ("distractors", int, "short paths (pathfinder)"),
        (
            "data",
            str,
            "training data: file (csv, json, parquet), or data set with the splits train and test: a folder "
            "or a repository of the Hub (text, image)",
        ),
        ("test-data", str, "file of the test data, if --data is one (text, image)"),
        ("input-column", str, "column of the text or image"),
        ("label-column", str, "column of the label (text, image)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: the task's)")
    add_training(parser, epochs=10, learning_rate=1e-3, batch_size=32, weight_decay=0.01)


def main(args: argparse.Namespace) -> None:
    """Trains and scores the models."""
    from transformers.utils import logging

    from manticore_hf.experiments.baselines import families_of, training_of
    from manticore_hf.experiments.lra.lra_settings import TASKS, lra_task
    from manticore_hf.experiments.lra.train_lra import run_lra

    logging.set_verbosity_error()
    names = {name for settings in TASKS.values() for name in settings}
    task = lra_task(args.task, seed=args.seed, **{name: getattr(args, name) for name in names if hasattr(args, name)})
    training, families = training_of(args), families_of(args)
    more = {"designed": args.designed, "layers_of": layers_of_options(args)}
    run_lra(task, families, args.output_dir, training, args.baselines, hybrid_of_options(args), **more)
