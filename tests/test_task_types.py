"""Classifiers are described as what they are: in their card, by `inspect`, and where only a language model will do."""

import json
import re

import pytest
import torch
from classifiers import BOTH
from families import hybrid
from hub_models import publish as put
from hub_models import tiny, tokenizer
from huggingface_hub import ModelCard
from manticore_hf.modeling.configuration_manticore import ManticoreConfig

from manticore_hf import (
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    calibrate_projectors,
    prune,
    publish,
)
from manticore_hf.cli import main
from manticore_hf.hub.card import CardFacts, make_card
from manticore_hf.hub.card_merge import merge
from manticore_hf.hub.inspection import inspect_hybrid
from manticore_hf.report.write import write_report
from manticore_hf.utils.task_types import TASK_TYPES, labels_of, task_type_of

pytestmark = pytest.mark.usefixtures("counted_once")
TASKS = {"sequence": "text-classification", "token": "token-classification"}
AUTO = {"sequence": "AutoModelForSequenceClassification", "token": "AutoModelForTokenClassification"}
LABELS = {0: "no", 1: "yes", 2: "per|haps *"}


@pytest.fixture
def repos(hub, owner, tmp_path):
    for name, family in (("a", "gpt_neox"), ("b", "mamba")):
        put(hub, f"{owner}/{name}", tiny(family), tmp_path / "src", tokenizer())
    return [f"{owner}/a", f"{owner}/b"]


def card_of(folder):
    card, _, alpha, notices = make_card(folder, CardFacts("me/hybrid", {"a": "mit", "b": "mit"}))
    return card, merge(card)[0], alpha, notices


@pytest.mark.parametrize("kind", BOTH)
def test_a_published_classifiers_card(kind, repos, hub, owner, tmp_path, capsys):
    model = BOTH[kind].from_components(repos, id2label=LABELS, mixture="token", num_blocks=2)
    with torch.no_grad():
        model.hybrid_mixer.token_gate.linear.bias.copy_(torch.tensor([1.0, 2.0]))
        for parameter in model.score.parameters():
            parameter.normal_()
    publish(model, f"{owner}/{kind}", license="mit")
    text = hub.files(f"{owner}/{kind}")["README.md"].decode()
    data = ModelCard(text).data
    assert (data.pipeline_tag, data.library_name) == (TASKS[kind], "transformers") and data.base_model == repos
    assert "in one classifier of " in text and "it predicts labels and generates no text" in text
    for wrong in ("causal", ".generate(", "text-generation", "a gate decides for each", "manticore-hf prune", "nats"):
        assert wrong not in text, wrong
    assert "| 2 | per\\|haps \\* |" in text
    assert f"one label for each {'text' if kind == 'sequence' else 'token'}." in text
    weights = torch.tensor([1.0, 2.0]).softmax(0)
    assert f"| 2 | {weights[0]:.3f} | {weights[1]:.3f} |" in text
    # Every block of code runs as it stands, and does what the model does.
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3 and all(AUTO[kind] in block for block in blocks[1:])
    inputs = tokenizer()("A text to read.", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        scores = model(**inputs).logits
    best = [model.config.id2label[number] for number in scores.view(-1, 3).argmax(-1).tolist()]
    names = {}
    capsys.readouterr()
    for block in blocks:
        exec(block, names)
    assert type(names["model"]).__name__ == type(model).__name__
    assert torch.equal(names["scores"], scores)
    found = names["classify"]("A text to read.")
    assert [one["label" if kind == "sequence" else "entity"] for one in found] == best
    assert str(best) in capsys.readouterr().out or kind == "sequence"


def test_what_is_predicted():
    cases = {
        ("ManticoreForTokenClassification", None, 3): "one label for each token",
        ("ManticoreForSequenceClassification", None, 3): "one label for each text",
        ("ManticoreForSequenceClassification", None, 1): "numbers (regression)",
        ("ManticoreForSequenceClassification", "regression", 3): "numbers (regression)",
        ("ManticoreForSequenceClassification", "multi_label_classification", 3): "any number of labels for each text",
    }
    for (name, problem, count), said in cases.items():
        config = ManticoreConfig(architectures=[name], problem_type=problem, num_labels=count)
        assert labels_of(config) == {"labels": [f"LABEL_{i}" for i in range(count)], "problem": said}
    for other in (None, [], ["ManticoreModel"], ["Nothing"]):
        assert task_type_of(ManticoreConfig(architectures=other)).task == "text-generation"
    for kind in TASK_TYPES.values():
        assert kind.model_class.__name__ == kind.architecture


def test_many_labels_are_not_all_shown(tmp_path, capsys):
    model = ManticoreForSequenceClassification.from_causal_lm(hybrid("gpt_neox+mamba"), 150)
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path)[1]
    assert "| 99 | LABEL_99 |" in text and "LABEL_100" not in text and "There are 150 labels in all" in text
    assert main(["inspect", str(tmp_path)]) == 0
    assert "150 labels: LABEL_0, " in (out := capsys.readouterr().out) and "LABEL_19, ...; one label for each" in out


@pytest.mark.parametrize(
    "kind, settings",
    [("sequence", {"mixture": "token"}), pytest.param("token", {"preset": "paper"}, marks=pytest.mark.slow)],
)
def test_inspect_counts_what_is_there(kind, settings, tmp_path, capsys):
    model = BOTH[kind].from_causal_lm(hybrid("gpt_neox+mamba", **settings), id2label=LABELS)
    model.save_pretrained(tmp_path)
    found = inspect_hybrid(tmp_path, tokens=16)
    assert found["task"] == {
        "name": TASKS[kind],
        "architecture": type(model).__name__,
        "labels": list(LABELS.values()),
        "problem": f"one label for each {'text' if kind == 'sequence' else 'token'}",
    }
    rows = {row["part"]: row for row in found["parts"]}
    native = "preset" not in settings
    for name in model.config.component_names:
        head = model.score.heads[f"{name}-1"] if native else torch.nn.Identity()
        parts = [*model.component(name).parameters(), *head.parameters()]
        assert rows[name]["parameters"] == sum(p.numel() for p in parts)
        layers = sum(row["flops_per_token"] for row in found["blocks"] if row["component"] == name)
        assert rows[name]["flops_per_token"] == layers + (2 * head.in_features * 3 if native else 0)
    assert rows["hybrid"]["parameters"] == sum(p.numel() for p in model.parameters())
    layers = sum(row["flops_per_token"] for row in found["blocks"])
    assert rows["hybrid"]["flops_per_token"] > layers
    soft = inspect_hybrid_of(hybrid("gpt_neox+mamba", **settings), tmp_path / "soft")
    assert rows["hybrid"]["flops_per_token"] < soft["parts"][-1]["flops_per_token"]  # no head over the vocabulary
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"classifier of {'texts' if kind == 'sequence' else 'tokens'} ({type(model).__name__}" in out
    assert "3 labels: no, yes, per|haps *; one label for each" in out


def inspect_hybrid_of(model, folder):
    model.save_pretrained(folder)
    found = inspect_hybrid(folder, tokens=16)
    assert found["task"] == {"name": "text-generation", "architecture": "ManticoreForCausalLM"}
    return found


def test_losses_of_the_language_model_are_not_the_classifiers(tmp_path):
    model = ManticoreForSequenceClassification.from_causal_lm(hybrid("gpt_neox+mamba"), 2)
    model.save_pretrained(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"losses": {"a": 2.0, "hybrid": 1.8}, "data": "org/text"}))
    card, text, _, notices = card_of(tmp_path)
    assert "results" not in card.sections and "model-index" not in card.metadata and "No results are stated" in text
    assert notices == [
        "The loss on 'org/text' is not shown: it is that of a language model, and this hybrid is a classifier."
    ]


def test_a_pruned_classifier(tmp_path):
    hard = prune(hybrid("gpt_neox+mamba"), "mamba")
    ManticoreForSequenceClassification.from_causal_lm(hard, 2).save_pretrained(tmp_path)
    card, text, alpha, _ = card_of(tmp_path)
    assert alpha == [[1.0], [1.0]] and "It is **pruned**" in text and "| 1 | LABEL_1 |" in text
    assert card.metadata["pipeline_tag"] == "text-classification"


def test_a_quantised_hybrid(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    hybrid("gpt_neox+mamba").save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = ManticoreForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    model.save_pretrained(tmp_path / "8")
    assert "layers are quantised to 8 bits (bitsandbytes) and take less" in card_of(tmp_path / "8")[1]
    assert main(["inspect", str(tmp_path / "8")]) == 0
    assert "quantised to 8 bits (bitsandbytes): the sizes below are those of floating point" in capsys.readouterr().out
    assert "quantised" not in card_of(tmp_path / "plain")[1]


def test_what_needs_a_language_model_says_so(tmp_path):
    model = ManticoreForSequenceClassification.from_causal_lm(hybrid("gpt_neox+mamba"), 2)
    model.save_pretrained(tmp_path / "out")
    for doing, call in {
        "Pruning": lambda: prune(model, "mamba"),
        "Calibrating": lambda: calibrate_projectors(model, None),
        "A report": lambda: write_report(tmp_path / "out", measured=False),
    }.items():
        with pytest.raises(ManticoreError, match=f"{doing} needs a hybrid that predicts text, and this one is a class"):
            call()
    assert not list((tmp_path / "out").glob("report*"))
