"""Modules and names of version 0.1: what people have typed goes on working for one release, with a warning."""

import importlib
import sys

import pytest
from manticore_hf.modeling.settings_manticore import ManticoreError

import manticore_hf
from manticore_hf.cli import main, parser_of
from manticore_hf.old_modules import OLD_MODULES
from manticore_hf.training import distill, prune
from manticore_hf.training.recipe import load_recipe
from manticore_hf.training.stage_arguments import CalibrateArguments, PruneArguments, StageArguments


@pytest.mark.parametrize("old", sorted(OLD_MODULES))
def test_old_names_give_the_very_module_and_warn(old):
    if old.startswith("metrics."):
        pytest.importorskip("evaluate")
    new = importlib.import_module(f"manticore_hf.{OLD_MODULES[old]}")
    for part in (old, old.split(".")[0]):
        sys.modules.pop(f"manticore_hf.{part}", None)
    with pytest.warns(FutureWarning, match=rf"manticore_hf\.{OLD_MODULES[old]}\b"):
        assert importlib.import_module(f"manticore_hf.{old}") is new
    assert new.__name__ == f"manticore_hf.{OLD_MODULES[old]}" == new.__spec__.name


def test_other_names_are_still_not_there():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("manticore_hf.nothing")
    with pytest.raises(AttributeError):
        manticore_hf.nothing  # noqa: B018


def test_settings_of_stages_are_taken_under_their_old_names(tmp_path):
    for cls, old, new in (
        (CalibrateArguments, "reference", "reference_component"),
        (CalibrateArguments, "calibration_dtype", "dtype"),
        (StageArguments, "train_dtype", "dtype"),
        (PruneArguments, "train_dtype", "dtype"),
    ):
        with pytest.warns(FutureWarning, match=f"{cls.__name__}: {old} is now {new};") as seen:
            assert cls(model="m", **{old: "x"}) == cls(model="m", **{new: "x"}) != cls(model="m")
        assert seen[0].filename == __file__
        with pytest.raises(ManticoreError, match=f"{cls.__name__}: {new}='y' and, by its old name, {old}='x' are"):
            cls(model="m", **{old: "x", new: "y"})
        with pytest.warns(FutureWarning):
            assert cls(model="m", **{old: "x", new: "x"}) == cls(model="m", **{new: "x"})
    with pytest.raises(TypeError, match="train_dtype"):
        CalibrateArguments(model="m", train_dtype="float32")
    recipe = tmp_path / "recipe.yaml"
    text = (
        "components: [a/b]\ndata: {data: t}\nstages:\n- calibrate: {reference: b, calibration_dtype: bfloat16}\n"
        "- finetune: {bf16: true, train_dtype: bfloat16}\n- prune: {train_dtype: bfloat16}\n"
    )
    recipe.write_text(text)
    with pytest.warns(FutureWarning) as seen:
        stages = load_recipe(recipe).stages
    assert stages == [
        ("calibrate", {"reference_component": "b", "dtype": "bfloat16"}),
        ("finetune", {"bf16": True, "dtype": "bfloat16"}),
        ("prune", {"dtype": "bfloat16"}),
    ]
    assert "stages: calibrate: reference is now reference_component; the old name" in str(seen[0].message)
    recipe.write_text(text.replace("{train_dtype: bfloat16}", "{train_dtype: bfloat16, dtype: float32}"))
    with pytest.warns(FutureWarning), pytest.raises(ManticoreError, match="yaml:6: stages.2.prune.train_dtype: is"):
        load_recipe(recipe)
    recipe.write_text(text.replace("train_dtype", "calibration_dtype"))  # of another stage
    with pytest.warns(FutureWarning), pytest.raises(ManticoreError, match="finetune.calibration_dtype: unknown key"):
        load_recipe(recipe)


def test_what_hardened_and_healed_prunes_and_distils(tmp_path, monkeypatch):
    found = {
        ("manticore_hf", "harden"): prune.prune,
        ("manticore_hf.training.prune", "harden"): prune.prune,
        ("manticore_hf", "pick_route"): prune.pick_path,
        ("manticore_hf.training.prune", "pick_route"): prune.pick_path,
        ("manticore_hf.training.distill", "HealTrainer"): distill.DistilTrainer,
        ("manticore_hf.training.distill", "run_harden"): distill.run_prune,
    }
    for (module, old), new in found.items():
        with pytest.warns(FutureWarning, match=f"{module}.{old} is now {new.__name__}"):
            assert getattr(importlib.import_module(module), old) is new
    with pytest.warns(FutureWarning, match="Choice.route is now path"):
        assert prune.Choice(["a", "b"], 1.0, {}).route == ["a", "b"]
    with pytest.warns(FutureWarning, match="prune: route is now path"), pytest.raises(AttributeError):
        prune.prune(None, route="alpha")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("components: [a/b]\ndata: {data: t}\nstages: [finetune, {harden: {route: alpha}}]\n")
    with pytest.warns(FutureWarning, match="harden is now prune"):
        assert load_recipe(recipe).stages == [("finetune", {}), ("prune", {"path": "alpha"})]
    with pytest.warns(FutureWarning, match="--harden is now --prune"):
        assert parser_of("compare").parse_args("r.yaml --output-dir o --test t --harden".split()).prune is True
    started = []
    monkeypatch.setattr("manticore_hf.training.stage_command.main", lambda args: started.append(args.stage.name))
    with pytest.warns(FutureWarning, match="manticore-hf harden is now prune"):
        assert main("harden --model me/m --data d --output-dir".split() + [str(tmp_path / "hard")]) == 0
    assert started == ["prune"]


def test_old_names_leave_the_new_ones_where_they_are():
    for old in OLD_MODULES:
        sys.modules.pop(f"manticore_hf.{old}", None)
    with pytest.warns(FutureWarning, match="manticore_hf.tasks.mad is now manticore_hf.experiments.mad;"):
        from manticore_hf.tasks.mad import generate
    assert generate is importlib.import_module("manticore_hf.experiments.mad.tasks").generate
    experiments = importlib.import_module("manticore_hf.experiments")
    assert experiments.mad is importlib.import_module("manticore_hf.experiments.mad")
