"""`.eval_results/`: results on benchmarks as the Hub's pages take them, and nothing of what is none."""

import json

import published
import pytest
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries

from manticore_hf import publish
from manticore_hf.hub.card import Result
from manticore_hf.hub.eval_results import FILE, benchmark_tasks, eval_results

parts, saved = published.parts, published.saved
TASKS = {
    "settings": {"num_fewshot": 5, "limit": None},
    "datasets": {"quiz": ["{owner}/quiz", "hard"], "plain": ["{owner}/plain", None], "own": ["local_folder", None]},
    "scores": {
        "hybrid": {"quiz": {"acc": [0.412, 0.01]}, "plain": {"acc": [0.5, None]}, "own": {"acc": [1.0, None]}},
        "a": {"quiz": {"acc": [0.3, 0.01]}},
        "ensemble": {"quiz": {"acc": [0.4, 0.01]}},
    },
}


@pytest.fixture
def benchmarks(hub, owner, tmp_path):
    """A benchmark and a data set that is none, on the Hub. Returns the owner."""
    api = HfApi()
    tasks = [{"id": "quiz_easy", "config": "easy"}, {"id": "quiz_hard", "config": "hard"}]
    about = {"quiz": {"name": "Quiz", "tasks": tasks}, "bytes": {"tasks": [{"id": "bits_per_byte"}]}, "bad": [1]}
    for name in ("quiz", "plain", "bytes", "bad"):
        api.create_repo(f"{owner}/{name}", repo_type="dataset")
        if name in about:
            text = yaml.safe_dump(about[name]).encode()
            api.upload_file(
                path_or_fileobj=text, path_in_repo="eval.yaml", repo_id=f"{owner}/{name}", repo_type="dataset"
            )
    return owner


def tasks_file(owner, **changes):
    return json.dumps({**TASKS, **changes}).replace("{owner}", owner)


def test_benchmarks_are_those_with_tasks(benchmarks):
    api = HfApi()
    assert benchmark_tasks(f"{benchmarks}/quiz", api) == [("quiz_easy", "easy"), ("quiz_hard", "hard")]
    assert benchmark_tasks(f"{benchmarks}/bytes", api) == [("bits_per_byte", None)]
    for name in ("plain", "bad", "nowhere"):
        assert benchmark_tasks(f"{benchmarks}/{name}", api) == []


def test_results_of_benchmarks_are_published(benchmarks, saved, hub):
    (saved[1] / "tasks.json").write_text(tasks_file(benchmarks))
    losses = {"data": f"{benchmarks}/bytes", "losses": {"a": 2.0, "hybrid": 1.8}, "tokens": 10, "bytes": 40}
    bits = {"bits_per_byte": {"a": 1.4, "hybrid": 1.25}}
    (saved[1] / "evaluation.json").write_text(json.dumps({**losses, **bits}))
    publish(saved[1], f"{benchmarks}/h")
    files = hub.files(f"{benchmarks}/h")
    entries = parse_eval_result_entries(yaml.safe_load(files[FILE]))  # as the Hub's own client reads them
    found = {(one.dataset_id, one.task_id): one for one in entries}
    assert set(found) == {(f"{benchmarks}/quiz", "quiz_hard"), (f"{benchmarks}/bytes", "bits_per_byte")}
    quiz, text = found[f"{benchmarks}/quiz", "quiz_hard"], found[f"{benchmarks}/bytes", "bits_per_byte"]
    assert quiz.value == 0.412 and "5-shot" in quiz.notes and "best baseline: ensemble 0.4000" in quiz.notes
    assert text.value == 1.25 and "lower is better; best baseline: a 1.4000" in text.notes
    assert quiz.source_url.endswith(f"{benchmarks}/h") and b"model-index" in files["README.md"]
    api = HfApi()
    api.upload_file(path_or_fileobj=b"[]", path_in_repo=".eval_results/theirs.yaml", repo_id=f"{benchmarks}/h")
    (saved[1] / "tasks.json").unlink()
    (saved[1] / "evaluation.json").unlink()
    out = publish(saved[1], f"{benchmarks}/h")
    assert out.deleted == [FILE] and ".eval_results/theirs.yaml" in hub.files(f"{benchmarks}/h")


def test_what_is_no_whole_measurement_makes_no_result(benchmarks, hub, tmp_path):
    def made(text, results=()):
        (tmp_path / "tasks.json").write_text(text)
        return eval_results(tmp_path, results, "me/h", HfApi())

    assert made(tasks_file(benchmarks))[0] is not None
    text, (notice,) = made(tasks_file(benchmarks, settings={"limit": 10, "num_fewshot": None}))
    assert text is None and "10 documents" in notice
    torn = json.loads(tasks_file(benchmarks))
    torn["scores"]["a"] = {"quiz": []}
    for text in ("[]", "{", "1", "[" * 100_000, '{"settings": {}, "scores": {"hybrid": 3}}', json.dumps(torn)):
        found, (notice,) = made(text)
        assert found is None and "another form" in notice
    strange = tasks_file(benchmarks, datasets={"quiz": ["../x", None], "plain": "x", "own": [[], {}]})
    assert made(strange) == (None, [])
    numbers = json.loads(tasks_file(benchmarks))
    numbers["scores"]["hybrid"]["quiz"] = {"acc": ["x", 1], "f1": [float("nan"), None], "em": 3}
    assert made(json.dumps(numbers)) == (None, [])
    many = {f"t{i}": {"acc": [0.5, None]} for i in range(1000)}
    sources = {task: [f"{benchmarks}/{task}", None] for task in many}
    hub.clear_requests()
    assert made(tasks_file(benchmarks, scores={"hybrid": many}, datasets=sources)) == (None, [])
    assert 0 < len({path for _, path in hub.requests}) <= 2 * 200  # not a thousand data sets
    assert eval_results(tmp_path, [Result(f"me/{'x' * 400}", {"hybrid": 1.0}, bits={"hybrid": 1.0})], "me/h", HfApi())
    (tmp_path / "tasks.json").unlink()
    bits = {"hybrid": 1.0, "a": 1.1}
    for data in ("our_text.txt", f"{benchmarks}/plain"):
        assert eval_results(tmp_path, [Result(data, bits, bits=bits)], "me/h", HfApi()) == (None, [])
