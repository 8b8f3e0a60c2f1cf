"""`manticore-hf composition --task glossary`: what its texts say, and what they do not."""

import json
import re

import pytest
import torch

from manticore_hf import ManticoreError
from manticore_hf.cli import main
from manticore_hf.experiments.composition.glossary import (
    ENGLISH,
    FRENCH,
    GERMAN,
    SYLLABLES,
    TOKENS,
    GlossaryTask,
    glossary,
)
from manticore_hf.experiments.composition.texts import generate
from manticore_hf.experiments.composition.train_composition import Composition, CompositionTraining

SMALL = GlossaryTask(num_keys=160, num_table=300, num_sums=300, num_train=300, num_test=150, seed=5)
SAYS = {"German": dict(zip(ENGLISH, GERMAN)), "French": dict(zip(ENGLISH, FRENCH))}


def read(text, task=SMALL):
    """[(a row in words, its labels in words, '.' where nothing is asked)]."""
    ids, labels = generate(task, text)
    return [
        (" ".join(TOKENS[i] for i in row), ["." if i < 0 else TOKENS[i] for i in asked])
        for row, asked in zip(ids.tolist(), labels.tolist())
    ]


def known(task=SMALL):
    """{name: the word it means}, the first half first."""
    names, words, _ = glossary(task)
    return {" ".join(TOKENS[i] for i in name): ENGLISH[word] for name, word in zip(names.tolist(), words)}


def test_every_token_is_another_and_only_the_other_half_has_new_words():
    assert len(set(TOKENS)) == len(TOKENS) and len(ENGLISH) == len(GERMAN) == len(FRENCH) == 48
    names, words = list(known()), list(known().values())
    assert len(names) == 160 and all(set(name.split()) <= set(SYLLABLES) for name in names)
    first, other = set(words[:80]), set(words[80:])
    assert len(first) == 36 and first < set(ENGLISH) == first | other
    assert [bool(one) for one in glossary(SMALL)[2]] == [word not in first for word in words]
    assert sum(word not in first for word in words[80:]) == 40


def test_the_glossary_is_written_truly_and_wholly_and_omissions_are_not_learned():
    seen = set()
    for row, asked in read("glossary"):
        assert len(row.split()) == SMALL.length
        items = re.findall(r"(\w+ \w+) means( \w+)? [;,](?: |$)", row)
        assert row.startswith(" ".join(f"{name} means{word}" for name, word in items[:1]))
        for name, word in items:
            assert word in ("", " " + known()[name])
        seen |= {name for name, word in items if word}
        words = row.split()
        gone = [i for i in range(1, len(words)) if words[i] in ";," and words[i - 1] == "means"]
        assert gone == [i for i, one in enumerate(asked) if one == "."]
        assert all(one in (".", word) for word, one in zip(words, asked))
    assert seen == set(known())


@pytest.mark.parametrize("text", ["dictionary", "train", "trained-names", "known-words", "test"])
def test_questions_are_of_their_names_and_answered_truly(text):
    names, seen, forms = list(known()), set(), set()
    first = {known()[name] for name in names[:80]}
    for row, asked in read(text):
        wanted = ["."] * len(row.split())
        for item in re.finditer(r"(?:^|; )([^;]*?)(\w+) , in (German|French) \? (\S+)(?= ;|$)", row):
            before, word, tongue, answer = item.groups()
            if text != "dictionary":
                assert word == "means" and before.strip() in names
                seen.add(before.strip())
                word = known()[before.strip()]
            else:
                forms.add((len(re.findall(r"\b(?!means)\w+", before)), "means" in before))
            assert SAYS[tongue][word] == answer
            wanted[len(row[: item.start(4)].split())] = answer
        assert asked == wanted and (text == "dictionary" or wanted.count(".") == 8 * SMALL.pairs)
    if text == "dictionary":
        assert forms == {(0, False), (1, False), (2, False), (1, True), (2, True)}
    else:
        half = names[80:] if text in ("known-words", "test") else names[:80]
        assert seen == {
            name
            for name in half
            if text not in ("known-words", "test") or (known()[name] in first) == (text == "known-words")
        }


def test_no_text_of_the_task_says_a_new_word_or_what_it_is_in_another_language():
    new = {known()[name] for name in list(known())[80:]} - {known()[name] for name in list(known())[:80]}
    assert len(new) == 12
    new |= {say[word] for say in SAYS.values() for word in new}
    for text in ("train", "trained-names", "known-words"):
        assert not new & {word for row, _ in read(text) for word in row.split()}
    assert not set(GERMAN + FRENCH) & {word for row, _ in read("glossary") for word in row.split()}


def test_a_row_has_different_names():
    for row, _ in read("test"):
        found = re.findall(r"(\w+ \w+) means", row)
        assert len(found) == len(set(found)) == SMALL.pairs


def test_what_a_component_can_alone_is_asked_of_it_alone(tmp_path, monkeypatch):
    """Of a glossary that knows every second word, and a dictionary that knows German alone."""
    one = Composition(SMALL, tmp_path, CompositionTraining(), True)

    def answers(name):
        def forward(input_ids):
            logits = torch.zeros(*input_ids.shape, SMALL.vocab_size)
            for row, ids in enumerate(input_ids.tolist()):
                words = [TOKENS[i] for i in ids]
                for at, word in enumerate(words):
                    if word == "means":
                        said = ENGLISH.index(known()[" ".join(words[at - 2 : at])])
                        logits[row, at, TOKENS.index(ENGLISH[said - said % 2])] = 1
                    elif word == "?" and words[at - 4] in SAYS["German"]:
                        logits[row, at, TOKENS.index(SAYS["German"][words[at - 4]])] = 1
            return type("Out", (), {"logits": logits})

        return type("Model", (), {"eval": lambda self: forward})()

    monkeypatch.setattr(one, "component", answers)
    rows = [row for row, _ in read("test")]
    words = [known()[name] for row in rows for name in re.findall(r"(\w+ \w+) means", row)]
    german = sum(row.count("German") for row in rows)
    share = {
        "glossary": sum(ENGLISH.index(word) % 2 == 0 for word in words) / len(words),
        "dictionary": german / len(words),
    }
    assert one.alone() == pytest.approx(share) and all(0.1 < value < 0.9 for value in share.values())


def test_the_command_runs_it_and_says_what_is_right_of_which_names(tmp_path, capsys):
    sizes = "--num-keys 40 --num-table 32 --num-sums 32 --num-train 32 --num-test 10 --hidden-size 32 --seeds 3".split()
    command = ["composition", "--task", "glossary", *sizes, "--output-dir", str(tmp_path), "--only"]
    assert main([*command, "glossary tuned", "calibrated bridge"]) == 0
    found = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert {one["model"] for one in found} == {"glossary", "dictionary", "glossary tuned", "calibrated bridge"}
    printed = capsys.readouterr().out
    assert re.search("unseen keys *known keys *trained keys", printed)
    for one in found:
        if "condition" in one["what"]:
            shares = "".join(f"{one[key]:14.3f}" for key in ("unseen", "known", "trained"))
            assert shares in printed.split(f"\n{one['model']} ")[1]


def test_too_many_names_raise():
    with pytest.raises(ManticoreError, match="at most 1024: there are no more words of 2"):
        GlossaryTask(num_keys=1026)
    with pytest.raises(ManticoreError, match="'table' is unknown; choose one of .'glossary', 'dictionary'"):
        generate(SMALL, "table")
