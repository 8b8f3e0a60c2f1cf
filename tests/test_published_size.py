"""How much code a published hybrid carries: whoever loads it without the package has it read and run."""

from hub_models import tiny

from manticore_hf import ComponentSpec, ManticoreForCausalLM

# The aim is 28 files and 5,500 lines
MOST_FILES, MOST_LINES = 25, 6665


def test_a_published_hybrid_carries_little_code(tmp_path, capsys):
    parts = [ComponentSpec(tiny(family), name=family) for family in ("gpt_neox", "mamba")]
    ManticoreForCausalLM.from_components(parts, num_blocks=2).save_pretrained(tmp_path / "hybrid")
    files = {file.name: len(file.read_text().splitlines()) for file in (tmp_path / "hybrid").rglob("*.py")}
    with capsys.disabled():
        print(f"\na published hybrid carries {sum(files.values())} lines of code in {len(files)} files")
    assert len(files) <= MOST_FILES
    assert sum(files.values()) <= MOST_LINES
