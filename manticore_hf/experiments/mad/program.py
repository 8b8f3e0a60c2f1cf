"""Programming a hybrid with MAD: mixture weights found on small hybrids from scratch, for a pretrained one.

    hybrid: {mixture: "mad:recall+copying"}                     # in a recipe; `program:` there holds ProgramSettings
    program_alpha(["gpt_neox", "mamba"], ["recall", "copying"], num_blocks=1, output_dir="program").alpha

Source: Roberts et al., *Pretrained Hybrids with MAD Skills* (arXiv 2406.00894), which calls this programming: MAD tasks
are cheap stand-ins for what a hybrid is to be good at, so alpha is searched on them, on small hybrids of the same
families, and the pretrained hybrid is fine-tuned at that alpha without a search of its own.

For every task a hybrid in the paper's wiring is trained from scratch while SearchTrainer moves its alpha; the result is
the mean over seeds, then over tasks. At the default sizes a run of two families takes about a minute on one core.
Each run writes one JSON file when it is finished, named by a digest of its settings, and is not run again.

What it says is bounded by what it is: an alpha of two layers trained for a few hundred steps. Each run's accuracy is
kept beside its alpha; where that is chance, the alpha says nothing about the task.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, default_data_collator

from manticore_hf.experiments.baselines import answers
from manticore_hf.experiments.mad.easy import EasySettings, task_names
from manticore_hf.experiments.mad.train_mad import for_task, forward_arguments, pick
from manticore_hf.experiments.scratch_models import hybrid_from_scratch, scratch_config
from manticore_hf.modeling.bounds_manticore import ManticoreError, show
from manticore_hf.training.search import STRATEGIES, SearchArguments, SearchTrainer
from manticore_hf.utils.distributed import world
from manticore_hf.utils.files import read_json, write_json
from manticore_hf.utils.settings import PRESETS
from manticore_hf.utils.unwrap import hybrid_of

PREFIX = "mad:"
# What launchers tell the processes that they start
_LAUNCHED = (
    "ACCELERATE_", "FSDP_", "GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE",
)  # fmt: skip


@dataclass(frozen=True)
class ProgramSettings(EasySettings):
    """Sizes of the tasks and of the small hybrids, and how alpha is searched on them."""

    layers: int | None = dataclasses.field(
        default=None, metadata={"help": "Layers of each component. Default: 2, or one per block where that is more."}
    )
    preset: str = dataclasses.field(
        default="paper", metadata={"help": "Wiring of the small hybrids: paper or default; their alpha is static."}
    )
    strategy: str = dataclasses.field(default="darts", metadata={"help": "How alpha moves; see SearchArguments."})
    alpha_learning_rate: float = dataclasses.field(
        default=0.02, metadata={"help": "Learning rate of alpha (paper: 0.005 to 0.05)."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.layers is not None and (type(self.layers) is not int or self.layers < 1):
            raise ManticoreError(f"layers={self.layers!r} must be a whole number from 1 on.")
        for key, known in (("preset", PRESETS), ("strategy", STRATEGIES)):
            if getattr(self, key) not in known:
                raise ManticoreError(f"{key}={show(getattr(self, key))} is unknown; choose one of {sorted(known)}.")
        if not 0 < self.alpha_learning_rate < float("inf"):
            raise ManticoreError(f"alpha_learning_rate={self.alpha_learning_rate!r} must be positive and finite.")

    def depth(self, num_blocks: int) -> int:
        """Layers of each component in a hybrid of so many blocks.

        Raises:
            ManticoreError: Fewer layers than blocks were asked for.
        """
        if self.layers is not None and self.layers < num_blocks:
            raise ManticoreError(
                f"layers={self.layers} of the small hybrids are fewer than the {num_blocks} blocks to program; give at "
                f"least {num_blocks}, or none."
            )
        return self.layers or max(2, num_blocks)


@dataclass
class ProgrammedAlpha:
    """Mixture weights for a hybrid, and where they come from.

    Attributes:
        alpha: [S, K] float32, the mean over the tasks: computed in float64 and rounded once.
        tasks: {full task name: [S, K] float64, the mean over its seeds}.
        runs: One result per task and seed, in that order: alpha, accuracy of the small hybrid, chance, settings.
    """

    alpha: torch.Tensor
    tasks: dict
    runs: list

    def record(self) -> dict[str, dict[str, Any]]:
        """The same as plain values, for a JSON file: {task: {alpha, accuracy (mean over seeds), chance, runs}}."""
        out = {}
        for name, alpha in self.tasks.items():
            runs = [run for run in self.runs if run["task"]["name"] == name]
            mean = sum(run["accuracy"] for run in runs) / len(runs)
            out[name] = {"alpha": alpha.tolist(), "accuracy": mean, "chance": runs[0]["chance"], "runs": len(runs)}
        return out


def mixture_tasks(mixture: Any) -> list[str] | None:
    """The tasks of a mixture "mad:TASK+TASK", by their full names; None of a mixture that is no such text.

    Raises:
        ManticoreError: It names no task, an unknown one, or one twice.
    """
    if not isinstance(mixture, str) or not (mixture.startswith(PREFIX) or mixture == PREFIX[:-1]):
        return None
    return task_names([name.strip() for name in mixture[len(PREFIX) :].split("+") if name.strip()])


def program_alpha(
    families: Sequence[str],
    tasks: Iterable[str],
    num_blocks: int,
    output_dir: str | Path,
    settings: ProgramSettings | None = None,
    quiet: bool = False,
) -> ProgrammedAlpha:
    """Searches alpha on small hybrids from scratch, on each task, and averages what is found.

    Args:
        families: Model types of the components, in their order (llama, mamba, ...).
        tasks: MAD tasks by full or short names.
        num_blocks: Blocks S of the hybrid that is to be programmed; the small ones have as many.
        output_dir: Where each run's JSON goes; runs that are finished there are read instead.
        settings: ProgramSettings.
        quiet: No progress bars, and nothing is printed.

    Returns:
        ProgrammedAlpha; `model.set_mixture_weights(found.alpha)` programs a hybrid with it.

    Raises:
        ManticoreError: A task is unknown, a family cannot be built at that size, or settings do not fit.
    """
    settings, tasks = settings or ProgramSettings(), task_names(tasks)
    layers, families = settings.depth(num_blocks), list(families)
    jobs = [(settings.task(name, seed), seed) for name in tasks for seed in settings.runs()]
    for family in families:  # what cannot be built is said before anything is trained
        for task, _ in jobs:
            try:
                scratch_config(family, task.vocab_size, layers, settings.hidden_size, task.seq_len + 1)
            except ManticoreError as err:
                raise ManticoreError(f"Programming needs a small model of every component's family: {err}") from err
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if world()[1] > 1:  # the small searches are no part of a distributed run: what they write is read here
        _search_apart(families, tasks, num_blocks, output, settings, quiet)
    runs = [_run(families, task, num_blocks, settings, seed, output, quiet) for task, seed in jobs]
    found = {name: [run["alpha"] for run in runs if run["task"]["name"] == name] for name in tasks}
    found = {name: torch.tensor(rows, dtype=torch.float64).mean(0) for name, rows in found.items()}
    return ProgrammedAlpha(torch.stack(list(found.values())).mean(0).float(), found, runs)


_APART = """
from manticore_hf.utils.interrupted import ends_if_interrupted
with ends_if_interrupted():
    import json, sys
    from manticore_hf.experiments.mad import program
    program.search(*json.load(sys.stdin))
"""


def _search_apart(families, tasks, num_blocks, output, settings, quiet):
    """`program_alpha` in a process of its own, on one device, that knows nothing of the others of a distributed run."""
    alone = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHED)}
    if torch.cuda.is_available():  # several visible ones would share its batches
        index = torch.cuda.current_device()
        visible = [one for one in alone.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        alone["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    request = [families, tasks, num_blocks, str(output), dataclasses.asdict(settings), quiet]
    done = subprocess.run([sys.executable, "-c", _APART], input=json.dumps(request), text=True, env=alone)
    if done.returncode:
        raise ManticoreError(
            f"Programming {'+'.join(tasks)} failed in its own process (exit status {done.returncode}), which printed "
            f"why; the runs that were finished are in {output}, and starting again goes on after them."
        )


def search(
    families: Sequence[str],
    tasks: Iterable[str],
    num_blocks: int,
    output_dir: str | Path,
    settings: Mapping[str, Any],
    quiet: bool,
) -> None:
    """`program_alpha` of plain values, for a process that is started for it."""
    program_alpha(families, tasks, num_blocks, output_dir, ProgramSettings(**settings), quiet)


def _run(families, task, num_blocks, settings, seed, output, quiet):
    """One search on one task; read from its file where it is finished."""
    layers = settings.depth(num_blocks)
    searched = {key: value for key, value in dataclasses.asdict(settings).items() if key not in ("seed", "seeds")}
    made_of = {
        "families": families,
        "num_blocks": num_blocks,
        "task": dataclasses.asdict(task),
        "seed": seed,
        "settings": {**searched, "layers": layers},
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    file = output / f"{task.name}-{'+'.join(families)[:100]}-{digest}.json"
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    if file.is_file():
        say(f"{task.name}, seed {seed}: searched before, {file}")
        return read_json(file)
    say(f"{task.name}, seed {seed}: searching alpha of {' + '.join(families)}, {settings.steps} steps")
    start = time.time()
    sizes = (task.vocab_size, layers, settings.hidden_size, task.seq_len + 1)
    wiring = {"preset": settings.preset, "mixture": "static", "num_blocks": num_blocks}
    hybrid = hybrid_from_scratch(families, *sizes, seed=seed, **wiring)
    torch.manual_seed(seed)
    model = for_task(hybrid, task)
    trainer = SearchTrainer(
        model=model,
        args=_arguments(settings, seed, output, quiet),
        train_dataset=task.dataset("train"),
        data_collator=default_data_collator,
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    trainer.train()
    options = {"arguments": forward_arguments(task), "quiet": quiet}
    said, wanted = answers([model], task.dataset("test"), partial(pick, task), settings.batch_size, **options)
    hits = [one == label for ones, labels in zip(said, wanted) for one, label in zip(ones, labels)]
    result = {"alpha": hybrid_of(model).mixture_weights().tolist(), "accuracy": sum(hits) / len(hits)}
    result |= {"chance": task.chance, "seconds": round(time.time() - start, 1), **made_of}
    write_json(file, result)
    return result


def _arguments(settings, seed, output, quiet):
    return SearchArguments(
        output_dir=str(output),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        strategy=settings.strategy,
        alpha_learning_rate=settings.alpha_learning_rate,
        per_device_train_batch_size=settings.batch_size,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=quiet,
    )
