"""Stages with the standard Trainer, and clipping per component."""

import aligned_pairs
import pytest
import torch
from tiny_hybrid import QUIET, WORDS, pair, word_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from manticore_hf import ManticoreError, ManticoreForCausalLM, set_stage
from manticore_hf.evaluation import losses
from manticore_hf.evaluation.data import pack
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.families.contract import randomise
from manticore_hf.training.freezing import ComponentClipping
from manticore_hf.training.stage_arguments import with_direction
from manticore_hf.training.trained_stages import HybridTrainer


@pytest.fixture
def model():
    return ManticoreForCausalLM.from_components(pair(), num_blocks=2)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(pad_token="<end>", model_max_length=64)


def _arguments(path, **kwargs):
    settings = {**QUIET, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **kwargs}
    return TrainingArguments(output_dir=str(path), **settings)


def _snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def _changed(model, before):
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


@pytest.fixture
def text(tokenizer):
    return pack([" ".join(WORDS)] * 40, tokenizer, 8)


@pytest.mark.parametrize("stage", ["projectors", "search", "finetune"])
def test_the_standard_trainer_trains_what_the_stage_says(model, text, tmp_path, stage):
    before = _snapshot(model)
    alpha = model.mixture_weights()[0]
    Trainer(model=set_stage(model, stage), args=_arguments(tmp_path), train_dataset=text).train()
    changed = _changed(model, before)
    assert any(key.startswith("hybrid_mixer.into") for key in changed)
    assert any(key.startswith("mamba.") for key in changed) == (stage != "projectors")
    assert any(key.startswith("gpt_neox.") for key in changed) == (stage != "projectors")
    assert torch.equal(model.mixture_weights()[0], alpha) == (stage == "finetune")


def test_frozen_components_keep_no_weight_gradients(model, text):
    set_stage(model, "projectors")
    ids = torch.tensor(text[:2]["input_ids"])
    model.train()(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) <= key.startswith("hybrid_mixer."), key


def test_unknown_stage(model):
    with pytest.raises(ManticoreError, match="stage='warmup' is unknown"):
        set_stage(model, "warmup")


def test_clipping_bounds_each_part_by_its_own_norm(model, text, tmp_path):
    norms = {}

    class Watch(ComponentClipping):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
            for name in ("gpt_neox", "mamba", "hybrid_mixer"):
                grads = [p.grad for p in getattr(model, name).parameters() if p.grad is not None]
                norms.setdefault(name, []).append(torch.stack([g.norm() for g in grads]).norm().item())

    Trainer(
        model=set_stage(model, "search"),
        args=_arguments(tmp_path, max_grad_norm=0.0),
        train_dataset=text,
        callbacks=[Watch(0.01)],
    ).train()
    for name, values in norms.items():
        assert len(values) == 3 and all(abs(v - 0.01) < 1e-4 for v in values), (name, values)


def test_the_logs_hold_every_part(model, text, tmp_path):
    args = _arguments(
        tmp_path,
        max_steps=2,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.0,
    )
    trainer = HybridTrainer(model=set_stage(model, "search"), args=args, train_dataset=text, eval_dataset=text)
    trainer.train()
    first, last = trainer.state.log_history[0], next(r for r in trainer.state.log_history if "eval_loss" in r)
    baselines = compare_losses(model, text)
    for name, key in (("gpt_neox", "gpt_neox"), ("mamba", "mamba"), ("ensemble", "ensemble"), ("hybrid", "mixture")):
        # In 2 blocks a component's own head reads the hybrid's states: from outside only the mixture is comparable.
        assert last[f"eval_loss/{key}"] > 0 and first[f"loss/{key}"] > 0
        if name == "hybrid":
            assert last["eval_loss/mixture"] == pytest.approx(baselines["hybrid"], abs=1e-4)
            assert first["loss/mixture"] == pytest.approx(first["loss"], abs=1e-4)
    assert first["alpha/0/mamba"] == 0.5 and first["gate/mamba"] == pytest.approx(0.5)


def test_in_one_block_the_logged_parts_are_the_components_alone(model, text, tmp_path):
    one = ManticoreForCausalLM.from_components([model.component(n) for n in ("gpt_neox", "mamba")])
    trainer = HybridTrainer(model=one, args=_arguments(tmp_path), eval_dataset=text)
    metrics, baselines = trainer.evaluate(), compare_losses(one, text)
    for name in ("gpt_neox", "mamba", "ensemble"):
        assert metrics[f"eval_loss/{name}"] == pytest.approx(baselines[name], abs=1e-4)


def _traces(model):
    """Hooks of a model and of all in it, and whether it reports of its parts."""
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()]
    return hooks[0], sum(hooks), model.report_parts


class _Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("in the middle")

    on_prediction_step = on_step_end


def test_a_model_is_as_it_was_when_its_trainer_is_done(model, text, tmp_path):
    before = _traces(model)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    trainer = HybridTrainer(
        model=model, args=_arguments(tmp_path, **settings), train_dataset=text, eval_dataset=text.select(range(8))
    )
    seen = []
    trainer.add_callback(_Sees(seen))
    trainer.train()
    assert _traces(model) == before == (0, before[1], False)
    assert seen == [(1, before[1] + 1, True)] * 3  # evaluations in between leave it reporting
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all("loss/mixture" in entry and "loss/ensemble" in entry for entry in logged)
    assert "eval_loss/ensemble" in trainer.evaluate() and _traces(model) == before
    trainer.predict(text.select(range(4)))
    assert _traces(model) == before
    trainer.add_callback(_Fails())
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(RuntimeError, match="in the middle"):
            run()
        assert _traces(model) == before
    model.report_parts = True  # somebody else wants it
    trainer.remove_callback(_Fails)
    trainer.evaluate()
    assert _traces(model) == (0, before[1], True)


class _Sees(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(_traces(model))


def test_the_best_checkpoint_is_one_of_what_is_measured(model, text, tmp_path):
    """Every part that an evaluation gives may be named, and no other; the least loss is the best."""
    one_hot = ManticoreForCausalLM.from_components(pair())
    one_hot.set_mixture_weights("mamba")
    fixed = ManticoreForCausalLM.from_components(pair(), num_blocks=2, embeddings="mixed")
    fixed.set_mixture_weights([[1.0, 0.0], [0.5, 0.5]])
    static = ManticoreForCausalLM.from_components(pair(), mixture="static")
    parts = [f"{what}/{one}" for what in ("loss", "gate") for one in ("mixture", "ensemble", "gpt_neox", "mamba", "x")]
    for hybrid in (model, one_hot, fixed, static, ManticoreForCausalLM.from_components(pair()[:1])):
        measured = HybridTrainer(model=hybrid, args=_arguments(tmp_path), eval_dataset=text.select(range(4))).evaluate()
        assert "eval_loss/mixture" in measured
        for part in parts:
            args = _arguments(tmp_path, metric_for_best_model=part, greater_is_better=False)
            if f"eval_{part}" in measured:
                HybridTrainer(model=hybrid, args=args)
                continue
            with pytest.raises(
                ManticoreError, match=f"is '{part}', which no evaluation of this hybrid measures; choose"
            ):
                HybridTrainer(model=hybrid, args=args)
    args = _arguments(tmp_path, metric_for_best_model="eval_loss/mamba")
    with pytest.raises(ManticoreError, match="greater_is_better is true .*the largest loss would be the best"):
        HybridTrainer(model=model, args=args)
    for metric, said in (("loss/mamba", False), ("eval_loss/mixture", False), ("loss", None), ("gate/mamba", None)):
        assert with_direction({"metric_for_best_model": metric}).get("greater_is_better") is said
    assert with_direction({"metric_for_best_model": "loss/x", "greater_is_better": True})["greater_is_better"]


def test_what_did_not_fit_is_in_no_log(model, text, tmp_path):
    """`auto_find_batch_size` begins again after a step of five rows, with four: the logs are of those steps alone."""

    class OutOfMemory(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.train_batch_size == 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    found = []
    for rows, finds in ((5, True), (4, False)):
        settings = {"auto_find_batch_size": finds, "per_device_train_batch_size": rows, "logging_steps": 3}
        args = _arguments(tmp_path, learning_rate=0.0, **settings)
        trainer = HybridTrainer(model=model, args=args, train_dataset=text, callbacks=[OutOfMemory()])
        trainer.train()
        assert trainer.state.train_batch_size == 4
        found += [
            {key: value for key, value in row.items() if key.startswith(("loss", "gate"))}
            for row in trainer.state.log_history
            if "loss" in row
        ]
    assert len(found) == 2 and found[0] == pytest.approx(found[1], abs=1e-6)


def test_packing(tokenizer):
    packed = pack(["the cat", "a mat sat"], tokenizer, 3)
    end, ids = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids
    assert packed["input_ids"] == [[ids("the"), ids("cat"), end], [ids("a"), ids("mat"), ids("sat")]]
    assert packed["labels"] == [[-100, ids("cat"), end], [-100, ids("mat"), ids("sat")]]
    assert len(pack(["the cat"] * 9, tokenizer, 3, limit=2)) == 2
    with pytest.raises(ManticoreError, match="3 tokens, fewer than one block of 8"):
        pack(["the cat"], tokenizer, 8)


@pytest.mark.parametrize("kind", ["gate", "online", "static", "lag", "one-hot", "two blocks", "aligned"])
def test_a_pass_of_the_hybrid_tells_what_its_components_lose(kind, model, text, tmp_path, monkeypatch):
    """Each is run by itself only where the hybrid's own pass does not have its predictions."""
    settings = {"online": {"mixture": "online"}, "static": {"mixture": "static"}, "lag": {"gate_lag": 4}}.get(kind, {})
    if kind == "aligned":
        one = aligned_pairs.hybrid(tmp_path)
    elif kind == "two blocks":
        one = model
    else:
        one = ManticoreForCausalLM.from_components(pair(), **settings)
        randomise(one)
    if kind == "one-hot":
        one.set_mixture_weights("mamba")
    alone = []
    runner = losses.component_runner
    monkeypatch.setattr(
        losses, "component_runner", lambda *args: lambda **inputs: alone.append(1) or runner(*args)(**inputs)
    )
    found = compare_losses(one, text)
    assert bool(alone) == (kind in ("lag", "one-hot", "two blocks")) and "mix" not in vars(one)
    monkeypatch.setattr(
        losses, "_mixture_and_parts", lambda model, ids, names: (model(ids, use_cache=False).logits, {})
    )
    assert found == pytest.approx(compare_losses(one, text), rel=1e-5) and len(alone) > 1
