"""Code of a component's own repository: run for whom asks for it by name, at the pinned commit, and never else."""

import copy
import json

import clean_process
import pytest
import torch
from cases import case
from hub_models import assert_same_model, publish, read_json, tiny
from manticore_hf.modeling import code_manticore
from transformers import AutoModelForCausalLM

from manticore_hf import ComponentSpec, ManticoreConfig, ManticoreError, ManticoreForCausalLM

# An architecture that Transformers does not have: a GPT-NeoX whose logits are doubled.
CONFIGURATION = """
import pathlib
from transformers import LlamaConfig

pathlib.Path({canary!r}).touch()


class TwiceConfig(LlamaConfig):
    model_type = {kind!r}
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_twice import TwiceConfig


class TwiceForCausalLM(LlamaForCausalLM):
    config_class = TwiceConfig

    def __init__(self, config):
        super().__init__(config)
        self.version = {version}
"""
AUTO_MAP = {"AutoConfig": "configuration_twice.TwiceConfig", "AutoModelForCausalLM": "modeling_twice.TwiceForCausalLM"}


@pytest.fixture
def kind(owner):
    """A model type that no other test of this process has."""
    return f"twice_{owner}"


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "the code was run"


@pytest.fixture
def repo(hub, owner, tmp_path, kind, canary):
    """A component with code of its own. Returns its repo id."""
    put(hub, f"{owner}/twice", tmp_path, kind, canary)
    return f"{owner}/twice"


def put(hub, repo_id, tmp_path, kind, canary, version=1, auto_map=AUTO_MAP):
    def edit(folder):
        values = {**read_json(folder), "model_type": kind, "auto_map": auto_map, "architectures": ["TwiceForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "configuration_twice.py").write_text(CONFIGURATION.format(canary=str(canary), kind=kind))
        (folder / "modeling_twice.py").write_text(MODELING.format(version=version))

    return publish(hub, repo_id, tiny("llama"), tmp_path / f"src{version}", edit=edit)


def parts(repo, **options):
    return [ComponentSpec(repo, name="a", **options), ComponentSpec(tiny("mamba"), name="b")]


@pytest.fixture
def saved(repo, tmp_path):
    model = ManticoreForCausalLM.from_components(parts(repo, trust_remote_code=True), num_blocks=2)
    model.save_pretrained(tmp_path / "out")
    return model, tmp_path / "out"


@pytest.fixture
def stranger(monkeypatch, kind):
    """Forgets that the code was asked for, as another process would not know it."""

    def forget():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        monkeypatch.setattr(code_manticore, "_registered", {})
        monkeypatch.delitem(CONFIG_MAPPING._extra_content, kind)

    return forget


def test_without_a_request_nothing_is_run(repo, canary):
    with pytest.raises(ManticoreError, match="needs remote code.*trust_remote_code=True"):
        ManticoreForCausalLM.from_components([repo])
    assert not canary.exists()


def test_composed_saved_and_loaded(saved, repo, stranger, canary):
    model, folder = saved
    entry = read_json(folder)["components"][0]
    assert entry["code"] == AUTO_MAP and entry["weights"] == "reference"
    assert type(model.a).__name__ == "TwiceForCausalLM"
    assert "auto_map" not in entry["config"]
    canary.unlink()
    stranger()
    files = "configuration_twice.py, modeling_twice.py"
    with pytest.raises(ManticoreError, match=f"read {files} in {repo} at commit") as err:
        ManticoreForCausalLM.from_pretrained(folder)
    assert f"{entry['revision']}, then load with trust_component_code=['a']" in str(err.value) and not canary.exists()
    assert_same_model(ManticoreForCausalLM.from_pretrained(folder, trust_component_code=["a"]), model)


def test_through_auto_classes_and_as_remote_code(saved, stranger, tmp_path):
    stranger()
    loaded = AutoModelForCausalLM.from_pretrained(saved[1], trust_component_code=["a"])
    assert_same_model(loaded, saved[0])
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; "
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True, trust_component_code=['a']); "
        "torch.save(m(torch.arange(5)[None]).logits, sys.argv[2])"
    )
    done = clean_process.run(["-c", code, saved[1], tmp_path / "logits"], modules=clean_process.TRANSFORMERS)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path / "logits"), saved[0](torch.arange(5)[None]).logits, atol=1e-5)


def test_the_code_is_that_of_the_pinned_commit(saved, hub, repo, stranger, tmp_path, kind, canary):
    put(hub, repo, tmp_path, kind, canary, version=2)
    stranger()
    assert ManticoreForCausalLM.from_pretrained(saved[1], trust_component_code=["a"]).a.version == 1


def test_trust_is_for_components_that_need_it(saved, stranger):
    stranger()
    for names in (["b"], ["c"], [3], "b"):
        with pytest.raises(ManticoreError, match="trust_component_code.*is not a component that needs code"):
            ManticoreForCausalLM.from_pretrained(saved[1], trust_component_code=names)


def test_code_of_elsewhere_is_refused(hub, owner, tmp_path, kind, canary, saved, stranger):
    stranger()
    canary.unlink()
    found = read_json(saved[1])
    for reference in (
        "other/repo--modeling_x.X", "../x.X", "modeling_twice", "a.b.C", 3, None, "/etc/x.X", "https://x/y.Z",
    ):  # fmt: skip
        with case(reference):
            auto_map = {**AUTO_MAP, "AutoModelForCausalLM": reference}
            put(hub, f"{owner}/evil", tmp_path, kind, canary, version=3, auto_map=auto_map)
            with pytest.raises(ManticoreError, match="must be a class in a file of its own repository"):
                ManticoreForCausalLM.from_components(parts(f"{owner}/evil", trust_remote_code=True))
            values = copy.deepcopy(found)
            values["components"][0]["code"] = auto_map
            (saved[1] / "config.json").write_text(json.dumps(values))
            for options in ({}, {"trust_component_code": ["a"]}):
                with pytest.raises(ManticoreError, match="must be a class in a file of its own repository"):
                    ManticoreForCausalLM.from_pretrained(saved[1], **options)
            assert not canary.exists()


def test_hostile_entries_are_refused(saved, stranger, canary):
    stranger()
    canary.unlink()
    found = read_json(saved[1])
    for change in ({"revision": "main"}, {"repo_id": "../x"}, {"repo_id": None}, {"subfolder": "x"}, {"code": 3}):
        with case(change):
            values = copy.deepcopy(found)
            values["components"][0].update(change)
            (saved[1] / "config.json").write_text(json.dumps(values))
            with pytest.raises(ManticoreError, match="'a'"):
                ManticoreConfig.from_pretrained(saved[1], trust_component_code=["a"])
            assert not canary.exists()


def test_one_model_type_is_one_code(hub, owner, tmp_path, kind, canary, saved):
    put(hub, f"{owner}/other", tmp_path, kind, canary, version=4)
    with pytest.raises(ManticoreError, match="is used in this process by other code"):
        ManticoreForCausalLM.from_components(parts(f"{owner}/other", trust_remote_code=True))
    with pytest.raises(ManticoreError, match="needs remote code"):
        ManticoreForCausalLM.from_components([f"{owner}/other"])
    values = read_json(saved[1])
    values["components"][0]["code"] = None
    with pytest.raises(ManticoreError, match="another component's own code"):
        ManticoreConfig.from_dict(values)


def test_code_that_fails_says_which(hub, owner, tmp_path, kind, canary):
    put(hub, f"{owner}/broken", tmp_path, kind, canary, version="1 / 0 +")
    with pytest.raises(ManticoreError, match=f"{owner}/broken.*its code cannot be run"):
        ManticoreForCausalLM.from_components(parts(f"{owner}/broken", trust_remote_code=True))


def test_the_request_runs_nothing_where_transformers_has_the_architecture(hub, owner, tmp_path, canary):
    def edit(folder):
        values = {**read_json(folder), "auto_map": AUTO_MAP}
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "configuration_twice.py").write_text(CONFIGURATION.format(canary=str(canary), kind="x"))

    publish(hub, f"{owner}/known", tiny("llama"), tmp_path / "src", edit=edit)
    model = ManticoreForCausalLM.from_components(parts(f"{owner}/known", trust_remote_code=True))
    assert model.config.components[0]["code"] is None and not canary.exists()
