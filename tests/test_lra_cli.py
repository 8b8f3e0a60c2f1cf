"""`manticore-hf lra`: what it trains, prints and writes; and the designed hybrid."""

import json

import pytest
import torch
from safetensors.torch import load_file

from manticore_hf import ManticoreError, ManticoreForSequenceClassification
from manticore_hf.cli import main
from manticore_hf.experiments import baselines, from_scratch, lra_task
from manticore_hf.experiments.lra.train_lra import pad
from manticore_hf.experiments.scratch_models import scratch_config

TINY = "--hidden-size 32 --layers 2 --num-train-epochs 1 --batch-size 16 --num-train 48 --num-test 40".split()
LISTOPS = "listops --min-len 5 --max-len 20 --max-depth 3".split()


def results(folder):
    return {data["model"]: data for data in (json.loads(file.read_text()) for file in folder.glob("*.json"))}


def test_a_hybrid_is_printed_beside_its_baselines(tmp_path, capsys, monkeypatch):
    trained, train = [], baselines.Trainer.train

    def spy(self):
        trained.append(self.model.config.component_names)
        return train(self)

    monkeypatch.setattr(baselines.Trainer, "train", spy)
    command = ["lra", *LISTOPS, *TINY, "--hybrid", "llama,mamba", "--designed", "--output-dir", str(tmp_path)]
    assert main(command) == 0
    found = results(tmp_path)
    names = ["ensemble of the components", "hybrid llama+mamba", "jamba", "llama", "mamba"]
    assert sorted(found) == names and trained == [["llama", "mamba"], ["llama"], ["mamba"], ["jamba"]]
    table = capsys.readouterr().out.partition("listops: at most 20 tokens")[2]
    for name in names:
        assert f"{found[name]['accuracy']:9.4f}" in table.split(f"\n{name} ")[1]
        assert found[name]["chance"] == found["llama"]["chance"]

    # What the ensemble scores, by hand, one sequence at a time, from the weights that were kept
    models = []
    for i, family in enumerate(("llama", "mamba")):
        lm = from_scratch(family, 16, 2, 32, 20, seed=i)
        models.append(ManticoreForSequenceClassification.from_components([lm], num_labels=10, mixture="static").eval())
        weights = load_file(next(tmp_path.glob(f"listops-{family}-*.safetensors")))
        tied = {"mamba.lm_head.weight", "mamba.backbone.embeddings.weight"}
        lacking = set(models[-1].state_dict()) - set(weights)
        assert lacking < tied and len(lacking) == (family == "mamba")
        models[-1].load_state_dict(weights, strict=False)
    task = lra_task("listops", min_len=5, max_len=20, max_depth=3, num_train=48, num_test=40)
    right = {"llama": 0, "mamba": 0, "ensemble of the components": 0}
    for row in task.dataset("test"):
        with torch.no_grad():
            own = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1) for model in models]
        for name, scores in zip(right, (*own, sum(own))):
            right[name] += scores.argmax().item() == row["label"]
    assert {name: found[name]["accuracy"] for name in right} == {name: hits / 40 for name, hits in right.items()}

    # Nothing is trained twice, and what was lost is
    trained.clear()
    assert main(command) == 0
    assert not trained and capsys.readouterr().out.partition("listops: at most 20 tokens")[2] == table
    next(tmp_path.glob("*-jamba-*.json")).unlink()
    assert main(command) == 0 and trained == [["jamba"]]


def test_files_that_change_are_run_again(tmp_path):
    def go(text):
        for name in ("train", "test"):
            rows = [{"text": f"{text} {i}" * (1 + i % 3), "label": i % 2} for i in range(8)]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["lra", "text", *TINY, "--model", "llama", "--data", str(tmp_path / "train.jsonl"), "--max-len", "12"]
        assert main([*command, "--test-data", str(tmp_path / "test.jsonl"), "--output-dir", str(tmp_path / "out")]) == 0
        return len(list((tmp_path / "out").glob("*.json")))

    assert [go("one"), go("one"), go("two")] == [1, 1, 2]


def test_rows_are_padded_on_the_right():
    batch = pad([{"input_ids": [3, 4], "label": 1}, {"input_ids": [5, 6, 7], "label": 0}])
    assert batch["input_ids"].tolist() == [[3, 4, 0], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]] and batch["labels"].tolist() == [1, 0]


def test_the_designed_hybrid_interleaves_and_has_no_experts():
    model = from_scratch("jamba", 16, 4, 64, 33)
    kinds = ["mamba" if hasattr(layer, "mamba") else "attention" for layer in model.model.layers]
    assert kinds == ["mamba", "attention"] * 2
    assert not [name for name, _ in model.named_modules() if "expert" in name or "router" in name]
    ids = torch.randint(16, (2, 9))
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    with pytest.raises(ManticoreError, match="jamba: 1 layer has no attention"):
        scratch_config("jamba", 16, 1, 64, 33)


@pytest.mark.parametrize(
    "options,message",
    [
        (["listop", "--model", "llama"], "manticore-hf lra: task='listop' is unknown; did you mean listops?"),
        (["listops", "--model", "lama"], "model='lama' is not a model type with a causal LM"),
        (["listops", "--hybrid", "llama"], "--hybrid llama names one model"),
        (["listops", "--model", "llama", "--image-size", "8"], "listops: there is no setting 'image_size'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_trained(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(baselines.Trainer, "train", lambda self: pytest.fail("trained"))
    assert main(["lra", *options, "--output-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
