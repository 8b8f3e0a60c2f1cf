"""The limits that SECURITY.md names are the code's."""

import io
import json
import re
from pathlib import Path

import pytest
from manticore_hf.modeling.bounds_manticore import ManticoreError

from manticore_hf.compose.convert import gguf_header
from manticore_hf.hub import card, card_merge, eval_results, inspection, provenance
from manticore_hf.report.comparison import _MOST_ROWS, read_comparison
from manticore_hf.training import recipe
from manticore_hf.utils import defence, saving
from manticore_hf.utils.bounded_yaml import BoundedLoader

SECURITY = (Path(__file__).parent.parent / "SECURITY.md").read_text(encoding="utf-8")


def test_the_table_has_the_numbers_of_the_code():
    plain, d = BoundedLoader("a: 1"), defence
    cards = re.search(r"values=(\w+), length=(\w+)", Path(card_merge.__file__).read_text())
    known = {
        "recipe": (recipe._MAX_BYTES, plain.most, plain.deepest, plain.longest),
        "name of a file": (recipe._MAX_PATH,),
        "`config.json`": (d._MAX_VALUES, d._MAX_DEPTH, d._MAX_TEXT, d._MAX_BITS, d._MAX_LIST),
        "a hybrid": (d.MAX_COMPONENTS, d.MAX_LAYERS),
        "a component": (d.MAX_ELEMENTS, d._MAX_TENSORS, round(100 * d._USABLE)),
        "building a model": (4 * d._MAX_TENSORS,),
        "`generation_config.json`": (d._MOST_ROWS,),
        "a header that": (provenance._LARGEST_HEADER,),
        "metadata of a card": (int(cards[1]), plain.deepest, int(cards[2])),
        "GGUF header": (gguf_header._MOST_FIELDS, gguf_header._MOST_TENSORS, gguf_header._MOST_ELEMENTS),
        "results": (card._MOST_RESULTS, card._LONGEST_NAME, _MOST_ROWS),
        "scores": (eval_results._LARGEST, eval_results._MOST_TASKS),
        "waiting": (int(saving._PATIENCE),),
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


def test_results_are_as_many_as_people_make(tmp_path):
    """Twenty thousand texts in evaluation.json, or names of megabytes, took minutes in `push` and `report`."""
    one = {"losses": {"hybrid": 1.0, "a": 2.0}}
    many = [{"data": f"x{i}", **one} for i in range(20_000)]
    long = [{"data": "x" * 10**6, **one}, {"data": "y", "losses": {"hybrid": 1.0, "a" * 10**5: 2.0}}]
    long += [{"data": "z", "note": "n" * 10**6, **one}, {"data": "v", "losses": {str(i): 1.0 for i in range(10**4)}}]
    for values, found in ((many, card._MOST_RESULTS), ([*long, {"data": "w", **one}], 1)):
        (tmp_path / "evaluation.json").write_text(json.dumps(values))
        assert len(card.read_results(tmp_path)) == found
    rows = [{"name": f"r{i}", "kind": "single", "loss": 1.0} for i in range(2_000)]
    for some, said in ((rows, "2000 rows, more than 1000"), ([{**rows[0], "name": "x" * 10**6}], "a row has the name")):
        (tmp_path / "comparison.json").write_text(json.dumps({"version": 1, "rows": some, "hybrid": "r0"}))
        with pytest.raises(ManticoreError, match=said) as err:
            read_comparison(tmp_path / "comparison.json")
        assert len(str(err.value)) < 1000
