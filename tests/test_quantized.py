"""Hybrids in eight and four bits: what is left out without being told; what is saved loads as it was."""

import copy

import families
import hub_models
import pytest
import torch
from hub_models import assert_same_model, component_keys, logits
from huggingface_hub import HfApi
from manticore_hf.modeling import dtypes_manticore
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from manticore_hf.modeling.dtypes_manticore import kept_maps, plain_linear_maps
from torch import nn
from transformers import BitsAndBytesConfig, EetqConfig, QuantoConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from manticore_hf import (
    ComponentSpec,
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    prune,
    publish,
)

pytestmark = pytest.mark.usefixtures("counted_once")


def torchao(name):
    def make():
        quantization = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(getattr(quantization, name)())

    return make


METHODS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": torchao("Int8WeightOnlyConfig"),
    "torchao-dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
}  # fmt: skip


@pytest.fixture(params=METHODS)
def settings(request, monkeypatch):
    """A quantisation configuration that says nothing of what must be left out."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # cannot repack weights as small as these
    return METHODS[request.param]()


@pytest.fixture
def parts(hub, owner, tmp_path):
    wide = {"hidden_size": 64}
    made = {
        "a": hub_models.tiny("llama", **wide, intermediate_size=128),
        "b": hub_models.tiny("mamba", 1, **wide),
        "c": hub_models.tiny("gpt2", 2, n_embd=64),
    }
    for name, part in made.items():
        hub_models.publish(hub, f"{owner}/{name}", part, tmp_path / "src", hub_models.tokenizer())
    return [f"{owner}/{name}" for name in made]


@pytest.fixture
def saved(parts, tmp_path):
    """A hybrid whose components are referenced. Returns (folder, the hybrid)."""
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2, mixture="token", projector_init="identity")
    families.randomise(model)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain", model.eval()


def dense(module):
    """A quantised map's weight in floating point; None of one that is not quantised."""
    weight, kind = module.weight, type(module).__name__
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Linear8bitLt":
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.float() * scale.float()[:, None] / 127
    return weight.dequantize() if type(weight.data).__name__ == "Int8Tensor" else None


def quantised(model):
    maps = {key: one for key, one in model.named_modules() if isinstance(one, (nn.Linear, Conv1D))}
    return {key: rounded.detach() for key, one in maps.items() if (rounded := dense(one)) is not None}


def twin(model, plain):
    """The hybrid in floating point with the quantised one's rounded weights."""
    plain = copy.deepcopy(plain)
    for key, rounded in quantised(model).items():
        own = plain.get_submodule(key)
        own.weight.data.copy_(rounded.T if isinstance(own, Conv1D) else rounded)
    return plain


def expected_maps(plain, settings):
    maps = plain_linear_maps(plain)
    if settings.quant_method == "torchao":  # which has no version of GPT-2's transposed maps
        maps = [key for key in maps if isinstance(plain.get_submodule(key), nn.Linear)]
    return set(maps)


# ---- what is left out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.representatives(families.FAMILIES))
def test_every_quantiser_is_told_what_to_leave_out(family):
    """As Transformers' quantisers ask: by the names of modules, or of their weights; the user's list is longer."""
    model = families.hybrid(family, num_blocks=1, mixture="token", projector="mlp", verify=False)
    linear = {key for key, one in model.named_modules() if isinstance(one, (nn.Linear, Conv1D))}
    for given in (None, [], [r"nothing\.of\.this"]):
        skips = HfQuantizer.get_modules_to_not_convert(model, given, model._keep_in_fp32_modules)
        for end in ("", ".weight"):
            converted = {key for key in linear if should_convert_module(key + end, skips)}
            assert converted <= set(plain_linear_maps(model)) and (given is None or len(converted) > 4)
        assert given is None or converted == set(plain_linear_maps(model))
    # The list is for quantisers: it makes nothing float32.
    assert not any("hybrid_mixer" in pattern for pattern in model._get_dtype_plan(torch.float16))


@pytest.mark.quick(every=2)
def test_nothing_has_to_be_said(saved, settings):
    folder, plain = saved
    before = copy.deepcopy(settings.to_dict())
    model = ManticoreForCausalLM.from_pretrained(folder, quantization_config=settings)
    assert settings.to_dict() == before  # the user's object, which may be used for the next model
    found = quantised(model)
    assert set(found) == expected_maps(plain, settings)
    for key, value in plain.state_dict().items():
        if key.rpartition(".")[0] not in found:
            assert torch.equal(model.state_dict()[key], value), key
    exact, rounded = logits(plain), logits(twin(model, plain))
    tolerance = 0.05 if "Dynamic" in str(settings) or settings.quant_method == "bitsandbytes" else 1e-3
    assert 0 < (logits(model) - exact).abs().max() < 0.2 * exact.abs().max()
    torch.testing.assert_close(logits(model), rounded, rtol=0, atol=tolerance * exact.abs().max().item())


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick(every=2)
def test_what_is_saved_is_loaded_as_it_was(saved, settings, tmp_path, owner):
    model = ManticoreForCausalLM.from_pretrained(saved[0], quantization_config=settings)
    trained = "a.model.norm.weight"
    hub_models.nudge(model, trained)  # what is in floating point may have been trained
    found = logits(model)
    model.save_pretrained(tmp_path / "small")
    keys = component_keys(tmp_path / "small")
    assert trained in keys and {key for key in keys if not key.startswith(tuple(quantised(model)))} == {trained}
    stated = hub_models.read_json(tmp_path / "small")["quantization_config"]
    assert set(kept_maps(model)) <= set(stated.get("llm_int8_skip_modules") or stated["modules_to_not_convert"])
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), found)
    rounded = quantised(model)
    assert all(torch.equal(value, rounded[key]) for key, value in quantised(loaded).items())
    loaded.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    assert torch.equal(logits(ManticoreForCausalLM.from_pretrained(tmp_path / "again")), found)
    model.push_to_hub(f"{owner}/pushed")
    publish(model, f"{owner}/published")
    for repo in ("pushed", "published"):
        assert torch.equal(logits(ManticoreForCausalLM.from_pretrained(f"{owner}/{repo}")), found)


@pytest.mark.quick(every=3)
def test_half_precision_around_what_is_quantised(saved, settings, tmp_path):
    model = ManticoreForCausalLM.from_pretrained(saved[0], quantization_config=settings, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.hybrid_mixer.alpha_logits.dtype == torch.float32
    model.save_pretrained(tmp_path / "small")
    assert all(key.startswith(tuple(quantised(model))) for key in component_keys(tmp_path / "small"))
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded), logits(model))


@pytest.mark.quick(every=3)
def test_a_classifier(saved, settings, tmp_path):
    model = ManticoreForSequenceClassification.from_pretrained(saved[0], num_labels=3, quantization_config=settings)
    assert set(quantised(model)) == expected_maps(saved[1], settings)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "small")
    loaded = ManticoreForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(model)) and logits(loaded).shape == (2, 3)


def test_back_to_floating_point(saved, tmp_path):
    pytest.importorskip("bitsandbytes")
    for name in ("nf4", "int8"):
        model = ManticoreForCausalLM.from_pretrained(saved[0], quantization_config=METHODS[name]())
        rounded = twin(model, saved[1])
        model.dequantize()
        torch.testing.assert_close(logits(model), logits(rounded), rtol=1e-3, atol=1e-3)
        model.save_pretrained(tmp_path / name)
        assert "quantization_config" not in hub_models.read_json(tmp_path / name)
        assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / name), model)


# ---- what is refused -------------------------------------------------------------------------------------------------


def unsaved_torchao():
    """Settings of torchao that a hybrid's config.json must not name, without needing torchao."""

    class Other(TorchAoConfig):
        def to_dict(self):
            return {"quant_method": "torchao", "quant_type": {"default": {"_type": "quantize_", "_data": {}}}}

    return object.__new__(Other)


UNSAVED = {"quanto": lambda: QuantoConfig(weights="int8"), "eetq": EetqConfig, "quantize_": unsaved_torchao}


@pytest.mark.parametrize("named", UNSAVED)
def test_a_method_that_is_not_saved_is_refused_before_anything_is_written(saved, named, tmp_path, owner):
    folder, model = saved
    model.config.quantization_config = UNSAVED[named]()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for save in (
        lambda: model.save_pretrained(folder),
        lambda: model.save_pretrained(tmp_path / "new", push_to_hub=True, repo_id=f"{owner}/new"),
        lambda: model.push_to_hub(f"{owner}/new"),
        lambda: publish(model, f"{owner}/new"),
    ):
        with pytest.raises(ManticoreError, match=f"cannot be saved: .*{named}.*Nothing was written. Save it before"):
            save()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists() and not HfApi().repo_exists(f"{owner}/new")


@pytest.mark.parametrize("kind", ["quantize_", "Int4WeightOnlyConfig", "os", ["PerRow"], None])
def test_torchaos_names_in_a_file(saved, kind):
    """torchao looks up what a file names in its modules, and calls it."""
    values = hub_models.read_json(saved[0])
    inner = {"_type": "Int8WeightOnlyConfig", "_data": {"granularity": [{"_type": kind, "_data": {"dim": -1}}]}}
    values["quantization_config"] = {"quant_method": "torchao", "quant_type": {"default": inner}}
    with pytest.raises(ManticoreError, match="torchao's .* is not read from a hybrid's files, only Int8WeightOnlyC"):
        ManticoreConfig.from_dict(values)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("name", METHODS)
def test_packed_weights_where_floating_point_is_read(name, saved, tmp_path, monkeypatch):
    """A repository whose dt_proj is in eight bits: its integers have the shape of the numbers they stand for."""
    pytest.importorskip("bitsandbytes")
    method = METHODS[name]()
    with monkeypatch.context() as careless:
        careless.setattr(dtypes_manticore, "kept_maps", lambda model: ["hybrid_mixer", ".*lm_head"])
        careless.setattr(dtypes_manticore, "_kept", lambda model: set())
        model = ManticoreForCausalLM.from_pretrained(saved[0], quantization_config=method)
        assert dense(model.get_submodule("b.backbone.layers.0.mixer.dt_proj")) is not None
        model.save_pretrained(tmp_path / "bad")
    with pytest.raises(ManticoreError, match=r"'b\.backbone\.layers\.\d\.mixer\.(dt|out|x)_proj' was quantised, but"):
        ManticoreForCausalLM.from_pretrained(tmp_path / "bad")


def test_a_quantised_component_is_refused(parts, hub, owner, tmp_path):
    from transformers import AutoModelForCausalLM

    pytest.importorskip("bitsandbytes")
    part = AutoModelForCausalLM.from_pretrained(parts[0], quantization_config=METHODS["int8"]())
    part.save_pretrained(tmp_path / "packed")
    hub.add_repo(f"{owner}/packed", tmp_path / "packed")
    hub.requests.clear()
    for source in (part, tmp_path / "packed", f"{owner}/packed"):
        with pytest.raises(ManticoreError, match="'x'.* has a quantization_config: its weights are packed.*floating"):
            ManticoreForCausalLM.from_components([ComponentSpec(source, name="x"), parts[1]])
    assert not [path for path in hub_models.weight_requests(hub) if "packed" in path]


def test_what_needs_floating_point_says_so(saved):
    pytest.importorskip("bitsandbytes")
    model = ManticoreForCausalLM.from_pretrained(saved[0], quantization_config=METHODS["int8"]())
    with pytest.raises(ManticoreError, match=r"packed in 8 bits \(bitsandbytes\): prune it in floating point, and"):
        prune(model, "a")
    with pytest.raises(ManticoreError, match="is quantised; load it as a ManticoreForSequenceClassification instead"):
        ManticoreForSequenceClassification.from_causal_lm(model, 2)
