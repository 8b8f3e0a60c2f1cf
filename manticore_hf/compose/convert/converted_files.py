"""GGUF files as components: converted once, in the hybrid's own directory.

manticore-hf compose smollm2.Q4_K_M.gguf gemma.gguf --output-dir pair     # pair/_converted/smollm2, .../gemma
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manticore_hf.compose.components import ComponentSpec, resolve
from manticore_hf.compose.convert.convert import convert
from manticore_hf.compose.convert.gguf import read_gguf_header
from manticore_hf.compose.convert.read_checkpoint import is_gguf
from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.files import read_json, write_json

CONVERTED = "_converted"  # in a hybrid's directory; what begins with an underscore is not published
_QUANTISED = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)


def convert_files(sources: Sequence[Any], output_dir: str | os.PathLike) -> list[Any]:
    """Components with each GGUF file replaced by the directory that it was converted to, below a hybrid's.

    What an earlier call has converted is not converted again. Converting takes minutes: that all components are there
    is checked first.

    Args:
        sources: Components as a user names them.
        output_dir: The hybrid's directory.

    Returns:
        The components: directories in the place of files, the rest as it was.

    Raises:
        ManticoreError: A file cannot be converted, two are of one name, or another one of that name was converted here.
    """
    files, places = [source for source in sources if is_gguf(source)], {}
    for other in sources if files else ():
        if other not in files:
            resolve(ComponentSpec.of(other), {})
    for file in files:
        if not converted(file, output_dir).is_dir():
            read_gguf_header(f"The checkpoint {os.fspath(file)!r}", file)
        other = places.setdefault(converted(file, output_dir), file)
        if os.path.realpath(other) != os.path.realpath(file):
            raise ManticoreError(
                f"{other} and {file} are files of one name, by which hybrids tell their components apart: rename one, "
                "or give a link to it that has another name."
            )
    return [str(_convert(one, converted(one, output_dir))) if is_gguf(one) else one for one in sources]


def converted(source: str | os.PathLike, output_dir: str | os.PathLike) -> Path:
    """The directory that `convert_files` makes of a GGUF file: its name, without what says how it is quantised.

    Args:
        source: The file.
        output_dir: The hybrid's directory.
    """
    return Path(output_dir) / CONVERTED / _QUANTISED.sub("", Path(source).stem)


def convert_again(folder: str | os.PathLike) -> Path | None:
    """A directory that `convert_files` has made, made again if it was deleted since.

    Args:
        folder: The directory.

    Returns:
        The directory; None where it is gone, and the file is gone or is another one by now.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    note = _note_of(folder)
    source = read_json(note).get("file") if note.is_file() else None
    same = is_gguf(source) and read_json(note) == _origin(source)
    return _convert(source, folder) if same else None


def _convert(source, folder):
    origin, note = _origin(source), _note_of(folder)
    if folder.is_dir():
        before = read_json(note) if note.is_file() else {}
        if before != origin:
            raise ManticoreError(
                f"{folder} was converted from {before.get('file', 'another file')}; {source} is another one, or it has "
                "changed: delete that directory, or give another --output-dir."
            )
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, origin)
    print(f"Converting {source} to {folder}", flush=True)
    if (said := convert(source, folder)["note"]) is not None:
        print(f"Note: {source}: {said}", file=sys.stderr, flush=True)
    return folder


def _note_of(folder):
    return folder.with_name(f"{folder.name}.json")


def _origin(source):
    stat = os.stat(source)
    return {"file": os.path.realpath(source), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
