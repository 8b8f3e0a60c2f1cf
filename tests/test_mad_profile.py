"""`manticore-hf mad-profile`: the table, the numbers and the picture of what architectures are good at."""

import json

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from tiny_hybrid import pair, save

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.experiments import TASKS, EasySettings, baselines, mad_profile, run_mad
from manticore_hf.experiments.baselines import Training
from manticore_hf.experiments.mad import profile
from manticore_hf.experiments.mad.easy import task_names
from manticore_hf.utils.plots import plot_profile

TINY = EasySettings(seq_len=16, num_train=20, num_test=8, hidden_size=32, layers=1, steps=4, batch_size=8)
OPTIONS = "--seq-len 16 --num-train 20 --num-test 8 --hidden-size 32 --layers 1 --steps 4 --batch-size 8".split()


@pytest.fixture
def trained(monkeypatch):
    """The classes of the models that are trained, as they are, and for how many steps."""
    names, train = [], baselines.Trainer.train

    def counted(self):
        state = train(self)
        names.append((type(self.model).__name__, state.global_step))
        return state

    monkeypatch.setattr(baselines.Trainer, "train", counted)
    return names


def test_a_profile_is_the_accuracies_of_the_runs(tmp_path, capsys, trained):
    arguments = ["mad-profile", "llama,gpt2", "--output-dir", str(tmp_path), "--tasks", "recall", *OPTIONS]
    assert main([*arguments, "--seeds", "2", "--seed", "3"]) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["models"] == {"llama": "llama", "gpt2": "gpt2"}
    printed = capsys.readouterr().out.split("accuracy (micro) after 4 steps from scratch, mean of 2 seed(s)")[1]
    assert len(trained) == 4 and {steps for _, steps in trained} == {6}  # two passes of three batches

    # Each number once more, by the training of one model on one task
    training = Training(layers=1, hidden_size=32, epochs=2, learning_rate=3e-3, batch_size=8, seed=4)
    (again,) = run_mad(TINY.task("recall", 4), ["gpt2"], tmp_path / "again", training, quiet=True)
    assert found["seeds"]["gpt2"]["in-context-recall"][1] == again["accuracy"]
    for name in ("llama", "gpt2"):
        for task, (one, two) in found["seeds"][name].items():
            assert found["accuracy"][name][task] == (one + two) / 2
            assert f"{(one + two) / 2:.4f}" in printed.split(task)[1].split("\n")[0]
    assert found["chance"] == {"in-context-recall": 1 / 8}
    assert plt.imread(tmp_path / "profile.png").std() > 0.05

    trained.clear()
    (tmp_path / "profile.json").unlink()
    assert main([*arguments, "--seeds", "2", "--seed", "3"]) == 0
    assert not trained and json.loads((tmp_path / "profile.json").read_text()) == found
    assert capsys.readouterr().out.endswith(printed)


def test_models_are_profiled_by_their_family(tmp_path, trained):
    """A directory and the components of a hybrid are what their configurations say; one family is trained once."""
    neox, mamba = pair()
    save(neox, tmp_path / "neox")
    save(ManticoreForCausalLM.from_components([neox, mamba]), tmp_path / "hybrid")
    for file in tmp_path.glob("*/*.safetensors"):
        file.unlink()  # only configurations are read
    models = ["gpt_neox", str(tmp_path / "neox"), str(tmp_path / "hybrid")]
    found = mad_profile(models, tmp_path / "out", ["memorization"], TINY, quiet=True)
    names = [*models[:2], f"{models[2]}: gpt_neox", f"{models[2]}: mamba"]
    assert found["models"] == dict(zip(names, ["gpt_neox", "gpt_neox", "gpt_neox", "mamba"]))
    assert [name for name, _ in trained] == ["GPTNeoXForCausalLM", "MambaForCausalLM"]
    scores = [found["accuracy"][name]["memorization"] for name in names]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    "options,message",
    [
        (["lama"], "model='lama' is not a model type of Transformers (llama, mamba, ...), nor a directory or Hub repo"),
        (["vit"], "model='vit' is not a model type with a causal LM"),
        ([","], "There is no model to profile"),
        (["llama", "--tasks", "recal"], "there is no MAD task 'recal'; known are ['recall', 'fuzzy-recall', "),
        (["llama", "--seq-len", "7"], "seq_len=7 must be even"),
        (["llama", "--max-steps", "0"], "--max-steps is 0, must be at least 1 and at most 1,000,000,000"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_anything_is_trained(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(baselines.Trainer, "train", lambda self: pytest.fail("trained"))
    assert main(["mad-profile", *options, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_radar_starts_at_chance_and_ends_at_one(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs)
    )
    chance = {"recall": 0.2, "copying": 0.0, "compression": 0.5}
    scores = {
        "guesser": {**chance},
        "half": {"recall": 0.6, "copying": 0.5, "compression": 0.75},
        "worse": {"recall": 0.1, "copying": 1.0, "compression": 1.0},
    }
    plot_profile(scores, chance, tmp_path / "x.png")
    (figure,) = drawn
    (axis,) = figure.axes
    assert axis.get_ylim() == (0, 1)
    radii = {line.get_label(): [round(float(r), 6) for r in line.get_ydata()] for line in axis.lines}
    assert radii == {"guesser": [0, 0, 0, 0], "half": [0.5] * 4, "worse": [0, 1, 1, 0]}
    assert [label.get_text().split("\n")[0] for label in axis.get_xticklabels()] == list(chance)


def test_easy_tasks_fit_for_every_length():
    names = task_names(["recall", "fuzzy-recall", "noisy-recall", "copying", "compression", "memorization"])
    assert names == list(TASKS) and task_names(TASKS) == names
    for length in range(14, 80, 2):
        for name in names:
            task = EasySettings(seq_len=length).task(name, 1)
            assert task.name == name and task.seed == 1
    assert EasySettings().task("copying", 0).tokens_to_copy == 8
    assert EasySettings().task("compression", 0).seq_len == 16
    assert EasySettings().task("memorization", 0).num_train == 256
    with pytest.raises(ManticoreError, match="hidden_size=0 must be a whole number from 1 on"):
        EasySettings(hidden_size=0)
    with pytest.raises(ManticoreError, match="seed=4294967295 and the 1 after it must be below"):
        EasySettings(seed=2**32 - 1, seeds=2)
    with pytest.raises(ManticoreError, match="seed=-1 must be a whole number from 0 on"):
        EasySettings(seed=-1)


def test_the_command_has_the_defaults_of_the_settings(monkeypatch):
    given = []
    monkeypatch.setattr(profile, "mad_profile", lambda *args: given.append(args))
    assert main(["mad-profile", "llama, org/x", "--output-dir", "out"]) == 0
    assert given == [(["llama", "org/x"], "out", None, EasySettings())]
