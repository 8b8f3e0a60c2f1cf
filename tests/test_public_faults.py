"""Two public faults of Transformers, tried on the configurations of hybrids and of components.

CVE-2026-4372: a field of a configuration loads a kernel, that is code, from the Hub. CVE-2026-5241: a configuration
inside another says that remote code is trusted, whatever the caller said.
"""

import ast
import json
import shutil
from pathlib import Path

import pytest
import transformers
from hub_models import ids, publish, publish_hybrid, read_json, tiny, tokenizer
from peft import LoraConfig, get_peft_model
from tiny_hybrid import pair, save
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels

import manticore_hf
from manticore_hf import ManticoreError, ManticoreForCausalLM, cli
from manticore_hf.app import local
from manticore_hf.utils.tokenizers import read_tokenizer

pytestmark = pytest.mark.usefixtures("uncounted")
KERNEL = "attacker/kernel"
LOADS = {
    **{key: KERNEL for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal",
                               "experts_implementation", "_experts_implementation_internal", "_flash_attn_2_enabled")},
    "attn_implementation_internal": f"{KERNEL}@main:flash", "use_kernels": True, "allow_all_kernels": True,
    "kernel_config": {"kernel_mapping": {"RMSNorm": f"{KERNEL}:RMSNorm"}}, "fusion_config": {"x": KERNEL},
    "custom_generate": KERNEL, "transformers_weights": f"{KERNEL}/model.safetensors",
}  # fmt: skip
CODE = {
    "trust_remote_code": True, "code_revision": "main", "_commit_hash": "0" * 40, "custom_pipelines": {"x": {}},
    "auto_map": {"AutoConfig": "attacker/code--evil.Config", "AutoModelForCausalLM": "attacker/code--evil.Model"},
}  # fmt: skip
EVIL = "import pathlib\npathlib.Path({!r}).touch()\nclass Config: pass\nclass Model: pass\n"


@pytest.fixture
def watched(hub, owner, tmp_path, monkeypatch):
    """The attacker's code is there to be fetched, and would leave a file; whoever asks for a kernel is caught."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(EVIL.format(str(tmp_path / "ran")))
    hub.add_repo("attacker/code", tmp_path / "evil")
    asked = []

    def ask(*args, **kwargs):
        asked.append(args)
        raise RuntimeError("a kernel was asked for")

    for name in ("load_and_register_attn_kernel", "get_kernel", "lazy_load_kernel"):
        for module in (hub_kernels, transformers.modeling_utils):
            if hasattr(module, name) and name != "lazy_load_kernel":
                monkeypatch.setattr(module, name, ask)
    hub.clear_requests()

    def check():
        assert not asked and not (tmp_path / "ran").exists()
        assert not [path for _, path in hub.requests if "attacker" in path and "/api/models" not in path]
        assert not [path for _, path in hub.requests if "attacker" in path]

    return check


def spread(values, extra, inside="extra_config"):
    """A configuration with `extra` at its top, in a configuration inside it, and in one inside that."""
    inner = {"model_type": values.get("model_type", "gpt2"), **extra}
    return {**values, **extra, inside: {**inner, "sub_config": inner}}


def edit(folder, change):
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.parametrize("extra", [LOADS, CODE], ids=["kernels", "code"])
def test_a_components_own_configuration(hub, owner, tmp_path, watched, extra, capsys):
    for name, family, inside in (("a", "gpt_neox", "extra"), ("b", "mamba", "extra"), ("c", "gpt2", "text_config")):
        change = lambda folder: edit(folder, lambda values: spread(values, extra, inside))  # noqa: B023, E731
        publish(hub, f"{owner}/{name}", tiny(family), tmp_path / "src", edit=change)
    hub.clear_requests()
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"])
    model(input_ids=ids())
    model.save_pretrained(tmp_path / "out")
    ManticoreForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids())
    said = (tmp_path / "out" / "config.json").read_text()
    assert "attacker" not in said and "trust_remote_code" not in said
    with pytest.raises(ManticoreError, match="its config.json has a part"):
        ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/c"])
    cli.main(["convert", f"{owner}/a", "--output-dir", str(tmp_path / "converted")])
    watched()


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("extra", [LOADS, CODE], ids=["kernels", "code"])
def test_a_hybrids_configuration(hub, owner, tmp_path, watched, extra):
    """At its top, in a component's configuration, and inside that; one at a time, so that no refusal hides another."""
    for name, family in (("a", "gpt_neox"), ("b", "mamba")):
        publish(hub, f"{owner}/{name}", tiny(family), tmp_path / "src")
    ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"]).save_pretrained(tmp_path / "out")
    original = (tmp_path / "out" / "config.json").read_text()

    def in_component(values, one):
        entry = values["components"][0]
        holder = entry if isinstance(entry.get("config"), dict) else values
        key = "config" if holder is entry else entry["name"]
        holder[key] = spread(holder[key], one)
        return values

    hub.clear_requests()
    worked = 0
    for number, (key, value) in enumerate(extra.items()):
        for place, change in enumerate((lambda values, one: spread(values, one), in_component)):
            (tmp_path / "out" / "config.json").write_text(original)
            edit(tmp_path / "out", lambda values: change(values, {key: value}))  # noqa: B023
            load = (ManticoreForCausalLM, AutoModelForCausalLM)[(number + place) % 2]  # by turns
            try:
                load.from_pretrained(tmp_path / "out")(input_ids=ids())
                worked += 1
            except ManticoreError:
                pass
            cli.main(["inspect", str(tmp_path / "out")])
    watched()
    assert worked > len(extra) / 2  # it is not refused as a whole, whatever is in it
    publish_hybrid(hub, f"{owner}/h", tmp_path / "out")
    hub.clear_requests()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked whether code may run"))
        AutoModelForCausalLM.from_pretrained(f"{owner}/h")
    watched()


# ---- of the same kind ------------------------------------------------------------------------------------------------


def test_code_of_a_tokenizer_is_not_run_and_nobody_is_asked_about_it(tmp_path, monkeypatch):
    """Transformers asks on the terminal, and runs it at a "y"."""
    tokenizer().save_pretrained(tmp_path)
    read_tokenizer(tmp_path)
    source = EVIL.format(str(tmp_path / "ran")).replace("Config", "Evil")
    (tmp_path / "evil.py").write_text(source)
    edit_to = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **edit_to}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked whether code may run"))
    try:
        read_tokenizer(tmp_path)  # Transformers may still have a class of its own for the files
    except ManticoreError as err:
        assert "needs code of its own repository, which is not run" in str(err)
    assert not (tmp_path / "ran").exists()


def test_nothing_else_reads_tokenizers_or_configurations():
    """Who calls Transformers' Auto classes for tokenizers and configurations says that no code is to be run."""
    home, found = Path(manticore_hf.__file__).parent, []
    for file in home.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained"):
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                safe = said.get("trust_remote_code") == "False" or "COMPONENTS" in ast.unparse(node)
                found.append((file.relative_to(home).as_posix(), node.lineno, safe))
    assert len(found) > 3 and not [one for one in found if not one[2]]


def test_an_adapter_beside_a_component_loads_no_other_model(hub, owner, tmp_path):
    """Transformers loads the model that adapter_config.json names, from wherever that is, in the place of this one."""
    tiny("gpt_neox", 5).save_pretrained(tmp_path / "private")
    asked = {"base_model_name_or_path": str(tmp_path / "private"), "peft_type": "LORA", "r": 1}

    def add(folder):
        (folder / "adapter_config.json").write_text(json.dumps(asked))

    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src", edit=add)
    publish(hub, f"{owner}/b", tiny("mamba"), tmp_path / "src")
    tiny("gpt_neox").save_pretrained(tmp_path / "local")
    add(tmp_path / "local")
    for source in (f"{owner}/a", str(tmp_path / "local")):
        with pytest.raises(ManticoreError, match="has an adapter beside its weights"):
            ManticoreForCausalLM.from_components([source, f"{owner}/b"])


def test_an_adapter_beside_a_hybrid_is_not_loaded(hub, owner, tmp_path):
    """Of a repository Transformers loads what adapter_config.json names; in a directory it adds the adapter."""
    save(ManticoreForCausalLM.from_components(list(pair()), num_blocks=1), tmp_path / "hybrid")
    shutil.copytree(tmp_path / "hybrid", tmp_path / "private")
    tiny("gpt_neox", 5).save_pretrained(tmp_path / "plain")
    refused = pytest.raises(ManticoreError, match="has an adapter beside its hybrid .* PeftModel.from_pretrained")
    for name, base in (("h", "private"), ("p", "plain")):
        adapter = get_peft_model(tiny("gpt_neox", 5), LoraConfig(base_model_name_or_path=str(tmp_path / base), r=1))
        adapter.save_pretrained(tmp_path / "adapter")
        asked = read_json(tmp_path / "adapter", "adapter_config.json")
        asked["base_model_name_or_path"] = str(tmp_path / base)
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(asked))
        for file in tmp_path.glob("adapter/adapter_*"):
            shutil.copy(file, tmp_path / "hybrid")
        publish_hybrid(hub, f"{owner}/{name}", tmp_path / "hybrid")
    for source in (tmp_path / "hybrid", f"{owner}/h", f"{owner}/p"):
        with refused:
            ManticoreForCausalLM.from_pretrained(source)
        with refused:
            local.load(source)
        if source != f"{owner}/p":
            with refused:
                AutoModelForCausalLM.from_pretrained(source)
    # Where the other model is no hybrid, nothing of ours is asked: SECURITY.md says so.
    assert type(AutoModelForCausalLM.from_pretrained(f"{owner}/p")).__name__ == "GPTNeoXForCausalLM"
