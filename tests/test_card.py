"""What a generated card says, that it is right, and that what strangers wrote only shows in it."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import clean_process
import pytest
import torch
from hub_models import publish as put
from hub_models import tiny, tokenizer
from huggingface_hub import ModelCard

from manticore_hf import ComponentSpec, ManticoreForCausalLM, prune
from manticore_hf.hub.card import CardFacts, make_card, read_results
from manticore_hf.hub.card_merge import merge

pytestmark = pytest.mark.usefixtures("counted_once")
LOSSES = {"a": 2.0, "b": 2.5, "ensemble": 1.9, "hybrid": 1.8}


@pytest.fixture(scope="module")
def saved_once(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    for name, family in (("a", "gpt_neox"), ("b", "mamba")):
        put(hub, f"card/{name}", tiny(family), folder / "src", tokenizer())
    model = ManticoreForCausalLM.from_components(["card/a", "card/b"], num_blocks=2)
    model.save_pretrained(folder / "out")
    return model, folder / "out"


@pytest.fixture
def saved(saved_once, tmp_path):
    """A saved hybrid of two referenced components, in two blocks, for the test to change. Returns (model, folder)."""
    model, folder = saved_once
    return copy.deepcopy(model), Path(shutil.copytree(folder, tmp_path / "out"))


def made(folder, **facts):
    licenses = facts.pop("licenses", {"a": "mit", "b": "apache-2.0"})
    return make_card(folder, CardFacts("me/hybrid", licenses, **facts))


def tables(text):
    """Rows of all Markdown tables, as lists of cells."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines]


def test_the_code_of_the_card_runs_as_it_stands(saved, hub, tmp_path):
    """In a fresh process without the package: nothing is asked, and no file of code is listed in a warning."""
    tokenizer().save_pretrained(saved[1])
    card, *_ = made(saved[1])
    (tmp_path / "repo").mkdir()
    hub.add_repo("me/hybrid", saved[1])
    code = re.search(r"```python\n(.*?)```", card.sections["load"], re.S)[1]
    done = clean_process.run(["-c", code], cwd=tmp_path / "repo", modules=clean_process.TRANSFORMERS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "custom code" not in done.stdout + done.stderr
    assert "new version of the following files" not in done.stderr


def test_the_components_are_those_of_the_configuration(saved):
    card, *_ = made(saved[1])
    rows = {row[0]: row for row in tables(card.sections["components"])}
    for entry in saved[0].config.components:
        row = rows[entry["name"]]
        assert entry["repo_id"] in row[1] and entry["revision"] in row[2] and entry["revision"][:12] in row[2]
    assert rows["a"][3:] == ["gpt_neox", "8.75 k", "mit", "0-1, 2-2"]
    assert rows["b"][3:] == ["mamba", "5.49 k", "apache-2.0", "0-0, 1-1"]


def test_the_mixture_is_the_models(saved, tmp_path):
    model, weights = saved[0], [[0.25, 0.75], [0.9, 0.1]]
    model.set_mixture_weights(torch.tensor(weights))
    model.save_pretrained(tmp_path / "set")
    card, _, alpha, _ = made(tmp_path / "set")
    assert torch.allclose(torch.tensor(alpha), torch.tensor(weights))
    assert ["1", "0.250", "0.750"] in tables(card.sections["mixture"])
    assert "plots/mixture.png" in card.sections["mixture"]


def test_the_cost_is_the_models(saved):
    card, *_ = made(saved[1])
    count = sum(p.numel() for p in saved[0].parameters())
    row = next(row for row in tables(card.sections["cost"]) if "this hybrid" in row[0])
    assert row[1] == f"{count / 1000:.3g} k" and row[2] == f"{4 * count / 1000:.3g} kB"


@pytest.mark.parametrize(
    "losses, own, shown",
    [
        (LOSSES, None, True),
        ({"hybrid": 1.8}, None, False),
        ({"a": 1.0, "b": 2.0}, None, False),
        ({"soft hybrid": 2.0, "distilled": 1.9}, "distilled", True),
    ],
)
def test_no_number_without_its_baselines(saved, losses, own, shown):
    result = {"losses": losses, "data": "org/text", "tokens": 4096, **({"own": own} if own else {})}
    (saved[1] / "evaluation.json").write_text(json.dumps(result))
    card, _, _, notices = made(saved[1])
    text = merge(card)[0]
    assert ("results" in card.sections) == shown == ("model-index" in card.metadata) == (not notices)
    assert ("No results are stated" in text) != shown
    if shown:
        mine = losses[own or "hybrid"]
        values = {m["type"]: m["value"] for m in card.metadata["model-index"][0]["results"][0]["metrics"]}
        assert values == {"loss": mine, "perplexity": round(math.exp(mine), 4)}
        rows = tables(card.sections["results"])[2:]
        assert [float(row[2]) for row in rows] == sorted(losses.values()) and "4,096 tokens" in card.sections["results"]


def test_no_more_is_claimed_than_was_measured(saved):
    """Not on little text, nor without an interval, nor against original components that are not there."""
    bits = {name: loss / 2 for name, loss in LOSSES.items()}
    given = {"losses": LOSSES, "bits_per_byte": bits, "bytes": 9000}
    best = min((name for name in LOSSES if name != "hybrid"), key=LOSSES.get)

    def said(**changes):
        (saved[1] / "evaluation.json").write_text(json.dumps({**given, **changes}))
        return made(saved[1])[0].sections["results"]

    better = {best: [0.1, 0.02, 0.2]}
    found = said(differences=better)
    assert f"This hybrid is 0.1000 bits per byte better than the best baseline listed ({best})" in found
    assert "bits per byte worse than" in said(differences={best: [-0.1, -0.2, -0.02]})
    assert "shows no clear difference" in said(differences={best: [0.1, -0.02, 0.2]})
    for nothing in ({}, {"differences": {best: [0.1, None, None]}}, {"differences": {"b": [0.1, 0.05, 0.2]}}):
        assert "No claim is made against the best baseline" in said(**nothing)
    assert "9,000 bytes" in said() and "4,999 bytes of text are too few" in said(bytes=4999, differences=better)
    rows = {row[0]: row[1] for row in tables(said(differences=better))[2:]}
    assert rows[best] == f"{bits[best]:.4f}"
    assert "original components, with their own tokenizers, were not measured" in said()
    came = {**LOSSES, f"original {best}": 0.1}
    found = said(losses=came, bits_per_byte={name: loss / 2 for name, loss in came.items()})
    assert "were not measured" not in found and f"(original {best})" in found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[1]",
        '{"losses": 3}',
        '{"losses": {"a": "x"}}',
        '{"losses": {"a": NaN}}',
        "{",
        '{"losses": {}}',
        "[" * 3000,
    ],
    ids=range(9),
)
def test_results_of_another_form_are_passed_over(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    assert read_results(tmp_path) == []


def test_metadata_follow_the_hub(saved):
    (saved[1] / "evaluation.json").write_text(json.dumps({"losses": LOSSES, "data": "org/text"}))
    recipe = "components: [a]\ndata: {data: org/books}\nstages:\n - search: {data: {data: me/code}}\n - pretrain:\n"
    (saved[1] / "recipe.yaml").write_text(recipe)
    card, license_text, _, _ = made(saved[1], tags=["mine", "merge"], datasets=["me/more"])
    assert card.metadata == {
        "base_model": ["card/a", "card/b"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["manticore", "hybrid", "merge", "mine"],
        "datasets": ["me/more", "org/books", "me/code"],
        "model-index": card.metadata["model-index"],
    }
    assert license_text is None
    assert ModelCard(merge(card)[0]).data.eval_results[0].dataset_name == "org/text"
    assert card.metadata["model-index"][0]["results"][0]["dataset"]["type"] == "org/text"
    ModelCard(merge(card)[0]).validate()


@pytest.mark.parametrize("source", ["text.txt", "org/text.jsonl", "/data/text", "../text", "a b/c", "folder/in/folder"])
def test_paths_are_no_data_sets(saved, source):
    (saved[1] / "recipe.yaml").write_text(f"data: {{data: '{source}'}}\nstages: []\n")
    assert "datasets" not in made(saved[1])[0].metadata


@pytest.mark.parametrize(
    "recipe", ["a: [", "- a", "null", "stages: [[]]", "stages: {a: 1}\ndata: 3", "data: [1]\nstages: []"], ids=range(6)
)
def test_any_recipe_can_be_shown(saved, recipe):
    (saved[1] / "recipe.yaml").write_text(recipe)
    assert recipe in made(saved[1])[0].sections["recipe"]


def test_results_on_two_texts_are_two_results(saved):
    results = [{"losses": LOSSES, "data": "My text, prose"}, {"losses": LOSSES, "data": "My text, code"}]
    (saved[1] / "evaluation.json").write_text(json.dumps(results))
    found = made(saved[1])[0].metadata["model-index"][0]["results"]
    assert [one["dataset"]["type"] for one in found] == ["my-text-prose", "my-text-code"]
    assert [len(one["metrics"]) for one in found] == [2, 2]


# ---- licences --------------------------------------------------------------------------------------------------------


def test_without_a_single_licence_the_card_links_to_the_table(saved):
    card, text, *_ = made(saved[1], licenses={"a": "mit", "b": None})
    assert card.metadata["license"] == "other" and card.metadata["license_link"] == "LICENSE.md"
    assert card.metadata["license_name"] == "mixed-component-licenses"
    for shown in (card.sections["licenses"], text):
        assert "not legal advice" in shown and "unknown, because that of b is" in shown and "not stated" in shown
    ModelCard(merge(card)[0]).validate()


def test_conflicts_are_shown(saved):
    licenses = {"a": "gpl-3.0", "b": "cc-by-nc-4.0"}
    card, text, *_ = made(saved[1], licenses=licenses)
    assert "**Conflict:**" in card.sections["licenses"] and "**Conflict:**" in text


def test_the_publishers_licence_is_told_from_the_components(saved):
    card, text, *_ = made(saved[1], license="gpl-3.0")
    assert card.metadata["license"] == "gpl-3.0" and text is None
    assert (
        "states gpl-3.0" in card.sections["licenses"]
        and "The licence apache-2.0 satisfies all of them" in card.sections["licenses"]
    )


# ---- other kinds of hybrids ------------------------------------------------------------------------------------------


def test_a_pruned_hybrid(saved, tmp_path):
    prune(saved[0], ["a", "b"]).save_pretrained(tmp_path / "hard")
    card, _, alpha, _ = made(tmp_path / "hard")
    assert alpha == [[1.0, 0.0], [0.0, 1.0]]
    assert "pruned" in card.sections["title"] and "manticore-hf prune" not in card.sections["cost"]


def test_embedded_components_are_said_to_be_here(tmp_path):
    parts = [ComponentSpec(tiny("gpt_neox"), name="a"), ComponentSpec(tiny("mamba"), name="b")]
    ManticoreForCausalLM.from_components(parts).save_pretrained(tmp_path / "out")
    card, *_ = made(tmp_path / "out", own_bytes=70_000)
    assert "all of its weights (70 kB)" in card.sections["title"] and "base_model" not in card.metadata
    assert tables(card.sections["components"])[2][1:3] == ["in this repository", "-"]
    assert "repositories it references" not in card.sections["limits"]


@pytest.mark.parametrize("settings, joined, mixed", [
    ({"mixture": "online"}, "an online mixture: untrained weights that follow", "follow the components' losses"),
    ({"mixture": "token"}, "a small gate that weights", "a gate weights the components' predictions"),
    ({"mixture": "static"}, "joined by equal mixture weights\ninstead", "(plots/mixture.png)"),
    ({"mixture": "static", "num_blocks": 2}, "small projectors and equal mixture weights", "(plots/mixture.png)"),
])  # fmt: skip
def test_what_joins_the_components_is_what_there_is(settings, joined, mixed, tmp_path):
    """Nothing is called learned that is not known to be, and an online mixture is no baseline of itself."""
    parts = [ComponentSpec(tiny("gpt_neox"), name="a"), ComponentSpec(tiny("mamba"), name="b")]
    model = ManticoreForCausalLM.from_components(parts, **{"num_blocks": 1, "projector_init": "default", **settings})
    model.save_pretrained(tmp_path)
    losses = {"a": 3.0, "b": 3.2, "ensemble": 2.9, "online mixture": 2.5, "hybrid": 2.5}
    (tmp_path / "evaluation.json").write_text(json.dumps({"data": "text", "losses": losses}))
    shown = made(tmp_path)[0].sections
    assert joined in shown["title"] and mixed in shown["mixture"] and "learned" not in shown["title"]
    online = settings["mixture"] == "online"
    assert ("| online mixture |" in shown["results"]) != online
    assert ("The hybrid is the online mixture of its components" in shown["results"]) == online


def test_kinds_of_text_have_columns_of_their_own(saved):
    result = {"data": "text", "losses": {"a": 3.0, "hybrid": 2.5}, "bits_per_byte": {"a": 1.2, "hybrid": 1.0}}
    result["by_kind"] = {"code": {"a": 1.5, "hybrid": 0.9}, "prose": {"a": 0.9}}
    (saved[1] / "evaluation.json").write_text(json.dumps(result))
    shown = made(saved[1])[0].sections
    assert "| bits per byte | code: bits per byte | prose: bits per byte |" in shown["results"]
    assert re.search(r"\*\*hybrid \(this model\)\*\* \| 1.0000 \| 0.9000 \| – \|", shown["results"])
    assert "let `manticore-hf compare` say" in shown["cost"]


# ---- what strangers write --------------------------------------------------------------------------------------------

HOSTILE = "x | y\n# Evil <script>alert(1)</script> [click](javascript:x) `a` **b** <!-- c -->"


def test_hostile_text_shows_and_formats_nothing(saved):
    result = {"losses": {HOSTILE: 1.0, "hybrid": 2.0}, "data": HOSTILE, "by_kind": {HOSTILE: {HOSTILE: 0.5}}}
    (saved[1] / "evaluation.json").write_text(json.dumps(result))
    (saved[1] / "recipe.yaml").write_text(f"````\n```\n{HOSTILE}\n<!-- /manticore-hf:recipe -->\n")
    card, text, *_ = made(saved[1], licenses={"a": HOSTILE, "b": "mit"}, access=[HOSTILE])
    for name in ("title", "components", "results", "licenses", "limits"):
        shown = card.sections[name]
        assert not re.search(r"(?<!\\)<|^# Evil|(?<!\\)\[click|(?<!\\)`a", shown, re.MULTILINE), name
    assert all(len({len(row) for row in tables(card.sections[name])}) == 1 for name in ("licenses", "results"))
    fence = re.search(r"^(`{3,})yaml$", card.sections["recipe"], re.MULTILINE)[1]
    assert len(fence) == 5 and card.sections["recipe"].count(f"\n{fence}\n") == 1
    whole, _ = merge(card)
    assert merge(card, whole)[0] == whole
