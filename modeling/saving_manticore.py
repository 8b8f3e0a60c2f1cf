"""Writing a directory whole or not at all, with the code that a hybrid needs to load elsewhere.

Over an existing directory one rename makes the difference, that of a note (`.saving`) which names the complete new
files: before it the old ones count, after it the new ones. Whoever finds the note, because a process was killed while
it moved them, moves the rest.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import logging

from .settings_manticore import ManticoreError

try:
    import fcntl
except ImportError:  # not on Windows: nothing is locked there, and nothing of other processes removed
    fcntl = None

logger = logging.get_logger(__name__)

_NOTE = ".saving"
_PATIENCE = 600.0  # seconds that another process may take to move its files
_WEIGHT_FILE = re.compile(r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?")


BESIDE = []
"""What other files write beside a hybrid's weights: functions of (model, directory)."""

CODE = re.compile(r"\w+_manticore\.py|aligned_\w+\.py|past_losses\.py")
"""Names of the code files of a hybrid; others than *_manticore.py are carried by hybrids that need them."""


def copy_code(directory: str | os.PathLike, config: PreTrainedConfig | None = None) -> None:
    """Copies the code files that a hybrid needs, so that what is saved loads where the package is not installed."""
    aligned, past = bool(config and config.aligned), bool(config and config.reads_past_losses)
    for file in Path(__file__).parent.glob("*.py"):
        needed = aligned or (past and not file.name.startswith("aligned_")) or file.name.endswith("_manticore.py")
        if CODE.fullmatch(file.name) and needed:
            shutil.copyfile(file, Path(directory) / file.name)


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
    place = target.parent
    # Renaming works within one file system only, and `target` may be a mounted one.
    if target.exists() and (target.stat().st_dev != place.stat().st_dev or not os.access(place, os.W_OK)):
        place = target
    _clean_up(place, target)
    scratch, held = _make_scratch(place, target)
    try:
        inner = scratch / target.name
        inner.mkdir()
        yield str(inner)
        if active:
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
    if not os.path.lexists(target / _NOTE):
        return True
    same = _promised(target)[2]
    with contextlib.suppress(OSError), _one_at_a_time(target):  # it may not be ours to write
        _finish(target)
    done = not os.path.lexists(target / _NOTE)
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
        files = sorted(file.relative_to(inner).as_posix() for file in inner.rglob("*") if file.is_file())
        if not all(_is_below(target, name) for name in files):
            raise ManticoreError(f"{str(target)!r} has a folder that is a link out of it; remove the link, then save.")
        note = inner.with_name(_NOTE)
        at = Path(os.path.relpath(inner, target)).as_posix()
        both = [folder / "config.json" for folder in (inner, target)]
        same = all(map(Path.is_file, both)) and both[0].read_bytes() == both[1].read_bytes()
        note.write_text(json.dumps({"from": at, "files": files, "same": same}), encoding="utf-8")
        os.replace(note, target / _NOTE)
        _finish(target)


def _finish(target):
    """Moves what the note of a directory promises; False if that is not there (any more)."""
    inner, files, _ = _promised(target)
    if inner is None or not inner.is_dir():  # what is missing there has been moved
        return False
    for name in files:
        if (inner / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(inner / name, target / name)
    variants = {match[1] for name in files if (match := _WEIGHT_FILE.fullmatch(name))}
    for file in list(target.iterdir()):
        match = _WEIGHT_FILE.fullmatch(file.name)
        if match and match[1] in variants and file.name not in files:
            file.unlink()
    (target / _NOTE).unlink(missing_ok=True)
    return True


def _promised(target):
    """(scratch directory, files, whether config.json stays as it is) of a directory's note, if there is one."""
    try:
        note = json.loads((target / _NOTE).read_text(encoding="utf-8"))
        place, files = note["from"].removeprefix("../"), note["files"]
        inner = target / note["from"]
        # It may be a stranger's directory: nothing is moved but from scratch directories of this one.
        ours = place.startswith(_prefix(target)) and place.split("/")[1:] == [target.name]
        ours = ours and not os.path.islink(inner) and not os.path.islink(inner.parent)
        ours = ours and isinstance(files, list) and len(files) < 10_000
        plain = ours and all(_is_below(root, name) for name in files for root in (inner, target))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, [], False
    return (inner, files, note.get("same") is True) if plain else (None, [], False)


def _is_below(root, name):
    """Whether a file of that name is in a directory, also where folders on the way are links."""
    return (
        Path(os.path.realpath((root / name).parent)).is_relative_to(os.path.realpath(root)) and Path(name).name != ".."
    )


def _is_promised(scratch, target):
    inner = _promised(target)[0]
    return inner is not None and os.path.realpath(inner.parent) == os.path.realpath(scratch)


def _prefix(target):
    """How the scratch directories of a target begin; a file system allows a name 255 bytes."""
    name = target.name
    return f".{name if len(os.fsencode(name)) < 100 else hashlib.sha256(os.fsencode(name)).hexdigest()[:24]}.saving-"


def _make_scratch(place, target):
    """(scratch directory, what holds it)."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=place))
        held = _hold(scratch)
        if held is not False and scratch.is_dir():  # else another process took it for a dead one's
            return scratch, held
        _let_go(held)


def _clean_up(place, target):
    """Removes what killed processes left in `place`: a living one, in whatever container, holds its own."""
    for stale in place.glob(glob.escape(_prefix(target)) + "*"):
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
