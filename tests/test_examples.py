"""The examples run as they stand, on what ships with the package; the notebook from its first cell to its last."""

import ast
import base64
import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import notebooks
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from manticore_hf.demo import text

EXAMPLES = Path(__file__).parent.parent / "examples"
# Smaller than what they do by themselves
SETTINGS = {
    "compose": ["--rows", "4"],
    "lora": ["--rows", "8", "--rank", "2"],
    "publish": ["--owner", "examples", "--rows", "12"],  # with an owner it takes the Hub of the environment
    "sft": ["--examples", "8"],
    "train": ["--rows", "8"],
}
# The colours that stand for something: hybrids and their baselines; how sure a difference is; two components' weights
BARS, POINTS, WEIGHTS = ("tab:orange", "tab:gray"), ("tab:gray", "black"), ("tab:blue", "tab:orange")
DRAWN_IN = {"compose": BARS, "lora": BARS, "publish": POINTS, "sft": WEIGHTS, "train": BARS}
BASELINES = {"neox_prose", "mamba_code", "ensemble", "mixture"}


@pytest.fixture(scope="module")
def less_text():
    """Reading the whole standard library takes ten seconds; forty of its modules do."""
    sources, left = text._sources, {"train": 20, "test": 20}

    def some(root):
        for module, source in sources(root):
            split = text.split_of(module)
            if left.get(split, 0):
                left[split] -= 1
                yield module, source

    with pytest.MonkeyPatch.context() as patch:
        text._corpus.cache_clear()
        patch.setattr(text, "_sources", some)
        yield
        text._corpus.cache_clear()


def run(name, monkeypatch, folder):
    """What a script prints, and the losses in it: [{model: loss} of each line that has some]."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{name}.py"), *SETTINGS[name]])
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(sys.argv[0], run_name="__main__")
    lines = [line for line in out.getvalue().splitlines() if "nats per token: " in line]
    return out.getvalue(), [
        {name: float(loss) for name, loss in re.findall(r"(\w+) (\d+\.\d{4})", line.partition(": ")[2])}
        for line in lines
    ]


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("name", SETTINGS)
def test_an_example(name, less_text, monkeypatch, tmp_path):
    printed, losses = run(name, monkeypatch, tmp_path)
    assert losses and all(set(found) == {"hybrid", *BASELINES} for found in losses)
    first, last = losses[0], losses[-1]
    (picture,) = re.findall(r"^drawn: (.*)$", printed, re.MULTILINE)
    assert picture == f"{name}.png" and is_drawn((tmp_path / picture).read_bytes(), DRAWN_IN[name])
    if name == "compose":
        assert last["hybrid"] == pytest.approx(last["ensemble"], abs=0.1) and "def close(self):" in printed
    elif name == "publish":
        size = int(re.search(r"@[0-9a-f]{7}: ([\d,]+) bytes", printed)[1].replace(",", ""))
        assert size < 20_000  # the components are referenced: their weights have four million bytes each
    elif name == "sft":  # a step of everything; what it learns of eight examples says nothing
        assert all(0 < abs(last[key] - first[key]) < 0.1 for key in last)
    else:
        assert last["hybrid"] < first["hybrid"]
    if name == "train":  # the gate first: it is no part of the components
        assert losses[1]["hybrid"] < first["hybrid"]
        assert {key: losses[1][key] for key in BASELINES} == {key: first[key] for key in BASELINES}
    if name == "lora":
        assert 10_000 < int(re.search(r"adapter: ([\d,]+) bytes", printed)[1].replace(",", "")) < 400_000


def is_drawn(data, colours):
    """Whether an image has width, text beside its marks, and enough of each of some colours to be seen."""
    with Image.open(io.BytesIO(data)) as picture:
        found = {colour[:3]: count for count, colour in picture.convert("RGB").getcolors(1 << 20)}
    wanted = [tuple(round(255 * part) for part in to_rgb(colour)) for colour in colours]
    return picture.size[0] > 400 and len(found) > 20 and all(found.get(colour, 0) > 100 for colour in wanted)


def test_a_blank_sheet_is_no_picture():
    blank = io.BytesIO()
    Image.new("RGB", (800, 300), "white").save(blank, "png")
    assert not is_drawn(blank.getvalue(), ("white",)) and not is_drawn(blank.getvalue(), BARS)


def test_they_open_with_their_command_and_are_short():
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert [script.stem for script in scripts] == sorted(SETTINGS)
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        command = ast.get_docstring(ast.parse(text)).splitlines()[0]
        assert shlex.split(command) == ["python", f"examples/{script.name}"]
        assert 25 <= len(text.splitlines()) <= 60


def stored():
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]


def kinds(outputs):
    return [sorted(output.get("data", {output["output_type"]: None})) for output in outputs]


def test_the_notebook_is_small_and_has_its_outputs(tmp_path):
    assert all(stored())
    pictures = [one["data"]["image/png"] for cell in stored() for one in cell if "image/png" in one.get("data", {})]
    for picture, other in zip(pictures, ("#9aa5b1", "#9aa5b1", "#c9a227"), strict=True):  # baselines; a component
        assert is_drawn(base64.b64decode(picture), (other, "#2f6f9f"))
    assert (EXAMPLES / "tour.ipynb").stat().st_size < 150_000
    path = tmp_path / "made.ipynb"
    notebooks.write(path, [("markdown", "# A"), ("code", "a = 1\nprint(a)\na + 1"), ("code", "a = 3")])
    assert [kinds(outputs) for outputs in notebooks.run(path)] == [[["stream"], ["text/plain"]], []]
    notebooks.write(path, notebooks.sources(path), notebooks.run(path))
    assert json.loads(path.read_text())["cells"][1]["outputs"][1]["data"] == {"text/plain": ["2"]}


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom():
    found = notebooks.run(EXAMPLES / "tour.ipynb")
    assert [kinds(outputs) for outputs in found] == [kinds(outputs) for outputs in stored()]
    assert "equal to the last bit: True" in "".join(found[-1][0]["text"])
