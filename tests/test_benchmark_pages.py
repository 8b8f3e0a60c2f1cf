"""BENCHMARKS.md and docs/benchmarks/: their numbers are those of the results, and what they name is there.

The checks of links, tables, commands and paths are those of tests/test_docs.py.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_docs

from manticore_hf.utils import objective

ROOT = Path(__file__).parent.parent
FRONT, LOG = ROOT / "BENCHMARKS.md", ROOT / "docs" / "benchmarks" / "log.md"
THEMES = sorted(set((ROOT / "docs" / "benchmarks").glob("*.md")) - {LOG})
PAGES = [FRONT, *THEMES]
MADE = [*PAGES, ROOT / "README.md", ROOT / "docs" / "scaling.md"]


@pytest.fixture(scope="module")
def tables():
    """benchmarks/tables.py and what it imports, which lie beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import tables
        from page_numbers import training

        yield tables, training


@pytest.fixture
def copy(tmp_path):
    """The pages and all that they are made of, to be changed."""
    for folder in ("benchmarks", "docs/benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.png", "__pycache__"))
    for file in ("README.md", "BENCHMARKS.md", "docs/scaling.md", "manticore_hf/families/families.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    return tmp_path


def run(root, *arguments):
    """Runs a tree's own script: (exit status, what it printed)."""
    command = [sys.executable, str(root / "benchmarks" / "tables.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def texts(root):
    return {path.name: path.read_text(encoding="utf-8") for path in (root / p.relative_to(ROOT) for p in MADE)}


def without_made(text):
    """A page without what benchmarks/tables.py writes, and without code."""
    text = re.sub(r"<!-- table: .*?<!-- end -->|<!--=.*?<!--/-->", "", text, flags=re.DOTALL)
    return re.sub(r"^```.*?^```|`[^`]+`", "code", text, flags=re.DOTALL | re.MULTILINE)


def test_the_pages_are_up_to_date():
    assert run(ROOT, "--check") == (0, "")


def test_a_typed_number_is_noticed_and_written_over(copy):
    before = texts(copy)
    page = copy / "docs" / "benchmarks" / "quality.md"
    for made in (r"(<!--=two-60k.gain-->)[^<]+", r"(<!-- table: study -->(?:\n.*){3}?\| two-60k )\| [\d.]+"):
        text, changed = re.subn(made, r"\g<1>| 9.999", before["quality.md"], count=1)
        assert changed and text != before["quality.md"]
        page.write_text(text)
        status, says = run(copy, "--check")
        assert status == 1 and says.split()[0] == "docs/benchmarks/quality.md"
        assert page.read_text() == text  # --check writes nothing
        assert run(copy)[0] == 0
        assert texts(copy) == before


def test_a_changed_result_is_noticed_on_every_page_that_has_it(copy):
    result = copy / "benchmarks" / "results" / "study" / "two-60k.json"
    data = json.loads(result.read_text())
    (own,) = (row for row in data["rows"] if row["name"] == "hybrid, 1 block")
    assert f"{own['loss']:.3f}" != "1.234"
    own["loss"] = 1.2341
    result.write_text(json.dumps(data))
    before = texts(copy)
    status, says = run(copy, "--check")
    assert status == 1 and [line.split()[0] for line in says.splitlines()] == [
        "BENCHMARKS.md",
        "docs/benchmarks/quality.md",
    ]
    assert run(copy)[0] == 0 and run(copy, "--check") == (0, "")
    changed = {name for name, text in texts(copy).items() if text != before[name]}
    assert changed == {"BENCHMARKS.md", "quality.md"}
    assert all("| **1.234** |" in texts(copy)[name] for name in changed)


def test_what_cannot_be_made_is_said_and_nothing_is_written(copy):
    front = copy / "BENCHMARKS.md"
    was = front.read_text()
    for wrong, says in (
        (was.replace("<!-- table: study-short -->", "<!-- table: nothing -->"), "'nothing'"),
        (was.replace("<!--=retrain.loss-->", "<!--=retrain.lots-->"), "'retrain.lots'"),
        (was.replace("<!-- end -->", ""), "has no end"),
        (was.replace("<!--/-->", "", 1), "has no end"),
    ):
        assert wrong != was
        front.write_text(wrong)
        for arguments in ((), ("--check",)):
            status, said = run(copy, *arguments)
            assert status == 1 and says in said and "Traceback" not in said
        assert front.read_text() == wrong
    front.write_text(was)
    (copy / "benchmarks" / "results" / "speed.json").unlink()
    status, said = run(copy, "--check")
    assert status == 1 and "There is no result 'speed'" in said and "Traceback" not in said


def test_every_table_is_on_a_page(tables):
    shown = [name for page in MADE for name in re.findall(r"<!-- table: (\S+) -->", page.read_text())]
    assert sorted(shown) == sorted(tables[0].TABLES)


def test_no_number_is_typed():
    """In a table none at all, but in names; in prose none with a decimal point, but versions of Transformers."""
    for page in PAGES:
        text = without_made(page.read_text(encoding="utf-8"))
        for rows in test_docs.tables(text):
            for cell in (cell for row in rows[2:] for cell in row):
                cell = re.sub(r"\]\([^)]*\)", "]", cell)
                assert not re.search(r"(?<![\w-])\d+(?!\w)", re.sub(r"5\.2\d", "", cell)), f"{page.name}: {cell}"
        prose = re.sub(r"5\.2\d|SmolLM2-\d+M|\(0\.3, 1\)", "", text)
        assert not re.search(r"(?<![\w.])\d+\.\d+", prose), page.name


BASELINES = {
    "study": "ensemble|token gate|best component, tuned",
    "study-short": "best baseline",
    "retrain": "token gate|weighted ensemble|tuned 2 times",
    "blocks": "baseline: token gate|baseline: weighted ensemble|tuned 2 times",
    "smollm2": "SmolLM2 alone|plain ensemble",
    "mad-small": "llama|mamba|ensemble of the two",
    "lra-small": "llama|mamba|ensemble of the two",
    "mad-program": "llama alone|mamba alone",
    "composition": "adder tuned|table tuned|gate tuned|merge 2 tuned|self-bridge",
    "recall": "recall tuned|copying tuned|gate tuned|merge 3 tuned|self-bridge|LoRA",
    "glossary": "dictionary tuned|glossary tuned|gate tuned|self-bridge|LoRA",
    "calibration": "baseline, untrained: plain ensemble|baseline, untrained: Llama alone",
    "calibration-fixed": "baseline, untrained: plain ensemble|baseline, untrained: Llama alone",
    "demo-rates": "neox-prose alone|mamba-code alone",
    "alpha-grid": "weight of the Llama",  # at 0 and 1 the components are alone
    "alpha-found": "equal weights",
    "pruning": "baseline: tuned normally",
    "paths": "baseline: neox prose alone",
    "align": "baseline: NeoX alone|baseline: Mamba alone",
    "gpu-run": "their plain ensemble",
    "aligned": "its own tokenizer|home model",
    "real-pair": "original Gemma|original SmolLM2",
    "past-losses": "neox prose alone|uniform, log-probabilities|best static, probabilities",
    "past-losses-gate": "gate without past losses",
    "gate-variants": "gate unchanged",
    "bridges-text": "one block|self-bridges|LoRA",
    "mixture-sampling-lag": "token (the loss)",  # the same gate, asked as ever
}
NO_LOSS_OF_A_HYBRID = {
    "mad-profile", "mad-generation", "speed", "parts", "scan", "drafting", "plan", "plan-processes", "plan-cuda",
    "families", "transplant", "serving", "vllm", "gpu-kernels", "gpu-errors", "gpu-ratios", "packing",
    "mixture-sampling-speed", "aligned-tokenizers", "real-pair-speed",
}  # fmt: skip


def test_a_hybrids_loss_stands_beside_its_baselines(tables):
    load, known = tables[0].loader(), tables[0].TABLES
    assert known.keys() == {*BASELINES, *NO_LOSS_OF_A_HYBRID, "objective"}  # hybrids against hybrids, as its page says
    for name, beside in BASELINES.items():
        made = tables[0].as_markdown(known[name](load))
        missing = [word for word in beside.split("|") if word.strip() and word not in made]
        assert not missing, f"{name}: {missing}"


def test_what_loses_stays_in_sight(tables):
    """The hybrids that lost are on the front page: alike components, retraining, a second block, pruning."""
    text = FRONT.read_text(encoding="utf-8")
    for name in (
        "retrain.loss",
        "blocks.2",
        "two-60k.pruned",
        "mad.over-ensemble",
        "smollm2.hybrid",
        "plan_cuda.least",
    ):
        assert f"<!--={name}-->" in text, name
    rows = tables[0].TABLES["study-short"](tables[0].loader())
    assert {row[0] for row in rows[1:]} == {"two-60k", "other-60k", "three-60k", "alike-60k", "demo-40k"}


def test_what_is_chosen_is_what_the_package_chooses(tables):
    training = tables[1]
    chosen = {True: objective.SPECIALISTS, False: objective.ALIKE}
    assert training.DIFFERENT == objective.DIFFERENT
    assert training.CHOICE == {yes: (values["mixture_space"], values["loss_weights"]) for yes, values in chosen.items()}


def test_the_front_page_is_a_page():
    text = FRONT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    questions = ["Is it better?", "What does it cost?", "Does it work with my models, on my machine?"]
    assert re.findall(r"^## (.*\?)$", text, re.MULTILINE) == questions
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:4]:
        assert re.search(r"<!--=|<!-- table", part) and re.search(r"`(python|manticore-hf)\s", part), part.splitlines()[
            0
        ]
        assert re.search(r"not show", part, re.IGNORECASE), part.splitlines()[0]


def test_every_theme_is_linked_and_says_its_commands_and_what_it_does_not_show():
    linked = {(FRONT.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", FRONT.read_text())}
    assert {LOG, *THEMES} <= linked
    for page in THEMES:
        text = page.read_text(encoding="utf-8")
        assert "**Not shown:**" in text and "log.md#" in text and test_docs.blocks_in(page, "bash"), page.name


def test_links_tables_and_paths():
    for page in [*PAGES, LOG]:
        test_docs.test_links_lead_somewhere(page)
        test_docs.test_tables_are_whole(page)
    for page in PAGES:  # the log names what was there then
        test_docs.test_paths_in_code_exist(page)


def commands(page):
    """The commands of a page, in words."""
    blocks, around = test_docs.split(page)
    for language, text in blocks:
        yield from test_docs.command_lines(text) if language == "bash" else ()
    yield from (shlex.split(one) for one in test_docs.spans(around) if one.startswith(("python ", "manticore-hf ")))


def test_our_commands_exist():
    ours = [(page, words) for page in PAGES for words in commands(page) if words[0] == "manticore-hf"]
    assert ours
    for page, words in ours:
        test_docs.check(page, words, whole=len(words) > 2)


def test_benchmarks_have_the_options_that_the_pages_give_them():
    seen = set()
    for page in PAGES:
        for words in commands(page):
            scripts = [word for word in words if word.startswith("benchmarks/") and word.endswith(".py")]
            if "python" not in words or not scripts:
                continue
            source = (ROOT / scripts[0]).read_text(encoding="utf-8")
            seen.add(scripts[0])
            for option in test_docs.options(words):
                named = f'"{option}"' in source or 'f"--{name}"' in source  # the latter is calibration.py's loop
                assert named, f"{page.name}: {scripts[0]} has no {option}"
    assert len(seen) > 15


def test_a_line_does_not_begin_with_a_comment():
    """Markdown would take it for a block of HTML, and what follows on that line for no Markdown."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            assert not re.match(r"\s*(?:[*-] +)?<!--=", line), f"{page.name}: {line}"


def test_the_log_is_newest_first():
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d): ", LOG.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(dates) >= 27 and dates == sorted(dates, reverse=True)
    assert len(dates) == len(re.findall(r"^## ", LOG.read_text(encoding="utf-8"), re.MULTILINE))
