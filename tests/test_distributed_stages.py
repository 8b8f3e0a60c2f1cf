"""A whole recipe in two processes is the recipe in one: every stage, from the command line, as its users start it."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import clean_process
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from hub_models import component_keys, publish, tiny, tokenizer
from processes import TORCHRUN, accelerate_environment, launch
from safetensors.torch import load_file
from tiny_hybrid import write_text

from manticore_hf import ManticoreForCausalLM
from manticore_hf.training.recipe import run_recipe

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "recipes" / "accelerate"
STEPS = {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1}
STAGES = [
    {"calibrate": {"tokens": 512, "per_device_train_batch_size": 4}},
    {"pretrain": STEPS},
    {"search": {**STEPS, "strategy": "gaea", "alpha_learning_rate": 0.1}},
    {"finetune": {**STEPS, "component_max_norm": 0.1, "gradient_checkpointing": True}},
    {"prune": {**STEPS, "path": "loss"}},
]
FOLDERS = ["1-calibrate", "2-pretrain", "3-search", "4-finetune", "5-prune"]

# Loads what was saved where there is no manticore_hf, and leaves its logits.
STRANGER = """
import sys
sys.modules["manticore_hf"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(3, 15)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def alone(hub, tmp_path_factory):
    """The recipe as one process runs it. The components are referenced, one of them has its ends tied."""
    folder, words = tmp_path_factory.mktemp("recipe"), tokenizer()
    for name, family in (("a", "gpt_neox"), ("b", "mamba")):
        publish(hub, f"distributed/{name}", tiny(family), folder, words)
    write_text(folder / "text.txt", 2000)
    text = (folder / "text.txt").read_text().split()
    known = {word: f"w{3 + i}" for i, word in enumerate(sorted(set(text)))}
    (folder / "text.txt").write_text(" ".join(known[word] for word in text))
    for batch in (2, 4):
        recipe = {
            "seed": 3, "components": ["distributed/a", "distributed/b"], "data": {"data": "text.txt", "block_size": 16},
            "hybrid": {"num_blocks": 2, "mixture": "static"},
            "stages": [
                {name: {"per_device_train_batch_size": batch, **settings}}
                for stage in STAGES for name, settings in stage.items()
            ],
        }  # fmt: skip
        (folder / f"batch{batch}.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(folder / "batch4.yaml", folder / "one")
    return folder


def numbers(value, path=""):
    """{path: number} of everything numeric in plain values."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: number for name, one in pairs for key, number in numbers(one, f"{path}/{name}").items()}
    return {path: value} if isinstance(value, (int, float)) else {}


def same_stages(one, two):
    for name in FOLDERS:
        first, second = (json.loads((folder / name / "stage.json").read_text()) for folder in (one, two))
        assert numbers(first) == pytest.approx(numbers(second), abs=2e-5, rel=2e-5), name
        before, after = (load_file(folder / name / "model.safetensors") for folder in (one, two))
        assert before.keys() == after.keys(), name
        for key in before:
            torch.testing.assert_close(after[key], before[key], atol=2e-5, rtol=2e-5, msg=f"{name}: {key}")


def options_of(config, *more):
    """accelerate's options with a configuration of ours: two processes, in full precision."""
    return ["--config_file", CONFIGS / config, "--num_processes", 2, "--mixed_precision", "no", *more]


def accelerated(config):
    """accelerate's launcher, whose processes import everything anew."""
    return ["-m", "accelerate.commands.launch", *map(str, options_of(config))]


@pytest.mark.slow
def test_sharded(alone, tmp_path):
    """With `cpu_ram_efficient_loading`, which is off in ours and on in the configurations that accelerate writes."""
    output = tmp_path / "out"
    command = [HERE / "fsdp_cli.py", "run", alone / "batch2.yaml", "--output-dir", output]
    environment = accelerate_environment(options_of("fsdp2.yaml", "--fsdp_cpu_ram_efficient_loading", "true"))
    printed = launch(command, environment=environment)
    same_stages(alone / "one", output)
    for stage in ("pretrain", "search", "finetune", "prune"):
        said = re.findall(rf"\n{stage}: (?! *\d+%)", printed)  # and not its bar
        assert len(said) == 1, "only one process prints"
    assert (output / "4-finetune" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file(), "it was not sharded"
    # Frozen components stay references, in the stage's result and in its checkpoints.
    for folder in (output / "2-pretrain", output / "2-pretrain" / "checkpoint-2"):
        assert component_keys(folder) == set()
    assert component_keys(output / "4-finetune")
    done = clean_process.run(
        ["-c", STRANGER, output / "4-finetune", tmp_path / "logits.pt"], modules=clean_process.TRANSFORMERS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = ManticoreForCausalLM.from_pretrained(output / "4-finetune")
    with torch.no_grad():
        logits = model(torch.arange(3, 15)[None]).logits
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_data_parallel(alone, tmp_path):
    for name, launcher in (("accelerate", accelerated("ddp.yaml")), ("torchrun", TORCHRUN)):
        command = ["-m", "manticore_hf.cli", "run", alone / "batch2.yaml", "--output-dir", tmp_path / name]
        launch(command, launcher=launcher)
        same_stages(alone / "one", tmp_path / name)


@pytest.mark.slow
def test_the_objective_is_chosen_by_shards(alone, tmp_path):
    """A hybrid that fits on no device is never whole on one; what is chosen and trained is the same."""
    for batch in (2, 4):
        recipe = yaml.safe_load((alone / f"batch{batch}.yaml").read_text())
        recipe["data"]["data"] = str(alone / "text.txt")
        recipe["hybrid"], recipe["stages"] = {"num_blocks": 1}, [{"finetune": recipe["stages"][3]["finetune"]}]
        (tmp_path / f"batch{batch}.yaml").write_text(yaml.safe_dump(recipe))
    _, (_, one) = run_recipe(tmp_path / "batch4.yaml", tmp_path / "one", allow_outside=True)
    command = [HERE / "fsdp_cli.py", "run", tmp_path / "batch2.yaml", "--allow-outside"]
    command += ["--output-dir", tmp_path / "two"]
    printed = launch(command, launcher=accelerated("fsdp2.yaml"))
    assert printed.count("Objective: the components' errors are") == 1
    two = json.loads((tmp_path / "two" / "1-finetune" / "stage.json").read_text())
    assert (tmp_path / "two" / "1-finetune" / "objective.json").is_file()
    for key in ("objective", "losses"):
        assert numbers(two[key]) == pytest.approx(numbers(one[key]), abs=2e-5)
    assert two["objective"]["mixture_space"] == one["objective"]["mixture_space"]


@pytest.mark.slow
def test_the_slurm_script_on_two_nodes(alone, tmp_path):
    """Slurm's commands are stood in for, each node by a launcher of one process; the rest is as on a cluster."""
    config, programs = tmp_path / "ddp.yaml", tmp_path / "bin"
    config.write_text((CONFIGS / "ddp.yaml").read_text().replace("mixed_precision: bf16", "mixed_precision: 'no'"))
    programs.mkdir()
    for name, text in {
        "scontrol": "echo localhost; echo 127.0.0.1",
        "srun": 'shift; for node in 1 0; do SLURM_NODEID=$node "$@" & started+=($!); done\n'
        'for one in "${started[@]}"; do wait "$one" || exit 1; done',
        "accelerate": f'exec {sys.executable} -m accelerate.commands.accelerate_cli "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    output = tmp_path / "out"
    done = subprocess.run(
        ["bash", CONFIGS / "slurm.sh", "run", alone / "batch2.yaml", "--output-dir", output],
        capture_output=True,
        text=True,
        timeout=500,
        env={
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "two",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "ACCELERATE_CONFIG": str(config),
            "PORT": str(port),
            "PYTHONPATH": str(HERE),
        },
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(re.findall(r"\nfinetune: (?! *\d+%)", done.stdout)) == 1, "only one process prints"
    same_stages(alone / "one", output)


KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "deepspeed_zero3": DistributedType.DEEPSPEED}


@pytest.mark.parametrize("name", KINDS)
def test_configurations_are_accelerates(name):
    """Its own reader refuses keys that it does not know."""
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name] and config.mixed_precision == "bf16" and not config.use_cpu
    assert sorted(file.stem for file in CONFIGS.glob("*.yaml")) == sorted(KINDS)
