"""What was fetched is what was meant: recorded SHA-256s, damage on the way, a Hub that is busy, revisions that move."""

import hashlib

import pytest
import torch
from hub_models import MODEL, assert_same_model, nudge, publish, publish_hybrid, read_json, tiny
from manticore_hf.modeling import references_manticore
from test_references import edit_config, refused

from manticore_hf import ComponentSpec, ManticoreConfig, ManticoreError, ManticoreForCausalLM


@pytest.fixture
def saved(hub, owner, tmp_path):
    """A saved hybrid of a component in one file and one in shards. Returns (model, folder)."""
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    publish(hub, f"{owner}/b", tiny("gpt2", 1), tmp_path / "src", max_shard_size="10KB")
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"])
    model.save_pretrained(tmp_path / "out")
    return model, tmp_path / "out"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(references_manticore, "_WAITS", (0.01, 0.01))


def load(folder, tmp_path):
    return ManticoreForCausalLM.from_pretrained(folder, cache_dir=tmp_path / "empty")


# ---- what is recorded ------------------------------------------------------------------------------------------------


def test_every_referenced_file_is_recorded(saved, hub, owner):
    one, other = read_json(saved[1])["components"]
    for entry, count in ((one, 1), (other, 4)):
        files = hub.files(entry["repo_id"])
        wanted = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if "safetensors" in name}
        assert entry["files"] == wanted and len(wanted) >= count
    assert "model.safetensors.index.json" in other["files"]


def test_embedded_components_have_nothing_to_record(hub, owner, tmp_path):
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    spec = ComponentSpec(f"{owner}/a", embed=True)
    model = ManticoreForCausalLM.from_components([spec, ComponentSpec(tiny("gpt2"), name="b")])
    assert [entry["files"] for entry in model.config.components] == [None, None]


def test_without_a_record_loading_works_as_ever(saved, tmp_path):
    edit_config(saved[1], lambda values: [entry.pop("files") for entry in values["components"]])
    assert_same_model(load(saved[1], tmp_path), saved[0])


def test_another_file_than_recorded(saved, tmp_path):
    def change(values):
        values["components"][1]["files"]["model-00002-of-00004.safetensors"] = "0" * 64

    assert "model-00002-of-00004.safetensors" in saved[0].config.components[1]["files"]
    edit_config(saved[1], change)
    refused(saved[1], tmp_path, "Component 'b'.*model-00002-of-00004.safetensors is not the file this hybrid was made")


@pytest.mark.parametrize(
    "files",
    [
        3,
        [],
        {},
        {"model.safetensors": 3},
        {"model.safetensors": "A" * 64},
        {"model.safetensors": None},
        {"../x.safetensors": "0" * 64},
        {"/etc/x.safetensors": "0" * 64},
        {"pytorch_model.bin": "0" * 64},
        {"model.safetensors": "0" * 64, "a/b.safetensors": "0" * 64},
        {"https://x/y.safetensors": "0" * 64},
    ],
)
def test_hostile_record(files):
    entry = {"name": "one", "config": tiny("gpt2").config, "repo_id": "a/b", "revision": "0" * 40}
    with pytest.raises(ManticoreError, match="Component 'one'.*(files|SHA-256)"):
        ManticoreConfig(components=[{**entry, "files": files}])


# ---- damage on the way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 9, 5000])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_flipped_byte_is_noticed_and_forgotten(saved, hub, owner, tmp_path, offset, recorded):
    model, folder = saved
    if not recorded:
        edit_config(folder, lambda values: [entry.pop("files") for entry in values["components"]])
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "flip", offset=offset)
    refused(folder, tmp_path, "Component 'a'.*model.safetensors is damaged.*load again")
    assert_same_model(load(folder, tmp_path), model)


def test_composing_notices_a_flipped_byte(hub, owner, tmp_path):
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "flip", offset=5000)
    with pytest.raises(ManticoreError, match="Component 'a'.*model.safetensors is damaged"):
        ManticoreForCausalLM.from_components([f"{owner}/a"])
    model = ManticoreForCausalLM.from_components([f"{owner}/a"])
    assert torch.equal(model.a.lm_head.weight, tiny("gpt_neox").lm_head.weight)


def test_a_file_cut_off_is_fetched_to_its_end(saved, hub, owner, tmp_path):
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "cut", bytes=700)
    assert_same_model(load(saved[1], tmp_path), saved[0])


def test_a_file_cut_off_for_good(saved, hub, owner, tmp_path):
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "cut", times=-1, bytes=0)
    refused(saved[1], tmp_path, "Component 'a'.*cannot be (read|reached)")
    hub.clear_faults()
    assert_same_model(load(saved[1], tmp_path), saved[0])


def test_a_truncated_file(saved, hub, owner, tmp_path):
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "truncate", times=-1)
    refused(saved[1], tmp_path, "Component 'a'")
    hub.clear_faults()
    assert_same_model(load(saved[1], tmp_path), saved[0])


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_busy_hub_is_asked_again(saved, hub, owner, tmp_path, impatient, status, method):
    hub.fault(f"{method} /{owner}/a/resolve/.*safetensors", "status", times=2, status=status)
    assert_same_model(load(saved[1], tmp_path), saved[0])


def test_a_hub_that_stays_busy(saved, hub, owner, tmp_path, impatient):
    hub.fault(f"GET /{owner}/b/resolve/.*safetensors", "status", times=-1, status=503)
    refused(saved[1], tmp_path, "Component 'b'.*503")


# ---- revisions that move ---------------------------------------------------------------------------------------------


def test_a_branch_warns_and_is_pinned(saved, hub, owner, tmp_path, caplog):
    model, folder = saved
    edit_config(folder, lambda values: values["components"][0].update(revision="main"))
    loaded = load(folder, tmp_path)
    assert "Component 'a'" in caplog.text and "'main', which can move" in caplog.text
    loaded.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again")["components"][0]["revision"] == hub.head(f"{owner}/a")
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_a_branch_that_has_moved_is_not_what_was_recorded(saved, hub, owner, tmp_path):
    edit_config(saved[1], lambda values: values["components"][0].update(revision="main"))
    publish(hub, f"{owner}/a", tiny("gpt_neox", 7), tmp_path / "other")
    refused(saved[1], tmp_path, "Component 'a'.*not the file this hybrid was made with")


def test_a_branch_that_cannot_be_pinned_is_not_saved(hub, owner, tmp_path):
    entry = {"name": "one", "config": tiny("gpt2").config, "repo_id": f"{owner}/nowhere", "revision": "main"}
    model = ManticoreForCausalLM(ManticoreConfig(components=[entry]))
    with pytest.raises(ManticoreError, match="Component 'one'.*can move.*nothing was saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tuned_weights_do_not_need_the_component(saved, hub, owner, tmp_path):
    """What is in the hybrid's own file is loaded even where a component is gone."""
    model, folder = saved
    nudge(model, *(name for name, _ in model.named_parameters() if name.startswith("a.")))
    model.save_pretrained(folder)
    publish_hybrid(hub, f"{owner}/tuned", folder)
    hub.fault(f"/{owner}/a/", "missing", times=-1, code="RepoNotFound")
    assert_same_model(load(f"{owner}/tuned", tmp_path), model)
    assert MODEL in hub.files(f"{owner}/tuned")
