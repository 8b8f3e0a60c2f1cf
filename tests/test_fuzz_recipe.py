"""Thousands of damaged recipes: each gives a Recipe or an error with a message, runs no code, and takes no time."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from fuzzing import HOSTILE_VALUES, fuzzed, garbled, mutated, outcome
from hypothesis import given
from hypothesis import strategies as st

from manticore_hf import ManticoreError
from manticore_hf.experiments import ProgramSettings
from manticore_hf.training.recipe import Recipe, load_recipe

RECIPES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))}
NAMES = st.sampled_from(sorted(RECIPES))
RECIPES["programmed"] = """name: programmed
components: [a/b, c/d]
hybrid: {num_blocks: 2, mixture: "mad:recall+fuzzy-recall+copying"}
program: {seq_len: 32, steps: 100, layers: 4, strategy: gaea, learning_rate: 1e-3, seeds: 2}
data: {data: t}
stages: [calibrate, pretrain, finetune]
"""
_LAUGHS = "\n".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12))
_MERGES = "\n".join(f"b{i + 1}: &b{i + 1} {{<<: [{', '.join([f'*b{i}'] * 9)}]}}" for i in range(12))

TAGS = [
    "!!python/object/apply:os.system ['touch {canary}']", "!!python/object/apply:builtins.open ['{canary}', 'w']",
    "!!python/object/apply:subprocess.check_output [[touch, {canary}]]", "!!python/object/new:pathlib.Path [x]",
    "!!python/name:os.system", "!!python/module:os", "!!python/tuple [1, 2]", "!!int x", "!!int ''", "!!float x",
    "!!bool x", "!!null x", "!!timestamp x", "2001-99-99", "!!binary '*'", "!!set {{a, b}}", "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!map [1]", "!!seq {{a: 1}}", "!!str [1]", "!unknown x", "!!merge x", "!!value x",
    "? [a]\n  : 1", "{{[1]: 2}}", "=", "<<", "0o9", "0b", "-.inf", ".nan", "1:1:1:1", "190:20:30.15", "1" * 5000,
]  # fmt: skip


def read(file):
    recipe = load_recipe(file)
    assert isinstance(recipe, Recipe) and recipe.components and isinstance(recipe.seed, int)


def attempt(tmp_path, text):
    """As `outcome`, of reading that text; 10 seconds, since the machine of a test may be busy."""
    file = tmp_path / "fuzzed.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return outcome(read, file, seconds=10)


def test_the_recipes_themselves_are_read(tmp_path):
    assert len(RECIPES) >= 4 and all(attempt(tmp_path, text) for text in RECIPES.values())


@fuzzed(1500)
@given(name=NAMES, random=st.randoms())
def test_changed_values(tmp_path, name, random):
    values = mutated(yaml.safe_load(RECIPES[name]), random, times=random.choice([1, 1, 1, 2, 5]))
    attempt(tmp_path, json.dumps(values, ensure_ascii=random.randrange(2) == 0))


@fuzzed(1500)
@given(name=NAMES, random=st.randoms())
def test_garbled_text(tmp_path, name, random):
    attempt(tmp_path, garbled(RECIPES[name], random, times=random.choice([1, 1, 3])))


@fuzzed(300)
@given(name=NAMES, data=st.binary(max_size=40), random=st.randoms())
def test_bytes_that_are_no_text(tmp_path, name, data, random):
    content = RECIPES[name].encode()
    start = random.randrange(len(content))
    attempt(tmp_path, content[:start] + data + content[start + random.randrange(9) :])


@fuzzed(300)
@given(name=NAMES, tag=st.sampled_from(TAGS), random=st.randoms())
def test_tags_construct_nothing(tmp_path, name, tag, random):
    """Wherever a value stands, a tagged one may stand; the canary shows whether one was obeyed."""
    canary = tmp_path / "canary"
    lines = RECIPES[name].splitlines()
    places = [i for i, line in enumerate(lines) if ":" in line.split("#")[0] or line.lstrip().startswith("- ")]
    i = random.choice(places)
    mark = ":" if ":" in lines[i].split("#")[0] else "-"
    lines[i] = f"{lines[i].partition(mark)[0]}{mark} {tag.format(canary=canary)}"
    attempt(tmp_path, "\n".join(lines))
    assert not canary.exists()


@pytest.mark.parametrize(
    "text, message",
    [
        (f"a0: &a0 x\n{_LAUGHS}\ncomponents: *a12\n", "more than 5000 values, aliases written out"),
        (f"b0: &b0 {{x: 1}}\n{_MERGES}\ncomponents: [a]\n", "more than 5000 values, aliases written out"),
        ("components: &a [*a]\n", "more than 5000 values, aliases written out"),
        ("components: [" + "x, " * 6000 + "x]\n", "more than 5000 values"),
        ("components: " + "[" * 10_000 + "]" * 10_000, "more than 16 levels"),
        ("components:\n" + "".join("- " * i + "x\n" for i in (30,)), "more than 16 levels"),
        ("components: [a]\nname: " + "x" * 20_000, "a text of more than 10000 characters"),
        ("components: [a]\nseed: " + ":".join(["1"] * 50_000), "a text of more than 10000 characters"),
        ("components: [a]\nseed: " + "9" * 9_000, "not of its YAML type: .*9000 digits"),
        ("components: [a]\nseed: " + ":".join(["1"] * 4_000), "not of its YAML type: .*an integer of"),
        ("components: [a]\nseed: 4294967296", r"seed: is 4294967296, must be an integer in \[0"),
        ("components: [a]\nname: 2001-99-99", "not of its YAML type"),
        ("components: [a]\nname: !!bool x", "not of its YAML type"),
        ("x" * 10_000_000, "more than 200000 bytes"),
        (b"components: [\xff\xfe]", "is not UTF-8 text"),
        ("components: [a\x00b]", "is not valid YAML.*special characters"),
        ("", "must be a mapping"),
    ],
    ids=lambda value: None if len(value) > 60 else value if isinstance(value, str) else "bytes",
)
def test_what_would_take_the_machine_is_refused(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ManticoreError, match=f"(?s){message}") as caught:
        load_recipe(file)
    assert len(str(caught.value)) < 2000


def test_anchors_and_merged_keys_are_allowed(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "components: [a, b]\ndata: {data: t}\nstages:\n"
        "  - pretrain: &usual {max_steps: 3, learning_rate: 1e-3}\n"
        "  - finetune: {<<: *usual, max_steps: 5}\n"
    )
    assert load_recipe(file).stages == [
        ("pretrain", {"max_steps": 3, "learning_rate": 1e-3}),
        ("finetune", {"max_steps": 5, "learning_rate": 1e-3}),
    ]


@pytest.mark.parametrize("value", HOSTILE_VALUES, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize("key", ["name", "seed", "components", "hybrid", "program", "data", "stages"])
def test_every_hostile_value_under_every_key(tmp_path, key, value):
    values = {"components": ["a/b", "c/d"], "data": {"data": "t"}, "stages": ["finetune"]}
    file = tmp_path / "x.yaml"
    file.write_text(yaml.dump({**values, key: value}))
    outcome(read, file, seconds=10)


@pytest.mark.quick(every=4)
@pytest.mark.parametrize("key", ["mixture", *(field.name for field in dataclasses.fields(ProgramSettings))])
def test_every_hostile_value_in_a_programmed_recipe(tmp_path, key):
    for value in HOSTILE_VALUES:
        hybrid, program = {"mixture": "mad:recall+memorization"}, {"steps": 2}
        if key == "mixture":
            hybrid[key] = f"mad:{value}" if isinstance(value, str) else value
        else:
            program[key] = value
        values = {"components": ["a/b", "c/d"], "data": {"data": "t"}, "hybrid": hybrid, "program": program}
        attempt(tmp_path, yaml.dump({**values, "stages": ["finetune"]}))
