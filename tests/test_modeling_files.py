"""The files that repositories carry: what they may import, and what importing the package does with their classes."""

import ast
import sys
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import manticore_hf
from manticore_hf import modeling

CODE = Path(modeling.__file__).parent
FILES = sorted(CODE.glob("*.py"))


def imports(file):
    """(module, level) of every import statement of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node.level


def test_modeling_imports_only_what_every_user_has():
    with_transformers = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy"}
    optional = {"numba", "triton"}  # found at run time, never required
    allowed = {*with_transformers, *optional, *sys.stdlib_module_names}
    for file in FILES:
        for module, level in imports(file):
            if level == 0:
                assert module.split(".")[0] in allowed, f"{file.name} imports {module}"
            else:
                assert level == 1 and module and "." not in module, f"{file.name}: only `from .x import y` is portable"
                assert (CODE / f"{module}.py").is_file()
        assert "manticore_hf" not in {module.split(".")[0] for module, level in imports(file) if level == 0}


def test_imports_run_one_way():
    graph = {file.stem: {module for module, level in imports(file) if level} for file in FILES}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_no_class_of_ours_is_asked_for_by_isinstance_alone():
    """The configuration and the model may come from different copies of these files (different dynamic modules)."""
    shared = {"ManticoreConfig", "ComponentSpec", "ManticoreCache"}
    for file in FILES:
        for line in file.read_text().splitlines():
            if "isinstance(" in line and any(name in line for name in shared):
                assert "__name__" in line, f"{file.name}: {line.strip()}"


def test_importing_the_package_registers_the_classes():
    config = AutoConfig.for_model("manticore")
    assert type(config) is manticore_hf.ManticoreConfig
    assert AutoModel._model_mapping[type(config)] is manticore_hf.ManticoreModel
    assert AutoModelForCausalLM._model_mapping[type(config)] is manticore_hf.ManticoreForCausalLM
    classes = (manticore_hf.ManticoreForSequenceClassification, manticore_hf.ManticoreForTokenClassification)
    assert AutoModelForSequenceClassification._model_mapping[type(config)] is classes[0]
    assert AutoModelForTokenClassification._model_mapping[type(config)] is classes[1]
