"""Publishing: what is refused, secrets, and what is left when something fails."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import clean_process
import published
import pytest
from hub_models import assert_same_model, read_json, tiny
from huggingface_hub import snapshot_download
from manticore_local_hub import TOKEN
from published import exists
from safetensors.torch import load_file, save_file

from manticore_hf import ManticoreError, ManticoreForCausalLM, publish
from manticore_hf.hub.publish import update_card

parts, saved = published.parts, published.saved
pytestmark = pytest.mark.usefixtures("counted_once")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_no_hybrid_is_refused(saved, hub, owner, tmp_path):
    class PeftModel:
        peft_config = {}

    (tmp_path / "empty").mkdir()
    shutil.copytree(saved[1], tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(saved[1], tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    for what, message in (
        (tiny("gpt2"), "GPT2LMHeadModel is not a hybrid"),
        (PeftModel(), "holds an adapter"),
        (tmp_path / "gpt2", "type 'gpt2', no hybrid"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "nowhere", "no config.json"),
        (tmp_path / "light", "no model.safetensors"),
        (tmp_path / "damaged", "not a readable safetensors"),
    ):
        with pytest.raises(ManticoreError, match=message):
            publish(what, f"{owner}/h")
    assert not exists(f"{owner}/h")


@pytest.mark.parametrize(
    "options, message", [({"card": "mine"}, "card='mine'"), ({"recipe": "nowhere.yaml"}, "nowhere.yaml")]
)
def test_options_that_cannot_be(saved, owner, options, message):
    with pytest.raises(ManticoreError, match=message):
        publish(saved[1], f"{owner}/h", **options)


@pytest.mark.parametrize("repo_id", ["a/b/c", "..", "a b", ""])
def test_repositories_that_cannot_be(saved, repo_id):
    with pytest.raises(ManticoreError, match="not a repository id"):
        publish(saved[1], repo_id)


def test_another_model_is_not_overwritten(saved, hub, owner):
    before = hub.head(f"{owner}/a")
    with pytest.raises(ManticoreError, match="holds a model that is not a hybrid"):
        publish(saved[1], f"{owner}/a")
    assert hub.head(f"{owner}/a") == before


def test_metadata_that_the_hub_refuses_stop_it(saved, owner):
    (saved[1] / "README.md").write_text("---\nlicense: Not A Licence!\n---\n")
    with pytest.raises(ManticoreError, match="metadata of README.md is invalid.*license"):
        publish(saved[1], f"{owner}/h")
    assert not exists(f"{owner}/h")


# ---- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("place", ["README.md", "recipe.yaml", "evaluation.json", "config.json"])
def test_a_token_in_a_file_stops_it(saved, owner, place):
    secret = "hf_" + "S3cret" * 6
    if place == "config.json":
        values = {**read_json(saved[1]), "comment": secret}
        (saved[1] / place).write_text(json.dumps(values))
    else:
        (saved[1] / place).write_text(f'{{"data": "{secret}"}}')
    with pytest.raises(ManticoreError, match="holds an access token") as err:
        publish(saved[1], f"{owner}/h")
    assert secret not in str(err.value) and not exists(f"{owner}/h")


def test_a_token_is_found_whatever_the_files_name(saved, owner, monkeypatch):
    """Pictures and weights, too; also one that looks like no token but is the one in use."""
    folder, own = saved[1], "a-token-of-another-form"
    monkeypatch.setenv("HF_TOKEN", own)
    (folder / "plots").mkdir()
    for name, secret in (("plots/x.png", "hf_" + "S3cret" * 6), ("plots/x.png", own), ("NOTICE", own)):
        (folder / name).write_bytes(b"\x89PNG\0\xff" + secret.encode() + b"\xff")
        with pytest.raises(ManticoreError, match=f"{name} holds an access token"):
            publish(folder, f"{owner}/h", token=TOKEN)
        (folder / name).unlink()
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "note": "hf_" + "S3cret" * 6})
    with pytest.raises(ManticoreError, match="model.safetensors holds an access token"):
        publish(folder, f"{owner}/h", token=TOKEN)
    assert not exists(f"{owner}/h")


def test_links_that_leave_the_directory_are_refused_by_name(saved, hub, owner, tmp_path):
    folder = saved[1]
    for name in ("id_rsa", "elsewhere/photo.png", "t/a.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("PRIVATE")
    for name, target in (
        ("NOTICE", tmp_path / "id_rsa"),
        ("README.md", "../id_rsa"),
        ("tokenizer.json", tmp_path / "id_rsa"),
        ("gone.json", tmp_path / "gone"),
        ("plots", tmp_path / "elsewhere"),
        ("additional_chat_templates", tmp_path / "t"),
    ):
        (folder / name).symlink_to(target)
        for options in ({}, {"recipe": __file__}):
            with pytest.raises(ManticoreError, match=f"{name} in .* is a link to .*, which is not in the directory"):
                publish(folder, f"{owner}/h", **options)
        (folder / name).unlink()
    (folder / "plots").mkdir()
    (folder / "plots" / "x.png").symlink_to(tmp_path / "elsewhere" / "photo.png")
    with pytest.raises(ManticoreError, match="plots/x.png in .* is a link"):
        publish(folder, f"{owner}/h")
    assert not exists(f"{owner}/h")
    (folder / "plots" / "x.png").unlink()
    (folder / "tokenizer_a").mkdir()  # of a component that reads text by a tokenizer of its own
    (folder / "tokenizer_a" / "vocab.json").symlink_to("../../id_rsa")
    for look in (lambda: publish(folder, f"{owner}/h"), lambda: update_card(folder, f"{owner}/h")):
        with pytest.raises(ManticoreError, match="tokenizer_a/vocab.json in .* is a link"):
            look()
    (folder / "tokenizer_a" / "vocab.json").unlink()
    (folder / "LICENSE").write_text("theirs")
    (folder / "NOTICE").symlink_to("LICENSE")  # stays inside
    publish(folder, f"{owner}/h")
    assert hub.files(f"{owner}/h")["NOTICE"] == b"theirs"
    snapshot = snapshot_download(f"{owner}/h")  # links, to the cache's own blobs
    assert publish(snapshot, f"{owner}/again").files.keys() == publish(folder, f"{owner}/h").files.keys()


@pytest.mark.parametrize("fails", [False, True])
def test_the_token_is_in_no_file_and_no_log(parts, hub, owner, tmp_path, caplog, capfd, monkeypatch, fails):
    """A marker stands in for the token, everywhere one is used: composing, saving, publishing, failing."""
    marker = "hf_MarkerMarkerMarkerMarkerMarkerMarker"
    for repo in (*parts, f"{owner}/h"):
        if repo in hub._storage.repos:
            monkeypatch.setattr(hub._storage.repos[repo], "owner", marker)
    monkeypatch.setenv("HF_TOKEN", marker)
    monkeypatch.setenv("HF_DEBUG", "0")
    if fails:
        hub.fault(f"POST .*{owner}/h/commit", "status", times=-1, status=403, message="No write access")
    with caplog.at_level(logging.DEBUG):
        model = ManticoreForCausalLM.from_components(parts, token=marker)
        model.save_pretrained(tmp_path / "out", token=marker)
        try:
            publish(tmp_path / "out", f"{owner}/h", token=marker)
            ManticoreForCausalLM.from_pretrained(f"{owner}/h", token=marker)
        except ManticoreError as err:
            assert fails and marker not in str(err) and "write" in str(err)
    printed = "".join(capfd.readouterr()) + caplog.text
    assert marker not in printed
    folders = [tmp_path, Path(os.environ["HF_HOME"]) / "hub", Path(os.environ["HF_HOME"]) / "modules"]
    seen = [path for folder in folders if folder.exists() for path in folder.rglob("*") if path.is_file()]
    assert len(seen) > 20 and not [path for path in seen if marker.encode() in path.read_bytes()]
    assert not [name for name, data in hub.files(f"{owner}/h").items() if marker.encode() in data]
    assert len(hub.files(f"{owner}/h")) > 20 or fails


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.quick(every=2)
@pytest.mark.parametrize(
    "pattern, fault, message",
    [
        ("POST .*/commit", {"kind": "status", "status": 500}, "look there, then publish again"),
        ("POST .*/commit", {"kind": "status", "status": 403}, "token that may write"),
        ("POST .*/preupload", {"kind": "status", "status": 500}, "publish again"),
        ("PUT /lfs-objects", {"kind": "status", "status": 400}, "publish again"),
        ("GET .*/api/models/.*/h", {"kind": "unauthorized"}, "was not published"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("status", "")),
)
def test_a_push_that_fails_leaves_the_repository_as_it_was(saved, hub, owner, pattern, fault, message):
    publish(saved[1], f"{owner}/h")
    before, card = hub.head(f"{owner}/h"), (saved[1] / "README.md").read_bytes()
    # Never the same: the Hub does not ask again for bytes that it has from another test.
    saved[0].hybrid_mixer.alpha_logits.data.fill_(0.1 + int(owner.removeprefix("org")))
    hub.fault(pattern, times=-1, **fault)
    with pytest.raises(ManticoreError, match=message):
        publish(saved[0], f"{owner}/h")
    hub.clear_faults()
    assert hub.head(f"{owner}/h") == before and (saved[1] / "README.md").read_bytes() == card
    publish(saved[0], f"{owner}/h")
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/h"), saved[0])


def test_a_directory_that_cannot_be_written_is_published_all_the_same(saved, hub, owner, monkeypatch):
    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(Path, "replace", refuse)
    out = publish(saved[1], f"{owner}/h")
    assert not [path for path in saved[1].iterdir() if "README" in path.name]
    assert any("README.md was not written" in notice for notice in out.notices)
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/h"), saved[0])


def test_the_hub_that_is_not_there(saved, tmp_path):
    assert TOKEN
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = ["-m", "manticore_hf.cli", "push", saved[1], "me/h"]
    done = clean_process.run(command, env=environment, modules=clean_process.TORCH)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert "manticore-hf push: me/h was not published" in said and ". Nothing was committed unless" in said
    done = clean_process.run([*command, "--dry-run"], env=environment, modules=clean_process.TORCH)
    assert done.returncode == 0, done.stderr
    listed, last = done.stdout.splitlines()[:-1], done.stdout.splitlines()[-1]
    assert {"README.md", "model.safetensors", "config.json"} < {line.split()[0] for line in listed}
    assert re.fullmatch(r"\d+ files, [\d,]+ bytes\.", listed[-1]) and last == "Dry run: nothing was written to me/h."
    (said,) = (line for line in done.stderr.splitlines() if "does not answer" in line)
    assert "it was not checked what me/h holds, whether all can read the components," in said
