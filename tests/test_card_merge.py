"""A card that is generated again keeps what people wrote, and only that."""

import random
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from manticore_hf import ManticoreError
from manticore_hf.hub.card_merge import Card, _sections, choose, merge, split
from manticore_hf.hub.licenses import read_license

DATA = {"license": "mit", "tags": ["manticore", "merge"], "base_model": ["a/x", "b/y"], "library_name": "transformers"}
SECTIONS = {"title": "# Hybrid", "results": "Loss 1.5\n\n| a | b |\n|---|---|", "limits": "- none"}


def card(**changes):
    """The generated card, with other sections or (as `metadata`) other metadata."""
    metadata = {**DATA, **changes.pop("metadata", {})}
    sections = {**SECTIONS, **changes}
    return Card({k: v for k, v in metadata.items() if v is not None}, {k: v for k, v in sections.items() if v})


def index(**losses):
    results = [
        {"dataset": {"type": data}, "metrics": [{"type": "loss", "value": loss}]} for data, loss in losses.items()
    ]
    return [{"name": "h", "results": results}]


FRESH = merge(card())[0]


def test_a_fresh_card_is_metadata_sections_and_stamp():
    metadata, body, stamp = split(FRESH)
    assert metadata == DATA and stamp["metadata"] == DATA and stamp["sections"] == list(SECTIONS)
    assert [body.index(text) for text in SECTIONS.values()] == sorted(body.index(text) for text in SECTIONS.values())
    parsed = ModelCard(FRESH)
    assert parsed.data.to_dict() == DATA and "# Hybrid" in parsed.text


def test_metadata_may_have_any_names():
    """Also those of what huggingface_hub keeps metadata in."""
    names = ("to_dict", "to_yaml", "_to_dict", "self", "__dict__", "line_break")
    text, _ = merge(card(), "---\n" + "".join(f"{name}: mine\n" for name in names) + "---\n\nText.\n")
    assert all(split(text)[0][name] == "mine" for name in names)


def test_generating_twice_changes_nothing():
    assert merge(card(), FRESH) == (FRESH, [])


def test_what_was_generated_is_replaced():
    new = card(results="Loss 1.4", metadata={"license": "apache-2.0", "tags": ["manticore", "new"]})
    text, notices = merge(new, FRESH)
    assert text == merge(new)[0] and notices == []


def test_a_section_without_content_disappears_and_comes_back_in_its_place():
    without = merge(card(results=None), FRESH)[0]
    assert "Loss" not in without
    assert merge(card(), without)[0] == FRESH


@pytest.mark.parametrize("place", ["before", "between", "after", "in front of a heading"])
def test_text_between_sections_stays(place):
    note = "My own words.\n\n## A heading of mine\n\nMore."
    names = {"before": "title", "between": "results", "after": "card", "in front of a heading": "limits"}
    anchor = f"<!-- manticore-hf:{names[place]}"
    edited = FRESH.replace(anchor, f"{note}\n\n{anchor}")
    text, notices = merge(card(results="Loss 1.4"), edited)
    assert note in text and "Loss 1.4" in text and "Loss 1.5" not in text and notices == []
    assert text.index(note) < text.index(anchor)
    assert merge(card(results="Loss 1.4"), text)[0] == text


def test_a_changed_section_stays_as_the_person_left_it():
    text, notices = merge(card(results="Loss 1.4"), FRESH.replace("Loss 1.5", "Loss 1.5 (one seed!)"))
    assert "Loss 1.5 (one seed!)" in text and "Loss 1.4" not in text
    assert len(notices) == 1 and "'results'" in notices[0]
    assert "(one seed!)" in merge(card(results="Loss 1.3"), text)[0]


def test_a_removed_section_stays_away():
    start, stop = FRESH.index("<!-- manticore-hf:results"), FRESH.index("<!-- manticore-hf:limits")
    text, notices = merge(card(results="Loss 1.4"), FRESH[:start] + FRESH[stop:])
    assert "Loss" not in text and "'results'" in notices[0]
    assert "Loss" not in merge(card(), text)[0]


def test_new_sections_come_after_the_one_before_them():
    old = merge(card(results=None))[0]
    new = Card(DATA, {"title": "# Hybrid", "cost": "Much", "limits": "- none"})
    text = merge(new, old)[0]
    assert text.index("# Hybrid") < text.index("Much") < text.index("- none")


def test_of_two_sections_of_one_name_a_changed_one_stays():
    start, stop = FRESH.index("<!-- manticore-hf:limits"), FRESH.index("\n<!-- manticore-hf:card")
    section = FRESH[start:stop]
    changed = section.replace("- none", "- many")
    for both in (changed + "\n" + section, section + "\n" + changed):
        text, notices = merge(card(limits="- few"), FRESH.replace(section, both))
        assert text.count("- many") == text.count("- few") == 1 and "- none" not in text
        assert notices == ["README.md keeps its section 'limits', which a person changed."]


def naive_sections(body):
    """Sections as one pattern says them, which looks for the end of every opened one in the whole rest of the text."""
    pattern = r"<!-- manticore-hf:([a-z_]+) ([0-9a-f]{12}) -->\n(.*?)<!-- /manticore-hf:\1 -->"
    return [(found[1], found.start(), found.end()) for found in re.finditer(pattern, body, re.DOTALL)]


def test_sections_are_those_of_the_plain_pattern():
    rng, found = random.Random(0), 0
    opened = [f"<!-- manticore-hf:{name} 0123456789ab -->\n" for name in ("a", "b")]
    closed = [f"<!-- /manticore-hf:{name} -->" for name in ("a", "b", "c")]
    pieces = [*opened, *closed, "text\n", opened[0].strip(), opened[1][:-6], "\n"]
    for _ in range(3000):
        body = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        wanted = naive_sections(body)
        assert [(one.name, one.start, one.stop) for one in _sections(body)] == wanted, body
        found += len(wanted)
    assert found > 500


@pytest.mark.parametrize(
    "text",
    ["<!-- manticore-hf:a 0123456789ab -->\n" * 20_000, "\n" * 740_000 + "mine", f"mine{SECTIONS['title']}\n" * 50_000],
    ids=["marks", "lines", "words"],
)
def test_a_card_of_740_kilobytes_is_merged_like_a_short_one(text):
    """These texts took 40 seconds and more when the time grew with the square of their length."""
    body = merge(card(), f"---\nlanguage: en\n---\n{text}")[0].split("\n---\n", 1)[1]
    assert body.startswith(f"\n{text.strip()}\n") and "# Hybrid" in body


def test_white_space_and_line_ends_are_no_changes():
    text = FRESH.replace("\n", "\r\n").replace("Loss 1.5", "Loss 1.5  ")
    assert merge(card(results="Loss 1.4"), text)[0] == merge(card(results="Loss 1.4"))[0]


# ---- metadata --------------------------------------------------------------------------------------------------------


def edited(**changes):
    metadata, _, _ = split(FRESH)
    metadata.update(changes)
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return f"---\n{yaml.safe_dump(metadata)}---\n{FRESH.split('---', 2)[2]}"


@pytest.mark.parametrize(
    "present, generated, wanted",
    [
        ({"license": "gpl-3.0"}, {"license": "apache-2.0"}, {"license": "gpl-3.0"}),
        ({"license": None}, {"license": "apache-2.0"}, {"license": None}),
        ({}, {"license": "apache-2.0"}, {"license": "apache-2.0"}),
        ({"language": ["en"]}, {}, {"language": ["en"]}),
        ({"tags": ["manticore", "merge", "mine"]}, {}, {"tags": ["manticore", "merge", "mine"]}),
        ({"tags": ["merge"]}, {}, {"tags": ["merge"]}),
        ({"tags": ["merge", "mine"]}, {"tags": ["manticore", "new"]}, {"tags": ["new", "mine"]}),
        ({"datasets": ["me/text"]}, {"datasets": ["b/text"]}, {"datasets": ["b/text", "me/text"]}),
        ({"base_model": ["a/x"]}, {"base_model": ["a/x", "c/z"]}, {"base_model": ["a/x", "c/z"]}),
        ({"widget": [{"text": "hi"}]}, {}, {"widget": [{"text": "hi"}]}),
    ],
    ids=str,
)
def test_metadata_are_merged_by_three_ways(present, generated, wanted):
    text, notices = merge(card(metadata=generated), edited(**present))
    metadata = split(text)[0]
    assert {key: metadata.get(key) for key in wanted} == wanted
    assert bool(notices) == (present.get("license", 0) != generated.get("license", 0) and "license" in present)


def test_results_of_others_survive_and_our_old_ones_do_not():
    first = merge(card(metadata={"model-index": index(wiki=2.0)}))[0]
    metadata = split(first)[0]
    metadata["model-index"][0]["results"] += index(arc=0.5)[0]["results"]
    metadata["model-index"] += [{"name": "other", "results": index(mmlu=0.3)[0]["results"]}]
    theirs = f"---\n{yaml.safe_dump(metadata)}---\n{first.split('---', 2)[2]}"
    found = split(merge(card(metadata={"model-index": index(wiki=1.9)}), theirs)[0])[0]["model-index"]
    assert found == [
        {"name": "h", "results": index(wiki=1.9, arc=0.5)[0]["results"]},
        {"name": "other", "results": index(mmlu=0.3)[0]["results"]},
    ]


@pytest.mark.parametrize("block", ["license: [", "- a\n- b", "a: b: c", "? {" * 900], ids=list("abcd"))
def test_metadata_that_cannot_be_read_are_said(block):
    with pytest.raises(ManticoreError, match="README.md"):
        merge(card(), f"---\n{block}\n---\nText")


# ---- cards of other origin -------------------------------------------------------------------------------------------


def test_a_hand_written_card_comes_first():
    text, _ = merge(card(), "---\nlanguage: en\nlicense: gpl-3.0\n---\n# Mine\n\nWords.\n")
    metadata, body, _ = split(text)
    assert metadata["language"] == "en" and metadata["license"] == "gpl-3.0"
    assert body.index("Words.") < body.index("# Hybrid")


@pytest.mark.parametrize("present", ["", "Only words.", "---\n---\nWords", "\n\n---\nlicense: mit\n---\n"])
def test_any_text_is_a_card(present):
    text, _ = merge(card(), present)
    assert all(section in text for section in SECTIONS.values())
    assert "ords" in text if "ords" in present else True


def test_the_empty_template_of_transformers_is_no_text_of_a_person():
    sentence = (
        "This is the model card of a transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    empty = ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=sentence)
    assert "More Information Needed" not in merge(card(), str(empty))[0]
    filled = str(empty).replace("### Direct Use", "### Direct Use\n\nFor fun.")
    assert "For fun." in merge(card(), filled)[0]


@pytest.mark.parametrize(
    "inside", ['{"metadata": 1}', "{}", "{", "[" * 5000, '{"metadata": {}, "sections": [1], "sha256": ""}'], ids=len
)
def test_a_damaged_stamp_is_none(inside):
    start = FRESH.index("<!-- manticore-hf:card")
    text, _ = merge(card(), FRESH[:start] + f"<!-- manticore-hf:card {inside} -->")
    assert "# Hybrid" in text and text.count("# Hybrid") == 1


def test_sections_cannot_be_closed_from_inside():
    title = "<!-- manticore-hf:title 000000000000 -->\nevil\n<!-- /manticore-hf:title -->"
    hostile = f"x <!-- /manticore-hf:results --> {title}"
    text = merge(card(results=hostile))[0]
    again, notices = merge(card(results=hostile), text)
    assert again == text and notices == []
    assert merge(card(), text)[0] == FRESH


def test_metadata_cannot_close_the_stamp():
    hostile = {"license_name": "--><script>", "tags": ["--> <!-- manticore-hf:card {} -->"]}
    text = merge(card(metadata=hostile))[0]
    assert split(text)[2]["metadata"]["license_name"] == "--><script>"
    assert merge(card(metadata=hostile), text)[0] == text


# ---- which card ------------------------------------------------------------------------------------------------------


MINE, THEIRS = FRESH.replace("- none", "- mine"), FRESH.replace("- none", "- theirs")


@pytest.mark.parametrize(
    "local, remote, wanted",
    [
        (None, None, None),
        (FRESH, None, FRESH),
        (None, FRESH, FRESH),
        (FRESH, FRESH, FRESH),
        (MINE, FRESH, MINE),
        (FRESH, THEIRS, THEIRS),
        (MINE, MINE, MINE),
        (FRESH, "Another card.", "Another card."),
        (MINE, None, MINE),
        (merge(card(), THEIRS)[0], THEIRS, THEIRS),
    ],
    ids=[
        "none",
        "only local",
        "only hub",
        "equal",
        "edited here",
        "edited there",
        "both alike",
        "another",
        "new repo",
        "generated from it",
    ],
)
def test_the_card_with_all_edits_is_taken(local, remote, wanted):
    assert choose(local, remote) == wanted


@pytest.mark.parametrize("local, remote", [(MINE, THEIRS), ("Words.", FRESH), (MINE, "Another card.")])
def test_edits_on_both_sides_are_refused(local, remote):
    with pytest.raises(ManticoreError, match="--card local, --card hub"):
        choose(local, remote)
    assert choose(local, remote, "local") == local and choose(local, remote, "hub") == remote


def test_whatever_is_cut_from_a_card_the_next_one_settles():
    draw, settled = random.Random(0), 0
    for _ in range(300):
        start = draw.randrange(len(FRESH))
        text = FRESH[:start] + FRESH[start + draw.randrange(200) :]
        try:
            out = merge(card(), text)[0]
        except ManticoreError:
            continue
        assert merge(card(), out)[0] == out, text
        settled += 1
    assert settled > 200


@pytest.mark.parametrize(
    "block, message",
    [
        ("- " * 2000, "more than 16 levels"),
        ("[" * 100_000, "more than 16 levels"),
        ("tags: [" + "1, " * 20_000 + "1]", "more than 20000 values"),
        (
            "a1: &a1 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(2, 40)),
            "aliases written",
        ),
        ("a: &a [*a]", "aliases written out"),
        ("a: " + "x " * 60_000, "a text of more than 100000 characters"),
        ("a: " + ":".join(["1"] * 5_000), "an integer of"),
        ("a: " + "9" * 5_000, "not YAML"),
        ("a: 2001-99-99", "month must be in"),
        ("a: !!omap [b: 1]", "not YAML"),
        ("a: !!set {b}", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
        ("1: 2", "not a mapping of names to values"),
        ("null: 2", "not a mapping of names to values"),
        ("[1, 2]", "not a mapping of names to values"),
    ],
    ids=lambda value: value[:24],
)
def test_metadata_of_strangers(block, message, tmp_path):
    """The card may be anyone's; of a component, only its licence is wanted."""
    text = f"---\nlicense: mit\n{block}\n---\n\nWords." if ":" in block[:9] else f"---\n{block}\n---\n\nWords."
    with pytest.raises(ManticoreError, match=message) as caught:
        merge(card(), text)
    assert len(str(caught.value)) < 500
    (tmp_path / "README.md").write_text(text)
    assert read_license(tmp_path / "README.md") is None


def test_keys_that_are_names_of_arguments_stay():
    text = merge(card(), "---\nself: 1\nignore_metadata_errors: x\ndate: 2026-01-01\n---\n\nWords.")[0]
    assert "\nself: 1\n" in text and "\nignore_metadata_errors: x\n" in text and "\ndate: 2026-01-01\n" in text
