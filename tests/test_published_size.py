"""How much code a published hybrid carries: whoever loads it without the package has it read and run."""

import ast
import io
import tokenize

import aligned_pairs
from carried_kinds import KINDS, joined
from cases import case

from manticore_hf import prune

# The aim is 5,500 lines and 28 files; 6,000 lines with bridges or aligned tokenizers
MOST_FILES = 28
MOST_LINES = {
    "one block, attention only": 4337,
    "one block, a Mamba": 4862,
    "one block, a Mamba-2": 4961,
    "K = 3, one block": 4862,
    "classifier, a Mamba": 4768,
    "online, a Mamba": 5084,
    "bridges, a Mamba": 5550,
    "aligned, attention only": 5999,
    "two blocks, attention only": 4934,
    "two blocks, a Mamba": 5459,
    "pruned, a Mamba": 5500,
    "K = 3, two blocks": 5459,
    # Above the aim, each by the sum of what it is made of
    "two blocks, a Mamba-2": 5558,
    "two blocks, gate_lag": 5555,
    "two blocks, past losses": 5681,
    "pruned, a Mamba-2": 5599,
    "aligned, online": 6221,
    "aligned, a Mamba": 6524,
}
SUMS = {
    "two blocks, a Mamba-2": lambda root: joined("gpt_neox", "mamba2", num_blocks=2),
    "two blocks, gate_lag": lambda root: joined("gpt_neox", "mamba", num_blocks=2, gate_lag=4),
    "two blocks, past losses": lambda root: joined("gpt_neox", "mamba", num_blocks=2, gate_past_losses=True),
    "pruned, a Mamba-2": lambda root: prune(joined("gpt_neox", "mamba2", num_blocks=2), ["gpt_neox", "mamba2"]),
    "aligned, online": lambda root: aligned_pairs.hybrid(root, mixture="online"),
    "aligned, a Mamba": lambda root: aligned_pairs.hybrid(root, (("llama", "gpt"), ("mamba", "gemma"))),
}


def statements(text):
    """How many lines hold code: no docstring, comment, blank line or import."""
    text_lines = [range(one.lineno, one.end_lineno + 1) for one in ast.walk(ast.parse(text)) if is_text(one)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    held = {one.start[0] for one in tokens if one.string.strip() and one.type != tokenize.COMMENT}
    return len(held.difference(*text_lines))


def is_text(node):
    """Whether a node is an import, or a string that stands alone."""
    alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, (ast.Import, ast.ImportFrom)) or (alone and isinstance(node.value.value, str))


def test_a_published_hybrid_carries_little_code(tmp_path, capsys):
    found = {}
    for kind, make in {**KINDS, **SUMS}.items():
        make(tmp_path / f"{kind}, parts").save_pretrained(tmp_path / kind)
        files = [file.read_text() for file in (tmp_path / kind).rglob("*.py")]
        found[kind] = len(files), sum(len(text.splitlines()) for text in files), sum(map(statements, files))
    with capsys.disabled():
        print("\n\n| what is published | files | lines | of these code |\n|---|---|---|---|")
        for kind, (files, lines, code) in found.items():
            print(f"| {kind} | {files} | {lines:,} | {code:,} |")
    assert found.keys() == MOST_LINES.keys()
    for kind, (files, lines, _) in found.items():
        with case(kind):
            assert files <= MOST_FILES and lines <= MOST_LINES[kind]
