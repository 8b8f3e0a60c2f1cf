"""QLoRA: what is quantised is what LoRA targets, and nothing else; four bits run on the CPU, too."""

import copy
from pathlib import Path

import families
import hub_models
import pytest
import torch
from manticore_hf.modeling import dtypes_manticore
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from manticore_hf import ManticoreError, ManticoreForCausalLM, lora_config, quantization_skips
from manticore_hf.training.lora import lora_targets

PAGE = Path(__file__).parent.parent / "docs" / "training.md"

# In each family with a state-space layer: what LoRA targets, and what stays in floating point.
STATE_SPACE = {
    "mamba": ({"in_proj"}, {"x_proj", "dt_proj", "out_proj", "lm_head"}),
    "mamba2": ({"in_proj"}, {"out_proj", "lm_head"}),
    "falcon_mamba": ({"in_proj"}, {"x_proj", "dt_proj", "out_proj", "lm_head"}),
    "jamba": (
        {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        {"x_proj", "dt_proj", "out_proj", "lm_head"},  # router and experts are no linear maps
    ),
}  # fmt: skip


def linear(model):
    """Names of the maps that bitsandbytes would quantise."""
    return {k for k, module in model.named_modules() if isinstance(module, Conv1D) or type(module) is nn.Linear}


def leaves(names):
    return {name.rpartition(".")[2] for name in names}


def four_bits(model):
    """Settings for a hybrid or a configuration."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=quantization_skips(model),
    )


def quantised(model):
    return {k for k, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


# ---- the list --------------------------------------------------------------------------------------------------------


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_is_quantised_is_what_lora_targets(family):
    model = families.hybrid(family, num_blocks=1, mixture="token", verify=False)
    skips = quantization_skips(model)
    converted = {key for key in linear(model) if should_convert_module(key, skips)}
    assert converted == set(lora_targets(model))
    assert not any(".lm_head" in key or key.startswith("hybrid_mixer") for key in converted)


def test_the_configuration_is_enough():
    model = families.hybrid("gemma2+jamba", mixture="token", projector="mlp")
    before = copy.deepcopy(model.config.to_dict())
    assert quantization_skips(model.config) == quantization_skips(model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("family", STATE_SPACE)
def test_state_space_projections_are_kept(family):
    model = families.hybrid(family, mixture="token")
    skips = quantization_skips(model)
    inside = {key for key in linear(model) if key.startswith(f"{family}.")}
    converted = {key for key in inside if should_convert_module(key, skips)}
    assert (leaves(converted), leaves(inside - converted)) == STATE_SPACE[family]
    assert len(skips) == len(STATE_SPACE[family][1]) + 1  # one for all layers, and the mixer


def test_a_name_that_ends_another_stays_apart():
    """bitsandbytes takes a plain name for the end of a name, too: `mamba` would speak for `my_mamba`."""
    parts = [("llama", "neo"), ("mamba", "x_neo")]
    specs = [families.ComponentSpec(families.tiny(family), name=name) for family, name in parts]
    model = ManticoreForCausalLM.from_components(specs, num_blocks=2)
    skips = quantization_skips(model)
    assert {key for key in linear(model) if should_convert_module(key, skips)} == set(lora_targets(model))


# ---- four bits on the CPU --------------------------------------------------------------------------------------------


@pytest.fixture
def any_processor(monkeypatch):
    """Where the processor has AVX512-BF16, evaluation repacks the weights for a kernel that rounds to bfloat16."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


@pytest.fixture
def published(hub, owner, tmp_path):
    """A hybrid on the Hub that references its components. Returns (repo id, commit, the hybrid in floating point)."""
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64}
    parts = {
        "a": hub_models.tiny("llama", **wide, intermediate_size=128),
        "b": hub_models.tiny("mamba", 1, **wide),
        "c": hub_models.tiny("gpt2", 2, n_embd=64),
    }
    for name, part in parts.items():
        hub_models.publish(hub, f"{owner}/{name}", part, tmp_path / "src", hub_models.tokenizer())
    model = ManticoreForCausalLM.from_components([f"{owner}/{name}" for name in parts], num_blocks=2, mixture="token")
    families.randomise(model)
    model.save_pretrained(tmp_path / "out")
    commit = hub_models.publish_hybrid(hub, f"{owner}/hybrid", tmp_path / "out")
    assert not hub_models.component_keys(tmp_path / "out")
    return f"{owner}/hybrid", commit, model.eval()


def load(repo, **options):
    settings = four_bits(AutoConfig.from_pretrained(repo))
    return ManticoreForCausalLM.from_pretrained(repo, quantization_config=settings, **options)


def twin(model, plain):
    """The floating point hybrid with the quantised one's rounded weights."""
    from bitsandbytes.functional import dequantize_4bit

    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for key in quantised(model):
            weight, own = model.get_submodule(key).weight, plain.get_submodule(key)
            rounded = dequantize_4bit(weight.data, weight.quant_state)
            own.weight.copy_(rounded.T if isinstance(own, Conv1D) else rounded)
    return plain


def test_a_quantised_hybrid_is_itself_with_rounded_weights(any_processor, published, tmp_path):
    repo, _, plain = published
    model = load(repo)
    assert quantised(model) == set(lora_targets(plain)) == set(lora_targets(model))
    others = {key: value for key, value in plain.state_dict().items() if key.rpartition(".")[0] not in quantised(model)}
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in others.items())
    found, expected = hub_models.logits(model), hub_models.logits(twin(model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - hub_models.logits(plain)).abs().max() > 1e-2  # rounding shows
    model.save_pretrained(tmp_path / "small")
    again = ManticoreForCausalLM.from_pretrained(tmp_path / "small")
    assert quantised(again) == quantised(model)
    assert torch.equal(hub_models.logits(again), found)


def test_the_lines_of_the_docs(published, tmp_path, monkeypatch):
    section = PAGE.read_text(encoding="utf-8").partition("## LoRA and QLoRA")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert "you/manticore-pythia-mamba" in code
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("you/manticore-pythia-mamba", published[0]), names)
    assert quantised(names["model"].get_base_model())
    saved = hub_models.read_json("adapter", "adapter_config.json")
    assert (saved["base_model_name_or_path"], saved["revision"]) == published[:2]
    assert torch.isfinite(hub_models.logits(names["model"])).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_in_four_bits(any_processor, family, tmp_path):
    """No weight that a family reads raw is quantised, in training or with a cache.

    Without AVX512-BF16, for which bitsandbytes cannot repack weights as small as these.
    """
    pytest.importorskip("bitsandbytes")
    from peft import get_peft_model

    plain = families.hybrid(family, num_blocks=1, mixture="token", projector="mlp")
    plain.save_pretrained(tmp_path)
    model = load(tmp_path).eval()
    expected, ids = twin(model, plain), families.tokens()
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, expected(ids).logits, rtol=1e-3, atol=1e-3)
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), logits, rtol=1e-3, atol=1e-3)
    model = get_peft_model(model, lora_config(model, r=2, init_lora_weights=False))
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = {key: p for key, p in model.named_parameters() if "lora_" in key}
    assert adapters and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())


def test_qlora(any_processor, published, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, prepare_model_for_kbit_training

    repo, commit, _ = published
    model = load(repo)
    plain, targets = hub_models.logits(model), quantised(model)
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    model = get_peft_model(prepare_model_for_kbit_training(model), lora_config(model, r=4))
    assert torch.equal(hub_models.logits(model), plain)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in key or "modules_to_save" in key for key in trained)
    assert sum("lora_A" in key for key in trained) == len(targets)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids, losses = hub_models.ids(), []
    model.train()
    for step in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step:  # B = 0 at the start leaves A without gradient
            assert all(p.grad.abs().sum() > 0 for key, p in trained.items() if "lora_" in key)
            assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    # What was quantised, and the rest of the components, is as it was.
    after = model.get_base_model().state_dict()
    same = [key for key in frozen if key in after and not key.startswith("hybrid_mixer")]
    assert same and all(torch.equal(after[key], frozen[key]) for key in same)
    expected = hub_models.logits(model)
    text = model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(text, model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False, use_cache=False))

    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    for loaded in (
        PeftModel.from_pretrained(load(repo), tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=four_bits(model.config)),
    ):
        assert loaded.peft_config["default"].revision == commit
        assert torch.equal(hub_models.logits(loaded), expected)


def test_training_after_an_evaluation(published):
    """bitsandbytes' inference kernel has no backward: a step after an evaluation would train less, silently."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = load(published[0])
    hub_models.logits(model)  # repacks where the processor has the kernel
    four = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    packed = [getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in four]
    if not any(packed):
        four[0].support_avx512bf16_for_cpu = True  # as if it had
    model = get_peft_model(prepare_model_for_kbit_training(model), lora_config(model, r=4))
    assert len(four) > 5 and not any(module.support_avx512bf16_for_cpu for module in four)
    ids, gradients = hub_models.ids(), []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    for evaluated in (False, True):
        if evaluated:
            model.eval()
            hub_models.logits(model)
        model.train().zero_grad()
        torch.manual_seed(0)  # GPT-2's dropout
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if "lora_" in name})
    for name, before in gradients[0].items():
        assert before.norm() > 0 and (gradients[1][name] - before).norm() < 1e-3 * before.norm(), name


def test_a_hybrid_quantised_all_over_is_refused(published, monkeypatch):
    """By whatever takes no notice of what a hybrid keeps."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    with monkeypatch.context() as careless:
        careless.setattr(dtypes_manticore, "kept_maps", lambda model: [])
        with pytest.raises(ManticoreError, match=r"'a\.lm_head' was quantised, but has to stay in floating point"):
            ManticoreForCausalLM.from_pretrained(published[0], quantization_config=settings)
        careless.setattr(dtypes_manticore, "_kept", lambda model: set())
        model = ManticoreForCausalLM.from_pretrained(published[0], quantization_config=settings)
    assert "b.backbone.layers.0.mixer.x_proj" in quantised(model)
    with pytest.raises(ManticoreError, match=r"' was quantised, but has to stay in floating point"):
        lora_config(model)
