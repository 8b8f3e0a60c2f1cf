"""A recipe may be a stranger's: it says what trains; what acts outside is the word of the person who runs it."""

import contextlib
import dataclasses
import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
from cases import case
from huggingface_hub import HfApi
from tiny_hybrid import save_pair
from transformers import TrainingArguments

from manticore_hf import ManticoreError, ManticoreForCausalLM, cli
from manticore_hf.compare.compared_recipe import read_recipe
from manticore_hf.evaluation.data import DataArguments, read_records
from manticore_hf.experiments.mad.program import ProgramSettings
from manticore_hf.plan.subject import load_subject
from manticore_hf.training import recipe as recipes
from manticore_hf.training.recipe import load_recipe, run_recipe, stage_data
from manticore_hf.training.runtime import check_training
from manticore_hf.training.search import SearchArguments
from manticore_hf.training.stage_arguments import RANGES, RECIPE_MAY_SAY, OutsideArguments

OUTSIDE = {
    "push_to_hub": True, "hub_model_id": "attacker/loot", "hub_token": "hf_x", "hub_strategy": "every_save",
    "hub_private_repo": False, "hub_always_push": True, "hub_revision": "main", "report_to": "all", "run_name": "x",
    "project": "x", "trackio_space_id": "x/y", "trackio_bucket_id": "x/y", "trackio_static_space_id": "x/y",
    "deepspeed": "ds.json", "accelerator_config": "a.json", "fsdp": True, "fsdp_config": "f.json",
    "parallelism_config": {}, "resume_from_checkpoint": "/elsewhere", "output_dir": "/elsewhere", "debug": "x",
    "torch_compile_backend": "x", "ddp_backend": "x", "enable_jit_checkpoint": True, "save_on_each_node": True,
    "log_level": "debug", "local_rank": 3, "dataloader_multiprocessing_context": "fork", "use_liger_kernel": True,
}  # fmt: skip


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_what_acts_outside_is_refused_in_every_stage(tmp_path):
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(OUTSIDE) <= known and RECIPE_MAY_SAY <= known and not RECIPE_MAY_SAY & set(OUTSIDE)
    assert {field.name for field in dataclasses.fields(OutsideArguments)} <= set(OUTSIDE)
    for stage in ("calibrate", "pretrain", "search", "finetune", "prune"):
        for key, value in OUTSIDE.items():
            text = f"components: [a/b]\ndata: {{data: t}}\nstages:\n- {stage}: {{{key}: {value!r}}}\n"
            with pytest.raises(ManticoreError, match=rf"x.yaml:4: stages.0.{stage}.{key}: .*(outside|unknown key)"):
                load_recipe(write(tmp_path / "x.yaml", text))
    # One that Transformers adds tomorrow is refused, too
    assert known - RECIPE_MAY_SAY - {"output_dir"} == recipes._outside("finetune") - {"output_dir"}


def test_nothing_is_uploaded_and_the_person_may_still_ask_for_it(hub, owner, tmp_path, capsys):
    place = save_pair(tmp_path, 400)
    text = (
        "components: [neox, mamba]\ndata: {data: text.txt, block_size: 16, validation_fraction: 0}\nstages:\n"
        "- finetune: {max_steps: 2, save_strategy: steps, save_steps: 1"
    )
    asks = write(place / "asks.yaml", f"{text}, push_to_hub: true, hub_model_id: {owner}/loot}}\n")
    assert cli.main(["run", str(asks), "--output-dir", str(tmp_path / "asks")]) == 2
    said = capsys.readouterr().err
    assert "--push-to-hub" in said and "outside of the run's directory" in said and not (tmp_path / "asks").exists()
    given = ["--push-to-hub", "--hub-model-id", f"{owner}/mine"]
    plain = write(place / "plain.yaml", f"{text}}}\n")
    assert cli.main(["run", str(plain), "--output-dir", str(tmp_path / "out"), *given]) == 0
    assert f"{owner}/loot" not in hub._storage.repos and "model.safetensors" in hub.files(f"{owner}/mine")


def test_what_a_recipe_names_lies_below_its_folder(tmp_path, monkeypatch):
    private = write(tmp_path / "private.txt", "mine")
    home = tmp_path / "theirs"
    for name in ("text.txt", "folder/a.txt", "linked/a.txt"):
        write(home / name, "theirs")
    os.symlink(private, home / "link.txt")
    os.symlink(private, home / "linked" / "b.txt")
    os.symlink(tmp_path, home / "up")
    monkeypatch.chdir(tmp_path)

    def data(source, allow=False):
        file = write(home / "x.yaml", f"components: [{source}, b/c]\ndata: {{data: {source}}}\nstages: [finetune]\n")
        recipe = load_recipe(file)
        recipe.allow_outside = allow
        return stage_data(recipe, {}).data

    ways = ("../private.txt", "link.txt", "linked", "up/private.txt", "private.txt", "folder/../../private.txt")
    for source in (*ways, str(private), str(tmp_path), str(home / "link.txt")):
        with pytest.raises(ManticoreError, match=f"{source}' is not below the recipe's folder.*--allow-outside"):
            data(source)
        assert os.path.exists(data(source, allow=True))
        for read in (read_recipe, load_subject):  # compare, plan
            with pytest.raises(ManticoreError, match="not below the recipe's folder"):
                read(home / "x.yaml")
        with pytest.raises(ManticoreError, match="not below the recipe's folder"):
            run_recipe(home / "x.yaml", tmp_path / "out")
    for key in ("transplant_data", "tokenizer_data", "tokenizer"):
        for source in (str(private), "../private.txt"):
            hybrid = f"hybrid: {{transplant: mean, {key}: {source}}}\n"
            text = f"components: [a/b, b/c]\n{hybrid}data: {{data: text.txt}}\nstages: [finetune]\n"
            file = write(home / "x.yaml", text)
            for call in (read_recipe, partial(run_recipe, output_dir=tmp_path / "out")):
                with case(f"{key}: {source}"), pytest.raises(ManticoreError, match="not below the recipe's folder"):
                    call(file)
    assert not (tmp_path / "out").exists()
    for source in ("text.txt", "folder", "folder/a.txt", str(home / "text.txt")):
        assert os.path.samefile(data(source), home / source)
    assert data("org/texts") == "org/texts"


def test_a_data_set_is_no_reader_of_the_working_directory(tmp_path, monkeypatch):
    """`datasets` takes "json" or "pandas" for a reader of all that lies here; the latter runs pickles."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", '{"text": "mine"}')
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Canary(str(tmp_path / "ran"))))
    for name in (
        "json",
        "text",
        "csv",
        "pandas",
        "parquet",
        "https://evil.example/x",
        "a/../b",
        "../x",
        "a/b/c",
        "~/x",
    ):
        with pytest.raises(ManticoreError, match="no file or folder here, and no data set of the Hub"):
            list(read_records(DataArguments(name)))
    assert not (tmp_path / "ran").exists()


def test_a_data_set_names_no_files_of_its_readers(hub, owner, tmp_path):
    """Its card says which files it has, and its metadata which pictures: `datasets` refuses what is not in it."""
    secret, api = write(tmp_path / "secret.txt", "private\n"), HfApi()
    up = "../" * 12 + str(secret)
    for number, (named, works) in enumerate(
        (
            (str(secret), False),
            (f"file://{secret}", False),
            (up, False),
            ([{"split": "train", "path": str(secret)}], False),
            ("https://example.com/x.txt", False),
            ("train.txt", True),
        )
    ):
        repo = f"{owner}/texts{number}"
        card = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(named)}\n---\n"
        add_data(api, repo, {"README.md": card, "train.txt": "public\n"})
        for streaming in (False, True):
            with contextlib.nullcontext() if works else pytest.raises(ManticoreError, match="cannot be read as a Hub"):
                assert list(read_records(DataArguments(repo, streaming=streaming))) == [{"text": "public"}]
    for number, name in enumerate((str(secret), up)):
        repo = f"{owner}/pictures{number}"
        add_data(api, repo, {"metadata.jsonl": json.dumps({"file_name": name, "text": "x"}), "a.png": "no picture"})
        with pytest.raises(ManticoreError):
            list(read_records(DataArguments(repo)))


def add_data(api, repo, files):
    api.create_repo(repo, repo_type="dataset")
    for name, text in files.items():
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id=repo, repo_type="dataset")


def test_values_that_cannot_be_used_are_said_before_anything_runs(tmp_path):
    place = save_pair(tmp_path, 400)
    for settings, message in (
        ("optim: best", "best"),
        ("optim_args: x", "optim|x"),
        ("lr_scheduler_type: best", "best"),
        ("lr_scheduler_kwargs: {foo: 1}", "foo"),
        ("lr_scheduler_kwargs: 3", "int"),
        ("save_strategy: never", "never"),
        ("max_steps: " + "9" * 400, "finite number of a sensible size"),
        ("learning_rate: .nan", "finite number"),
        ("learning_rate: 1e999", "finite number"),
        ("per_device_train_batch_size: 0", "at least 1"),
        ("gradient_accumulation_steps: -3", "at least 1"),
        ("dataloader_num_workers: 100000", "at most 256"),
        ("adam_beta1: 7.0", "beta"),
        ("load_best_model_at_end: true, eval_strategy: 'no'", "load_best_model_at_end"),
    ):
        file = write(
            place / "x.yaml",
            "components: [neox, mamba]\ndata: {data: text.txt, block_size: 16}\nstages:\n"
            f"- finetune: {{{settings}}}\n",
        )
        with pytest.raises(ManticoreError, match=rf"stages.0.finetune.*({message})"):
            run_recipe(file, tmp_path / "out")
        assert not (tmp_path / "out").exists(), settings


def test_every_number_has_a_range(tmp_path, capsys):
    """Below and above what makes sense of it there is a sentence with file and line, and nothing is loaded."""

    def stage_text(stage, settings):
        text = f"components: [a/b]\ndata: {{data: t}}\nstages:\n- {stage}: {{{settings}}}\n"
        return write(tmp_path / "x.yaml", text)

    def numbers(types):
        return {key for key, kind in types.items() if {int, float} & set(kinds(kind))}

    stages, of_text = recipes._stage_keys(), numbers(recipes._types(DataArguments))
    assert set(RANGES) == of_text.union(numbers(recipes._types(ProgramSettings)), *map(numbers, stages.values()))
    for key, (low, high) in RANGES.items():
        stage = next((stage for stage, known in stages.items() if key in known), None)
        if stage is None:
            home, own = ("data", f"{{data: t, {key}: -7}}") if key in of_text else ("program", f"{{{key}: -7}}")
            text = f"components: [a/b]\n{home}: {own}\nhybrid: {{mixture: 'mad:copying'}}\nstages: []\n"
            with pytest.raises(ManticoreError, match=rf"x.yaml:2: {home}.{key}: is -7, must be "):
                load_recipe(write(tmp_path / "x.yaml", text))
            continue
        for value in (high * 2 + 1, low * 2 - 7, *[0] * (low > 0), ".nan", ".inf", "1e999"):
            if isinstance(value, float) and float not in kinds(stages[stage][key]):
                value = int(value)
            with pytest.raises(ManticoreError, match=rf"x.yaml:4: stages.0.{stage}.{key}: is .*, must be "):
                load_recipe(stage_text(stage, f"{key}: {value}"))
    for stage, settings in (
        ("finetune", "max_steps: 0"),
        ("finetune", "max_steps: -5"),
        ("finetune", "warmup_steps: 2.5"),
        ("finetune", "torch_compile_mode: x"),
        ("finetune", "metric_for_best_model: bleu"),
        ("finetune", "optim_target_modules: ['(a+)+$']"),
        ("finetune", "optim_target_modules: ['.*.*.*.*x']"),
        ("finetune", "gradient_checkpointing_kwargs: {context_fn: x}"),
        ("prune", "distil_weight: 1.5"),
    ):
        assert cli.main(["run", str(stage_text(stage, settings)), "--output-dir", str(tmp_path / "out")]) == 2
        assert f"stages.0.{stage}.{settings.partition(':')[0]}: is " in capsys.readouterr().err
    words = "--model me/nowhere --data nothing --output-dir".split() + [str(tmp_path / "out")]
    for option, value in (("--learning-rate", "nan"), ("--max-steps", "-5"), ("--per-device-train-batch-size", "0")):
        assert cli.main(["finetune", *words, option, value]) == 2
        assert f"{option} is {value}, must be " in capsys.readouterr().err
    for usual in (
        "max_steps: -1",
        "warmup_steps: 0.1",
        "warmup_steps: 2.0",
        "torch_compile_mode: reduce-overhead",
        "optim_target_modules: [attn, .*.mlp.*]",
        "metric_for_best_model: eval_loss/mixture",
    ):
        load_recipe(stage_text("finetune", usual))


def kinds(kind):
    return get_args(kind) or (kind,)


def test_training_arguments_that_can_be_used_pass(tmp_path):
    given = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    for more in ({"optim": "adafactor"}, {"lr_scheduler_type": "cosine", "warmup_steps": 0.1}, {"max_steps": 3}):
        assert check_training("x", SearchArguments, {**given, **more}).output_dir == str(tmp_path)


def test_what_must_be_a_name_is_one():
    for key in ("preset", "tokenizer_component"):
        for value in ([], ["x"], {"a": 1}, 3):
            with pytest.raises(ManticoreError, match=rf"{key}=.* must be a name"):
                ManticoreForCausalLM.from_components(["nobody/asks"], **{key: value})
