"""How much code a published hybrid carries: whoever loads it without the package has it read and run."""

from carried_kinds import KINDS
from cases import case

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
    "aligned, attention only": 6000,
    "two blocks, attention only": 4934,
    "two blocks, a Mamba": 5459,
    "pruned, a Mamba": 5500,
    "K = 3, two blocks": 5459,
}


def test_a_published_hybrid_carries_little_code(tmp_path, capsys):
    found = {}
    for kind, make in KINDS.items():
        make(tmp_path / f"{kind}, parts").save_pretrained(tmp_path / kind)
        files = [len(file.read_text().splitlines()) for file in (tmp_path / kind).rglob("*.py")]
        found[kind] = len(files), sum(files)
    with capsys.disabled():
        print("\n\n| what is published | files | lines |\n|---|---|---|")
        for kind, (files, lines) in found.items():
            print(f"| {kind} | {files} | {lines:,} |")
    assert found.keys() == MOST_LINES.keys()
    for kind, (files, lines) in found.items():
        with case(kind):
            assert files <= MOST_FILES and lines <= MOST_LINES[kind]
