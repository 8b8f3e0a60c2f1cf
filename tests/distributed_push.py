"""Two processes train the hybrid of a repository and push it back: python distributed_push.py REPO FOLDER [--fsdp]."""

import sys

import cpu_fsdp
import torch
from distributed_cases import FSDP, rows_of
from tiny_hybrid import QUIET
from transformers import TrainingArguments, default_data_collator

from manticore_hf import ManticoreForCausalLM
from manticore_hf.training.trained_stages import HybridTrainer
from manticore_hf.utils.distributed import gathered, is_main


def main(repo_id, folder, sharded=False):
    torch.set_num_threads(1)
    changes = FSDP if sharded else {}
    if sharded:
        cpu_fsdp.allow()
    arguments = TrainingArguments(
        folder,
        max_steps=2,
        learning_rate=1e-2,
        push_to_hub=True,
        hub_model_id=repo_id,
        ddp_find_unused_parameters=True,
        **changes,
        **QUIET,
    )
    model = ManticoreForCausalLM.from_pretrained(repo_id)
    rows = rows_of(8)
    trainer = HybridTrainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    trainer.push_to_hub(dataset="org/books")
    state = gathered(trainer, trainer.model)
    if is_main():
        torch.save(trainer.model.state_dict() if state is None else state, f"{folder}/state.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--fsdp" in sys.argv)
