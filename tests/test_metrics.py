"""The metrics of `evaluate` and what feeds them: against numbers by hand, naive twins, and the models' own losses."""

import math
import os
import random
import shutil
import socket
import sys
import tomllib
import zipfile

import clean_process
import families
import pytest
import torch
from datasets import Dataset
from manticore_hf_testing import ROOT
from tiny_hybrid import WORDS, mamba, word_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from manticore_hf import ManticoreError
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.evaluation.metrics import load_metric, token_logprobs

TEXTS = ["the cat sat", "a", "two dogs run and the cat saw a mat", "the cat sat", "", "mat on mat on mat on mat"]
MODELS = {
    "gpt_neox": lambda: families.tiny("gpt_neox"),
    "mamba": lambda: families.tiny("mamba"),
    "native": lambda: families.hybrid("gpt_neox+mamba"),
    "paper": lambda: families.hybrid("gpt_neox+mamba", preset="paper"),
}


@pytest.fixture
def loss_metric():
    return load_metric("token_loss", keep_in_memory=True)


@pytest.fixture
def mad_metric():
    return load_metric("mad_accuracy", keep_in_memory=True)


def naive(model, ids):
    """log p(ids[t] | the tokens before it) for every t > 0, one forward pass for each."""
    values = []
    for t in range(1, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:t]]), use_cache=False).logits[0, -1]
        values.append((logits[ids[t]] - logits.logsumexp(-1)).item())
    return values


def words(text):
    """Ids of a text of the word tokenizer, its start token first."""
    return [0] + [2 + WORDS.index(word) for word in text.split()]


def close(found, expected):
    assert [len(row) for row in found] == [len(row) for row in expected]
    torch.testing.assert_close(torch.tensor(sum(found, [])), torch.tensor(sum(expected, [])), rtol=1e-4, atol=1e-4)


# ---- token_loss ----


def test_loss_by_hand(loss_metric):
    predictions = [[math.log(1 / 2), math.log(1 / 4), math.log(1 / 4)], [math.log(1 / 8)]]
    found = loss_metric.compute(predictions=predictions, references=["né", "€😀"])
    # Eight bits over four tokens, and over 3 + 3 + 4 bytes: of the corpus, not the mean of 5/3 and 3/7
    assert found == pytest.approx(
        {"loss": 2 * math.log(2), "perplexity": 4.0, "bits_per_byte": 0.8, "tokens": 4, "bytes": 10}
    )


def test_bits_per_byte_do_not_depend_on_the_tokenizer(loss_metric):
    text = "zwölf Boxkämpfer"  # 18 bytes
    bytewise = loss_metric.compute(predictions=[[-math.log(256)] * 18], references=[text])
    pairwise = loss_metric.compute(predictions=[[-math.log(65536)] * 9], references=[text])
    assert bytewise["bits_per_byte"] == pytest.approx(8) and pairwise["bits_per_byte"] == pytest.approx(8)
    assert pairwise["loss"] == pytest.approx(2 * bytewise["loss"])


def test_impossible_and_improbable_tokens(loss_metric):
    found = loss_metric.compute(predictions=[[-math.inf, -1.0]], references=["ab"])
    assert found["loss"] == found["perplexity"] == found["bits_per_byte"] == math.inf
    found = loss_metric.compute(predictions=[[-1000.0]], references=["ab"])
    assert found["loss"] == 1000 and found["perplexity"] == math.inf
    assert math.copysign(1, loss_metric.compute(predictions=[[0.0]], references=["a"])["loss"]) == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_corpus_in_parts_is_the_corpus(in_memory):
    # More rows than Arrow writes at once, of uneven lengths, every tenth a duplicate and some without a token
    draw = random.Random(0)
    rows = [[-draw.expovariate(1) for _ in range(draw.randrange(30))] for _ in range(2300)]
    rows = [rows[i - 1] if i % 10 == 9 else row for i, row in enumerate(rows)]
    texts = ["ü" * len(row) + "." * (7 * bool(row)) for row in rows]
    metric = load_metric("token_loss", keep_in_memory=in_memory)
    whole = metric.compute(predictions=rows, references=texts)
    for start in range(0, 2300, 230):
        metric.add_batch(predictions=rows[start : start + 230], references=texts[start : start + 230])
    assert metric.compute() == whole
    for row, text in zip(rows[:50], texts[:50]):
        metric.add(prediction=row, reference=text)
    assert metric.compute(predictions=rows[50:], references=texts[50:]) == whole
    nats = -math.fsum(sum(rows, []))
    tokens, size = sum(map(len, rows)), sum(2 * len(row) + 7 for row in rows if row)
    assert (whole["tokens"], whole["bytes"]) == (tokens, size)
    assert whole["loss"] == pytest.approx(nats / tokens, rel=1e-12)
    assert whole["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-12)


def test_tensors_and_arrays_are_taken(loss_metric, mad_metric):
    rows = torch.tensor([[-1.5, -2.25], [-0.5, -4.0]])
    expected = loss_metric.compute(predictions=rows.tolist(), references=["a", "b"])
    assert expected["loss"] == 8.25 / 4
    for given in (rows, rows.numpy(), list(rows), [row.numpy() for row in rows]):
        assert loss_metric.compute(predictions=given, references=["a", "b"]) == expected
    labels = torch.tensor([[1, -100], [2, 3]])
    for given in (labels, labels.numpy()):
        assert mad_metric.compute(predictions=given, references=given)["positions"] == 3


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([[-1.0], [-1.0, 0.5]], ["a", "b"], r"predictions\[1\]\[1\] is 0.5.*at most 0"),
        ([[math.inf]], ["a"], r"predictions\[0\]\[0\] is inf.*at most 0"),
        ([[-1.0, math.nan]], ["a"], r"predictions\[0\]\[1\] is nan"),
        ([[-1.0, None]], ["a"], r"predictions\[0\]\[1\] is nan"),
        ([[-1.0], None], ["a", "b"], r"predictions\[1\]\[0\] is nan"),
        ([[-1.0], []], ["a", "bé"], r"predictions\[1\] has 0 log-probabilities and references\[1\] 3 bytes"),
        ([[-1.0]], [""], r"predictions\[0\] has 1 log-probabilities and references\[0\] 0 bytes"),
        ([[-1.0]], ["a", "b"], "Mismatch in the number"),
        ([[], []], ["", ""], r"2 text\(s\) given have no token"),
        ([], [], r"0 text\(s\) given have no token"),
    ],
)
def test_refused_losses(loss_metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        loss_metric.compute(predictions=predictions, references=references)


def test_a_metric_goes_on_after_an_error():
    metric = load_metric("token_loss")
    with pytest.raises(ValueError, match="at most 0"):
        metric.compute(predictions=[[1.0]], references=["a"])
    assert metric.compute(predictions=[[-1.0]], references=["a"])["tokens"] == 1


# ---- mad_accuracy ----


def naive_accuracy(predictions, references, ignored=-100):
    pairs = [(p, r) for ps, rs in zip(predictions, references) for p, r in zip(ps, rs) if r != ignored]
    shares = []
    for kind in {label for pair in pairs for label in pair}:
        guesses = [p for p, r in pairs if r == kind]
        shares.append(guesses.count(kind) / len(guesses) if guesses else 0.0)
    micro = sum(p == r for p, r in pairs) / len(pairs)
    return {
        "accuracy": micro,
        "macro_accuracy": sum(shares) / len(shares),
        "positions": len(pairs),
        "classes": len(shares),
    }


def test_accuracy_by_hand(mad_metric):
    found = mad_metric.compute(
        predictions=[[9, 1, 1, 1], [2, 5, -100, 8]], references=[[-100, 1, 1, 1], [2, 2, -100, -100]]
    )
    # Class 1: 3 of 3, class 2: 1 of 2, class 5: predicted and never right; 8 and 9 stand where nothing is labelled
    assert found == {"accuracy": 0.8, "macro_accuracy": 0.5, "positions": 5, "classes": 3}


def test_accuracy_like_its_naive_twin(mad_metric):
    draw = random.Random(1)
    for case in range(20):
        lengths = [draw.randrange(9) for _ in range(draw.randrange(1, 12))] + [3]
        references = [[draw.choice([-100, 0, 1, 2, 300]) for _ in range(n)] for n in lengths]
        references[-1][0] = 1
        predictions = [[draw.choice([r, draw.randrange(5)]) if r >= 0 else -7 for r in row] for row in references]
        expected = naive_accuracy(predictions, references)
        assert mad_metric.compute(predictions=predictions, references=references) == pytest.approx(expected), case
        for start in range(0, len(lengths), 4):
            mad_metric.add_batch(predictions=predictions[start : start + 4], references=references[start : start + 4])
        assert mad_metric.compute() == pytest.approx(expected), case


def test_another_ignore_index(mad_metric):
    predictions, references = [[0, 1, 2]], [[0, 0, 2]]
    found = mad_metric.compute(predictions=predictions, references=references, ignore_index=0)
    assert found == naive_accuracy(predictions, references, 0) and found["positions"] == 1


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([[1], [1, 2]], [[1], [1]], r"predictions\[1\] has 2 positions and references\[1\] 1"),
        ([[1.5]], [[1]], r"predictions\[0\]\[0\] is 1.5, which is no label id: .*argmax"),
        ([[1, -100]], [[-100, 1]], r"predictions\[0\]\[1\] is -100, which is no label id"),
        ([[None]], [[1]], r"predictions\[0\]\[0\] is nan"),
        ([[1]], [[-1]], r"references\[0\]\[0\] is -1, which is no label id: mark .* by -100"),
        ([[1], [2]], [[-100], [-100]], r"None of the 2 sequence\(s\)"),
        ([], [], r"None of the 0 sequence\(s\)"),
        ([[1]], [[1], [2]], "Mismatch in the number"),
    ],
)
def test_refused_accuracies(mad_metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        mad_metric.compute(predictions=predictions, references=references)


# ---- token_logprobs ----


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_every_text_alone(name):
    model, tokenizer = MODELS[name](), word_tokenizer()
    expected = [naive(model, words(text)) for text in TEXTS]
    for batch_size in (1, 3, 8):
        close(token_logprobs(model, tokenizer, TEXTS, batch_size=batch_size, progress=False), expected)


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_models_own(name, loss_metric):
    model, tokenizer, text = MODELS[name](), word_tokenizer(), "two dogs run and the cat saw a mat"
    scores = token_logprobs(model, tokenizer, [text], progress=False)
    loss = loss_metric.compute(predictions=scores, references=[text])["loss"]
    ids = torch.tensor([words(text)])
    with torch.no_grad():
        logits = model(input_ids=ids, labels=ids).logits
        own = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
        if name in families.FAMILIES:  # a hybrid's own loss has further terms
            assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(own, rel=1e-6)
    assert loss == pytest.approx(own, rel=1e-5)


def test_loss_is_that_of_evaluate(loss_metric):
    model, tokenizer = MODELS["native"](), word_tokenizer()
    texts = ["the cat sat on", "two dogs run and", "a mat saw the", "the cat sat on"]
    rows = Dataset.from_dict({"input_ids": [words(text) for text in texts]})
    expected = compare_losses(model, rows, batch_size=3)
    for name, each in {"hybrid": model, "mamba": model.component("mamba")}.items():
        scores = token_logprobs(each, tokenizer, texts, batch_size=3, progress=False)
        assert loss_metric.compute(predictions=scores, references=texts)["loss"] == pytest.approx(
            expected[name], rel=1e-5
        )


def test_bits_per_byte_of_multibyte_text(loss_metric):
    folder = ROOT / "manticore_hf" / "demo_components" / "neox-prose"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The naïve café: 日本語 😀.\n"  # its tokenizer cuts characters into bytes
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        bits = model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1) / math.log(2)
    found = loss_metric.compute(predictions=token_logprobs(model, tokenizer, [text], progress=False), references=[text])
    assert found["bytes"] == 34 and found["tokens"] == ids.numel() - 1
    assert found["bits_per_byte"] == pytest.approx(bits / 34, rel=1e-5)


def test_batches_are_of_like_lengths():
    model, seen = families.tiny("gpt_neox"), []

    def keep(_, arguments, inputs):
        seen.append((tuple(inputs["input_ids"].shape), inputs["attention_mask"].sum(1).tolist()))

    model.register_forward_pre_hook(keep, with_kwargs=True)
    token_logprobs(model, word_tokenizer(), TEXTS, batch_size=2, progress=False)
    # Of TEXTS, start included; the empty one is not there
    assert seen == [((2, 10), [10, 8]), ((2, 4), [4, 4]), ((1, 2), [2])]


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_long_texts_are_read_in_windows(stride):
    model, tokenizer = MODELS["native"](), word_tokenizer()
    texts = ["the cat", "a mat and two dogs run on the cat sat and a dogs saw", "the cat sat on"]
    # What is documented: later windows end after `stride` new tokens, and begin with the start, too
    expected = []
    for ids in map(words, texts):
        row = naive(model, ids[:5])
        for done in range(5, len(ids), stride):
            end = min(done + stride, len(ids))
            row += naive(model, [ids[0], *ids[end - 4 : end]])[done - end :]
        expected.append(row)
    found = token_logprobs(model, tokenizer, texts, batch_size=2, max_length=5, stride=stride, progress=False)
    close(found, expected)
    prompts, rest = zip(*(text.split(" ", 1) for text in texts))  # what is read, and not scored
    options = {"batch_size": 2, "max_length": 5, "stride": stride, "progress": False}
    close(token_logprobs(model, tokenizer, rest, prompts=prompts, **options), [row[1:] for row in expected])


def test_the_models_limit_is_the_default():
    model, tokenizer = families.tiny("gpt_neox", max_position_embeddings=6), word_tokenizer()
    fits, long = "the cat sat on a", "the cat sat on a mat"
    assert len(token_logprobs(model, tokenizer, [fits], progress=False)[0]) == 5
    with pytest.raises(ManticoreError, match=r"texts\[1\] has 7 tokens, .* more than max_length=6: give stride=3"):
        token_logprobs(model, tokenizer, [fits, long], progress=False)
    assert len(token_logprobs(model, tokenizer, [long], stride=3, progress=False)[0]) == 6
    # Mamba has no limit
    assert len(token_logprobs(mamba(), tokenizer, ["cat " * 70], progress=False)[0]) == 70
    with pytest.raises(ManticoreError, match="stride=3 needs a max_length"):
        token_logprobs(mamba(), tokenizer, [long], stride=3, progress=False)


def test_the_start_is_the_tokenizers():
    model, text = families.tiny("gpt_neox"), "the cat sat"
    alone = words(text)[1:]

    def scored(start):
        return [naive(model, start + alone)[len(start) - 1 :]]

    tokenizer = word_tokenizer(["<s>", *WORDS], bos_token="<s>")  # <s> is 2, and each word one more
    alone = [i + 1 for i in alone]
    close(token_logprobs(model, tokenizer, [text], progress=False), scored([2]))
    close(token_logprobs(model, tokenizer, [text], start_token_id=7, progress=False), scored([7]))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> <s> $A <end>", special_tokens=[("<s>", 2), ("<end>", 0)]
    )
    assert tokenizer(text)["input_ids"] == [0, 2, *alone, 0]
    # Both start tokens are read, neither is scored, and what stands after the text is not there
    close(token_logprobs(model, tokenizer, [text], progress=False), scored([0, 2]))
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ManticoreError, match="no bos_token and no eos_token.*start_token_id"):
        token_logprobs(model, tokenizer, [text], progress=False)


def test_unknown_pieces_are_refused():
    model, tokenizer = families.tiny("gpt_neox"), word_tokenizer()
    with pytest.raises(ManticoreError, match=r"texts\[1\] has 2 piece\(s\) that the tokenizer does not know"):
        token_logprobs(model, tokenizer, ["the", "the zebra sat <unknown> gnu"], progress=False)
    assert len(token_logprobs(model, tokenizer, ["the <unknown> sat"], progress=False)[0]) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"texts": "the cat"}, "texts is one str"),
        ({"texts": ["the", 3]}, r"texts\[1\] is of type int"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"max_length": 4, "stride": 4}, "stride=4 must be at least 1 and less than max_length=4"),
        ({"max_length": 4, "stride": 0}, "stride=0 must be"),
    ],
)
def test_refused_settings(settings, message):
    settings = {"texts": ["the cat"], **settings}
    with pytest.raises(ManticoreError, match=message):
        token_logprobs(families.tiny("gpt_neox"), word_tokenizer(), progress=False, **settings)


def test_the_model_is_left_as_it_was():
    model, tokenizer = families.tiny("gpt_neox", hidden_dropout=0.5), word_tokenizer()
    expected = token_logprobs(model, tokenizer, TEXTS, progress=False)
    assert not model.training
    model.train()
    close(token_logprobs(model, tokenizer, TEXTS, progress=False), expected)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(IndexError):
        token_logprobs(model, tokenizer, TEXTS, start_token_id=10**6, progress=False)
    assert model.training
    assert token_logprobs(model, tokenizer, []) == [] and token_logprobs(model, tokenizer, ["", ""]) == [[], []]


# ---- loading ----


def test_no_network_is_asked(monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"asked for the network: {arguments[-1]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_metric("token_loss").compute(predictions=[[-1.0]], references=["a"])["loss"] == 1
    assert load_metric("mad_accuracy").compute(predictions=[[1]], references=[[1]])["accuracy"] == 1


def test_names_and_missing_evaluate(monkeypatch):
    with pytest.raises(ManticoreError, match=r"no metric 'bleu' here; there are \['mad_accuracy', 'token_loss'\]"):
        load_metric("bleu")
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"needs the package evaluate.*pip install 'manticore-hf\[evaluate\]'"):
        load_metric("token_loss")


INSTALLED = """
import socket, sys
from pathlib import Path

def refuse(*arguments, **_):
    raise AssertionError(f"asked for the network: {arguments[-1]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import manticore_hf, manticore_hf.evaluation.metrics as metrics
assert Path(manticore_hf.__file__).is_relative_to(sys.argv[1]), manticore_hf.__file__
assert metrics.load_metric and "evaluate" not in sys.modules
print(metrics.load_metric("token_loss").compute(predictions=[[-2.0]], references=["a"])["loss"])
print(metrics.load_metric("mad_accuracy").compute(predictions=[[1, 1]], references=[[1, 2]])["accuracy"])
"""


def test_an_installed_wheel_loads_offline(tmp_path):
    source, wheels, site = (tmp_path / name for name in ("source", "wheels", "site"))
    unneeded = shutil.ignore_patterns("__pycache__", "demo_components", "*.egg-info")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name in project["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(ROOT / name, source / name, ignore=unneeded)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheels.mkdir()
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # as pip does
    done = clean_process.run(["-c", build, wheels], cwd=source, modules=clean_process.TORCH)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = {
        **os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }  # fmt: skip
    run = ["-c", INSTALLED, site]
    done = clean_process.run(run, env=environment, cwd=tmp_path, modules=clean_process.TORCH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2.0", "0.5"]
