"""The search finds what is known to be right, and its settings that should not matter do not."""

import json

import pytest
import torch
from datasets import Dataset
from tiny_hybrid import QUIET, neox
from transformers import GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.training.search import STRATEGIES, SearchArguments, SearchTrainer, alpha_history
from manticore_hf.utils.plots import plot_alpha, plot_mixture


def _rows(count=256, length=16, seed=0):
    """Counting modulo 40: learnable by a tiny model, hopeless by chance."""
    torch.manual_seed(seed)
    return (torch.arange(length)[None] + torch.randint(0, 40, (count, 1))) % 40


def _text(**kwargs):
    ids = _rows(**kwargs).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = neox(vocab_size=40, max_position_embeddings=32)
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=5e-3), _rows()
    for _ in range(80):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: value.clone() for key, value in model.state_dict().items()}, model.config


def _hybrid(trained, **settings):
    state, config = trained
    good = GPTNeoXForCausalLM(config)
    good.load_state_dict(state)
    torch.manual_seed(1)
    bad = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
        )
    )
    settings = {"mixture": "static", **settings}
    return ManticoreForCausalLM.from_components([bad, good], **settings)


def _arguments(path, **kwargs):
    settings = {
        "max_steps": 25, "per_device_train_batch_size": 8, "learning_rate": 1e-5, "alpha_learning_rate": 0.2,
    }  # fmt: skip
    return SearchArguments(output_dir=str(path), **{**QUIET, **settings, **kwargs})


RATES = {"darts": 0.2, "darts_alternating": 0.4, "darts_bilevel": 0.2, "gaea": 0.5, "dash": 0.2}


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_finds_the_component_that_knows_the_text(trained, tmp_path, strategy):
    model = _hybrid(trained)
    args = _arguments(tmp_path, strategy=strategy, alpha_learning_rate=RATES[strategy])
    trainer = SearchTrainer(model=model, args=args, train_dataset=_text())
    trainer.train()
    assert model.mixture_weights()[0, 1] > 0.9, model.mixture_weights()
    steps, history = alpha_history(trainer.state.log_history)
    assert steps == list(range(1, 26)) and len(history) == 2
    assert history["alpha/0/gpt_neox"][-1] == pytest.approx(model.mixture_weights()[0, 1].item())
    plot_alpha(steps, history, tmp_path / "alpha.png")
    plot_mixture(model.mixture_weights(), model.config.component_names, tmp_path / "mixture.png")
    assert (tmp_path / "alpha.png").stat().st_size > 5000 and (tmp_path / "mixture.png").stat().st_size > 3000


HALF = [pytest.param(name, True, marks=[] if name == "gaea" else [pytest.mark.slow]) for name in sorted(STRATEGIES)]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("strategy, bf16", [*((name, False) for name in sorted(STRATEGIES)), *HALF])
def test_accumulation_does_not_change_the_result(trained, tmp_path, strategy, bf16):
    results = []
    for batch, accumulation in ((4, 1), (1, 4)):
        model = _hybrid(trained, num_blocks=2, embeddings="mixed")
        args = _arguments(
            tmp_path,
            strategy=strategy,
            max_steps=4,
            per_device_train_batch_size=batch,
            bf16=bf16,
            gradient_accumulation_steps=accumulation,
            entropy_penalty=0.1,
            cost_penalty=0.1,
            optim="sgd",
            alpha_learning_rate=0.05,
        )
        SearchTrainer(model=model, args=args, train_dataset=_text()).train()
        results.append(model.mixture_weights())
    assert (results[0] - 0.5).abs().max() > 1e-3, "alpha did not move: the comparison would mean nothing"
    torch.testing.assert_close(*results, atol=5e-3 if bf16 else 2e-5, rtol=0)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_resumed_search_ends_where_an_uninterrupted_one_does(trained, tmp_path, strategy):
    def search(path, resume=None, **kwargs):
        model = _hybrid(trained)
        args = _arguments(path, strategy=strategy, max_steps=6, save_strategy="steps", save_steps=3, **kwargs)
        SearchTrainer(model=model, args=args, train_dataset=_text()).train(resume_from_checkpoint=resume)
        return model

    whole = search(tmp_path / "a")
    resumed = search(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"))
    torch.testing.assert_close(whole.mixture_weights(), resumed.mixture_weights(), atol=1e-6, rtol=0)
    for (key, one), two in zip(whole.state_dict().items(), resumed.state_dict().values()):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0, msg=key)
    state = json.loads((tmp_path / "a" / "checkpoint-3" / "trainer_state.json").read_text())
    assert any("alpha/0/llama" in row for row in state["log_history"])


def test_gaea_is_the_exponentiated_gradient(trained, tmp_path):
    model = _hybrid(trained, mixture_space="logprob")
    text = _text(count=8)
    ids = torch.tensor(text["input_ids"])
    weights = torch.full((2,), 0.5, requires_grad=True)
    logprobs = [model.component(n)(ids).logits.log_softmax(-1) for n in model.config.component_names]
    mixed = weights[0] * logprobs[0] + weights[1] * logprobs[1]
    loss = torch.nn.functional.cross_entropy(mixed[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradient = torch.autograd.grad(loss, weights)[0]
    expected = 0.5 * torch.exp(-0.3 * gradient)
    expected = expected / expected.sum()
    args = _arguments(
        tmp_path, strategy="gaea", max_steps=1, alpha_learning_rate=0.3, learning_rate=1e-12, max_grad_norm=0.0
    )
    SearchTrainer(model=model, args=args, train_dataset=text).train()
    torch.testing.assert_close(model.mixture_weights()[0], expected.detach(), atol=1e-5, rtol=1e-5)


def test_alternating_steps_move_weights_and_alpha_in_turn(trained, tmp_path):
    """Against two gradients by hand: of the weights at the start, and of alpha where the weights are then."""
    model, twin = (_hybrid(trained, mixture_space="logprob") for _ in range(2))
    text = _text(count=4)
    batch = {key: torch.tensor(text[key]) for key in ("input_ids", "labels")}
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
    args = _arguments(tmp_path, strategy="darts_alternating", max_steps=2, per_device_train_batch_size=4, **settings)
    SearchTrainer(model=model, args=args, train_dataset=text).train()
    twin.train()
    alpha = twin.hybrid_mixer.alpha_logits
    twin(**batch).loss.backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter is not alpha and parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
            parameter.grad = None
    twin(**batch).loss.backward()
    with torch.no_grad():
        alpha -= 0.2 * alpha.grad
    assert (alpha[0, 0] - alpha[0, 1]).abs() > 1e-3
    for (key, one), two in zip(model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5, msg=key)


def test_penalties_move_alpha_as_they_say(trained, tmp_path):
    cheap = _hybrid(trained)
    args = _arguments(tmp_path, cost_penalty=50.0, max_steps=15)
    SearchTrainer(model=cheap, args=args, train_dataset=_text()).train()
    sizes = [sum(p.numel() for p in cheap.component(n).parameters()) for n in cheap.config.component_names]
    assert cheap.mixture_weights()[0].argmax() == min(range(2), key=lambda k: sizes[k])


def test_alpha_is_trained_alone_by_its_own_rate_and_decay(trained, tmp_path):
    model = _hybrid(trained)
    args = _arguments(tmp_path, max_steps=2, alpha_weight_decay=0.3, weight_decay=0.1)
    trainer = SearchTrainer(model=model, args=args, train_dataset=_text())
    trainer.train()
    group = trainer.optimizer.param_groups[-1]
    assert len(group["params"]) == 1 and group["params"][0] is model.hybrid_mixer.alpha_logits
    assert group["lr"] == 0.2 and group["weight_decay"] == 0.3
    others = [p for group in trainer.optimizer.param_groups[:-1] for p in group["params"]]
    assert others and all(model.hybrid_mixer.alpha_logits is not p for p in others)
    args = _arguments(tmp_path, max_steps=4, alpha_lr_scheduler_type="linear", lr_scheduler_type="constant")
    trainer = SearchTrainer(model=model, args=args, train_dataset=_text())
    trainer.create_optimizer_and_scheduler(4)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [one[-1] for one in rates] == pytest.approx([0.2, 0.15, 0.1, 0.05])  # then 0, as in the paper's code
    assert trainer.optimizer.param_groups[-1]["lr"] == 0 and {rate for one in rates for rate in one[:-1]} == {1e-5}


def test_refusals(trained, tmp_path):
    with pytest.raises(ManticoreError, match="strategy='random'"):
        _arguments(tmp_path, strategy="random")
    with pytest.raises(ManticoreError, match="no alpha to search"):
        SearchTrainer(model=_hybrid(trained, mixture="token"), args=_arguments(tmp_path), train_dataset=_text())
    model = _hybrid(trained)
    model.set_mixture_weights("llama")
    with pytest.raises(ManticoreError, match="are fixed"):
        SearchTrainer(model=model, args=_arguments(tmp_path), train_dataset=_text())


def test_a_batch_that_does_not_fit(trained, tmp_path):
    """Alpha's batches shrink as well, and an attempt that failed in one leaves all weights to be trained."""
    found = {}
    for rows, settings in ((5, {"auto_find_batch_size": True}), (4, {})):
        model = _hybrid(trained)

        def check(module, args, kwargs):
            if len(kwargs["input_ids"]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        model.register_forward_pre_hook(check, with_kwargs=True)
        settings = {"strategy": "darts_bilevel", "max_steps": 3, "per_device_train_batch_size": rows, **settings}
        before = {key: value.clone() for key, value in model.named_parameters()}
        run = SearchTrainer(model, _arguments(tmp_path, learning_rate=1e-3, **settings), train_dataset=_text())
        run.train()
        assert run.state.train_batch_size == 4
        found[rows] = dict(model.named_parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert any(
            not torch.equal(value, before[key]) for key, value in found[rows].items() if key.startswith("llama.")
        )
    for key, value in found[4].items():
        torch.testing.assert_close(found[5][key], value, msg=key)
