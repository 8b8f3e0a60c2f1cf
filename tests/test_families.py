"""The table of families: shipped data and page agree, and still hold; what is refused is refused when composing."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from manticore_hf_testing import ROOT
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.families import contract, sweep, table
from manticore_hf.families.examine import CHECKS, Subject, examine
from manticore_hf.families.tiny import tiny_config, tiny_model, tokens

SHIPPED = table.load_shipped()
VERDICTS = {one["type"]: one["verdict"] for one in SHIPPED["types"]}
REASONS = {one["type"]: one["reason"] for one in SHIPPED["types"]}

# One of every kind: attention, a state behind a scale, a hybrid, an encoder-decoder, several parts, both directions,
# layers that need more than the state
SAMPLE = ["nanochat", "falcon_h1", "bart", "gemma3", "bert", "zamba", "gemma3n_text", "moshi"]


def test_the_page_is_the_shipped_data():
    assert (ROOT / "FAMILIES.md").read_text(encoding="utf-8") == table.markdown(SHIPPED)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{table.counted(SHIPPED['types'])['passes']} of {len(VERDICTS)} types" in " ".join(readme.split())


def test_every_type_of_the_installed_transformers_is_in_it():
    assert SHIPPED["versions"]["transformers"] == table.versions()["transformers"], "run `manticore-hf families --run`"
    assert set(VERDICTS) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"manticore"}
    # Whatever breaks the contract must be refused, whatever passes has been through all of it
    assert "wrong" not in VERDICTS.values()
    for one in SHIPPED["types"]:
        assert bool(one["reason"]) == (one["verdict"] != "passes")
        if one["verdict"] == "passes":
            assert one["checks"] == dict.fromkeys(CHECKS, "")
    assert list(VERDICTS.values()).count("passes") >= 90


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_still_has_its_verdict(name):
    found = examine(name)
    assert (found["verdict"], found["reason"]) == (VERDICTS[name], REASONS[name])
    assert found["class"] == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]


def test_a_refused_type_says_so_when_it_is_composed():
    for name, reason in (("zamba", "segments"), ("moshi", "sliding window"), ("gemma3n_text", "on embeddings alone")):
        component = tiny_model(tiny_config(name))
        with pytest.raises(ManticoreError, match=reason) as error:
            ManticoreForCausalLM.from_components([ComponentSpec(component, name="mine")], num_blocks=2)
        assert "'mine'" in str(error.value) and name in str(error.value)


def test_padding_and_caches_are_checked_when_composing(monkeypatch):
    """A class whose cache or padding is wrong is found by running it, without a list of such classes."""
    from transformers.models.llama import modeling_llama

    part = tiny_model(tiny_config("llama"))
    right = modeling_llama.create_causal_mask

    def no_padding(attention_mask=None, **kwargs):
        return right(attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **kwargs)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", no_padding)
    with pytest.raises(ManticoreError, match=r"\(llama\): in Transformers padding on the left changes its predictions"):
        ManticoreForCausalLM.from_components([part])
    ManticoreForCausalLM.from_components([part], verify=False)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", right)
    ManticoreForCausalLM.from_components([part])

    forward = modeling_llama.LlamaRotaryEmbedding.forward
    monkeypatch.setattr(
        modeling_llama.LlamaRotaryEmbedding, "forward",
        lambda self, x, position_ids: forward(self, x, position_ids - position_ids[:, :1]),
    )  # fmt: skip
    with pytest.raises(ManticoreError, match="in Transformers a cache changes its predictions"):
        ManticoreForCausalLM.from_components([part])


class TestContract:
    """The checks find what they are there to find."""

    @pytest.fixture(scope="class")
    def subject(self):
        return Subject("llama")

    def broken(self, monkeypatch, target, name, change, check, *args):
        original = getattr(target, name)
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda *a, **k: change(original(*a, **k)))
            with pytest.raises(contract.Broken) as error:
                check(*args)
        return str(error.value)

    def test_segments(self, subject, monkeypatch):
        from manticore_hf.modeling.segments_manticore import Segment

        text = self.broken(monkeypatch, Segment, "__call__", lambda out: out + 1e-6, contract.check_segments,
                           subject.component, (0, 2, 5))  # fmt: skip
        assert "in 2 segments and the uncut model differ" in text

    def test_decoding(self, subject, monkeypatch):
        from manticore_hf.modeling.cache_manticore import ManticoreCache

        checks = (contract.check_greedy, contract.check_beams, contract.check_turns)
        for check in checks:
            check(subject.alone)
        monkeypatch.setattr(ManticoreCache, "reorder_cache", lambda self, order: None)
        with pytest.raises(contract.Broken, match="with a cache and without"):
            contract.check_beams(subject.alone)

    def test_gradients(self, subject, monkeypatch):
        from manticore_hf.modeling.segments_manticore import Segment

        text = self.broken(monkeypatch, Segment, "__call__", torch.detach, contract.check_gradients, subject.component)
        assert "get a gradient" in text

    def test_close_and_same(self):
        one = torch.ones(3)
        contract.close(one, one + 1e-6)
        for got, wanted in ((one, one + 1e-3), (one, one * float("nan")), (one, torch.ones(4))):
            with pytest.raises(contract.Broken):
                contract.close(got, wanted)
        with pytest.raises(contract.Broken, match="x differ"):
            contract.same(tokens(), tokens(seed=2), "x")


def _fake(verdicts):
    def work(name, sender):
        if verdicts[name] == "hangs":
            time.sleep(60)
        if verdicts[name] == "dies":
            os._exit(3)
        sender.send({"type": name, "class": "X", "verdict": verdicts[name], "reason": "", "checks": {}, "seconds": 0.0})

    return work


def test_a_sweep_survives_types_that_hang_or_die_and_goes_on(tmp_path, monkeypatch):
    import multiprocessing

    verdicts = {"gpt2": "passes", "llama": "hangs", "mamba": "dies"}
    monkeypatch.setattr(sweep, "_work", _fake(verdicts))
    monkeypatch.setattr(sweep, "_context", lambda: multiprocessing.get_context("fork"))
    found = sweep.sweep(tmp_path, list(verdicts), time_limit=2, quiet=True)
    assert [one["verdict"] for one in found] == ["passes", "unknown", "unknown"]
    assert "within 2 s" in found[1]["reason"] and "status 3" in found[2]["reason"]
    # What is finished is not done again; other versions are
    monkeypatch.setattr(sweep, "run_one", lambda *args: pytest.fail("run again"))
    assert sweep.sweep(tmp_path, list(verdicts), quiet=True) == found
    file = tmp_path / "types" / "gpt2.json"
    file.write_text(json.dumps({**found[0], "versions": {}}))
    with pytest.raises(pytest.fail.Exception):
        sweep.sweep(tmp_path, ["gpt2"], quiet=True)
    # All types: data and page are written
    monkeypatch.setattr(sweep, "run_one", lambda context, name, limit: {**found[0], "type": name})
    sweep.sweep(tmp_path, quiet=True)
    data = json.loads((tmp_path / "families.json").read_text())
    assert [one["type"] for one in data["types"]] == sweep.all_types()
    assert Path(tmp_path / "FAMILIES.md").read_text() == table.markdown(data)


def test_the_command_prints_what_is_shipped(capsys):
    assert main(["families", "--type", "llama", "bart"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out and "encoder-decoder" in out and "1 passes, 1 refused" in out
    assert main(["families", "--verdict", "refused"]) == 0
    assert "LlamaForCausalLM" not in capsys.readouterr().out
    for wrong, text in (
        (["--type", "lama"], "did you mean llama"),
        (["--run"], "--run needs --output-dir"),
        (["--output-dir", "x"], "give --run, too"),
    ):
        assert main(["families", *wrong]) == 2
        assert text in capsys.readouterr().err
