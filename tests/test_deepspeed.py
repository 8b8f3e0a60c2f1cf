"""DeepSpeed's ZeRO-3: what trains equals one process; what cannot work is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from processes import launch, same
from safetensors.torch import load_file
from tiny_hybrid import QUIET, WORDS, mixed_hybrid, rows_of, save, save_pair
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.integrations import deepspeed

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.search import SearchArguments, SearchTrainer
from manticore_hf.stages import ComponentClipping

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
}  # fmt: skip
installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


class Zero3:
    """What Transformers asks of a configuration of ZeRO-3 when it makes a model."""

    config = ZERO3

    def is_zero3(self):
        return True


@pytest.fixture
def zero3():
    held = Zero3()
    deepspeed.set_hf_deepspeed_config(held)
    yield held
    deepspeed.unset_hf_deepspeed_config()


def test_hybrids_are_made_whole_where_zero3_is_set_up(zero3, tmp_path):
    """Transformers would make the components in parts, here without DeepSpeed: that import would fail."""
    model = mixed_hybrid()
    model.save_pretrained(tmp_path)
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, atol=0, rtol=0)
    assert deepspeed.is_deepspeed_zero3_enabled(), "the Trainer must still see it"


def test_what_cannot_work_is_refused(tmp_path):
    searching = SearchArguments(output_dir=str(tmp_path), **QUIET)
    searching.deepspeed_plugin = object()
    with pytest.raises(ManticoreError, match="search does not run under DeepSpeed"):
        SearchTrainer(mixed_hybrid(num_blocks=2, mixture="static"), searching, train_dataset=rows_of(8))
    arguments = TrainingArguments(output_dir=str(tmp_path), max_grad_norm=0.0, **QUIET)
    trainer = Trainer(
        model=mixed_hybrid(), args=arguments, train_dataset=rows_of(8), data_collator=default_data_collator,
        callbacks=[ComponentClipping(1.0)],
    )  # fmt: skip
    arguments.deepspeed_plugin = object()
    with pytest.raises(ManticoreError, match="cannot see DeepSpeed's gradients"):
        trainer.train()


@installed
@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2])
def test_two_processes_find_what_one_finds(tmp_path, monkeypatch, blocks):
    """Pretrain and finetune from the command line: the objective or the calibration, losses, alpha, every weight."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    save_pair(tmp_path, 3000)
    settings = {} if blocks == 1 else {"mixture": "static"}
    sources = [str(tmp_path / name) for name in ("neox", "mamba")]
    hybrid = ManticoreForCausalLM.from_components(sources, num_blocks=blocks, **settings)
    one = two = save(hybrid, tmp_path / "hybrid", WORDS)
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO3))
    for stage in ("pretrain", "finetune"):
        common = f"--data {tmp_path}/text.txt --block_size 16 --max_steps 4 --learning_rate 1e-3 --logging_steps 1 "
        common += "--use_cpu True --report_to none --gradient_accumulation_steps 2"
        output = tmp_path / f"one-{stage}"
        batch = "--per_device_train_batch_size"
        assert main([stage, *common.split(), "--model", str(one), "--output_dir", str(output), batch, "2"]) == 0
        one = output
        output = tmp_path / f"two-{stage}"
        own = [*common.split(), "--model", two, "--output_dir", output, batch, "1"]
        script = Path(__file__).with_name("deepspeed_stage.py")
        launch([script, stage, *own, "--deepspeed", tmp_path / "zero3.json"])
        two = output
        results = [json.loads((folder / "stage.json").read_text()) for folder in (one, two)]
        same(*[{key: found[key] for key in ("losses", "mixture_weights", "objective")} for found in results])
        logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, two)]
        same(*[[row["loss"] for row in log if "loss" in row] for log in logs])
        before, after = (load_file(folder / "model.safetensors") for folder in (one, two))
        assert before.keys() == after.keys()
        for key in before:
            torch.testing.assert_close(after[key], before[key], atol=1e-5, rtol=1e-5, msg=f"{stage}: {key}")
    start = hybrid.state_dict()
    moved = max((after[key] - start[key]).abs().max() for key in after)
    assert moved > 1e-3, "nothing was trained: the comparison would mean nothing"
