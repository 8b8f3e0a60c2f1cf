"""What trackers show of a stage: alpha, the gate and the parts' losses, by the trackers' own files."""

import json
import os

import clean_process
import pytest
from tiny_hybrid import mixed_hybrid, save, write_text

TRAINED = {"alpha/0/part_0", "alpha/0/part_1", "alpha/1/part_0", "alpha/1/part_1"}
BOTH = {
    "gate/part_0", "gate/part_1", "loss/part_0", "loss/part_1", "loss/mixture", "loss/ensemble",
}  # fmt: skip
KEYS = {f"train/{key}" for key in TRAINED | BOTH | {"loss"}} | {f"eval/{key}" for key in BOTH | {"loss"}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    save(mixed_hybrid(num_blocks=2), folder / "hybrid")
    write_text(folder / "text.txt", 400)
    return folder


def tracked(tracker, start, folder):
    """Runs a stage that reports to a tracker. Returns {key: [value of each step]}, as its log file has them."""
    command = [
        "-m", "manticore_hf.cli", "pretrain", "--model", start / "hybrid", "--data", start / "text.txt", "--block-size",
        "16", "--output-dir", folder / "out", "--max-steps", "2", "--logging-steps", "1", "--eval-strategy", "steps",
        "--report-to", tracker, "--run-name", "named",
    ]  # fmt: skip
    # Trackers write where the environment says; TensorBoard's directory is by default below the working directory
    places = {"TRACKIO_DIR": folder / "trackio", "TENSORBOARD_LOGGING_DIR": folder / "board"}
    done = clean_process.run(command, env={**os.environ, **places}, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in (folder / "out" / "training.log").read_text().splitlines():
        for key, value in json.loads(line).items():
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            found.setdefault(name, []).append(value)
    assert found.keys() >= KEYS and all(len(found[key]) == 2 for key in KEYS)
    return found


def test_tensorboard_shows_the_mixture_and_the_parts(start, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = tracked("tensorboard", start, tmp_path)
    board = reader.EventAccumulator(str(tmp_path / "board")).Reload()
    for key in KEYS:
        assert [point.value for point in board.Scalars(key)] == pytest.approx(logged[key], rel=1e-6), key
        assert [point.step for point in board.Scalars(key)] == [1, 2]


def test_trackio_shows_the_mixture_and_the_parts(start, tmp_path):
    pytest.importorskip("trackio")
    logged = tracked("trackio", start, tmp_path)
    read = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as Store; [project] = Store.get_projects(); "
        "print(json.dumps(Store.get_logs(project, 'named'), default=str))"
    )
    shown = clean_process.run(["-c", read], env={**os.environ, "TRACKIO_DIR": tmp_path / "trackio"}, cwd=tmp_path)
    rows = json.loads(shown.stdout)
    for key in KEYS:
        assert [row[key] for row in rows if key in row] == logged[key], key
