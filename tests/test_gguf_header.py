"""GGUF headers that state what is not there: an answer within seconds, and memory bounded by the file."""

import struct
import time

import pytest
from fuzz_hour import forget_peak, peak

from manticore_hf import ManticoreError, cli
from manticore_hf.compose.convert import gguf_header
from manticore_hf.compose.convert.gguf_header import check_header, read_header

SIZES = {0: (1, 4), 8: (32, 34)}  # float32, Q8_0


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def field(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def number(key, value):
    return field(key, 4, struct.pack("<I", value))


def array(key, kind, count, content=b""):
    return field(key, 9, struct.pack("<IQ", kind, count) + content)


def tensor(name, dims, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(*fields, tensors=(), data=b"", counts=None, version=3):
    found = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, *found) + b"".join([*fields, *tensors])
    return head + b"\0" * (-len(head) % 32) + data


LLAMA = field("general.architecture", 8, text("llama"))
GOOD = [LLAMA, number("llama.block_count", 1), number("llama.embedding_length", 4)]
TENSORS = [tensor("a", (4, 2)), tensor("b", (4,), offset=32)]
DATA = b"\0" * 64


@pytest.fixture
def written(tmp_path):
    def write(content):
        (tmp_path / "x.gguf").write_bytes(content)
        return tmp_path / "x.gguf"

    return write


def test_what_a_header_says(written):
    more = [array("tokenizer.tokens", 8, 2, text("a") + text("bc")), array("y", 5, 3, b"\0" * 12)]
    header = read_header(written(gguf(*GOOD, *more, tensors=TENSORS, data=DATA)), SIZES)
    assert header.fields == {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 4,
        "tokenizer.tokens": (2,),
        "y": (3,),
    }
    assert header.tensors == {"a": ((4, 2), 0, 0), "b": ((4,), 0, 32)} and header.begin % 32 == 0
    assert check_header("x", written(gguf(*GOOD, tensors=TENSORS, data=DATA)), SIZES).tensors == header.tensors


def bombs():
    """{what: (bytes, message)}."""
    good, tensors = GOOD, TENSORS
    return {
        "an array of 2^62 numbers": (gguf(LLAMA, array("x", 0, 2**62)), "elements in all"),
        "an array of 2^62 texts": (gguf(LLAMA, array("x", 8, 2**62)), "elements in all"),
        "an array of more than there is": (gguf(LLAMA, array("x", 10, 2**20)), "are left"),
        "many arrays": (gguf(*[array(f"x{i}", 0, 2**20, b"") for i in range(9)]), "are left"),
        "arrays of arrays": (gguf(LLAMA, array("x", 9, 1, struct.pack("<IQ", 9, 2**62))), "array of the kind 9"),
        "an unknown kind": (gguf(field("x", 99, b"")), "unknown kind 99"),
        "a text of 2^63": (gguf(field("x", 8, struct.pack("<Q", 2**63))), "are left"),
        "a name of 2^60": (gguf(struct.pack("<Q", 2**60)), "a name of"),
        "2^60 fields": (gguf(counts=(0, 2**60)), "it states"),
        "2^60 tensors": (gguf(counts=(2**60, 0)), "it states"),
        "no fields there": (gguf(counts=(0, 3)), "ends in its header|are left|a name of"),
        "a tensor of 2^31 dimensions": (gguf(*good, tensors=[text("a") + struct.pack("<I", 2**31)]), "dimensions"),
        "a tensor of 2^62 numbers": (gguf(*good, tensors=[tensor("a", (2**31, 2**31))]), "not in the file"),
        "a tensor elsewhere": (gguf(*good, tensors=[tensor("a", (4,), offset=2**60)], data=DATA), "not in the file"),
        "an unknown kind of tensor": (gguf(*good, tensors=[tensor("a", (4,), 77)], data=DATA), "unknown kind 77"),
        "alignment 0": (gguf(number("general.alignment", 0)), "alignment"),
        "alignment 2^31": (gguf(number("general.alignment", 2**31)), "alignment"),
        "another version": (gguf(LLAMA, version=99), "version is 99"),
        "other bytes": (b"GGML" + b"\0" * 99, "does not begin with GGUF"),
        "nothing": (b"", "shorter than any header"),
        "block_count 2^31-1": (gguf(LLAMA, number("llama.block_count", 2**31 - 1), good[2]), "block_count'=2147483647"),
        "no block_count": (gguf(LLAMA, good[2], tensors=tensors, data=DATA), "block_count'=None"),
        "no embedding_length": (gguf(*good[:2], tensors=tensors, data=DATA), "embedding_length'=None"),
        "a width that no tensor has": (
            gguf(*good[:2], number("llama.embedding_length", 2**20), tensors=tensors, data=DATA),
            "embedding_length'=1048576",
        ),
        "no architecture": (gguf(*good[1:], tensors=tensors, data=DATA), "does not say its architecture"),
        "an architecture that is none": (gguf(number("general.architecture", 3)), "does not say its architecture"),
    }


def test_bombs_are_answered_at_once(written):
    forget_peak()
    before, start = peak(), time.process_time()
    for what, (content, message) in bombs().items():
        assert len(content) < 1000
        with pytest.raises(ManticoreError, match=message):
            check_header("x", written(content), SIZES)
            pytest.fail(what)
    assert peak() - before < 200_000_000
    assert time.process_time() - start < 10


def test_convert_says_so(written, tmp_path, capsys):
    pytest.importorskip("gguf")
    for content, _ in bombs().values():
        assert cli.main(["convert", str(written(content)), "--output-dir", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "manticore-hf convert: " in said and "x.gguf" in said and "Traceback" not in said
        assert not (tmp_path / "out").exists()


def test_sizes_beyond_the_numbers_in_the_file(tmp_path, capsys):
    """What the configuration takes from defaults (an embedding of 151,936 rows, ...) is compared with the file."""
    pytest.importorskip("gguf")
    for name in ("llama", "qwen2", "gpt2"):
        fields = [
            field("general.architecture", 8, text(name)),
            number(f"{name}.block_count", 2),
            number(f"{name}.embedding_length", 4),
            field("general.name", 8, text("x")),
        ]
        (tmp_path / "x.gguf").write_bytes(gguf(*fields, tensors=TENSORS, data=DATA))
        assert cli.main(["convert", str(tmp_path / "x.gguf"), "--output-dir", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "its configuration asks for" in said or "cannot be built" in said or "cannot read" in said, said


def test_licence_texts_are_no_licence_names(tmp_path, capsys):
    gguf_tests = pytest.importorskip("test_convert_gguf")
    evil = "mit\n---\n# Evil\n<script>alert(1)</script>\x1b[2J"
    for license in (evil, "x" * 5000, "a\x1b]0;x\x07"):
        (tmp_path / "model").mkdir(exist_ok=True)
        model = gguf_tests.tiny("llama", **gguf_tests.SIZES)
        path = tmp_path / "model" / "t [x](y)\x1b[2J.gguf"
        writer = gguf_tests.gguf.GGUFWriter
        add = writer.add_string

        def other(self, key, value, license=license, add=add):
            add(self, key, license if key == "general.license" else value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "add_string", other)
            gguf_tests.write(path, model)
        assert gguf_header.read_header(path).fields["general.license"] == license
        out = tmp_path / f"out{len(license)}"
        assert cli.main(["convert", str(path), "--output-dir", str(out)]) == 0
        card, printed = (out / "README.md").read_text(), capsys.readouterr().out
        assert "Licence, as stated there: none" in card and "license:" not in card
        assert "\x1b" not in card + printed and "Evil" not in card + printed and "[x](y)" not in card
        path.unlink()
