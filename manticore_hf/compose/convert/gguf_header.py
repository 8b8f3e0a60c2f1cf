"""The header of a GGUF file, read within bounds before any library believes it.

A few bytes can state an array of 2^62 numbers or two billion layers, and the libraries that read GGUF loop over what is
stated. Here every count is compared with the bytes that are there, so that time and memory are bounded by the file.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from manticore_hf.modeling.bounds_manticore import show
from manticore_hf.modeling.settings_manticore import ManticoreError

_MOST_FIELDS, _MOST_TENSORS = 2**16, 2**17
_MOST_ELEMENTS = 2**21  # of all arrays; the library makes an object of several hundred bytes for each
_MOST_DIMS, _MOST_NAME, _MOST_ALIGNMENT = 4, 2**12, 2**20
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


@dataclass
class Header:
    """What the header of a GGUF file states.

    Attributes:
        fields: {key: a number or text; of an array the number of its elements, as a tuple of one}.
        tensors: {name: (dimensions, kind, offset in the data)}.
        begin: Where the data begin, in bytes.
    """

    fields: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    begin: int = 0


class _Reader:
    def __init__(self, data):
        self.data, self.at, self.elements = data, 0, 0

    def take(self, form):
        value = struct.unpack_from(form, self.data, self.at)[0]  # struct.error beyond the end
        self.at += struct.calcsize(form)
        return value

    def skip(self, size):
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes are stated where {len(self.data) - self.at} are left")
        self.at += size

    def text(self, most=None):
        size = self.take("<Q")
        start = self.at
        if most is not None and size > most:
            raise ValueError(f"a name of {size} bytes")
        self.skip(size)
        return self.data[start : self.at].decode("utf-8", "replace")

    def value(self, kind):
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of the unknown kind {kind}")
        kind, count = self.take("<I"), self.take("<Q")
        self.elements += count
        if self.elements > _MOST_ELEMENTS:
            raise ValueError(f"arrays of {self.elements} elements in all; at most {_MOST_ELEMENTS} are read")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _TEXT:
            for _ in range(count):
                self.skip(self.take("<Q"))
        else:
            raise ValueError(f"an array of the kind {kind}")
        return (count,)


def read_header(path: str | os.PathLike, sizes: dict | None = None) -> Header:
    """Reads the header of a GGUF file.

    Args:
        path: The file.
        sizes: {kind of tensor: (elements in a block, bytes of a block)}; then the data of every tensor must be there.

    Raises:
        ValueError: It is none, or states what is not there. (struct.error and IndexError are turned into it.)
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise ValueError("it is shorter than any header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(_Reader(data), sizes)
            except struct.error as err:
                raise ValueError("it ends in its header") from err


def _read(reader, sizes):
    out = Header()
    if reader.take("4s") != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := reader.take("<I")) not in (2, 3):
        raise ValueError(f"its version is {version}, known are 2 and 3 in little-endian order")
    tensors, fields = reader.take("<Q"), reader.take("<Q")
    if tensors > _MOST_TENSORS or fields > _MOST_FIELDS:
        raise ValueError(f"it states {tensors} tensors and {fields} fields")
    for _ in range(fields):
        key = reader.text(_MOST_NAME)
        out.fields[key] = reader.value(reader.take("<I"))
    for _ in range(tensors):
        name, count = reader.text(_MOST_NAME), reader.take("<I")
        if count > _MOST_DIMS:
            raise ValueError(f"a tensor of {count} dimensions")
        dims = tuple(reader.take("<Q") for _ in range(count))
        out.tensors[name] = dims, reader.take("<I"), reader.take("<Q")
    step = out.fields.get("general.alignment", 32)
    if type(step) is not int or not 0 < step <= _MOST_ALIGNMENT or step & (step - 1):
        raise ValueError(f"its alignment is {show(step)}")
    out.begin = (reader.at + step - 1) // step * step
    for name, (dims, kind, offset) in out.tensors.items() if sizes is not None else ():
        if kind not in sizes:
            raise ValueError(f"the tensor {name!r} is of the unknown kind {kind}")
        block, size = sizes[kind]
        if out.begin + offset + math.prod(dims) * size // block > len(reader.data):
            raise ValueError(f"the tensor {name!r} of shape {dims} is not in the file")
    return out


def check_header(what: str, path: str | os.PathLike, sizes: dict) -> Header:
    """`read_header`, with the sizes that it states compared with the tensors that it has.

    Args:
        what: What messages call the checkpoint.
        path: The file.
        sizes: As for `read_header`.

    Raises:
        ManticoreError: It is no GGUF file, or states sizes that no model in it has.
    """
    name = Path(path).name
    try:
        header = read_header(path, sizes)
    except (ValueError, OSError) as err:
        raise ManticoreError(f"{what}: {name} is not a readable GGUF file ({err}); fetch it again.") from err
    kind = header.fields.get("general.architecture")
    if not isinstance(kind, str):
        raise ManticoreError(f"{what}: {name} does not say its architecture (general.architecture); fetch it again.")
    widest = max((dim for dims, *_ in header.tensors.values() for dim in dims), default=0)
    for key, most in (("block_count", len(header.tensors)), ("embedding_length", widest)):
        value = header.fields.get(f"{kind}.{key}")
        if type(value) is not int or not 0 < value <= most:
            raise ManticoreError(
                f"{what}: {name} states {show(f'{kind}.{key}')}={show(value)}; by the tensors that it has, it is in "
                f"[1, {most}]. Do not use it, or fetch it again."
            )
    return header
