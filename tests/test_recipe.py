"""Recipes: the shipped ones validate, a run skips what is finished, and mistakes are named with their line."""

from pathlib import Path

import pytest
import torch
from tiny_hybrid import save_pair

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.training.recipe import load_recipe, run_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_validate(path):
    recipe = load_recipe(path)
    assert len(recipe.components) >= 2 and recipe.stages


def _write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text,message",
    [
        ("components: [a/b]\nsteges: []\n", r"x.yaml:2: steges: unknown key"),
        ("name: x\ncomponents: []\n", r"x.yaml:2: components: names no component"),
        ("components: [a/b, 3]\n", r"x.yaml:1: components.1: is 3"),
        ("components: a/b\n", r"x.yaml:1: components: is 'a/b', must be a list"),
        ("components: [a/b]\nhybrid:\n  num_block: 2\n", r"x.yaml:3: hybrid.num_block: unknown key \(value 2\)"),
        ("components: [a/b]\ndata: {data: t}\nstages:\n  - serch: {}\n", r"x.yaml:4: stages.0: stage .serch. is unkn"),
        (
            "components: [a/b]\ndata: {data: t}\nstages:\n  - finetune:\n      lerning_rate: 1\n",
            r"x.yaml:5: stages.0.finetune.lerning_rate: unknown key",
        ),
        ("components: [a/b]\nstages: [finetune]\n", r"data: has no key 'data'"),
        ("components: [a/b]\nstages:\n  - search: {data: {data: t}}\n  - finetune: {}\n", r"data: has no key 'data'"),
        (
            "components: [a/b]\nstages:\n  - search:\n      data: {data: t, blocksize: 3}\n",
            r"x.yaml:4: stages.0.search.data.blocksize: unknown key",
        ),
        ("components: [a/b]\nstages:\n  - search:\n      data: t\n", r"x.yaml:4: stages.0.search.data: is 't', must"),
        ("components: [a/b]\nseed: abc\n", r"x.yaml:2: seed: is 'abc'"),
        ("components: [a/b]\ndata:\n  data: t\n  block_size: big\n", r"x.yaml:4: data.block_size: is 'big', must be"),
        (
            "components: [a/b]\ndata: {data: t}\nstages:\n  - finetune:\n      learning_rate: fast\n",
            r"x.yaml:5: stages.0.finetune.learning_rate: is 'fast', must be float",
        ),
        (
            "components: [a/b]\ndata: {data: t}\nstages:\n  - finetune:\n      max_steps: 1.5\n",
            r"x.yaml:5: stages.0.finetune.max_steps: is 1.5, must be int",
        ),
        (
            "components: [a/b]\ndata: {data: t}\nstages:\n  - search: {strategy: best}\n",
            r"x.yaml:4: stages.0.search.strategy: is 'best'; choose one of",
        ),
        ("components: [a\n", r"is not valid YAML"),
        ("- a\n", r"must be a mapping"),
        ("components: !!python/object/apply:os.system ['true']\n", r"is not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ManticoreError, match=message):
        load_recipe(_write(tmp_path / "x.yaml", text))


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    text = "components: [a/b]\ndata: {data: t}\nstages:\n  - finetune: {learning_rate: 2e-4}\n"
    assert load_recipe(_write(tmp_path / "x.yaml", text)).stages == [("finetune", {"learning_rate": 2e-4})]


def test_a_missing_recipe(tmp_path):
    with pytest.raises(ManticoreError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("parts"), 3000)


def test_a_run_writes_every_stage_and_skips_what_is_finished(parts, tmp_path, capsys):
    text = f"""
name: tiny
components: [{parts / "neox"}, {parts / "mamba"}]
hybrid: {{num_blocks: 2, mixture: static}}
data: {{data: {parts / "text.txt"}, block_size: 16}}
stages:
  - calibrate: {{tokens: 1000, per_device_train_batch_size: 4}}
  - pretrain: {{max_steps: 2, learning_rate: 0.01, save_strategy: "no"}}
  - search: {{max_steps: 3, strategy: gaea, alpha_learning_rate: 0.5, save_strategy: "no"}}
  - finetune: {{max_steps: 2, save_strategy: "no", data: {{validation_fraction: 0.0}}}}
  - prune: {{path: loss, max_steps: 2, save_strategy: "no", data: {{data: {parts / "text.txt"}, block_size: 8}}}}
"""
    recipe = _write(tmp_path / "tiny.yaml", text)
    results = run_recipe(recipe, tmp_path / "out", allow_outside=True)
    assert [folder.name for folder, _ in results] == [
        "0-compose",
        "1-calibrate",
        "2-pretrain",
        "3-search",
        "4-finetune",
        "5-prune",
    ]
    for folder, result in results:
        assert ManticoreForCausalLM.from_pretrained(folder).config.num_blocks == 2
        assert result["stage"] == folder.name.split("-")[1]
    searched, tuned = (ManticoreForCausalLM.from_pretrained(results[i][0]) for i in (3, 4))
    torch.testing.assert_close(tuned.mixture_weights(), searched.mixture_weights())
    assert "losses" in results[3][1] and "losses" not in results[4][1]  # each has the data of its own
    assert ManticoreForCausalLM.from_pretrained(results[5][0]).config.route == results[5][1]["path"]
    assert (results[4][0] / "recipe.yaml").read_text() == text
    capsys.readouterr()
    again = run_recipe(recipe, tmp_path / "out", allow_outside=True)
    assert [result for _, result in again] == [result for _, result in results]
    assert capsys.readouterr().out.count("this stage is finished") == 6
    other = _write(tmp_path / "other.yaml", text.replace("max_steps: 3", "max_steps: 4"))
    with pytest.raises(ManticoreError, match="stages of another recipe"):
        run_recipe(other, tmp_path / "out")
