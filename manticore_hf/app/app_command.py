"""`manticore-hf app`: its options."""

import argparse
import importlib.util

from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Opens a page to try a hybrid in a browser: a text coloured by which component had the most weight at each "
        "token, what the hybrid and each component expected, how each continues the text, and what that costs. It is "
        "served to this machine only, unless --host says otherwise. With --space or --output-dir it writes the same "
        "page as a Space."
    )
    parser.add_argument("model", help="directory or repository of the hybrid (a repository, for a Space)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--tokenizer", help="directory or repository of the tokenizer (default: the hybrid's own)")
    parser.add_argument("--device", help="where it runs (default: cuda where there is a GPU, else cpu)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others on the network in"
    )
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--space", metavar="YOU/NAME", help="publish the page as this Space, creating or updating it")
    parser.add_argument("--output-dir", help="write the Space's files here; without --space nothing else is done")
    parser.add_argument("--private", action="store_true", help="make a new Space private")


def main(args: argparse.Namespace) -> None:
    """Serves the page, or writes the Space."""
    if args.space is not None or args.output_dir is not None:
        from manticore_hf.app.space import publish_space

        publish_space(args.model, args.revision, args.space, args.output_dir, args.private)
        return
    if importlib.util.find_spec("gradio") is None:
        raise ManticoreError("The page needs Gradio, which is not installed: pip install 'manticore-hf[app]'.")
    from manticore_hf.app.local import serve

    serve(args.model, args.revision, args.tokenizer, args.device, args.host, args.port)
