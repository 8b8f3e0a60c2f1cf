"""Components on different devices, or offloaded: the hybrid computes what it computes in one place.

The devices are those of `fake_devices`, strict as GPUs; offloading to disk is real. Where kernels differ by device
(Mamba's scan) logits agree up to rounding; what is generated is the same.
"""

import functools

import accelerate
import pytest
import torch
from classifiers import BOTH, scored
from fake_devices import ONE, TWO, fake_devices
from families import FAMILIES, hybrid, tokens
from hub_models import component_keys, publish
from hub_models import tiny as small
from manticore_hf.modeling.devices_manticore import device_of
from peft import PeftModel, get_peft_model

from manticore_hf import ManticoreForCausalLM, lora_config
from manticore_hf.training.prune import prune

# Attention, Mamba, Mamba-2, Jamba with experts, RecurrentGemma; both ways of embedding
SAVED = {
    "gpt_neox+mamba": {"num_blocks": 2},
    "gpt_neo+mamba2+opt": {"preset": "paper", "num_blocks": 3},
    "gemma2+jamba": {"num_blocks": 2},
    "llama+falcon_mamba": {"num_blocks": 1, "mixture": "static"},
    "recurrent_gemma": {"num_blocks": 2},
}
# Transformers' default experts count tokens with a kernel that the CPU lacks
EAGER = {"experts_implementation": "batched_mm"}


def results(model):
    """Logits of padded rows, greedy tokens and beams, on the CPU."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    ids, mask = ids.to(model.device), mask.to(model.device)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 2}
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=False, labels=ids)
    assert out.logits.device == ids.device
    values = out.logits, out.loss, model.generate(ids, **settings), model.generate(ids, num_beams=2, **settings)
    return tuple(value.cpu() for value in values)


def agree(got, wanted, exact):
    for one, other in zip(got, wanted):
        if exact or not one.is_floating_point():
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def cases(kinds, quick):
    """Every pair with every kind; those that are not listed in `quick` as (pair, kind) are slow."""
    for name in SAVED:
        for kind in kinds:
            marks = [] if (name, kind) in quick else [pytest.mark.slow]
            yield pytest.param(name, kind, marks=marks, id=f"{name}-{kind}")


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp("hybrid")
        model = hybrid(name, **SAVED[name])
        model.save_pretrained(folder)
        return folder, model.config, results(ManticoreForCausalLM.from_pretrained(folder, **EAGER))

    return save


@pytest.fixture
def saved(request, saved_once):
    """(directory, configuration, results) of a saved hybrid."""
    return saved_once(request.param)


def layers_of(config, name, places):
    """{module: place} for a component's layers, by turns, and what is around them, in the first place."""
    model = ManticoreForCausalLM(config)
    component, layout = model.component(name), model.segments.layout(name)
    path = f"{name}.{layout.path}.{layout.layers}"
    out = {f"{path}.{i}": places[i % len(places)] for i in range(component.config.num_hidden_layers)}
    for key in model.state_dict():
        if key.startswith(f"{name}.") and not key.startswith(f"{path}."):
            out[key.rpartition(".")[0]] = places[0]
    return out


# ---- offloading ------------------------------------------------------------------------------------------------------


# Every way and every family once
QUICK = [("gpt_neo+mamba2+opt", "all"), ("llama+falcon_mamba", "all"), ("gpt_neox+mamba", "first")]
QUICK += [("gpt_neox+mamba", "last"), ("gemma2+jamba", "layers"), ("recurrent_gemma", "buffers")]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("saved, kind", cases(["all", "first", "last", "layers", "buffers"], QUICK), indirect=["saved"])
def test_offloaded_to_disk(saved, tmp_path, kind):
    folder, config, wanted = saved
    names, buffers = config.component_names, {"offload_buffers": True} if kind == "buffers" else {}
    if kind in ("all", "buffers"):
        places = {"": "disk"}
    elif kind == "layers":
        places = {name: "cpu" for name in names[:-1]} | {"hybrid_mixer": "disk"}
        places |= layers_of(config, names[-1], ("cpu", "disk"))
    else:
        places = {name: "cpu" for name in names} | {"hybrid_mixer": "cpu"}
        places[names[0 if kind == "first" else -1]] = "disk"
    model = ManticoreForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload", **buffers, **EAGER
    )
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert model.device == torch.device("cpu")
    agree(results(model), wanted, exact=True)
    assert torch.equal(model.mixture_weights(), ManticoreForCausalLM.from_pretrained(folder).mixture_weights())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_offloads_to_disk(family, tmp_path):
    """Weights that are read past their module's hook would give wrong numbers without an error (torch 2.13)."""
    hybrid(family, num_blocks=2).save_pretrained(tmp_path / "hybrid")
    wanted = results(ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid", **EAGER))
    for buffers in (False, True):
        model = ManticoreForCausalLM.from_pretrained(
            tmp_path / "hybrid",
            device_map={"": "disk"},
            offload_folder=tmp_path / f"{buffers}",
            offload_buffers=buffers,
            **EAGER,
        )
        agree(results(model), wanted, exact=True)


@pytest.mark.parametrize("saved", ["gpt_neox+mamba"], indirect=True)
def test_auto_offloads_what_has_no_room(saved, tmp_path):
    folder, config, wanted = saved
    sizes = {"cpu": ManticoreForCausalLM(config).get_memory_footprint() * 2 // 3}
    model = ManticoreForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory=sizes, offload_folder=tmp_path / "offload", **EAGER
    )
    assert {"cpu", "disk"} <= set(model.hf_device_map.values())
    agree(results(model), wanted, exact=True)


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload], ids=["cpu", "disk"])
def test_accelerates_own_offloading(offload, tmp_path):
    hybrid("gpt_neox+mamba", num_blocks=2).save_pretrained(tmp_path / "hybrid")
    model = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")
    wanted = results(model)
    offload(model, *([tmp_path / "offload"] if offload is accelerate.disk_offload else []))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    agree(results(model), wanted, exact=True)
    model.save_pretrained(tmp_path / "again")
    one, two = (tmp_path / name / "model.safetensors" for name in ("hybrid", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_saving_what_is_offloaded_keeps_references(hub, owner, tmp_path):
    """Offloaded weights are compared with the referenced ones too, and only those that differ are written."""
    for i, family in enumerate(("gpt_neox", "mamba")):
        publish(hub, f"{owner}/{family}", small(family, i), tmp_path / "source")
    model = ManticoreForCausalLM.from_components([f"{owner}/gpt_neox", f"{owner}/mamba"])
    tuned = "mamba.backbone.layers.0.mixer.dt_proj.weight"
    with torch.no_grad():
        model.get_parameter(tuned).add_(1.0)
    model.save_pretrained(tmp_path / "hybrid")
    assert component_keys(tmp_path / "hybrid") == {tuned}
    loaded = ManticoreForCausalLM.from_pretrained(
        tmp_path / "hybrid", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    loaded.save_pretrained(tmp_path / "again")
    one, two = (tmp_path / name / "model.safetensors" for name in ("hybrid", "again"))
    assert one.read_bytes() == two.read_bytes()


# ---- several devices -------------------------------------------------------------------------------------------------


QUICK = [("gpt_neox+mamba", "offload"), ("gpt_neo+mamba2+opt", "three")]
QUICK += [("gemma2+jamba", "two"), ("recurrent_gemma", "layers")]


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("saved, kind", cases(["two", "three", "offload", "layers"], QUICK), indirect=["saved"])
def test_on_several_devices(saved, monkeypatch, kind):
    """offload: a component and the mixer wait in the CPU's memory, and run on the first device."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the devices are there for one thread
    folder, config, wanted = saved
    cycle = {"two": (ONE, TWO), "three": (TWO, ONE, "maia:2"), "offload": (ONE, "cpu"), "layers": (TWO, ONE)}[kind]
    places = {name: cycle[i % len(cycle)] for i, name in enumerate(config.component_names)}
    places["hybrid_mixer"] = cycle[-1]
    if kind == "layers":
        name = config.component_names[0]
        del places[name]
        places |= layers_of(config, name, (ONE, TWO))
    with fake_devices() as devices:
        model = ManticoreForCausalLM.from_pretrained(folder, device_map=places, **EAGER)
        agree(results(model), wanted, exact=False)
    assert {place for place in places.values() if place != "cpu"} <= devices.used


def test_components_moved_by_hand():
    model = hybrid("gpt_neox+mamba", num_blocks=2)
    wanted = results(model)
    with fake_devices():
        model.to(ONE)
        model.component("mamba").to(TWO)
        agree(results(model), wanted, exact=False)
        ids = tokens().to(ONE)
        embeds = model.get_input_embeddings()(ids)
        hidden = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert {str(state.device) for state in (embeds, *hidden)} <= {ONE, TWO}


def test_weights_of_a_distributed_run_say_nothing():
    """FSDP keeps the weights it offloads on the CPU until a layer is called, on the device of its process."""
    model = hybrid("gpt_neox+mamba", num_blocks=2)
    wanted = results(model)
    assert model.segments.segment("mamba", 1).device == device_of(model) == torch.device("cpu")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        agree(results(model), wanted, exact=True)
        assert device_of(model) is None and model.segments.segment("mamba", 1).device is None
        accelerate.cpu_offload(model)
        assert device_of(model) == model.device == torch.device("cpu")
    finally:
        torch.distributed.destroy_process_group()


def test_a_route_over_two_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    model = prune(hybrid("gpt_neox+mamba", num_blocks=3), ["mamba", "gpt_neox", "mamba"])
    model.save_pretrained(tmp_path)
    wanted = results(model)
    with fake_devices():
        places = {"gpt_neox": ONE, "mamba": TWO, "hybrid_mixer": ONE}
        loaded = ManticoreForCausalLM.from_pretrained(tmp_path, device_map=places)
        agree(results(loaded), wanted, exact=False)


@pytest.mark.parametrize("far", [TWO, "cpu"])
def test_an_adapter_goes_where_its_layers_are(far, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    hybrid("gpt_neox+mamba", num_blocks=2).save_pretrained(tmp_path / "hybrid")
    base = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")
    tuned = get_peft_model(base, lora_config(base, r=4))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        tuned.save_pretrained(tmp_path / "adapter")
        wanted = tuned.eval()(input_ids=tokens()).logits
        with tuned.disable_adapter():
            assert not torch.allclose(tuned(input_ids=tokens()).logits, wanted, atol=0.1)
    with fake_devices():
        places = {"gpt_neox": ONE, "mamba": far, "hybrid_mixer": ONE}
        base = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid", device_map=places)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        got = loaded(input_ids=tokens().to(ONE)).logits.cpu()
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, preset", [("sequence", "default"), ("token", "paper")])
def test_classifiers(kind, preset, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    model = BOTH[kind].from_causal_lm(hybrid("gpt_neox+mamba", num_blocks=2, preset=preset), num_labels=3)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    wanted = scored(model, kind, **inputs)
    places = {"gpt_neox": "cpu", "mamba": "disk", "hybrid_mixer": "disk", "score": "disk"}
    loaded = BOTH[kind].from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(scored(loaded, kind, **inputs), wanted)
    with fake_devices():
        places = {"gpt_neox": ONE, "mamba": TWO, "hybrid_mixer": ONE, "score": TWO}
        loaded = BOTH[kind].from_pretrained(tmp_path, device_map=places)
        out = scored(loaded, kind, **{key: value.to(ONE) for key, value in inputs.items()})
        torch.testing.assert_close(out.cpu(), wanted, atol=2e-5, rtol=1e-5)


def test_the_devices_are_strict():
    """Without the moves of `devices_manticore` the tests above could not pass."""
    with fake_devices():
        one, two = torch.ones(3, device=ONE), torch.ones(3, device=TWO)
        for wrong in (
            lambda: one + two,
            lambda: one + torch.ones(3),
            lambda: torch.cat([one, two]),
            lambda: torch.ones(3)[one > 0],
            lambda: one.__setitem__(slice(0, 2), two[:2]),
        ):
            with pytest.raises(RuntimeError, match="all must be on one device|others on"):
                wrong()
        assert torch.equal((one + two.to(ONE)).cpu(), torch.full((3,), 2.0))
        assert torch.equal((one * torch.tensor(2.0)).cpu(), torch.full((3,), 2.0))


@pytest.mark.gpu
@pytest.mark.parametrize("saved", SAVED, indirect=True)
@pytest.mark.parametrize("main", ["first", "last", "layers"])
def test_cpu_and_gpu(saved, main):
    """What is on the CPU is offloaded: brought to the GPU, where everything runs."""
    folder, config, wanted = saved
    names = config.component_names
    places = {name: "cpu" for name in names} | {"hybrid_mixer": 0}
    if main == "layers":
        del places[names[-1]]
        places |= layers_of(config, names[-1], (0, "cpu"))
    else:
        places[names[0 if main == "first" else -1]] = 0
    model = ManticoreForCausalLM.from_pretrained(folder, device_map=places)
    assert model.device.type == "cuda"
    got = results(model)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(got[1], wanted[1], atol=1e-3, rtol=1e-3)
    whole = ManticoreForCausalLM.from_pretrained(folder, device_map=0)
    agree(got, results(whole), exact=True)
