"""Writing a directory whole or not at all, with the code that a hybrid needs to load elsewhere."""

import contextlib
import getpass
import glob
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

_WEIGHT_FILE = re.compile(r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?")


def copy_code(directory: str | os.PathLike) -> None:
    """Copies the code files of this folder, so that the saved hybrid loads where the package is not installed."""
    for file in Path(__file__).parent.glob("*_manticore.py"):
        shutil.copyfile(file, Path(directory) / file.name)


@contextlib.contextmanager
def whole_directory(target: str | os.PathLike, active: bool) -> Iterator[str]:
    """Gives a scratch directory whose files are moved into `target` when the block ends well.

    A new target appears by one rename. In an existing one each file is replaced whole, config.json last; its other
    files stay, but for weights of an earlier save. Of several processes one after the other moves its files.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target.parent
    # Renaming works within one file system only, and `target` may be a mounted one.
    if target.exists() and (target.stat().st_dev != place.stat().st_dev or not os.access(place, os.W_OK)):
        place = target
    prefix = f".{target.name}.saving-{platform.node()}-"
    _clean_up(place, prefix)
    scratch = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place))
    try:
        inner = scratch / target.name
        inner.mkdir()
        yield str(inner)
        if not active:
            return
        name = hashlib.sha256(f"{getpass.getuser()}:{target}".encode()).hexdigest()[:24]
        # Among the processes of this machine and user; it leaves no file beside the directory
        with WeakFileLock(os.path.join(tempfile.gettempdir(), f"manticore-{name}.lock")):
            _move(inner, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(inner, target):
    if not target.exists():
        os.replace(inner, target)
        return
    fresh = {file.name for file in inner.iterdir()}
    for file in sorted(inner.iterdir(), key=lambda f: (f.name == "config.json", f.name)):
        if file.is_dir():
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)
        else:
            os.replace(file, target / file.name)
    variants = {match[1] for name in fresh if (match := _WEIGHT_FILE.fullmatch(name))}
    for file in list(target.iterdir()):
        match = _WEIGHT_FILE.fullmatch(file.name)
        if match and match[1] in variants and file.name not in fresh:
            file.unlink()


def _clean_up(place, prefix):
    """Removes what killed processes of this machine left in `place`."""
    if os.name != "posix":  # elsewhere os.kill(pid, 0) is no mere question
        return
    for stale in place.glob(glob.escape(prefix) + "*"):
        pid = stale.name[len(prefix) :].split("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(stale, ignore_errors=True)
        except (ValueError, OverflowError, PermissionError):
            continue
