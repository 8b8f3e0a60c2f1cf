"""`push --code-only`: a published repository's code is brought up to this version, and nothing else is touched."""

import json
from pathlib import Path
from types import SimpleNamespace

import published
import pytest
from hub_models import assert_same_model
from huggingface_hub import HfApi
from manticore_hf.modeling import base_manticore
from manticore_hf.modeling.bounds_manticore import TESTED

from manticore_hf import ManticoreConfig, ManticoreError, ManticoreForCausalLM, publish
from manticore_hf.cli import main
from manticore_hf.hub.code_only import code_update, commit_update, push_code
from manticore_hf.utils.carried import copy_code

parts, saved = published.parts, published.saved
ROOT = Path(__file__).parent.parent


@pytest.fixture
def older(saved, hub, owner):
    """A published hybrid whose code is another version's: a file more, one less, one other; and its files."""
    repo_id = f"{owner}/h"
    publish(saved[1], repo_id)
    api = HfApi()
    config = json.loads(hub.files(repo_id)["config.json"])
    config["auto_map"]["AutoModel"] = "old_manticore.Model"
    for name, data in (
        ("old_manticore.py", b"gone = 1\n"),
        ("modeling_manticore.py", b"# another version\n"),
        ("config.json", json.dumps(config, indent=2, sort_keys=True).encode()),
    ):
        api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=repo_id)
    api.delete_file("scan_manticore.py", repo_id=repo_id)
    return repo_id, hub.files(repo_id)


def ours(folder, files):
    """The code that this version writes for a repository of these files."""
    folder.mkdir()
    copy_code(folder, ManticoreConfig.from_dict(json.loads(files["config.json"])))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_code_is_brought_up_to_date_and_weights_are_untouched(older, saved, hub, tmp_path, capsys):
    repo_id, before = older
    assert main(["push", repo_id, "--code-only", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "-# another version" in shown and "+++ b/scan_manticore.py" in shown and "-gone = 1" in shown
    assert '-    "AutoModel": "old_manticore.Model",' in shown and "Dry run" in shown
    assert hub.files(repo_id) == before
    hub.clear_requests()
    assert main(["push", repo_id, "--code-only", "--yes"]) == 0
    assert not any(path.endswith(".safetensors") for _, path in hub.requests)
    after = hub.files(repo_id)
    code = ours(tmp_path / "code", after)
    assert {name: data for name, data in after.items() if name.endswith(".py")} == code
    others = {name for name in {*before, *after} if not name.endswith(".py")} - {"config.json"}
    assert all(before[name] == after[name] for name in others) and "model.safetensors" in others
    assert json.loads(after["config.json"]) == json.loads((saved[1] / "config.json").read_text())
    assert [one.title for one in HfApi().list_repo_commits(repo_id)][0].startswith("Bring the code up to manticore-hf")
    assert_same_model(ManticoreForCausalLM.from_pretrained(repo_id), saved[0])
    capsys.readouterr()
    assert main(["push", repo_id, "--code-only"]) == 0  # nothing to ask
    assert "already" in capsys.readouterr().out and hub.files(repo_id) == after


def test_nothing_is_committed_without_an_answer(older, hub, capsys, monkeypatch):
    repo_id, before = older
    assert main(["push", repo_id, "--code-only"]) == 2 and "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer in ("", "n", "later"):
        assert push_code(repo_id, ask=lambda _, answer=answer: answer).commit is None
    assert hub.files(repo_id) == before
    made = push_code(repo_id, create_pr=True, ask=lambda _: "y")
    assert "discussions" in made.url and hub.files(repo_id) == before
    assert push_code(repo_id, ask=lambda _: " Y ").commit == hub.head(repo_id)


def test_nobody_is_overtaken(older, hub):
    repo_id, _ = older
    update = code_update(repo_id)
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="notes.md", repo_id=repo_id)
    with pytest.raises(ManticoreError, match="by someone else"):
        commit_update(update)


def test_what_it_is_not_for(hub, owner, parts, capsys):
    for repo_id, said in ((parts[0], "not a hybrid"), (f"{owner}/x", "not on the Hub"), ("a b", "not a repository id")):
        with pytest.raises(ManticoreError, match=said):
            code_update(repo_id)
    assert main(["push", "me/dir", "you/h", "--code-only"]) == 2
    assert "takes the repository alone" in capsys.readouterr().err
    assert main(["push", "me/dir"]) == 2 and "Say where to publish" in capsys.readouterr().err


def test_the_last_hybrids_of_0_1_are_brought_up_to_date(hub, owner, tmp_path):
    """Their config.json names the same classes; what was saved is read, and its weights stay."""
    for folder in sorted(
        one for one in (ROOT / "tests" / "published_0_1").iterdir() if (one / "config.json").is_file()
    ):
        repo_id = f"{owner}/{folder.name}"
        hub.add_repo(repo_id, folder)
        push_code(repo_id, yes=True)
        after = hub.files(repo_id)
        code = ours(tmp_path / folder.name, after)
        assert {name: data for name, data in after.items() if name.endswith(".py")} == code
        assert code_update(repo_id).diff == ""


# ---- the range of Transformers ---------------------------------------------------------------------------------------


def test_the_tested_range_is_that_of_the_constraints():
    (pinned,) = (
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("transformers==")
    )
    assert ".".join(map(str, TESTED[1])) == ".".join(pinned.partition("==")[2].split(".")[:2])
    assert f'"transformers>={TESTED[0][0]}.{TESTED[0][1]},<6"' in (ROOT / "pyproject.toml").read_text()


def test_outside_of_the_range_one_sentence_says_so(saved, monkeypatch):
    said = []
    log = SimpleNamespace(get_logger=lambda name: SimpleNamespace(warning_once=said.append))
    monkeypatch.setattr(base_manticore, "logging", log)
    for version, count in (((5, 24), 0), ((5, 25), 1), ((6, 0), 2)):
        monkeypatch.setattr(base_manticore, "VERSION", version)
        ManticoreForCausalLM.from_pretrained(saved[1])
        assert len(said) == count
    assert "5.24" in said[0] and "manticore-hf push --code-only" in said[0] and said[0] == said[1]
