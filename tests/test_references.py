"""References that move, vanish or lie; and the configuration that carries them."""

import copy
import hashlib
import json
import os

import clean_process
import pytest
import torch
from hub_models import (
    INDEX,
    MODEL,
    assert_same_model,
    logits,
    nudge,
    publish,
    publish_hybrid,
    read_json,
    tiny,
    weight_requests,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from manticore_hf import ManticoreConfig, ManticoreError, ManticoreForCausalLM

TENSOR = "b.transformer.ln_f.weight"


@pytest.fixture
def saved(hub, owner, tmp_path):
    """A saved hybrid of two referenced components with one tuned tensor. Returns (model, folder)."""
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    publish(hub, f"{owner}/b", tiny("gpt2", 1), tmp_path / "src", max_shard_size="10KB")
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"])
    nudge(model, TENSOR).save_pretrained(tmp_path / "out")
    return model, tmp_path / "out"


def edit_config(folder, change):
    values = read_json(folder)
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


# ---- where the weights come from -------------------------------------------------------------------------------------


def test_pinned_commit_outlives_main(saved, hub, owner, tmp_path):
    model, folder = saved
    pinned = hub.head(f"{owner}/a")
    assert [entry["revision"] for entry in model.config.components] == [pinned, hub.head(f"{owner}/b")]
    publish(hub, f"{owner}/a", tiny("gpt_neox", 9), tmp_path / "moved")
    assert hub.head(f"{owner}/a") != pinned
    for cache in (None, tmp_path / "empty-cache"):
        assert_same_model(ManticoreForCausalLM.from_pretrained(folder, cache_dir=cache), model)


def test_branch_is_resolved_to_its_commit(hub, owner, tmp_path):
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    commit = publish(hub, f"{owner}/a", tiny("gpt_neox", 5), tmp_path / "src", branch="dev")
    model = ManticoreForCausalLM.from_components([f"{owner}/a@dev"])
    assert model.config.components[0]["revision"] == commit != hub.head(f"{owner}/a")
    assert torch.equal(model.a.lm_head.weight, tiny("gpt_neox", 5).lm_head.weight)
    by_commit = ManticoreForCausalLM.from_components([f"{owner}/a@{commit}"])
    assert_same_model(model.a, by_commit.a)


def test_subfolder(hub, owner, tmp_path):
    from manticore_hf import ComponentSpec

    tiny("gpt2").save_pretrained(tmp_path / "repo" / "inner")
    hub.add_repo(f"{owner}/a", tmp_path / "repo")
    model = ManticoreForCausalLM.from_components([ComponentSpec(f"{owner}/a", subfolder="inner")])
    model.save_pretrained(tmp_path / "out")
    assert read_json(tmp_path / "out")["components"][0]["subfolder"] == "inner"
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_local_files_only_after_caching(saved, hub, tmp_path):
    model, folder = saved
    hub.clear_requests()
    assert_same_model(ManticoreForCausalLM.from_pretrained(folder, local_files_only=True), model)
    assert not hub.requests
    with pytest.raises(ManticoreError, match="Component 'a'.*not in the local cache.*go online"):
        ManticoreForCausalLM.from_pretrained(folder, local_files_only=True, cache_dir=tmp_path / "empty")


OFFLINE = """
import sys, torch
from manticore_hf import ManticoreForCausalLM
model = ManticoreForCausalLM.from_pretrained(sys.argv[1])
torch.save(model.state_dict(), sys.argv[2])
model.save_pretrained(sys.argv[3])
repos = [entry["repo_id"] for entry in model.config.components]
again = ManticoreForCausalLM.from_components(repos)
assert again.config.components == model.config.components
"""


def test_offline_process(saved, hub, owner, tmp_path, monkeypatch):
    model, folder = saved
    publish_hybrid(hub, f"{owner}/hybrid", folder)
    ManticoreForCausalLM.from_pretrained(f"{owner}/hybrid")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.clear_requests()
    command = ["-c", OFFLINE, f"{owner}/hybrid", tmp_path / "state.pt", tmp_path / "again"]
    done = clean_process.run(command, modules=clean_process.TORCH)
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (tmp_path / "again" / MODEL).read_bytes() == (folder / MODEL).read_bytes()


def test_cache_dir_is_used_for_components_and_at_saving(saved, hub, tmp_path):
    model, folder = saved
    loaded = ManticoreForCausalLM.from_pretrained(folder, cache_dir=tmp_path / "cache")
    hub.clear_requests()
    loaded.save_pretrained(tmp_path / "again")
    assert not weight_requests(hub)
    assert (tmp_path / "again" / MODEL).read_bytes() == (folder / MODEL).read_bytes()


# ---- errors at loading -----------------------------------------------------------------------------------------------


def refused(folder, tmp_path, match):
    with pytest.raises(ManticoreError, match=f"(?s){match}"):
        ManticoreForCausalLM.from_pretrained(folder, cache_dir=tmp_path / "empty")


def test_missing_repository(saved, tmp_path, owner):
    def change(values):
        values["components"][0]["repo_id"] = f"{owner}/gone"

    edit_config(saved[1], change)
    refused(saved[1], tmp_path, rf"Component 'a' \({owner}/gone@.*404: it is gone, or private")


def test_missing_commit(saved, tmp_path):
    edit_config(saved[1], lambda values: values["components"][0].update(revision="0" * 40))
    refused(saved[1], tmp_path, "Component 'a' .*@000000000000.*cannot be read")


def test_missing_shard(saved, hub, tmp_path):
    hub.fault("b/resolve/.*-00002-of-", "missing", times=-1)
    refused(saved[1], tmp_path, "Component 'b'.*cannot be read")


def test_gated_component(saved, hub, owner, tmp_path):
    hub.fault(f"{owner}/a/resolve", "gated", times=-1)
    refused(saved[1], tmp_path, "Component 'a'.*is gated: ask for access on its page, then log in")


def test_server_error(saved, hub, owner, tmp_path):
    hub.fault(f"{owner}/a/resolve", "status", times=-1, status=400)
    refused(saved[1], tmp_path, "Component 'a'.*cannot be")


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"x": "../../secret.safetensors"}}', '{"weight_map": 3}'])
def test_bad_index(saved, hub, owner, tmp_path, index):
    files = {**hub.files(f"{owner}/b"), INDEX: index.encode()}
    commit = hub.add_repo(f"{owner}/b", files)
    edit_config(saved[1], lambda values: values["components"][1].update(revision=commit, files=None))
    refused(saved[1], tmp_path, "Component 'b'.*not an index of safetensors files")


def with_weights(hub, owner, folder, change):
    """Points the hybrid at a commit of component a with other weights, as if they were the ones it was made with."""
    (folder / "other").mkdir()
    (folder / "other" / MODEL).write_bytes(hub.files(f"{owner}/a")[MODEL])
    tensors = load_file(folder / "other" / MODEL)
    change(tensors)
    save_file(tensors, folder / "other" / MODEL, {"format": "pt"})
    files = {**hub.files(f"{owner}/a"), MODEL: (folder / "other" / MODEL).read_bytes()}
    commit, digest = hub.add_repo(f"{owner}/a", files), hashlib.sha256(files[MODEL]).hexdigest()
    edit_config(folder, lambda values: values["components"][0].update(revision=commit, files={MODEL: digest}))


def test_wrong_shape(saved, hub, owner, tmp_path):
    def change(tensors):
        tensors["gpt_neox.final_layer_norm.weight"] = torch.ones(5)

    with_weights(hub, owner, saved[1], change)
    refused(saved[1], tmp_path, rf"Component 'a' \({owner}/a@.*a.gpt_neox.final_layer_norm.weight: \(5,\).*\(16,\)")


def test_missing_tensor(saved, hub, owner, tmp_path):
    with_weights(hub, owner, saved[1], lambda tensors: tensors.pop("embed_out.weight"))
    refused(saved[1], tmp_path, "Component 'a'.*a.lm_head.weight.*incomplete")


def test_corrupt_component(saved, hub, owner, tmp_path):
    files = {**hub.files(f"{owner}/a"), MODEL: hub.files(f"{owner}/a")[MODEL][:-100]}
    commit = hub.add_repo(f"{owner}/a", files)
    edit_config(saved[1], lambda values: values["components"][0].update(revision=commit, files=None))
    refused(saved[1], tmp_path, "Component 'a'.*not a readable safetensors file.*Delete it")


def test_corrupt_own_file(saved, tmp_path):
    whole = (saved[1] / MODEL).read_bytes()
    (saved[1] / MODEL).write_bytes(whole[: len(whole) // 2])
    refused(saved[1], tmp_path, "hybrid's own weights.*not a readable safetensors file")


def test_own_file_without_its_tensors(saved, tmp_path):
    tensors = load_file(saved[1] / MODEL)
    tensors.pop("hybrid_mixer.alpha_logits")
    save_file(tensors, saved[1] / MODEL, {"format": "pt"})
    refused(saved[1], tmp_path, "hybrid's own weights.*hybrid_mixer.alpha_logits.*incomplete")


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_config_holds_everything_and_nothing_else(saved, hub, owner, tmp_path):
    model, folder = saved
    text = (folder / "config.json").read_text()
    assert str(tmp_path) not in text and os.environ["HF_TOKEN"] not in text and os.environ["HF_HOME"] not in text
    values = json.loads(text)
    for entry, name in zip(values["components"], "ab"):
        original = json.loads(hub.files(f"{owner}/{name}")["config.json"])
        original.pop("transformers_version")
        sub = {**entry["config"]}
        assert {key: sub[key] for key in original} == original
        assert {key: entry[key] for key in ("name", "repo_id", "weights")} == {
            "name": name,
            "repo_id": f"{owner}/{name}",
            "weights": "reference",
        }
    heads = ("CausalLM", "SequenceClassification", "TokenClassification", "Decision")
    heads = {f"AutoModelFor{head}" for head in heads}
    assert "a" not in values and set(values["auto_map"]) == {"AutoConfig", "AutoModel"} | heads


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "mamba", "mamba2", "jamba"])
def test_config_round_trip(family, tmp_path):
    sub = tiny(family).config
    config = ManticoreConfig(components=[{"name": "one", "config": sub}], num_blocks=2)
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    for again in (AutoConfig.from_pretrained(tmp_path), ManticoreConfig.from_dict(config.to_dict())):
        assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        assert again.one.to_dict() == config.one.to_dict() and type(again.one) is type(sub)
    if family == "mamba2":
        assert again.one.time_step_limit[1] == float("inf")
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_newer_format_is_refused(saved):
    edit_config(saved[1], lambda values: values.update(manticore_version=2))
    with pytest.raises(ManticoreError, match="format version 2.*reads up to 1.*Upgrade manticore-hf"):
        ManticoreForCausalLM.from_pretrained(saved[1])


HOSTILE = [
    ("repo_id", "../x"), ("repo_id", "/abs"), ("repo_id", "file:///etc"), ("repo_id", "https://evil.example/a/b"),
    ("repo_id", "a/b/c"), ("repo_id", "a/.."), ("repo_id", "C:\\x"), ("repo_id", "."), ("repo_id", ""),
    ("repo_id", 7), ("repo_id", "a/b\n"), ("revision", None), ("revision", "0" * 39),
    ("revision", "../" + "0" * 37), ("revision", "A" * 40), ("revision", "0" * 40 + "\n"), ("subfolder", "../up"),
    ("subfolder", "/abs"), ("subfolder", "a/../b"), ("subfolder", 3), ("subfolder", "x\n"),
]  # fmt: skip


@pytest.mark.parametrize("key, value", HOSTILE)
def test_hostile_reference_is_refused(key, value):
    entry = {"name": "one", "config": tiny("gpt2").config, "repo_id": "a/b", "revision": "0" * 40}
    ManticoreConfig(components=[entry])
    with pytest.raises(ManticoreError, match="Component 'one'.*" + key):
        ManticoreConfig(components=[{**entry, "weights": "reference", key: value}])


def test_hostile_config_is_refused_before_any_request(saved, hub):
    edit_config(saved[1], lambda values: values["components"][0].update(repo_id="../x"))
    hub.clear_requests()
    with pytest.raises(ManticoreError, match="not a Hub repository id"):
        ManticoreForCausalLM.from_pretrained(saved[1])
    assert not hub.requests


@pytest.mark.parametrize("name", ["config", "to_dict", "a-b", "_x", "class", "1a", "", None, "a.b", "hybrid_mixer"])
def test_component_name_that_cannot_be_an_attribute(name):
    with pytest.raises(ManticoreError, match="Component name"):
        ManticoreConfig(components=[{"name": name, "config": tiny("gpt2").config}])


def test_logits_do_not_depend_on_where_it_was_loaded(saved, hub, owner):
    model, folder = saved
    publish_hybrid(hub, f"{owner}/hybrid", folder)
    assert torch.equal(logits(ManticoreForCausalLM.from_pretrained(f"{owner}/hybrid")), logits(model))
