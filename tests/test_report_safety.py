"""A report on a directory that was downloaded reads what is in it and what its reader names, nothing else."""

import os
import shutil

import pytest
from tiny_hybrid import mixed_hybrid, save

from manticore_hf import ManticoreError
from manticore_hf.report.facts import gather, held_out
from manticore_hf.training import recipe as recipes

pytestmark = pytest.mark.usefixtures("uncounted")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(mixed_hybrid(num_blocks=1), tmp_path_factory.mktemp("saved") / "hybrid")


@pytest.fixture
def theirs(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "theirs")
    for name in ("private.txt", "theirs/text.txt"):
        (tmp_path / name).write_text("the cat sat")
    return tmp_path / "theirs"


def recipe(folder, data, own=None):
    text = f"components: [a, b]\ndata: {{data: {data}}}\nstages:\n- finetune: {{data: {own or {}}}}\n"
    (folder / "recipe.yaml").write_text(text)
    return text


def test_text_outside_is_read_only_if_its_reader_says_so(theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    private = tmp_path / "private.txt"
    for source in (private, "../private.txt", "private.txt"):
        for own in ({}, {"data": str(source)}):
            recipe(theirs, "text.txt" if own else source, own)
            with pytest.raises(ManticoreError, match="--allow-outside.*--data FILE"):
                held_out(gather(theirs))
            settings, split = held_out(gather(theirs), allow_outside=True)
            assert os.path.samefile(settings.data, private) and split
            settings, split = held_out(gather(theirs), private)
            assert settings.data == str(private) and not split
    for source in ("text.txt", theirs / "text.txt"):
        recipe(theirs, source)
        assert os.path.samefile(held_out(gather(theirs))[0].data, theirs / "text.txt")
    recipe(theirs, "org/texts")
    assert held_out(gather(theirs))[0].data == "org/texts"


def test_a_recipe_that_was_run_here_names_what_its_person_named(theirs, tmp_path):
    text = recipe(theirs, "private.txt")
    assert held_out(gather(theirs))[0].data == "private.txt"  # nothing of that name is here
    recipes.remember_recipe(text, tmp_path)  # as `run_recipe` does
    assert os.path.samefile(held_out(gather(theirs))[0].data, tmp_path / "private.txt")
    text = recipe(theirs, tmp_path / "private.txt")  # another text is another recipe
    (tmp_path / "home").mkdir()
    for run in (None, False, True):  # what a run was not allowed, its report is not
        if run is not None:
            recipes.remember_recipe(text, tmp_path / "home", allow_outside=run)
        if run:
            assert os.path.samefile(held_out(gather(theirs))[0].data, tmp_path / "private.txt")
        else:
            with pytest.raises(ManticoreError, match="--allow-outside"):
                held_out(gather(theirs))


def test_of_several_folders_that_a_recipe_was_run_from_the_one_above_counts(theirs, tmp_path):
    """Two demos have one recipe, word for word, and each its own text."""
    text = recipe(theirs, "private.txt")
    other = tmp_path / "other"
    other.mkdir()
    (other / "private.txt").write_text("another text")
    for folder in (tmp_path, other, tmp_path, other):  # the last is not above
        recipes.remember_recipe(text, folder)
    assert os.path.samefile(held_out(gather(theirs))[0].data, tmp_path / "private.txt")
    copy = shutil.copytree(theirs, other / "copied")
    assert os.path.samefile(held_out(gather(copy))[0].data, other / "private.txt")


def test_links_that_leave_the_directory_are_not_followed(theirs, tmp_path):
    (tmp_path / "secret.json").write_text('{"losses": {"hybrid": 1, "secret": 2}}')
    for name in ("evaluation.json", "stage.json", "recipe.yaml", "comparison.json", "README.md"):
        (theirs / name).symlink_to(tmp_path / "secret.json")
        with pytest.raises(ManticoreError, match=f"{name} in .* is a link to .*secret.json', which is not in"):
            gather(theirs)
        (theirs / name).unlink()
    for name in ("checkpoint-3/trainer_state.json", "compared/comparison.json"):
        (theirs / name).parent.mkdir()
        (theirs / name).symlink_to(tmp_path / "secret.json")
        with pytest.raises(ManticoreError, match=f"{name} in .* is a link to .*secret.json', which is not in"):
            gather(theirs)
        shutil.rmtree((theirs / name).parent)
    for name in ("comparison.json", "compared/comparison.json"):  # one level up
        (tmp_path / "compared").mkdir(exist_ok=True)
        (tmp_path / name).symlink_to("/etc/hostname")
        with pytest.raises(ManticoreError, match=f"{name} in .* is a link to '/etc/hostname', which is not in"):
            gather(theirs)
        (tmp_path / name).unlink()
    (theirs / "evaluation.json").symlink_to("text.json")
    (theirs / "text.json").write_text('{"losses": {"hybrid": 1, "other": 2}}')
    assert gather(theirs).results[0].losses == {"hybrid": 1.0, "other": 2.0}


def test_folders_that_are_links_are_not_followed(theirs, tmp_path, monkeypatch):
    """The stages of a run, and a folder of text that the recipe names in full."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(theirs, run / "0-compose")
    (run / "0-compose" / "stage.json").write_text('{"stage": "compose"}')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stage.json").write_text('{"stage": "finetune", "note": "private"}')
    assert len(gather(run).stages) == 1
    (run / "1-finetune").symlink_to(tmp_path / "mine")
    with pytest.raises(ManticoreError, match="1-finetune in .* is a link to .*mine', which is not in the directory"):
        gather(run)
    (tmp_path / "link").symlink_to(theirs)  # what the person names may be one
    assert gather(tmp_path / "link").folder == tmp_path / "link"
    (theirs / "texts").mkdir()
    (theirs / "texts" / "a.txt").symlink_to(tmp_path / "private.txt")
    recipe(theirs, theirs / "texts")
    with pytest.raises(ManticoreError, match="--allow-outside"):
        held_out(gather(theirs))
