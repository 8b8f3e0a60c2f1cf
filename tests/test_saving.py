"""A save is all or nothing; what is on disk or on the Hub always loads."""

import os
import signal
import subprocess
import time
from pathlib import Path

import clean_process
import pytest
import torch
from hub_models import MODEL, assert_same_model, component_keys, logits, nudge, publish, read_json, saved_keys, tiny
from manticore_hf.modeling import weights_manticore
from manticore_hf.modeling.carried_manticore import ENTRY, PARTS
from transformers import modeling_utils

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.utils import saving

TENSOR = "a.gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
FILES = {file.stem for file in Path(weights_manticore.__file__).parent.glob("*_manticore.py")}
CODE = {
    f"{name}.py" for name in {*(FILES - set(PARTS)), "modeling_manticore", "outputs_manticore", "gate_manticore"}
} | {ENTRY}


@pytest.fixture
def model(hub, owner, tmp_path):
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    publish(hub, f"{owner}/b", tiny("gpt2", 1), tmp_path / "src")
    return ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"])


def scratch_folders(folder):
    return [path for path in folder.rglob("*") if ".saving-" in path.name]


def break_writing(monkeypatch, after=0):
    """Lets `after` weight files be written, then fails as a full disk would."""
    real, count = modeling_utils.safe_save_file, [0]

    def fail(*args, **kwargs):
        count[0] += 1
        if count[0] > after:
            raise OSError("No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", fail)


def test_files_of_a_save(model, tmp_path):
    for _ in range(2):  # a new directory, and one that is there
        model.save_pretrained(tmp_path / "out")
        assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {oct(0o666 & ~_umask())}
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == CODE | {"config.json", "generation_config.json", MODEL}
    assert not scratch_folders(tmp_path)
    assert oct((tmp_path / "out").stat().st_mode & 0o777) == oct(0o777 & ~_umask())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("after", [0, 1])
def test_failed_save_leaves_the_old_one(model, tmp_path, monkeypatch, after):
    model.save_pretrained(tmp_path / "out", max_shard_size="2KB")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    expected = logits(model)
    nudge(model, *dict(model.named_parameters()))
    with monkeypatch.context() as patch:
        break_writing(patch, after)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "new").exists() and not scratch_folders(tmp_path)
    assert torch.equal(logits(ManticoreForCausalLM.from_pretrained(tmp_path / "out")), expected)
    # Nothing of the failure sticks to the model.
    model.save_pretrained(tmp_path / "out")
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), model)


KILLED = """
import os, sys, torch
from transformers import modeling_utils
from manticore_hf import ManticoreForCausalLM
model = ManticoreForCausalLM.from_pretrained(sys.argv[1])
for parameter in model.parameters():
    parameter.data.add_(1)
real = modeling_utils.safe_save_file
def save(*args, **kwargs):
    real(*args, **kwargs)
    print("written", flush=True)
    sys.stdin.read()  # never ends: the parent kills
modeling_utils.safe_save_file = save
model.save_pretrained(sys.argv[1], max_shard_size="20KB")
"""


def test_killed_while_saving(model, hub, owner, tmp_path):
    model.save_pretrained(tmp_path / "out")
    process = clean_process.start(["-c", KILLED, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "written\n"
    assert len([path for path in scratch_folders(tmp_path) if path.parent == tmp_path]) == 1
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), model)
    # Another save in the same place clears up what the dead process left.
    model.save_pretrained(tmp_path / "out")
    assert not scratch_folders(tmp_path)


def test_scratch_of_a_living_process_is_left_alone(model, tmp_path):
    with saving.whole_directory(tmp_path / "out", True) as other:
        Path(other, "config.json").write_text("{}")
        with saving.whole_directory(tmp_path / "out", True):
            assert len(list(tmp_path.glob(".out.saving-*"))) == 2
    assert (tmp_path / "out" / "config.json").read_text() == "{}" and not scratch_folders(tmp_path)


def test_other_files_stay(model, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    mine = ["optimizer.pt", "model_notes.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"]
    for name in (*mine, "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text("x")
    model.save_pretrained(folder)
    names = {file.name for file in folder.iterdir()}
    assert set(mine) <= names and MODEL in names
    assert not any("-of-" in name or "index" in name for name in names)


def test_relative_current_and_linked_directories(model, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    model.save_pretrained(".")
    assert (tmp_path / "real" / "config.json").is_file()
    model.save_pretrained("../link")
    model.save_pretrained("deep/er")
    assert (tmp_path / "link").is_symlink() and not scratch_folders(tmp_path)
    assert_same_model(ManticoreForCausalLM.from_pretrained("deep/er"), model)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_parent_that_cannot_be_written(model, tmp_path):
    (tmp_path / "locked" / "out").mkdir(parents=True)
    (tmp_path / "locked").chmod(0o555)
    try:
        model.save_pretrained(tmp_path / "locked" / "out")
        assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "locked" / "out"), model)
    finally:
        (tmp_path / "locked").chmod(0o755)


def test_path_that_is_a_file(model, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ManticoreError, match="out.*there is a file of that name; give a directory"):
        model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_other_ranks_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists() and not scratch_folders(tmp_path)


def test_tensors_that_cannot_be_compared_are_written(model):
    class Quantised(torch.Tensor):
        """Stands for DTensor and the quantisers' subclasses."""

    state = model.state_dict()
    assert TENSOR in model.unchanged_keys(state)
    weight = state[TENSOR]
    for other in (
        weight.to("meta"),
        weight.as_subclass(Quantised),
        torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        weight.to_sparse(),
        weight[:1],
        weight.half(),
        -weight,
        torch.full_like(weight, float("nan")),
    ):
        assert TENSOR not in model.unchanged_keys({**state, TENSOR: other})


def test_sign_of_zero_is_a_change(hub, owner, tmp_path):
    source = tiny("gpt_neox")
    key = "gpt_neox.final_layer_norm.bias"
    source.get_parameter(key).data.zero_()
    publish(hub, f"{owner}/a", source, tmp_path / "src")
    model = ManticoreForCausalLM.from_components([f"{owner}/a"])
    assert f"a.{key}" in model.unchanged_keys()
    model.get_parameter(f"a.{key}").data.neg_()
    assert f"a.{key}" not in model.unchanged_keys()


def test_reference_that_cannot_be_read_is_written(model, hub, owner, tmp_path, caplog):
    model._component_cache_dir = str(tmp_path / "empty")
    hub.fault(f"{owner}/b/resolve/.*safetensors", "status", times=-1, status=400)
    modeling_utils.logging.enable_propagation()
    try:
        model.save_pretrained(tmp_path / "out")
    finally:
        modeling_utils.logging.disable_propagation()
    assert "Component 'b'" in caplog.text and "saved with the hybrid" in caplog.text
    keys = component_keys(tmp_path / "out")
    assert keys == {k for k in model.state_dict() if k.startswith("b.")} - {"b.lm_head.weight"}
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_push_to_hub(model, hub, owner, tmp_path):
    nudge(model, TENSOR)
    model.push_to_hub(f"{owner}/pushed")
    files = hub.files(f"{owner}/pushed")
    assert CODE | {"config.json", "generation_config.json", MODEL, "README.md"} <= set(files)
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/pushed"), model)
    commit = hub.head(f"{owner}/pushed")
    nudge(model, TENSOR)
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=f"{owner}/pushed", commit_message="Second")
    assert hub.head(f"{owner}/pushed") != commit
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/pushed"), model)
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), model)


@pytest.mark.parametrize("first,second", [("1KB", "50GB"), ("50GB", "1KB")])
def test_a_push_replaces_the_weight_files_of_an_earlier_one(model, hub, owner, first, second):
    repo = f"{owner}/resharded"
    model.push_to_hub(repo, max_shard_size=first)
    nudge(model, TENSOR)
    with torch.no_grad():
        model.hybrid_mixer.alpha_logits.add_(1.0)
    model.push_to_hub(repo, max_shard_size=second)
    weights = {file for file in hub.files(repo) if "safetensors" in file}
    assert (weights == {MODEL}) == (second == "50GB") and (MODEL in weights) == (second == "50GB")
    assert_same_model(ManticoreForCausalLM.from_pretrained(repo), model)


def test_push_to_a_branch_and_as_a_pull_request(model, hub, owner):
    repo = f"{owner}/branched"
    model.push_to_hub(repo)
    main = hub.head(repo)
    nudge(model, TENSOR)
    model.push_to_hub(repo, revision="next")
    assert hub.head(repo) == main and hub.head(repo, "next") != main
    assert_same_model(ManticoreForCausalLM.from_pretrained(repo, revision="next"), model)
    model.push_to_hub(repo, create_pr=True)
    assert hub.head(repo) == main


def test_save_with_upload_sends_only_what_it_wrote(model, hub, owner, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "optimizer.pt").write_text("mine")
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=f"{owner}/new", private=True)
    assert "optimizer.pt" not in hub.files(f"{owner}/new") and "config.json" in hub.files(f"{owner}/new")


def test_dates_in_the_future_delete_nothing(model, hub, owner, tmp_path):
    """A clock that was set back, or `cp -p`: the files that a save replaces are dated later than now."""
    folder, later = tmp_path / "out", time.time() + 3600
    nudge(model, TENSOR)
    for number in range(2):
        model.save_pretrained(folder, push_to_hub=True, repo_id=f"{owner}/later")
        files = hub.files(f"{owner}/later")
        assert files[MODEL] == (folder / MODEL).read_bytes()
        assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/later"), model)
        (folder / "notes.txt").write_text(f"mine {number}")
        for path in folder.iterdir():
            os.utime(path, (later, later))
        with torch.no_grad():
            model.hybrid_mixer.alpha_logits.add_(1.0)
    assert "notes.txt" not in files


def test_failed_upload_keeps_the_saved_files(model, hub, owner, tmp_path):
    nudge(model, TENSOR)
    hub.fault("POST .*/commit/", "status", times=-1, status=403)
    with pytest.raises(Exception, match="403"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=f"{owner}/refused")
    assert component_keys(tmp_path / "out") == {TENSOR}
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_same_bytes_for_the_same_model(model, tmp_path):
    nudge(model, TENSOR)
    model.save_pretrained(tmp_path / "one")
    ManticoreForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / MODEL).read_bytes() == (tmp_path / "two" / MODEL).read_bytes()
    assert read_json(tmp_path / "one") == read_json(tmp_path / "two")
    assert saved_keys(tmp_path / "one") == saved_keys(tmp_path / "two")
