"""A comparison: every baseline trained likewise, chosen on validation text, tested once, and resumed after a kill."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_hybrid import QUIET_RECIPE, WORDS, pair, save, word_tokenizer, write_text
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import manticore_hf.compare.compare as compare_module
import manticore_hf.compare.contenders as contenders
from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.compare import CompareArguments, run_compare
from manticore_hf.compare.compare import Comparison
from manticore_hf.compare.compared_recipe import read_recipe
from manticore_hf.compare.contenders import Workshop
from manticore_hf.compare.summary import as_markdown, verdict
from manticore_hf.evaluation.data import DataArguments, load_rows, without_text
from manticore_hf.report.comparison import read_comparison
from manticore_hf.report.verdict import decide

GRID = {"learning_rates": (1e-3, 1e-2), "seeds": (0, 1), "online_etas": (0.3, 2.0), "online_decays": (0.8,)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two components, a recipe, a training text, test documents of two kinds."""
    folder = tmp_path_factory.mktemp("place")
    for name, model in zip(("attention", "state"), pair()):
        save(model, folder / name)
    write_text(folder / "train.txt", 600)
    write_text(folder / "more.txt", 100, seed=2)
    draw = np.random.default_rng(0)
    records = [{"kind": "ab"[i % 2], "text": " ".join(draw.choice(WORDS, size=12))} for i in range(24)]
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    _recipe(folder / "recipe.yaml")
    return folder


def _recipe(path, stages=("calibrate", "pretrain", "finetune"), **data):
    training = {**QUIET_RECIPE, "num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    settings = {"calibrate": {"tokens": 300}, "pretrain": training, "finetune": training}
    values = {
        "components": ["attention", "state"], "hybrid": {"num_blocks": 1, "dtype": "float32"},
        "data": {"data": "train.txt", "block_size": 16, **data},
        "stages": [{stage: settings[stage]} for stage in stages],
    }  # fmt: skip
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def _compare(place, output, **settings):
    arguments = CompareArguments(test=str(place / "test.jsonl"), **{**GRID, **settings})
    return run_compare(place / "recipe.yaml", arguments, output)


@pytest.fixture(scope="module")
def compared(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    return output, _compare(place, output)


def texts_of(output):
    """The texts of the test documents that a comparison was made with."""
    return texts_of_file(Path(json.loads((output / "recipe.json").read_text())["data"]["data"]).with_name("test.jsonl"))


def texts_of_file(file):
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def _row(result, name):
    return next(row for row in result["rows"] if row["name"] == name)


def _runs(output, contender):
    found = [json.loads(file.read_text()) | {"folder": file.parent} for file in output.glob("runs/*/run.json")]
    return [run for run in found if run["contender"] == contender]


def test_every_baseline_is_there(compared):
    names = {row["name"] for row in compared[1]["rows"]}
    assert names == {
        "attention, untuned",
        "state, untuned",
        "ensemble, untuned",
        "online mixture, untuned",
        "attention, tuned",
        "state, tuned",
        "ensemble of the tuned components",
        "online mixture of the tuned components",
        "weighted ensemble of the tuned components",
        "token gate over the tuned components",
        "attention, tuned 2 times as long",
        "state, tuned 2 times as long",
        "hybrid, 1 block",
        "oracle: the best tuned component for each document",
    }


def test_stages_with_texts_of_their_own(place, tmp_path):
    """All are tuned on the finetune stage's text; one baseline reads all that the hybrid has read, in that order."""
    values = json.loads((place / "recipe.yaml").read_text())
    values["stages"][1]["pretrain"] |= {"data": {"data": "more.txt", "block_size": 8}}
    values["stages"][2]["finetune"] |= {"data": {"block_size": 12}}
    (place / "own_texts.yaml").write_text(json.dumps(values))
    arguments = CompareArguments(test=str(place / "test.jsonl"), seeds=(0,), learning_rates=(1e-2,))
    comparison = Comparison(place / "own_texts.yaml", arguments, tmp_path / "compared")
    shop, contenders = comparison.shop, {one.name: one for one in comparison._contenders()}
    assert len(shop.train_rows[0]["input_ids"]) == 12 and len(shop.rows_of(None, shop.earlier[0])[0]["input_ids"]) == 8
    one = contenders["attention, tuned on the earlier stages' text, then on this"]
    twin, tokens = AutoModelForCausalLM.from_pretrained(place / "attention"), 0
    for text, size in ((place / "more.txt", 8), (place / "train.txt", 12)):
        rows = without_text(load_rows(DataArguments(str(text), block_size=size), shop.tokenizer)[0])
        given = {key: value for key, value in values["stages"][2]["finetune"].items() if key != "data"}
        training = TrainingArguments(str(tmp_path / "twin"), report_to="none", seed=0, **given)
        Trainer(twin, training, train_dataset=rows).train()
        tokens += len(rows) * size
    folder = tmp_path / "run"
    folder.mkdir()
    cost = one.train(one.options[0], 0, folder)
    found = one.load({"folder": folder})
    assert cost["training_tokens"] == tokens
    ids = torch.tensor([shop.train_rows[0]["input_ids"]])
    torch.testing.assert_close(found(ids).logits, twin.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    hybrid = contenders["hybrid, 1 block"]
    (tmp_path / "hybrid").mkdir()
    assert hybrid.train(hybrid.options[0], 0, tmp_path / "hybrid")["training_tokens"] == tokens


def test_as_long_again_is_as_long_again_where_steps_are_given(place, tmp_path, monkeypatch):
    values = json.loads((place / "recipe.yaml").read_text())
    values["stages"][2]["finetune"] |= {"max_steps": 3, "per_device_train_batch_size": 2}
    (place / "steps.yaml").write_text(json.dumps(values))
    arguments = CompareArguments(test=str(place / "test.jsonl"), seeds=(0,), learning_rates=(1e-2,))
    contenders = {one.name: one for one in Comparison(place / "steps.yaml", arguments, tmp_path / "out")._contenders()}
    steps, train = [], Trainer.train
    counted = lambda self, **how: (train(self, **how), steps.append(self.state.global_step))[0]  # noqa: E731
    monkeypatch.setattr(Trainer, "train", counted)
    costs = []
    for name in ("state, tuned", "state, tuned 2 times as long"):
        folder = tmp_path / name
        folder.mkdir()
        costs.append(contenders[name].train(contenders[name].options[0], 0, folder)["training_tokens"])
    assert steps == [3, 6] and costs[1] == 2 * costs[0]


def test_the_grid_is_chosen_on_the_validation_text_alone(compared):
    output, result = compared
    runs = _runs(output, "hybrid, 1 block")
    first = [run for run in runs if run["seed"] == 0]
    assert len(first) == 2 and len(runs) == 3
    best = min(first, key=lambda run: run["validation"])
    assert _row(result, "hybrid, 1 block")["options"] == best["options"]
    tested = [run for run in runs if list(run["folder"].glob("test-*.json"))]
    assert {run["seed"] for run in tested} == {0, 1}
    assert all(run["options"] == best["options"] for run in tested)
    # The ensemble chose its components' settings by its own loss
    ensembles = [run for run in _runs(output, "ensemble of the tuned components") if run["seed"] == 0]
    assert len(ensembles) == 2
    best = min(ensembles, key=lambda run: run["validation"])["options"]
    assert _row(result, "ensemble of the tuned components")["options"] == best
    online = [run for run in _runs(output, "online mixture of the tuned components") if run["seed"] == 0]
    assert len(online) == 4  # two rates of the components, two of the mixture
    best = min(online, key=lambda run: run["validation"])["options"]
    assert _row(result, "online mixture of the tuned components")["options"] == best and best["online_decay"] == 0.8
    best = min(first, key=lambda run: run["validation"])
    # What was not chosen keeps its numbers and not its weights
    dropped = next(run for run in first if run is not best)
    assert not list(dropped["folder"].rglob("*.safetensors")) and list(best["folder"].rglob("*.safetensors"))


def test_the_ensemble_is_that_of_the_tuned_components(compared, place):
    output, result = compared
    comparison = Comparison(place / "recipe.yaml", CompareArguments(test=str(place / "test.jsonl"), **GRID), output)
    ensemble = _row(result, "ensemble of the tuned components")

    @torch.no_grad()
    def logprobs(seed, options):
        """For every row the predictions of the two components, tuned with these options."""
        models = []
        for name in ("attention, tuned", "state, tuned"):
            run = next(r for r in _runs(output, name) if r["seed"] == seed and r["options"] == options[name])
            models.append(AutoModelForCausalLM.from_pretrained(run["folder"] / "model").eval())
        for _, ids in comparison.documents.rows:
            row = torch.tensor([ids])
            yield row[0, 1:, None], [model(row).logits[0, :-1].log_softmax(-1) for model in models]

    alone = {name: _row(result, name)["options"] for name in ("attention, tuned", "state, tuned")}
    losses, oracle, count = [], [], comparison.documents.tokens.sum()
    for seed in (0, 1):
        rows = logprobs(seed, dict.fromkeys(alone, ensemble["options"]))
        losses.append(-sum((sum(two) / 2).log_softmax(-1).gather(1, ids).sum().item() for ids, two in rows) / count)
        rows = logprobs(seed, alone)  # a row is a document here
        oracle.append(sum(min(-one.gather(1, ids).sum().item() for one in two) for ids, two in rows) / count)
    assert ensemble["losses"] == pytest.approx(losses, abs=1e-5)
    assert result["rows"][-1]["kind"] == "oracle" and result["rows"][-1]["losses"] == pytest.approx(oracle, abs=1e-5)


def test_differences_kinds_and_costs(compared):
    _, result = compared
    own = _row(result, result["hybrid"])
    for row in result["rows"]:
        assert np.mean(list(row["by_kind"].values())) == pytest.approx(row["loss"], abs=1e-6)  # as much of each
        if row is not own:
            assert row["difference"] == pytest.approx(row["loss"] - own["loss"])
            assert row["difference_interval"][0] <= row["difference"] <= row["difference_interval"][1]
            assert row["seeds_won"] == sum(a > b for a, b in zip(row["losses"], own["losses"]))
    one, twice = (_row(result, f"attention, tuned{more}") for more in ("", " 2 times as long"))
    assert twice["training_flops"] == 2 * one["training_flops"] > 0
    parts = sum(_row(result, f"{name}, tuned")["training_flops"] for name in ("attention", "state"))
    assert _row(result, "ensemble of the tuned components")["training_flops"] == pytest.approx(parts)
    assert _row(result, "token gate over the tuned components")["training_flops"] > parts
    tokens = 16 * (600 // 16 - round(600 // 16 * 0.05))
    assert one["training_tokens"] == tokens and own["training_tokens"] == 2 * tokens  # the gate, then all
    assert own["training_flops"] == pytest.approx(4 * tokens * own["flops_per_token"])


def test_the_table_says_what_the_numbers_say(compared):
    output, result = compared
    table = (output / "comparison.md").read_text()
    assert table == as_markdown(result) and f"{_row(result, 'state, tuned')['loss']:.4f}" in table
    assert (output / "comparison.png").stat().st_size > 1000
    rows = {row["name"]: row for row in json.loads(json.dumps(result))["rows"]}
    assert result["test_bytes"] == sum(len(text.encode()) for text in texts_of(output))
    assert verdict(result).startswith(f"No claim is made: {result['test_bytes']:,} bytes of text are too few")
    result = {**result, "test_bytes": 5_000}
    better = {
        **result,
        "rows": [
            {**row, "loss": 9.0, "difference": 5.0, "difference_interval": [4.0, 6.0]}
            if row["kind"] != "hybrid"
            else row
            for row in rows.values()
        ],
    }
    assert "is better than the best baseline" in verdict(better)
    for row in better["rows"]:
        row["difference_interval"] = [-1.0, 6.0]
    assert "is no different from the best baseline" in verdict(better)
    # Nor is one made of an interval over three rows
    few = {**better, "test_units": 3, "units": "row"}
    assert verdict(few).startswith("No claim is made: 3 rows of text are too few for an interval (at least 8).")
    assert as_markdown(few).count("| – | – |") == len(few["rows"]) - 1  # interval and p of each difference
    path = output / "few.json"
    path.write_text(json.dumps(few))
    found = decide(read_comparison(path))
    assert found.word == "TRY" and "3 rows of text are too few" in found.reasons[0]


def test_the_gate_over_tuned_components_is_made_as_the_hybrids(place, tmp_path):
    """What is compared is what is served: weights kept for as many tokens, and made from the same features."""
    recipe = read_recipe(place / "recipe.yaml")
    recipe.hybrid |= {"gate_lag": 4, "gate_past_losses": True}
    shop = Workshop(recipe, tmp_path / "untuned")
    (tmp_path / "gate").mkdir()
    shop.train_gate([None, None], "token", {}, 0, tmp_path / "gate")
    run = {"options": {}, "folder": tmp_path / "gate"}
    gate = shop.load_gate(run, [None, None], "token")
    assert gate.config.gate_lag == 4 and gate.config.gate_past_losses
    assert shop.mixture([None, None], "online", "prob").config.gate_lag == 4
    assert shop.mixture([None, None], "static").config.gate_lag == 1


def test_the_test_text_is_read_as_the_recipes(place, tmp_path, monkeypatch):
    """Names of special tokens are tokens there if they are in training; its encoding can be said."""
    (tmp_path / "test.txt").write_bytes("the cat caf\u00e9".encode("latin-1"))
    arguments, asked = CompareArguments(test=str(tmp_path / "test.txt")), []
    recipe = _recipe(place / "special.yaml", special_tokens="tokens")
    with pytest.raises(ManticoreError, match="is not utf-8 text .* for example latin-1"):
        Comparison(recipe, arguments, tmp_path / "out")
    arguments.encoding = "latin-1"
    monkeypatch.setattr(compare_module, "load_documents", lambda one, tokenizer: asked.append(one))
    Comparison(recipe, arguments, tmp_path / "out")
    assert (asked[0].special_tokens, asked[0].encoding) == ("tokens", "latin-1")


@pytest.mark.slow
def test_a_killed_comparison_goes_on(compared, place, tmp_path, monkeypatch):
    trained, fit = [], contenders.Workshop._fit

    def counted(self, model, rows, settings, seed, folder, *more):
        if len(trained) == 7 and "killed" not in trained:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append((folder.name, seed))
        return fit(self, model, rows, settings, seed, folder, *more)

    monkeypatch.setattr(contenders.Workshop, "_fit", counted)
    with pytest.raises(KeyboardInterrupt):
        _compare(place, tmp_path / "out")
    again = _compare(place, tmp_path / "out")
    trained.remove("killed")
    assert len(trained) == len(set(trained))  # nothing was trained twice
    for row, other in zip(again["rows"], compared[1]["rows"]):
        assert row["losses"] == other["losses"] and row["options"] == other["options"]
    before = len(trained)
    assert _compare(place, tmp_path / "out")["rows"] == again["rows"] and len(trained) == before


@pytest.mark.slow
def test_a_grid_without_what_was_best_trains_its_own_best_again(compared, place, tmp_path):
    shutil.copytree(compared[0], tmp_path / "out", symlinks=True)
    best = _row(compared[1], "attention, tuned")["options"]["learning_rate"]
    (other,) = set(GRID["learning_rates"]) - {best}
    found = _compare(place, tmp_path / "out", learning_rates=(other,), seeds=(0,))
    fresh = _compare(place, tmp_path / "fresh", learning_rates=(other,), seeds=(0,))
    assert [row["losses"] for row in found["rows"]] == [row["losses"] for row in fresh["rows"]]


def test_another_recipe_in_the_same_directory_is_refused(compared, place, tmp_path):
    other = tmp_path / "place"
    shutil.copytree(place, other)
    with pytest.raises(ManticoreError, match="compares another recipe"):
        run_compare(other / "recipe.yaml", CompareArguments(test=str(place / "test.jsonl"), **GRID), compared[0])


@pytest.mark.slow
def test_all_variants(place, tmp_path):
    result = _compare(
        place,
        tmp_path / "out",
        learning_rates=(1e-2,),
        seeds=(0,),
        spaces=("prob",),
        blocks=(1, 2),
        from_tuned=True,
        projectors=("linear", "none"),
        prune=True,
        all_text=str(place / "more.txt"),
        loss_weights=((0.3, 1.0),),
        singles=(str(place / "state"),),
    )
    rows = {row["name"]: row for row in result["rows"]}
    for blocks in ("1 block", "2 blocks", "2 blocks, no projectors"):
        for start in ("", ", from tuned components"):
            soft, hard = rows[f"hybrid, {blocks}{start}"], rows[f"hybrid, {blocks}{start}, pruned"]
            assert hard["parameters"] < soft["parameters"] and hard["training_flops"] > soft["training_flops"]
            assert soft["options"] | {"mix_loss_weight": 0.3, "mixture_space": "prob"} == soft["options"]
    # One block has no place for projectors; without them nothing is calibrated, so only two have them
    settings = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("runs/*/stages/3-*/config.json")]
    assert [one["projector"] for one in settings] == ["linear"] * 2 and {one["num_blocks"] for one in settings} == {2}
    assert rows["state, retrained on all text"]["needs"] == "the components' training text"
    tokens = rows["state, retrained on all text"]["training_tokens"]
    assert tokens == rows["state, tuned"]["training_tokens"] + 96  # of 100 words, in whole rows
    # The same model, the same settings: whether named as a component or as another model
    one, other = [row["losses"] for row in result["rows"] if row["name"] in ("state, tuned", "state (single), tuned")]
    assert one == other
    tuned = _runs(tmp_path / "out", "hybrid, 1 block, from tuned components")[0]["folder"] / "model"
    assert ManticoreForCausalLM.from_pretrained(tuned).config.component_names == ["attention", "state"]


@pytest.mark.slow
def test_a_recipe_of_the_papers_kind(place, tmp_path):
    """New embeddings for a tokenizer of the hybrid's own, a text to a row, stages with texts of their own."""
    other = word_tokenizer(WORDS[::-1])
    other.save_pretrained(place / "other-tokenizer")
    draw = np.random.default_rng(1)
    records = [{"text": " ".join(draw.choice(WORDS, size=draw.integers(3, 20)))} for _ in range(80)]
    (place / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    training = {**QUIET_RECIPE, "num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    target = {"data": "train.jsonl", "block_size": 12, "one_per_row": True, "validation_fraction": 0.2}
    values = {
        "components": ["attention", "state"],
        "hybrid": {"preset": "paper", "embeddings": "fresh", "tokenizer": "other-tokenizer", "dtype": "float32"},
        "data": {"data": "more.txt", "block_size": 16},
        "stages": [
            {"pretrain": training},
            {"search": {**training, "data": target, "new_embeddings": True}},
            {"finetune": {**training, "data": target, "new_embeddings": True}},
        ],
    }
    (place / "paper.yaml").write_text(json.dumps(values))
    arguments = CompareArguments(test=str(place / "test.jsonl"), seeds=(0,), learning_rates=(1e-2,))
    result = run_compare(place / "paper.yaml", arguments, tmp_path / "out")
    (run,) = _runs(tmp_path / "out", "hybrid, 1 block")
    model = ManticoreForCausalLM.from_pretrained(run["folder"] / "model").eval()
    nats = 0.0
    for text in texts_of_file(place / "test.jsonl"):
        ids = torch.tensor([[other.eos_token_id, *other(text)["input_ids"]]])
        for start in range(0, ids.shape[1] - 1, 11):  # rows of 12, each behind a start
            row = torch.cat([ids[:, :1], ids[:, start + 1 : start + 12]], 1)
            nats += model(row, labels=row).loss.item() * (row.shape[1] - 1)
    tokens = sum(len(other(text)["input_ids"]) for text in texts_of_file(place / "test.jsonl"))
    assert _row(result, "hybrid, 1 block")["loss"] == pytest.approx(nats / tokens, rel=1e-3)
    # The components are tuned with their own tokenizer, on the real tokens of the padded rows
    (alone,) = _runs(tmp_path / "out", "state, tuned")
    lengths = [min(12, len(record["text"].split()) + 1) for record in records]
    assert 0.7 * sum(lengths) < alone["training_tokens"] < 0.9 * sum(lengths)
    assert {"state, tuned on the earlier stages' text, then on this", "state, tuned"} <= {
        r["name"] for r in result["rows"]
    }


@pytest.mark.parametrize(
    "stages,settings,message",
    [
        (("pretrain",), {}, "needs a finetune stage"),
        (("finetune",), {"spaces": ("sum",)}, "'sum' is none of"),
        (("finetune",), {"seeds": ()}, "seeds is empty"),
        (("finetune",), {"blocks": (0,)}, "blocks=.* must be different numbers, from 1 to"),
        (("finetune",), {"learning_rates": (0.0,)}, "learning_rates=.* must be"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(place, tmp_path, stages, settings, message):
    recipe = _recipe(place / "wrong.yaml", stages)
    with pytest.raises(ManticoreError, match=message):
        run_compare(recipe, CompareArguments(test=str(place / "test.jsonl"), **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_text_that_is_trained_on_is_no_test(place, tmp_path):
    (place / "linked.txt").symlink_to("train.txt")
    for name in ("train.txt", "linked.txt"):
        with pytest.raises(ManticoreError, match=f"{name} is the text that .*recipe.yaml trains on"):
            run_compare(place / "recipe.yaml", CompareArguments(test=str(place / name)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(place, tmp_path, capsys, monkeypatch):
    real, few = Comparison._contenders, ("attention, tuned", "state, tuned", "hybrid, 1 block")
    monkeypatch.setattr(Comparison, "_contenders", lambda self: [one for one in real(self) if one.name in few])
    words = ["compare", str(place / "recipe.yaml"), "--test", str(place / "test.jsonl"), "--loss-weights", "1"]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 2
    assert "'1' is not a pair mix:own" in capsys.readouterr().err
    words[-2:] = ["--seeds", "3", "--learning-rates", "1e-2", "--max-test-tokens", "60"]
    words += ["--validation", str(place / "more.txt")]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 0
    assert "| **hybrid, 1 block** |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["seeds"] == [3]
    (run,) = _runs(tmp_path / "out", "state, tuned")
    data = DataArguments(str(place / "more.txt"), block_size=16, validation_fraction=0.0)
    rows, _ = load_rows(data, word_tokenizer())
    ids = torch.tensor(rows["input_ids"])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(run["folder"] / "model")(ids, labels=ids).loss.item()
    assert run["validation"] == pytest.approx(loss, abs=1e-5)
