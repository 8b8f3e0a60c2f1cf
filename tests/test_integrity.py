"""What was fetched is what was meant: recorded SHA-256s, damage on the way, a Hub that is busy, revisions that move."""

import copy
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from hub_models import MODEL, assert_same_model, nudge, publish, publish_hybrid, read_json, tiny
from huggingface_hub import snapshot_download
from manticore_hf.modeling import references_manticore
from test_references import edit_config, refused

from manticore_hf import ComponentSpec, ManticoreConfig, ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main


@pytest.fixture
def saved(hub, owner, tmp_path):
    """A saved hybrid of a component in one file and one in shards. Returns (model, folder)."""
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    publish(hub, f"{owner}/b", tiny("gpt2", 1), tmp_path / "src", max_shard_size="10KB")
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"])
    model.save_pretrained(tmp_path / "out")
    return model, tmp_path / "out"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(references_manticore, "_WAITS", (0.01, 0.01))


def load(folder, tmp_path):
    return ManticoreForCausalLM.from_pretrained(folder, cache_dir=tmp_path / "empty")


# ---- what is recorded ------------------------------------------------------------------------------------------------


def test_every_referenced_file_is_recorded(saved, hub, owner):
    one, other = read_json(saved[1])["components"]
    for entry, count in ((one, 1), (other, 4)):
        files = hub.files(entry["repo_id"])
        wanted = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if "safetensors" in name}
        assert entry["files"] == wanted and len(wanted) >= count
    assert "model.safetensors.index.json" in other["files"]


def test_embedded_components_have_nothing_to_record(hub, owner, tmp_path):
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    spec = ComponentSpec(f"{owner}/a", embed=True)
    model = ManticoreForCausalLM.from_components([spec, ComponentSpec(tiny("gpt2"), name="b")])
    assert [entry["files"] for entry in model.config.components] == [None, None]


def test_without_a_record_loading_works_as_ever(saved, tmp_path):
    edit_config(saved[1], lambda values: [entry.pop("files") for entry in values["components"]])
    assert_same_model(load(saved[1], tmp_path), saved[0])


def test_another_file_than_recorded(saved, tmp_path):
    def change(values):
        values["components"][1]["files"]["model-00002-of-00004.safetensors"] = "0" * 64

    assert "model-00002-of-00004.safetensors" in saved[0].config.components[1]["files"]
    edit_config(saved[1], change)
    refused(saved[1], tmp_path, "Component 'b'.*model-00002-of-00004.safetensors is not the file this hybrid was made")


@pytest.mark.parametrize(
    "files",
    [
        3,
        [],
        {},
        {"model.safetensors": 3},
        {"model.safetensors": "A" * 64},
        {"model.safetensors": None},
        {"../x.safetensors": "0" * 64},
        {"/etc/x.safetensors": "0" * 64},
        {"pytorch_model.bin": "0" * 64},
        {"model.safetensors": "0" * 64, "a/b.safetensors": "0" * 64},
        {"https://x/y.safetensors": "0" * 64},
    ],
)
def test_hostile_record(files):
    entry = {"name": "one", "config": tiny("gpt2").config, "repo_id": "a/b", "revision": "0" * 40}
    with pytest.raises(ManticoreError, match="Component 'one'.*(files|SHA-256)"):
        ManticoreConfig(components=[{**entry, "files": files}])
    if files:  # also where nothing is referenced
        with pytest.raises(ManticoreError, match="Component 'one'.*(files|SHA-256)"):
            ManticoreConfig(components=[{"name": "one", "config": tiny("gpt2").config, "files": files}])


# ---- damage on the way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 9, 5000])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_flipped_byte_is_noticed_and_forgotten(saved, hub, owner, tmp_path, offset, recorded):
    model, folder = saved
    if not recorded:
        edit_config(folder, lambda values: [entry.pop("files") for entry in values["components"]])
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "flip", offset=offset)
    refused(folder, tmp_path, "Component 'a'.*model.safetensors is damaged.*load again")
    assert_same_model(load(folder, tmp_path), model)


def test_composing_notices_a_flipped_byte(hub, owner, tmp_path):
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "flip", offset=5000)
    with pytest.raises(ManticoreError, match="Component 'a'.*model.safetensors is damaged"):
        ManticoreForCausalLM.from_components([f"{owner}/a"])
    model = ManticoreForCausalLM.from_components([f"{owner}/a"])
    assert torch.equal(model.a.lm_head.weight, tiny("gpt_neox").lm_head.weight)


def damaged(folder, match):
    with pytest.raises(ManticoreError, match=match):
        ManticoreForCausalLM.from_pretrained(folder)


def blobs(owner, name):
    """The cached weight files of a component."""
    cache = Path(os.environ["HF_HOME"]) / "hub" / f"models--{owner}--{name}"
    return [path for path in cache.glob("snapshots/*/*.safetensors")]


def damage(path, keep_dates=True):
    """Flips a byte of a cached file in place, as a failing disk does."""
    real, stat = Path(path).resolve(), Path(path).stat()
    data = bytearray(real.read_bytes())
    data[-5] ^= 1
    real.chmod(0o644)
    real.write_bytes(bytes(data))
    if keep_dates:
        os.utime(real, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_another_file_in_its_place_is_hashed_though_size_and_date_are_the_same(saved, owner):
    """As `cp -p` or a restored backup leaves it: only the inode tells."""
    (file,) = blobs(owner, "a")
    real = file.resolve()
    shutil.copy2(real, other := real.with_name("other"))
    damage(other)
    before = real.stat()
    os.replace(other, real)
    assert (real.stat().st_size, real.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    damaged(saved[1], "Component 'a'.*model.safetensors is damaged.*load again")


def test_bytes_in_the_cache_are_hashed_once_whoever_put_them_there(saved, hub, owner, tmp_path, monkeypatch):
    """Also what a killed load, or `hf download`, left there unchecked."""
    model, folder = saved
    counted = []

    def count(path):
        counted.append(os.path.basename(path))
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    monkeypatch.setattr(references_manticore, "sha256", count)
    snapshot_download(f"{owner}/a", cache_dir=tmp_path / "cache")
    options = {"cache_dir": tmp_path / "cache"}

    def kill(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(references_manticore, "sha256", kill)
        with pytest.raises(KeyboardInterrupt):
            ManticoreForCausalLM.from_pretrained(folder, **options)
    assert_same_model(ManticoreForCausalLM.from_pretrained(folder, **options), model)
    assert counted.count("model.safetensors") == 1 and len(counted) > 3
    counted.clear()
    assert_same_model(ManticoreForCausalLM.from_pretrained(folder, **options), model)
    assert counted == []
    (file,) = (tmp_path / "cache").glob("*--a/snapshots/*/model.safetensors")
    os.utime(file.resolve())  # the same bytes, but another date
    assert_same_model(ManticoreForCausalLM.from_pretrained(folder, **options), model)
    assert counted == ["model.safetensors"]


def test_damage_in_the_cache_is_noticed(saved, hub, owner, tmp_path):
    model, folder = copy.deepcopy(saved[0]), saved[1]  # whose tensors may be the file itself, mapped
    (file,) = blobs(owner, "a")  # composing has verified it
    damage(file, keep_dates=False)
    damaged(folder, "Component 'a'.*model.safetensors is damaged.*load again")
    assert_same_model(ManticoreForCausalLM.from_pretrained(folder), model)
    (file,) = blobs(owner, "a")
    with open(file.resolve(), "r+b") as opened:  # a size that differs, the date as it was
        stat = os.stat(file)
        opened.truncate(stat.st_size - 3)
    os.utime(file.resolve(), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    damaged(folder, "Component 'a'.*model.safetensors is damaged")
    assert_same_model(ManticoreForCausalLM.from_pretrained(folder), model)


def test_own_weights_in_the_cache_are_verified_too(saved, hub, owner, tmp_path):
    publish_hybrid(hub, f"{owner}/h", saved[1])
    ManticoreForCausalLM.from_pretrained(f"{owner}/h", cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*--h/snapshots/*/model.safetensors")
    damage(file, keep_dates=False)
    with pytest.raises(ManticoreError, match="The hybrid's own model.safetensors is damaged"):
        ManticoreForCausalLM.from_pretrained(f"{owner}/h", cache_dir=tmp_path / "cache")
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/h", cache_dir=tmp_path / "cache"), saved[0])


def test_verify_hashes_anew_what_dates_do_not_tell(saved, hub, owner, capsys):
    """A disk that forgets changes no date: `inspect --verify` looks at the bytes again."""
    model, folder = copy.deepcopy(saved[0]), saved[1]  # whose tensors may be the file itself, mapped
    (file,) = blobs(owner, "a")
    damage(file)
    ManticoreForCausalLM.from_pretrained(folder)  # remembered as verified
    assert main(["inspect", str(folder), "--verify"]) == 1
    printed, said = capsys.readouterr()
    assert said.startswith("manticore-hf inspect: DAMAGED, removed from the cache: Component 'a'")
    assert said.endswith(": model.safetensors. Load again.\n")
    assert "0 files verified, DAMAGED, removed from the cache: model.safetensors" in printed
    assert f"{len(model.config.components[1]['files'])} files verified" in printed
    assert_same_model(ManticoreForCausalLM.from_pretrained(folder), model)
    assert main(["inspect", str(folder), "--verify"]) == 0
    printed, said = capsys.readouterr()
    assert "DAMAGED" not in printed + said and "1 file verified" in printed
    publish_hybrid(hub, f"{owner}/h", folder)
    ManticoreForCausalLM.from_pretrained(f"{owner}/h")
    (own,) = Path(file).parents[3].glob(f"models--{owner}--h/snapshots/*/model.safetensors")
    damage(own)
    assert main(["inspect", f"{owner}/h", "--verify"]) == 1  # the hybrid's own weights, too
    assert f"removed from the cache: {owner}/h: model.safetensors. Load again." in capsys.readouterr().err
    assert not own.exists() and main(["inspect", f"{owner}/h", "--verify"]) == 0


def test_a_cache_that_cannot_be_written_is_read_all_the_same(saved, hub, owner, monkeypatch):
    def refuse(*_, **__):
        raise OSError("read-only")

    (file,) = blobs(owner, "a")
    for note in (file.parents[2] / ".verified").iterdir():
        note.unlink()
    monkeypatch.setattr(references_manticore.os, "replace", refuse)
    assert_same_model(ManticoreForCausalLM.from_pretrained(saved[1]), saved[0])


def test_what_the_hub_answers_is_said_with_what_to_do(saved, hub, owner, tmp_path, impatient):
    for status, remedy in (
        (400, "was refused"),
        (401, "private or gone; log in"),
        (403, "may not read it; ask its owner"),
        (404, "is gone, or private"),
        (418, "was refused; try again later"),
        (429, "too many requests"),
        (500, "the Hub has trouble; try again later"),
        (503, "the Hub has trouble; try again later"),
        (599, "the Hub has trouble"),
    ):
        hub.fault(f"/{owner}/a/resolve/.*safetensors", "status", times=-1, status=status)
        for source, options in (
            (lambda **o: ManticoreForCausalLM.from_pretrained(saved[1], **o), {"cache_dir": tmp_path / f"c{status}"}),
        ):
            with pytest.raises(ManticoreError, match=rf"Component 'a' \({owner}/a@.*answers {status}: .*{remedy}"):
                source(**options)
        hub.clear_faults()
        if status != 404:
            hub.fault(f"HEAD /{owner}/b/resolve/.*safetensors", "status", times=-1, status=status)
            with pytest.raises(
                ManticoreError, match=rf"Component 'b' .*safetensors: the Hub answers {status}: .*{remedy}"
            ):
                ManticoreForCausalLM.from_components([f"{owner}/b"], cache_dir=tmp_path / f"e{status}")
            hub.clear_faults()
        hub.fault(f"/{owner}/b/resolve/.*config.json", "status", times=-1, status=status)
        with pytest.raises(ManticoreError, match=rf"Component 'b' \({owner}/b\).*({remedy}|no such|no config.json)"):
            ManticoreForCausalLM.from_components([f"{owner}/b"], cache_dir=tmp_path / f"d{status}")
        hub.clear_faults()
    hub.fault(f"/{owner}/a/resolve", "gated", times=-1)
    refused(saved[1], tmp_path, "Component 'a'.*is gated: ask for access")
    hub.clear_faults()
    with pytest.raises(ManticoreError, match="Component 'a'.*not in the local cache.*go online once"):
        ManticoreForCausalLM.from_pretrained(saved[1], cache_dir=tmp_path / "none", local_files_only=True)


def test_a_file_cut_off_is_fetched_to_its_end(saved, hub, owner, tmp_path):
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "cut", bytes=700)
    assert_same_model(load(saved[1], tmp_path), saved[0])


def test_a_file_cut_off_for_good(saved, hub, owner, tmp_path):
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "cut", times=-1, bytes=0)
    refused(saved[1], tmp_path, "Component 'a'.*cannot be (read|reached)")
    hub.clear_faults()
    assert_same_model(load(saved[1], tmp_path), saved[0])


def test_a_truncated_file(saved, hub, owner, tmp_path):
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "truncate", times=-1)
    refused(saved[1], tmp_path, "Component 'a'")
    hub.clear_faults()
    assert_same_model(load(saved[1], tmp_path), saved[0])


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_busy_hub_is_asked_again(saved, hub, owner, tmp_path, impatient, status, method):
    hub.fault(f"{method} /{owner}/a/resolve/.*safetensors", "status", times=2, status=status)
    assert_same_model(load(saved[1], tmp_path), saved[0])


def test_a_hub_that_stays_busy(saved, hub, owner, tmp_path, impatient):
    hub.fault(f"GET /{owner}/b/resolve/.*safetensors", "status", times=-1, status=503)
    refused(saved[1], tmp_path, "Component 'b'.*503")


# ---- revisions that move ---------------------------------------------------------------------------------------------


def test_a_branch_warns_and_is_pinned(saved, hub, owner, tmp_path, caplog):
    model, folder = saved
    edit_config(folder, lambda values: values["components"][0].update(revision="main"))
    loaded = load(folder, tmp_path)
    assert "Component 'a'" in caplog.text and "'main', which can move" in caplog.text
    loaded.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again")["components"][0]["revision"] == hub.head(f"{owner}/a")
    assert_same_model(ManticoreForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_a_branch_that_has_moved_is_not_what_was_recorded(saved, hub, owner, tmp_path):
    edit_config(saved[1], lambda values: values["components"][0].update(revision="main"))
    publish(hub, f"{owner}/a", tiny("gpt_neox", 7), tmp_path / "other")
    refused(saved[1], tmp_path, "Component 'a'.*not the file this hybrid was made with")


def test_a_branch_that_cannot_be_pinned_is_not_saved(hub, owner, tmp_path):
    entry = {"name": "one", "config": tiny("gpt2").config, "repo_id": f"{owner}/nowhere", "revision": "main"}
    model = ManticoreForCausalLM(ManticoreConfig(components=[entry]))
    with pytest.raises(ManticoreError, match="Component 'one'.*can move.*nothing was saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tuned_weights_do_not_need_the_component(saved, hub, owner, tmp_path):
    """What is in the hybrid's own file is loaded even where a component is gone."""
    model, folder = saved
    nudge(model, *(name for name, _ in model.named_parameters() if name.startswith("a.")))
    model.save_pretrained(folder)
    publish_hybrid(hub, f"{owner}/tuned", folder)
    hub.fault(f"/{owner}/a/", "missing", times=-1, code="RepoNotFound")
    assert_same_model(load(f"{owner}/tuned", tmp_path), model)
    assert MODEL in hub.files(f"{owner}/tuned")
