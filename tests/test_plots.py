"""Drawing leaves what belongs to the user of matplotlib: the backend and the open figures of pyplot."""

import ast
import importlib
import json
import sys
from pathlib import Path

import matplotlib
import pytest
from published import parts, saved  # noqa: F401

import manticore_hf
from manticore_hf import ManticoreForCausalLM, publish

DRAWN = {
    "plot_alpha": ([0, 1, 2], {"alpha/0/a": [0.5, 0.6, 0.7], "alpha/0/b": [0.5, 0.4, 0.3]}),
    "plot_mixture": ([[0.25, 0.75], [1.0, 0.0]], ["a", "b"]),
    "plot_weights": ([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]], ["a", "b"]),
    "plot_losses": ({"hybrid": 1.0, "a": 1.5},),
    "plot_differences": ([{"name": "a", "kind": "single", "difference": 0.1, "difference_interval": [0.0, 0.2]}], "h"),
    "plot_profile": ({"a": {"x": 0.5, "y": 0.7, "z": 1.0}}, {"x": 0.1, "y": 0.1, "z": 0.1}),
}


@pytest.fixture
def notebook():
    """A backend that the user chose: not the one that writes PNG files."""
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    yield "svg"
    matplotlib.use(before)


def test_the_backend_stays_as_the_user_chose_it(notebook, tmp_path):
    name = "manticore_hf.utils.plots"
    before = sys.modules.pop(name, None)
    try:
        plots = importlib.import_module(name)
        assert matplotlib.get_backend() == notebook
        for function, values in DRAWN.items():
            getattr(plots, function)(*values, tmp_path / "new" / f"{function}.png")
            assert (tmp_path / "new" / f"{function}.png").read_bytes().startswith(b"\x89PNG")
        assert matplotlib.get_backend() == notebook
    finally:
        if before is not None:
            sys.modules[name] = before


def test_publishing_draws_and_leaves_the_backend(notebook, saved, hub, owner):  # noqa: F811
    """The mixture, and what the hybrid gains over each baseline on every text where that is known."""
    bits = {"hybrid": 1.0, "costs $5": 1.1, "x" * 300: 0.9}
    known = {"losses": bits, "bits_per_byte": bits, "tokens": 9000, "bytes": 30_000}
    gains = {"differences": {"costs $5": [0.1, 0.05, 0.15], "x" * 300: [-0.1, -0.15, -0.05]}}
    results = [{"data": "unsure", **known}, {"data": "sure", **known, **gains}]
    (saved[1] / "evaluation.json").write_text(json.dumps(results))
    publish(saved[1], f"{owner}/h")
    files = hub.files(f"{owner}/h")
    assert {name for name in files if name.startswith("plots/")} == {"plots/mixture.png", "plots/results_2.png"}
    assert all(files[name].startswith(b"\x89PNG") for name in ("plots/mixture.png", "plots/results_2.png"))
    card = files["README.md"].decode()
    assert card.index("On unsure") < card.index("On sure") < card.index("(plots/results_2.png)")
    assert "results_1" not in card and matplotlib.get_backend() == notebook


def test_of_one_gate_no_heat_map_is_drawn(parts, hub, owner):  # noqa: F811
    publish(ManticoreForCausalLM.from_components(parts, num_blocks=1), f"{owner}/h")
    files = hub.files(f"{owner}/h")
    assert not any(name.startswith("plots/") for name in files) and b"plots/" not in files["README.md"]
    assert "Its token-independent part gives a 0.500, b 0.500." in files["README.md"].decode()


def test_nothing_imports_pyplot():
    for path in Path(manticore_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("pyplot" in name for name in names), path
