"""LoRA on hybrids: safe targets, refusals, and every round trip."""

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_hybrid import mixed_hybrid
from transformers import (
    AutoModelForCausalLM,
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
from manticore_hf.training.lora import check_adapters, lora_config, lora_targets, prompt_config
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


def _mamba(**settings):
    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, state_size=4, **settings)
    )


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
    with pytest.raises(ManticoreError, match="no gradient on some machines"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", target]))
    with pytest.raises(ManticoreError, match="no gradient on some machines"):
        check_adapters(model)


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
    remote = get_class_from_dynamic_module("hybrid_manticore.ManticoreForCausalLM", repo)
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
    with pytest.raises(ValueError, match="no gradient on some machines"):
        get_peft_model(remote.from_pretrained(repo), LoraConfig(target_modules=["q_proj", "dt_proj"]))


# ---- what others make and load ---------------------------------------------------------------------------------------


def test_whoever_made_the_configuration_what_would_be_silently_wrong_is_refused(saved):
    def wrap(model, **fields):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields))

    def load():
        return ManticoreForCausalLM.from_pretrained(saved)

    with pytest.raises(ManticoreError, match=r"mamba\.backbone\.layers\.0\.mixer\.\w+_proj.*lora_config"):
        wrap(load(), target_modules="all-linear")
    zero = "hybrid_mixer.token_gate.linear"
    with pytest.raises(ManticoreError, match=f"DoRA divides by the norms of weights, and '{zero}' has rows of zeros"):
        wrap(load(), target_modules=[zero], use_dora=True)
    wrap(load(), target_modules=[zero])  # without DoRA it is an ordinary linear map
    later = wrap(load(), target_modules=["q_proj"])
    later.add_adapter("second", LoraConfig(target_modules=["dt_proj"]))
    with pytest.raises(ManticoreError, match="dt_proj"):
        later.train()
    for adapt in (
        lambda tied: wrap(tied, target_modules="all-linear"),
        lambda tied: get_peft_model(tied, lora_config(tied, trainable_token_indices=[3])),
    ):
        with pytest.raises(ManticoreError, match="component 'gpt2', which are one tensor"):
            adapt(ManticoreForCausalLM.from_components([_gpt2(), _llama()]))


def test_dora_on_the_safe_targets_trains_and_merges(saved):
    model = ManticoreForCausalLM.from_pretrained(saved)
    peft = _train(get_peft_model(model, lora_config(model, r=2, use_dora=True)))
    expected = peft(IDS).logits
    assert expected.isfinite().all()
    torch.testing.assert_close(peft.merge_and_unload()(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"embeddings": "mixed", "num_blocks": 2}])
def test_rows_of_all_embeddings_are_trained(tmp_path, settings):
    """Against the same training of the rows by hand: gradients of all other rows set to zero."""
    torch.manual_seed(0)
    ManticoreForCausalLM.from_components([_llama(), _mamba(tie_word_embeddings=False)], **settings).save_pretrained(
        tmp_path
    )
    model, twin = (ManticoreForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    with pytest.raises(ManticoreError, match="rows of one component alone"):
        get_peft_model(
            ManticoreForCausalLM.from_pretrained(tmp_path),
            LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
        )
    config = lora_config(model, train_mixer=False, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    tuned = get_peft_model(model, config)
    for key, parameter in tuned.named_parameters():
        parameter.requires_grad_("trainable_tokens" in key)
    ends = [twin.component(name).get_input_embeddings().weight for name in ("llama", "mamba")]
    optimizers = [torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.5), torch.optim.SGD(ends, 0.5)]
    for _ in range(2):
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        twin(input_ids=IDS, labels=IDS).loss.backward()
        for end in ends:
            end.grad[[i for i in range(VOCAB) if i not in (3, 5)]] = 0
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(tuned.eval()(IDS).logits, twin.eval()(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (twin(IDS).logits - ManticoreForCausalLM.from_pretrained(tmp_path)(IDS).logits).abs().max() > 1e-3
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(ManticoreForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, tuned(IDS).logits)


def test_an_enlarged_vocabulary_comes_back_with_the_adapter(tmp_path):
    torch.manual_seed(0)
    ManticoreForCausalLM.from_components([_llama(), _mamba(tie_word_embeddings=False)]).save_pretrained(tmp_path)

    def load(seed):
        torch.manual_seed(seed)
        model = ManticoreForCausalLM.from_pretrained(tmp_path)
        model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
        return model

    ids = torch.arange(VOCAB - 4, VOCAB + 4)[None]
    with pytest.raises(
        ManticoreError, match=r"resized after loading, and embeddings and heads of \['llama', 'mamba'\]"
    ):
        get_peft_model(load(0), LoraConfig(target_modules=["q_proj"]))
    model = load(1)
    tuned = _train(get_peft_model(model, lora_config(model, r=2)))
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(2), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, tuned(ids).logits)
    # saved with its vocabulary, it needs nothing of the kind
    load(3).save_pretrained(tmp_path / "enlarged")
    whole = ManticoreForCausalLM.from_pretrained(tmp_path / "enlarged")
    assert lora_config(whole).modules_to_save == ["hybrid_mixer"]
    get_peft_model(whole, lora_config(whole))


def test_transformers_loads_a_hybrid_from_its_adapter(saved, tmp_path):
    model = ManticoreForCausalLM.from_pretrained(saved)
    tuned = _train(get_peft_model(model, lora_config(model, r=2)))
    tuned.save_pretrained(tmp_path / "adapter")
    expected = tuned(IDS).logits
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(first(IDS).logits, expected)
    second = ManticoreForCausalLM.from_pretrained(saved)
    second.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(second(IDS).logits, expected)
    generated = first.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, tuned.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False))


def test_rows_of_a_batch_with_adapters_of_their_own(saved):
    """As each row under its adapter; a mixer in full beside the adapters is refused."""
    model = ManticoreForCausalLM.from_pretrained(saved)
    config = lora_config(model, r=2, train_mixer=False)
    tuned = get_peft_model(model, config)
    tuned.add_adapter("second", config)
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    tuned.eval()
    found = tuned(input_ids=IDS, adapter_names=["second", "__base__"]).logits
    tuned.set_adapter("second")
    torch.testing.assert_close(found[:1], tuned(IDS[:1]).logits, atol=1e-5, rtol=1e-5)
    with tuned.disable_adapter():
        torch.testing.assert_close(found[1:], tuned(IDS[1:]).logits, atol=1e-5, rtol=1e-5)
    model = ManticoreForCausalLM.from_pretrained(saved)
    with pytest.raises(ManticoreError, match="adapter_names: each has a full mixer"):
        get_peft_model(model, lora_config(model, r=2)).eval()(input_ids=IDS, adapter_names=["default", "__base__"])


def test_adapters_of_rows_that_are_run_in_another_order_are_refused(saved):
    """Documents, and rows with padding inside, are sorted by length. The refusal leaves nothing for the next call."""
    model = ManticoreForCausalLM.from_pretrained(saved)
    tuned = _train(get_peft_model(model, lora_config(model, r=2, train_mixer=False))).eval()
    mask, right = torch.ones_like(IDS), tuned(input_ids=IDS).logits
    mask[0, 3:6] = 0
    for told in ({"attention_mask": mask}, {"position_ids": torch.tensor([[*range(5), *range(7)]] * 2)}):
        with pytest.raises(ManticoreError, match="adapter_names: rows with several documents, or padding inside, run"):
            tuned(input_ids=IDS, adapter_names=["default", "__base__"], use_cache=False, **told)
        assert torch.equal(tuned(input_ids=IDS).logits, right)


def test_a_second_adapter_has_the_targets_of_the_first(saved):
    model = ManticoreForCausalLM.from_pretrained(saved)
    first = lora_config(model, r=2)
    tuned = get_peft_model(model, first)
    second = lora_config(model, r=3)
    assert second.target_modules == first.target_modules
    tuned.add_adapter("second", second)
    tuned.set_adapter("second")
    _train(tuned)
    assert {one.r for one in tuned.peft_config.values()} == {2, 3}


def test_activated_lora_is_refused(saved):
    """It counts tokens from the end of a row: padding on the right, documents and tokenizers make it other tokens."""
    model = ManticoreForCausalLM.from_pretrained(saved)
    config = lora_config(model, r=2, train_mixer=False)
    tuned = get_peft_model(model, config).eval()
    right = tuned(input_ids=IDS).logits
    config = lora_config(model, r=2, train_mixer=False)
    config.alora_invocation_tokens = [5, 6]
    tuned.add_adapter("activated", config)
    tuned.set_adapter("activated")
    for call in (tuned, tuned.generate):
        with pytest.raises(ManticoreError, match="alora_offsets: aLoRA counts .* of plain LoRA"):
            call(input_ids=IDS)
    assert not any(module._forward_pre_hooks for module in model.modules())
    tuned.set_adapter("default")
    assert torch.equal(tuned(input_ids=IDS).logits, right)


@pytest.mark.parametrize("settings", [{"num_blocks": 1}, {"num_blocks": 2, "embeddings": "mixed"}])
def test_soft_prompts_are_read_where_the_tokens_are(tmp_path, settings):
    """By hand: the prompt before the hybrid's own embeddings, as inputs_embeds; cached as uncached, also if padded."""
    model = mixed_hybrid(**settings)
    model.save_pretrained(tmp_path / "base")
    ids, mask = torch.arange(14).view(2, 7) % 13, torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    for kind in (PromptTuningConfig, PromptEncoderConfig):
        model = ManticoreForCausalLM.from_pretrained(tmp_path / "base")
        tuned = get_peft_model(model, prompt_config(model, kind, num_virtual_tokens=3)).eval()
        embeds = torch.cat([tuned.get_prompt(2), model.get_input_embeddings()(ids)], 1)
        given = {"inputs_embeds": embeds, "attention_mask": torch.cat([torch.ones(2, 3).long(), mask], 1)}
        assert torch.equal(tuned(input_ids=ids, attention_mask=mask).logits, model(**given).logits)
        tuned(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        trained = {key for key, one in tuned.named_parameters() if one.grad is not None and one.grad.any()}
        assert trained and all(key.startswith("prompt_encoder.") for key in trained)
        ways = [{"use_cache": use, "num_beams": beams} for beams in (1, 2) for use in (True, False)]
        said = [
            tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **way) for way in ways
        ]
        assert torch.equal(said[0], said[1]) and torch.equal(said[2], said[3])
        tuned.save_pretrained(tmp_path / kind.__name__)
        again = PeftModel.from_pretrained(
            ManticoreForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / kind.__name__
        )
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, tuned(input_ids=ids).logits)
    with pytest.raises(ManticoreError, match="PrefixTuningConfig is not a prompt that a hybrid can read"):
        prompt_config(model, PrefixTuningConfig)
    sizes = {"num_attention_heads": 1, "num_layers": 1}
    prefixed = get_peft_model(mixed_hybrid(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **sizes))
    with pytest.raises(
        ManticoreError, match="cache is a DynamicCache.* prefix tuning .* use lora_config or prompt_config"
    ):
        prefixed(input_ids=ids)


def test_prefix_tuning_is_refused_where_all_components_attend():
    """`forward` could read such a prefix; `generate(use_cache=False)` would leave it out after the first token."""
    torch.manual_seed(0)
    model = ManticoreForCausalLM.from_components([_llama(), _gpt2()]).eval()
    sizes = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 4}
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **sizes)).eval()
    with pytest.raises(ManticoreError, match="prefix tuning"):
        tuned(input_ids=IDS)
    for cached in (True, False):
        with pytest.raises(ManticoreError, match="prefix tuning"):
            tuned.generate(input_ids=IDS, max_new_tokens=2, use_cache=cached)
