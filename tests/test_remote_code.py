"""A published hybrid works where manticore_hf is not installed, and what is saved there works everywhere."""

import json
import os
import shutil
import sys
import venv
from pathlib import Path

import aligned_pairs
import clean_process
import pytest
import torch
from hub_models import MODEL, component_keys, nudge, publish, publish_hybrid, read_json, tiny, tokenizer
from manticore_hf.modeling.carried_manticore import ENTRY, PARTS
from manticore_hf.modeling.configuration_manticore import AUTO_MAP
from peft import AutoPeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
)

import manticore_hf
from manticore_hf import ComponentSpec, ManticoreConfig, ManticoreForCausalLM, lora_config, modeling
from manticore_hf.families.contract import randomise
from manticore_hf.utils.carried import carried, copy_code, entry_code

CODE = Path(modeling.__file__).parent
FILES = sorted(CODE.glob("*_manticore.py"))
TUNED = "b.backbone.layers.0.norm.weight"

# ---- without the package ---------------------------------------------------------------------------------------------


STRANGER = (*clean_process.TORCH, "transformers.trainer", "transformers.pipelines", "peft")


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """Processes of a Python with the same libraries, but without manticore_hf, and with a cache of their own."""
    root = tmp_path_factory.mktemp("stranger")
    libraries = root / "libraries"
    libraries.mkdir()
    for folder in (Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")):
        for item in folder.iterdir() if folder.is_dir() else ():
            ours = "manticore" in item.name.lower() or item.suffix in (".pth", ".egg-link")
            if not ours and not (libraries / item.name).exists():
                (libraries / item.name).symlink_to(item)
    venv.create(root / "venv", with_pip=False, symlinks=os.name != "nt")
    inside = next((root / "venv").rglob("site-packages"))
    (inside / "libraries.pth").write_text(f"{libraries}\n")
    python = next(path for path in (root / "venv").rglob("python*") if path.stem == "python")
    # PYTHONPATH and the like would let the package in by the back door
    base = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = {**base, **hub.environment(root / "home"), "OMP_NUM_THREADS": "1"}
    server = clean_process.Server(STRANGER, python, environment)
    yield server
    server.stop()


@pytest.fixture
def run(stranger, tmp_path):
    """Runs a script there; returns what it left with `torch.save`."""

    def start(script, *arguments):
        result = tmp_path / "result.pt"
        result.unlink(missing_ok=True)
        (tmp_path / "script.py").write_text(PREAMBLE + script)
        command = [tmp_path / "script.py", result, *arguments]
        done = stranger.run(command, env=stranger.environment, cwd=tmp_path, timeout=500)
        assert done.returncode == 0, done.stderr[-6000:]
        return torch.load(result)

    return start


PREAMBLE = """
import sys, torch
torch.set_num_threads(1)
try:
    import manticore_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("manticore_hf can be imported here: " + manticore_hf.__file__)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
output, repo, *more = sys.argv[1:]
ids = torch.load("ids.pt")
trust = {"trust_remote_code": True}

def facts(model):
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        cache, parts = None, []
        for piece in ids.split(3, -1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
    text = model.generate(ids[:1], max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids[:1]))
    return {"logits": logits, "chunked": torch.cat(parts, 1), "text": text}

"""

LOAD_FOUR_WAYS = """
config = AutoConfig.from_pretrained(repo, **trust)
assert type(config).__name__ == "ManticoreConfig" and "transformers_modules" in type(config).__module__
base = AutoModel.from_pretrained(repo, **trust)
assert type(base).__name__ == "ManticoreModel"
model, info = AutoModelForCausalLM.from_pretrained(repo, output_loading_info=True, **trust)
assert not any(info.values()), info
found = facts(model)
with torch.no_grad():
    found["hidden"] = base.eval()(input_ids=ids).last_hidden_state
    if ids.shape == (2, 8):
        places, mask = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]] * 2), torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]] * 2)
        found["documents"] = model(input_ids=ids, position_ids=places, use_cache=False).logits
        found["gaps"] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, mask[0].bool()]
pipe = pipeline("text-generation", model=repo, tokenizer=repo, **trust)
found["pipeline"] = pipe("w5 w6 w7", max_new_tokens=6, do_sample=False)[0]["generated_text"]

model.train()
model(input_ids=ids, labels=ids).loss.backward()
torch.optim.SGD(model.parameters(), lr=0.5).step()
model.save_pretrained(more[0])
model.push_to_hub(more[1])
found["trained"] = facts(model)
torch.save(found, output)
"""

LOAD = """
torch.save({name: facts(AutoModelForCausalLM.from_pretrained(name, **trust)) for name in (repo, *more)}, output)
"""

CLASSIFY = """
from transformers import AutoModelForSequenceClassification as ForSequence, AutoModelForTokenClassification as ForToken
found = {}
for kind, auto, task in (("sequence", ForSequence, "text"), ("token", ForToken, "token")):
    model, info = auto.from_pretrained(more[1] + kind, output_loading_info=True, **trust)
    assert "transformers_modules" in type(model).__module__ and not any(info.values()), info
    model.train()
    labels = torch.tensor([0, 2]) if kind == "sequence" else ids % 3
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.save_pretrained(kind)
    model.push_to_hub(more[0] + kind)
    with torch.no_grad():
        found[kind] = model.eval()(input_ids=ids).logits
        again = auto.from_pretrained(kind, **trust)
        assert "transformers_modules" in type(again).__module__
        assert torch.equal(again(input_ids=ids).logits, found[kind])
    pipe = pipeline(f"{task}-classification", model=kind, tokenizer=repo, **trust)
    found[f"{kind} labels"] = [str(one.get("label", one.get("entity"))) for one in pipe("w5 w6 w7")]
torch.save(found, output)
"""

ADAPT = """
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
ready, theirs, saved, merged, pushed = more
config = LoraConfig.from_pretrained(ready)
load = lambda: AutoModelForCausalLM.from_pretrained(repo, revision=config.revision, **trust)
model = load()
assert "transformers_modules" in type(model).__module__
found = {"plain": facts(model)}
model = get_peft_model(model, config)
found["wrapped"] = facts(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model.train()
found["losses"] = []
for step in range(4):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if step:  # B = 0 at the start leaves A without gradient
        assert all(p.grad.abs().sum() > 0 for key, p in model.named_parameters() if "lora_" in key)
    optimizer.step()
    optimizer.zero_grad()
    found["losses"].append(loss.item())
found["trained"] = facts(model)
model.save_pretrained(saved)
model.push_to_hub(pushed)
found["loaded"] = facts(PeftModel.from_pretrained(load(), saved))
for name, where in {"auto": saved, "pushed": pushed, "theirs": theirs}.items():
    model = AutoPeftModelForCausalLM.from_pretrained(where, **trust)
    assert "transformers_modules" in type(model.get_base_model()).__module__
    found[name] = facts(model)
    if name == "auto":
        model = model.merge_and_unload()
        found["merged"] = facts(model)
        model.save_pretrained(merged)
torch.save(found, output)
"""


QUANTISE = """
import bitsandbytes.nn.modules
from transformers import BitsAndBytesConfig
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # cannot repack weights as small as these
small, ours, pushed = more
model = AutoModelForCausalLM.from_pretrained(repo, quantization_config=BitsAndBytesConfig(load_in_8bit=True), **trust)
assert "transformers_modules" in type(model).__module__
found = {"made": facts(model)}
model.save_pretrained(small)
model.push_to_hub(pushed)
for name in (small, ours, pushed):
    found[name] = facts(AutoModelForCausalLM.from_pretrained(name, **trust))
torch.save(found, output)
"""


def ids(rows=2):
    """Rows of eight tokens; the scripts read them from a file."""
    return torch.randint(3, 48, (2, 8), generator=torch.Generator().manual_seed(1))[:rows]


def facts(model, given=None):
    """What the scripts compute of a model, here."""
    model.eval()
    given = ids() if given is None else given
    with torch.no_grad():
        logits = model(input_ids=given).logits
        text = model.generate(given[:1], max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(given[:1]))
    return {"logits": logits, "text": text}


def assert_facts(found, expected):
    """The same, to the rounding of what the package has faster ways to compute (manticore_hf/kernels)."""
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["text"], expected["text"])
    # The recurrent state is carried over (Transformers' own Mamba forgets it): the scan's repair works there too.
    torch.testing.assert_close(found["chunked"], expected["logits"], rtol=1e-4, atol=1e-4)


@pytest.fixture
def published(hub, owner, tmp_path):
    """A hybrid with one tuned component tensor and a tokenizer. Returns (repo id, model)."""
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src", tokenizer())
    publish(hub, f"{owner}/b", tiny("mamba", 1), tmp_path / "src", tokenizer())
    model = nudge(ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"], num_blocks=2), TUNED)
    model.save_pretrained(tmp_path / "out")
    tokenizer().save_pretrained(tmp_path / "out")
    publish_hybrid(hub, f"{owner}/hybrid", tmp_path / "out")
    torch.save(ids(), tmp_path / "ids.pt")
    return f"{owner}/hybrid", model


def code_of(config):
    """{file: content} of the code that a hybrid of this configuration carries."""
    parts = carried(ManticoreConfig.from_dict(config))
    files = [file for file in FILES if file.stem not in PARTS or file.stem in parts]
    return {ENTRY: entry_code(parts).encode(), **{file.name: file.read_bytes() for file in files}}


def assert_complete(files, config):
    """A repository that others can load."""
    assert config["auto_map"] == AUTO_MAP and not any("--" in value for value in config["auto_map"].values())
    for name, data in code_of(config).items():
        assert files[name] == data


def test_life_without_the_package(published, run, hub, owner, tmp_path):
    repo, model = published
    found = run(LOAD_FOUR_WAYS, repo, tmp_path / "saved", f"{owner}/again")
    assert_facts(found, facts(model))
    base = AutoModel.from_pretrained(repo)
    assert type(base) is manticore_hf.ManticoreModel
    with torch.no_grad():
        hidden = base.eval()(input_ids=ids()).last_hidden_state
        torch.testing.assert_close(found["hidden"], hidden, rtol=1e-5, atol=1e-5)
        alone = torch.cat([model(input_ids=one).logits for one in ids().split((3, 2, 3), 1)], 1)
        torch.testing.assert_close(found["documents"], alone, rtol=1e-4, atol=1e-4)
        short = model(input_ids=ids()[:, [0, 1, 2, 5, 6, 7]]).logits
        torch.testing.assert_close(found["gaps"], short, rtol=1e-4, atol=1e-4)
    words = tokenizer()
    text = model.generate(
        **words("w5 w6 w7", return_tensors="pt", return_token_type_ids=False), max_new_tokens=6, do_sample=False
    )
    assert found["pipeline"].split("w5 w6 w7")[1].split() == words.decode(text[0, 3:], skip_special_tokens=True).split()

    # What was saved and pushed there is whole ...
    pushed = hub.files(f"{owner}/again")
    assert_complete(pushed, json.loads(pushed["config.json"]))
    local = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    assert_complete(local, read_json(tmp_path / "saved"))
    assert local[MODEL] == pushed[MODEL]
    assert len(component_keys(tmp_path / "saved")) > 10  # trained
    trained = found["trained"]
    assert not torch.equal(trained["logits"], found["logits"])
    # ... and loads there, from the Hub and from the directory as remote code, and here, as the package's own classes.
    again = run(LOAD, f"{owner}/again", tmp_path / "saved")
    for where in (f"{owner}/again", tmp_path / "saved"):
        assert_facts(again[str(where)], trained)
        loaded = AutoModelForCausalLM.from_pretrained(where)
        assert type(loaded) is ManticoreForCausalLM
        assert_facts({"chunked": trained["chunked"], **facts(loaded)}, trained)


WRONG_FILE = """
try:
    AutoModelForCausalLM.from_pretrained(repo, **trust)(input_ids=ids)
except Exception as err:
    torch.save({"kind": type(err).__name__, "said": str(err)}, output)
"""


def test_aligned_tokenizers_without_the_package(run, hub, owner, tmp_path):
    """Components' tokenizers come from their repositories, at the pinned commit, and are checked."""
    for name, family, kind in (("a", "llama", "gpt"), ("b", "gpt_neox", "gemma"), ("c", "mamba", "llama")):
        publish(
            hub, f"{owner}/{name}", aligned_pairs.model(family, kind), tmp_path / "src", aligned_pairs.tokenizer(kind)
        )
    model = ManticoreForCausalLM.from_components([f"{owner}/{name}" for name in "abc"])
    assert model.config.aligned == ("b", "c")
    home = aligned_pairs.tokenizer("gpt")
    model.save_pretrained(tmp_path / "out")
    home.save_pretrained(tmp_path / "out")
    publish_hybrid(hub, f"{owner}/hybrid", tmp_path / "out")
    torch.save(home("two dogs ran and a cat", return_tensors="pt").input_ids, tmp_path / "ids.pt")
    expected = facts(model, torch.load(tmp_path / "ids.pt"))
    # Another tokenizer on the main branch, later
    publish(hub, f"{owner}/b", aligned_pairs.model("gpt_neox", "gemma"), tmp_path / "later", home)
    found = run(LOAD_FOUR_WAYS, f"{owner}/hybrid", tmp_path / "saved", f"{owner}/again")
    assert_facts(found, expected)
    assert found["pipeline"].startswith("w5 w6 w7") and len(found["pipeline"]) > len("w5 w6 w7")
    for folder in (tmp_path / "saved", tmp_path / "out"):
        names = {file.name for file in folder.iterdir()}
        assert {file.name for file in CODE.glob("aligned_*.py")} <= names and not list(folder.glob("tokenizer_*/*"))
    again = run(LOAD, f"{owner}/again", tmp_path / "saved")
    for where in (f"{owner}/again", tmp_path / "saved"):
        assert_facts(again[str(where)], found["trained"])
    # A file that is not the recorded one
    config = read_json(tmp_path / "out")
    config["components"][1]["tokenizer"]["files"]["tokenizer.json"] = "0" * 64
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    refused = run(WRONG_FILE, tmp_path / "out")
    assert refused["kind"] == "ManticoreError" and "tokenizer.json" in refused["said"]


SAVED_AGAIN = """
model = AutoModelForCausalLM.from_pretrained(repo, **trust)
found = facts(model)
model.save_pretrained(more[0])
again = AutoModelForCausalLM.from_pretrained(more[0], **trust)
torch.save({**found, "again": facts(again)["logits"]}, output)
"""


def saved_again(run, model, tmp_path):
    """Saves a hybrid, loads it without the package, saves it there; names of the code files, the same twice."""
    model.save_pretrained(tmp_path / "out")
    torch.save(ids(), tmp_path / "ids.pt")
    found, wanted = run(SAVED_AGAIN, tmp_path / "out", tmp_path / "again"), facts(model)
    assert_facts(found, wanted)
    assert torch.equal(found["again"], found["logits"])
    names = [{file.name for file in (tmp_path / folder).glob("*.py")} for folder in ("out", "again")]
    assert names[0] == names[1]
    return names[0]


def test_an_online_mixture_without_the_package(run, tmp_path):
    """Its repository carries the file that others do not, and so does what is saved there."""
    parts = [ComponentSpec(tiny(family), name=family) for family in ("gpt_neox", "mamba")]
    model = ManticoreForCausalLM.from_components(parts, mixture="online", online_eta=0.9)
    assert "past_losses.py" in saved_again(run, model, tmp_path)


@pytest.mark.parametrize("past", [False, True])
def test_bridges_without_the_package(past, run, tmp_path):
    """Alone and with a mixture that goes by past losses: each repository carries what it needs, and no more."""
    parts = [ComponentSpec(tiny(family), name=family) for family in ("llama", "mamba")]
    settings = {"topology": "bridge", "bridges": ["others", "self"], "bridge_kind": "attention", "bridge_heads": 2}
    model = ManticoreForCausalLM.from_components(parts, **settings, gate_past_losses=past)
    randomise(model)
    names = saved_again(run, model, tmp_path)
    assert "bridges.py" in names and ("past_losses.py" in names) == past


@pytest.mark.slow
def test_quantised_without_the_package(published, run, hub, owner, tmp_path, monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(published[0], quantization_config=settings)
    model.save_pretrained(tmp_path / "ours")
    found = run(QUANTISE, published[0], tmp_path / "small", tmp_path / "ours", f"{owner}/small")
    expected = facts(model)
    for one in found.values():
        torch.testing.assert_close(one["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
        assert torch.equal(one["text"], expected["text"])
    assert set(found) == {"made", str(tmp_path / "small"), str(tmp_path / "ours"), f"{owner}/small"}
    for where in (tmp_path / "small", f"{owner}/small"):
        assert torch.equal(facts(AutoModelForCausalLM.from_pretrained(where))["logits"], expected["logits"])
    assert_complete(hub.files(f"{owner}/small"), read_json(tmp_path / "small"))


@pytest.mark.slow
def test_classifying_without_the_package(published, run, hub, owner, tmp_path):
    repo, causal = published
    for kind in ("Sequence", "Token"):
        cls = getattr(manticore_hf, f"ManticoreFor{kind}Classification")
        cls.from_causal_lm(causal, num_labels=3).save_pretrained(tmp_path / f"new-{kind.lower()}")
    found = run(CLASSIFY, repo, f"{owner}/", f"{tmp_path}/new-")
    for kind, auto in (("sequence", AutoModelForSequenceClassification), ("token", AutoModelForTokenClassification)):
        pushed = hub.files(f"{owner}/{kind}")
        assert_complete(pushed, json.loads(pushed["config.json"]))
        for where in (f"{owner}/{kind}", tmp_path / kind):
            loaded = auto.from_pretrained(where)
            assert type(loaded) is auto._model_mapping[manticore_hf.ManticoreConfig]
            with torch.no_grad():
                torch.testing.assert_close(loaded(input_ids=ids()).logits, found[kind], rtol=1e-5, atol=1e-5)
    assert [len(found[f"{kind} labels"]) for kind in ("sequence", "token")] == [1, 3]
    assert set(found["sequence labels"] + found["token labels"]) <= {"LABEL_0", "LABEL_1", "LABEL_2"}


def test_adapters_without_the_package(published, run, hub, owner, tmp_path):
    repo, model = published
    commit = hub.head(repo)
    config = lora_config(AutoModelForCausalLM.from_pretrained(repo), r=2)
    config.save_pretrained(tmp_path / "ready")
    ours = get_peft_model(AutoModelForCausalLM.from_pretrained(repo), config)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ours.save_pretrained(tmp_path / "ours")
    # The hybrid moves on; both adapters are for what it was.
    nudge(model, TUNED).save_pretrained(tmp_path / "moved")
    assert hub.add_repo(repo, tmp_path / "moved") != commit
    places = {name: tmp_path / name for name in ("ready", "ours", "saved", "merged")}
    found = run(ADAPT, repo, *places.values(), f"{owner}/adapter")

    plain = facts(ManticoreForCausalLM.from_pretrained(repo, revision=commit))
    assert_facts(found["plain"], plain)
    assert_facts(found["wrapped"], plain)
    assert not torch.equal(plain["logits"], facts(model)["logits"])
    assert found["losses"][-1] < found["losses"][0]
    # Trained there: loads there in every way, and here.
    assert not torch.equal(found["trained"]["logits"], plain["logits"])
    for way in ("loaded", "auto", "pushed"):
        assert_facts(found[way], found["trained"])
    for where in (places["saved"], f"{owner}/adapter"):
        loaded = AutoPeftModelForCausalLM.from_pretrained(where)
        assert loaded.peft_config["default"].revision == commit
        assert type(loaded.get_base_model()) is ManticoreForCausalLM
        assert_facts({"chunked": found["trained"]["chunked"], **facts(loaded)}, found["trained"])
    merged = ManticoreForCausalLM.from_pretrained(places["merged"])
    assert_facts({"chunked": found["merged"]["chunked"], **facts(merged)}, found["merged"])
    torch.testing.assert_close(found["merged"]["logits"], found["trained"]["logits"], rtol=1e-4, atol=1e-4)
    # Trained here: loads there.
    assert not torch.equal(found["theirs"]["logits"], plain["logits"])
    assert_facts(found["theirs"], facts(ours))


def test_package_wins_over_remote_code(published):
    for trust in (None, True):
        loaded = AutoModelForCausalLM.from_pretrained(published[0], trust_remote_code=trust)
        assert type(loaded) is ManticoreForCausalLM
    assert type(AutoConfig.from_pretrained(published[0])) is manticore_hf.ManticoreConfig


# ---- published by earlier versions -----------------------------------------------------------------------------------

# Hybrids that the code of version 0.1.0 saved, and the logits that it computed of them.
EARLIER = Path(__file__).parent / "published_0_1"
ROWS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [0, 0, 5, 3, 5, 8, 9, 7]])
ROWS_MASK = torch.tensor([[1] * 8, [0] * 2 + [1] * 6])

READ_EARLIER = """
from transformers import AutoModelForSequenceClassification
found = {}
for name in more:
    auto = AutoModelForSequenceClassification if name.endswith("classifier") else AutoModelForCausalLM
    model, info = auto.from_pretrained(name, output_loading_info=True, **trust)
    assert "transformers_modules" in type(model).__module__ and not any(info.values()), info
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        found[name.rsplit("/")[-1]] = model.eval()(input_ids=ids, attention_mask=mask).logits
torch.save(found, output)
"""


def bring_up(folder):
    """This version's code, as `push --code-only` puts it into a repository."""
    config = ManticoreConfig.from_pretrained(folder)
    copy_code(folder, config)
    values = {**read_json(folder), "auto_map": config.to_dict()["auto_map"]}
    (folder / "config.json").write_text(json.dumps(values))


REFUSED = """
import json, pathlib
folder, told = pathlib.Path(more[0]), {}
values = json.loads((folder / "config.json").read_text())
edits = json.loads(pathlib.Path(more[1]).read_text())
for name, edit in edits.items():
    changed = json.loads(json.dumps(values))
    (changed if edit["component"] is None else changed["components"][edit["component"]]).update(edit["values"])
    (folder / "config.json").write_text(json.dumps(changed))
    try:
        AutoModelForCausalLM.from_pretrained(folder, **trust)
        told[name] = "loaded"
    except Exception as err:
        told[name] = f"{type(err).__name__}: {err}"
torch.save(told, output)
"""


def test_without_the_package_a_mistake_gets_its_sentence_and_components_are_still_checked(run, tmp_path):
    """The defence is the package's; what would load as something else, and others' addresses, are checked here."""
    torch.save(ROWS, tmp_path / "ids.pt")
    folder = shutil.copytree(EARLIER / "two_blocks", tmp_path / "published")
    bring_up(folder)
    elsewhere = {"weights": "reference", "repo_id": "org/x", "revision": "0" * 40}
    tampered = {**elsewhere, "files": {"../model.safetensors": "0" * 64}}
    code = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    wanted = {
        "num_blocks=9": (None, {"num_blocks": 9}, "are neither in the hybrid's file nor in its components'"),
        "mixture": (None, {"mixture": "sttic"}, "mixture='sttic' is unknown; choose one of"),
        "gate": (None, {"gate": "x"}, "gate='x' is unknown; choose one of"),
        "version": (None, {"manticore_version": 2}, "This hybrid has format version 2"),
        "path": (1, {**elsewhere, "repo_id": "../x"}, "is not a Hub repository id"),
        "commit": (1, {**elsewhere, "revision": "abcdef1"}, "is not a 40-hex commit"),
        "files": (1, tampered, "is not a plain name of a safetensors file"),
        "code": (1, {**elsewhere, "code": code}, "carries no code for components with code of their own"),
    }
    edits = {name: {"component": component, "values": values} for name, (component, values, _) in wanted.items()}
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    told = run(REFUSED, "none", folder, tmp_path / "edits.json")
    for name, (_, _, message) in wanted.items():
        assert told[name].startswith("ManticoreError: ") and message in told[name], (name, told[name])


# Settings that version 0.1 had not
SINCE_THEN = (
    "gate_lag", "gate_past_losses", "online_decay", "online_eta", "online_share",
    "topology", "bridge_blocks", "bridges", "bridge_kind", "bridge_rank", "bridge_heads", "bridge_alpha",
)  # fmt: skip


def earlier():
    """{name: (directory, logits then)}."""
    logits = load_file(EARLIER / "logits.safetensors")
    assert len(logits) == 5
    return {name: (EARLIER / name, logits[name]) for name in logits}


@torch.no_grad()
def test_the_package_loads_what_version_0_1_published(tmp_path):
    for name, (folder, logits) in earlier().items():
        auto = AutoModelForSequenceClassification if name == "classifier" else AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert type(model).__module__ == "manticore_hf.compose.hybrid"
        found = model.eval()(input_ids=ROWS, attention_mask=ROWS_MASK).logits
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-6)
        assert type(model).from_pretrained(folder).config.to_dict() == model.config.to_dict()
        model.save_pretrained(tmp_path / name)
        before, after = (load_file(one / MODEL) for one in (folder, tmp_path / name))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        written = [read_json(one) for one in (folder, tmp_path / name)]
        for values in written:
            values.pop("transformers_version")
        since = {key: value for key, value in ManticoreConfig().to_dict().items() if key in SINCE_THEN}
        assert written[1].pop("auto_map") == AUTO_MAP and written[0].pop("auto_map")
        assert {**since, **written[0]} == written[1]


def test_this_code_in_a_repository_loads_what_version_0_1_published(run, tmp_path):
    torch.save(ROWS, tmp_path / "ids.pt")
    folders = {}
    for name, (folder, _) in earlier().items():
        folders[name] = shutil.copytree(folder, tmp_path / "published" / name)
        bring_up(folders[name])
    found = run(READ_EARLIER, "none", *folders.values())
    for name, (_, logits) in earlier().items():
        torch.testing.assert_close(found[name], logits, rtol=0, atol=1e-6)
