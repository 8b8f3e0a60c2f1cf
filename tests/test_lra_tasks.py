"""ListOps and Pathfinder against oracles written apart from them; texts and images from files; what is refused."""

import hashlib

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

from manticore_hf import ManticoreError
from manticore_hf.experiments import lra_task
from manticore_hf.experiments.lra import listops, pathfinder

LISTOPS = {"num_train": 300, "num_test": 100, "min_len": 8, "max_len": 60, "max_depth": 5, "max_args": 6}
PATHS = {"num_train": 60, "num_test": 31, "image_size": 24, "path_len": 18, "distractors": 3}


def parse(words):
    """The value of an expression, its depth and its largest number of arguments, by recursive descent over text."""
    word = words.pop(0)
    if word.isdigit():
        return int(word), 1, 0
    values, depths, most = [], [], []
    while words[0] != "]":
        value, depth, arguments = parse(words)
        values.append(value)
        depths.append(depth)
        most.append(arguments)
    words.pop(0)
    result = {
        "[MAX": lambda: max(values),
        "[MIN": lambda: min(values),
        "[SM": lambda: sum(values) % 10,
        "[MED": lambda: int(np.median(values)),
    }[word]()
    assert len(values) >= 2
    return result, 1 + max(depths), max(len(values), *most)


def sequences(task, split):
    ids, ends, labels = listops.generate(task, split)
    return [row.tolist() for row in np.split(ids, ends[:-1])], labels.tolist()


@pytest.mark.parametrize("settings", [{}, {"min_len": 1, "max_len": 30}, {"max_depth": 2}, {"max_args": 3}])
def test_listops_has_the_values_that_it_says(settings):
    task = lra_task("listops", **{**LISTOPS, **settings})
    seen, facts = set(), []
    for split, count in (("train", 300), ("test", 100)) if task.max_depth > 2 else (("test", 100),):
        rows, labels = sequences(task, split)
        assert len(rows) == len(labels) == count
        for row, label in zip(rows, labels):
            words = listops.as_text(row).split(" ")
            assert task.min_len <= len(words) == len(row) <= task.max_len and 0 not in row
            value, depth, arguments = parse(words)
            assert not words and value == label == listops.value(row)
            facts.append((len(row), depth, arguments))
            seen.add(tuple(row))
    assert len(seen) == len(facts)  # none twice, in train and test together
    lengths, depths, arguments = zip(*facts)
    assert max(depths) == task.max_depth and max(arguments) == task.max_args
    if not settings:
        assert min(lengths) < task.min_len + 5 and max(lengths) > task.max_len - 10


def test_listops_trees_are_drawn_by_the_benchmarks_rule():
    """A quarter of the places above the last level are operators; operators, digits, numbers of arguments uniform."""
    task = lra_task("listops", num_train=1, num_test=1, min_len=1, max_len=2000, max_depth=4, max_args=5)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(100):
        levels, _, given_up = listops._draw(task, rng)
        assert not given_up.any()
        drawn.append(levels)
    for depth in range(4):
        tokens = np.concatenate([levels[depth][0] for levels in drawn if depth < len(levels)])
        counts = np.concatenate([levels[depth][1] for levels in drawn if depth < len(levels)])
        assert (counts > 0).mean() == pytest.approx(0.25 if depth < 3 else 0.0, abs=0.02)
        assert np.array_equal(counts > 0, tokens >= 11)
        if depth < 3:
            shares = np.bincount(counts[counts > 0], minlength=6)[2:] / (counts > 0).sum()
            assert shares == pytest.approx(np.full(4, 0.25), abs=0.04)
            kinds = np.bincount(tokens[counts > 0], minlength=15)[11:] / (counts > 0).sum()
            assert kinds == pytest.approx(np.full(4, 0.25), abs=0.04)
        digits = np.bincount(tokens[counts == 0], minlength=11)[1:] / (counts == 0).sum()
        assert digits == pytest.approx(np.full(10, 0.1), abs=0.03)


def test_listops_runs_out_and_says_so(monkeypatch):
    monkeypatch.setattr(listops, "_PLACES", 1 << 10)
    with pytest.raises(ManticoreError, match=r"only 400 of 500 different sequences of 4 to 4 tokens .* max_depth=2"):
        listops.generate(lra_task("listops", num_train=1, num_test=500, min_len=4, max_len=4, max_depth=2), "test")
    for ids in ([11, 1, 2], [1, 2], [11, 15], [15], [0]):
        with pytest.raises(ManticoreError, match="is not a ListOps expression"):
            listops.value(ids)


def fill(lit, start, jump):
    """Pixels that can be reached from one by steps of at most `jump` pixels over lit ones."""
    seen, todo = {start}, [start]
    while todo:
        y, x = todo.pop()
        for down in range(-jump, jump + 1):
            for right in range(-jump, jump + 1):
                to = (y + down, x + right)
                inside = 0 <= to[0] < len(lit) and 0 <= to[1] < len(lit)
                if inside and lit[to] and to not in seen:
                    seen.add(to)
                    todo.append(to)
    return seen


def dots(image):
    """Centres of the two dots, by what a dot is: nine of the brightest pixels."""
    bright, size = image == pathfinder.DOT, len(image)
    found = [
        (y, x) for y in range(1, size - 1) for x in range(1, size - 1) if bright[y - 1 : y + 2, x - 1 : x + 2].all()
    ]
    assert len(found) == 2 and bright.sum() == 18
    return found


@pytest.mark.parametrize("settings", [{}, {"image_size": 16, "path_len": 12, "distractors": 1}, {"distractors": 0}])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pathfinder_labels_say_whether_the_dots_are_connected(settings, split):
    task = lra_task("pathfinder", **{**PATHS, **settings})
    dashed, labels = pathfinder.generate(task, split)
    whole, again = pathfinder.generate(task, split, gaps=False)
    assert np.array_equal(labels, again) and len(labels) == (60 if split == "train" else 31)
    assert labels.sum() == len(labels) // 2  # balanced
    for image, full, label in zip(dashed, whole, labels):
        one, two = dots(image)
        assert dots(full) == [one, two]
        # Without gaps, a flood over touching pixels; with them, over what is not further apart than dashes are
        assert (two in fill(full > 0, one, 1)) == label
        path, jump = image == pathfinder.PATH, pathfinder.GAP + 1
        path[one[0] - 1 : one[0] + 2, one[1] - 1 : one[1] + 2] = True
        reached = [pixel for pixel in fill(path, one, jump) if image[pixel] == pathfinder.PATH]
        # From the middle of a dot to what is as near to its rim as dashes are to each other
        assert any(max(abs(y - two[0]), abs(x - two[1])) <= 1 + jump for y, x in reached) == label
        removed = (full > 0) & (image == 0)
        assert removed.any() and not ((image > 0) & (full == 0)).any()


def test_pathfinder_draws_paths_before_labels():
    """All but the dots is the same whatever the label: two paths of full length, apart from all others."""
    rng = np.random.default_rng(0)
    numbers, ends = pathfinder._draw_paths(lra_task("pathfinder", **PATHS), rng)
    assert len(ends) > 100
    for image, (first, second) in zip(numbers[:8], ends):
        for path, (start, stop) in ((1, first), (2, second)):
            mine = image // pathfinder._FAR == path
            assert sorted(image[mine] % pathfinder._FAR) == list(range(18))
            assert image[tuple(start)] == path * 1024 and image[tuple(stop)] == path * 1024 + 17
            for y, x in np.argwhere(mine):
                others = np.argwhere((image > 0) & ~mine)
                assert (np.abs(others - (y, x)).max(1) > pathfinder.CLEAR).all()
    with pytest.raises(ManticoreError, match="no image of image_size=8 was found that holds two paths of path_len=16"):
        pathfinder.generate(lra_task("pathfinder", num_train=1, num_test=1, image_size=8, path_len=16), "test")


@pytest.mark.parametrize("name,settings", [("listops", LISTOPS), ("pathfinder", PATHS)])
def test_data_sets_are_the_same_everywhere_and_differ_by_seed_and_split(name, settings):
    task = lra_task(name, **settings)
    rows = task.dataset("test")
    assert rows.column_names == ["input_ids", "label"]
    if name == "listops":
        expected = list(zip(*sequences(task, "test")))
    else:
        images, labels = pathfinder.generate(task, "test")
        expected = [(image.reshape(-1).tolist(), label) for image, label in zip(images, labels.tolist())]
    assert [(row["input_ids"], row["label"]) for row in rows] == expected
    others = [lra_task(name, **{**settings, "seed": 1}).dataset("test"), task.dataset("train")]
    assert all(other["input_ids"][:31] != rows["input_ids"][:31] for other in others)
    digest = hashlib.sha256(str(expected[:5]).encode()).hexdigest()[:16]
    assert digest == {"listops": "ff536d421758f4ae", "pathfinder": "d46342ae56ee5cd8"}[name]


def test_texts_are_bytes(tmp_path):
    texts = ["Grüße", "", "a much longer text than the others are"]
    for name, rows in (("train", texts), ("test", texts[:2])):
        Dataset.from_dict({"review": rows, "kind": ["pos", "neg", "neg"][: len(rows)]}).to_csv(tmp_path / f"{name}.csv")
    task = lra_task(
        "text",
        data=str(tmp_path / "train.csv"),
        test_data=str(tmp_path / "test.csv"),
        max_len=16,
        input_column="review",
        label_column="kind",
    )
    train, test = task.dataset("train"), task.dataset("test")
    assert train["input_ids"][0] == [b + 1 for b in "Grüße".encode()] and train["input_ids"][1] == [11]
    assert bytes(b - 1 for b in train["input_ids"][2]) == b"a much longer te"
    assert train["label"][:] == [1, 0, 0] and test["label"][:] == [1, 0]
    assert train.column_names == ["input_ids", "label"]
    few = lra_task(
        "text", num_train=1, data=task.data, test_data=task.test_data, input_column="review", label_column="kind"
    )
    assert len(few.dataset("train")) == 1


def test_images_are_grey_pixels(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    features = Features({"img": Image(), "label": ClassLabel(names=["cat", "dog", "owl"])})
    for split in ("train", "test"):
        rows = {"img": [Pillow.fromarray(one) for one in pixels], "label": [2, 0, 1, 2]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    task = lra_task("image", data=str(tmp_path), image_size=8)
    rows = task.dataset("test")
    assert rows["label"][:] == [2, 0, 1, 2] and task.positions == 64
    for row, image in zip(rows, pixels):
        # The grey of ITU-R 601-2, as every library has it
        grey = image.reshape(-1, 3) @ np.array([0.299, 0.587, 0.114])
        assert np.abs(np.array(row["input_ids"]) - grey).max() <= 1
    with pytest.raises(ManticoreError, match="An image has 8 x 8 pixels; image_size=16 was given"):
        lra_task("image", data=str(tmp_path), image_size=16).dataset("train")


@pytest.mark.parametrize(
    "name,settings,message",
    [
        ("listop", {}, "task='listop' is unknown; did you mean listops"),
        ("listops", {"image_size": 8}, "listops: there is no setting 'image_size'"),
        ("listops", {"max_depth": 1}, "listops: max_depth=1 must be a whole number from 2 on"),
        ("listops", {"min_len": 50, "max_len": 40}, "min_len=50 is more than max_len=40"),
        ("pathfinder", {"path_len": 65}, "two paths of path_len=65 pixels hardly fit"),
        ("pathfinder", {"num_test": 0}, "num_test=0 must be a whole number from 1 on"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, settings, message):
    with pytest.raises(ManticoreError, match=message):
        lra_task(name, **settings)


def test_data_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    one = str(tmp_path / "a.csv")
    for settings, message in (
        ({"data": one}, "is one file: give test_data"),
        ({"data": one, "test_data": one}, r"has only the label \[1\] in 'label'"),
        ({"data": one, "test_data": one, "input_column": "words"}, r"\(train\) has no column 'words' \(it has"),
        ({"data": str(tmp_path / "no"), "test_data": one}, "The train data of .*no' cannot be read"),
    ):
        with pytest.raises(ManticoreError, match=message):
            lra_task("text", **settings).dataset("train")
    with pytest.raises(ManticoreError, match="split='valid' is unknown"):
        lra_task("listops").dataset("valid")
