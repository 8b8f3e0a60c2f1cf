"""What a repository carries: the code that its kind of hybrid needs, which is enough for it, and no other."""

import ast
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import clean_process
import families
import pytest
import torch
from carried_kinds import KINDS
from cases import case
from hub_models import read_json
from manticore_hf.modeling import carried_manticore, layer_stack_manticore
from manticore_hf.modeling import mixers_manticore as mixers
from manticore_hf.modeling.carried_manticore import ENTRY, PARTS
from manticore_hf.modeling.components_manticore import find_stack
from manticore_hf.modeling.segments_manticore import Whole

from manticore_hf import ManticoreConfig, ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.hub.provenance import repository
from manticore_hf.utils.carried import BY_ARCHITECTURE, carried, copy_code
from manticore_hf.utils.positions import position_tables

CODE = Path(carried_manticore.__file__).parent
IDS = torch.randint(3, 48, (2, 8), generator=torch.Generator().manual_seed(1))


def imports(file):
    """Siblings that a file imports, anywhere in it."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{kind: (folder, model)}."""
    root, out = tmp_path_factory.mktemp("kinds"), {}
    for number, (kind, make) in enumerate(KINDS.items()):
        model = make(root / f"parts-{number}")
        model.save_pretrained(root / f"kind-{number}")
        out[kind] = root / f"kind-{number}", model
    return out


# ---- the files -------------------------------------------------------------------------------------------------------


def test_nothing_imports_an_optional_file_but_optional_ones():
    for file in CODE.glob("[!_]*.py"):
        if file.stem not in PARTS:
            assert not imports(file) & set(PARTS), file.name
    assert all((CODE / f"{name}.py").is_file() for name in PARTS)


def test_the_entry_file_reaches_all_that_is_carried_and_nothing_that_is_not(saved):
    """Transformers copies what a file imports, directly or not: what is missing there cannot be loaded."""
    for kind, (folder, _) in saved.items():
        with case(kind):
            there = {file.stem for file in folder.glob("*.py")}
            seen, waiting = set(), [ENTRY.removesuffix(".py")]
            while waiting:
                name = waiting.pop()
                if name not in seen:
                    seen.add(name)
                    waiting += imports(folder / f"{name}.py")
            assert seen == there
            always = {file.stem for file in CODE.glob("*_manticore.py")} - set(PARTS)
            assert there == {*always, *carried(ManticoreConfig.from_pretrained(folder)), ENTRY.removesuffix(".py")}
            names = {value.partition(".")[0] for value in read_json(folder)["auto_map"].values()}
            assert names == {ENTRY.removesuffix(".py")}


def test_kinds_carry_what_they_need(saved):
    wanted = {
        "one block, attention only": set(),
        "one block, a Mamba": {"mixers_manticore", "scan_manticore"},
        "one block, a Mamba-2": {"mixers_manticore", "ssd_manticore"},
        "online, a Mamba": {"mixers_manticore", "scan_manticore", "past_losses"},
        "aligned, attention only": {name for name in PARTS if name.startswith("aligned_")},
        "two blocks, attention only": {"layer_stack_manticore", "projectors_manticore", "shared_manticore"},
        "pruned, a Mamba": {f"{name}_manticore" for name in ("layer_stack", "path", "projectors", "mixers", "scan")},
    }
    for kind, names in wanted.items():
        with case(kind):
            usual = {"modeling_manticore", "outputs_manticore", "gate_manticore"}
            assert set(carried(saved[kind][1].config)) - usual == names
    classifier = {file.stem for file in saved["classifier, a Mamba"][0].glob("*.py")}
    assert "heads_manticore" in classifier and not {"modeling_manticore", "outputs_manticore"} & classifier


@pytest.mark.parametrize("family", families.representatives(families.FAMILIES))
def test_what_is_told_from_a_configuration_is_so(family):
    """Which mixers a model has, and which tables of positions, is found without running it on nothing."""
    model = families.tiny(family)
    config = SimpleNamespace(component_names=["a"], a=model.config, architectures=None)
    called = [mixers._called(type(module).forward) for module in model.modules()]
    names = {name for one in called for name, _, _ in one}
    assert BY_ARCHITECTURE["mixers_manticore"](config) == bool(names)
    if "mamba_selective_scan" in names:
        assert BY_ARCHITECTURE["scan_manticore"](config)
    if {"mamba2_chunk_scan", "mamba2_selective_state_update"} & names:
        assert BY_ARCHITECTURE["ssd_manticore"](config)
    looked, told = layer_stack_manticore.find_layout(model), find_stack(model)
    for key in ("path", "layers", "cache_argument", "positions", "attends"):
        assert getattr(looked, key) == getattr(told, key)
    whole = Whole(model, told, 0, len(getattr(model.get_submodule(told.path), told.layers)))
    modules = whole.stack._modules
    found = [modules[name] for name, cls in looked.before.items() if cls is layer_stack_manticore.NoPosition]
    assert position_tables(whole) == [one for one in found if isinstance(one, torch.nn.Embedding)]


# ---- without the package ---------------------------------------------------------------------------------------------

LIVE = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
output, ids, *folders = sys.argv[1:]
ids, found = torch.load(ids), {}

def facts(model):
    model.eval()
    with torch.no_grad():
        out = {"logits": model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits}
    if model.can_generate():
        mask = torch.ones_like(ids[:1])
        out["text"] = model.generate(ids[:1], max_new_tokens=4, do_sample=False, attention_mask=mask)
    return out

for folder in folders:
    auto = AutoModelForSequenceClassification if "classifier" in folder else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__ and not any(info.values()), info
    found[folder] = {"before": facts(model)}
    model.train()
    labels = torch.tensor([0, 2]) if auto is not AutoModelForCausalLM else ids
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    found[folder]["trained"] = facts(model)
    model.save_pretrained(folder + "-again")
    model.save_pretrained(folder + "-again")  # over what is there
    found[folder]["again"] = facts(auto.from_pretrained(folder + "-again", trust_remote_code=True))
assert "manticore_hf" not in sys.modules
torch.save(found, output)
"""


def run(script, tmp_path, *arguments):
    done = clean_process.run(
        ["-c", script, tmp_path / "out.pt", *arguments], cwd=tmp_path, timeout=580, modules=clean_process.TRANSFORMERS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(tmp_path / "out.pt")


def facts(model, ids):
    with torch.no_grad():
        out = {"logits": model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits}
    if model.can_generate():
        mask = torch.ones_like(ids[:1])
        out["text"] = model.generate(ids[:1], max_new_tokens=4, do_sample=False, attention_mask=mask)
    return out


@pytest.mark.slow
def test_every_kind_lives_without_the_package(saved, tmp_path):
    """It loads as remote code, computes the same, generates, trains; what is saved there carries and gives the same."""
    folders = {}
    for number, (kind, (folder, _)) in enumerate(saved.items()):
        name = f"classifier-{number}" if "classifier" in kind else f"kind-{number}"
        folders[kind] = shutil.copytree(folder, tmp_path / name)
    torch.save(IDS, tmp_path / "ids.pt")
    found = run(LIVE, tmp_path, tmp_path / "ids.pt", *folders.values())
    for kind, folder in folders.items():
        with case(kind):
            one, wanted = found[str(folder)], facts(saved[kind][1], IDS)
            for key in wanted:  # to the rounding of what the package has faster ways to compute
                torch.testing.assert_close(one["before"][key], wanted[key], rtol=1e-5, atol=1e-5)
                assert torch.equal(one["again"][key], one["trained"][key])
            assert not torch.equal(one["trained"]["logits"], wanted["logits"])
            again = folder.with_name(folder.name + "-again")
            code = [{file.name: file.read_bytes() for file in one.glob("*.py")} for one in (folder, again)]
            assert code[0] == code[1] and len(code[0]) > 15
            ours = type(saved[kind][1]).from_pretrained(again)
            torch.testing.assert_close(facts(ours, IDS)["logits"], one["trained"]["logits"], rtol=1e-5, atol=1e-5)


EDITED = """
import json, pathlib, sys, torch, transformers
output, folder, edits = sys.argv[1:]
folder, told = pathlib.Path(folder), {}
values = json.loads((folder / "config.json").read_text())
for name, (auto, changes) in json.loads(edits).items():
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    try:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        model(input_ids=torch.arange(3, 9)[None])
        told[name] = "loaded"
    except ValueError as err:
        told[name] = f"{type(err).__name__}: {err}"
(folder / "config.json").write_text(json.dumps(values))
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.config.mixture = "online"
try:
    model.save_pretrained(str(folder) + "-changed")
    told["save"] = "saved"
except ValueError as err:
    told["save"] = f"{type(err).__name__}: {err}"
torch.save(told, output)
"""


def test_what_a_repository_carries_no_code_for_is_said(saved, tmp_path):
    """A configuration that was edited, or a class of another kind: one sentence that names the code and the remedy."""
    folder = shutil.copytree(saved["one block, attention only"][0], tmp_path / "plain")
    values, text = read_json(folder), "AutoModelForCausalLM"
    coded = {**values["components"][0], "weights": "reference", "repo_id": "a/b", "revision": "0" * 40}
    coded["code"] = {"AutoConfig": "a.A"}
    wanted = {
        "blocks": (text, {"num_blocks": 2, "block_layers": None}, "several blocks or bridges"),
        "mixed": (text, {"embeddings": "mixed"}, "mixed embeddings"),
        "online": (text, {"mixture": "online"}, "mixtures that go by past losses"),
        "gate": (text, {"gate_past_losses": True}, "mixtures that go by past losses"),
        "code": (text, {"components": [coded, values["components"][1]]}, "components with code of their own"),
        "texts": ("AutoModelForSequenceClassification", {}, "classification"),
        "tokens": ("AutoModelForTokenClassification", {}, "classification"),
    }
    edits = {name: (auto, changes) for name, (auto, changes, _) in wanted.items()}
    told = run(EDITED, tmp_path, folder, json.dumps(edits))
    for name, (_, _, what) in wanted.items():
        with case(name):
            assert told[name].startswith("ManticoreError: ")
            assert f"This repository carries no code for {what} (" in told[name]
            assert told[name].endswith("save it again with it.") and "pip install manticore-hf" in told[name]
    assert "no code for mixtures that go by past losses" in told["save"]
    assert not (tmp_path / "plain-changed").exists()
    labels = shutil.copytree(saved["classifier, a Mamba"][0], tmp_path / "labels")
    said = run(ONE, tmp_path, labels)
    assert said.startswith("ManticoreError: This repository carries no code for generating text")


ONE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
output, folder = sys.argv[1:]
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "ManticoreModel"
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ValueError as err:
    torch.save(f"{type(err).__name__}: {err}", output)
"""


# ---- with the package ------------------------------------------------------------------------------------------------


def test_an_entry_file_is_compared_like_the_rest(saved, tmp_path, capsys):
    for kind, (folder, _) in saved.items():
        with case(kind):
            assert set(repository(str(folder))["code"].values()) == {"same"}
    folder = shutil.copytree(saved["two blocks, a Mamba"][0], tmp_path / "edited")
    (folder / ENTRY).write_text((folder / ENTRY).read_text() + "import os\n")
    assert main(["inspect", str(folder)]) == 0
    assert (
        f"CODE different from the installed manticore-hf, read it before running it: {ENTRY}" in capsys.readouterr().out
    )


def test_code_is_that_of_the_saved_class(saved, tmp_path):
    """`push --code-only` and the check before a push know a hybrid by its files alone."""
    for kind, (folder, _) in saved.items():
        with case(kind):
            (tmp_path / kind).mkdir()
            copy_code(tmp_path / kind, ManticoreConfig.from_pretrained(folder))
            code = [{file.name: file.read_bytes() for file in one.glob("*.py")} for one in (folder, tmp_path / kind)]
            assert code[0] == code[1]
    config = ManticoreConfig.from_pretrained(saved["one block, attention only"][0])
    config.architectures = ["MyOwnHybrid"]  # which may do either
    assert {"modeling_manticore", "heads_manticore"} <= set(carried(config))


def test_a_save_without_the_package_that_is_cut_off_is_said_and_finished_with_it(saved, tmp_path):
    folder, model = saved["one block, attention only"]
    folder = shutil.copytree(folder, tmp_path / "hybrid")
    torch.save(IDS, tmp_path / "ids.pt")
    told = run(CUT_OFF, tmp_path, folder, tmp_path / "ids.pt")
    assert told["said"].startswith("ManticoreError: ") and "a save was interrupted" in told["said"]
    with pytest.raises(ManticoreError, match="complete now|saved when it was loaded"):
        ManticoreForCausalLM.from_pretrained(folder)
    again = ManticoreForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(facts(again, IDS)["logits"], told["logits"])  # the package's mixture rounds otherwise
    again.save_pretrained(folder)  # clears up after the process that was cut off
    assert not list(tmp_path.glob(".hybrid.saving-*")) and not (folder / ".saving").exists()


CUT_OFF = """
import os, sys, torch
from transformers import AutoModelForCausalLM
output, folder, ids = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    model.config.pad_token_id = 5
    found = {"logits": model(input_ids=torch.load(ids), attention_mask=torch.ones_like(torch.load(ids))).logits}
real, count = os.replace, [0]
def replace(*args):
    count[0] += 1
    if count[0] > 4:
        raise KeyboardInterrupt
    return real(*args)
os.replace = replace
try:
    model.save_pretrained(folder)
except KeyboardInterrupt:
    os.replace = real
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ValueError as err:
    found["said"] = f"{type(err).__name__}: {err}"
torch.save(found, output)
"""
