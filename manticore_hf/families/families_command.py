"""`manticore-hf families`: its options."""

import argparse

from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.options import Parser
from manticore_hf.utils.renamed import warn_renamed


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Prints the table that came with the package. With --run every model type that has a causal LM is "
        "put through the contract again (cut, padded, cached, trained, saved and loaded, as a tiny random model). An "
        "interrupted run resumes."
    )
    parser.add_argument("--type", nargs="+", metavar="NAME", help="only these model types: llama mamba")
    verdicts = ("passes", "unsupported", "wrong", "unknown")
    parser.add_argument("--verdict", type=_verdict, choices=verdicts, help="print only these")
    parser.add_argument(
        "--run", action="store_true", dest="run_contract", help="run the contract with the installed Transformers"
    )
    parser.add_argument(
        "--output-dir",
        help="--run: directory of the results, one JSON file per type; when all are "
        "there, also families.json and FAMILIES.md",
    )
    parser.add_argument("--time-limit", type=int, default=300, help="--run: seconds for each type")


def _verdict(text):
    if text == "refused":
        warn_renamed("manticore-hf families: --verdict refused", "unsupported")
        return "unsupported"
    return text


def main(args: argparse.Namespace) -> None:
    """Prints the table of families, or makes it anew."""
    from manticore_hf.families.sweep import chosen, sweep
    from manticore_hf.families.table import load_shipped, print_table, versions

    if args.run_contract:
        if args.output_dir is None:
            raise ManticoreError("--run needs --output-dir: the directory of its results, one JSON file per type.")
        print_table(sweep(args.output_dir, args.type, args.time_limit), versions(), args.verdict)
        return
    if args.output_dir is not None:
        raise ManticoreError("--output-dir is where --run writes its results; give --run, too.")
    shipped = load_shipped()
    print_table(chosen(shipped["types"], args.type), shipped["versions"], args.verdict)
