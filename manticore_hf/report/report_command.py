"""`manticore-hf report`: its options."""

import argparse

from manticore_hf.utils.options import Parser, Renamed


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Writes report.html (self-contained) and report.md: a verdict by stated rules, what the hybrid "
        "costs beside its components, licences, and for engineers what each part is worth on held-out text. The "
        "verdict needs the comparison.json of `manticore-hf compare`. What is measured is kept in report.json."
    )
    parser.add_argument("directory", help="directory of a saved hybrid, or the output directory of manticore-hf run")
    parser.add_argument("--data", help="file of held-out text (default: the validation split of the recipe's data)")
    parser.add_argument(
        "--comparison",
        help="directory of a manticore-hf compare run (default: comparison.json in the directory or above it)",
    )
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="let the directory's recipe name text outside of it; not needed if you ran it that way on this machine",
    )
    parser.add_argument(
        "--components",
        nargs="+",
        help="where the components are, to measure each as it came (default: where the hybrid got them)",
    )
    parser.add_argument("--output-dir", help="write the report to this directory (default: the given one)")
    parser.add_argument("--output", action=Renamed, new="--output-dir")
    parser.add_argument("--max-tokens", type=int, default=20_000, help="measure on at most this many tokens")
    parser.add_argument(
        "--block-size",
        type=int,
        help="tokens per row of --data (default: the recipe's, else 512, fewer where that makes too few rows)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="rows per forward pass")
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the hybrid and measure it; --no-measure reports what is on disk, report.json included",
    )


def main(args: argparse.Namespace) -> None:
    """Writes the report and prints its verdict."""
    from manticore_hf.report.write import write_report

    verdict, html, markdown = write_report(
        args.directory,
        args.data,
        args.comparison,
        args.output_dir,
        args.max_tokens,
        args.block_size,
        args.batch_size,
        args.measure,
        args.allow_outside,
        args.components,
    )
    print(f"\n{verdict.word}: {verdict.headline}.")
    for sentence in (*verdict.reasons, *(f"Next: {step}" for step in verdict.steps)):
        print(f"  {sentence}")
    print(f"Written: {html} and {markdown}")
