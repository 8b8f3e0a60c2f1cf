"""A save that is killed, starved or raced at whatever moment: what loads is the old hybrid or the new one."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hub_models import logits, nudge, publish, tiny
from safetensors import SafetensorError

from manticore_hf import ManticoreConfig, ManticoreError, ManticoreForCausalLM
from manticore_hf import publish as publish_hybrid
from manticore_hf.hub.inspection import inspect_hybrid
from manticore_hf.utils import saving
from manticore_hf.utils.saving import check_whole, whole_directory

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
OLD = {**dict.fromkeys(("config.json", "a_manticore.py", *_SHARDS), "old"), "optimizer.pt": "mine"}
NEW = dict.fromkeys(("config.json", "a_manticore.py", "b_manticore.py", "model.safetensors", "plots/x.png"), "new")


def fill(folder, files):
    for name, text in files.items():
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_text(text)
    return Path(folder)


def content(folder):
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def save(folder, files):
    with whole_directory(folder, True) as scratch:
        fill(scratch, files)


def in_child(work):
    """Runs `work` in a forked process; its status, as `os.waitpid` gives it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed_at(step, folder, work, how=lambda: os.kill(os.getpid(), signal.SIGKILL)):
    """`work` in a child that ends at the `step`th change of a file of that folder. Whether it got so far."""

    def child():
        count = [0]

        def at(call):
            def inner(*args, **kwargs):
                if any(str(folder) in str(one) for one in args if isinstance(one, (str, os.PathLike))):
                    count[0] += 1
                    if count[0] == step:
                        how()
                return call(*args, **kwargs)

            return inner

        for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
            setattr(os, name, at(getattr(os, name)))
        work()

    return os.WIFSIGNALED(in_child(child))


def loaded(folder):
    """What a load sees: the content, after one that said that it is complete now."""
    try:
        check_whole(folder)
    except ManticoreError as err:
        assert "It is complete now: load it again" in str(err)
        check_whole(folder)
    return content(folder)


AFTER = {**NEW, "optimizer.pt": "mine"}


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("old, new", [(OLD, NEW), (NEW, OLD)], ids=["to one file", "to shards"])
def test_killed_at_every_change_of_a_file_it_is_the_old_one_or_the_new_one(tmp_path, old, new):
    seen, others = [], {name: text for name, text in old.items() if "safetensors" not in name}
    after = {**others, **new}
    for step in range(1, 60):
        folder = fill(tmp_path / f"{step}" / "out", old)
        killed = killed_at(step, folder.parent, partial(save, folder, new))
        found = loaded(folder)
        assert found in (old, after), step
        seen.append("old" if found == old else "new")
        save(folder, new)  # and the next save goes on as if nothing had been
        assert content(folder) == after and [path.name for path in folder.parent.iterdir()] == ["out"]
        if not killed:
            break
    assert not killed and seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)  # one change of them all


@pytest.mark.slow
def test_killed_again_while_what_was_promised_is_moved(tmp_path):
    for step in range(1, 40):
        folder = fill(tmp_path / f"{step}" / "out", OLD)
        assert killed_at(12, folder.parent, partial(save, folder, NEW)) and (folder / ".saving").exists()

        killed = killed_at(step, folder.parent, partial(loaded, folder))
        assert loaded(folder) == AFTER, step
        if not killed:
            break
    assert step > 4 and not killed


def test_where_the_configuration_stays_a_load_goes_on(tmp_path):
    """What it has read of config.json is right before and after."""
    folder = fill(tmp_path / "out", OLD)
    assert killed_at(12, folder.parent, partial(save, folder, {**NEW, "config.json": "old"}))
    assert not check_whole(folder) and check_whole(folder)
    assert content(folder) == {**AFTER, "config.json": "old"}


def test_what_was_promised_and_is_gone_is_said(tmp_path):
    folder = fill(tmp_path / "out", OLD)
    assert killed_at(12, folder.parent, partial(save, folder, NEW))
    for scratch in tmp_path.glob(".out.saving-*"):
        shutil.rmtree(scratch)
    for _ in range(2):
        with pytest.raises(ManticoreError, match="of two saves: save it again"):
            check_whole(folder)
    save(folder, NEW)
    assert loaded(folder) == AFTER


def test_a_strangers_note_moves_nothing(tmp_path):
    fill(tmp_path / "secret", {"id_rsa": "private"})
    fill(tmp_path / ".out.saving-x" / "secret", {"id_rsa": "private"})
    for place, files in (
        ("../secret", ["id_rsa"]),
        ("/etc", ["passwd"]),
        ("../.out.saving-x/../secret", ["id_rsa"]),
        ("../.out.saving-x/secret", ["id_rsa"]),
        ("../.out.saving-x/out", ["../../secret/id_rsa"]),
        ("../.out.saving-x/out", ["/etc/passwd"]),
        (3, []),
        ("../.out.saving-x/out", 3),
        ("../.out.saving-x/out", "x" * 200_000),  # of which each would be looked for
        ("../.out.saving-x/out", ["x"] * 200_000),
    ):
        folder = fill(tmp_path / "out", {"config.json": "{}", ".saving": json.dumps({"from": place, "files": files})})
        with pytest.raises(ManticoreError, match="save it again"):
            check_whole(folder)
        assert set(content(folder)) == {"config.json", ".saving"}
    for link in (".out.saving-y", ".out.saving-z/out", ".out.saving-v/out/plots"):  # to what is the reader's
        theirs = fill(tmp_path / "links" / "out", {"config.json": "{}"})
        (theirs / link).parent.mkdir(parents=True, exist_ok=True)
        (theirs / link).symlink_to(tmp_path / "home")
        fill(tmp_path / "home" / "out", {"id_rsa": "private"})
        fill(tmp_path / "home", {"id_rsa": "private"})
        name = "plots/id_rsa" if "plots" in link else "id_rsa"
        (theirs / ".saving").write_text(json.dumps({"from": f"{link.split('/')[0]}/out", "files": [name]}))
        with pytest.raises(ManticoreError, match="save it again"):
            check_whole(theirs)
        assert content(tmp_path / "home") == {"id_rsa": "private", "out/id_rsa": "private"}
        shutil.rmtree(tmp_path / "links")
    folder = fill(tmp_path / "links" / "out", {"config.json": "{}"})
    (folder / "plots").symlink_to(tmp_path / "home")
    with pytest.raises(ManticoreError, match="a link out of it"):
        save(folder, NEW)
    assert content(folder) == {"config.json": "{}"} and not (tmp_path / "home" / "x.png").exists()
    assert (tmp_path / "secret" / "id_rsa").read_text() == "private"


@pytest.mark.slow
def test_a_full_disk_at_every_change_of_a_file_leaves_the_old_one_or_the_new_one(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(folder):
        try:
            save(folder, NEW)
        except OSError as err:
            os._exit(3 if err.errno == errno.ENOSPC else 4)

    seen = []
    for step in range(1, 60):
        folder = fill(tmp_path / f"{step}" / "out", OLD)
        killed_at(step, folder.parent, partial(work, folder), full)
        found = loaded(folder)
        assert found in (OLD, AFTER), step
        seen.append("old" if found == OLD else "new")
        save(folder, NEW)
        assert content(folder) == AFTER
    assert {"old", "new"} == set(seen)


def test_a_full_disk_leaves_the_old_one(tmp_path):
    """While the new files are written, and while the note of them is."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = fill(tmp_path / "out", OLD)

    def failing():
        with pytest.raises(OSError, match="No space left"):
            with whole_directory(folder, True) as scratch:
                fill(scratch, {"config.json": "new"})
                full()

    assert in_child(failing) == 0 and loaded(folder) == OLD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *args, **kwargs: full())
        with pytest.raises(OSError, match="No space left"):
            with whole_directory(folder, True) as scratch:
                open(os.path.join(scratch, "config.json"), "w").write("new")
    assert loaded(folder) == OLD and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers(tmp_path):
    """Several processes save one after the other into one directory; whose files are there at the end are one's."""
    folder, pids = fill(tmp_path / "out", OLD), []
    for writer in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for _ in range(15):
                    save(folder, {name: f"{writer}" for name in NEW})
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    found = loaded(folder)
    assert found.pop("optimizer.pt") == "mine" and set(found) == set(NEW) and len(set(found.values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_held_directory_is_waited_for_with_a_word_and_not_for_ever(tmp_path, monkeypatch):
    folder, said = fill(tmp_path / "out", OLD), []
    monkeypatch.setattr(saving, "_PATIENCE", 0.3)
    monkeypatch.setattr(saving.logger, "warning_once", said.append)
    number = saving._hold(folder)
    with pytest.raises(ManticoreError, match="has been locked by another process"):
        save(folder, NEW)
    assert "Waiting for another process" in said[0] and content(folder) == OLD
    os.close(number)
    save(folder, NEW)
    assert content(folder) == AFTER


def test_what_lives_in_another_container_is_left_alone(tmp_path):
    """Its process id means nothing here, and its host may have the same name: what it holds tells."""
    folder = fill(tmp_path / "out", OLD)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with whole_directory(folder, True) as scratch:
            fill(scratch, {name: "theirs" for name in NEW})
            os.read(read, 1)
        os._exit(0)
    while not (there := list(tmp_path.glob(".out.saving-*/out/plots/x.png"))):
        time.sleep(0.01)
    save(folder, NEW)
    assert there[0].exists()
    os.write(write, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    assert content(folder) == {**{name: "theirs" for name in NEW}, "optimizer.pt": "mine"}


def test_names_that_are_long_or_go_up(tmp_path):
    for name in ("x" * 240, "ä" * 120, "new/../out"):
        for _ in range(2):
            save(tmp_path / name, NEW)
        assert content(tmp_path / name) == NEW


def test_without_a_name_for_the_user_and_of_the_machine(tmp_path, monkeypatch):
    """`docker run --user 12345`: no entry in the password file."""
    import getpass
    import pwd

    def unknown(*_):
        raise KeyError("uid not found")

    for module, name in ((pwd, "getpwuid"), (getpass, "getuser")):
        monkeypatch.setattr(module, name, unknown)
    before = set(Path(saving.tempfile.gettempdir()).glob("manticore-*.lock"))
    for _ in range(2):
        save(tmp_path / "out", NEW)
    assert content(tmp_path / "out") == NEW
    assert set(Path(saving.tempfile.gettempdir()).glob("manticore-*.lock")) == before


# ---- with a hybrid ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(hub, owner, tmp_path):
    """(old directory, its logits, another model of another configuration, its logits)."""
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src")
    publish(hub, f"{owner}/b", tiny("gpt2", 1), tmp_path / "src")
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"])
    model.save_pretrained(tmp_path / "old")
    old = logits(model)
    other = ManticoreForCausalLM.from_pretrained(tmp_path / "old")
    nudge(other, "a.gpt_neox.layers.0.mlp.dense_h_to_4h.weight")
    other.config.mixture_space = "logprob"
    other.save_pretrained(tmp_path / "new")
    return tmp_path / "old", old, other, logits(ManticoreForCausalLM.from_pretrained(tmp_path / "new"))


def which(folder, old, new):
    try:
        found = logits(ManticoreForCausalLM.from_pretrained(folder))
    except ManticoreError as err:
        assert "load it again" in str(err)
        found = logits(ManticoreForCausalLM.from_pretrained(folder))
        assert torch.equal(found, new)
    assert torch.equal(found, old) or torch.equal(found, new)
    return torch.equal(found, new)


def test_a_hybrid_killed_on_either_side_of_the_one_rename(pair, tmp_path):
    source, old, other, new = pair
    target, found = tmp_path / "target", {}
    shutil.copytree(source, target)

    def starved():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a disk that is full while weights are written
        with pytest.raises((OSError, SafetensorError), match="too large"):
            other.save_pretrained(target)

    assert in_child(starved) == 0 and not which(target, old, new)
    for name in (".saving", "config.json", "model.safetensors"):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)

        def child(last=target / name):
            replace = os.replace

            def stop(one, two):
                if Path(two) == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(one, two)

            os.replace = stop
            other.save_pretrained(target)

        assert os.WIFSIGNALED(in_child(child))
        if name == "config.json":  # whoever reads it otherwise is told, too
            for read in (inspect_hybrid, partial(publish_hybrid, repo_id="x/y", dry_run=True)):
                copy = shutil.copytree(tmp_path, tmp_path.with_name("copy"))
                with pytest.raises(ManticoreError, match="load it again"):
                    read(copy / "target")
                shutil.rmtree(copy)
        found[name] = which(target, old, new)
    assert found == {".saving": False, "config.json": True, "model.safetensors": True}


@pytest.mark.slow
def test_a_hybrid_killed_at_every_change_and_at_random(pair, tmp_path):
    source, old, other, new = pair
    target, seen = tmp_path / "target" / "out", []
    for step in [*range(1, 200), *[-1] * 40]:
        shutil.rmtree(target.parent, ignore_errors=True)
        shutil.copytree(source, target)
        if step > 0:
            if not killed_at(step, target.parent, lambda: other.save_pretrained(target)):
                step = 0
        else:
            pid = os.fork()
            if pid == 0:
                other.save_pretrained(target)
                os._exit(0)
            time.sleep(random.random() * 0.5)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        seen.append(which(target, old, new))
        assert ManticoreConfig.from_pretrained(target).mixture_space in ("prob", "logprob")
    assert set(seen) == {False, True}
