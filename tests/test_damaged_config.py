"""A damaged config.json, of a hybrid or of a component: one sentence from every way in, and Transformers' own beside.

Where Transformers reads it before anything of ours is asked (its Auto classes), its own error comes.
"""

import json

import pytest
from cases import case
from tiny_hybrid import pair, save, write_text
from transformers import AutoConfig, AutoModelForCausalLM

from manticore_hf import ManticoreConfig, ManticoreError, ManticoreForCausalLM, publish
from manticore_hf.app import local
from manticore_hf.cli import main
from manticore_hf.hub.inspection import inspect_hybrid

DAMAGED = {
    "cut": (lambda text: text[: len(text) // 2], "is not a JSON object of settings"),
    "of another type": (lambda text: "[]", "is not a JSON object"),
    "too deep": (lambda text: "[" * 3000, "is not a JSON object of settings"),
    "no text": (lambda text: b"\xff\xfe\0\x80", "is not a JSON object of settings"),
    "no components": (lambda text: json.dumps({**json.loads(text), "components": ["a"]}), "[Cc]omponent"),
    "a wrong number": (lambda text: json.dumps({**json.loads(text), "vocab_size": "x"}), "vocab_size='x'"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    save(ManticoreForCausalLM.from_components(list(pair()), num_blocks=1), folder / "hybrid")
    write_text(folder / "text.txt", 300)
    return folder


def test_every_way_in_says_so_in_a_sentence(place, tmp_path, capsys):
    config, hybrid, text, out = place / "hybrid" / "config.json", place / "hybrid", place / "text.txt", tmp_path / "out"
    good = config.read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"components: [{hybrid}, b/c]\ndata: {{data: {text}}}\nstages: [{{finetune: {{max_steps: 1}}}}]\n"
    )
    model = ["--model", hybrid, "--data", text]
    commands = {
        "inspect": [hybrid], "push": [hybrid, "me/x", "--dry-run"], "report": [hybrid, "--no-measure"],
        "plan": [hybrid], "evaluate": [*model], "calibrate": [*model], "finetune": [*model, "--max-steps", "1"],
        "search": [*model], "prune": [*model], "compose": [hybrid, "b/c"], "run": [recipe, "--allow-outside"],
        "compare": [recipe, "--allow-outside", "--test", text],
    }  # fmt: skip
    writes = ("calibrate", "finetune", "search", "prune", "compose", "run", "compare")
    functions = (
        ManticoreConfig.from_pretrained, ManticoreForCausalLM.from_pretrained, inspect_hybrid, local.load,
        lambda folder: publish(folder, "me/x", dry_run=True),
        lambda folder: ManticoreForCausalLM.from_components([str(folder), "b/c"]),
    )  # fmt: skip
    try:
        for kind, (damage, said) in DAMAGED.items():
            damaged = damage(good)
            config.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
            for function in functions:
                with case(kind, function), pytest.raises(ManticoreError) as err:
                    function(hybrid)
                assert "Traceback" not in str(err.value)
            with pytest.raises(ManticoreError, match=said):
                ManticoreForCausalLM.from_pretrained(hybrid)
            for command, words in commands.items():
                with case(kind, command):
                    more = ["--output-dir", out] if command in writes else []
                    assert main([str(one) for one in (command, *words, *more)]) == 2
                    said_last = capsys.readouterr().err.strip().splitlines()[-1]
                    assert said_last.startswith(f"manticore-hf {command}: ")
    finally:
        config.write_text(good)


def test_transformers_own_way_in(place):
    """What reads the file before it knows whose it is says so in its own words; none of them loads anything."""
    config = place / "hybrid" / "config.json"
    good = config.read_text()
    try:
        config.write_text(good[: len(good) // 2])
        for auto in (AutoConfig, AutoModelForCausalLM):
            with pytest.raises(OSError, match="not a valid JSON file"):
                auto.from_pretrained(place / "hybrid")
        config.write_text(DAMAGED["a wrong number"][0](good))  # whose it is can be read: the sentence is ours
        for auto in (AutoConfig, AutoModelForCausalLM):
            with pytest.raises(ManticoreError, match="vocab_size='x'"):
                auto.from_pretrained(place / "hybrid")
    finally:
        config.write_text(good)
