"""What licence a hybrid of licensed components can carry, and what is refused or left open."""

import itertools

import pytest
from hub_models import tiny
from huggingface_hub import HfApi

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.hub.licenses import _COVERS, DUTIES, LICENSES, MIXED, check, combine, describe


def of(*ids, **settings):
    return combine({f"c{k}": one for k, one in enumerate(ids)}, **settings)


@pytest.mark.parametrize(
    "ids, expected",
    [
        (["mit", "mit"], "mit"),
        (["apache-2.0", "mit"], "apache-2.0"),
        (["mit", "bsd-3-clause"], "bsd-3-clause"),
        (["cc0-1.0", "mit"], "mit"),
        (["gpl-3.0", "apache-2.0", "mit"], "gpl-3.0"),
        (["agpl-3.0", "gpl-3.0"], "agpl-3.0"),
        (["cc-by-4.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["cc-by-nc-4.0", "mit"], "cc-by-nc-4.0"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        (["llama3.1", "apache-2.0"], "llama3.1"),
        (["gemma"], "gemma"),
    ],
)
def test_one_license_satisfies_all(ids, expected):
    for order in itertools.permutations(ids):
        found = of(*order)
        assert (found.license, found.name, found.conflicts, found.unknown) == (expected, None, (), ())


@pytest.mark.parametrize("ids", [["llama3.1", "gemma"], ["apache-2.0", "cc-by-4.0"], ["cc-by-nc-4.0", "llama2"]])
def test_no_single_license_but_no_conflict(ids):
    found = of(*ids)
    assert (found.license, found.name, found.conflicts) == ("other", MIXED, ())
    assert found.duties == LICENSES[ids[0]].duties | LICENSES[ids[1]].duties


@pytest.mark.parametrize(
    "ids, words",
    [
        (["gpl-3.0", "cc-by-nc-4.0"], "no further restrictions"),
        (["gpl-3.0", "llama3"], "no further restrictions"),
        (["cc-by-sa-4.0", "cc-by-nc-sa-4.0"], "both ask"),
        (["gpl-2.0", "gpl-3.0"], "both ask"),
        (["gpl-2.0", "apache-2.0"], "patent"),
        (["cc-by-nd-4.0", "mit"], "changed form"),
    ],
)
def test_conflicts_are_refused_unless_overridden(ids, words):
    for order in itertools.permutations(ids):
        named = {f"part{k}": one for k, one in enumerate(order)}
        with pytest.raises(ManticoreError, match="not legal advice") as caught:
            check(named)
        assert words in str(caught.value) and f"part{order.index(ids[0])} ({ids[0]})" in str(caught.value)
        found = check(named, override=True)
        assert found.license == "other" and len(found.conflicts) == 1


def test_commercial_use():
    assert not of("cc-by-nc-4.0", "mit").conflicts
    assert "excludes commercial use" in of("cc-by-nc-4.0", "mit", commercial=True).conflicts[0]
    assert not of("apache-2.0", "mit", commercial=True).conflicts


@pytest.mark.parametrize("missing", [None, "other", "my-own-license", ""])
def test_what_is_unknown_is_said(missing):
    found = combine({"a": "mit", "b": missing})
    assert found.unknown == ("b",) and found.license == "other" and not found.conflicts


@pytest.mark.parametrize(
    "ids, words",
    [
        (["mit", "apache-2.0"], ["apache-2.0. ", "state what was changed"]),
        (["mit", None], ["unknown for c1"]),
        (["llama3", "gemma"], ["no single licence", "naming"]),
        (["gpl-3.0", "gemma"], ["CONFLICT: c0 (gpl-3.0) and c1 (gemma)"]),
    ],
)
def test_in_words(ids, words):
    text = describe(of(*ids))
    assert all(word in text for word in [*words, "Not legal advice"])


def test_the_table_is_sound():
    for one in LICENSES.values():
        assert one.duties <= DUTIES.keys() and one.link.startswith("https://")
    for one, covered in _COVERS.items():
        assert one not in covered and covered <= LICENSES.keys()
        for other in covered:  # whoever covers a licence asks at least for what it restricts
            restrictions = {"non-commercial", "no-derivatives", "use-restrictions", "source"}
            assert LICENSES[other].duties & restrictions <= LICENSES[one].duties


# ---- read from the components' cards ---------------------------------------------------------------------------------


def card(text):
    return lambda folder: (folder / "README.md").write_text(text)


@pytest.mark.parametrize(
    "text, stated",
    [
        ("---\nlicense: mit\n---\nText.\n", "mit"),
        ("---\nlicense: other\nlicense_name: house-rules\n---\n", "house-rules"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlanguage: en\n---\n", None),
        ("No metadata.\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\n- license\n---\n", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("where", ["hub", "directory"])
def test_composing_records_what_the_card_states(hub, owner, tmp_path, text, stated, where):
    folder = tmp_path / "part"
    tiny("gpt2").save_pretrained(folder)
    if text is not None:
        card(text)(folder)
    source = str(folder)
    if where == "hub":
        HfApi().create_repo(source := f"{owner}/part")
        HfApi().upload_folder(repo_id=source, folder_path=folder)
    model = ManticoreForCausalLM.from_components([source])
    assert model.config.components[0]["license"] == stated
    model.save_pretrained(tmp_path / "out")
    assert ManticoreForCausalLM.from_pretrained(tmp_path / "out").config.components[0]["license"] == stated
