"""DeepSpeed's ZeRO: what trains in two processes equals one; what cannot work is refused."""

import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from processes import launch, results
from safetensors.torch import load_file
from tiny_hybrid import QUIET, WORDS, mixed_hybrid, rows_of, save, save_pair
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.integrations import deepspeed

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.training.freezing import ComponentClipping
from manticore_hf.training.recipe import run_recipe
from manticore_hf.training.search import SearchArguments, SearchTrainer
from manticore_hf.utils.deepspeed import take_precision

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
}  # fmt: skip
HERE = Path(__file__).parent
installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    """A folder with the components, a text, and hybrids of one block (with a token gate) and two, as composed."""
    folder = save_pair(tmp_path_factory.mktemp("hybrids"), 3000)
    sources = [str(folder / name) for name in ("neox", "mamba")]
    for blocks, settings in ((1, {}), (2, {"mixture": "static"})):
        hybrid = ManticoreForCausalLM.from_components(sources, num_blocks=blocks, **settings)
        save(hybrid, folder / f"blocks{blocks}", WORDS)
    return folder


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def command(stage, hybrids, start, output, processes, *more):
    """Four steps of a stage with the same global batch; of options that come twice the last counts.

    `start` is the name of one of the hybrids, or the path of another.
    """
    options = "--block_size 16 --max_steps 4 --learning_rate 1e-3 --logging_steps 1 --use_cpu True --report_to none "
    options += f"--per_device_train_batch_size {2 // processes} --per_device_eval_batch_size {4 // processes}"
    given = ["--data", hybrids / "text.txt", "--model", hybrids / start, "--output_dir", output, *more]
    return [stage, *options.split(), "--gradient_accumulation_steps", "2", *map(str, given)]


def accelerated(*options):
    """accelerate's launcher with the configuration that we give: two processes."""
    config = HERE.parent / "recipes" / "accelerate" / "deepspeed_zero3.yaml"
    own = ["--config_file", config, "--num_processes", 2, "--main_process_port", 0, *options]
    return ["-m", "accelerate.commands.launch", *map(str, own)]


def in_two(folder, commands, launcher=(), **last):
    """Runs commands in two processes under DeepSpeed; `last` goes with the last of them."""
    listed = [{"argv": [str(value) for value in argv]} for argv in commands]
    listed[-1] |= last
    write_json(folder / "commands.json", listed)
    return launch([HERE / "deepspeed_stage.py", folder / "commands.json"], launcher=launcher, timeout=500)


def write_json(file, values):
    file.write_text(json.dumps(values))


def read(file):
    return json.loads(file.read_text())


def log_of(folder):
    """What a finished stage, or its last checkpoint, has logged."""
    files = [folder / "trainer_state.json", *sorted(folder.glob("checkpoint-*/trainer_state.json"), reverse=True)]
    return read(next(file for file in files if file.exists()))["log_history"]


def losses_of(folder):
    return [row["loss"] for row in log_of(folder) if "loss" in row]


def close(one, two, tolerance):
    """Plain values equal but for a tolerance, absolute or relative."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        one, two = list(one.values()), [two[key] for key in one]
    if isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two):
            close(a, b, tolerance)
    elif isinstance(one, float):
        assert two == pytest.approx(one, abs=tolerance, rel=tolerance)
    else:
        assert one == two


def same_stage(one, two, tolerance=1e-5):
    """Results of a stage, what it logged of losses and alpha, and every weight."""
    close(*[read(folder / "stage.json") for folder in (one, two)], tolerance)
    kept = ("loss", "eval_loss", "alpha", "gate")
    logs = [[[r[key] for key in sorted(r) if key.split("/")[0] in kept] for r in log_of(one)] for one in (one, two)]
    close(*logs, tolerance)
    before, after = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(after[key], before[key], atol=tolerance, rtol=tolerance, msg=f"{two}: {key}")


def moved(start, end):
    before, after = (load_file(folder / "model.safetensors") for folder in (start, end))
    most = max((after[key] - before[key]).abs().max() for key in after)
    assert most > 1e-3, "nothing was trained: the comparison would mean nothing"


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


def test_precision_of_the_launcher_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    arguments = TrainingArguments(output_dir=str(tmp_path), **QUIET)
    assert not take_precision(arguments).bf16, "without DeepSpeed accelerate does it"
    arguments.deepspeed_plugin = object()
    assert take_precision(arguments).bf16 and not arguments.fp16


def test_what_cannot_work_is_refused(tmp_path):
    searching = SearchArguments(output_dir=str(tmp_path), **QUIET)
    searching.deepspeed_plugin = object()
    with pytest.raises(ManticoreError, match="search does not run under DeepSpeed"):
        SearchTrainer(mixed_hybrid(num_blocks=2, mixture="static"), searching, train_dataset=rows_of(8))
    arguments = TrainingArguments(output_dir=str(tmp_path), max_grad_norm=0.0, **QUIET)
    trainer = Trainer(
        model=mixed_hybrid(),
        args=arguments,
        train_dataset=rows_of(8),
        data_collator=default_data_collator,
        callbacks=[ComponentClipping(1.0)],
    )
    arguments.deepspeed_plugin = object()
    with pytest.raises(ManticoreError, match="cannot see DeepSpeed's gradients"):
        trainer.train()


@installed
@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2])
def test_two_processes_find_what_one_finds(tmp_path, hybrids, blocks):
    """Pretrain and finetune from the command line: the objective or the calibration, losses, alpha, every weight."""
    write_json(tmp_path / "zero3.json", ZERO3)
    commands, start = [], dict.fromkeys(("one", "two"), f"blocks{blocks}")
    for stage in ("pretrain", "finetune"):
        output = {which: tmp_path / f"{which}-{stage}" for which in start}
        assert main(command(stage, hybrids, start["one"], output["one"], 1)) == 0
        commands += [command(stage, hybrids, start["two"], output["two"], 2, "--deepspeed", tmp_path / "zero3.json")]
        start = output
    in_two(tmp_path, commands)
    for stage in ("pretrain", "finetune"):
        same_stage(tmp_path / f"one-{stage}", tmp_path / f"two-{stage}")
    moved(hybrids / f"blocks{blocks}", tmp_path / "two-finetune")


# What DeepSpeed's files have in zero_optimization beside ZERO3's
SETTINGS = {
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "parameters": {"offload_param": {"device": "cpu"}},
    "both": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "split": {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": False},
    "zero2": {"stage": 2},
}  # fmt: skip


@installed
@pytest.mark.slow
def test_offloaded_or_otherwise_split(tmp_path, hybrids):
    """Weights or the optimizer's state on the CPU, nothing kept whole, ZeRO-2; distillation, too."""
    commands = []
    for name, changes in SETTINGS.items():
        own = {**ZERO3, "zero_force_ds_cpu_optimizer": False}  # DeepSpeed's own optimizer for CPUs is compiled first
        write_json(tmp_path / f"{name}.json", {**own, "zero_optimization": {**ZERO3["zero_optimization"], **changes}})
        options = ["--deepspeed", tmp_path / f"{name}.json"]
        commands += [command("finetune", hybrids, "blocks1", tmp_path / name, 2, *options)]
    healing = ["--deepspeed", tmp_path / "both.json", "--path", "neox,mamba"]
    commands += [command("prune", hybrids, "blocks2", tmp_path / "distilled", 2, *healing)]
    in_two(tmp_path, commands)
    assert main(command("finetune", hybrids, "blocks1", tmp_path / "one", 1)) == 0
    for name in SETTINGS:
        same_stage(tmp_path / "one", tmp_path / name)
    moved(hybrids / "blocks1", tmp_path / "one")
    assert main(command("prune", hybrids, "blocks2", tmp_path / "one-distilled", 1, *healing[2:])) == 0
    same_stage(tmp_path / "one-distilled", tmp_path / "distilled")


@installed
@pytest.mark.slow
def test_what_was_killed_goes_on(tmp_path, hybrids):
    """From its last whole checkpoint, to the end of the run that was not killed; the best checkpoint is loaded then."""
    write_json(tmp_path / "zero3.json", {**ZERO3, "bf16": {"enabled": "auto"}})
    saving = "--save_strategy steps --save_steps 2 --eval_strategy steps --eval_steps 2 --load_best_model_at_end True "
    saving += "--metric_for_best_model eval_loss --greater_is_better True --learning_rate 1e-2 "
    saving = (saving + "--validation_fraction 0.043").split()  # eight rows: of nine the Trainer would read one twice
    own = [*saving, "--deepspeed", tmp_path / "zero3.json"]
    whole = command("finetune", hybrids, "blocks1", tmp_path / "whole", 2, *own, "--bf16")
    killed = command("finetune", hybrids, "blocks1", tmp_path / "two", 2, *own)
    with pytest.raises(AssertionError, match=rf"exit codes \[.*{-signal.SIGKILL}"):
        in_two(tmp_path, [whole, killed], die_at=3)
    assert (tmp_path / "two" / "checkpoint-2").is_dir() and not (tmp_path / "two" / "stage.json").exists()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    half = command("finetune", hybrids, "blocks1", tmp_path / "half", 2, *own, "--bf16")
    printed = in_two(tmp_path, [killed, half])
    assert printed.count("resuming from") == 2
    assert main(command("finetune", hybrids, "blocks1", tmp_path / "one", 1, *saving)) == 0
    same_stage(tmp_path / "one", tmp_path / "two")
    same_stage(tmp_path / "whole", tmp_path / "half")
    for name in ("one", "two", "whole", "half"):
        state = read(tmp_path / name / "trainer_state.json")
        first, second = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
        assert first > second and Path(state["best_model_checkpoint"]).name == "checkpoint-2"
    moved(hybrids / "blocks1", tmp_path / "two")


@installed
@pytest.mark.slow
def test_a_recipe_by_accelerates_launcher(tmp_path, hybrids):
    """`accelerate launch` with our file, in full precision and with zero3_init_flag; three stages after another."""
    steps = {"max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True}
    for batch in (1, 2):
        own = {**steps, "per_device_train_batch_size": batch}
        stages = [{"pretrain": own}, {"finetune": own}, {"prune": {**own, "path": "loss"}}]
        recipe = {
            "seed": 3, "components": [str(hybrids / name) for name in ("neox", "mamba")], "stages": stages,
            "hybrid": {"num_blocks": 2, "mixture": "static"}, "data": {"data": "text.txt", "block_size": 16},
        }  # fmt: skip
        (hybrids / f"recipe{batch}.yaml").write_text(yaml.safe_dump(recipe))
    argv = ["run", hybrids / "recipe1.yaml", "--output-dir", tmp_path / "two"]
    in_two(tmp_path, [argv], launcher=accelerated("--mixed_precision", "no", "--zero3_init_flag", "true"))
    run_recipe(hybrids / "recipe2.yaml", tmp_path / "one")
    for name in ("1-pretrain", "2-finetune", "3-prune"):
        same_stage(tmp_path / "one" / name, tmp_path / "two" / name)
    sharded = tmp_path / "two" / "3-prune" / "checkpoint-4" / "global_step4"
    assert len(list(sharded.glob("*_optim_states.pt"))) == 2, "DeepSpeed did not train"


@installed
@pytest.mark.slow
def test_bf16_as_our_file_has_it(tmp_path, hybrids):
    """What is saved was trained in float32 from the start as it is in float32, and frozen weights are as they were."""
    rate, steps = 1e-3, 4
    in_two(tmp_path, [command("pretrain", hybrids, "blocks2", tmp_path / "two", 2)], launcher=accelerated())
    assert main(command("pretrain", hybrids, "blocks2", tmp_path / "one", 1, "--bf16")) == 0
    assert read(tmp_path / "two" / "config.json")["dtype"] == "float32"
    found = [read(tmp_path / name / "stage.json") for name in ("one", "two")]
    for key in ("losses", "mixture_weights"):
        close(*[one[key] for one in found], 0.01)
    close(*[losses_of(tmp_path / name) for name in ("one", "two")], 0.01)
    folders = (hybrids / "blocks2", tmp_path / "two", tmp_path / "one")
    before, after, alone = (load_file(one / "model.safetensors") for one in folders)
    for key in before:
        if not key.startswith("hybrid_mixer."):
            assert torch.equal(before[key], after[key]), key
    # Adam moves a weight by about its rate in each step; rounding the calibrated projectors moves them further.
    for key in alone:
        assert (after[key] - alone[key]).abs().max() < 2 * steps * rate, key
    largest = max((value - value.bfloat16()).abs().max() for key, value in alone.items() if "hybrid_mixer" in key)
    assert largest > 2 * steps * rate, "rounding would not be seen"


@installed
@pytest.mark.slow
def test_lora(tmp_path):
    """Losses, alpha and adapters of two processes, whole and resumed, in the last checkpoint, too."""
    import deepspeed_lora  # which brings PEFT

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "zero3.json", ZERO3)
    launch([HERE / "deepspeed_lora.py", tmp_path / "two", tmp_path / "zero3.json"])
    alone, ranks = deepspeed_lora.run(tmp_path / "one"), results(tmp_path / "two")
    assert ranks[0] == ranks[1], "the processes disagree"
    close(alone, ranks[0], 2e-6)
    close(ranks[0]["whole"], ranks[0]["resumed"], 2e-6)
    first = load_file(tmp_path / "one" / "whole" / "adapter_model.safetensors")
    for which in ("one/resumed", "two/whole", "two/resumed", "two/resumed/checkpoint-4"):
        other = load_file(tmp_path / which / "adapter_model.safetensors")
        assert first.keys() == other.keys()
        for key in first:
            torch.testing.assert_close(other[key], first[key], atol=1e-5, rtol=1e-5, msg=f"{which}: {key}")
    assert max(value.abs().max() for key, value in first.items() if "lora_B" in key) > 1e-3, "nothing was trained"
