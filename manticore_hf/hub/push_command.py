"""`manticore-hf push`: its options."""

import argparse

from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Publishes a saved hybrid. Component weights that it references are not uploaded. The card is made "
        "from what is measured in the directory, and keeps what people wrote into it. Licences that conflict stop it."
    )
    parser.add_argument("model", help="directory of the hybrid")
    parser.add_argument("repo_id", help="repository on the Hub, made if it is not there: you/name")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help="whether a new repository is private")
    parser.add_argument("--revision", help="branch, made from main if it is not there")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, write nothing to the Hub")
    parser.add_argument("--commit-message", help="default: Publish hybrid")
    parser.add_argument(
        "--tokenizer",
        help="directory or repository of the tokenizer (default: the directory's, else "
        "that of the tokenizer component)",
    )
    parser.add_argument("--recipe", help="recipe that made it (default: recipe.yaml in the directory)")
    parser.add_argument("--license", help="the hybrid's licence (default: the one that satisfies all components')")
    parser.add_argument("--commercial", action="store_true", help="commercial use is wanted: no licence may exclude it")
    parser.add_argument("--override-licenses", action="store_true", help="publish although licences conflict")
    parser.add_argument(
        "--card",
        choices=("merge", "local", "hub"),
        default="merge",
        help="which card the new one updates (default: the one with all edits)",
    )
    parser.add_argument("--dataset", action="append", default=[], help="data set it was trained on (repeatable)")
    parser.add_argument("--tag", action="append", default=[], help="tag for the card (repeatable)")


def main(args: argparse.Namespace) -> None:
    """Publishes the hybrid and says where."""
    from manticore_hf.hub.publish import print_published, publish

    tokenizer = None
    if args.tokenizer is not None:
        from manticore_hf.utils.tokenizers import read_tokenizer

        tokenizer = read_tokenizer(args.tokenizer)
    same = (
        "recipe",
        "private",
        "revision",
        "create_pr",
        "dry_run",
        "commit_message",
        "license",
        "commercial",
        "override_licenses",
        "card",
    )
    options = {key: getattr(args, key) for key in same}
    out = publish(args.model, args.repo_id, tokenizer=tokenizer, datasets=args.dataset, tags=args.tag, **options)
    print_published(out)
