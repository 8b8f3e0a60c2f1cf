"""The table of families: shipped data and page agree, and still hold; composing what is unsupported raises."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from manticore_hf_testing import ROOT
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.families import contract, sweep, table
from manticore_hf.families.examine import CHECKS, Examined, examine
from manticore_hf.families.precision import Float64
from manticore_hf.families.tiny import tiny_config, tiny_model, tokens

SHIPPED = table.load_shipped()
VERDICTS = {one["type"]: one["verdict"] for one in SHIPPED["types"]}
REASONS = {one["type"]: one["reason"] for one in SHIPPED["types"]}

# One of every kind: attention, a state behind a scale, a hybrid, one that limits steps and chooses experts, an
# encoder-decoder, several parts, both directions, layers that need more than the state
SAMPLE = ["nanochat", "falcon_h1", "nemotron_h", "bart", "gemma3", "bert", "zamba2", "gemma3n_text", "moshi"]


def test_the_page_is_the_shipped_data():
    assert (ROOT / "FAMILIES.md").read_text(encoding="utf-8") == table.markdown(SHIPPED)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{table.counted(SHIPPED['types'])['passes']} of {len(VERDICTS)} types" in " ".join(readme.split())


def test_every_type_of_the_installed_transformers_is_in_it():
    assert SHIPPED["versions"]["transformers"] == table.versions()["transformers"], "run `manticore-hf families --run`"
    assert set(VERDICTS) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"manticore"}
    # Whatever breaks the contract must be unsupported, whatever passes has been through all of it; nothing is left open
    assert set(VERDICTS.values()) == {"passes", "unsupported"}
    for one in SHIPPED["types"]:
        assert bool(one["reason"]) == (one["verdict"] != "passes")
        if one["verdict"] == "passes":
            assert one["checks"] == dict.fromkeys(CHECKS, "")
    assert list(VERDICTS.values()).count("passes") >= 90


# FalconH1's two ways side by side take the longest; NemotronH has the same two one after the other
@pytest.mark.quick(every=3)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "falcon_h1")) for name in SAMPLE]
)
def test_a_sample_still_has_its_verdict(name):
    found = examine(name)
    assert (found["verdict"], found["reason"]) == (VERDICTS[name], REASONS[name])
    assert found["class"] == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]


def test_an_unsupported_type_says_so_when_it_is_composed():
    for name, reason in (
        ("zamba", "starts from an empty state"),
        ("zamba2", "read the embeddings again.*give num_blocks=1"),
        ("minimax_m3_vl_text", "shifts the blocks"),
        ("moshi", "sliding window"),
        ("gemma3n_text", "on embeddings alone"),
    ):
        # MiniMax's blocks are as long as those of checkpoints, in which the few tokens of `verify` are one
        component = tiny_model(tiny_config(name, **({"index_block_size": 128} if "minimax" in name else {})))
        with pytest.raises(ManticoreError, match=reason) as error:
            ManticoreForCausalLM.from_components([ComponentSpec(component, name="mine")], num_blocks=2)
        assert "'mine'" in str(error.value) and name in str(error.value)


@torch.no_grad()
def test_what_is_unsupported_by_name_is_still_wrong_in_transformers():
    """If this fails, Transformers has fixed it, and the type can leave `UNSUITED`."""
    ids = tokens()
    zamba = tiny_model(tiny_config("zamba"))
    cache = DynamicCache(config=zamba.config)
    parts = [zamba(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split([5, 4], 1)]
    assert (torch.cat(parts, 1) - zamba(input_ids=ids, use_cache=False).logits).abs().max() > 1e-4
    minimax = tiny_model(tiny_config("minimax_m3_vl_text"))
    ids, mask, positions = contract.left_padded()
    padded = minimax(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = minimax(input_ids=ids[:1, contract.PADDING :], use_cache=False).logits
    assert (padded[0, contract.PADDING :] - alone[0]).abs().max() > 1e-3


def test_a_row_of_padding_that_is_no_zeros_is_loaded(tmp_path):
    """Youtu's class initialises it again although it was loaded."""
    model = Examined("youtu").hybrid(beside=False)
    assert model.component("one").get_input_embeddings().weight[0].abs().sum() > 0
    contract.check_saved(model, tmp_path)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("layers", ["mhmhm", "mmmhh"])
def test_zamba2_is_a_component_of_one_block(layers):
    """Its layers read the embeddings again, and ask by their place which weights they share."""
    kinds = ["hybrid" if letter == "h" else "linear_attention" for letter in layers]
    component = tiny_model(tiny_config("zamba2", layers_block_type=kinds, num_mem_blocks=2, time_step_min=0.5))
    parts = [ComponentSpec(component, name="one"), ComponentSpec(Examined("llama").component, name="other")]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=1)
    contract.randomise(model)
    contract.check_greedy(model)
    contract.check_padding(model)
    contract.check_beams(model)
    contract.check_chunks(model, (4, 1, 1, 3, 2))
    contract.check_one_hot(parts, contract.PAPER, (1,))


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
        modeling_llama.LlamaRotaryEmbedding,
        "forward",
        lambda self, x, position_ids: forward(self, x, position_ids - position_ids[:, :1]),
    )
    with pytest.raises(ManticoreError, match="in Transformers a cache changes its predictions"):
        ManticoreForCausalLM.from_components([part])


class TestContract:
    """The checks find what they are there to find."""

    @pytest.fixture(scope="class")
    def subject(self):
        return Examined("llama")

    def broken(self, monkeypatch, target, name, change, check, *args):
        original = getattr(target, name)
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda *a, **k: change(original(*a, **k)))
            with pytest.raises(contract.Broken) as error:
                check(*args)
        return str(error.value)

    def test_segments(self, subject, monkeypatch):
        from manticore_hf.modeling.layer_stack_manticore import Segment

        text = self.broken(
            monkeypatch,
            Segment,
            "__call__",
            lambda out: out + 1e-6,
            contract.check_segments,
            subject.component,
            (0, 2, 5),
        )
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
        from manticore_hf.modeling.layer_stack_manticore import Segment

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
        # As much as rounds in float32 is wrong in float64
        contract.close(one.double(), one.double() + 1e-12)
        with pytest.raises(contract.Broken):
            contract.close(one.double(), one.double() + 1e-6)

    @pytest.mark.parametrize("name", ["mixtral", "nemotron_h", "qwen3_next"])
    def test_float64_reaches_everything(self, name):
        """The same weights, and nothing that computes in float32 on its way."""
        plain = Examined(name).component
        with Float64(), torch.no_grad():
            model = Examined(name, double=True).component
            logits = model(input_ids=tokens(), use_cache=False).logits
            backwards = model(input_ids=tokens().flip(0), use_cache=False).logits.flip(0)
        for key, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[key], value.double()), key
        assert logits.dtype == torch.float64
        by = (plain(input_ids=tokens(), use_cache=False).logits - logits).abs().max()
        assert 0 < by < 1e-3
        # Were anything rounded to float32, rows in another order would show it
        torch.testing.assert_close(backwards, logits, rtol=0, atol=1e-11)

    def test_what_rounds_passes_and_what_is_wrong_does_not(self, monkeypatch):
        """A check that breaks is done again in float64: rounding of 1e-4 vanishes there, a mistake of 1e-4 stays."""
        from manticore_hf.families import examine as module

        def broken(by):
            def check(subject):
                one = torch.ones(3, dtype=torch.float64 if subject.double else torch.float32)
                contract.close(one + by(one.dtype), one, "two ways")

            return check

        checks = {
            "greedy": broken(lambda dtype: 1e-4 if dtype == torch.float32 else 1e-13),
            "beams": broken(lambda dtype: 1e-4),
            "saved": broken(lambda dtype: 1e-4 if dtype == torch.float32 else 1e-13),  # which is not up to rounding
        }
        monkeypatch.setattr(module, "CHECKS", checks)
        found = examine("gpt2")
        assert found["verdict"] == "wrong" and found["checks"]["greedy"] == ""
        assert "by 0.0001" in found["checks"]["beams"] and "; in float64: two ways differ" in found["checks"]["beams"]
        assert "by 0.0001" in found["checks"]["saved"] and "float64" not in found["checks"]["saved"]


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
    # A verdict under the name that it had in version 0.1
    file.write_text(json.dumps({**found[0], "verdict": "refused"}))
    assert sweep.sweep(tmp_path, ["gpt2"], quiet=True) == [{**found[0], "verdict": "unsupported"}]
    file.write_text(json.dumps(found[0]))
    # All types: data and page are written
    monkeypatch.setattr(sweep, "run_one", lambda context, name, limit: {**found[0], "type": name})
    sweep.sweep(tmp_path, quiet=True)
    data = json.loads((tmp_path / "families.json").read_text())
    assert [one["type"] for one in data["types"]] == sweep.all_types()
    assert Path(tmp_path / "FAMILIES.md").read_text() == table.markdown(data)


def test_the_command_prints_what_is_shipped(capsys):
    assert main(["families", "--type", "llama", "bart"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out and "encoder-decoder" in out and "1 passes, 1 unsupported" in out
    assert main(["families", "--verdict", "unsupported"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" not in out and "BartForCausalLM" in out
    with pytest.warns(FutureWarning, match="--verdict refused is now unsupported"):
        assert main(["families", "--verdict", "refused"]) == 0
    assert capsys.readouterr().out == out
    for wrong, text in (
        (["--type", "lama"], "did you mean llama"),
        (["--run"], "--run needs --output-dir"),
        (["--output-dir", "x"], "give --run, too"),
    ):
        assert main(["families", *wrong]) == 2
        assert text in capsys.readouterr().err
