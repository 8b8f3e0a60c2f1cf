"""Runs a notebook without Jupyter: its cells in order, in one namespace, with what each shows.

    python tests/notebooks.py examples/tour.ipynb        # runs it and writes its outputs into it

A cell shows what it prints, and the value of its last line: a matplotlib Figure as a picture, others as text.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path

_PLAIN = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources(path):
    """[(kind of cell, its text)]"""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(Path(path).read_text())["cells"]]


def run(path):
    """Runs all cells of code.

    Returns:
        Their outputs in order, as a notebook stores them: [[output, ...], ...].
    """
    names, found = {"__name__": "__main__"}, []
    for number, (kind, text) in enumerate(sources(path)):
        if kind != "code":
            continue
        tree = ast.parse(text, f"{Path(path).name}, cell {number}")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(tree, f"cell {number}", "exec"), names)
            value = None if last is None else eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        outputs = []
        if out.getvalue():
            outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(out.getvalue())})
        if value is not None:
            outputs.append({"data": _shown(value), "metadata": {}, "output_type": "display_data"})
        found.append(outputs)
    return found


def _shown(value):
    if not hasattr(value, "savefig"):
        return {"text/plain": _lines(repr(value))}
    picture = io.BytesIO()
    value.savefig(picture, format="png", dpi=70, metadata={"Software": None})
    return {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}


def _lines(text):
    return text.splitlines(keepends=True)


def write(path, cells, outputs=None):
    """Writes a notebook.

    Args:
        path: Its file.
        cells: [(kind of cell, its text)].
        outputs: Of its cells of code, as `run` gives them.
    """
    left, made = iter(outputs or []), []
    for number, (kind, text) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": _lines(text)}
        made.append(cell if kind != "code" else {**cell, "execution_count": None, "outputs": next(left, [])})
    content = {"cells": made, "metadata": {"kernelspec": _PLAIN}, "nbformat": 4, "nbformat_minor": 5}
    Path(path).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        write(path, sources(path), run(path))
