"""`manticore-hf push`: its options."""

import argparse

from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Publishes a saved hybrid. Component weights that it references are not uploaded. The card is made "
        "from what is measured in the directory, and keeps what people wrote into it. Licences that conflict stop it."
    )
    parser.add_argument("model", help="directory of the hybrid; with --code-only the repository")
    parser.add_argument("repo_id", nargs="?", help="repository on the Hub, created if missing: you/name")
    parser.add_argument(
        "--code-only",
        action="store_true",
        help="bring the code of a published hybrid up to this version: shows what changes, asks, leaves weights alone",
    )
    parser.add_argument("--yes", action="store_true", help="with --code-only: do not ask")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help="whether a new repository is private")
    parser.add_argument("--revision", help="branch, created from main if missing")
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
    parser.add_argument("--commercial", action="store_true", help="require that no licence excludes commercial use")
    parser.add_argument("--override-licenses", action="store_true", help="publish despite conflicting licences")
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
    if args.code_only:
        if args.repo_id is not None:
            raise ManticoreError(
                f"--code-only takes the repository alone: manticore-hf push {args.repo_id} --code-only"
            )
        from manticore_hf.hub.code_only import push_code

        push_code(args.model, args.revision, args.create_pr, args.dry_run, args.yes, args.commit_message)
        return
    if args.repo_id is None:
        raise ManticoreError(f"Say where to publish {args.model!r}: manticore-hf push DIRECTORY you/name")
    if "/" not in args.repo_id:
        raise ManticoreError(f"{args.repo_id!r} is no repository of the Hub; say whose it is: you/{args.repo_id}")
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
