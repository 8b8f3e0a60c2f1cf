"""`manticore-hf mad`: what it trains, prints and writes, and what it does not do twice."""

import json

import pytest
import torch
from safetensors.torch import load_model

from manticore_hf import ManticoreError
from manticore_hf.cli import main
from manticore_hf.experiments import CompressionModel, baselines, from_scratch, mad_task, run_mad
from manticore_hf.experiments.baselines import Training

TINY = "--vocab-size 8 --seq-len 8 --num-train 48 --num-test 32 --hidden-size 32 --layers 1 --num-train-epochs 1"
TINY = [*TINY.split(), "--batch-size", "16"]
DEPTHS = (("gpt_neo", 1), ("mamba", 2))


def mad(folder, *options):
    return main(["mad", *options, *TINY, "--output-dir", str(folder)])


def results(folder):
    return {data["model"]: data for data in (json.loads(file.read_text()) for file in folder.glob("*.json"))}


def accuracy(models, rows, shifted):
    """Micro and macro accuracy of an ensemble of models by plain loops."""
    hits = {}
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        with torch.no_grad():
            mean = sum(model(input_ids=ids)["logits"][0].float().log_softmax(-1) for model in models)
        guess = mean.argmax(-1).tolist()
        guess = [None, *guess[:-1]] if shifted else guess
        for said, wanted in zip(guess, labels):
            if wanted != -100:
                hits.setdefault(wanted, []).append(said == wanted)
                hits.setdefault(said, [])
    every = [hit for found in hits.values() for hit in found]
    return sum(every) / len(every), sum(sum(found) / max(1, len(found)) for found in hits.values()) / len(hits)


@pytest.mark.parametrize("name", ["in-context-recall", "compression"])
def test_a_hybrid_is_printed_beside_its_components_and_their_ensemble(name, tmp_path, capsys):
    assert mad(tmp_path, name, "--hybrid", "llama,mamba", "--seed", "3") == 0
    found = results(tmp_path)
    assert list(sorted(found)) == ["ensemble of the components", "hybrid llama+mamba", "llama", "mamba"]
    printed = capsys.readouterr().out
    assert "micro    macro   (accuracy; chance 0.250)" in printed or name == "compression"
    for model, result in found.items():
        assert f"{result['accuracy']:9.4f}{result['macro_accuracy']:9.4f}" in printed.split(f"\n{model} ")[1]
    assert found["llama"]["steps"] == found["mamba"]["steps"] == found["hybrid llama+mamba"]["steps"] == 3
    alpha = found["hybrid llama+mamba"]["mixture_weights"]
    assert len(alpha) == 1 and abs(sum(alpha[0]) - 1) < 1e-6

    # The numbers, once more, from the weights that were kept
    task, models = mad_task(name, vocab_size=8, seq_len=8, num_train=48, num_test=32, seed=3), []
    for i, family in enumerate(("llama", "mamba")):
        lm = from_scratch(family, 8, 1, 32, 9, seed=3 + i)
        models.append(lm if task.shifted else CompressionModel(lm, 8, 8))
        load_model(models[-1].eval(), next(tmp_path.glob(f"{name}-{family}-*.safetensors")))
    rows = task.dataset("test")
    for model, parts in (("llama", models[:1]), ("mamba", models[1:]), ("ensemble of the components", models)):
        expected = accuracy(parts, rows, task.shifted)
        assert (found[model]["accuracy"], found[model]["macro_accuracy"]) == pytest.approx(expected)
    assert found["llama"]["parameters"] == models[0].num_parameters() if task.shifted else True


def test_the_papers_setting_no_projectors_alphas_own_rate_and_twice_the_layers_of_mamba(tmp_path, monkeypatch, capsys):
    seen, train = {}, baselines.Trainer.train

    def spy(self):
        alpha = [p for name, p in self.model.named_parameters() if name.endswith("alpha_logits")]
        out = train(self)
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        seen[type(self.model).__name__] = [
            (group["initial_lr"], any(p is one for p in group["params"] for one in alpha)) for group in groups
        ]
        return out

    monkeypatch.setattr(baselines.Trainer, "train", spy)
    options = ["--hybrid", "gpt_neo,mamba", "--preset", "paper", "--learning-rate", "5e-4"]
    papers = ["--projector", "none", "--alpha-learning-rate", "0.01", "--layers-of", "mamba=2"]
    assert mad(tmp_path, "memorization", *options, *papers) == 0
    assert seen["MambaForCausalLM"] and {rate for rate, _ in seen["MambaForCausalLM"]} == {5e-4}
    assert [rate for rate, alpha in seen["ManticoreForCausalLM"] if alpha] == [0.01]
    assert {rate for rate, alpha in seen["ManticoreForCausalLM"] if not alpha} == {5e-4}
    found = results(tmp_path)
    neo, mamba = (from_scratch(name, 8, layers, 32, 9).num_parameters() for name, layers in DEPTHS)
    assert (found["gpt_neo"]["parameters"], found["mamba"]["parameters"]) == (neo, mamba)
    # No projectors: all that the hybrid adds is alpha
    assert found["hybrid gpt_neo+mamba"]["parameters"] - neo - mamba == 2
    assert abs(found["hybrid gpt_neo+mamba"]["mixture_weights"][0][0] - 0.5) > 1e-3
    capsys.readouterr()
    for more, message in (
        (["--layers-of", "llama=2"], "no model of type 'llama'"),
        (["--layers-of", "mamba=x"], "--layers-of mamba=x is no pair"),
        (["--alpha-learning-rate", "0"], "must be above"),
        (["--alpha-learning-rate", "0.01", "--preset", "default"], "has no alpha"),
    ):
        assert mad(tmp_path / "none", "memorization", *options, *more) == 2
        assert message in capsys.readouterr().err


def test_baselines_can_be_left_out(tmp_path):
    assert mad(tmp_path, "memorization", "--hybrid", "llama,mamba", "--no-baselines", "--num-blocks", "1") == 0
    assert list(results(tmp_path)) == ["hybrid llama+mamba"]


def test_the_old_names_of_baselines_are_taken_with_a_warning(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(baselines.Benchmark, "run", lambda self, families, wanted, *rest: seen.append(wanted) or [{}])
    monkeypatch.setattr("manticore_hf.experiments.mad.train_mad._print_table", lambda task, found: None)
    for option, new, wanted in (("--rivals", "--baselines", True), ("--no-rivals", "--no-baselines", False)):
        with pytest.warns(FutureWarning, match=f"manticore-hf mad: {option} is now {new}"):
            assert mad(tmp_path, "recall", "--hybrid", "llama,mamba", option) == 0
        with pytest.warns(FutureWarning, match="run_mad: rivals is now baselines"):
            run_mad(mad_task("recall"), ["llama", "mamba"], tmp_path, rivals=wanted, quiet=True)
    assert seen == [True, True, False, False]


def test_what_is_finished_is_not_run_again_and_what_was_killed_is(tmp_path, capsys, monkeypatch):
    def go(*more):
        trained.clear()
        assert mad(tmp_path, "recall", "--hybrid", "llama,mamba", *more) == 0
        table = capsys.readouterr().out.partition("in-context-recall: vocabulary")[2]
        return [name for name in trained], table

    trained, train = [], baselines.Trainer.train
    spy = lambda self: trained.append(type(self.model).__name__) or train(self)  # noqa: E731
    monkeypatch.setattr(baselines.Trainer, "train", spy)
    everything = ["ManticoreForCausalLM", "LlamaForCausalLM", "MambaForCausalLM"]
    first, table = go()
    assert first == everything and table
    assert go() == ([], table)

    # A run that did not come to its end has no JSON; the others stay
    next(tmp_path.glob("*-mamba-*.json")).unlink()
    next(tmp_path.glob("*-ensemble-*.json")).unlink()
    assert go() == (["MambaForCausalLM"], table)
    # Killed while the ensemble's weights were lost: the component is trained again, to the same weights
    next(tmp_path.glob("*-llama-*.safetensors")).unlink()
    next(tmp_path.glob("*-ensemble-*.json")).unlink()
    assert go() == (["LlamaForCausalLM"], table)
    # Another setting is another run
    assert go("--learning-rate", "1e-3")[0] == everything


def test_baselines_start_alike_and_see_the_same_sequences_in_the_same_order(tmp_path, monkeypatch):
    seen, step = {}, baselines.Trainer.training_step
    starts, train = [], baselines.Trainer.train

    def keep(self):
        starts.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return train(self)

    monkeypatch.setattr(baselines.Trainer, "train", keep)

    def spy(self, model, inputs, *args, **kwargs):
        seen.setdefault(type(model).__name__, []).append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(baselines.Trainer, "training_step", spy)
    task = mad_task("recall", seq_len=8, num_train=40, num_test=4)
    training = Training(layers=1, hidden_size=32, epochs=2, batch_size=8)
    run_mad(task, ["llama", "mamba"], tmp_path, training, quiet=True)
    hybrid, *components = starts
    for name, component in zip(("llama", "mamba"), components):
        assert component and all(torch.equal(hybrid[f"{name}.{key}"], value) for key, value in component.items())
    batches = list(seen.values())
    assert len(batches) == 3 and batches[0] == batches[1] == batches[2]
    rows = [row for batch in batches[0][:5] for row in batch]
    assert sorted(rows) == sorted(task.dataset("train")["input_ids"][:])
    assert batches[0][:5] != batches[0][5:]


def test_the_schedule_is_the_benchmarks(tmp_path, monkeypatch):
    kept = []
    train = baselines.Trainer.train
    monkeypatch.setattr(baselines.Trainer, "train", lambda self: kept.append(self) or train(self))
    task = mad_task("recall", seq_len=8, num_train=40, num_test=4)
    training = Training(layers=1, hidden_size=32, epochs=4, batch_size=8, weight_decay=0.1, learning_rate=1e-3)
    run_mad(task, ["llama"], tmp_path, training, quiet=True)
    (trainer,) = kept
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW"
    assert trainer.state.global_step == 20
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.1}
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-6)  # where cosine has ended


@pytest.mark.parametrize(
    "options,message",
    [
        (["recal", "--model", "llama"], "manticore-hf mad: task='recal' is unknown; did you mean recall?"),
        (["recall", "--model", "lama"], "manticore-hf mad: model='lama' is not a model type with a causal LM"),
        (["recall", "--hybrid", "llama"], "--hybrid llama names one model; give at least two, or --model llama"),
        (["recall", "--hybrid", "llama,mambo"], "model='mambo' is not a model type"),
        (["recall", "--model", "llama", "--frac-noise", "0.1"], "in-context-recall has no noise, and frac_noise=0.1"),
        (["recall", "--model", "llama", "--learning-rate", "0"], "learning_rate=0.0 must be above 1e-06"),
        (["recall", "--hybrid", "llama,mamba", "--num-blocks", "2"], "num_blocks"),
        (["recall", "--hybrid", "llama,mamba", "--preset", "papier"], "preset='papier'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_trained(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(baselines.Trainer, "train", lambda self: pytest.fail("trained"))
    assert mad(tmp_path, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*"))


def test_a_model_or_a_hybrid_must_be_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        mad(tmp_path, "recall")
    assert "one of the arguments --model --hybrid is required" in capsys.readouterr().err


def test_without_evaluate_it_says_so_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines.Trainer, "train", lambda self: pytest.fail("trained"))
    monkeypatch.setitem(__import__("sys").modules, "evaluate", None)
    with pytest.raises(ManticoreError, match=r"pip install 'manticore-hf\[evaluate\]'"):
        run_mad(mad_task("recall"), ["llama"], tmp_path, quiet=True)


LEARNS = {
    "memorization": ({"vocab_size": 64}, {"epochs": 20, "learning_rate": 5e-3, "batch_size": 16}),
    "selective-copying": (
        {"seq_len": 24, "tokens_to_copy": 4, "num_train": 3200},
        {"epochs": 12, "learning_rate": 3e-3, "batch_size": 64},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNS)
def test_a_small_model_learns_an_easy_task(name, tmp_path):
    """Well above 90 % after a minute on one core: labels are where a model can learn them."""
    settings, training = LEARNS[name]
    task = mad_task(name, num_test=256, **settings)
    (result,) = run_mad(task, ["llama"], tmp_path, Training(hidden_size=64, **training), quiet=True)
    assert result["accuracy"] > 0.9 > 5 * task.chance
    assert result["macro_accuracy"] > 0.9
