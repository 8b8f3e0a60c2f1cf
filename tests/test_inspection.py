"""`manticore-hf inspect`: counted sizes against measured ones, and what it must not do."""

import json
import shutil

import pytest
import torch
from families import FAMILIES, hybrid
from huggingface_hub import try_to_load_from_cache

from manticore_hf.cli import main
from manticore_hf.hardening import harden
from manticore_hf.inspection import inspect_hybrid


@pytest.mark.parametrize("family", sorted(FAMILIES))
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
        states = [getattr(layer, kind).values() for layer in layers for kind in ("conv_states", "recurrent_states")
                  if hasattr(layer, kind)]  # fmt: skip
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


def test_a_hardened_hybrid(tmp_path, capsys):
    soft = hybrid("gpt_neox+mamba", num_blocks=3)
    harden(soft, ["gpt_neox", "gpt_neox", "mamba"]).save_pretrained(tmp_path)
    found = inspect_hybrid(tmp_path)
    assert [(row["block"], row["component"], row["alpha"]) for row in found["blocks"]] == [
        (1, "gpt_neox", 1.0), (3, "mamba", 1.0)
    ]  # fmt: skip
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
