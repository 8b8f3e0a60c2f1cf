"""The demo's text and the components shipped for it.

    pytest tests/test_demo_text.py

The text is whatever the running interpreter's standard library holds, so bounds are wide enough for Python 3.10 to
3.14.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM, MambaForCausalLM

from manticore_hf.demo import demo
from manticore_hf.demo import text as demo_text
from manticore_hf.demo.text import KINDS, SPLITS, documents, split_of
from manticore_hf.evaluation.losses import Passages

COMPONENTS = Path(str(files("manticore_hf"))) / "demo_components"
NAMES = {"prose": "neox-prose", "code": "mamba-code"}


@pytest.fixture(scope="module", params=["part", pytest.param("whole", marks=pytest.mark.slow)], autouse=True)
def library(request):
    """The whole library takes ten seconds to read: of what is trained on, the quick tests read every tenth module."""
    read = demo_text._sources

    def part(root):
        for module, source in read(root):
            number = int(hashlib.sha256(module.split(".")[0].encode()).hexdigest(), 16)
            if split_of(module) in ("test", "validation") or module.startswith("pydoc_data") or number % 10 == 0:
                yield module, source

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "part":
            patch.setattr(demo_text, "_sources", part)
        demo_text._corpus.cache_clear()
        yield request.param
    demo_text._corpus.cache_clear()


def fingerprint():
    texts = [documents(kind, split) for kind in KINDS for split in SPLITS]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


@pytest.fixture(scope="module")
def components():
    return {
        kind: (
            AutoModelForCausalLM.from_pretrained(COMPONENTS / name),
            AutoTokenizer.from_pretrained(COMPONENTS / name),
        )
        for kind, name in NAMES.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_split_is_large_enough(kind, library):
    sizes = {split: sum(map(len, documents(kind, split))) for split in SPLITS}
    assert min(sizes["validation"], sizes["test"]) > 40_000
    assert sizes["train"] > (400_000 if library == "whole" else 10_000)
    assert sizes["pretrain"] > (800_000 if library == "whole" else 100_000)


@pytest.mark.parametrize("kind", KINDS)
def test_no_document_is_in_two_splits_or_twice_in_one(kind):
    everything = [document for split in SPLITS for document in documents(kind, split)]
    assert len(everything) == len(set(everything))
    assert min(map(len, everything)) >= 200


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_text_hardly_repeats_what_the_components_read(kind):
    def long_lines(split):
        return {line.strip() for text in documents(kind, split) for line in text.split("\n") if len(line.strip()) > 50}

    read = long_lines("pretrain")
    for split in ("train", "validation", "test"):
        lines = long_lines(split)
        assert len(lines & read) < 0.02 * len(lines)


def test_a_package_belongs_to_one_split_wherever_a_version_keeps_its_files():
    assert split_of("asyncio.events") == split_of("asyncio") == split_of("asyncio.unix_events")
    assert split_of("_pydecimal") == split_of("decimal")  # Python 3.12 moved code between such pairs
    assert {split_of(f"module{number}") for number in range(200)} == set(SPLITS)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["whole"], indirect=True)
def test_another_process_finds_the_same_documents():
    # Its strings hash differently: nothing may depend on the order of a set.
    code = "from test_demo_text import fingerprint; print(fingerprint())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == fingerprint()


def test_callers_cannot_spoil_the_corpus():
    documents("prose", "test").clear()
    assert documents("prose", "test")


def test_code_parses_and_holds_no_docstring_or_comment():
    for split in SPLITS:
        for text in documents("code", split):
            tree = ast.parse(text)
            assert split == "pretrain" or not demo_text._comments(text)  # the rest alone takes a second
            for node in ast.walk(tree):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    assert ast.get_docstring(node) is None


def test_prose_reads_as_prose():
    texts = [text for split in SPLITS for text in documents("prose", split)]
    assert not any(">>>" in text for text in texts)
    joined = "\n".join(texts).lower().split()
    assert joined.count("the") > 0.04 * len(joined)


def test_strings_that_look_like_comments_and_form_feeds_survive():
    source = (
        '"""Module."""\n\x0c\n# Comment of the module.\nX = "# kept"  # gone\n\n\n@cache  # gone\ndef f(a):\n'
        '    """Doc."""\n\n    # gone\n    return """a\n\n# kept\n"""\n\n\nclass E(Exception):\n    """Only this."""\n'
    )
    tree = ast.parse(source)
    blocks = list(demo_text._code_blocks(source, tree, demo_text._documented(tree), demo_text._comments(source)))
    assert blocks == [
        'X = "# kept"',
        '@cache\ndef f(a):\n\n    return """a\n\n# kept\n"""',
        "class E(Exception):\n    pass",
    ]


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="'poetry'.*prose, code"):
        documents("poetry", "test")
    with pytest.raises(ValueError, match="'dev'.*validation.*pretrain"):
        documents("prose", "dev")


def test_a_library_without_source_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="no source files"):
        list(demo_text._sources(tmp_path))


def test_shipped_components_are_small_and_hold_no_paths():
    assert sum(path.stat().st_size for path in COMPONENTS.rglob("*") if path.is_file()) < 9_000_000
    for path in COMPONENTS.rglob("*.json"):
        assert "_name_or_path" not in path.read_text()
    cards = [(COMPONENTS / name / "README.md").read_text() for name in NAMES.values()]
    assert all(card.startswith("---\nlicense: apache-2.0\n") and "PSF-2.0" in card for card in cards)


def test_shipped_components_are_two_families_over_one_vocabulary(components):
    (neox, neox_tokenizer), (mamba, mamba_tokenizer) = components["prose"], components["code"]
    assert isinstance(neox, GPTNeoXForCausalLM) and isinstance(mamba, MambaForCausalLM)
    assert neox_tokenizer.get_vocab() == mamba_tokenizer.get_vocab()
    assert len(neox_tokenizer) == neox.config.vocab_size == mamba.config.vocab_size
    for kind in KINDS:
        text = documents(kind, "test")[0]
        tokens = neox_tokenizer(text).input_ids
        assert tokens == mamba_tokenizer(text).input_ids
        assert neox_tokenizer.decode(tokens) == text
    assert neox_tokenizer.eos_token_id == neox.config.eos_token_id == mamba.config.eos_token_id == 0


def test_each_shipped_component_is_the_better_one_on_its_own_kind(components):
    def loss(owner, kind):
        model, tokenizer = components[owner]
        texts = documents(kind, "test")[::10][:6]
        rows = torch.tensor([tokenizer(text, verbose=False).input_ids[:64] for text in texts if len(text) > 500])
        with torch.no_grad():
            return model(input_ids=rows, labels=rows).loss.item()

    assert loss("prose", "prose") < loss("code", "prose") - 0.2
    assert loss("code", "code") < loss("prose", "code") - 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_components_generate(components, kind):
    model, tokenizer = components[kind]
    prompt = tokenizer({"prose": "Return the", "code": "def "}[kind], return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokens.shape[1] == prompt.input_ids.shape[1] + 8


def test_report_holds_the_losses_of_both_components_on_both_kinds():
    report = json.loads((COMPONENTS / "train_report.json").read_text())
    assert set(report) == set(NAMES.values())
    for split in ("validation", "test"):
        for kind, other in (("prose", "code"), ("code", "prose")):
            own = report[NAMES[kind]]["losses"][f"{kind}/{split}"]["bits_per_byte"]
            assert own < report[NAMES[other]]["losses"][f"{kind}/{split}"]["bits_per_byte"]


def test_what_is_kept_for_the_report_is_what_is_printed():
    """One table over both kinds of text, with the original components: the report tells it, not its own sample."""
    sizes = {"prose": np.array([3, 4]), "code": np.array([5])}
    test = {kind: Passages(["x"] * len(one), [], None, one, 4 * one, [None] * len(one)) for kind, one in sizes.items()}
    names = (
        "neox_prose",
        "mamba_code",
        "ensemble",
        "hybrid, 1 block, gate trained",
        "hybrid, 2 blocks, calibrated only",
    )
    frozen = {row: {kind: (i + 1.0) * one for kind, one in sizes.items()} for i, row in enumerate(names)}
    tuned = {
        "neox_prose, tuned alone": frozen["ensemble"],
        "hybrid, 1 block, tuned jointly": frozen["neox_prose"],
        "hybrid, 2 blocks, searched and tuned": frozen["ensemble"],
    }
    originals = ["original neox_prose", "original mamba_code"]
    untuned = demo._beside_one_block(frozen, frozen)
    assert sorted(untuned) == sorted(["ensemble", "hybrid, 1 block, gate trained", *originals])
    shown = demo._beside_one_block(tuned, frozen)
    untuned = "untuned ensemble"  # a baseline of the tuned hybrid, too
    assert sorted(shown) == sorted(["neox_prose, tuned alone", "hybrid, 1 block, tuned jointly", untuned, *originals])
    found = demo._measured(shown, test).to_dict("hybrid, 1 block, tuned jointly")
    assert found["losses"] == {name: pytest.approx(nats["code"][0] / 5) for name, nats in shown.items()}
    assert set(found["by_kind"]) == {"prose", "code"} and (found["tokens"], found["rows"]) == (12, 3)
