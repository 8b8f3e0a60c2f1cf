"""Whether components are good at different things, measured on components whose strengths are known; the objective
that follows, and when it is chosen."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_hybrid import QUIET, mixed_hybrid, pair, rows_of, save, save_pair
from transformers import TrainingArguments

from manticore_hf import ManticoreConfig, ManticoreError, ManticoreForCausalLM
from manticore_hf.evaluation.data import DataArguments
from manticore_hf.training.complementary_errors import (
    ComplementaryErrors,
    ObjectiveWhenSharded,
    awaits_objective,
    choose_objective,
    measure_complementary_errors,
)
from manticore_hf.training.recipe import load_recipe
from manticore_hf.training.trained_stages import StageArguments, run_stage
from manticore_hf.training.untrained_stages import run_compose
from manticore_hf.utils.objective import ALIKE, SPECIALISTS, say_objective

VOCABULARY = 16


class Knows:
    """A causal LM whose loss on the next token is what `loss_of(next tokens)` says."""

    def __init__(self, loss_of):
        self.loss_of = loss_of

    def __call__(self, input_ids, use_cache):
        following = input_ids.roll(-1, 1)
        p = torch.exp(-self.loss_of(following))
        rest = (1 - p) / (VOCABULARY - 1)
        logits = rest.log()[..., None].repeat(1, 1, VOCABULARY + 3)  # rows that only pad
        return SimpleNamespace(logits=logits.scatter(-1, following[..., None], p.log()[..., None]))


def hybrid_of(*losses):
    """A stand-in for a hybrid of such components."""
    parts = {f"c{i}": Knows(loss) for i, loss in enumerate(losses)}
    config = SimpleNamespace(component_names=list(parts), vocab_size=VOCABULARY)
    return SimpleNamespace(
        config=config, component=parts.get, device="cpu", training=False, train=lambda mode: None, eval=lambda: None
    )


def config_of_two(**settings):
    """A hybrid's configuration, as if it had the components of `hybrid_of`."""
    config = ManticoreConfig(**settings)
    config._component_names, config.vocab_size = ["c0", "c1"], VOCABULARY
    return config


def rows(*starts, length=33):
    """Rows of one token each: what they are of."""
    ids = [[start] * length for start in starts]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def high_and_low(tokens):
    return torch.where(tokens < 8, 1.0, 2.0)


def low_and_high(tokens):
    return torch.where(tokens < 8, 2.0, 1.0)


def test_specialists_gain_what_an_oracle_would():
    found = measure_complementary_errors(hybrid_of(high_and_low, low_and_high), rows(1, 9, 2, 10, 3, 11), window=8)
    assert found.gain == pytest.approx(0.5, abs=1e-5)  # always 1 instead of the mean of 1 and 2
    assert found.losses == pytest.approx({"c0": 1.5, "c1": 1.5}, abs=1e-5)
    assert found.shares == {"c0": 0.5, "c1": 0.5} and found.tokens == 6 * 32
    uneven = measure_complementary_errors(hybrid_of(high_and_low, low_and_high), rows(1, 2, 3, 9), window=8)
    assert uneven.gain == pytest.approx(0.25, abs=1e-5) and uneven.shares["c0"] == 0.75


def test_one_that_is_better_everywhere_gains_nothing():
    better = measure_complementary_errors(hybrid_of(high_and_low, lambda t: high_and_low(t) + 0.3), rows(1, 9, 2, 10))
    assert better.gain == pytest.approx(0.0, abs=1e-5) and better.shares == {"c0": 1.0, "c1": 0.0}


def test_chance_is_no_strength():
    """Losses that differ token by token, without a place where one is better: a minimum per window would gain."""
    noise = torch.Generator().manual_seed(0)

    def loss(tokens):
        return 1.0 + torch.rand(tokens.shape, generator=noise)

    texts = rows_of(200, 65)
    found = measure_complementary_errors(hybrid_of(loss, loss), texts, tokens=10**6, window=16)
    assert abs(found.gain) < 0.01 and found.tokens == 200 * 64
    windows = torch.rand(2, 800, 16, generator=noise).mean(-1)  # what choosing on the same tokens would say
    assert windows.mean(1).min() - windows.min(0).values.mean() > 0.03


def test_only_what_counts_is_measured():
    """Prompts (-100) and the padding of short rows take no part, whatever the losses are there."""
    ids = [[1] * 9 + [9] * 8, [9] * 9]
    labels = [[1] * 9 + [-100] * 8, [-100] * 9]
    found = measure_complementary_errors(
        hybrid_of(high_and_low, low_and_high), Dataset.from_dict({"input_ids": ids, "labels": labels}), window=4
    )
    assert found.tokens == 8 and found.losses == pytest.approx({"c0": 1.0, "c1": 2.0}, abs=1e-5)
    with pytest.raises(ManticoreError, match="No row has two tokens to predict"):
        unlabelled = Dataset.from_dict({"input_ids": ids[1:], "labels": labels[1:]})
        measure_complementary_errors(hybrid_of(high_and_low), unlabelled)


def test_real_components_are_measured_by_their_own_losses():
    model, texts = mixed_hybrid(), rows_of(5, 13)
    found = measure_complementary_errors(model, texts, tokens=10**6, window=12)
    ids = torch.tensor(texts["input_ids"])
    for name, loss in found.losses.items():
        expected = model.component(name)(input_ids=ids, labels=ids).loss.item()
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "chosen", "word"),
    [((high_and_low, low_and_high), SPECIALISTS, "complementary"), ((high_and_low, high_and_low), ALIKE, "similar")],
)
def test_the_objective_follows_the_strengths(losses, chosen, word):
    model, texts = hybrid_of(*losses), rows(1, 9, 2, 10)
    model.config = config_of_two()
    assert say_objective(model.config).startswith("chosen when")
    found = choose_objective(model, texts, window=8)
    config = model.config
    assert isinstance(found, ComplementaryErrors) and config.mixture_space == chosen["mixture_space"]
    assert (config.mix_loss_weight, config.component_loss_weight) == chosen["loss_weights"]
    assert config.objective == {
        "chosen": ["mixture_space", "loss_weights"],
        "gain": found.gain,
        "tokens": found.tokens,
        "window": 8,
    }
    assert f"errors are {word} on this text" in say_objective(config) and f"{found.gain:.3f}" in say_objective(config)


def test_what_is_given_is_kept():
    for given, left in (
        ({"mixture_space": "logprob"}, ["loss_weights"]),
        ({"mix_loss_weight": 2.0}, ["mixture_space"]),
    ):
        model = hybrid_of(high_and_low, low_and_high)
        model.config = config_of_two(**given)
        assert model.config.objective == {"open": left}
        choose_objective(model, rows(1, 9, 2, 10), window=8)
        for key, value in given.items():
            assert getattr(model.config, key) == value
        assert model.config.objective["chosen"] == left
    both = ManticoreConfig(mixture_space="prob", component_loss_weight=0.5)
    assert both.objective is None and say_objective(both) is None


def test_who_awaits_an_objective():
    def made(**settings):
        return ManticoreForCausalLM.from_components(pair(), **{"num_blocks": 1, **settings})

    assert awaits_objective(made()) and awaits_objective(made(mix_loss_weight=1.0))
    for settings in (
        {"mix_loss_weight": 1.0, "mixture_space": "prob"},
        {"preset": "paper"},
        {"num_blocks": 2},
        {"embeddings": "fresh"},
    ):
        assert not awaits_objective(made(**settings)), settings
    for wrong in ("often", {}, {"open": ["speed"]}, {"chosen": ["loss_weights"]}, {"open": [["loss_weights"]]}):
        with pytest.raises(ManticoreError, match="objective=.* must be None, or what"):
            ManticoreConfig(objective=wrong, mix_loss_weight=1.0, mixture_space="prob")


def test_the_first_stage_chooses(tmp_path, capsys):
    folder = save_pair(tmp_path, 700)
    parts, data = [str(folder / "neox"), str(folder / "mamba")], DataArguments(str(folder / "text.txt"), block_size=16)
    run_compose(parts, TrainingArguments(output_dir=str(tmp_path / "hybrid"), **QUIET), num_blocks=1)

    def stage(name, start, output):
        arguments = TrainingArguments(output_dir=str(tmp_path / output), max_steps=1, learning_rate=1e-4, **QUIET)
        result = run_stage(name, StageArguments(str(tmp_path / start)), data, arguments)
        return result, ManticoreForCausalLM.from_pretrained(tmp_path / output)

    result, gated = stage("pretrain", "hybrid", "gated")
    # Two models with random weights: alike, and equally bad.
    assert "Objective: the components' errors are similar" in capsys.readouterr().out and not awaits_objective(gated)
    config = gated.config
    assert config.mixture_space == "logprob" and config.component_loss_weight == 1.0 and config.mix_loss_weight == 0.3
    assert result["objective"] == {
        "mixture_space": "logprob",
        "mix_loss_weight": 0.3,
        "component_loss_weight": 1.0,
        "objective": config.objective,
    }
    _, tuned = stage("finetune", "gated", "tuned")  # what was chosen stays
    assert tuned.config.objective == config.objective and "Objective" not in capsys.readouterr().out

    given = mixed_hybrid(mix_loss_weight=1.0, mixture_space="prob")
    save(given, tmp_path / "given")
    assert stage("finetune", "given", "asked")[0]["objective"]["objective"] is None


def test_a_recipe_cannot_say_what_was_measured(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("components: [a, b]\nhybrid:\n  objective: {open: []}\n")
    with pytest.raises(ManticoreError, match="recipe.yaml:3: hybrid.objective: unknown key"):
        load_recipe(file)


def test_a_sharded_run_that_goes_on_keeps_its_objective(tmp_path, capsys):
    """What was chosen is read, not measured again: components that were trained may differ in other ways."""

    def made():
        return ManticoreForCausalLM.from_components(pair(), num_blocks=1)

    first, second = made(), made()
    ObjectiveWhenSharded(rows_of(5, 13), 2, tmp_path).on_train_begin(None, None, None, model=torch.nn.Sequential(first))
    assert first.config.objective["chosen"] and not awaits_objective(first)
    kept = json.loads((tmp_path / "objective.json").read_text())
    kept["objective"]["gain"], kept["mixture_space"] = 0.5, "prob"
    (tmp_path / "objective.json").write_text(json.dumps(kept))
    ObjectiveWhenSharded(None, 2, tmp_path).on_train_begin(None, None, None, model=second)
    assert second.config.mixture_space == "prob" and second.config.objective["gain"] == 0.5
    assert second.config.component_loss_weight == first.config.component_loss_weight
    assert capsys.readouterr().out.count("Objective: the components' errors are") == 2
