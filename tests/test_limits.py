"""The limits that SECURITY.md names are the code's."""

import io
import re
from pathlib import Path

import pytest
from manticore_hf.modeling import saving_manticore

from manticore_hf.compose.convert import gguf_header
from manticore_hf.hub import card_merge, eval_results, inspection, provenance
from manticore_hf.training import recipe
from manticore_hf.utils import defence
from manticore_hf.utils.bounded_yaml import BoundedLoader

SECURITY = (Path(__file__).parent.parent / "SECURITY.md").read_text(encoding="utf-8")


def test_the_table_has_the_numbers_of_the_code():
    plain, d = BoundedLoader("a: 1"), defence
    card = re.search(r"values=(\w+), length=(\w+)", Path(card_merge.__file__).read_text())
    known = {
        "recipe": (recipe._MAX_BYTES, plain.most, plain.deepest, plain.longest),
        "name of a file": (recipe._MAX_PATH,),
        "`config.json`": (d._MAX_VALUES, d._MAX_DEPTH, d._MAX_TEXT, d._MAX_BITS, d._MAX_LIST),
        "a hybrid": (d.MAX_COMPONENTS, d.MAX_LAYERS),
        "a component": (d.MAX_ELEMENTS, d._MAX_TENSORS, round(100 * d._USABLE)),
        "making a model": (4 * d._MAX_TENSORS,),
        "`generation_config.json`": (d._MOST_ROWS,),
        "a header that": (provenance._LARGEST_HEADER,),
        "metadata of a card": (int(card[1]), plain.deepest, int(card[2])),
        "GGUF header": (gguf_header._MOST_FIELDS, gguf_header._MOST_TENSORS, gguf_header._MOST_ELEMENTS),
        "scores": (eval_results._LARGEST, eval_results._MOST_TASKS),
        "waiting": (int(saving_manticore._PATIENCE),),
    }
    table = SECURITY.partition("### Limits")[2].partition("## Fuzzing")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| ")]
    for what, numbers in known.items():
        (said,) = [limit for name, limit in rows if name.startswith(what)]
        said = said.replace("10<sup>12</sup>", "1,000,000,000,000")
        assert tuple(int(one.replace(",", "")) for one in re.findall(r"[\d,]*\d", said)) == numbers, what
    assert inspection._LARGEST_INDEX == provenance._LARGEST_HEADER


def test_long_headers_are_not_read():
    class File(io.BytesIO):
        asked = 0

        def read(self, size=-1):
            self.asked += size
            return super().read(size)

    for length in (provenance._LARGEST_HEADER + 1, 2**63):
        file = File(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match=f"a header of {length} bytes"):
            provenance.read_header(file)
        assert file.asked == 8
