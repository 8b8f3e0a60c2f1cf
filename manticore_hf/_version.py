"""The version, in one place: pyproject.toml and the package take it from here; CITATION.cff names none.

The build reads the line below without running it, so it must stay a plain assignment, and this file imports nothing.
"""

__version__ = "0.2.0.dev0"
