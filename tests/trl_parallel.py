"""SFTTrainer in one process or two, with the same global batch: a hybrid of one block, as TRL sets it up by itself.

python -m torch.distributed.run --nproc-per-node 2 tests/trl_parallel.py FOLDER
"""

import os
import sys

import torch
from datasets import Dataset
from processes import report
from tiny_hybrid import QUIET, mixed_hybrid, rows_of, word_tokenizer
from trl import SFTConfig, SFTTrainer


def main(folder):
    torch.set_num_threads(1)
    rows = [{"input_ids": ids[: 5 + i % 4]} for i, ids in enumerate(rows_of(12)["input_ids"])]
    args = SFTConfig(
        folder,
        max_steps=3,
        per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]),
        learning_rate=0.1,
        optim="sgd",
        bf16=False,
        logging_steps=1,
        **QUIET,
    )
    model = mixed_hybrid().double()
    assert args.gradient_checkpointing and model.config.num_blocks == 1
    trainer = SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer(pad_token="<end>")
    )
    trainer.train()
    report(
        folder,
        {
            "losses": [one["loss"] for one in trainer.state.log_history if "loss" in one],
            "weights": {key: value.double().sum().item() for key, value in model.named_parameters()},
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
