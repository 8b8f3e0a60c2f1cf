"""The demo as a user runs it, on a tenth of its text."""

import json
import os
import subprocess
import sys

import pytest

from manticore_hf import ManticoreForCausalLM
from manticore_hf.training.recipe import load_recipe

ROWS = (
    "neox_prose", "mamba_code", "ensemble", "online mixture", "hybrid, 1 block, gate trained",
    "hybrid, 2 blocks, calibrated only",
    "hybrid, 2 blocks, projectors and gate trained", "neox_prose, tuned alone", "mamba_code, tuned alone",
    "ensemble of the tuned components", "online mixture of the tuned components",
    "token gate over the tuned components", "hybrid, 1 block, tuned jointly",
    "hybrid, 2 blocks, searched and tuned",
)  # fmt: skip


@pytest.mark.slow
def test_the_demo(tmp_path):
    command = [sys.executable, "-m", "manticore_hf.cli", "demo", "--tokens", "8000", "--seed", "3"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)], capture_output=True, text=True, timeout=580, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("logits equal to the last bit: yes") == 2
    for row in ROWS:
        assert f"\n{row} " in done.stdout, row
    said = (
        "bits per byte better than the best",
        "bits per byte worse than the best",
        "shows no difference from the best",
    )
    assert any(words in done.stdout for words in said)
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    for name in ("demo", "demo_one_block"):
        recipe = load_recipe(tmp_path / name / "recipe.yaml")
        assert recipe.seed == 3
        folders = ["0-compose", *(f"{n}-{stage}" for n, (stage, _) in enumerate(recipe.stages, 1))]
        for folder in folders:
            assert json.loads((tmp_path / name / folder / "stage.json").read_text())["stage"] == folder[2:]
    searched = ManticoreForCausalLM.from_pretrained(tmp_path / "demo" / "3-search")
    tuned = ManticoreForCausalLM.from_pretrained(tmp_path / "demo" / "4-finetune")
    assert tuned.config.mixture_weights[0] == pytest.approx(searched.mixture_weights()[0].tolist(), abs=1e-6)
    assert (tmp_path / "demo" / "3-search" / "plots" / "alpha.png").is_file()
