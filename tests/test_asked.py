"""A stage's directory counts only for what was asked for there: another request is an error, and changes nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_hybrid import QUIET_RECIPE, save_pair
from transformers import TrainingArguments

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.training.asked import FILE, check_asked, remember_asked
from manticore_hf.training.recipe import run_recipe
from manticore_hf.training.stage_arguments import StageArguments
from manticore_hf.training.trained_stages import run_stage


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("parts"), 2000)


@pytest.fixture(scope="module")
def composed(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("composed") / "hybrid"
    assert main(_compose(parts, folder)) == 0
    return folder


def _compose(parts, output, *more, names=("neox", "mamba")):
    return ["compose", *(str(parts / name) for name in names), "--num-blocks", "2", "--output-dir", str(output), *more]


def _finetune(parts, hybrid, output, *more):
    given = {"--model": hybrid, "--data": parts / "text.txt", "--output-dir": output, "--block-size": 16}
    words = [str(one) for pair in given.items() for one in pair]
    return [*words, "--max-steps", "2", "--save-steps", "1", "--use-cpu", "--validation-fraction", "0", *more]


def _state(folder):
    return {str(one): (one.read_bytes(), one.stat().st_mtime_ns) for one in folder.rglob("*") if one.is_file()}


def _is_refused(command, output, capsys, *said):
    capsys.readouterr()
    before = _state(output)
    assert main(command) == 2
    out, err = capsys.readouterr()
    for one in (*said, "give another --output-dir, or "):
        assert one in err, err
    assert not out and _state(output) == before


def test_composing_something_else_into_a_used_directory_is_an_error(parts, composed, tmp_path, capsys, monkeypatch):
    for more, names, said in (
        ((), ("neox",), f"components: [{parts / 'neox'}, {parts / 'mamba'}] then, [{parts / 'neox'}] now"),
        ((), ("neox", "nowhere"), f"{parts / 'nowhere'}] now"),
        (("--mixture", "static"), ("neox", "mamba"), "mixture: token then, static now"),
        (("--num-blocks", "1"), ("neox", "mamba"), "num_blocks: 2 then, 1 now"),
        (
            ("--seed", "7", "--dtype", "bfloat16"),
            ("neox", "mamba"),
            "seed: 42 then, 7 now; dtype: auto then, bfloat16 now",
        ),
    ):
        _is_refused(_compose(parts, composed, *more, names=names), composed, capsys, said, "a finished stage")
    _is_refused(["finetune", *_finetune(parts, composed, composed)], composed, capsys, "stage: compose then, finetune")
    # The same in other words: what the preset says anyway, another way to the same directory, another way to work
    monkeypatch.chdir(parts)
    link = tmp_path / "link"
    link.symlink_to(parts)
    for same in (
        _compose(parts, composed, "--mixture", "token", "--use-cpu"),
        _compose(Path("."), composed),
        _compose(link, os.path.relpath(composed)),
    ):
        assert main(same) == 0 and "this stage is finished" in capsys.readouterr().out
    # Two directories of one name are told apart
    shutil.copytree(parts, tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    _is_refused(_compose(Path("."), composed), composed, capsys, f"{tmp_path / 'other' / 'neox'}, ")


def test_a_directory_that_moved_with_its_parts_or_has_no_request_counts(parts, tmp_path, capsys, monkeypatch):
    shutil.copytree(parts, tmp_path / "one" / "parts")
    monkeypatch.chdir(tmp_path / "one")
    command = _compose(Path("parts"), "hybrid")
    assert main(command) == 0
    os.rename(tmp_path / "one", tmp_path / "two")
    monkeypatch.chdir(tmp_path / "two")
    assert main(command) == 0 and "this stage is finished" in capsys.readouterr().out
    shutil.rmtree("parts/mamba")  # the hybrid has its weights
    assert main(command) == 0 and "this stage is finished" in capsys.readouterr().out
    # Of an earlier version: without the request
    Path("hybrid", FILE).unlink()
    capsys.readouterr()
    assert main([*command, "--mixture", "static"]) == 0 and "this stage is finished" in capsys.readouterr().out


def test_a_failed_stage_may_be_asked_for_otherwise(parts, tmp_path):
    assert main(_compose(parts, tmp_path / "x", names=("neox", "nowhere"))) == 2
    assert main(_compose(parts, tmp_path / "x")) == 0


def test_one_component_is_said_to_have_nothing_to_mix_with(parts, composed, tmp_path, capsys):
    assert main(_compose(parts, tmp_path / "x", names=("neox",))) == 0
    assert "one component, so there is nothing to mix" in capsys.readouterr().out
    assert main(_compose(parts, composed)) == 0 and "nothing to mix" not in capsys.readouterr().out


def test_a_stage_goes_on_only_with_its_own_settings(parts, composed, tmp_path, capsys):
    output = tmp_path / "tuned"
    command = ["finetune", *_finetune(parts, composed, output, "--learning-rate", "1e-3")]
    assert main(command) == 0
    (output / "stage.json").unlink()  # as after a kill
    shutil.copy(parts / "text.txt", tmp_path / "other.txt")
    for more, said in (
        (("--learning-rate", "1e-2"), "learning_rate: 0.001 then, 0.01 now"),
        (("--block-size", "8"), "block_size: 16 then, 8 now"),
        (("--data", str(tmp_path / "other.txt")), f"data: {parts / 'text.txt'} then, {tmp_path / 'other.txt'} now"),
        (("--component-max-norm", "1"), "component_max_norm: not given then, 1.0 now"),
    ):
        _is_refused([*command, *more], output, capsys, said, "checkpoints of a stage")
    _is_refused(["pretrain", *command[1:]], output, capsys, "stage: finetune then, pretrain now")
    same = [*command, "--logging-steps", "1", "--save-steps", "2", "--per-device-eval-batch-size", "2", "--verbose"]
    assert main(same) == 0 and "resuming from" in capsys.readouterr().out
    assert main(command) == 0 and "this stage is finished" in capsys.readouterr().out
    assert not any(name.startswith("/") for name in json.loads((output / "stage.json").read_text()))


def test_a_stage_from_python_is_compared_too(parts, composed, tmp_path):
    settings = {"output_dir": str(tmp_path / "x"), "max_steps": 1, "use_cpu": True, "save_strategy": "no"}
    data = DataArguments(str(parts / "text.txt"), block_size=16, validation_fraction=0.0)
    start = StageArguments(str(composed))
    run_stage("pretrain", start, data, TrainingArguments(**settings, report_to="none"))
    run_stage("pretrain", start, data, TrainingArguments(**settings, report_to="none"))
    with pytest.raises(ManticoreError, match="learning_rate: 5e-05 then, 0.1 now"):
        run_stage("pretrain", start, data, TrainingArguments(**settings, report_to="none", learning_rate=0.1))


def test_what_was_asked_for_under_an_old_name_counts(tmp_path):
    for stage, old, new in (
        ("calibrate", "reference", "reference_component"),
        ("finetune", "train_dtype", "dtype"),
        ("prune", "train_dtype", "dtype"),
    ):
        remember_asked(tmp_path, {"stage": stage, old: "x"})
        check_asked(tmp_path, {"stage": stage, new: "x"}, {"stage": stage}, False)
        with pytest.raises(ManticoreError, match=rf"\({new}: x then, y now\)"):
            check_asked(tmp_path, {"stage": stage, new: "y"}, {"stage": stage}, False)


def test_a_recipe_goes_on_where_it_moved_and_says_what_changed(parts, tmp_path, capsys):
    home = tmp_path / "one"
    shutil.copytree(parts, home)
    quiet = ", ".join(f"{key}: {json.dumps(value)}" for key, value in QUIET_RECIPE.items())
    text = f"""
components: [neox, mamba]
hybrid: {{num_blocks: 2, mixture: static}}
data: {{data: text.txt, block_size: 16, validation_fraction: 0.0}}
stages:
  - pretrain: {{max_steps: 1, {quiet}}}
  - finetune: {{max_steps: 1, {quiet}}}
"""
    (home / "x.yaml").write_text(text)
    run_recipe(home / "x.yaml", tmp_path / "out")
    (tmp_path / "out" / "2-finetune" / "stage.json").unlink()
    shutil.copytree(home, tmp_path / "two")  # also to another machine
    os.rename(tmp_path / "out", tmp_path / "there")
    capsys.readouterr()
    run_recipe(tmp_path / "two" / "x.yaml", tmp_path / "there")
    assert capsys.readouterr().out.count("this stage is finished") == 2
    assert ManticoreForCausalLM.from_pretrained(tmp_path / "there" / "2-finetune").config.num_blocks == 2
    (home / "x.yaml").write_text(
        text.replace("num_blocks: 2", "num_blocks: 1").replace("- finetune: {", "- finetune: {learning_rate: 1e-3, ")
    )
    with pytest.raises(ManticoreError) as caught:
        run_recipe(home / "x.yaml", tmp_path / "there")
    said = "hybrid.num_blocks: 2 then, 1 now; stages.1.finetune.learning_rate: not given then, 0.001 now"
    assert said in str(caught.value)
