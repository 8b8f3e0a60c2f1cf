"""Mixtures that are programmed: a recipe's `hybrid: {mixture: "PREFIX:..."}`, whose weights another subpackage finds.

Subpackages above this one register theirs (`manticore_hf/__init__.py` does it for MAD), so that training imports none
of them. The module that is registered has

* `mixture_tasks(mixture)`: the tasks that a mixture names, or None; raises ManticoreError where they are unknown;
* `ProgramSettings`: a dataclass of the settings under `program:` in a recipe, with `seed`, `task(name, seed)` and
  `depth(num_blocks)`, which raise ManticoreError for what cannot be;
* `program_alpha(families, *, tasks, num_blocks, output_dir, settings)`: an object with `alpha` [S, K] and `record()`.
"""

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_MODULES: dict[str, str] = {}


def register(prefix: str, module: str) -> None:
    """Says which module programs the mixtures that begin with `prefix` and a colon; it is imported when one is met."""
    _MODULES[prefix] = module


def program_of(mixture: Any) -> ModuleType | None:
    """The module that programs a mixture ("mad:recall+copying"); None of a mixture that is not programmed."""
    prefix = mixture.partition(":")[0] if isinstance(mixture, str) else None
    return importlib.import_module(_MODULES[prefix]) if prefix in _MODULES else None


def program_lines(names: list[str], alpha: list[list[float]], record: dict) -> Iterator[str]:
    """What is printed of a programmed mixture: the weights that each task gives, and their mean.

    Args:
        names: Of the K components.
        alpha: [S, K] nested lists, the mean.
        record: {task: {"alpha", and where known "accuracy" and "chance"}}, as `record()` gives it.
    """
    yield f"\n{'programmed mixture weights':28}{'block':>6}" + "".join(f"{name:>24}" for name in names)
    for task, one in {**record, "mean": {"alpha": alpha}}.items():
        for block, row in enumerate(one["alpha"], 1):
            score = ""
            if block == 1 and "accuracy" in one:
                score = f"   accuracy {one['accuracy']:.3f} (chance {one['chance']:.3f})"
            yield f"{task if block == 1 else '':28}{block:6}" + "".join(f"{weight:24.3f}" for weight in row) + score
