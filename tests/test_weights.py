"""Weights by reference: what is saved, and that what is loaded is what was saved, to the last bit."""

import inspect

import pytest
import torch
from accelerate import Accelerator
from hub_models import (
    INDEX,
    MODEL,
    assert_same_model,
    component_keys,
    ids,
    logits,
    nudge,
    publish,
    publish_hybrid,
    read_json,
    saved_keys,
    tiny,
    weight_requests,
)
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import AutoModelForCausalLM, PreTrainedModel, conversion_mapping, core_model_loading

from manticore_hf import ManticoreForCausalLM, ManticoreModel

FLOAT32 = {f"hybrid_mixer.{key}" for key in ("alpha_logits", "token_gate.linear.weight", "token_gate.linear.bias")}
PAIR = ("gpt_neox", "gpt2")  # a head under another name in the repository; a tie


@pytest.fixture
def compose(hub, owner, tmp_path):
    """Publishes tiny models of the given families and composes them."""

    def make(*families, blocks=1, dtype=None, edit=None, save=None, tokens=None, **changes):
        repos = []
        for seed, family in enumerate(families):
            model = tiny(family, seed, **changes.get(family, {}))
            publish(hub, f"{owner}/{family}-{seed}", model, tmp_path / "src", tokens, edit=edit, **(save or {}))
            repos.append(f"{owner}/{family}-{seed}")
        names = {"preset": changes["preset"]} if "preset" in changes else {}
        return ManticoreForCausalLM.from_components(repos, num_blocks=blocks, dtype=dtype, **names)

    return make


def round_trip(model, folder, save=None, **load):
    """Saves and loads; asserts equality and a clean loading report. Returns the loaded model."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(folder, **(save or {}))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    loaded, info = ManticoreForCausalLM.from_pretrained(folder, output_loading_info=True, **load)
    assert not any(info.values()), info
    assert_same_model(model, loaded)
    return loaded


@pytest.mark.parametrize("families", [PAIR, ("llama", "mamba"), ("jamba", "mamba2")])
def test_untrained_hybrid_saves_only_its_own(compose, tmp_path, families):
    model = compose(*families, blocks=2)
    round_trip(model, tmp_path / "out")
    assert component_keys(tmp_path / "out") == set()
    assert saved_keys(tmp_path / "out") == {key for key in model.state_dict() if key.startswith("hybrid_mixer.")}


def test_components_are_what_their_repositories_hold(compose, owner):
    model = compose("gpt_neox", "gpt2", "mamba", "jamba")
    for entry in model.config.components:
        alone = AutoModelForCausalLM.from_pretrained(entry["repo_id"])
        assert_same_model(alone, model.component(entry["name"]))


def test_trained_projectors(compose, tmp_path):
    model = compose(*PAIR, blocks=2)
    nudge(model, *(name for name, _ in model.hybrid_mixer.named_parameters(prefix="hybrid_mixer")))
    round_trip(model, tmp_path / "out")
    assert component_keys(tmp_path / "out") == set()


def test_two_changed_tensors(compose, tmp_path):
    model = compose(*PAIR)
    changed = ["gpt_neox_0.gpt_neox.layers.1.mlp.dense_h_to_4h.weight", "gpt2_1.transformer.ln_f.bias"]
    round_trip(nudge(model, *changed), tmp_path / "out")
    assert component_keys(tmp_path / "out") == set(changed)


def test_everything_changed(compose, tmp_path):
    model = compose("gpt_neox", "mamba", "jamba", blocks=2)
    nudge(model, *dict(model.named_parameters()))
    round_trip(model, tmp_path / "out")
    tied = set(model.all_tied_weights_keys)
    assert tied and saved_keys(tmp_path / "out") == set(model.state_dict()) - tied


def test_untied_head_under_another_name(compose, tmp_path):
    model = compose(*PAIR)
    round_trip(nudge(model, "gpt_neox_0.lm_head.weight"), tmp_path / "out")
    assert component_keys(tmp_path / "out") == {"gpt_neox_0.lm_head.weight"}


@pytest.mark.parametrize("family, embedding", [("gpt2", "transformer.wte"), ("mamba", "backbone.embeddings")])
def test_tuned_tied_embedding(compose, tmp_path, family, embedding):
    model = compose("llama", family)
    loaded = round_trip(nudge(model, f"{family}_1.{embedding}.weight"), tmp_path / "out")
    assert component_keys(tmp_path / "out") == {f"{family}_1.{embedding}.weight"}
    component = loaded.component(f"{family}_1")
    assert component.get_output_embeddings().weight is component.get_input_embeddings().weight


def add_twin(change):
    """Stores the head of a tied GPT-2 too: equal to the embedding, or not."""
    from safetensors.torch import load_file, save_file

    def edit(folder):
        tensors = load_file(folder / MODEL)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + change
        save_file(tensors, folder / MODEL, {"format": "pt"})

    return edit


def test_repository_with_both_ends_of_a_tie(compose, tmp_path):
    model = compose("gpt2", edit=add_twin(0.0))
    round_trip(model, tmp_path / "same")
    assert component_keys(tmp_path / "same") == set()
    loaded = round_trip(nudge(model, "gpt2_0.transformer.wte.weight"), tmp_path / "tuned")
    component = loaded.component("gpt2_0")
    assert component.lm_head.weight is component.transformer.wte.weight
    assert len(component_keys(tmp_path / "tuned")) == 1


def test_repository_whose_ends_of_a_tie_differ(compose, tmp_path):
    model = compose("gpt2", edit=add_twin(0.5))
    assert not torch.equal(model.gpt2_0.lm_head.weight, model.gpt2_0.transformer.wte.weight)
    round_trip(model, tmp_path / "out")
    assert component_keys(tmp_path / "out") == set()
    round_trip(nudge(model, "gpt2_0.lm_head.weight"), tmp_path / "tuned")


def test_experts_are_compared_after_conversion(compose, tmp_path):
    model = compose("jamba")
    key = "jamba_0.model.layers.1.feed_forward.experts.gate_up_proj"
    round_trip(nudge(model, key), tmp_path / "out")
    assert component_keys(tmp_path / "out") == {key}


@pytest.mark.parametrize("families", [PAIR, ("llama", "mamba"), ("jamba", "mamba2"), ("bloom",)])
def test_checkpoint_without_the_base_models_prefix(compose, tmp_path, families):
    """As the Hub's first GPT-2 and BLOOM: referenced, nothing of it is copied, and what was trained is kept."""

    def bare(folder):
        tensors, base = load_file(folder / MODEL), tiny(read_json(folder)["model_type"]).base_model_prefix + "."
        assert any(key.startswith(base) for key in tensors)
        save_file({key.removeprefix(base): value for key, value in tensors.items()}, folder / MODEL, {"format": "pt"})

    model = compose(*families, edit=bare)
    round_trip(model, tmp_path / "out")
    assert not component_keys(tmp_path / "out")
    (changed,) = [
        key
        for key, _ in model.named_parameters()
        if key.endswith(
            ("layers.0.norm.weight", "h.0.ln_1.weight", "h.0.input_layernorm.weight", "layers.1.input_layernorm.weight")
        )
    ][:1]
    round_trip(nudge(model, changed), tmp_path / "tuned")
    assert component_keys(tmp_path / "tuned") == {changed}


@pytest.mark.parametrize("families", [("gpt2", "mamba"), ("gpt_neox", "gpt2")])
def test_states_of_accelerate_and_safetensors(tmp_path, families):
    """Both ends of a tie are one tensor in their files, and come back as one."""
    model = ManticoreForCausalLM.from_components([tiny(family) for family in families])
    names, file = [name for name, _ in model.named_parameters()], str(tmp_path / "model.safetensors")
    nudge(model, *names)
    before, accelerator = logits(model), Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    save_model(model, file)
    for load in (lambda: accelerator.load_state(tmp_path / "state"), lambda: load_model(model, file)):
        nudge(model, *names)
        assert not torch.equal(logits(model), before)
        load()
        assert torch.equal(logits(accelerator.unwrap_model(prepared)), before)


def test_sharded_component_repository(compose, hub, owner, tmp_path):
    model = compose("llama", save={"max_shard_size": "10KB"})
    assert INDEX in hub.files(f"{owner}/llama-0")
    round_trip(model, tmp_path / "none")
    assert component_keys(tmp_path / "none") == set()
    key = "llama_0.model.layers.0.mlp.up_proj.weight"
    round_trip(nudge(model, key), tmp_path / "one")
    assert component_keys(tmp_path / "one") == {key}


def test_sharded_save(compose, tmp_path):
    model = compose(*PAIR, blocks=2)
    nudge(model, *dict(model.named_parameters()))
    round_trip(model, tmp_path / "out", save={"max_shard_size": "20KB"})
    assert (tmp_path / "out" / INDEX).is_file() and not (tmp_path / "out" / MODEL).exists()
    # Fewer or no shards over more: nothing stale may stay.
    round_trip(model, tmp_path / "out", save={"max_shard_size": "30KB"})
    assert set(read_json(tmp_path / "out", INDEX)["weight_map"]) == saved_keys(tmp_path / "out")
    round_trip(model, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists() and len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    round_trip(model, tmp_path / "out", save={"max_shard_size": "20KB"})


@pytest.mark.parametrize("stored, used", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_other_dtype_than_the_repository(hub, owner, tmp_path, stored, used):
    publish(hub, f"{owner}/a", tiny("gpt_neox").to(getattr(torch, stored)), tmp_path / "src")
    publish(hub, f"{owner}/b", tiny("gpt2", 1).to(getattr(torch, stored)), tmp_path / "src")
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"], dtype=used, num_blocks=2)
    assert model.dtype == getattr(torch, used)
    loaded = round_trip(model, tmp_path / "out")
    assert loaded.dtype == getattr(torch, used) and component_keys(tmp_path / "out") == set()
    key = "a.gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    round_trip(nudge(model, key), tmp_path / "tuned")
    assert component_keys(tmp_path / "tuned") == {key}


def test_dtype_argument_of_from_pretrained(compose, tmp_path):
    compose(*PAIR).save_pretrained(tmp_path / "out")
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {key for key, value in loaded.state_dict().items() if value.dtype != torch.bfloat16} == FLOAT32


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(compose, tmp_path, device_map):
    model = nudge(compose(*PAIR, blocks=2), "gpt2_1.transformer.wte.weight")
    round_trip(model, tmp_path / "out", device_map=device_map)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("tuned", [(), ("gpt2_1.transformer.wte.weight",), ("gpt_neox_0.lm_head.weight",)])
def test_component_offloaded_to_disk(compose, tmp_path, tuned):
    model = nudge(compose(*PAIR, blocks=2), *tuned)
    model.save_pretrained(tmp_path / "out")
    expected = logits(model)
    text = model.generate(ids(1, 4), max_new_tokens=5, do_sample=False)
    for far, near in (("gpt2_1", "gpt_neox_0"), ("gpt_neox_0", "gpt2_1")):
        places = {near: "cpu", far: "disk", "hybrid_mixer": "cpu"}
        loaded = ManticoreForCausalLM.from_pretrained(
            tmp_path / "out", device_map=places, offload_folder=tmp_path / "offload"
        )
        assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
        assert torch.equal(logits(loaded), expected)
        assert torch.equal(loaded.generate(ids(1, 4), max_new_tokens=5, do_sample=False), text)
        loaded.save_pretrained(tmp_path / "again")
        assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_automodel_without_head_mixture(compose, tmp_path):
    model = nudge(compose(*PAIR, blocks=2), "gpt2_1.transformer.wte.weight")
    model.save_pretrained(tmp_path / "out")
    base, info = ManticoreModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert set(base.state_dict()) == set(model.state_dict())
    for key, value in base.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    states = base(input_ids=ids()).last_hidden_state
    assert states.shape == (2, 7, model.config.hidden_size)
    base.save_pretrained(tmp_path / "base")
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "base"), model)


def test_explicit_state_dict(compose, tmp_path):
    model = compose(*PAIR)
    other = {key: value.clone() for key, value in model.state_dict().items()}
    other["gpt2_1.transformer.ln_f.weight"] += 1
    count = len(other)
    model.save_pretrained(tmp_path / "out", state_dict=other)
    assert len(other) == count
    assert component_keys(tmp_path / "out") == {"gpt2_1.transformer.ln_f.weight"}
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, other[key]) for key, value in loaded.state_dict().items())
    own = {key: value for key, value in other.items() if key.startswith(("hybrid_mixer.", "gpt2_1.transformer.ln_f."))}
    config = ManticoreForCausalLM.config_class.from_pretrained(tmp_path / "out")
    loaded = ManticoreForCausalLM.from_pretrained(None, config=config, state_dict=own)
    assert all(torch.equal(value, other[key]) for key, value in loaded.state_dict().items())


def test_local_directory_and_instance_are_embedded(hub, owner, tmp_path):
    tiny("gpt_neox").save_pretrained(tmp_path / "local")
    publish(hub, f"{owner}/mamba", tiny("mamba", 1), tmp_path / "src")
    model = ManticoreForCausalLM.from_components([tmp_path / "local", tiny("gpt2", 2), f"{owner}/mamba"])
    assert [entry["weights"] for entry in model.config.components] == ["embedded", "embedded", "reference"]
    round_trip(model, tmp_path / "out")
    embedded = {key for key in model.state_dict() if key.startswith(("local.", "gpt2."))} - set(
        model.all_tied_weights_keys
    )
    assert component_keys(tmp_path / "out") == embedded
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_embed_asks_for_a_copy(hub, owner, tmp_path):
    from manticore_hf import ComponentSpec

    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    model = ManticoreForCausalLM.from_components([ComponentSpec(f"{owner}/a", name="copy", embed=True)])
    model.save_pretrained(tmp_path / "out")
    hub.clear_requests()
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_model(model, loaded)
    assert not hub.requests


def test_saving_a_loaded_hybrid_again(compose, tmp_path):
    model = nudge(compose(*PAIR, blocks=2), "gpt2_1.transformer.ln_f.weight")
    loaded = round_trip(model, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    again = round_trip(nudge(loaded, "gpt_neox_0.lm_head.weight"), tmp_path / "out")  # into the same directory
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    expected = {"gpt2_1.transformer.ln_f.weight", "gpt_neox_0.lm_head.weight"}
    assert component_keys(tmp_path / "out") == expected
    round_trip(again, tmp_path / "new")
    assert component_keys(tmp_path / "new") == expected
    assert read_json(tmp_path / "new") == read_json(tmp_path / "out")


def test_change_taken_back_is_not_saved(compose, tmp_path):
    model = compose(*PAIR)
    weight = model.gpt2_1.transformer.ln_f.weight
    before = weight.detach().clone()
    round_trip(nudge(model, "gpt2_1.transformer.ln_f.weight"), tmp_path / "out")
    weight.data.copy_(before)
    round_trip(model, tmp_path / "out")
    assert component_keys(tmp_path / "out") == set()


@pytest.mark.parametrize("size", [72, 50])
def test_resized_vocabulary(compose, tmp_path, size):
    model = compose("gpt_neox", "gpt2", "jamba")
    model.resize_token_embeddings(size)
    loaded = round_trip(model, tmp_path / "out")
    assert loaded.config.vocab_size == logits(loaded).shape[-1] == size
    assert component_keys(tmp_path / "out") == {
        "gpt_neox_0.gpt_neox.embed_in.weight",
        "gpt_neox_0.lm_head.weight",
        "gpt2_1.transformer.wte.weight",
        "jamba_2.model.embed_tokens.weight",
        "jamba_2.lm_head.weight",
    }


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "mamba", "mamba2", "jamba"])
def test_component_alone_is_a_plain_model(compose, hub, owner, tmp_path, family):
    model = compose(family, "llama", preset="paper")
    for step in ("composed", "loaded"):
        component = model.component(f"{family}_0")
        component.save_pretrained(tmp_path / step)
        alone, info = AutoModelForCausalLM.from_pretrained(tmp_path / step, output_loading_info=True)
        assert not any(info.values())
        assert_same_model(component, alone)
        original = AutoModelForCausalLM.from_pretrained(f"{owner}/{family}-0")
        assert torch.equal(logits(alone), logits(original)) and type(alone) is type(original)
        assert read_json(tmp_path / step) == read_json(tmp_path / "src" / f"{owner}--{family}-0" / "main")
        assert hub.files(f"{owner}/{family}-0").keys() - {".gitattributes"} == {
            file.name for file in (tmp_path / step).iterdir()
        }
        model.save_pretrained(tmp_path / "hybrid")
        model = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")


def test_loads_only_the_components_it_needs(compose, hub, tmp_path):
    model = compose(*PAIR)
    nudge(model, *(key for key in dict(model.named_parameters()) if key.startswith("gpt2_1.")))
    model.save_pretrained(tmp_path / "out")
    hub.clear_requests()
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert all("gpt_neox-0" in path for path in weight_requests(hub)) and weight_requests(hub)
    assert_same_model(model, loaded)


def test_hybrid_from_the_hub(compose, hub, owner, tmp_path):
    model = nudge(compose(*PAIR), "gpt2_1.transformer.ln_f.weight")
    model.save_pretrained(tmp_path / "out")
    publish_hybrid(hub, f"{owner}/hybrid", tmp_path / "out")
    assert_same_model(model, ManticoreForCausalLM.from_pretrained(f"{owner}/hybrid"))
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(f"{owner}/hybrid"))


def test_private_hooks_of_transformers_are_as_expected():
    def names(function):
        return list(inspect.signature(function).parameters)

    hook = PreTrainedModel.__dict__["_load_pretrained_model"]
    assert isinstance(hook, staticmethod)
    assert names(hook) == ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]
    assert names(core_model_loading.rename_source_key)[:5] == [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ]
    assert names(conversion_mapping.get_model_conversion_mapping)[0] == "model"
    save = names(PreTrainedModel.save_pretrained)
    assert save[:5] == ["self", "save_directory", "is_main_process", "state_dict", "push_to_hub"]
    assert "save_original_format" in save
    assert names(PreTrainedModel._upload_modified_files)[1:6] == [
        "working_dir",
        "repo_id",
        "files_timestamps",
        "commit_message",
        "token",
    ]
