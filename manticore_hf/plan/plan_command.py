"""`manticore-hf plan`: its options."""

import argparse
from pathlib import Path

from manticore_hf.utils.options import Parser, Renamed


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Estimates memory, FLOPs and hours of every stage of a recipe (or of fine-tuning a saved hybrid) "
        "from configurations alone, and says with which engine it fits: one device, DDP, FSDP2, with activation "
        "checkpointing, with CPU offload, LoRA or QLoRA. A training step is run on tensors without storage."
    )
    parser.add_argument("recipe", help="the YAML file, or a saved hybrid: directory or Hub repo")
    parser.add_argument("--devices", type=int, default=1, help="number of devices")
    parser.add_argument(
        "--memory",
        help="memory of each device: 80GB (10^9), 24GiB (2^30) or bytes (default: 80GB; of a CPU this machine's)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="kind of device")
    parser.add_argument(
        "--flops",
        type=float,
        help="peak FLOP/s of a device in the compute dtype (default: an H100's in bf16, 989e12; on a CPU what float32 "
        "matrix products reach here)",
    )
    parser.add_argument("--utilization", type=float, default=0.35, help="share of them that training reaches")
    parser.add_argument(
        "--reserve", type=float, default=0.08, help="share of memory reserved for context, communication and fragments"
    )
    parser.add_argument(
        "--tokens",
        help="tokens of the training text: 500M, 5e8 (default: counted where the text is "
        "here, else the recipe's max_tokens)",
    )
    parser.add_argument("--block-size", type=int, help="tokens per row (default: the recipe's)")
    parser.add_argument("--sequence-length", type=int, action=Renamed, new="--block-size")
    parser.add_argument("--batch-size", type=int, help="rows per device and micro-batch (default: the stages')")
    parser.add_argument(
        "--configs",
        help="directory with org/name/config.json of components, read instead of the Hub (for gated or offline models)",
    )
    parser.add_argument("--allow-outside", action="store_true", help="let the recipe name files outside its own folder")
    parser.add_argument("--output-dir", help="also write plan.json, with every number, there")


def main(args: argparse.Namespace) -> None:
    """Makes the plan, prints it, and writes it where it is wanted."""
    from manticore_hf.plan.plan import RESULT, make_plan, quietly
    from manticore_hf.plan.tables import print_plan
    from manticore_hf.utils.files import write_json

    keys = ("device", "flops", "utilization", "reserve", "tokens", "batch_size", "configs", "allow_outside")
    options = {"block_size": args.block_size, **{key: getattr(args, key) for key in keys}}
    with quietly():
        plan = make_plan(args.recipe, args.devices, args.memory, **options)
    print_plan(plan)
    if args.output_dir is not None:
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RESULT, plan)
        print(f"\n{output / RESULT} has every number.")
