"""An alpha that is programmed with MAD: how it comes about, that it arrives in the hybrid, and that it stays there."""

import json

import pytest
import torch
from processes import launch
from tiny_hybrid import pair, save_pair

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.experiments import TASKS, ProgramSettings, hybrid_from_scratch, mad_profile, program_alpha
from manticore_hf.experiments.mad import program
from manticore_hf.experiments.mad.easy import EasySettings
from manticore_hf.experiments.mad.program import mixture_tasks
from manticore_hf.training.freezing import fix_alpha
from manticore_hf.training.recipe import load_recipe, run_recipe
from manticore_hf.training.search import STRATEGIES

SIZES = {"seq_len": 16, "num_train": 24, "num_test": 8, "hidden_size": 32, "steps": 3, "batch_size": 8}
TINY = ProgramSettings(**SIZES, alpha_learning_rate=0.5)
PAIR = ["gpt_neox", "mamba"]


@pytest.fixture
def searched(monkeypatch):
    """The classes of the models that are searched, as they are."""
    names, train = [], program.SearchTrainer.train

    def counted(self):
        names.append(type(self.model).__name__)
        return train(self)

    monkeypatch.setattr(program.SearchTrainer, "train", counted)
    return names


def test_alpha_is_the_mean_over_tasks_of_the_means_over_seeds(tmp_path):
    """Read from the files of the runs, and added up in float64."""
    settings = ProgramSettings(**SIZES, alpha_learning_rate=0.5, seeds=2)
    found = program_alpha(PAIR, ["recall", "compression"], 2, tmp_path, settings, quiet=True)
    alphas = {}
    for file in tmp_path.glob("*.json"):
        run = json.loads(file.read_text())
        alphas.setdefault(run["task"]["name"], {})[run["seed"]] = run["alpha"]
    assert sorted(alphas) == ["compression", "in-context-recall"]
    expected = [[0.0, 0.0], [0.0, 0.0]]
    for block in range(2):
        for k in range(2):
            of_tasks = [(alphas[name][0][block][k] + alphas[name][1][block][k]) / 2 for name in found.tasks]
            assert [row[block][k].item() for row in found.tasks.values()] == of_tasks
            expected[block][k] = sum(of_tasks) / 2
    assert found.alpha.dtype == torch.float32
    assert torch.equal(found.alpha, torch.tensor(expected, dtype=torch.float64).float())
    different = [tuple(alpha[0]) for seeds in alphas.values() for alpha in seeds.values()]
    assert len(set(different)) == 4 and (found.alpha - 0.5).abs().min() > 1e-3, "the mean of equals would show nothing"

    model = ManticoreForCausalLM.from_components(pair(), num_blocks=2, mixture="static")
    model.set_mixture_weights(found.alpha)
    assert torch.equal(model.mixture_weights(), found.alpha)
    assert torch.equal(fix_alpha(model).mixture_weights(), found.alpha)  # as finetune does
    assert model.config.mixture_weights == found.alpha.double().tolist()


@pytest.mark.parametrize(
    "name,preset", [*((name, "paper") for name in TASKS if name != "compression"), ("compression", "default")]
)
def test_every_task_moves_alpha(name, preset, tmp_path, capfd):
    settings = ProgramSettings(**SIZES, alpha_learning_rate=0.5, preset=preset)
    found = program_alpha(PAIR, [name], 1, tmp_path, settings, quiet=True)
    assert (found.alpha - 0.5).abs().max() > 1e-3
    torch.testing.assert_close(found.alpha.sum(-1), torch.ones(1))
    (run,) = found.runs
    assert run["task"]["name"] == name and 0 <= run["accuracy"] <= 1 and run["chance"] > 0
    assert not capfd.readouterr().out  # quiet


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_searches(strategy, tmp_path, monkeypatch):
    used, train = [], program.SearchTrainer.train
    monkeypatch.setattr(program.SearchTrainer, "train", lambda self: used.append(type(self.strategy)) or train(self))
    settings = ProgramSettings(**SIZES, strategy=strategy, alpha_learning_rate=0.5)
    found = program_alpha(PAIR, ["compression"], 1, tmp_path, settings, quiet=True)
    assert used == [STRATEGIES[strategy]]
    assert (found.alpha - 0.5).abs().max() > 1e-4


def test_the_small_hybrid_is_of_the_papers_kind_and_starts_from_its_seed(tmp_path, monkeypatch):
    seen, train = [], program.SearchTrainer.train

    def spy(self):
        seen.append((self.model.config, {key: value.clone() for key, value in self.model.state_dict().items()}))
        return train(self)

    monkeypatch.setattr(program.SearchTrainer, "train", spy)
    program_alpha(["mamba", "llama", "mamba"], ["recall"], 3, tmp_path, ProgramSettings(**SIZES, seed=5), quiet=True)
    ((config, state),) = seen
    assert config.component_names == ["mamba_1", "llama", "mamba_2"] and config.num_blocks == 3
    assert (config.gate, config.mixture, config.embeddings) == ("alpha", "static", "mixed")
    assert config.llama.num_hidden_layers == 3  # a block each
    expected = hybrid_from_scratch(["mamba", "llama", "mamba"], 16, 3, 32, 17, seed=5, preset="paper", num_blocks=3)
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def test_what_is_finished_is_not_searched_again(tmp_path, searched):
    def go(tasks, settings=TINY):
        searched.clear()
        return program_alpha(PAIR, tasks, 1, tmp_path, settings, quiet=True).alpha, len(searched)

    first, runs = go(["recall", "compression"])
    assert runs == 2 and searched == ["ManticoreForCausalLM", "CompressionModel"]
    again, runs = go(["recall", "compression"])
    assert runs == 0 and torch.equal(first, again)
    # Killed in the middle of a run: that one has no file, and comes out the same
    next(tmp_path.glob("compression-*.json")).unlink()
    again, runs = go(["recall", "compression"])
    assert runs == 1 and searched == ["CompressionModel"] and torch.equal(first, again)
    # Another setting is another run, one seed more is one run more
    assert go(["recall"], ProgramSettings(**SIZES, alpha_learning_rate=0.4))[1] == 1
    assert go(["recall"], ProgramSettings(**SIZES, alpha_learning_rate=0.5, seeds=2))[1] == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "families,tasks,blocks,settings,message",
    [
        (PAIR, ["recal"], 1, {}, "there is no MAD task 'recal'; known are .'recall', 'fuzzy-recall', "),
        (PAIR, [], 1, {}, "no MAD task is named"),
        (PAIR, ["recall", "in-context-recall"], 1, {}, "named twice"),
        (["gpt_neox", "own_family"], ["recall"], 1, {}, "every component's family: model='own_family' is not a model"),
        (PAIR, ["recall"], 3, {"layers": 2}, "layers=2 of the small hybrids are fewer than the 3 blocks"),
        (PAIR, ["recall"], 1, {"hidden_size": 70}, "hidden_size=70 cannot be cut into heads"),
        (PAIR, ["recall"], 1, {"strategy": "best"}, "strategy='best' is unknown; choose one of"),
        (PAIR, ["recall"], 1, {"preset": "papier"}, "preset='papier' is unknown"),
        (PAIR, ["recall"], 1, {"steps": 0}, "steps=0 must be a whole number from 1 on"),
        (PAIR, ["recall"], 1, {"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        (PAIR, ["recall"], 1, {"alpha_learning_rate": -1.0}, "alpha_learning_rate=-1.0 must be positive"),
    ],
)
def test_what_cannot_be_programmed_is_refused(tmp_path, searched, families, tasks, blocks, settings, message):
    with pytest.raises(ManticoreError, match=message):
        program_alpha(families, tasks, blocks, tmp_path / "out", ProgramSettings(**settings), quiet=True)
    assert not searched and not (tmp_path / "out").exists()


def test_mixtures_name_their_tasks():
    assert mixture_tasks("mad:recall+copying") == ["in-context-recall", "selective-copying"]
    assert mixture_tasks("mad: noisy-recall + memorization ") == ["noisy-in-context-recall", "memorization"]
    assert mixture_tasks("mad:fuzzy-recall+compression") == ["fuzzy-in-context-recall", "compression"]
    assert [mixture_tasks(other) for other in ("static", "token", None, 3, ["mad:recall"], "madness")] == [None] * 6


HEAD = "components: [a/b, c/d]\ndata: {data: t}\n"


@pytest.mark.parametrize(
    "text,message",
    [
        ("{mixture: mad:recal}", "3: hybrid.mixture: is 'mad:recal': there is no MAD task 'recal'; known are"),
        ("{mixture: mad}", "3: hybrid.mixture: is 'mad': no MAD task is named; known are"),
        ("{mixture: 'mad:'}", "3: hybrid.mixture: is 'mad:': no MAD task is named"),
        ("\n  num_blocks: 2\n  mixture: mad:copying+copying", "5: hybrid.mixture: .* is named twice"),
        (f"{{mixture: mad:{'recall+' * 1200}}}", "3: hybrid.mixture: is 'mad:recall.recall.*characters"),
        ("{mixture: mad:recall}\nstages:\n  - search: {}", "5: stages.0: search would move the alpha that"),
        ("{mixture: mad:recall}\nstages:\n  - finetune\n  - pretrain: {}", "6: stages.1: pretrain has nothing to"),
        ("{mixture: mad:recall, mixture_weights: [[1, 0]]}", "3: hybrid.mixture_weights: are given, and mixture is"),
        ("{mixture: token}\nprogram:\n  steps: 3", "4: program: is for a mixture that is programmed"),
        ("{mixture: mad:recall}\nprogram:\n  step: 3", r"5: program.step: unknown key \(value 3\)"),
        ("{mixture: mad:recall}\nprogram:\n  steps: 1.5", "5: program.steps: is 1.5, must be int"),
        ("{mixture: mad:recall}\nprogram: {steps: 0}", "4: program.steps: is 0, must be at least 1"),
        ("{mixture: mad:recall}\nprogram: {strategy: best}", "4: program: strategy='best' is unknown; choose one of"),
        ("{mixture: mad:recall}\nprogram: {seq_len: 7}", "4: program: .*seq_len=7 must be even"),
        ("{mixture: mad:recall, num_blocks: 5}\nprogram: {layers: 4}", "4: program: layers=4 of the small hybrids"),
        ("{mixture: mad:recall}\nprogram: 3", "4: program: is 3, must be a mapping"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(f"{HEAD}hybrid: {text}")
    with pytest.raises(ManticoreError, match=f"x.yaml:{message}") as caught:
        load_recipe(file)
    assert len(str(caught.value)) < 1000


def test_recipes_that_can_be_programmed_are_read(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        f"{HEAD}hybrid: {{mixture: mad:recall+copying, num_blocks: 2}}\nprogram: {{learning_rate: 1e-3}}\n"
        "stages: [calibrate, pretrain, finetune, prune]\n"
    )
    recipe = load_recipe(file)
    assert recipe.hybrid["mixture"] == "mad:recall+copying" and recipe.program == {"learning_rate": 1e-3}
    file.write_text(HEAD + "hybrid: {mixture: mad:recall, embeddings: mixed}\nstages: [pretrain]\n")
    assert load_recipe(file).program == {}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("parts"), 2000)


RECIPE = """
seed: 4
components: [{parts}/neox, {parts}/mamba]
hybrid: {{num_blocks: {blocks}, mixture: "mad:{tasks}"}}
program: {{seq_len: 16, num_train: 24, num_test: 8, hidden_size: 32, steps: 3, batch_size: 8, alpha_learning_rate: 0.5}}
data: {{data: {parts}/text.txt, block_size: 16}}
stages:
"""
FINETUNE = "  - finetune: {max_steps: 2, learning_rate: 0.01, save_strategy: 'no'}\n"
ALL = f"  - calibrate: {{tokens: 1000}}\n{FINETUNE.replace('finetune', 'pretrain')}{FINETUNE}"
ALL += "  - prune: {path: alpha, max_steps: 1, save_strategy: 'no'}\n"


@pytest.mark.parametrize("blocks,tasks,stages", [(2, ["recall", "compression"], ALL), (1, ["copying"], FINETUNE)])
def test_a_run_ends_with_the_alpha_that_was_programmed(parts, tmp_path, capsys, searched, blocks, tasks, stages):
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.format(parts=parts, blocks=blocks, tasks="+".join(tasks)) + stages)
    results = run_recipe(recipe, out, allow_outside=True)
    assert len(searched) == len(tasks)
    printed = capsys.readouterr().out
    settings = ProgramSettings(**SIZES, alpha_learning_rate=0.5, seed=4)
    found = program_alpha(PAIR, tasks, blocks, out / "0-program", settings, quiet=True)
    expected = found.alpha
    assert len(searched) == len(tasks) and (expected - 0.5).abs().min() > 1e-3

    trained = {}
    for folder, result in results:
        model = ManticoreForCausalLM.from_pretrained(folder)
        assert model.config.mixture == "static"
        if result["stage"] == "prune":
            assert model.config.route == [model.config.component_names[k] for k in expected.argmax(-1)]
        else:
            assert model.config.mixture_weights == expected.double().tolist(), result["stage"]
            assert torch.equal(model.mixture_weights(), expected)
            trained[result["stage"]] = model.mamba.backbone.layers[0].mixer.in_proj.weight
    assert not torch.equal(trained["compose"], trained["finetune"])

    composed = json.loads((out / "0-compose" / "stage.json").read_text())
    assert composed["mixture_weights"] == expected.tolist() and composed["program"] == found.record()
    assert [one["alpha"] for one in composed["program"].values()] == [one.tolist() for one in found.tasks.values()]
    row = printed.split("programmed mixture weights")[1].split("mean ")[1].split()
    assert row[:3] == ["1", f"{expected[0, 0]:.3f}", f"{expected[0, 1]:.3f}"]

    searched.clear()
    assert [result for _, result in run_recipe(recipe, out, allow_outside=True)] == [result for _, result in results]
    assert not searched and "programmed mixture weights" in capsys.readouterr().out
    # Killed in the last search: the others are read
    (out / "0-compose" / "stage.json").unlink()
    next((out / "0-program").glob(f"{list(found.tasks)[-1]}-*.json")).unlink()
    assert run_recipe(recipe, out, allow_outside=True)[0][1] == results[0][1] and len(searched) == 1


@pytest.mark.slow
def test_two_processes_program_what_one_programs(parts, tmp_path):
    """The small searches run in a process of their own."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(parts=parts, blocks=1, tasks="copying") + FINETUNE)
    (_, alone), _ = run_recipe(recipe, tmp_path / "one", allow_outside=True)
    printed = launch(["-m", "manticore_hf.cli", "run", recipe, "--allow-outside", "--output-dir", tmp_path / "two"])
    assert printed.count("searching alpha of gpt_neox + mamba") == 1, "only one process searches"
    found = json.loads((tmp_path / "two" / "0-compose" / "stage.json").read_text())
    assert found["mixture_weights"] == [pytest.approx(row, abs=1e-6) for row in alone["mixture_weights"]]
    model = ManticoreForCausalLM.from_pretrained(tmp_path / "two" / "1-finetune")
    assert model.mixture_weights().tolist() == found["mixture_weights"]


def test_a_search_apart_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "world", lambda: (0, 2))
    monkeypatch.setattr(program.sys, "executable", "false")
    with pytest.raises(ManticoreError, match="Programming selective-copying failed in its own process .exit status 1"):
        program_alpha(PAIR, ["copying"], 1, tmp_path, TINY, quiet=True)


def test_compose_alone_names_the_recipe(parts, tmp_path, capsys):
    arguments = ["compose", str(parts / "neox"), str(parts / "mamba"), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--mixture", "mad:recall"]) == 2
    assert "mixture='mad:recall' is programmed by a recipe: write it under `hybrid:`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ManticoreError, match="mixture='mad:recall' is unknown"):
        ManticoreForCausalLM.from_components(pair(), mixture="mad:recall")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a busy machine
@pytest.mark.parametrize("families", [PAIR, PAIR[::-1]], ids="-".join)
def test_alpha_goes_to_the_family_that_solves_the_task(families, tmp_path):
    """In-context recall: within these steps the Mamba learns it, and attention without a convolution does not."""
    task = {"seq_len": 16, "num_test": 160}
    alone = mad_profile(families, tmp_path / "alone", ["recall"], EasySettings(steps=480, **task), quiet=True)
    scores = {name: found["in-context-recall"] for name, found in alone["accuracy"].items()}
    assert scores["mamba"] > 0.9 and scores["gpt_neox"] < 0.5, scores
    found = program_alpha(families, ["recall"], 1, tmp_path, ProgramSettings(**task), quiet=True)
    assert found.alpha[0, families.index("mamba")] > 0.8, found.alpha
    assert found.runs[0]["accuracy"] > 0.9
