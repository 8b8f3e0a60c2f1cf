"""Thousands of damaged files of every other kind that is read: each is read or passed over, or is a sentence.

The seeds are made here, by code. Configurations and recipes have files of their own, `test_fuzz_config.py` and
`test_fuzz_recipe.py`.
"""

import dataclasses
import io
import json
import re
import shutil
import struct

import pytest
from families import tiny as tiny_llama
from fuzzing import fuzzed, garbled, mutated, outcome
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from manticore_hf.modeling.references_manticore import shards
from test_convert_gguf import SIZES as LLAMA_SIZES
from test_convert_gguf import write
from test_gguf_header import GOOD, SIZES, array, field, gguf, tensor, text
from tiny_hybrid import mixed_hybrid, save

from manticore_hf import ManticoreError
from manticore_hf.compare import harness
from manticore_hf.compose.convert.convert import _read_config
from manticore_hf.compose.convert.gguf import load_gguf
from manticore_hf.compose.convert.gguf_header import check_header, read_header
from manticore_hf.compose.convert.gguf_tokenizer import read_gguf_tokenizer
from manticore_hf.compose.convert.mamba_ssm import is_mamba_ssm, mamba_config
from manticore_hf.compose.convert.read_checkpoint import Source
from manticore_hf.hub import provenance
from manticore_hf.hub.card import read_results
from manticore_hf.hub.card_merge import Card, choose, merge
from manticore_hf.hub.eval_results import _of_tasks
from manticore_hf.hub.licenses import combine, describe, read_license
from manticore_hf.hub.publish import _validate
from manticore_hf.report import facts as facts_module
from manticore_hf.report.comparison import read_comparison
from manticore_hf.report.facts import gather
from manticore_hf.report.one_run import one_run
from manticore_hf.report.render import render
from manticore_hf.report.verdict import decide
from manticore_hf.utils.saving import check_whole

INDEX = {
    "metadata": {"total_size": 100, "total_parameters": 25},
    "weight_map": {f"layer.{i}.weight": f"model-0000{i % 3 + 1}-of-00003.safetensors" for i in range(9)},
}
HEADER = {
    "__metadata__": {"format": "pt"},
    "hybrid_mixer.alpha_logits": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "a.layers.0.weight": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [16, 40]},
}
STAGE = {
    "stage": "finetune", "steps": 40, "components": ["a", "b"], "data": "text.txt", "tokens": 4000,
    "losses": {"hybrid": 2.1, "a": 2.2, "b": 2.3, "ensemble": 2.15}, "mixture_weights": [[0.5, 0.5]],
    "note": "measured once",
}  # fmt: skip
STATE = {
    "global_step": 40, "total_flos": 1e12,
    "log_history": [
        {"loss": 2.5, "loss/mixture": 2.4, "alpha/1/a": 0.5, "alpha/1/b": 0.5, "step": 10, "epoch": 0.5},
        {"eval_loss": 2.3, "step": 20}, {"loss": 2.2, "step": 40}, {"train_runtime": 12.5, "step": 40},
    ],
}  # fmt: skip
EVALUATION = [
    {
        "losses": {"hybrid": 2.1, "a": 2.2}, "data": "org/texts", "tokens": 512, "own": "hybrid", "bytes": 2048,
        "bits_per_byte": {"hybrid": 1.1, "a": 1.2}, "differences": {"a": [0.1, 0.05, 0.15]}, "missing": {"b": "why"},
    },
]  # fmt: skip


def _row(name, kind, loss):
    return {
        "name": name,
        "kind": kind,
        "seeds": [0, 1, 2],
        "loss": loss,
        "interval": [loss - 0.01, loss + 0.01],
        "losses": [loss] * 3,
        "difference": 0.1,
        "difference_interval": [0.08, 0.12],
        "p": 0.01,
        "seeds_won": 3,
        "by_kind": {"prose": loss, "code": loss},
        "needs": "",
        "parameters": 1e6,
        "flops_per_token": 1e6,
        "training_flops": 1e12,
        "training_tokens": 60_000,
        "seconds": 33.0,
        "accuracy": 0.5,
        "bits_per_byte": 1.1,
    }


COMPARISON = {
    "version": 1, "data": "train.txt", "test": "test.txt", "tokens": 60_000, "test_tokens": 30_720, "seeds": [0, 1, 2],
    "hybrid": "hybrid, 1 block", "machine": "x86_64",
    "rows": [_row("hybrid, 1 block", "hybrid", 2.4), _row("a, tuned", "component", 2.5), _row("e", "ensemble", 2.45)],
}  # fmt: skip
TASKS = {
    "settings": {"num_fewshot": 5, "limit": None}, "datasets": {"quiz": ["org/quiz", "hard"], "plain": ["a/b", None]},
    "scores": {"hybrid": {"quiz": {"acc": [0.4, 0.01]}, "plain": {"acc": [0.5, None]}}, "a": {"quiz": {"acc": [1, 1]}}},
}  # fmt: skip
MAMBA_SSM = {
    "d_model": 16, "d_intermediate": 0, "n_layer": 2, "vocab_size": 64, "ssm_cfg": {"layer": "Mamba2", "d_state": 4},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip
METADATA = {
    "license": "mit", "license_name": "x", "tags": ["hybrid"], "datasets": ["org/texts"], "base_model": ["a/b"],
    "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation", "date": "2026-01-01",
    "model-index": [{"name": "x", "results": [{
        "task": {"type": "text-generation", "name": "x"}, "dataset": {"type": "org/texts", "name": "org/texts"},
        "metrics": [{"type": "loss", "value": 2.5, "name": "loss", "verified": False}],
        "source": {"name": "x", "url": "https://x.example"},
    }]}],
    "widget": [{"text": "x"}], "extra_gated_fields": {"name": "text"}, "self": 1,
}  # fmt: skip
CARD = Card(
    {"license": "mit", "tags": ["hybrid"], "library_name": "transformers"}, {"title": "# A", "results": "| x |"}
)


def written(path, values, random):
    """A JSON file of changed values, or of a text that was garbled."""
    if random.randrange(4):
        content = json.dumps(mutated(values, random, times=random.choice([1, 1, 2, 5])))
    else:
        content = garbled(json.dumps(values), random, times=random.choice([1, 3]))
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    return path


def gather_saved(root):
    """What is known of a saved hybrid."""
    return gather(save(mixed_hybrid(num_blocks=1, mixture="static"), root / "hybrid"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return gather_saved(tmp_path_factory.mktemp("saved"))


def test_the_seeds_themselves_are_read(tmp_path, saved):
    random = __import__("random").Random(0)
    for name, values in (("stage.json", STAGE), ("trainer_state.json", STATE), ("evaluation.json", EVALUATION)):
        (tmp_path / name).write_text(json.dumps(values))
    (tmp_path / "comparison.json").write_text(json.dumps(COMPARISON))
    assert len(read_results(tmp_path)) == 2 and facts_module._stage(tmp_path).seconds == 12.5
    assert _rendered(saved, tmp_path) and random
    (tmp_path / "index.json").write_text(json.dumps(INDEX))
    assert len(shards(tmp_path / "index.json", ("x", "y"))) == 3
    (tmp_path / "x.gguf").write_bytes(GGUF)
    assert len(check_header("x", tmp_path / "x.gguf", SIZES).tensors) == 2


@fuzzed(2000)
@given(random=st.randoms())
def test_indices_of_shards(tmp_path, random):
    def run():
        found = shards(written(tmp_path / "index.json", INDEX, random), ("The index", "do without it."))
        assert all("/" not in name and name.endswith(".safetensors") for name in found)

    outcome(run)


@fuzzed(2000)
@given(random=st.randoms())
def test_headers_of_safetensors(tmp_path, random):
    """As `inspect` reads them: what is wrong is passed over."""
    if random.randrange(3):
        raw = json.dumps(mutated(HEADER, random, times=random.choice([1, 1, 2, 5]))).encode("utf-8", "surrogatepass")
    else:
        raw = garbled(json.dumps(HEADER), random).encode("utf-8", "surrogatepass")
    size = random.choice([len(raw), len(raw), len(raw), 2**62, 0, len(raw) + 3])
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", size) + raw + b"\0" * 40)

    def run():
        assert isinstance(provenance._count_tensors(str(tmp_path), "model.safetensors", None), dict)
        try:
            provenance.read_header(io.BytesIO((tmp_path / "model.safetensors").read_bytes()))
        except (ValueError, RecursionError):
            pass

    outcome(run)


GGUF = gguf(
    *GOOD,
    array("tokenizer.ggml.tokens", 8, 3, text("a") + text("bc") + text("")),
    array("tokenizer.ggml.scores", 6, 3, b"\0" * 12),
    field("general.license", 8, text("mit")),
    field("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
    field("general.alignment", 4, struct.pack("<I", 64)),
    tensors=[tensor("token_embd.weight", (4, 2)), tensor("blk.0.attn_q.weight", (4,), offset=64)],
    data=b"\0" * 128,
)


@fuzzed(4000)
@given(random=st.randoms())
def test_gguf_headers(tmp_path, random):
    data = bytearray(GGUF)
    for _ in range(random.choice([1, 1, 2, 4, 8])):
        at, kind = random.randrange(len(data)), random.randrange(6)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            number = random.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
            data[at : at + 8] = struct.pack("<Q", number)
        elif kind == 2:
            data[at : at + 4] = struct.pack("<I", random.choice([0, 1, 8, 9, 99, 2**31 - 1, 2**32 - 1]))
        elif kind == 3:
            del data[at : at + random.choice([1, 4, 8, 100])]
        elif kind == 4:
            data[at:at] = data[at : at + random.choice([1, 8, 40])]
        else:
            data[at:] = b""
        data = data or bytearray(b"G")
    (tmp_path / "x.gguf").write_bytes(data)

    def run():
        try:
            assert read_header(tmp_path / "x.gguf", SIZES).begin <= len(data) + 2**20
        except ValueError:
            pass
        try:
            check_header("x", tmp_path / "x.gguf", SIZES)
        except ManticoreError as err:
            assert "x.gguf" in str(err)
            raise

    outcome(run)


def write_gguf(root):
    """A GGUF file that can be converted, and where its header ends: (bytes, offset)."""
    sizes = {**LLAMA_SIZES, "max_position_embeddings": 64}
    path = write(root / "whole.gguf", tiny_llama("llama", **sizes))
    return path.read_bytes(), check_header("x", path, SIZES).begin


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf"))


@fuzzed(40)
@given(random=st.randoms())
def test_gguf_files(whole, tmp_path, random):
    """What passes as a header is read by libraries that believe it."""
    data, end = bytearray(whole[0]), whole[1]
    for _ in range(random.choice([1, 1, 2, 3])):
        at, kind = random.randrange(end - 8), random.randrange(3)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at : at + 4] = struct.pack("<I", random.choice([0, 1, 3, 63, 2**16, 2**31 - 1, 2**32 - 1]))
        else:  # a number that belongs to a key
            at = random.choice([found.end() for found in re.finditer(rb"llama\.[a-z_.]+\x04\0\0\0", data)])
            data[at : at + 4] = struct.pack("<I", random.choice([0, 1, 2, 3, 5, 2**20, 2**31 - 1, 2**32 - 1]))
    (tmp_path / "x.gguf").write_bytes(data)

    def run():
        load_gguf("x", tmp_path / "x.gguf")
        read_gguf_tokenizer("x", tmp_path / "x.gguf")

    outcome(run)


@fuzzed(2000)
@given(random=st.randoms())
def test_cards(tmp_path, random):
    whole, _ = merge(CARD)
    if random.randrange(2):
        present = garbled(whole, random, times=random.choice([1, 2, 6]))
    else:
        values = mutated(METADATA, random, times=random.choice([1, 1, 2, 5]))
        present = f"---\n{json.dumps(values)}\n---\n{whole.split('---', 2)[2]}"
    file = tmp_path / "README.md"
    file.write_text(present, encoding="utf-8", errors="surrogatepass")

    def run():
        license = read_license(file)
        assert license is None or license.isprintable()
        describe(combine({"a": license}))
        text, kept = merge(CARD, choose(present, None))
        assert isinstance(text, str) and isinstance(kept, list)
        _validate(text)
        merge(CARD, choose(present, whole))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelCard, "validate", lambda card: None)  # which asks the Hub
        outcome(run)


@fuzzed(500)
@given(random=st.randoms())
def test_notes_of_unfinished_saves(tmp_path, random):
    """A stranger's directory may have one: nothing outside of it is moved, and nothing in it but what it names."""
    inner = tmp_path / ".out.saving-x" / "out"
    for place, files in ((tmp_path / "out", ("config.json", "mine")), (inner, ("config.json", "plots/x.png"))):
        shutil.rmtree(place, ignore_errors=True)
        for name in files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text("x")
    (tmp_path / "secret").write_text("x")
    note = {"from": "../.out.saving-x/out", "files": ["config.json", "plots/x.png", "../secret"], "same": True}
    if random.randrange(3):
        note["files"].pop()
    written(tmp_path / "out" / ".saving", note, random)
    outcome(check_whole, tmp_path / "out")
    assert (tmp_path / "secret").is_file() and (tmp_path / "out" / "mine").is_file()


@fuzzed(500)
@given(random=st.randoms())
def test_configurations_of_mamba_ssm(tmp_path, random):
    """As `convert` reads them."""
    file = written(tmp_path / "config.json", MAMBA_SSM, random)
    shutil.copyfile(file, tmp_path / "config.json.old")

    def run():
        values = _read_config(Source(tmp_path))
        if is_mamba_ssm(values):
            mamba_config("x", values)

    outcome(run)


def _rendered(saved, folder):
    """The report of a saved hybrid with the stage, evaluation and comparison of a folder."""
    stage = facts_module._stage(folder)
    facts = dataclasses.replace(
        saved,
        stages=[stage] if stage else [],
        results=read_results(folder),
        comparison=read_comparison(folder / "comparison.json"),
        comparison_path=folder / "comparison.json",
    )
    pages = render(facts, decide(facts.comparison, facts.found["settings"], "compare", one_run(facts)))
    for page in pages:
        assert all(c.isprintable() or c in "\n\t" for c in page)
    return pages


@fuzzed(1000)
@given(random=st.randoms())
def test_scores_of_tasks(tmp_path, random):
    """As `push` publishes them, and as an evaluation goes on from them."""
    written(tmp_path / "tasks.json", TASKS, random)
    found, notices = _of_tasks(tmp_path / "tasks.json")
    assert len(found) <= 4000 and len("".join(notices)) < 1000

    def run():
        scores, _ = harness._read(tmp_path, TASKS["settings"])
        if "hybrid" in scores:
            harness._print(scores)

    outcome(run)


@fuzzed(500)
@given(random=st.randoms())
def test_stage_evaluation_and_comparison_files(saved, tmp_path, random):
    """Whatever is read of them, the report of it can be written."""
    seeds = {
        "stage.json": STAGE, "trainer_state.json": STATE, "evaluation.json": EVALUATION, "comparison.json": COMPARISON
    }  # fmt: skip
    changed = random.choice(list(seeds))
    for name, values in seeds.items():
        if name == changed:
            written(tmp_path / name, values, random)
        else:
            (tmp_path / name).write_text(json.dumps(values))
    outcome(_rendered, saved, tmp_path)
