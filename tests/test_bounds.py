"""A configuration made hostile: refused with a sentence, before anything is allocated, fetched or run for it."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from hub_models import assert_same_model, publish, read_json, tiny
from manticore_hf.modeling import bounds_manticore, sizes_manticore
from manticore_hf.modeling.bounds_manticore import build_config, check_component
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from manticore_hf import ComponentSpec, ManticoreConfig, ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main


@pytest.fixture
def saved(hub, owner, tmp_path):
    """A saved hybrid of a referenced GPT-NeoX and an embedded Mamba. Returns (model, folder)."""
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    parts = [ComponentSpec(f"{owner}/a", name="a"), ComponentSpec(tiny("mamba"), name="b")]
    model = ManticoreForCausalLM.from_components(parts)
    model.save_pretrained(tmp_path / "out")
    return model, tmp_path / "out"


def edit(folder, component=None, **changes):
    """Changes config.json: a component's configuration, or the hybrid's own."""
    values = read_json(folder)
    target = values if component is None else values["components"][component]["config"]
    target.update(changes)
    (folder / "config.json").write_text(json.dumps(values))


def refused(folder, message, capsys=None):
    """What loads a hybrid and what inspects it refuse it, in one sentence."""
    with pytest.raises(ManticoreError, match=message) as err:
        ManticoreForCausalLM.from_pretrained(folder)
    assert len(str(err.value)) < 2000
    assert main(["inspect", str(folder)]) == 2
    if capsys is not None:
        shown = capsys.readouterr().err
        assert shown.startswith("manticore-hf inspect: ") and "Traceback" not in shown


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 10**12}, "hidden_size=10{12} is more than any model has"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=10{6} is more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive"),
        ({"hidden_size": 10**6, "num_attention_heads": 10}, "hidden_size=1000000 is more than any model has"),
        ({"vocab_size": 10**30}, "integer of 100 bits"),
        ({"vocab_size": -5}, "vocab_size=-5"),
        ({"num_attention_heads": 10**9}, "num_attention_heads"),
        ({"hidden_size": "16"}, "hidden_size|invalid"),
        ({"hidden_size": True}, "hidden_size|invalid"),
        ({"num_hidden_layers": 3.5}, "num_hidden_layers|invalid"),
        ({"layer_types": ["x"] * 10**5}, "values"),
        ({"rope_scaling": [[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]}, "levels"),
        ({"hidden_act": "x" * 200_000}, "text of 200000 characters"),
    ],
    ids=lambda value: str(list(value))[:40] if isinstance(value, dict) else "",
)
def test_sizes_beyond_sense(saved, capsys, changes, message):
    edit(saved[1], 0, **changes)
    refused(saved[1], message, capsys)


def test_a_hybrid_has_bounds_as_a_whole(saved):
    values = {**read_json(saved[1]), "block_layers": None, "reference_component": None, "tokenizer_component": None}
    entry = values["components"][1]
    many = {**values, "components": [{**copy.deepcopy(entry), "name": f"c{i}"} for i in range(33)]}
    with pytest.raises(ManticoreError, match="33 components are too many"):
        ManticoreConfig.from_dict(many)
    deep = [{**entry, "name": f"c{i}", "config": {**entry["config"], "num_hidden_layers": 1000}} for i in range(2)]
    with pytest.raises(ManticoreError, match="more than 1024 layers in all"):
        ManticoreConfig.from_dict({**values, "components": deep})
    wide = {**values, "components": [entry], "hidden_size": 10**6, "route": ["b"]}
    with pytest.raises(ManticoreError, match="hidden_size=1000000 is more"):
        ManticoreConfig.from_dict(wide)


MEASURED = """
import resource, sys
from manticore_hf import ManticoreError, ManticoreForCausalLM

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    if sys.argv[2] == "load":
        ManticoreForCausalLM.from_pretrained(sys.argv[1])
    elif sys.argv[2] == "compose":
        ManticoreForCausalLM.from_components([sys.argv[1]])
    else:
        from transformers import AutoConfig
        ManticoreForCausalLM(AutoConfig.from_pretrained(sys.argv[1]))
except ManticoreError as err:
    print(err)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("way", ["load", "build", "compose"])
def test_a_trillion_parameters_take_no_memory(saved, tmp_path, way):
    """Each number is one that some model has; together they ask for 10^12 parameters."""
    huge = {"hidden_size": 2**15, "intermediate_size": 2**17, "num_hidden_layers": 100, "num_attention_heads": 64}
    if way == "compose":
        tiny("gpt_neox").save_pretrained(tmp_path / "part")
        values = {**read_json(tmp_path / "part"), **huge}
        (tmp_path / "part" / "config.json").write_text(json.dumps(values))
    else:
        edit(saved[1], 0, **huge)
        edit(saved[1], block_layers=None)
    folder = tmp_path / "part" if way == "compose" else saved[1]
    command = [sys.executable, "-c", MEASURED, str(folder), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    message, grown = done.stdout.strip().rsplit("\n", 1)
    assert done.returncode == 0 and "omponent" in message, done.stderr
    assert "parameters" in message or "another shape" in message
    assert int(grown) < 1500  # MiB: of imports; the model would be 5 TB


def test_more_than_the_machine_has_is_refused_with_numbers(saved, monkeypatch):
    monkeypatch.setattr(sizes_manticore, "memory_of", lambda device: 50_000)
    with pytest.raises(ManticoreError, match=r"asks for \S+ parameters, .* GiB; this machine has .* GiB of memory"):
        ManticoreForCausalLM(saved[0].config)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_configuration_of_other_weights(saved, tmp_path):
    edit(saved[1], 1, intermediate_size=4096)
    with pytest.raises(ManticoreError, match=r"Component 'b' \(embedded\).*another shape.*in the file.*in the model"):
        ManticoreForCausalLM.from_pretrained(saved[1])
    tiny("mamba").save_pretrained(tmp_path / "part")
    values = {**read_json(tmp_path / "part"), "intermediate_size": 96}
    (tmp_path / "part" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ManticoreError, match="config.json belongs to other weights"):
        ManticoreForCausalLM.from_components([tmp_path / "part"])


def test_shapes_are_compared_before_anything_is_allocated(saved, monkeypatch):
    edit(saved[1], 1, intermediate_size=4096)
    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", None)
    with pytest.raises(ManticoreError, match="another shape"):
        ManticoreForCausalLM.from_pretrained(saved[1])


def test_a_checkpoint_that_lacks_a_tensor(saved):
    file = saved[1] / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("b.backbone.layers.0.mixer.D")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ManticoreError, match=r"'b' \(embedded\): 1 tensors are neither in.*layers.0.mixer.D"):
        ManticoreForCausalLM.from_pretrained(saved[1])


def test_other_shapes_can_still_be_asked_for(saved):
    edit(saved[1], 1, state_size=8)
    model = ManticoreForCausalLM.from_pretrained(saved[1], ignore_mismatched_sizes=True)
    assert model.b.backbone.layers[0].mixer.A_log.shape[1] == 8
    assert torch.equal(model.b.backbone.layers[0].mixer.D, saved[0].b.backbone.layers[0].mixer.D)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "x.bin"}}'],
)
def test_an_index_that_leads_elsewhere(tmp_path, index):
    tiny("mamba").save_pretrained(tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").unlink()
    (tmp_path / "part" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ManticoreError, match="no index of safetensors files beside it"):
        ManticoreForCausalLM.from_components([tmp_path / "part"])


# ---- instructions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", [None, 0], ids=["hybrid", "component"])
@pytest.mark.parametrize(
    "key, value",
    [
        ("attn_implementation", "evil/kernel"), ("_attn_implementation", "evil/kernel"),
        ("_attn_implementation_internal", "evil/kernel:attend"), ("experts_implementation", "evil/kernel"),
        ("name_or_path", "evil/other"), ("_name_or_path", "evil/other"), ("transformers_weights", "../x.safetensors"),
        ("kernel_config", {"RMSNorm": "evil/kernel:X"}), ("custom_pipelines", {"x": {"impl": "evil--x.X"}}),
        ("backbone", "evil/other"), ("use_pretrained_backbone", True), ("gguf_file", "x.gguf"),
        ("distributed_config", {"tp_plan": "auto"}), ("_commit_hash", "main"), ("_component_names", ["x"]),
    ],
)  # fmt: skip
def test_instructions_in_a_file_are_not_followed(saved, hub, component, key, value):
    edit(saved[1], component, **{key: value})
    hub.clear_requests()
    assert_same_model(ManticoreForCausalLM.from_pretrained(saved[1]), saved[0])
    assert "evil" not in str(hub.requests)


def test_code_that_a_component_names_is_not_run(saved, tmp_path):
    (saved[1] / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass X: pass\n")
    edit(saved[1], 0, auto_map={"AutoModelForCausalLM": "evil.X", "AutoConfig": "evil.X"})
    assert_same_model(ManticoreForCausalLM.from_pretrained(saved[1]), saved[0])
    assert_same_model(AutoModelForCausalLM.from_pretrained(saved[1]), saved[0])
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "component, key, value, message",
    [
        (0, "quantization_config", {"quant_method": "gptq", "bits": 4}, "'a'.*quantization_config"),
        (None, "quantization_config", {"quant_method": "gptq", "bits": 4}, "quant_method='gptq' is not supported"),
        (0, "dtype", "load", "dtype='load' is no dtype of torch"), (None, "dtype", "os", "dtype='os' is no dtype"),
        (None, "torch_dtype", {"a": 1}, "is no dtype"), (0, "to_dict", 1, "to_dict=1 is no setting"),
        (0, "self", 1, "self=1 is no setting"), (None, "save_pretrained", "x", "save_pretrained='x' is no setting"),
        (None, "is_encoder_decoder", True, "a hybrid is a decoder"),
        (None, "eos_token_id", "x", "eos_token_id='x' must be a token's number"),
        (None, "eos_token_id", -7, "eos_token_id=-7 must be a token's number"),
        (0, "model_type", "t5", "'a' is no causal LM"), (0, "model_type", "manticore", "'a' is no causal LM"),
        (0, "model_type", ["llama"], r"model_type=\['llama'\]"), (0, "sliding_window", -3, "sliding_window=-3"),
        (None, "num_blocks", 10**9, "num_blocks"), (None, "manticore_version", 99, "format version 99"),
        (None, "mixture_weights", [[float("inf"), 0]], "mixture_weights"), (None, "block_layers", {"a": [10**9]}, "."),
        (None, "a", {"model_type": "llama"}, "'a' is set beside 'components'"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(saved, component, key, value, message):
    edit(saved[1], component, **{key: value})
    refused(saved[1], message)


@pytest.mark.parametrize(
    "name", ["forward", "config", "__class__", "to_dict", "a b", "1a", "", "class", "x" * 200, 3, "é"], ids=range(11)
)
def test_names_that_would_replace_something(saved, name):
    values = read_json(saved[1])
    values["components"][0]["name"] = name
    (saved[1] / "config.json").write_text(json.dumps(values))
    refused(saved[1], "Component name")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{", '{"a":' * 3000, "[" * 100_000, "\x00", '{"model_type": "manticore"}'],
    ids=range(9),
)
def test_files_that_are_no_configuration(saved, text):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError)) as err:
        ManticoreForCausalLM.from_pretrained(saved[1])
    assert str(err.value)
    assert main(["inspect", str(saved[1])]) == 2


# ---- what is legitimate ----------------------------------------------------------------------------------------------

KNOWN = sorted(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING and kind != "manticore")


@pytest.mark.parametrize("kind", KNOWN)
def test_the_defaults_of_every_architecture_are_within_bounds(kind):
    """Each default configuration is that of a published model; what the bounds refuse must have another reason."""
    try:
        config = CONFIG_MAPPING[kind]()
    except Exception as err:  # its defaults are none
        pytest.skip(f"{type(err).__name__}: {err}"[:200])
    if config.is_encoder_decoder or getattr(config, "quantization_config", None) is not None:
        pytest.skip("an encoder-decoder, or packed weights")
    values = json.loads(config.to_json_string(use_diff=False))
    try:
        again = build_config("one", values)
        check_component("one", again)
    except ManticoreError as err:
        assert "more than" not in str(err) and "is no setting" not in str(err), str(err)
        pytest.skip(str(err))
    ours = json.loads(again.to_json_string(use_diff=False))
    theirs = json.loads(type(config)(**values).to_json_string(use_diff=False))  # what Transformers makes of the same
    dropped = bounds_manticore._INSTRUCTIONS | set(bounds_manticore._OF_THE_HYBRID) | {"attn_implementation"}
    compared = [key for key in theirs if key not in dropped and not key.startswith("_")]
    assert {key: ours.get(key) for key in compared} == {key: theirs[key] for key in compared}


@pytest.mark.parametrize(
    "kind, values",
    [
        ("llama", {"vocab_size": 262_144, "max_position_embeddings": 10 * 2**20, "rope_theta": 1e9}),
        ("llama", {"hidden_size": 16_384, "num_hidden_layers": 126, "intermediate_size": 53_248}),
        ("mixtral", {"num_local_experts": 1024, "num_experts_per_tok": 32}),
        ("mamba2", {"hidden_size": 4096, "state_size": 256, "num_heads": 128, "head_dim": 64, "chunk_size": 256}),
        ("qwen3", {"layer_types": ["full_attention"] * 36, "num_hidden_layers": 36, "sliding_window": None}),
        ("llama", {"eos_token_id": [128_001, 128_008, 128_009], "bos_token_id": 128_000, "vocab_size": 128_256}),
    ],
)  # fmt: skip
def test_large_real_models_are_within_bounds(kind, values):
    config = build_config("one", {"model_type": kind, **values})
    check_component("one", config)
    assert all(getattr(config, key) == value for key, value in values.items() if key != "rope_theta")
