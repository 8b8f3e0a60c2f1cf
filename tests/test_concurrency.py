"""Several processes at once: saving into one directory, loading through one empty cache."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clean_process
import pytest
import torch
from hub_models import assert_same_model, publish, tiny

from manticore_hf import ManticoreForCausalLM
from manticore_hf.utils.saving import whole_directory

SAVE = """
import sys
import time
from manticore_hf import ManticoreForCausalLM

model = ManticoreForCausalLM.from_pretrained(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(15):
    model.save_pretrained(sys.argv[2])
"""
LOAD = """
import sys
import time
from manticore_hf import ManticoreForCausalLM

print("ready", flush=True)
sys.stdin.readline()
ManticoreForCausalLM.from_pretrained(sys.argv[1], cache_dir=sys.argv[2]).double().save_pretrained(sys.argv[3])
"""


@pytest.fixture
def saved(hub, owner, tmp_path):
    """Two saved hybrids of the same components that differ in weights and in configuration. Returns their models."""
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    publish(hub, f"{owner}/b", tiny("gpt2", 1), tmp_path / "src", max_shard_size="10KB")
    models = []
    for number, weights in enumerate(([0.25, 0.75], [0.5, 0.5])):
        model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"], mixture="static")
        model.set_mixture_weights(torch.tensor([weights]))
        model.get_parameter("a.gpt_neox.embed_in.weight").data.mul_(1 + number)
        model.save_pretrained(tmp_path / str(number))
        models.append(model)
    return models


def together(code, *arguments):
    """Runs a program in several processes that go on from the same moment."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": sys.__stderr__}
    running = [clean_process.start(["-c", code, *one], **options) for one in arguments]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(300) for process in running] == [0] * len(running)


@pytest.mark.slow
def test_two_that_save_leave_one_whole_hybrid(saved, tmp_path):
    target = tmp_path / "target"
    for _ in range(2):  # into a new directory, and over an old one
        together(SAVE, (tmp_path / "0", target), (tmp_path / "1", target))
        loaded = ManticoreForCausalLM.from_pretrained(target)
        last = loaded.mixture_weights()[0, 0] == 0.5
        assert_same_model(loaded, saved[int(last)])
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_two_that_load_through_one_empty_cache(saved, tmp_path):
    together(LOAD, *[(tmp_path / "0", tmp_path / "cache", tmp_path / f"copy{i}") for i in range(2)])
    for i in range(2):
        assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / f"copy{i}", dtype="float32"), saved[0])


@pytest.mark.parametrize("others", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_loading_while_others_save(saved, tmp_path, others):
    saved[0].save_pretrained(tmp_path / "target")
    arguments = [(tmp_path / "0", tmp_path / "target")] * others
    with ThreadPoolExecutor(1) as pool:
        saving, loads = pool.submit(together, SAVE, *arguments), 0
        while not saving.done():
            assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "target"), saved[0])
            loads += 1
        saving.result()
    assert loads > 3


def test_moves_into_one_directory_do_not_mix(tmp_path, monkeypatch):
    names, replace = ["model.safetensors", "generation_config.json", "config.json"], os.replace

    def slow(*paths):
        time.sleep(0.005)
        replace(*paths)

    def write(number):
        for turn in range(10):
            with whole_directory(tmp_path / "target", True) as directory:
                for name in names:
                    Path(directory, name).write_text(f"{number}.{turn}")

    monkeypatch.setattr(os, "replace", slow)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    assert len({(tmp_path / "target" / name).read_text() for name in names}) == 1
