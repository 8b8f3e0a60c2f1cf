"""The command `manticore-hf`: reads the command line before torch and Transformers are imported.

Importing anything of a package runs the package's `__init__`, and that of `manticore_hf` registers its classes with
Transformers, which takes seconds. So the command starts outside of the package, in this module, and says so by
`reading`; then `manticore_hf/__init__.py` leaves the registration to `manticore_hf.cli`, which makes up for it before
it runs a command. Plain imports know nothing of it and register, always. (Not an environment variable, which processes
that a command starts would inherit; not a hook on Transformers' import, which would register in the middle of it.)
"""

import sys

reading = False


def main() -> int:
    """Entry point of `manticore-hf`; returns the exit status."""
    global reading
    reading = True
    try:
        from manticore_hf import cli
    except KeyboardInterrupt:  # before the context that ends a command is there
        return 130

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
