"""The standard Trainer on a hybrid: checkpoints hold what changed, and resuming is exact."""

import pytest
import torch
from hub_models import INDEX, MODEL, assert_same_model, component_keys, folder_of, nudge, publish, saved_keys, tiny
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

from manticore_hf import ManticoreError, ManticoreForCausalLM


@pytest.fixture
def repos(hub, owner, tmp_path):
    """A head under another name in its repository, and a tie."""
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    publish(hub, f"{owner}/b", tiny("gpt2", 1), tmp_path / "src")
    return [f"{owner}/a", f"{owner}/b"]


@pytest.fixture
def compose(repos):
    def make(trained=("a.", "b.", "hybrid_mixer.")):
        torch.manual_seed(0)
        model = ManticoreForCausalLM.from_components(repos, num_blocks=2, gate="alpha", embeddings="mixed")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(trained)))
        return model

    return make


def data(rows=16, seed=5):
    tokens = torch.randint(3, 64, (rows, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(model, folder, **changes):
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "seed": 3, "disable_tqdm": True, "save_strategy": "steps",
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(str(folder), **{**arguments, **changes}), train_dataset=data(), eval_dataset=data(8, 6)
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


ALL = ("a.", "b.", "hybrid_mixer.")


@pytest.mark.parametrize("trained", [ALL, ("hybrid_mixer.",), ("a.lm_head", "hybrid_mixer.")])
def test_resuming_is_exact(compose, tmp_path, trained):
    whole = trainer(compose(trained), tmp_path / "whole")
    whole.train()
    for kind in ("a.", "b."):
        changed = {key for key in saved_keys(tmp_path / "whole" / "checkpoint-6") if key.startswith(kind)}
        assert bool(changed) == any(name.startswith(kind) for name in trained)
    resumed = trainer(compose(trained), tmp_path / "resumed")
    # A start that no checkpoint may leave a trace of.
    nudge(resumed.model, *dict(resumed.model.named_parameters()))
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert result.global_step == 6
    assert_same_model(whole.model, resumed.model)
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


def test_checkpoints_load_as_hybrids(compose, tmp_path):
    run = trainer(compose(("hybrid_mixer.",)), tmp_path / "out", save_total_limit=1)
    run.train()
    folders = list((tmp_path / "out").glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-6"]
    assert component_keys(folders[0]) == set()
    assert_same_model(ManticoreForCausalLM.from_pretrained(folders[0]), run.model)
    run.save_model()
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "out"), run.model)
    assert folders[0].is_dir()  # saving into the parent leaves the checkpoints alone


def test_load_best_model_at_end(compose, tmp_path):
    run = trainer(
        compose(),
        tmp_path / "out",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        learning_rate=0.3,
    )
    run.train()
    best = run.state.best_model_checkpoint
    scores = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert best.endswith(f"checkpoint-{min((step for step in scores if step), key=scores.get)}")
    assert run.evaluate()["eval_loss"] == run.state.best_metric
    assert_same_model(run.model, ManticoreForCausalLM.from_pretrained(best))


@pytest.fixture
def small_shards(monkeypatch):
    """The Trainer has no setting for the size of shards; Transformers' default is 50 GB."""
    real = PreTrainedModel.save_pretrained

    def save(self, *args, **kwargs):
        return real(self, *args, **{**kwargs, "max_shard_size": "12KB"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)


@pytest.mark.parametrize("trained", [ALL, ("a.gpt_neox.layers.1", "b.transformer.wte", "hybrid_mixer.")])
def test_sharded_checkpoints(compose, tmp_path, small_shards, trained):
    whole = trainer(
        compose(trained),
        tmp_path / "whole",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
    )
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / INDEX).is_file() and not (checkpoint / MODEL).exists()
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    assert_same_model(whole.model, ManticoreForCausalLM.from_pretrained(whole.state.best_model_checkpoint))
    resumed = trainer(compose(trained), tmp_path / "resumed", max_steps=4)
    nudge(resumed.model, *dict(resumed.model.named_parameters()))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_model(resumed.model, ManticoreForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4"))


def load_shards(model, folder, backwards):
    """What `load_sharded_checkpoint` does, in a chosen order (its own is that of a set)."""
    model.state_dict()
    for file in sorted(folder.glob("*.safetensors"), reverse=backwards):
        model.load_state_dict(load_file(file), strict=False)


@pytest.mark.parametrize("backwards", [False, True])
def test_shards_in_any_order_and_one_checkpoint_after_another(compose, tmp_path, backwards):
    model = compose()
    first = nudge(compose(), *dict(model.named_parameters()))
    first.save_pretrained(tmp_path / "first", max_shard_size="12KB")
    second = nudge(compose(), "a.lm_head.weight", "hybrid_mixer.alpha_logits")
    second.save_pretrained(tmp_path / "second", max_shard_size="4KB")
    second.save_pretrained(tmp_path / "single")
    for folder, expected in (("first", first), ("second", second), ("first", first)):
        assert len(list((tmp_path / folder).glob("*.safetensors"))) > 1
        load_shards(model, tmp_path / folder, backwards)
        assert_same_model(model, expected)
    model.load_state_dict(load_file(tmp_path / "single" / MODEL), strict=False)
    assert_same_model(model, second)


# ---- load_state_dict -------------------------------------------------------------------------------------------------


def test_whole_state_dict(compose, tmp_path):
    model, other = compose(), nudge(compose(), "a.lm_head.weight", "b.transformer.wte.weight")
    torch.save(other.state_dict(), tmp_path / "state.pt")
    assert model.load_state_dict(torch.load(tmp_path / "state.pt")).missing_keys == []
    assert_same_model(model, other)


def test_saved_state_dict_fills_in_the_rest(compose, tmp_path):
    other = nudge(compose(), "a.lm_head.weight", "b.transformer.wte.weight")
    other.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / MODEL)
    model = nudge(compose(), *dict(compose().named_parameters()))
    result = model.load_state_dict(saved)  # strict
    assert result.missing_keys == result.unexpected_keys == []
    assert_same_model(model, other)
    assert len(saved) == len(load_file(tmp_path / "out" / MODEL))  # the caller's dict is the caller's


def test_part_of_a_state_dict_is_taken_as_it_is(compose):
    model = compose()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = model.load_state_dict({"a.lm_head.weight": torch.zeros(64, 16)}, strict=False)
    assert "b.transformer.ln_f.weight" in result.missing_keys
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key != "a.lm_head.weight")
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"a.lm_head.weight": torch.zeros(64, 16)})


def test_reference_that_is_gone_is_an_error_not_a_guess(compose, hub, owner, tmp_path):
    model = compose()
    saved = {key: value for key, value in model.state_dict().items() if key.startswith("hybrid_mixer.")}
    model._component_cache_dir = str(tmp_path / "empty")
    hub.fault(f"{owner}/b/resolve", "missing", times=-1)
    with pytest.raises(ManticoreError, match="(?s)Component 'b'.*cannot be read"):
        model.load_state_dict(saved, strict=False)


def test_embedded_components_resume(tmp_path):
    def make():
        torch.manual_seed(0)
        return ManticoreForCausalLM.from_components([folder_of(tiny("gpt_neox"), tmp_path / "local")])

    whole, resumed = trainer(make(), tmp_path / "whole"), trainer(make(), tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_model(whole.model, resumed.model)
