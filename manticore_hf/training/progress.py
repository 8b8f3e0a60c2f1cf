"""What a training stage shows while it runs: one bar with the loss and the time left. The rest goes to a file."""

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

LOG = "training.log"


def show_progress(trainer: Trainer, stage: str, output: str | Path) -> None:
    """Puts a bar and a log file in the place of what the Trainer prints: its bar and a dictionary at every log.

    Args:
        trainer: A Trainer; with `disable_tqdm` there is no bar.
        stage: What the bar is called.
        output: Directory of the log, `training.log`: a JSON object a line, with the step and what the Trainer logged.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Progress(stage, Path(output) / LOG))


class _Progress(TrainerCallback):
    def __init__(self, stage: str, file: Path):
        self.stage, self.file, self.bar = stage, file, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)  # of an attempt with more rows than fit
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"step": state.global_step, **logs}, default=str) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
