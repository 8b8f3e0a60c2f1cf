"""Options that `manticore-hf mad` and `manticore-hf lra` share: what is trained from scratch, and how."""

import argparse

from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.options import Parser, Renamed, RenamedSwitch


def add_models(parser: Parser, layers: int) -> None:
    """Adds what is trained from scratch; `layers` is the default of `--layers`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model type of Transformers: llama, mamba, gpt_neox, ...")
    what.add_argument("--hybrid", help="model types of a hybrid's components: llama,mamba")
    parser.add_argument("--output-dir", required=True, help="directory of the results, one JSON file per run")
    parser.add_argument("--layers", type=int, default=layers, help="layers of every model")
    parser.add_argument("--hidden-size", type=int, default=128, help="width of every model")
    parser.add_argument("--num-blocks", type=int, default=1, help="blocks of the hybrid")
    parser.add_argument("--preset", default="default", help="settings of the hybrid: default or paper")
    parser.add_argument("--projector", help="its projectors: linear, mlp or none (default: the preset's)")
    parser.add_argument(
        "--alpha-learning-rate", type=float, help="learning rate of its mixture weights (default: --learning-rate)"
    )
    parser.add_argument(
        "--layers-of",
        nargs="+",
        default=[],
        metavar="FAMILY=LAYERS",
        help="layers of one model type, if not --layers, such as mamba=4 (Mamba's layers have no MLP)",
    )
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train each of the hybrid's components alone",
    )
    for old, new, value in (("--rivals", "--baselines", True), ("--no-rivals", "--no-baselines", False)):
        parser.add_argument(old, action=RenamedSwitch, new=new, const=value)
    parser.add_argument(
        "--designed",
        action="store_true",
        help="also train a hybrid that was designed by hand: Mamba "
        "and attention layers in turn (Jamba without experts)",
    )


def hybrid_of_options(args: argparse.Namespace) -> dict:
    """What a command line says of the hybrid, as `Benchmark.run` takes it."""
    hybrid = {"num_blocks": args.num_blocks, "preset": args.preset}
    for name in ("projector", "alpha_learning_rate"):
        if getattr(args, name) is not None:
            hybrid[name] = getattr(args, name)
    return hybrid


def layers_of_options(args: argparse.Namespace) -> dict[str, int]:
    """{model type: its layers}, of those that have others.

    Raises:
        ManticoreError: No such pair.
    """
    out = {}
    for one in args.layers_of:
        family, _, layers = one.partition("=")
        if not family or not layers.isdecimal() or int(layers) < 1:
            raise ManticoreError(f"--layers-of {one} is no pair of a model type and its layers, such as mamba=4.")
        out[family] = int(layers)
    return out


def add_training(parser: Parser, epochs: int, learning_rate: float, batch_size: int, weight_decay: float = 0.0) -> None:
    """Adds how every model is trained, with a task's own defaults."""
    text = "passes over the training sequences"
    parser.add_argument("--num-train-epochs", dest="epochs", type=int, default=epochs, metavar="N", help=text)
    parser.add_argument("--epochs", action=Renamed, new="--num-train-epochs", type=int)
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="of AdamW, at the start")
    parser.add_argument("--weight-decay", type=float, default=weight_decay, help="of AdamW")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="sequences per step")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sequences, weights and their order")
