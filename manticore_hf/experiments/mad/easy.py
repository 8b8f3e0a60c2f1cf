"""Easy versions of the MAD tasks, at which small models show in about a minute on a CPU what they learn quickly.

Far below the benchmark's budget (12,800 sequences of 128 or 256 tokens, 20,000 steps, the best of six settings): these
sizes compare architectures trained alike; they are no scores of the MAD paper.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from manticore_hf.experiments.mad.mad_settings import ALIASES, TASKS, MadTask, mad_task
from manticore_hf.modeling.bounds_manticore import ManticoreError, show


@dataclass(frozen=True)
class EasySettings:
    """Sizes of the tasks and of the models trained on them."""

    seq_len: int = dataclasses.field(
        default=32, metadata={"help": "Tokens per sequence (compression: half of it; a quarter of them are copied)."}
    )
    num_train: int = dataclasses.field(default=1600, metadata={"help": "Training sequences (memorization: 256)."})
    num_test: int = dataclasses.field(default=320, metadata={"help": "Test sequences."})
    layers: int = dataclasses.field(default=2, metadata={"help": "Layers of every model."})
    hidden_size: int = dataclasses.field(default=64, metadata={"help": "Width of every model."})
    steps: int = dataclasses.field(default=400, metadata={"help": "Optimizer steps of every run."})
    batch_size: int = dataclasses.field(default=32, metadata={"help": "Sequences per step."})
    learning_rate: float = dataclasses.field(default=3e-3, metadata={"help": "Of AdamW, at the start of a cosine."})
    seeds: int = dataclasses.field(default=1, metadata={"help": "Runs of every task, averaged."})
    seed: int = dataclasses.field(
        default=0, metadata={"help": "Random seed of the first; later runs use the seeds that follow."}
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "seed" else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ManticoreError(f"{field.name}={value!r} must be a whole number from {least} on.")
        if self.seed + self.seeds > 2**32:
            raise ManticoreError(f"seed={self.seed} and the {self.seeds - 1} after it must be below 2**32.")
        if not 1e-6 < self.learning_rate < float("inf"):
            raise ManticoreError(f"learning_rate={self.learning_rate!r} must be a finite number above 1e-06.")

    def task(self, name: str, seed: int) -> MadTask:
        """The task of that name (or short name) at these sizes."""
        name = ALIASES.get(name, name)
        sizes = {"seq_len": self.seq_len, "num_train": self.num_train, "num_test": self.num_test}
        if name == "selective-copying":
            sizes["tokens_to_copy"] = max(1, self.seq_len // 4)
        elif name == "compression":
            sizes["seq_len"] = max(1, self.seq_len // 2)
        elif name == "memorization":
            sizes["num_train"] = min(self.num_train, TASKS[name][0]["num_train"])
        return mad_task(name, seed=seed, **sizes)

    def runs(self) -> range:
        """The seeds of the runs."""
        return range(self.seed, self.seed + self.seeds)


def task_names(names: Iterable[str]) -> list[str]:
    """Full names of MAD tasks, from full or short ones.

    Raises:
        ManticoreError: None is given, one is unknown, or one is given twice.
    """
    known = {**{name: name for name in TASKS}, **ALIASES}
    short = [*(name for name in ALIASES if name != "fuzzy"), "compression", "memorization"]
    for name in names:
        if name not in known:
            raise ManticoreError(f"there is no MAD task {show(name)}; known are {short}, and their full names.")
    full = [known[name] for name in names]
    if not full:
        raise ManticoreError(f"no MAD task is named; known are {short}.")
    if len(set(full)) < len(full):
        raise ManticoreError(f"a MAD task is named twice in {show(list(names))}; name each once.")
    return full
