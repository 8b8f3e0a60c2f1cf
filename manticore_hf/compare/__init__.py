"""A hybrid against every rival a user has, on the same tokens, with the same grid: `manticore-hf compare`."""

from manticore_hf.compare.arguments import CompareArguments
from manticore_hf.compare.compare import run_compare

__all__ = ["CompareArguments", "run_compare"]
