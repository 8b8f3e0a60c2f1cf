"""The MAD tasks mean what they say: solved by programs, at chance for guessers, equal in every process."""

import dataclasses
import hashlib
import math
import os
import random
import subprocess
import sys
from collections import Counter

import clean_process
import naive_mad
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from naive_mad import IGNORE, fuzzy_pairs

from manticore_hf import ManticoreError
from manticore_hf.experiments import TASKS, benchmark_settings, from_scratch, generate, mad_task
from manticore_hf.experiments.mad.tasks import first_occurrence, memorized

ORACLES = {
    "in-context-recall": naive_mad.recall_oracle,
    "noisy-in-context-recall": naive_mad.recall_oracle,
    "fuzzy-in-context-recall": naive_mad.fuzzy_oracle,
    "selective-copying": naive_mad.copying_oracle,
}
RECALLS = [name for name in TASKS if name.endswith("recall")]
CAUSAL = [name for name in TASKS if name != "compression"]
# Where the last pair hardly fits, and where hardly anything but noise is left
EDGES = [
    mad_task("recall", seq_len=4, vocab_size=4),
    mad_task("noisy-recall", seq_len=4, frac_noise=0.95),
    mad_task("noisy-recall", seq_len=16, frac_noise=0.95, vocab_size=21),
    mad_task("fuzzy-recall", seq_len=13),
    mad_task("fuzzy-recall", seq_len=14, vocab_size=32),
    mad_task("fuzzy-recall", seq_len=9, key_motif=1, value_motif=3),
    mad_task("copying", seq_len=34, tokens_to_copy=16),
    mad_task("memorization", frac_noise=0.9, noise_vocab_size=8, seq_len=4),
    mad_task("compression", frac_noise=0.5, noise_vocab_size=4),
]
HARD = [task for name in TASKS for task in benchmark_settings(name)]


def label(task):
    return "-".join(str(value) for value in dataclasses.astuple(task)[:-1])


def pairs_of(ids):
    """Sequences of pairs: [rows, pairs, 2]."""
    return ids[:, : ids.shape[1] // 2 * 2].reshape(len(ids), -1, 2)


# ---- meaning ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("task", EDGES + HARD, ids=label)
def test_an_oracle_scores_100_percent(task):
    """Every label follows from what was read before it, by a program that is told nothing else."""
    task = dataclasses.replace(task, num_test=40 if task in HARD else 400)
    ids, labels = generate(task, "test")
    if task.name == "memorization":  # nothing in the sequence says the value: the training labels do
        train = generate(dataclasses.replace(task, num_train=task.vocab_size * 8), "train")
        asked = np.nonzero(train[1] != IGNORE)
        learned = dict(zip(train[0][asked[0], asked[1] - 2].tolist(), train[1][asked].tolist()))
    asked = 0
    for row, wanted in zip(ids.tolist(), labels.tolist()):
        for t, answer in enumerate(wanted):
            if answer == IGNORE:
                continue
            asked += 1
            if task.name == "compression":
                assert row[t] == answer
            elif task.name == "memorization":
                assert row[t - 1] == task.vocab_size - 1 and learned[row[t - 2]] == answer
            else:
                assert ORACLES[task.name](task, row[:t]) == answer
    assert asked >= task.num_test


@pytest.mark.parametrize("name", TASKS)
def test_chance_scores_chance(name):
    """Uniform draws from the possible answers; five standard deviations of the binomial."""
    task = mad_task(name)
    ids, labels = generate(task, "test")
    asked = labels != IGNORE
    guess = np.random.default_rng(7).integers(task.answers.start, task.answers.stop, labels.shape)
    if name == "compression":
        guess[:, -1] = task.vocab_size - 1
    count = int(asked.sum())
    hits = (guess == labels)[asked].mean()
    assert abs(hits - task.chance) < 5 * math.sqrt(task.chance * (1 - task.chance) / count)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "memorization"])
def test_a_constant_scores_chance(name):
    """One answer of each sequence (they are independent), compared with each possible answer in turn."""
    task = mad_task(name, num_test=4000)
    ids, labels = generate(task, "test")
    wanted = labels[:, -2 if name == "compression" else -1]
    expected = 1 / len(task.answers)
    for token in task.answers:
        hits = (wanted == token).mean()
        assert abs(hits - expected) < 5 * math.sqrt(expected * (1 - expected) / len(wanted))


@pytest.mark.parametrize("name", RECALLS)
@pytest.mark.parametrize("vocab_size", [None, 48])
def test_recall_asks_for_every_value_whose_key_was_shown_and_for_nothing_else(name, vocab_size):
    task = mad_task(name, num_test=200, **({"vocab_size": vocab_size} if vocab_size else {}))
    ids, labels = generate(task, "test")
    repeats = 0
    for row, wanted in zip(ids.tolist(), labels.tolist()):
        if name.startswith("fuzzy"):
            motifs = fuzzy_pairs(task, row)
            padding = row.count(task.vocab_size - 1)
            assert set(row[:padding]) == {task.vocab_size - 1} and padding >= 2
        else:
            padding = 0
            motifs = [((key,), (value,)) for key, value in zip(row[::2], row[1::2])]
        expected, known = [IGNORE] * padding, {}
        for key, value in motifs:
            expected += [IGNORE] * len(key)
            if key[0] in task.noise:
                assert value[0] in task.noise
                expected.append(IGNORE)
                continue
            expected += value if key in known else [IGNORE] * len(value)
            assert known.setdefault(key, value) == value  # one value per key and sequence
            repeats += key in known
        assert wanted == expected
        assert motifs[-1][0] in [key for key, _ in motifs[:-1]]
    assert repeats > 200


@pytest.mark.parametrize("name", RECALLS)
def test_recall_trains_on_every_next_token(name):
    """As the benchmark does; the first token is nobody's next."""
    ids, labels = generate(mad_task(name, num_train=50), "train")
    assert (labels[:, 1:] == ids[:, 1:]).all() and (labels[:, 0] == IGNORE).all()


@pytest.mark.parametrize("name", [name for name in TASKS if name not in RECALLS])
def test_the_other_tasks_mask_train_and_test_alike(name):
    task = mad_task(name, num_train=30, num_test=30)
    train, test = generate(task, "train")[1] == IGNORE, generate(task, "test")[1] == IGNORE
    assert (train == test).all() and train.any() == (name != "compression")


def test_keys_and_values_of_fuzzy_recall_have_all_lengths_but_the_tests_keys():
    task = mad_task("fuzzy-recall", num_train=2000, num_test=2000)
    sizes = {}
    for split in ("train", "test"):
        pairs = [pair for row in generate(task, split)[0].tolist() for pair in fuzzy_pairs(task, row)[:4]]
        assert all(len(set(motif)) == len(motif) for pair in pairs for motif in pair)  # no token twice in a motif
        for part, which in enumerate(("keys", "values")):
            sizes[split, which] = Counter(len(pair[part]) for pair in pairs)
    assert sizes["test", "keys"].keys() == {3}
    for key in (("train", "keys"), ("train", "values"), ("test", "values")):
        share = np.array([sizes[key][size] for size in (1, 2, 3)]) / sum(sizes[key].values())
        assert np.abs(share - 1 / 3).max() < 0.03, key


def test_selective_copying_is_tokens_among_blanks_then_blanks():
    task = mad_task("copying", num_test=500)
    ids, labels = generate(task, "test")
    blank, copy = 14, 15
    assert ids.shape == (500, 257)
    assert (ids[:, 239] == copy).all() and (ids == copy).sum() == 500
    assert (ids[:, 240:] == blank).all() and (labels[:, :241] == IGNORE).all()
    tokens = ids[:, :239][ids[:, :239] != blank].reshape(500, 16)
    assert (tokens == labels[:, 241:]).all() and (tokens < blank).all()
    places = np.nonzero(ids[:, :239] != blank)[1].reshape(500, 16)
    gaps = np.diff(places, axis=1, prepend=-1) - 1
    # Multinomial with 223 draws over 16 gaps; the variance would be 13 times as large for one uniform cut
    assert (places[:, -1] == 238).all()
    assert np.abs(gaps.mean(0) - 223 / 16).max() < 5 * math.sqrt(223 / 16 / 500)
    assert abs(gaps.var() / (223 / 16 * 15 / 16) - 1) < 0.15


def test_memorization_has_one_map_for_train_and_test_and_shows_no_value():
    task = mad_task("memorization", seed=3)
    maps = []
    for split in ("train", "test"):
        ids, labels = generate(task, split)
        assert (ids[:, 1::2] == 255).all() and set(np.unique(ids[:, :-1:2])) <= set(range(127))
        asked = np.nonzero(labels != IGNORE)
        pairs = set(zip(ids[asked[0], asked[1] - 2].tolist(), labels[asked].tolist()))
        assert len(pairs) == len(dict(pairs)) == len({value for _, value in pairs}) == 127
        assert all(127 <= value < 255 for _, value in pairs)
        maps.append(pairs)
    assert maps[0] == maps[1] == set(enumerate(memorized(task).tolist()))
    assert (memorized(task) != memorized(mad_task("memorization", seed=4))).any()


@pytest.mark.parametrize("frac_noise", [0.2, 0.8])
def test_noise_is_there_and_as_much_as_asked(frac_noise):
    task = mad_task("noisy-recall", frac_noise=frac_noise)
    ids, labels = generate(task, "test")
    pairs = pairs_of(ids)[:, :-1]
    noise = pairs >= 16
    assert (noise[..., 0] == noise[..., 1]).all() and (~noise[..., 0]).any(1).all()
    share, count = noise[..., 0].mean() * 63 / 62, noise[..., 0].size  # one pair of 63 never is
    assert abs(share - frac_noise) < 5 * math.sqrt(frac_noise * (1 - frac_noise) / count)
    assert set(np.unique(pairs[noise])) == set(range(16, 32))
    assert (labels[:, :-2].reshape(noise.shape)[noise] == IGNORE).all()


def test_noise_in_compression_is_masked_and_in_memorization_neither_asked_nor_a_value():
    task = mad_task("compression", frac_noise=0.3, noise_vocab_size=5)
    ids, labels = generate(task, "test")
    noise = np.isin(ids, range(10, 15))
    assert ((labels == IGNORE) == noise).all() and (labels[~noise] == ids[~noise]).all()
    assert abs(noise[:, :-1].mean() - 0.3) < 0.02 and not noise[:, -1].any()
    drawn = (~noise[:, :-1]).sum()
    assert abs((drawn / len(task.answers) + len(ids)) / (drawn + len(ids)) - task.chance) < 0.005

    task = mad_task("memorization", vocab_size=64, frac_noise=0.4, noise_vocab_size=9)
    ids, labels = generate(task, "test")
    noise = np.isin(pairs_of(ids), task.noise)
    assert (noise[..., 0] == noise[..., 1]).all() and abs(noise.mean() - 0.4 * 15 / 16) < 0.03
    asked = labels[:, 2::2] != IGNORE
    assert (asked == ~noise[..., 0]).all() and not np.isin(labels, task.noise).any()


# ---- the vectorised generators against loops -------------------------------------------------------------------------

TWINS = [
    mad_task("recall", seq_len=24),
    mad_task("noisy-recall", seq_len=24, frac_noise=0.5),
    mad_task("fuzzy-recall", seq_len=40),
    mad_task("fuzzy-recall", seq_len=15, vocab_size=10),
    mad_task("copying", seq_len=40, tokens_to_copy=5),
    mad_task("compression", frac_noise=0.3, noise_vocab_size=5),
]


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", TWINS, ids=label)
def test_sequences_are_distributed_as_those_of_a_plain_loop(task, split):
    """How often every token is at every place, and is asked for there: means of both within 5.5 standard errors."""
    count = 3000
    task = dataclasses.replace(task, num_train=count, num_test=count)
    rng = np.random.default_rng(11)
    loop = [naive_mad.draw(task, rng, split == "train") for _ in range(count)]
    for ours, theirs in zip(generate(task, split), map(np.array, zip(*loop))):
        assert ours.shape == theirs.shape and ours.dtype == np.int64
        for token in (*range(task.vocab_size), IGNORE):
            one, two = ours == token, theirs == token
            mean = (one.mean(0) + two.mean(0)) / 2
            error = np.sqrt(2 * mean * (1 - mean) / count)
            assert (np.abs(one.mean(0) - two.mean(0)) <= 5.5 * error + 1e-12).all(), token
            # The number per sequence, too, in its first two moments: dependence between places
            for power in (1, 2):
                one_count, two_count = one.sum(1) ** power, two.sum(1) ** power
                error = math.sqrt((one_count.var() + two_count.var()) / count)
                assert abs(one_count.mean() - two_count.mean()) <= 5.5 * error + 1e-12, token


def test_first_occurrence_is_the_first():
    codes = np.random.default_rng(0).integers(0, 5, (50, 12))
    for scale in (1, 2**40):  # both ways of sorting
        found = first_occurrence(codes * scale)
        assert found.tolist() == [[row.index(code) for code in row] for row in codes.tolist()]


# ---- reproducible ----------------------------------------------------------------------------------------------------

DIGEST = """
import hashlib, random, sys
import numpy as np, torch
random.seed(int(sys.argv[1])); np.random.seed(int(sys.argv[1])); torch.manual_seed(int(sys.argv[1]))
from manticore_hf.experiments import TASKS, generate, mad_task
digest = hashlib.sha256()
for name in TASKS:
    for split in ("train", "test"):
        for array in generate(mad_task(name, num_train=300, num_test=100, seed=5), split):
            digest.update(array.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("hash_seed", [None, pytest.param("1", marks=pytest.mark.slow)])
def test_every_process_generates_the_same_whatever_the_global_random_state(hash_seed):
    if hash_seed is None:
        done = clean_process.run(["-c", DIGEST, "12"])
    else:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DIGEST, "12"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip()
    digest, before = hashlib.sha256(), (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    for name in TASKS:
        for split in ("train", "test"):
            for array in generate(mad_task(name, num_train=300, num_test=100, seed=5), split):
                digest.update(array.tobytes())
    assert printed == digest.hexdigest()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", TASKS)
def test_splits_and_seeds_differ(name):
    settings = {"num_train": 64, "num_test": 64}
    train, test = (generate(mad_task(name, **settings), split)[0] for split in ("train", "test"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}
    for seed in (1, 2**32):
        other = generate(mad_task(name, seed=seed, **settings), "train")[0]
        assert not {row.tobytes() for row in train} & {row.tobytes() for row in other}


# ---- as Transformers trains on it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_dataset_holds_the_arrays(name):
    task = mad_task(name, num_train=200)
    rows = task.dataset("train")
    assert isinstance(rows, Dataset) and rows.column_names == ["input_ids", "labels"]
    ids, labels = generate(task, "train")
    assert rows["input_ids"][:] == ids.tolist() and rows["labels"][:] == labels.tolist()


# What the benchmark's code gives out per sequence: tokens read, and after which of them the answers are due
BENCHMARK = {
    "in-context-recall": (127, None), "noisy-in-context-recall": (127, None), "fuzzy-in-context-recall": (128, None),
    "selective-copying": (256, range(240, 256)), "memorization": (32, range(1, 32, 2)),
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_lm_gets_the_benchmarks_pairs(name, split):
    """Its loss is the cross-entropy of the targets after what was read; the token behind the last one is never used."""
    task = mad_task(name, num_train=3, num_test=3)
    read, due = BENCHMARK[name]
    ids, labels = map(torch.tensor, generate(task, split))
    model = from_scratch("llama", task.vocab_size, 1, 32, task.seq_len + 1).eval()
    inputs, targets = ids[:, :-1], labels[:, 1:]
    assert inputs.shape[1] == read
    if due is not None:
        assert all(torch.nonzero(row != IGNORE).flatten().tolist() == list(due) for row in targets)
    with torch.no_grad():
        expected = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        assert torch.allclose(model(input_ids=ids, labels=labels).loss, expected, atol=1e-6)
    assert (labels[:, 0] == IGNORE).all()  # else the Trainer, which counts labels, would divide by too many


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_benchmarks_settings():
    """The changes of configs/tasks/*.yml, as read there."""
    sizes = {name: [label(task) for task in benchmark_settings(name)] for name in TASKS}
    assert {name: len(set(found)) for name, found in sizes.items()} == {
        "in-context-recall": 11,
        "fuzzy-in-context-recall": 11,
        "noisy-in-context-recall": 14,
        "selective-copying": 13,
        "compression": 11,
        "memorization": 6,
    }
    noisy, copying = benchmark_settings("noisy-recall"), benchmark_settings("copying")
    assert [task.vocab_size for task in noisy[:4]] == [32, 48, 80, 144] and {t.noise_vocab_size for t in noisy} == {16}
    assert [task.frac_noise for task in noisy[-3:]] == [0.4, 0.6, 0.8] and noisy[0].frac_noise == 0.2
    assert [(t.seq_len, t.tokens_to_copy) for t in copying[-3:]] == [(256, 32), (256, 64), (256, 96)]
    assert [task.vocab_size for task in benchmark_settings("memorization")] == [256, 512, 1024, 2048, 4096, 8192]
    assert benchmark_settings("memorization")[0].num_train == 256
    assert sorted({task.seq_len for task in benchmark_settings("compression")}) == [32, 64, 128, 256]


@pytest.mark.parametrize(
    "name,settings,message",
    [
        ("recal", {}, r"task='recal' is unknown; did you mean recall\?"),
        ("recall", {"vocab": 3}, r"there is no setting 'vocab' \(=3\); choose from \['vocab_size', "),
        ("recall", {"vocab_size": 3}, r"vocab_size=3 leaves 1 key and 2 value tokens"),
        ("recall", {"seq_len": 127}, r"seq_len=127 must be even"),
        ("recall", {"seq_len": 2}, r"seq_len=2 is too short; at least 4"),
        ("recall", {"frac_noise": 0.1, "noise_vocab_size": 2}, r"in-context-recall has no noise, and frac_noise=0.1"),
        ("noisy-recall", {"noise_vocab_size": 0}, r"frac_noise=0.2 needs tokens to draw noise from"),
        ("noisy-recall", {"frac_noise": 1.0}, r"frac_noise=1.0 must be a number in \[0, 1\)"),
        ("noisy-recall", {"vocab_size": 16}, r"vocab_size=16 leaves 0 key and 0 value tokens"),
        ("fuzzy-recall", {"seq_len": 12}, r"seq_len=12 is too short; at least 13"),
        ("fuzzy-recall", {"vocab_size": 6}, r"vocab_size=6 leaves 2 key and 3 value tokens"),
        ("fuzzy-recall", {"key_motif": 0}, r"key_motif=0 must be a whole number from 1 on"),
        ("copying", {"seq_len": 33}, r"seq_len=33 is too short; at least 34"),
        ("copying", {"tokens_to_copy": 0}, r"tokens_to_copy=0 leaves nothing to copy"),
        ("memorization", {"num_train": 0}, r"num_train=0 must be a whole number from 1 on"),
        ("compression", {"num_test": 2.5}, r"num_test=2.5 must be a whole number"),
    ],
)
def test_what_cannot_be_generated_is_refused(name, settings, message):
    with pytest.raises(ManticoreError, match=message):
        mad_task(name, **settings)


def test_an_unknown_split_is_refused():
    with pytest.raises(ManticoreError, match=r"split='validation' is unknown; choose one of \['train', 'test'\]"):
        mad_task("recall").dataset("validation")
