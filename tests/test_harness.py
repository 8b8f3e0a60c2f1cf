"""Tasks of the lm-evaluation-harness, of a local definition: the harness's own command, and ours with the baselines."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_hybrid import WORDS, pair, save, word_tokenizer

from manticore_hf import ComponentSpec, ManticoreForCausalLM, prune
from manticore_hf.cli import main

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module", autouse=True)
def no_environment():
    """Of every model the harness writes down the packages, by `pip list`, which takes longer than the model."""
    import lm_eval.evaluator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def questions():
    """Questions of different lengths with two answers of one word."""
    draw = torch.Generator().manual_seed(3)
    out = []
    for number in range(24):
        words = [WORDS[i] for i in torch.randint(len(WORDS), (2 + number % 9,), generator=draw).tolist()]
        choices = [f" {WORDS[i]}" for i in torch.randperm(len(WORDS), generator=draw)[:2].tolist()]
        out.append({"question": " ".join(words), "choices": choices, "answer": number % 2})
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory, questions):
    """A hybrid, and a directory with a task. Returns (model, its folder, the task's folder)."""
    folder = tmp_path_factory.mktemp("harness")
    parts = [ComponentSpec(part, name=name) for part, name in zip(pair(), ("gpt_neox", "mamba"))]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save(model, folder / "hybrid")
    (folder / "tasks").mkdir()
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in questions))
    (folder / "tasks" / "tiny.yaml").write_text(TASK.format(file=file))
    return model.eval(), folder / "hybrid", folder / "tasks"


@torch.no_grad()
def accuracy(logits_of, questions, tokenizer):
    """Share of right answers, one request after the other, without padding."""
    right = 0
    for one in questions:
        scores = []
        for choice in one["choices"]:
            start, ids = tokenizer(one["question"])["input_ids"], tokenizer(one["question"] + choice)["input_ids"]
            logprobs = logits_of(torch.tensor([ids])).log_softmax(-1)[0]
            scores.append(sum(logprobs[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
        right += scores[one["answer"]] == max(scores)
    return right / len(questions)


def evaluate(start, tmp_path, *options):
    command = ["evaluate", "--model", str(start[1]), "--tasks", "tiny_choice", "--include-path", str(start[2])]
    assert main([*command, "--output-dir", str(tmp_path), *options]) == 0
    return json.loads((tmp_path / "tasks.json").read_text())["scores"]


def test_scores_are_those_of_one_request_after_the_other(start, questions, tmp_path, capsys):
    from transformers import AutoTokenizer

    model, folder, _ = start
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = model.config.component_names
    parts = {name: (lambda ids, name=name: model.component(name)(input_ids=ids).logits) for name in names}
    ensemble = lambda ids: sum(part(ids).log_softmax(-1) for part in parts.values()) / len(parts)  # noqa: E731
    baselines = {"hybrid": lambda ids: model(input_ids=ids).logits, **parts, "ensemble": ensemble}
    apart = [ComponentSpec(model.component(name), name=name) for name in names]
    online = ManticoreForCausalLM.from_components(apart, num_blocks=1, mixture="online", verify=False)
    baselines["online mixture"] = lambda ids: online(input_ids=ids).logits
    scores = evaluate(start, tmp_path, "--batch-size", "5")
    assert list(scores) == ["hybrid", "gpt_neox", "mamba", "ensemble", "online mixture"]
    for label, logits_of in baselines.items():
        assert scores[label]["tiny_choice"]["acc"][0] == pytest.approx(accuracy(logits_of, questions, tokenizer)), label
    assert len({row["tiny_choice"]["acc"][0] for row in scores.values()}) > 1
    out = capsys.readouterr().out
    assert all(f"{row['tiny_choice']['acc'][0]:.4f} ± " in out for row in scores.values())


def test_original_components_answer_with_their_own_tokenizers(start, questions, tmp_path):
    """Of another vocabulary and weights than what is inside the hybrid."""
    parts = pair()
    other = word_tokenizer(WORDS[::-1])
    for name, part, tokenizer in (("one", parts[0], word_tokenizer()), ("two", parts[1], other)):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    scores = evaluate(start, tmp_path, "--components", str(tmp_path / "one"), str(tmp_path / "two"))
    assert list(scores)[5:] == ["original gpt_neox", "original mamba"]
    for label, part, tokenizer in (("gpt_neox", parts[0], word_tokenizer()), ("mamba", parts[1], other)):
        by_hand = accuracy(lambda ids, part=part: part.eval()(input_ids=ids).logits, questions, tokenizer)
        assert scores[f"original {label}"]["tiny_choice"]["acc"][0] == pytest.approx(by_hand)


@pytest.mark.slow
def test_the_harness_runs_on_a_hybrid_by_itself(start, tmp_path):
    """As a user of the harness would: its own command, remote code, several requests at once."""
    arguments = f"pretrained={start[1]},trust_remote_code=True"
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        arguments,
        "--tasks",
        "tiny_choice",
        "--include_path",
        str(start[2]),
        "--batch_size",
        "4",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path),
        "--seed",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.rglob("results*.json")).read_text())["results"]["tiny_choice"]["acc,none"]
    (tmp_path / "ours").mkdir()
    assert evaluate(start, tmp_path / "ours", "--batch-size", "1")["hybrid"]["tiny_choice"]["acc"][0] == found


def test_a_killed_evaluation_goes_on(start, tmp_path, capsys):
    scores = evaluate(start, tmp_path, "--limit", "4")
    kept = json.loads((tmp_path / "tasks.json").read_text())
    kept["scores"] = {"hybrid": {"tiny_choice": {"acc": [0.125, None]}}}
    (tmp_path / "tasks.json").write_text(json.dumps(kept))
    capsys.readouterr()
    again = evaluate(start, tmp_path, "--limit", "4")
    assert again == {**scores, "hybrid": {"tiny_choice": {"acc": [0.125, None]}}}
    assert "hybrid on tiny_choice" not in capsys.readouterr().out
    command = ["evaluate", "--model", str(start[1]), "--tasks", "tiny_choice", "--include-path", str(start[2])]
    assert main([*command, "--output-dir", str(tmp_path)]) == 2
    assert "another evaluation" in capsys.readouterr().err
    (tmp_path / "tasks.json").write_text("{")
    assert main([*command, "--output-dir", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_pruned_hybrid_has_no_baselines_left(start, tmp_path):
    save(prune(start[0], ["gpt_neox", "mamba"]), tmp_path / "hard")
    assert list(evaluate((None, tmp_path / "hard", start[2]), tmp_path, "--limit", "4")) == ["hybrid"]


@pytest.mark.parametrize("own", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_unknown_tasks_are_named(start, tmp_path, capsys, monkeypatch, own):
    """What the directory lacks is looked for among the harness's own: ten thousand files, in the quick test one."""
    theirs = "hellaswag"
    if own == "few":
        theirs = "of_the_harness"
        (tmp_path / "own.yaml").write_text((start[2] / "tiny.yaml").read_text().replace("tiny_choice", theirs))
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    for tasks in ("", f"tiny_choice,no_such_task,{theirs}"):
        command = ["evaluate", "--model", str(start[1]), "--include-path", str(start[2]), "--tasks", tasks]
        assert main(command) == 2
        assert ("knows no task 'no_such_task';" in (err := capsys.readouterr().err)) == bool(tasks) and "--tasks" in err


def test_without_the_harness_it_says_what_to_install(start, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", "--model", str(start[1]), "--tasks", "x"]) == 2
    assert "manticore-hf[harness]" in capsys.readouterr().err
