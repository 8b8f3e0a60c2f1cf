"""`manticore-hf inspect`: counted sizes against measured ones, and what it must not do."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, hybrid
from hub_models import nudge, publish, tiny, tokenizer
from huggingface_hub import try_to_load_from_cache

from manticore_hf import ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.hub.inspection import inspect_hybrid
from manticore_hf.training.prune import prune

# Attention, without and with windows and tables of positions; states of both kinds; both; experts; its own memory
QUICK = ["gemma2", "jamba", "mamba2", "opt_projected", "recurrent_gemma"]
OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in sorted(FAMILIES) if family not in QUICK]


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("family", [*QUICK, *OTHERS])
def test_every_family(family, tmp_path):
    model = hybrid(family)
    model.save_pretrained(tmp_path)
    found = inspect_hybrid(tmp_path, tokens=16)
    assert [row["layers"] for row in found["blocks"]] == ["0-2", "3-4"]
    alone, whole = found["parts"]
    assert alone["parameters"] == sum(p.numel() for p in model.component(family).parameters())
    assert whole["parameters"] == sum(p.numel() for p in model.parameters())
    assert whole["flops_per_token"] >= alone["flops_per_token"] > 0
    assert alone["cache_bytes_per_token"] + alone["state_bytes"] > 0


def test_only_settings_that_apply_are_shown(tmp_path, capsys, uncounted):
    idle = {"projector", "projector_init", "gate", "reference_component"}
    for name, settings, hidden in (
        ("online", {"mixture": "online"}, idle | {"objective"}),
        ("token", {}, idle),
        ("mixed", {"embeddings": "mixed"}, set()),
        ("blocks", {"num_blocks": 2}, set()),
        ("none", {"num_blocks": 2, "projector": "none"}, set()),
    ):
        parts = [tiny("gpt_neox"), tiny("llama")]
        ManticoreForCausalLM.from_components(parts, **settings).save_pretrained(tmp_path / name)
        assert main(["inspect", str(tmp_path / name)]) == 0
        shown = capsys.readouterr().out
        for key in idle:
            assert (f"{key}=" not in shown) == (key in hidden), (name, key)
        assert ("objective" in hidden) <= ("chosen when the hybrid is first trained" not in shown), name
    assert "mixture=token" in shown


def test_sizes_are_the_measured_ones(tmp_path):
    model = hybrid("gpt_neox+mamba")
    model.save_pretrained(tmp_path)
    found = inspect_hybrid(tmp_path, tokens=32)
    rows = {(row["block"], row["component"]): row for row in found["blocks"]}
    cache = model.make_cache()
    model(input_ids=torch.zeros(1, 32, dtype=torch.long), past_key_values=cache, use_cache=True)
    for (block, name), row in rows.items():
        layers = cache.view(name, block - 1).layers
        kept = [x for layer in layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        grown = sum(x.nbytes for x in kept if isinstance(x, torch.Tensor))
        states = [
            getattr(layer, kind).values()
            for layer in layers
            for kind in ("conv_states", "recurrent_states")
            if hasattr(layer, kind)
        ]
        assert row["cache_bytes_per_token"] * 32 == grown
        assert row["state_bytes"] == sum(x.nbytes for values in states for x in values if x is not None)
        start, stop = map(int, row["layers"].split("-"))
        assert model.config.bounds(name)[block - 1 : block + 1] == [start, stop + 1]
    # GPT-NeoX by hand: 2 per weight of a matrix, and 4 x time x width for scores and values of each layer
    config = model.config.gpt_neox
    d, f = config.hidden_size, config.intermediate_size
    layer = 2 * (4 * d * d + 2 * d * f) + 4 * 32 * d
    assert rows[1, "gpt_neox"]["flops_per_token"] == 3 * layer
    alpha = model.mixture_weights()
    for (block, name), row in rows.items():
        wanted = alpha[block - 1, model.config.component_names.index(name)].item()
        assert row["alpha"] == pytest.approx(wanted, abs=1e-6)


def test_a_pruned_hybrid(tmp_path, capsys):
    soft = hybrid("gpt_neox+mamba", num_blocks=3)
    prune(soft, ["gpt_neox", "gpt_neox", "mamba"]).save_pretrained(tmp_path)
    found = inspect_hybrid(tmp_path)
    assert [(row["block"], row["component"], row["alpha"]) for row in found["blocks"]] == [
        (1, "gpt_neox", 1.0),
        (3, "mamba", 1.0),
    ]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "route=['gpt_neox', 'gpt_neox', 'mamba']" in capsys.readouterr().out


def test_nothing_is_downloaded_and_no_code_is_run(hub, owner, tmp_path, capsys):
    model = hybrid("gpt_neox+mamba")
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*_manticore.py"):
        file.write_text("raise SystemExit('the code of the repo was run')\n")
    hub.add_repo(f"{owner}/inspected", tmp_path)
    shutil.rmtree(tmp_path)
    assert main(["inspect", f"{owner}/inspected", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    alpha = model.mixture_weights()
    for row in found["blocks"]:
        wanted = alpha[row["block"] - 1, model.config.component_names.index(row["component"])].item()
        assert row["alpha"] == pytest.approx(wanted, abs=1e-6)
    assert main(["inspect", f"{owner}/nowhere"]) == 2
    assert "cannot be read as a hybrid" in capsys.readouterr().err
    assert try_to_load_from_cache(f"{owner}/inspected", "model.safetensors") is None  # a range was read, not the file
    assert try_to_load_from_cache(f"{owner}/inspected", "config.json") is not None


# ---- where it comes from ---------------------------------------------------------------------------------------------


@pytest.fixture
def published(hub, owner, tmp_path, counted_once):
    """A hybrid on the Hub that has one tensor of its own of component a. Returns its repo id."""
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src", tokenizer())
    publish(hub, f"{owner}/b", tiny("mamba"), tmp_path / "src")
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"])
    nudge(model, "a.gpt_neox.embed_in.weight").save_pretrained(tmp_path / "out")
    hub.add_repo(f"{owner}/h", tmp_path / "out")
    return f"{owner}/h"


def inspected(repo_id, capsys, *options):
    assert main(["inspect", repo_id, *options]) == 0
    return capsys.readouterr().out


def change(hub, repo_id, **files):
    present = hub.files(repo_id)
    hub.add_repo(repo_id, {**present, **{name.replace("__", "."): data for name, data in files.items()}})


def test_the_repository_is_described(published, hub, owner, capsys):
    hub.clear_requests()
    shown = inspected(published, capsys)
    assert f"{published}@{hub.head(published)}: {len(hub.files(published))} files" in shown
    assert "tensors: 1 of a, " in shown and "of hybrid_mixer" in shown
    count = len([name for name in hub.files(published) if name.endswith("_manticore.py")])
    assert f"code: {count} files identical to the installed" in shown and "CODE" not in shown and "PICKLES" not in shown
    assert shown.count("; public, ") == 2
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched <= {"config.json", "model.safetensors"} and f"/{owner}/a/resolve" not in str(hub.requests)


def test_what_is_not_as_it_should_be_stands_out(published, hub, owner, capsys):
    change(hub, published, scan_manticore__py=b"import os", evil__py=b"x", pytorch_model__bin=b"x")
    shown = inspected(published, capsys)
    assert "CODE different from the installed manticore-hf, read it before running it: scan_manticore.py" in shown
    assert "CODE not in the installed manticore-hf, read it before running it: evil.py" in shown
    assert "PICKLES (never read): pytorch_model.bin" in shown


def test_a_directory_is_described_alike(published, hub, tmp_path, capsys):
    (tmp_path / "out" / "evil.py").write_text("x")
    shown = inspected(str(tmp_path / "out"), capsys)
    assert "tensors: 1 of a, " in shown and "running it: evil.py" in shown and "repository:" in shown
    found = json.loads(inspected(str(tmp_path / "out"), capsys, "--json"))
    assert found["repository"]["code"]["evil.py"] == "unknown"
    assert [entry["state"]["access"] for entry in found["components"]] == ["public", "public"]


def test_what_a_run_leaves_beside_a_hybrid_raises_no_alarm(published, tmp_path, capsys):
    """Checkpoints with code, weights and pickles, and what GGUF files were converted to: nothing that `push` takes."""
    plain = inspected(str(tmp_path / "out"), capsys)
    for name in ("checkpoint-8", "_converted/a"):
        shutil.copytree(tmp_path / "out", tmp_path / "out2" / name)
        (tmp_path / "out2" / name / "optimizer.pt").write_bytes(b"x")
    shutil.copytree(tmp_path / "out2", tmp_path / "out", dirs_exist_ok=True)
    (tmp_path / "out" / "tokenizer_b").mkdir()
    (tmp_path / "out" / "tokenizer_b" / "odd.py").write_text("x")
    shown = inspected(str(tmp_path / "out"), capsys)
    assert "different" not in shown and "PICKLES" not in shown and "1 of a, " in shown
    assert "not looked at, of which nothing is published: _converted, checkpoint-8\n" in shown
    assert "running it: tokenizer_b/odd.py\n" in shown and "not looked at" not in plain


def test_the_state_of_components_is_shown(published, hub, owner, capsys):
    repos = hub._storage.repos
    repos[f"{owner}/a"].private = True
    repos[f"{owner}/b"].gated = "auto"
    shown = inspected(published, capsys)
    assert "; private, " in shown and "; gated, " in shown
    del repos[f"{owner}/b"]
    hub.fault(f"GET /api/models/{owner}/a", "status", times=-1, status=404)
    shown = inspected(published, capsys)
    assert "MISSING: the hybrid cannot be loaded" in shown


def test_files_that_are_not_the_recorded_ones_are_named(published, hub, capsys):
    values = json.loads(hub.files(published)["config.json"])
    values["components"][0]["files"]["model.safetensors"] = "0" * 64
    change(hub, published, config__json=json.dumps(values).encode())
    assert "NOT the recorded files: model.safetensors" in inspected(published, capsys)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x08\0\0\0\0\0\0\0" + b"[" * 8,
        b"\x10\x27\0\0\0\0\0\0" + b"[" * 10000,
    ],
    ids=range(6),
)
def test_damaged_weights_do_not_keep_it_from_being_shown(published, hub, capsys, data):
    change(hub, published, model__safetensors=data)
    assert "tensors: " in inspected(published, capsys)


def test_alpha_is_read_from_shards(published, hub, owner, tmp_path):
    model = ManticoreForCausalLM.from_components([tiny("gpt_neox"), tiny("mamba")])
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    hub.add_repo(f"{owner}/shards", tmp_path / "shards")
    for source in (tmp_path / "shards", f"{owner}/shards"):
        assert [row["alpha"] for row in inspect_hybrid(source)["blocks"]] == [0.5, 0.5]


@pytest.mark.slow
def test_without_a_hub_a_directory_is_described_all_the_same(published, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    for source, code in ((tmp_path / "out", 0), ("org/nowhere", 2)):
        command = [sys.executable, "-m", "manticore_hf.cli", "inspect", str(source)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        assert done.stdout.count("; the Hub does not answer") == (2 if code == 0 else 0)
        assert ("cannot be read as a hybrid" in done.stderr) == bool(code)
