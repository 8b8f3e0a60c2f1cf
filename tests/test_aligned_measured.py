"""What is measured of a component with a tokenizer of its own: on its own tokens, or inside the hybrid."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from aligned_pairs import CODE, hybrid, model, tokenizer
from datasets import Dataset
from hub_models import folder_of
from tiny_hybrid import QUIET_RECIPE
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from two_tokenizers import FIRST, SECOND

from manticore_hf import ManticoreError, ManticoreForCausalLM, prune
from manticore_hf.cli import main
from manticore_hf.compare import CompareArguments
from manticore_hf.compare.compare import Comparison
from manticore_hf.compare.harness import _models
from manticore_hf.compare.scores import forward_flops
from manticore_hf.compose import choose_tokenizer
from manticore_hf.compose.choose_tokenizer import measure_tokenizers
from manticore_hf.evaluation.data import DataArguments, load_rows
from manticore_hf.evaluation.losses import ONLINE, make_passages
from manticore_hf.hub.inspection import inspect_hybrid, print_inspection
from manticore_hf.report import speed
from manticore_hf.report.measure import feature_similarity
from manticore_hf.training.calibrate import calibrate_projectors
from manticore_hf.training.recipe import run_recipe
from manticore_hf.utils.flops import count_flops

HOME, OTHER = "llama_gpt", "gpt_neox_gemma"
TEXT = FIRST + SECOND + CODE + "Two dogs \U0001f600 sat under a tree.\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return hybrid(tmp_path_factory.mktemp("aligned"))


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    made.save_pretrained(folder)
    tokenizer("gpt").save_pretrained(folder)
    return folder


@torch.no_grad()
def naive_nats(part, ids, first):
    """-log p of the ids from `first` on, one after the other."""
    return -sum(
        part(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]].item() for i in range(first, len(ids))
    )


def gemma_ids(text):
    """The text as the other component reads it: its start token and its own tokens."""
    return tokenizer("gemma")(text).input_ids


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    for name, family, kind in (("a", "llama", "gpt"), ("b", "gpt_neox", "gemma")):
        folder_of(model(family, kind), folder / name, tokenizer(kind))
    (folder / "text.txt").write_text(TEXT * 6)
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (FIRST, SECOND)))
    training = {**QUIET_RECIPE, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    values = {
        "components": ["a", "b"], "hybrid": {"num_blocks": 1, "dtype": "float32", "tokenizer_component": "a"},
        "data": {"data": "text.txt", "block_size": 48}, "stages": [{"finetune": training}],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(values))
    return folder


def comparison(recipe, output, **settings):
    arguments = CompareArguments(test=str(recipe / "test.jsonl"), seeds=(0,), **settings)
    return Comparison(recipe / "recipe.yaml", arguments, output)


def test_compare_tunes_components_on_their_own_tokens(recipe, tmp_path):
    one = comparison(recipe, tmp_path)
    known = {contender.name: contender for contender in one._contenders()}
    assert {"a, untuned", "original b", "a, tuned", "b, tuned", "b, tuned 2 times as long"} < set(known)
    assert not {"b, untuned", "b with its own tokenizer, tuned", "original a"} & set(known)
    one.by_name = known
    names = ["original b", "b, tuned", "a, tuned", "ensemble, untuned", "ensemble of the tuned components"]
    with tqdm(disable=True) as one.bar:
        for name in names:
            one.chosen[name] = one._choose(known[name])
    rows = {name: one._tested(known[name]) for name in names}

    # What it was tuned on: the training text, through its own tokenizer, and it is kept with that
    own = one.shop.rows_of(tokenizer("gemma"))
    kept = "".join(text for row in one.shop.train_texts["texts"] for text in row)
    assert all(row["input_ids"][0] == tokenizer("gemma").bos_token_id for row in own)
    seen = "".join(tokenizer("gemma").decode(row, skip_special_tokens=True) for row in own["input_ids"])
    assert kept.replace("\ufffd", "")[:200] in seen.replace("\ufffd", "")
    tuned = one.chosen["b, tuned"][0]
    assert (tuned["folder"] / "model" / "tokenizer.json").read_bytes() == (recipe / "b" / "tokenizer.json").read_bytes()

    # The test text by hand, every piece behind the start of its own tokenizer
    by_hand = sum(naive_nats(model("gpt_neox", "gemma"), gemma_ids(text), 1) for text in one.documents.texts)
    assert rows["original b"]["nll"].sum() == pytest.approx(by_hand, rel=1e-4)
    after = one.shop.load_plain(tuned).eval()
    by_hand = sum(naive_nats(after, gemma_ids(text), 1) for text in one.documents.texts)
    assert rows["b, tuned"]["nll"].sum() == pytest.approx(by_hand, rel=1e-4) and rows["b, tuned"]["correct"] is None
    assert rows["b, tuned"]["nll"].sum() < rows["original b"]["nll"].sum()

    # Mixtures are aligned hybrids of the components, untuned or tuned
    _, ids = one.documents.rows[0]
    for name, parts in (
        ("ensemble, untuned", [None, None]),
        ("ensemble of the tuned components", [one.chosen["a, tuned"][0], tuned]),
    ):
        mixed = known[name].load(one.chosen[name][0])
        assert mixed.config.aligned == ("b",) and mixed.config.mixture == "static"
        with torch.no_grad():
            logs = []
            for part in mixed.config.component_names:
                mixed.set_mixture_weights(part)
                logs.append(mixed(torch.tensor([ids]), use_cache=False).logits.log_softmax(-1))
            mixed.set_mixture_weights(None)
            wanted = (sum(logs) / 2).log_softmax(-1)
            torch.testing.assert_close(
                mixed(torch.tensor([ids]), use_cache=False).logits.log_softmax(-1), wanted, atol=1e-4, rtol=1e-4
            )
        for part, run in zip("ab", parts):
            source = recipe / part if run is None else run["folder"] / "model"
            weight = type(mixed.component(part)).from_pretrained(source).get_output_embeddings().weight
            assert torch.equal(mixed.component(part).get_output_embeddings().weight, weight)

    # FLOPs for each token of the hybrid's: what its own tokens of the same text take
    texts = one.shop.validation_passages.texts
    ratio = sum(len(gemma_ids(text)) - 1 for text in texts) / one.shop.validation_passages.tokens.sum()
    assert tuned["flops_per_token"] == pytest.approx(forward_flops(after) * ratio)
    assert one.chosen["a, tuned"][0]["flops_per_token"] == pytest.approx(forward_flops(model("llama", "gpt")))


@pytest.mark.slow
def test_a_whole_comparison_of_an_aligned_hybrid(recipe, tmp_path):
    result = comparison(recipe, tmp_path, from_tuned=True, all_text=str(recipe / "text.txt")).run()
    names = [row["name"] for row in result["rows"]]
    assert {"token gate over the tuned components", "hybrid, 1 block", "hybrid, 1 block, from tuned components"} < set(
        names
    )
    assert "b, retrained on all text" in names and all(math.isfinite(row["loss"]) for row in result["rows"])
    assert "accuracy" not in next(row for row in result["rows"] if row["kind"] == "oracle")


def test_what_a_comparison_cannot_do_is_said_at_once(recipe, tmp_path):
    for number, (settings, message) in enumerate(
        [({"blocks": (1, 2)}, "needs one block"), ({"prune": True}, "leave --prune out")]
    ):
        with pytest.raises(ManticoreError, match=message):
            comparison(recipe, tmp_path / str(number), **settings)


def test_the_harness_gives_components_their_own_tokenizers(made):
    models = dict(_models(made, tokenizer("gpt"), None))
    assert list(models) == ["hybrid", HOME, OTHER, "ensemble", ONLINE]
    part, own = models[OTHER]()
    assert part is made.component(OTHER) and own.get_vocab() == tokenizer("gemma").get_vocab()
    assert models[HOME]()[1].get_vocab() == tokenizer("gpt").get_vocab()
    mean, own = models["ensemble"]()
    ids = torch.tensor([tokenizer("gpt")(CODE).input_ids])
    assert own.get_vocab() == tokenizer("gpt").get_vocab() and made.config.mixture == "token"
    with torch.no_grad():
        logs = [alone(made, name, ids) for name in made.config.component_names]
        wanted = (sum(logs) / 2).log_softmax(-1)
        torch.testing.assert_close(mean(ids).logits.log_softmax(-1), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def alone(made, name, ids):
    """Log-probabilities of one component inside the hybrid."""
    made.set_mixture_weights(name)
    try:
        return made(ids, use_cache=False).logits.log_softmax(-1)
    finally:
        made.set_mixture_weights(None)


def test_speed_is_of_the_same_text(made, monkeypatch):
    calls = []

    def timed(part, ids, count):
        calls.append((part, ids[0].tolist(), count))
        return 0.5 + count  # seconds

    monkeypatch.setattr(speed, "_generate", timed)
    prompt = tokenizer("gpt")(CODE).input_ids
    found = speed.measure_speed(made, prompt, new_tokens=4, repeats=1)
    given = {id(part): ids for part, ids, _ in calls}
    own = gemma_ids(CODE)
    assert given[id(made.component(OTHER))] == own and own != prompt
    assert given[id(made.component(HOME))] == given[id(made)] == prompt
    rows, ratio = found["models"], (len(own) - 1) / len(prompt)
    assert rows[OTHER]["tokens_for_one"] == pytest.approx(ratio) and rows[HOME]["tokens_for_one"] == 1
    assert rows[OTHER]["prefill"] == rows[HOME]["prefill"] == pytest.approx(len(prompt) / 1.5)
    assert rows[OTHER]["decode"] == pytest.approx(1 / ratio) and rows[HOME]["decode"] == pytest.approx(1)
    end = tokenizer("gpt").eos_token_id
    with pytest.raises(ManticoreError, match="needs text"):
        speed.measure_speed(made, [end, end], 1, 1)


def test_calibrating_measures_components_inside_the_hybrid(tmp_path):
    made = hybrid(tmp_path, mix_loss_weight=0.5, component_loss_weight=2.0)
    ids = tokenizer("gpt")(TEXT).input_ids
    rows = [ids[start : start + 24] for start in range(0, 24 * 8, 24)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    found = calibrate_projectors(made, data, tokens=200, batch_size=2)
    assert found.r2 == {}  # one block has no projectors
    chosen = torch.tensor(rows[:4])  # the first quarter of the batches, at least two
    for name in made.config.component_names:
        logs = alone(made, name, chosen)
        wanted = F.nll_loss(logs[:, :-1].flatten(0, 1), chosen[:, 1:].flatten()).item()
        assert found.losses[name] == pytest.approx(wanted, rel=1e-4), name
    assert found.reference == min(found.losses, key=found.losses.get)


def test_pruning_keeps_the_tokenizer(made, tmp_path):
    ids = torch.tensor([tokenizer("gpt")(CODE).input_ids])
    hard = prune(made, HOME)
    hard.save_pretrained(tmp_path)
    again = ManticoreForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = made.component(HOME)(ids, use_cache=False).logits
        assert again.config.aligned == () and torch.equal(again(ids, use_cache=False).logits, wanted)
    assert not list(Path(tmp_path).glob("aligned_*"))
    for route in (OTHER, "alpha", "loss"):
        with pytest.raises(ManticoreError, match="original model; prune to 'llama_gpt'"):
            prune(made, route, Dataset.from_dict({"input_ids": ids.tolist()}))


def test_costs_are_of_each_models_own_tokens(made, saved, capsys):
    found = inspect_hybrid(saved, tokens=16)
    parts = {row["part"]: row for row in found["parts"]}
    ids = torch.zeros(1, 16, dtype=torch.long)
    for name in made.config.component_names:
        part = made.component(name)
        wanted = count_flops(lambda part=part: part(ids, use_cache=False)) / 16
        assert parts[name]["flops_per_token"] == wanted
    assert parts["hybrid"]["flops_per_token"] == parts[HOME]["flops_per_token"] + parts[OTHER]["flops_per_token"]
    assert found["settings"]["aligned"] == [OTHER]
    print_inspection("saved", found)
    assert f"{OTHER} reads text by another tokenizer" in capsys.readouterr().out
    with pytest.raises(ManticoreError, match="depends on the text"):
        forward_flops(made)
    text = tokenizer("gpt")(TEXT).input_ids[:64]
    made(torch.tensor([text]), use_cache=False)  # the first call finds out how components can be read
    wanted = count_flops(lambda: made(torch.tensor([text]), use_cache=False)) / 64
    assert forward_flops(made, 64, text) == wanted > 0.8 * parts["hybrid"]["flops_per_token"]


def test_similarity_is_of_states_at_the_same_places(made):
    rows = Dataset.from_dict({"input_ids": [tokenizer("gpt")(CODE).input_ids]})
    assert [(row["boundary"], row["components"]) for row in feature_similarity(made, rows)] == [(1, [HOME, OTHER])]


def test_the_tokenizer_is_chosen_by_a_text(recipe, tmp_path, capsys):
    parts, text = [str(recipe / "a"), str(recipe / "b")], "two dogs and a cat ran."
    found = measure_tokenizers(parts, [text], mixture="static")
    for name, kind in (("a", "gpt"), ("b", "gemma")):
        whole = ManticoreForCausalLM.from_components(parts, tokenizer_component=name, mixture="static")
        ids = tokenizer(kind)(text).input_ids
        ids = [tokenizer(kind).eos_token_id, *ids] if name == "a" else ids  # it begins texts with nothing
        nats = naive_nats(whole, ids, 1)
        assert found[name] == pytest.approx(nats / math.log(2) / len(text), rel=1e-4), name
    (tmp_path / "text.txt").write_text(text)
    command = ["compose", *parts, "--tokenizer-data", str(tmp_path / "text.txt"), "--mixture", "static"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    best, kinds = min(found, key=found.get), {"a": "gpt", "b": "gemma"}
    made = ManticoreForCausalLM.from_pretrained(tmp_path / "out")
    assert made.config.tokenizer_component == best and made.config.aligned == ({"a": "b", "b": "a"}[best],)
    kept = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert kept == tokenizer(kinds[best]).get_vocab()
    said = capsys.readouterr().out
    assert all(f"with {name}'s tokenizer: {bits:.4f} bits per byte" in said for name, bits in found.items())
    # The next command, printed and in the README: the table, with the components mapped, and the originals
    data = {"data": str(tmp_path / "text.txt"), "block_size": 4, "validation_fraction": 0.0}
    rows, _ = load_rows(DataArguments(**data), AutoTokenizer.from_pretrained(tmp_path / "out"), keep_text=True)
    pieces = make_passages(rows, AutoTokenizer.from_pretrained(tmp_path / "out")).texts
    program, *table = shlex.split(re.search(r"measure it with: (.*)", said).group(1))
    wanted = ["evaluate", "--model", str(tmp_path / "out"), "--data", data["data"], "--block-size", "256"]
    wanted += ["--output-dir", str(tmp_path / "out")]
    assert (program, table) == ("manticore-hf", wanted)
    assert main([*table, "--block-size", "4", "--output-dir", str(tmp_path / "table")]) == 0
    bits = json.loads((tmp_path / "table" / "evaluation.json").read_text())["bits_per_byte"]
    assert list(bits) == ["a", "b", "ensemble", ONLINE, "hybrid", "original a", "original b"]
    by_hand = sum(naive_nats(model("gpt_neox", "gemma"), gemma_ids(piece), 1) for piece in pieces)
    assert bits["original b"] == pytest.approx(by_hand / math.log(2) / len("".join(pieces)), rel=1e-4)
    assert bits[best] == pytest.approx(bits[f"original {best}"], rel=1e-4)
    # And the report's. Both find the originals where `compose` had them from
    report = ["report", str(tmp_path / "out"), "--data", data["data"], "--block-size", "4"]
    assert main(report) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["parts"]["losses"]
    for name in ("original a", "original b"):
        assert rows["bits_per_byte"][name] == pytest.approx(bits[name], rel=1e-4)
    assert main([*report, "--components", parts[0]]) == 2
    capsys.readouterr()
    for wrong, message in (
        ([*command, "--tokenizer-component", "a"], "no tokenizer to choose"),
        ([*command, "--transplant", "mean"], "drop one"),
        (["compose", parts[0], parts[0], *command[3:]], "none to choose|named 'a'"),
    ):
        assert main([*wrong, "--output-dir", str(tmp_path / "wrong")]) == 2
        assert re.search(message, capsys.readouterr().err), message


def test_a_recipes_text_chooses_unless_the_recipe_does(recipe, tmp_path):
    """Of every shuffle of the components the same tokenizer; what is named is not measured."""
    (tmp_path / "text.txt").write_text(TEXT * 9)
    found = measure_tokenizers([str(recipe / "a"), str(recipe / "b")], [TEXT * 9], mixture="static")
    best = min(found, key=found.get)
    for order, more, wanted in (("ab", "", best), ("ba", "", best), ("ab", ", tokenizer_component: b", "b")):
        file, out = tmp_path / "own.yaml", tmp_path / f"{order}{len(more)}"
        parts = ", ".join(str(recipe / one) for one in order)
        file.write_text(f"components: [{parts}]\nhybrid: {{mixture: static{more}}}\ndata: {{data: text.txt}}\n")
        ((_, result),) = run_recipe(file, out, allow_outside=True)
        assert ManticoreForCausalLM.from_pretrained(out / "0-compose").config.tokenizer_component == wanted
        assert result.get("tokenizers") == (None if more else pytest.approx(found, rel=1e-3))


def test_no_more_of_a_text_is_read_than_it_takes(recipe, monkeypatch):
    """Until one tokenizer is better by more than chance; all hybrids have the same weights."""
    read, text = [], TEXT * 40

    def lost(model, own, texts, progress):
        assert not progress
        read.append((model.config.tokenizer_component, *texts))
        turn = sum(name == "a" for name, _ in read) % 2  # the other way round in every other piece
        better = ("a", "b")[turn] if unsure else "b"
        return torch.tensor([len(texts[0]) * (1.0 if read[-1][0] == better else 1.2)])

    monkeypatch.setattr(choose_tokenizer, "text_nats", lost)
    parts = [str(recipe / "a"), str(recipe / "b")]
    for unsure, pieces in ((False, 8), (True, math.ceil(len(text) / 500))):
        read.clear()
        found = measure_tokenizers(parts, [text])
        assert [name for name, _ in read] == ["a", "b"] * (len(read) // 2)
        (mine, others) = ([piece for name, piece in read if name == one] for one in "ab")
        assert mine == others and text.startswith("".join(mine)) and len(mine) >= pieces
        assert len(mine) == 8 or "".join(mine) == text and unsure
        if not unsure:
            size, letters = len("".join(mine).encode()), len("".join(mine))
            assert found["b"] == pytest.approx(letters / math.log(2) / size)
            assert found["a"] == pytest.approx(1.2 * found["b"])
    first, second = choose_tokenizer._hybrids(parts, {}).values()
    kept = {parameter.data_ptr() for parameter in first.component("b").parameters()}
    assert {parameter.data_ptr() for parameter in second.component("b").parameters()} == kept
