"""Checkpoints in mamba_ssm's layout and pickles, converted: the model is the same, and nothing of a pickle is run."""

import json
import pathlib

import naive_mamba
import pytest
import torch
from hub_models import folder_of, read_json, saved_keys, tiny, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from manticore_hf import ManticoreError, ManticoreForCausalLM, convert
from manticore_hf.cli import main
from manticore_hf.utils import saving

MAMBA2 = {"d_state": 8, "headdim": 8, "ngroups": 2, "chunk_size": 4}
CHECKPOINTS = {
    "mamba1": dict(),
    "mamba1_settings": dict(d_state=4, d_conv=3, expand=3, dt_rank=2, bias=True, conv_bias=False, vocab_size=64),
    "mamba1_untied": dict(tied=False, multiple=16),
    "mamba2": dict(layer="Mamba2", **MAMBA2),
    "mamba2_settings": dict(layer="Mamba2", **{**MAMBA2, "ngroups": 1}, dt_limit=[0.05, 0.8], bias=True, multiple=16),
}


def write(folder, config, tensors, shards=1):
    """Saves a checkpoint as mamba_ssm does, or in several files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names, of = sorted(tensors), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save({name: tensors[name].clone() for name in names[i::shards]}, folder / file)
        of.update(dict.fromkeys(names[i::shards], file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": of}))
    return folder


@pytest.fixture
def words(tmp_path):
    """A directory with a tokenizer."""
    tokenizer(size=61).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def refuse(tmp_path, words):
    """Converts and expects a refusal that holds all texts; nothing may be left of the output."""

    def check(source, *texts, **options):
        with pytest.raises(ManticoreError) as err:
            convert(source, tmp_path / "refused" / "out", **{"tokenizer": words, **options})
        for text in texts:
            assert text in str(err.value)
        left = tmp_path / "refused"
        assert not left.exists() or not list(left.iterdir())

    return check


IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same_as_naive(folder, config, tensors):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for row in IDS:
        expected = naive_mamba.forward(config, tensors, row)
        assert expected.std() > 0.5
        assert torch.allclose(model(row[None]).logits[0], expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_the_equations(name, tmp_path, words):
    config, tensors = naive_mamba.checkpoint(**CHECKPOINTS[name])
    result = convert(write(tmp_path / "src", config, tensors), tmp_path / "out", words)
    assert_same_as_naive(tmp_path / "out", config, tensors)
    assert result["model_type"] == name.partition("_")[0].replace("mamba1", "mamba") and result["dtype"] == "float32"
    written = read_json(tmp_path / "out")
    multiple = config["pad_vocab_size_multiple"]
    assert written["vocab_size"] == -(-config["vocab_size"] // multiple) * multiple
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, 2, 0)
    assert ("lm_head.weight" in saved_keys(tmp_path / "out")) is (name == "mamba1_untied")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer(size=61).get_vocab()


def test_shards_and_types(tmp_path, words):
    config, tensors = naive_mamba.checkpoint()
    source = write(tmp_path / "src", config, tensors, shards=3)
    convert(source, tmp_path / "out", words)
    assert_same_as_naive(tmp_path / "out", config, tensors)
    assert convert(source, tmp_path / "half", words, dtype="bfloat16")["dtype"] == "bfloat16"
    key = "backbone.layers.1.mixer.in_proj.weight"
    assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")[key], tensors[key].bfloat16())
    assert "rounded to bfloat16" in (tmp_path / "half" / "README.md").read_text()
    assert "rounded" not in (tmp_path / "out" / "README.md").read_text()
    stored = {name: tensor.half() for name, tensor in tensors.items()}
    assert convert(write(tmp_path / "src16", config, stored), tmp_path / "16", words)["dtype"] == "float16"


def test_from_the_hub_with_its_licence_and_commit(hub, owner, tmp_path, words, capsys):
    config, tensors = naive_mamba.checkpoint()
    folder = write(tmp_path / "src", config, tensors)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    commit = hub.add_repo(f"{owner}/mamba", folder)
    write(folder, config, naive_mamba.checkpoint(seed=1)[1])
    hub.add_repo(f"{owner}/mamba", folder)  # a later commit
    command = ["convert", f"{owner}/mamba@{commit}", "--output-dir", str(tmp_path / "out"), "--tokenizer", str(words)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert f"{owner}/mamba at commit {commit}" in said.out
    for step in ("1/6 looking", "2/6 reading and checking the tokenizer", "3/6 reading", "6/6 reading back what was"):
        assert f"convert: {step}" in said.err  # one bar for all of it
    assert "Loading weights" not in said.err
    assert_same_as_naive(tmp_path / "out", config, tensors)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {owner}/mamba" in card and f"Revision: {commit}" in card and str(tmp_path) not in card
    hybrid = ManticoreForCausalLM.from_components([str(tmp_path / "out"), tiny("llama", vocabulary=64)])
    assert hybrid.config.components[0]["license"] == "apache-2.0"
    assert main(command) == 2 and "not empty" in capsys.readouterr().err


def test_the_default_tokenizer_is_asked_for_and_missed(hub, owner, tmp_path, refuse, monkeypatch):
    config, tensors = naive_mamba.checkpoint()
    source = write(tmp_path / "src", config, tensors)
    refuse(source, "'EleutherAI/gpt-neox-20b'", "cannot be read", "--tokenizer", tokenizer=None)
    tokenizer(size=61).save_pretrained(tmp_path / "neox")
    monkeypatch.setattr("manticore_hf.compose.convert.convert.TOKENIZER", f"{owner}/neox")
    hub.add_repo(f"{owner}/neox", tmp_path / "neox")
    assert convert(source, tmp_path / "out")["tokenizer"] == f"{owner}/neox"
    tokenizer(size=65).save_pretrained(tmp_path / "large")
    refuse(source, "64 rows", "ids up to 64", tokenizer=tmp_path / "large")


# ---- pickles of models that Transformers has -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "jamba"])
def test_a_pickle_in_transformers_layout(family, hub, owner, tmp_path):
    model = tiny(family)
    folder = folder_of(model, tmp_path / "src", tokenizer())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.add_repo(f"{owner}/old", folder)
    with pytest.raises(ManticoreError, match="only as a pickle.*manticore-hf convert"):
        ManticoreForCausalLM.from_components([f"{owner}/old"])
    convert(f"{owner}/old", tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)
    ManticoreForCausalLM.from_components([str(tmp_path / "out")])


def test_compose_says_how_to_convert_mamba_ssm(tmp_path):
    source = write(tmp_path / "src", *naive_mamba.checkpoint())
    with pytest.raises(ManticoreError, match="mamba_ssm's own layout.*manticore-hf convert"):
        ManticoreForCausalLM.from_components([str(source)])


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", ["mamba_ssm", "transformers"])
def test_nothing_of_a_pickle_is_run(tmp_path, refuse, zipped, layout):
    marker, (config, tensors) = tmp_path / "the pickle was run", naive_mamba.checkpoint()
    source = write(tmp_path / "src", config, {})
    if layout == "transformers":
        tiny("llama").config.save_pretrained(source)
    evil = {**tensors, "backbone.extra": Evil(marker)}
    torch.save(evil, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refuse(source, "pytorch_model.bin holds", "can run code", "safetensors")
    assert not marker.exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # it would have been


def test_other_contents_are_refused(tmp_path, refuse):
    config, tensors = naive_mamba.checkpoint()
    name = "backbone.norm_f.weight"
    huge = torch.ones(1).expand(2**40)
    for content, text in (
        ([1, 2], "no named tensors but a list"),
        ({**tensors, "step": 3}, "holds a int at 'step'"),
        ({"model": tensors}, "holds a dict at 'model'"),
        ({**tensors, name: huge}, f"{name!r} is not a plain tensor"),
        ({**tensors, name: torch.ones(16).to_sparse()}, f"{name!r} is not a plain tensor"),
        ({name: one.long() for name, one in tensors.items()}, "stores its weights as None"),
    ):
        refuse(write(tmp_path / "src", config, content), text)
    (tmp_path / "src" / "pytorch_model.bin").write_bytes(b"PK\x03\x04 no archive")
    refuse(tmp_path / "src", "pytorch_model.bin cannot be read", "damaged")
    index = {"weight_map": {name: "../other.bin"}}
    (tmp_path / "src" / "pytorch_model.bin").unlink()
    (tmp_path / "src" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refuse(tmp_path / "src", "not an index of .bin files beside it")


# ---- every tensor once, every setting understood ---------------------------------------------------------------------


def test_every_tensor_is_used_and_every_place_filled(tmp_path, refuse):
    config, tensors = naive_mamba.checkpoint()
    bias = "backbone.layers.1.mixer.conv1d.bias"
    source, shape = tmp_path / "src", "has a tensor of another shape than its configuration says:"
    refuse(write(source, config, {k: t for k, t in tensors.items() if k != bias}), f"has no tensor for {bias}")
    refuse(write(source, config, {**tensors, "backbone.more": torch.ones(2)}), "has no place for: backbone.more")
    refuse(write(source, config, {**tensors, bias: torch.ones(7)}), f"{shape} {bias}")
    head = {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}
    refuse(write(source, config, head), "head differs from its embedding", "tie_embeddings")
    rows = {key: tensors[key][:61] for key in ("lm_head.weight", "backbone.embedding.weight")}
    refuse(write(source, config, {**tensors, **rows}), f"{shape} backbone.embeddings.weight")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"attn_layer_idx": [1]}, "attention in layers [1]"),
        ({"d_intermediate": 64}, "d_intermediate=64"),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"new": 1}, "new=1 in its config.json is unknown"),
        ({"d_model": "16"}, "d_model='16'"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", **MAMBA2, "norm_before_gate": True}}, "norm_before_gate=True"),
        ({"ssm_cfg": {"layer": "Mamba2", **MAMBA2, "D_has_hdim": True}}, "D_has_hdim=True"),
        ({"ssm_cfg": {"layer": "Mamba2", **MAMBA2, "d_ssm": 16}}, "d_ssm=16"),
        ({"ssm_cfg": {"layer": "Mamba2", **MAMBA2, "headdim": 5}}, "headdim=5"),
        ({"ssm_cfg": 3}, "ssm_cfg=3"),
    ],
)
def test_what_transformers_does_not_compute_is_refused(tmp_path, refuse, changes, text):
    config, tensors = naive_mamba.checkpoint()
    refuse(write(tmp_path / "src", {**config, **changes}, tensors), text)


def test_sources_that_are_none(tmp_path, refuse, owner, words):
    refuse(tmp_path / "nowhere.gguf", "no existing directory or .gguf file")
    refuse(f"{owner}/nowhere", "no such repository")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "has no config.json")
    refuse(tmp_path / "empty", "has no revision 'main'", revision="main")
    refuse(folder_of(tiny("llama"), tmp_path / "ready"), "has safetensors already")
    source = write(tmp_path / "src", *naive_mamba.checkpoint())
    refuse(source, "dtype='int8'", "float32", dtype="int8")
    (source / "pytorch_model.bin").unlink()
    refuse(source, "no model.safetensors and no pytorch_model.bin")


def test_an_interrupted_conversion_leaves_nothing(tmp_path, words, monkeypatch):
    source = write(tmp_path / "src", *naive_mamba.checkpoint())

    def interrupt(inner, target):
        assert (inner / "model.safetensors").is_file()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_move", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "made" / "out", words)
    assert not list((tmp_path / "made").iterdir())
    convert(source, tmp_path / "made" / "out", words)


def test_what_was_written_is_read_back(tmp_path, refuse, monkeypatch):
    source = write(tmp_path / "src", *naive_mamba.checkpoint())
    from transformers import MambaForCausalLM

    save = MambaForCausalLM.save_pretrained

    def damage(self, folder, **options):
        changed = {"backbone.norm_f.weight": self.backbone.norm_f.weight + 1}
        save(self, folder, state_dict={**self.state_dict(), **changed}, **options)

    monkeypatch.setattr(MambaForCausalLM, "save_pretrained", damage)
    refuse(source, "what was written is not what was read")
