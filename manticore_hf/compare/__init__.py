"""A hybrid against every rival a user has, on the same tokens, with the same grid: `manticore-hf compare`."""

from manticore_hf.compare.run import run_compare
from manticore_hf.compare.settings import CompareArguments

__all__ = ["CompareArguments", "run_compare"]
