"""What several benchmarks share: the demo's pair and text, short trainings, and results of which each is a line."""

import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, TrainingArguments

from manticore_hf import ManticoreForCausalLM
from manticore_hf.demo.demo import COMPONENTS, KINDS
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import pack
from manticore_hf.training.calibrate import calibrate_projectors

BLOCK = 256  # tokens of a row


def compose_pair(blocks: int = 1, train: Dataset | None = None, **settings) -> ManticoreForCausalLM:
    """The hybrid of the demo's components, with settings of its own; calibrated on `train` if it has several blocks."""
    parts = [str(COMPONENTS / name) for name in KINDS]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=blocks, dtype="float32", **settings)
    if blocks > 1:
        calibrate_projectors(model, train, tokens=30_000)
    return model


def rows_of(split: str, each: int | None) -> Dataset:
    """Rows of the demo's text: `each` of prose and of code (None: all there are)."""
    tokenizer = AutoTokenizer.from_pretrained(COMPONENTS / "neox-prose")
    return concatenate_datasets([pack(documents(kind, split), tokenizer, BLOCK, each) for kind in KINDS.values()])


def short_training(seed: int, rate: float, cls: type = TrainingArguments, **more) -> TrainingArguments:
    """Arguments of one pass with a cosine, of which nothing is kept or printed."""
    settings = {
        "output_dir": tempfile.mkdtemp(prefix="benchmark-"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "use_cpu": not torch.accelerator.is_available(),
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return cls(**{**settings, **more})


def read_lines(path: str | Path) -> list[dict]:
    """The results in a file that an earlier run may have begun."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_line(path: str | Path, lines: list[dict], **result) -> None:
    """Adds a result to a file and to what was read of it."""
    lines.append(result)
    with open(path, "a") as file:
        file.write(json.dumps(result) + "\n")
