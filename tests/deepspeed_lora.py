"""LoRA with the project's Trainer in Python, in one process or under ZeRO-3: torchrun deepspeed_lora.py FOLDER CONFIG

Trains, saves the adapter, and goes on from a checkpoint with an adapter that starts otherwise.
"""

import sys
from pathlib import Path

import torch
from distributed_cases import settings, text
from peft import get_peft_model
from processes import report
from tiny_hybrid import mixed_hybrid
from transformers import TrainingArguments, default_data_collator

from manticore_hf import lora_config
from manticore_hf.training.trained_stages import HybridTrainer

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def train(output, resume=None, **changes):
    arguments = TrainingArguments(output_dir=str(output), **settings(**SAVING, **changes))
    model = mixed_hybrid(num_blocks=2, mixture="static", embeddings="mixed")
    torch.manual_seed(5 if resume is None else 6)
    model = get_peft_model(model, lora_config(model, r=2, lora_alpha=16))
    trainer = HybridTrainer(model=model, args=arguments, train_dataset=text(), data_collator=default_data_collator)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    log = trainer.state.log_history
    return [{key: row[key] for key in row if key.split("/")[0] in ("loss", "alpha")} for row in log if "loss" in row]


def run(folder, **changes):
    """{"whole": losses and alpha of each step, "resumed": those of a run that goes on after the second step}."""
    whole = train(folder / "whole", **changes)
    return {"whole": whole, "resumed": train(folder / "resumed", str(folder / "whole" / "checkpoint-2"), **changes)}


if __name__ == "__main__":
    from deepspeed_stage import without_shared_memory

    torch.set_num_threads(1)
    without_shared_memory()
    report(sys.argv[1], run(Path(sys.argv[1]), deepspeed=sys.argv[2]))
