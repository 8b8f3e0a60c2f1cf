"""Components stored, held or trained in different dtypes: one dtype of the whole, and nothing trained gets lost."""

import hub_models
import pytest
import torch
from hub_models import component_keys, ids, logits, nudge
from transformers import Trainer, TrainingArguments

from manticore_hf import ComponentSpec, ManticoreForCausalLM

SETTINGS = [{"preset": "paper"}, {"mixture": "token"}, {"mixture": "token", "mixture_space": "prob"}]


@pytest.fixture
def repos(hub, owner, tmp_path):
    """A GPT-NeoX stored in float32, and a Mamba and a Llama in bfloat16."""
    stored = {"gpt_neox": torch.float32, "mamba": torch.bfloat16, "llama": torch.bfloat16}
    for seed, (family, dtype) in enumerate(stored.items()):
        hub_models.publish(hub, f"{owner}/{family}", hub_models.tiny(family, seed).to(dtype), tmp_path / "src")
    return [f"{owner}/{family}" for family in stored]


def compose(repos, **settings):
    names = ("neox", "mamba", "llama")
    return ManticoreForCausalLM.from_components(
        [ComponentSpec(repo, name=name) for repo, name in zip(repos, names)], num_blocks=2, **settings
    )


def is_same(loaded, model):
    one, two = loaded.state_dict(), model.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key].to(one[key].dtype)) for key in one)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize(
    "asked, given",
    [
        (None, "float32"),
        ("auto", "float32"),
        ("bfloat16", "bfloat16"),
        (torch.float16, "float16"),
        (torch.float32, "float32"),
    ],
)
def test_one_dtype_of_the_whole(repos, tmp_path, asked, given):
    given = getattr(torch, given)
    model = compose(repos, mixture="token", dtype=asked)
    families = {name: model.component(name) for name in model.config.component_names}
    assert model.dtype == given and {part.dtype for part in families.values()} == {given}
    assert all(part.config.dtype == given for part in families.values())
    model.save_pretrained(tmp_path / "out")
    assert component_keys(tmp_path / "out") == set()
    for dtype in (None, "auto", given):
        loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        hub_models.assert_same_model(loaded, model)
    # In another dtype the references are read anew: in full, where the hybrid had rounded them.
    wide = ManticoreForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = compose(repos, mixture="token", dtype=torch.float32)
    own = [key for key in plain.state_dict() if not key.startswith("hybrid_mixer")]
    assert all(torch.equal(wide.state_dict()[key], plain.state_dict()[key]) for key in own)


def test_a_change_too_small_for_half_precision_is_kept(repos, tmp_path):
    """Tensors that are stored in bfloat16 and were trained in float32."""
    model, keys = compose(repos), {"llama.model.norm.weight", "mamba.backbone.norm_f.weight"}
    for key in keys:
        weight = model.get_parameter(key)
        rounded = weight.detach().bfloat16()
        weight.data.mul_(1 + 1e-5)
        assert torch.equal(weight.bfloat16(), rounded)
    model.save_pretrained(tmp_path / "out")
    assert component_keys(tmp_path / "out") == keys
    assert is_same(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_a_change_in_half_precision_is_all_that_is_written(repos, tmp_path):
    model = compose(repos, dtype="bfloat16")
    key = "neox.gpt_neox.layers.0.mlp.dense_h_to_4h.weight"  # stored in float32
    nudge(model, key).save_pretrained(tmp_path / "out")
    assert component_keys(tmp_path / "out") == {key}
    hub_models.assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), model)


@pytest.mark.parametrize("half", ["neox", "llama"])
def test_components_held_in_different_dtypes(repos, tmp_path, half):
    """Whichever comes first, the whole is as wide as its widest part: what is in another would be rounded."""
    model = compose(repos)
    model.component(half).to(torch.bfloat16)
    other = {"neox": "llama", "llama": "neox"}[half]
    key = {"neox": "neox.gpt_neox.final_layer_norm.weight", "llama": "llama.model.norm.weight"}[other]
    model.get_parameter(key).data.mul_(1 + 1e-5)
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "out")
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32 and is_same(loaded, model)
    # Rounded copies of what is stored in float32 are the hybrid's own; what is stored in bfloat16 is as it was.
    everything = {k for k in model.state_dict() if k.startswith("neox.")} if half == "neox" else set()
    assert component_keys(tmp_path / "out") == everything | {key}


@pytest.mark.parametrize("settings", SETTINGS, ids=["paper", "token", "prob"])
def test_states_pass_between_dtypes(repos, settings):
    model = compose(repos, **settings)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.hybrid_mixer.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    full = logits(model)
    model.component("mamba").to(torch.bfloat16)
    model.component("llama").to(torch.float16)
    assert (logits(model) - full).abs().max() < 0.02 * full.abs().max()
    out = model(input_ids=ids(), labels=ids())
    out.loss.backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    used = {key for key, grad in grads.items() if grad is not None}
    assert all(grads[key].isfinite().all() and grads[key].dtype == model.get_parameter(key).dtype for key in used)
    for name in (*model.config.component_names, "hybrid_mixer"):
        assert any(grads[key].abs().sum() > 0 for key in used if key.startswith(name)), name
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = [model.generate(ids(), use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*texts)
    with torch.no_grad():
        first = model(input_ids=ids()[:, :4], use_cache=True)
        second = model(input_ids=ids()[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    cached = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(cached, out.logits.detach(), rtol=0.02, atol=0.02)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize(  # the quick test above has gradients of the mean of probabilities
    "settings", [*SETTINGS[:2], pytest.param(SETTINGS[2], marks=pytest.mark.slow)], ids=["paper", "token", "prob"]
)
def test_trainer_with_mixed_precision(repos, tmp_path, settings):
    """`TrainingArguments(bf16=True)`: the same training, rounded, of weights in float32 and in bfloat16."""
    rows, losses, states = [{"input_ids": row, "labels": row} for row in ids(16, 12)], [], []
    for bf16, dtype in ((False, "float32"), (True, "float32"), (True, "bfloat16")):
        torch.manual_seed(0)
        model = compose(repos, dtype=dtype, projector_init="identity", **settings)
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=4,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            bf16=bf16,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        states.append({key: p.detach().clone() for key, p in model.named_parameters()})
        model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # whose forward is in bfloat16
        model.save_pretrained(tmp_path / "out")
        hub_models.assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), model)
    assert losses[0][-1] < losses[0][0] - 0.1
    key = "hybrid_mixer.token_gate.linear.weight" if "mixture" in settings else "hybrid_mixer.alpha_logits"
    for dtype, found, state in zip(("float32", "bfloat16"), losses[1:], states[1:]):
        assert found == pytest.approx(losses[0], abs=0.05), dtype
        assert state[key].dtype == torch.float32, dtype
        assert torch.cosine_similarity(states[0][key].flatten(), state[key].flatten(), dim=0) > 0.9, dtype
