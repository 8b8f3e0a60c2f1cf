"""How much code a published hybrid carries: whoever loads it without the package has it read and run."""

from carried_kinds import KINDS
from cases import case

# The aim is 5,500 lines and 28 files; 6,000 lines with bridges or aligned tokenizers
MOST_FILES = 28
MOST_LINES = {
    "one block, attention only": 4335,
    "one block, a Mamba": 4860,
    "one block, a Mamba-2": 4959,
    "K = 3, one block": 4860,
    "classifier, a Mamba": 4765,
    "online, a Mamba": 5082,
    "bridges, a Mamba": 5548,
    "aligned, attention only": 5998,
    "two blocks, attention only": 4932,
    "two blocks, a Mamba": 5457,
    "pruned, a Mamba": 5498,
    "K = 3, two blocks": 5457,
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
