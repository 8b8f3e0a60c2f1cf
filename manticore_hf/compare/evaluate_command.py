"""`manticore-hf evaluate`: its options; losses on a text, or scores on tasks."""

import argparse

from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Prints what a hybrid, each of its components (inside it, and the original with its own tokenizer), their "
        "plain ensemble and their online mixture (weights from their losses on the text so far) lose on a text, in "
        "bits per byte and nats per token (--data), or their scores on tasks of the lm-evaluation-harness (--tasks)."
    )
    parser.add_argument("--model", required=True, help="the hybrid: directory or Hub repo")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="text, jsonl, csv or parquet file, or a Hub data set")
    what.add_argument("--tasks", help="tasks of the lm-evaluation-harness: arc_easy,hellaswag")
    parser.add_argument("--data-split", default="train", help="split of a Hub data set")
    parser.add_argument("--block-size", type=int, default=512, help="tokens per row")
    parser.add_argument("--text-column", default="text", help="column that holds the text")
    parser.add_argument("--encoding", help="encoding of a text file (default: a byte order mark's, or UTF-8)")
    parser.add_argument(
        "--components",
        nargs="+",
        metavar="DIR_OR_REPO",
        help="the original components, in order (default: the addresses that the hybrid knows)",
    )
    parser.add_argument("--max-tokens", type=int, help="use at most this many tokens (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per forward pass")
    parser.add_argument("--include-path", help="--tasks: directory with task definitions of your own")
    parser.add_argument("--num-fewshot", type=int, help="--tasks: examples before each question (default: the task's)")
    parser.add_argument("--limit", type=int, help="--tasks: documents of each task (default: all)")
    parser.add_argument("--output-dir", help="also write evaluation.json (--data) or tasks.json (--tasks) there")
    parser.add_argument("--seed", type=int, default=0, help="random seed of few-shot examples")


def main(args: argparse.Namespace) -> None:
    """Evaluates the hybrid."""
    if args.tasks is not None:
        from manticore_hf.compare.harness import run_tasks

        run_tasks(
            args.model,
            [task for task in args.tasks.split(",") if task],
            args.include_path,
            args.batch_size,
            args.num_fewshot,
            args.limit,
            args.output_dir,
            args.seed,
            args.components,
        )
        return
    from manticore_hf.compare.evaluate import run_evaluate

    data = DataArguments(
        data=args.data,
        data_split=args.data_split,
        text_column=args.text_column,
        encoding=args.encoding,
        block_size=args.block_size,
        max_tokens=args.max_tokens,
        validation_fraction=0.0,
    )
    run_evaluate(args.model, data, args.batch_size, args.output_dir, args.components)
