"""`manticore-hf mad-profile`: its options."""

import argparse

from manticore_hf.utils.options import Parser, Renamed

_FIELDS = {"max-steps": "steps", "num-seeds": "seeds"}  # what EasySettings calls them, and options were called


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Trains each model's family from scratch, at a small size, on easy versions of the MAD tasks, "
        "prints the accuracies, and writes them as profile.json and profile.png. Of a directory or Hub repo (of a "
        "hybrid: of each component) only the configuration is read. About a minute per model and task on one core; a "
        "finished run is not repeated."
    )
    parser.add_argument("models", help="model types of Transformers, directories or Hub repos: llama,mamba")
    parser.add_argument("--output-dir", required=True, help="directory of the profile, and one JSON file per run")
    parser.add_argument("--tasks", help="tasks of `manticore-hf mad`, or short: recall,copying (default: all six)")
    for name, default, text in (
        ("seq-len", 32, "tokens per sequence (compression: half of it; a quarter of them are copied)"),
        ("num-train", 1600, "training sequences (memorization: 256)"),
        ("num-test", 320, "test sequences"),
        ("layers", 2, "layers of every model"),
        ("hidden-size", 64, "width of every model"),
        ("max-steps", 400, "optimizer steps of every run, rounded up to whole passes over the sequences"),
        ("batch-size", 32, "sequences per step"),
        ("num-seeds", 1, "runs of every model and task, averaged"),
        ("seed", 0, "random seed of the first; later runs use the seeds that follow"),
    ):
        dest = _FIELDS.get(name, name.replace("-", "_"))
        parser.add_argument(f"--{name}", dest=dest, type=int, default=default, help=text)
        if name in _FIELDS:
            parser.add_argument(f"--{dest}", action=Renamed, new=f"--{name}", type=int)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW, at the start of a cosine")


def main(args: argparse.Namespace) -> None:
    """Makes the profile."""
    import dataclasses

    from transformers.utils import logging

    from manticore_hf.experiments.mad import profile
    from manticore_hf.experiments.mad.easy import EasySettings

    logging.set_verbosity_error()
    settings = EasySettings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EasySettings)})
    models = [name for name in (one.strip() for one in args.models.split(",")) if name]
    tasks = None if args.tasks is None else [name.strip() for name in args.tasks.split(",")]
    profile.mad_profile(models, args.output_dir, tasks, settings)
