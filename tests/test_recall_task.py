"""`manticore-hf composition --task recall`: what its texts say, and what they do not."""

import json
import re

import pytest
import torch

from manticore_hf import ManticoreError
from manticore_hf.cli import main
from manticore_hf.experiments.composition.recall import SYMBOLS, RecallTask, keys
from manticore_hf.experiments.composition.texts import generate
from manticore_hf.experiments.composition.train_composition import Composition, CompositionTraining

SMALL = RecallTask(num_keys=96, num_table=300, num_sums=300, num_train=300, num_test=300, pairs=3, seed=5)
LETTER, VALUE = "[a-l]", "[0-9AB]"


def read(text, task=SMALL):
    """[(a row, its labels, '.' where nothing is asked)]."""
    ids, labels = generate(task, text)
    return [
        ("".join(SYMBOLS[i] for i in row), "".join("." if i < 0 else SYMBOLS[i] for i in asked))
        for row, asked in zip(ids.tolist(), labels.tolist())
    ]


def halves(task=SMALL):
    """(keys that are trained on, the others)."""
    found = keys(task)
    names = [[SYMBOLS[i] + (SYMBOLS[j] if j < 12 else "") for j in row.tolist()] for i, row in enumerate(found)]
    half = found.shape[1] // 2
    return ({key for row in names for key in row[:half]}, {key for row in names for key in row[half:]})


def pairs(text):
    """{key: value} of the pairs that a row shows, none of which begins as another does."""
    found = re.findall(f"({LETTER}+)({VALUE})", text)
    assert "".join(key + value for key, value in found) == text
    assert len({key[0] for key, _ in found}) == len({value for _, value in found}) == len(found)
    return dict(found)


def asked_keys(text, known):
    """The known keys of which a text is, in order."""
    found = re.findall("|".join(known), text)
    assert "".join(found) == text
    return found


def test_keys_have_one_letter_or_two_and_each_first_letter_as_many_in_both_halves():
    trained, other = halves()
    assert len(trained) == len(other) == 48 and not trained & other
    assert {len(key) for key in trained} == {len(key) for key in other} == {1, 2}
    for half in (trained, other):
        assert sorted(key[0] for key in half) == sorted("abcdefghijkl" * 4)


def test_recalled_is_the_value_of_a_key_that_came_before():
    seen, missing = set(), 0
    for row, labels in read("recall"):
        assert len(row) == SMALL.length
        known, wanted = {}, ""
        for word, value, signs in re.findall(f"({LETTER}+)({VALUE}?)([_|]*)", row)[:-2]:  # the last may be cut
            before = ""
            while one := next((key for key in known if word[len(before) :].startswith(key)), ""):
                before, last = before + one, one
                missing += 1
            if new := word[len(before) :]:
                assert value, "a key comes with its value at first"
                known[new] = value
            elif value:
                missing -= 1
                assert known[last] == value
            wanted += "." * len(word) + ("." if new else value) + "." * len(signs)
        assert len(known) <= SMALL.shown
        seen |= set(known)
        assert labels.startswith(wanted)
    assert seen == halves()[0] | halves()[1] and missing > 100


def test_copied_are_the_values_behind_the_bar_in_their_order():
    names = set()
    for row, labels in read("copying"):
        shown, bar, items, blanks = re.fullmatch(r"([^|]+)(\|)([^>]+)>(_+)", row).groups()
        assert len(pairs(shown)) == SMALL.shown
        found = re.findall(f"({LETTER}*)({VALUE})", items)
        assert re.sub("_", "", items) == "".join(name + value for name, value in found)
        names |= {len(name) for name, _ in found}
        wanted = "".join(value for _, value in found)
        assert labels == "." * (len(row) - 3) + wanted and len(blanks) == len(wanted) == 3
    assert names == {0, 1, 2}


@pytest.mark.parametrize("text", ["train", "trained-keys", "test"])
def test_asked_are_the_values_of_the_keys_behind_the_bar(text):
    half, seen = halves()[text == "test"], set()
    for row, labels in read(text):
        shown, items, blanks = re.fullmatch(r"([^|]+)\|([^>]+)>(_+)", row).groups()
        known = pairs(shown)
        assert len(known) == SMALL.shown and set(known) <= half
        found = asked_keys(items.replace("_", ""), known)
        assert len(set(found)) == SMALL.pairs
        assert labels == "." * (len(row) - 3) + "".join(known[key] for key in found) and blanks == "___"
        seen |= set(found)
    assert seen == half


def test_what_a_component_can_alone_is_asked_of_it_alone(tmp_path, monkeypatch):
    """Of one that recalls the values of short keys alone, and one that copies only the first value."""
    one = Composition(SMALL, tmp_path, CompositionTraining(), True)
    rows = read("test")

    def sender(input_ids):
        logits = torch.zeros(*input_ids.shape, SMALL.vocab_size)
        for at, (row, _) in enumerate(rows):
            bar, known = row.index("|"), pairs(row.partition("|")[0])
            for key in re.finditer("|".join(known), row[bar : row.index(">")]):
                said = SYMBOLS.index(known[key[0]])
                logits[at, bar + key.end() - 1, said if len(key[0]) == 1 else 12 + (said - 11) % 12] = 1
        return type("Out", (), {"logits": logits})

    def receiver(input_ids):
        logits = torch.zeros(*input_ids.shape, SMALL.vocab_size)
        for at, ids in enumerate(input_ids.tolist()):
            text = "".join(SYMBOLS[i] for i in ids)
            copy = text.index(">")
            logits[at, copy, SYMBOLS.index(re.findall(VALUE, text[text.index("|") : copy])[0])] = 1
        return type("Out", (), {"logits": logits})

    model = {"recall": sender, "copying": receiver}
    monkeypatch.setattr(one, "component", lambda name: type("Model", (), {"eval": lambda self: model[name]})())
    found = [
        asked_keys(re.sub("_", "", row[row.index("|") + 1 : row.index(">")]), pairs(row.partition("|")[0]))
        for row, _ in rows
    ]
    short = [len(key) == 1 for row in found for key in row]
    assert one.alone() == pytest.approx({"recall": sum(short) / len(short), "copying": 1 / 3})


def test_the_command_runs_it_at_its_own_sizes_unless_told(tmp_path, capsys):
    sizes = "--num-keys 48 --num-table 32 --num-sums 32 --num-train 32 --num-test 10 --hidden-size 32 --seeds 3".split()
    command = ["composition", "--task", "recall", *sizes, "--output-dir", str(tmp_path), "--only"]
    assert main([*command, "recall tuned", "linear bridge"]) == 0
    found = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert {one["model"] for one in found} == {"recall", "copying", "recall tuned", "linear bridge"}
    assert {one["task"]["shown"] for one in found} == {4} and {one["task"]["num_keys"] for one in found} == {48}
    assert re.search("unseen keys *trained keys", capsys.readouterr().out)


def test_what_cannot_be_written_raises():
    for settings, message in (
        ({"num_keys": 100}, "give a multiple of 24"),
        ({"num_keys": 168}, "at most 144: there are no more"),
        ({"key_length": 3}, r"one letter or two \(key_length=2\)"),
        ({"shown": 3}, "shown=3 must be at least pairs=4"),
        ({"shown": 13}, "at most 12"),
    ):
        with pytest.raises(ManticoreError, match=message):
            RecallTask(**settings)
