"""LoRA on hybrids: safe targets, refusals, and every round trip."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.training.lora import check_adapters, lora_config, lora_targets
from manticore_hf.utils.unwrap import hybrid_of

VOCAB = 60


def _llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def _mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, state_size=4))


def _jamba():
    return JambaForCausalLM(
        JambaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        )
    )


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = ManticoreForCausalLM.from_components([_llama(), _mamba()], num_blocks=2)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


IDS = torch.arange(24).view(2, 12) % VOCAB


def _train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_targets_leave_out_what_must_not_be_wrapped():
    model = ManticoreForCausalLM.from_components([_llama(), _mamba(), _jamba(), _gpt2()], num_blocks=2)
    targets = lora_targets(model)
    leaves = {t.rpartition(".")[2] for t in targets if t.startswith("mamba.")}
    assert leaves == {"in_proj"}
    assert {"q_proj", "o_proj", "up_proj"} <= {t.rpartition(".")[2] for t in targets if t.startswith("llama.")}
    assert {"c_attn", "c_proj", "c_fc"} == {t.rpartition(".")[2] for t in targets if t.startswith("gpt2.")}
    jamba = [t for t in targets if t.startswith("jamba.")]
    assert any("q_proj" in t for t in jamba) and not any("dt_proj" in t or "router" in t for t in jamba)
    assert not any("lm_head" in t or "embed" in t or "hybrid_mixer" in t for t in targets)
    assert all(t.startswith("llama.") for t in lora_targets(model, ["llama"]))


def test_every_adapter_gets_a_gradient_and_the_start_changes_nothing(saved):
    model = ManticoreForCausalLM.from_pretrained(saved)
    before = model(IDS).logits
    peft = get_peft_model(model, lora_config(model, r=2))
    torch.testing.assert_close(peft.eval()(IDS).logits, before)
    peft.train()
    with torch.no_grad():  # B = 0 at the start would leave A without gradient
        for key, parameter in peft.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
    peft(input_ids=IDS, labels=IDS).loss.backward()
    adapters = {k: p for k, p in peft.named_parameters() if "lora_" in k}
    assert adapters and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())
    mixer = {k: p for k, p in peft.named_parameters() if "modules_to_save" in k and p.requires_grad}
    assert any("alpha_logits" in k for k in mixer) and any("into" in k for k in mixer)
    frozen = [p for k, p in peft.named_parameters() if "lora_" not in k and "modules_to_save" not in k]
    assert frozen and not any(p.requires_grad for p in frozen)


def test_the_trained_mixer_is_the_one_that_runs(saved):
    model = ManticoreForCausalLM.from_pretrained(saved)
    peft = _train(get_peft_model(model, lora_config(model, r=2)))
    with torch.no_grad():
        before = peft(IDS).logits
        for key, parameter in peft.named_parameters():
            if "modules_to_save" in key and "out_of" in key:
                parameter.add_(0.5)
        assert (peft(IDS).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("target", ["dt_proj", "x_proj", "out_proj"])
def test_forbidden_projections_are_refused(saved, target):
    model = ManticoreForCausalLM.from_pretrained(saved)
    with pytest.raises(ManticoreError, match=rf"mamba\.backbone\.layers\.0\.mixer\.{target}"):
        lora_config(model, target_modules=["q_proj", target])
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", target]))
    with pytest.raises(ManticoreError, match="no gradient on some machines"):
        check_adapters(wrapped)


def test_all_linear_is_refused(saved):
    model = ManticoreForCausalLM.from_pretrained(saved)
    with pytest.raises(ManticoreError, match="all-linear"):
        lora_config(model, target_modules="all-linear")


def test_adapter_round_trips(saved, tmp_path):
    model = ManticoreForCausalLM.from_pretrained(saved)
    peft = _train(get_peft_model(model, lora_config(model, r=2)))
    expected = peft(IDS).logits
    peft.save_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(ManticoreForCausalLM.from_pretrained(saved), tmp_path / "adapter").eval()
    torch.testing.assert_close(fresh(IDS).logits, expected)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(auto(IDS).logits, expected)
    generated = auto.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
    uncached = auto.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, uncached)


def test_merge_then_save_then_load(saved, tmp_path):
    model = ManticoreForCausalLM.from_pretrained(saved)
    peft = _train(get_peft_model(model, lora_config(model, r=2)))
    expected = peft(IDS).logits
    merged = peft.merge_and_unload()
    assert isinstance(merged, ManticoreForCausalLM)
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)


def test_the_adapter_is_pinned_to_the_hybrids_commit(saved, hub, tmp_path):
    commit = hub.add_repo("someone/pinned", saved)
    model = ManticoreForCausalLM.from_pretrained("someone/pinned")
    peft = _train(get_peft_model(model, lora_config(model, r=2)))
    expected = peft(IDS).logits
    peft.save_pretrained(tmp_path / "adapter")
    assert peft.peft_config["default"].revision == commit
    # The hybrid's main branch moves on: the adapter still finds what it was made for.
    other = ManticoreForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        other.component("llama").get_output_embeddings().weight.mul_(2.0)
    other.save_pretrained(tmp_path / "moved")
    assert hub.add_repo("someone/pinned", tmp_path / "moved") != commit
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(auto(IDS).logits, expected)


def test_a_hybrid_of_remote_code_is_adapted_alike(saved, hub, owner, tmp_path):
    """Its class is another copy's, though the package is installed."""
    repo = f"{owner}/hybrid"
    commit = hub.add_repo(repo, saved)
    remote = get_class_from_dynamic_module("modeling_manticore.ManticoreForCausalLM", repo)
    assert remote is not ManticoreForCausalLM
    model = remote.from_pretrained(repo)
    assert hybrid_of(model) is model
    config = lora_config(model, r=2)
    assert config.revision == commit
    assert config.target_modules == lora_config(ManticoreForCausalLM.from_pretrained(saved), r=2).target_modules
    with pytest.raises(ManticoreError, match=r"mixer\.x_proj"):
        lora_config(model, target_modules=["q_proj", "x_proj"])
    peft = _train(get_peft_model(model, config))
    assert check_adapters(peft) is peft and hybrid_of(peft) is model
    expected = peft(IDS).logits
    peft.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(auto.get_base_model()) is ManticoreForCausalLM
    assert torch.equal(auto(IDS).logits, expected)
    wrapped = get_peft_model(remote.from_pretrained(repo), LoraConfig(target_modules=["q_proj", "dt_proj"]))
    with pytest.raises(ManticoreError, match="no gradient on some machines"):
        check_adapters(wrapped)
