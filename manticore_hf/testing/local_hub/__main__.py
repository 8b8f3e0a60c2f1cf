"""``python -m manticore_hf.testing.local_hub``: a Hub to point a shell at."""

from __future__ import annotations

import argparse
import shlex
import tempfile
import threading

from .hub import LocalHub


def main(argv: list[str] | None = None) -> None:
    """Serves until Ctrl-C, after printing the environment to export."""
    parser = argparse.ArgumentParser(prog="python -m manticore_hf.testing.local_hub", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--home", help="folder for the client's caches (default: a new temporary one)")
    args = parser.parse_args(argv)
    with LocalHub(args.port) as hub:
        for name, value in hub.environment(args.home or tempfile.mkdtemp(prefix="local-hub-")).items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
