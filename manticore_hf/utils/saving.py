"""Writing a directory whole or not at all: what the package adds to `modeling/saving_manticore.py`.

Over an existing directory one rename makes the difference, that of a note (`.saving`) which names the complete new
files: before it the old ones count, after it the new ones. Whoever finds the note, because a process was killed while
it moved them, moves the rest.
"""

import contextlib
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from manticore_hf.modeling.saving_manticore import (
    NOTE,
    install_saving,
    is_below,
    move_files,
    scratch_place,
    scratch_prefix,
    write_note,
)
from manticore_hf.modeling.settings_manticore import ManticoreError

try:
    import fcntl
except ImportError:  # not on Windows: nothing is locked there, and nothing of other processes removed
    fcntl = None

logger = logging.get_logger(__name__)

_PATIENCE = 600.0  # seconds that another process may take to move its files


@contextlib.contextmanager
def whole_directory(target: str | os.PathLike, active: bool) -> Iterator[str]:
    """Gives a scratch directory whose files are moved into `target` when the block ends well.

    A new target appears by one rename. In an existing one the files are replaced or none is; its other files stay, but
    for weights of an earlier save. Of several processes that save into one directory at once, one after the other moves
    its files.
    """
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    place = scratch_place(target)
    _clean_up(place, target)
    scratch, held = _make_scratch(place, target)
    try:
        inner = scratch / target.name
        inner.mkdir()
        yield str(inner)
        if active:
            for file in inner.rglob("*.safetensors"):  # the library writes them for their owner alone
                file.chmod(inner.stat().st_mode & 0o666)
            _move(inner, target)
    finally:
        if not _is_promised(scratch, target):
            shutil.rmtree(scratch, ignore_errors=True)
        _let_go(held)


def check_whole(directory: str | os.PathLike) -> bool:
    """Whether no save is moving files into a directory, or was cut off while it did; the rest is moved first.

    Raises:
        ManticoreError: It was so, and config.json may have been read before it changed.
    """
    target = Path(os.path.realpath(directory))
    if not os.path.lexists(target / NOTE):
        return True
    same = _promised(target)[2]
    with contextlib.suppress(OSError), _one_at_a_time(target):  # it may not be ours to write
        _finish(target)
    done = not os.path.lexists(target / NOTE)
    if done and same:
        return False
    raise ManticoreError(
        f"{str(directory)!r} was being saved when it was loaded, or an earlier save was interrupted. "
        + ("It is complete now: load it again." if done else "Its files are of two saves: save it again.")
    )


def _move(inner, target):
    if not target.exists():
        try:
            return os.replace(inner, target)
        except OSError:
            if not target.exists():  # else another process has been faster
                raise
    with _one_at_a_time(target):
        _finish(target)
        write_note(inner, target)
        _finish(target)


def _finish(target):
    """Moves what the note of a directory promises; False if that is not there (any more)."""
    inner, files, _ = _promised(target)
    if inner is None or not inner.is_dir():  # what is missing there has been moved
        return False
    move_files(inner, target, files)
    return True


def _promised(target):
    """(scratch directory, files, whether config.json stays as it is) of a directory's note, if there is one."""
    try:
        note = json.loads((target / NOTE).read_text(encoding="utf-8"))
        place, files = note["from"].removeprefix("../"), note["files"]
        inner = target / note["from"]
        # It may be a stranger's directory: nothing is moved but from scratch directories of this one.
        ours = place.startswith(scratch_prefix(target)) and place.split("/")[1:] == [target.name]
        ours = ours and not os.path.islink(inner) and not os.path.islink(inner.parent)
        ours = ours and isinstance(files, list) and len(files) < 10_000
        plain = ours and all(is_below(root, name) for name in files for root in (inner, target))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, [], False
    return (inner, files, note.get("same") is True) if plain else (None, [], False)


def _is_promised(scratch, target):
    inner = _promised(target)[0]
    return inner is not None and os.path.realpath(inner.parent) == os.path.realpath(scratch)


def _make_scratch(place, target):
    """(scratch directory, what holds it)."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=scratch_prefix(target), dir=place))
        held = _hold(scratch)
        if held is not False and scratch.is_dir():  # else another process took it for a dead one's
            return scratch, held
        _let_go(held)


def _clean_up(place, target):
    """Removes what killed processes left in `place`: a living one, in whatever container, holds its own."""
    for stale in place.glob(glob.escape(scratch_prefix(target)) + "*"):
        if not _is_promised(stale, target) and (held := _hold(stale)) not in (None, False):
            shutil.rmtree(stale, ignore_errors=True)
            _let_go(held)


def _hold(directory):
    """A lock on a directory until its process ends or lets go, which leaves no file; False: another holds it."""
    if fcntl is None:
        return None
    number = None
    try:
        number = os.open(directory, os.O_RDONLY)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return number
    except OSError as err:  # gone, or a file system without locks
        _let_go(number)
        return False if isinstance(err, BlockingIOError) else None


def _let_go(held):
    if held not in (None, False):
        os.close(held)


@contextlib.contextmanager
def _one_at_a_time(target):
    """Context that holds a directory; says so when it has to wait."""
    begin = time.monotonic()
    while (held := _hold(target)) is False:
        if time.monotonic() - begin > _PATIENCE:
            raise ManticoreError(
                f"{str(target)!r} has been locked by another process for {_PATIENCE:.0f} s; find it with `fuser`, "
                "or save to another directory."
            )
        logger.warning_once(f"Waiting for another process that saves to {str(target)!r}.")
        time.sleep(0.05)
    try:
        yield
    finally:
        _let_go(held)


def install() -> None:
    """Makes this the way in which what the package loads is saved."""
    install_saving(whole_directory, check_whole)
