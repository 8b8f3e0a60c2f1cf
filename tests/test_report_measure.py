"""What the report measures, against naive twins and the textbook."""

import pytest
import torch
from datasets import Dataset
from manticore_hf.modeling.mixture_manticore import confidence
from manticore_hf.modeling.shared_manticore import enter, leave
from tiny_hybrid import mixed_hybrid, neox, pair, rows_of, word_tokenizer

from manticore_hf import ComponentSpec, ManticoreForCausalLM, ManticoreModel, prune
from manticore_hf.report import measure, speed
from manticore_hf.report.passages import document_gains, documents_of, kind_gains, where_it_differs
from manticore_hf.report.speed import measure_speed


def naive_loss(model, rows, gone=None):
    """Mean loss of a hybrid with native embeddings and heads, block by block; `gone`: (block, name)."""
    config, mixer = model.config, model.hybrid_mixer
    total, count = 0.0, 0
    for ids in rows["input_ids"]:
        ids = torch.tensor([ids])
        positions, state = torch.arange(ids.shape[1])[None], None
        for block in range(config.num_blocks):
            left = [name for name in config.component_names if (block, name) != gone]
            alpha = mixer.alpha_logits[block].softmax(-1)
            weights = {name: alpha[config.component_names.index(name)] for name in left}
            weights = {name: w / sum(weights.values()) for name, w in weights.items()}
            out = {}
            for name in left:
                entering = model.embed(name, ids) if block == 0 else mixer(enter, block, name, state, weights[name])
                out[name] = model.segments.segment(name, block)(entering, None, positions)
            if block < config.num_blocks - 1:
                state = sum(weights[name] * mixer(leave, block, name, out[name], weights[name]) for name in left)
        logits = {name: model.segments.logits(name, out[name]).log_softmax(-1) for name in left}
        if config.mixture == "token":
            weights = token_weights(model, ids, out, block, gone)
        mixed = sum(weights[name] * logits[name] for name in left).log_softmax(-1)
        for position in range(ids.shape[1] - 1):
            total, count = total - mixed[0, position, ids[0, position + 1]].item(), count + 1
    return total / count


def token_weights(model, ids, out, block, gone):
    """The gate's weights of the components that are left, renormalised after the softmax over all."""
    names = model.config.component_names
    if len(out) < len(names):  # the gate reads all of them, also the one whose prediction is left out
        full = {name: model.embed(name, ids) for name in names}
        positions = torch.arange(ids.shape[1])[None]
        assert block == 0, "the twin knows one block"
        out = {name: model.segments.segment(name, 0)(full[name], None, positions) for name in names}
    every = [model.segments.logits(name, out[name]) for name in names]
    weights = model.hybrid_mixer.gate_tokens([out[name] for name in names], [confidence(one)[0] for one in every])
    kept = [k for k, name in enumerate(names) if (block, name) != gone]
    total = weights[..., kept].sum(-1, keepdim=True)
    return {names[k]: weights[..., k : k + 1] / total for k in kept}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 2, "mixture": "static"},
        {"num_blocks": 1, "mixture": "token"},
        {"num_blocks": 2, "mixture": "static", "parts": "three"},
        {"num_blocks": 1, "mixture": "token", "parts": "three"},
    ],
)
def test_removal_is_the_naive_twins(settings):
    if settings.get("parts") == "three":
        settings = {**settings, "parts": [*pair(), neox(hidden_size=16)]}
    model, rows = mixed_hybrid(**settings, mixture_space="logprob"), rows_of()
    full = measure.hybrid_loss(model, rows, 2)
    assert full == pytest.approx(naive_loss(model, rows), rel=1e-5)
    for block in range(model.config.num_blocks):
        for name in model.config.component_names:
            assert measure.cannot_remove(model, name, block) is None
            with measure.removed(model, name, block):
                found = measure.hybrid_loss(model, rows, 2)
            assert found == pytest.approx(naive_loss(model, rows, (block, name)), rel=1e-5)
            assert abs(found - full) > 1e-3
    assert measure.hybrid_loss(model, rows, 2) == full


def test_removal_without_native_heads_takes_the_component_from_states_and_gate():
    """With mixed embeddings and a gate the last block mixes states by alpha and heads by the gate."""
    model, rows = mixed_hybrid(num_blocks=2, mixture="token", embeddings="mixed"), rows_of()
    a, b = model.config.component_names
    with measure.removed(model, a, 1):
        found = measure.hybrid_loss(model, rows)
    model.set_mixture_weights([None, [0.0, 1.0]])
    assert found == pytest.approx(measure.hybrid_loss(model, rows), rel=1e-5)


def test_what_cannot_be_removed_is_said():
    model = mixed_hybrid(num_blocks=2, mixture="static")
    a, b = model.config.component_names
    model.set_mixture_weights([[1.0, 0.0], [0.5, 0.5]])
    assert "no other component" in measure.cannot_remove(model, a, 0)
    assert measure.cannot_remove(model, a, 1) is None
    before = measure.hybrid_loss(model, rows_of())
    with measure.removed(model, b, 0):  # it is not in use there
        assert measure.hybrid_loss(model, rows_of()) == before
    assert model.config.mixture_weights == [[1.0, 0.0], [0.5, 0.5]]
    assert "pruned" in measure.cannot_remove(prune(model, "alpha"), a, 0)


def test_token_losses_are_the_models(monkeypatch):
    model, rows = mixed_hybrid(num_blocks=1), rows_of()
    found, gate = measure.token_losses(model, rows, batch_size=4)
    ids = torch.tensor(rows["input_ids"])
    every = {
        name: model.component(name)(ids).logits[..., : model.config.vocab_size]
        for name in found
        if name in model.config.component_names
    }
    apart = [ComponentSpec(model.component(name), name=name) for name in every]
    online = ManticoreForCausalLM.from_components(apart, num_blocks=1, mixture="online", verify=False).eval()
    every["ensemble"] = sum(one.log_softmax(-1) for one in every.values()) / 2
    every["online mixture"] = online(ids).logits
    out = model(ids)
    every["hybrid"] = out.logits
    for name, logits in every.items():
        expected = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).flatten()
        assert torch.allclose(found[name], expected.double(), atol=1e-5), name
    assert torch.allclose(gate, out.weights[:, :-1].flatten(0, 1), atol=1e-6)


def test_padding_changes_nothing():
    model = mixed_hybrid(num_blocks=2, mixture="static")
    rows = rows_of(3)
    short = [rows[0]["input_ids"][:7], rows[1]["input_ids"], rows[2]["input_ids"][:4]]
    labels = [[-100] * 2 + one[2:] for one in short]
    together = measure.token_losses(model, Dataset.from_dict({"input_ids": short, "labels": labels}), 3)[0]
    alone = [
        measure.token_losses(model, Dataset.from_dict({"input_ids": [i], "labels": [one]}), 1)[0]
        for i, one in zip(short, labels)
    ]
    for name, found in together.items():
        assert torch.allclose(found, torch.cat([one[name] for one in alone]), atol=1e-6)
        assert len(found) == 5 + 10 + 2


def test_uniform_and_token_blind_mixtures():
    model, rows = mixed_hybrid(num_blocks=1, mixture_space="logprob"), rows_of()
    found = {}
    for name, context in measure.other_mixtures(model):
        with context:
            found[name] = measure.hybrid_loss(model, rows)
    losses = measure.token_losses(model, rows)[0]
    assert found["equal weights in every block"] == pytest.approx(losses["ensemble"].mean().item(), rel=1e-5)
    model.set_mixture_weights(model.mixture_weights())
    assert found["the gate, ignoring the token"] == pytest.approx(measure.hybrid_loss(model, rows), rel=1e-6)


# ---- CKA -------------------------------------------------------------------------------------------------------------


def textbook_cka(x, y):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of linear kernels (Kornblith et al. 2019, section 3)."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = x.double() @ x.double().T, y.double() @ y.double().T

    def hsic(a, b):
        return (a @ centre @ b @ centre).trace() / (n - 1) ** 2

    return (hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()).item()


def test_cka_is_the_textbooks_and_knows_no_rotation():
    x = torch.randn(40, 7) + 3
    y = torch.randn(40, 5) + x[:, :5]
    one = measure.LinearCKA()
    for start in range(0, 40, 16):
        one.add(x[start : start + 16], y[start : start + 16])
    assert one.value() == pytest.approx(textbook_cka(x, y), rel=1e-9) and 0.05 < one.value() < 0.95
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    for same in (x, 2.5 * x.double() @ rotation + 1.0):
        one = measure.LinearCKA()
        one.add(x, same)
        assert one.value() == pytest.approx(1.0, abs=1e-9)


def test_similarity_is_that_of_what_enters_the_mixture():
    model, rows = mixed_hybrid(num_blocks=2, mixture="static"), rows_of()
    a, b = model.config.component_names
    found = {one["boundary"]: one for one in measure.feature_similarity(model, rows, 4)}
    assert sorted(found) == [0, 1, 2] and [found[i]["translated"] for i in range(3)] == [False, True, False]
    ids, positions = torch.tensor(rows["input_ids"]), torch.arange(12)[None]
    embedded = {name: model.embed(name, ids) for name in (a, b)}
    states = {name: model.segments.segment(name, 0)(embedded[name], None, positions) for name in (a, b)}
    left = {name: model.hybrid_mixer(leave, 0, name, states[name], 0.0) for name in (a, b)}
    last = ManticoreModel.forward(model, ids, return_dict=True).states
    for boundary, features in enumerate((embedded, left, last)):
        expected = textbook_cka(features[a].flatten(0, 1).detach(), features[b].flatten(0, 1).detach())
        assert found[boundary]["cka"] == pytest.approx(expected, rel=1e-4)
        assert found[boundary]["tokens"] == ids.numel()


# ---- where it gains --------------------------------------------------------------------------------------------------


def test_gains_are_sorted_and_sum_to_the_difference():
    model, rows, tokenizer = mixed_hybrid(num_blocks=1), rows_of(8), word_tokenizer()
    losses, gate = measure.token_losses(model, rows)
    documents, texts = documents_of(rows, tokenizer.eos_token_id)
    targets = torch.tensor([token for ids in rows["input_ids"] for token in ids[1:]])
    names = model.config.component_names
    where = where_it_differs(losses, rows, tokenizer, gate, names, top_tokens=1000, top_documents=1000)
    assert sum(any(token == 0 for token in ids[:-1]) for ids in rows["input_ids"]) > 1, "rows of several documents"
    for baseline in (*names, "ensemble", "online mixture"):
        gain = losses[baseline] - losses["hybrid"]
        for found in (document_gains(gain, documents), kind_gains(gain, targets)):
            sums = [one[1] for one in found]
            assert sums == sorted(sums, reverse=True)
            assert sum(sums) == pytest.approx(gain.sum().item(), abs=1e-9)
            assert sum(one[2] for one in found) == len(gain)
        assert where[baseline]["gain"] == pytest.approx(gain.mean().item())
        for what in ("tokens", "kinds", "documents"):
            gains, loses = ([one["gain"] for one in where[baseline][what][way]] for way in ("gains", "loses"))
            assert gains == sorted(gains, reverse=True) and loses == sorted(loses)
            assert sum(gains) + sum(loses) == pytest.approx(gain.sum().item(), abs=1e-6)
        best = int(gain.argmax())
        row, position = divmod(best, 11)
        ids = rows[row]["input_ids"]
        shown = where[baseline]["tokens"]["gains"][0]
        assert shown["token"] == tokenizer.decode([ids[position + 1]])
        assert shown["before"] == tokenizer.decode(ids[: position + 1])
        assert shown["gate"] == pytest.approx(dict(zip(names, gate[best].tolist())))


def test_what_stands_before_every_row_is_not_shown():
    tokenizer, ids = word_tokenizer(), [1, *range(2, 12)]
    rows = Dataset.from_dict({"input_ids": [ids], "labels": [[-100, *ids[1:]]]})
    assert documents_of(rows, tokenizer.eos_token_id)[1] == {0: ids}
    assert documents_of(rows, tokenizer.eos_token_id, 1)[1] == {0: ids[1:]}
    losses = {"hybrid": torch.zeros(10), "a": torch.ones(10)}
    found = where_it_differs(losses, rows, tokenizer, start=1, top_tokens=99)["a"]
    shown = [
        *(one["text"] for one in found["documents"]["gains"]),
        *(one["before"] for one in found["tokens"]["gains"]),
    ]
    assert shown[0] == tokenizer.decode(ids[1:]) and not any("<unknown>" in text for text in shown)


def test_documents_end_at_the_end_of_text():
    rows = Dataset.from_dict({"input_ids": [[5, 6, 0, 7, 8, 0], [9, 9, 4, 3, 2, 1]]})
    documents, texts = documents_of(rows, 0)
    assert documents.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]  # the first token of a row is not predicted
    assert texts == {0: [5, 6, 0], 1: [7, 8, 0], 2: [9, 9, 4, 3, 2, 1]}


def test_speed_names_every_model_and_its_weights():
    model = mixed_hybrid(num_blocks=1)
    found = measure_speed(model, [1, 2, 3, 4], new_tokens=2, repeats=1)
    assert list(found["models"]) == [*model.config.component_names, "hybrid"]
    for name, row in found["models"].items():
        part = model if name == "hybrid" else model.component(name)
        assert row["weights"] == sum(4 * p.numel() for p in part.parameters())
        assert row["prefill"] == pytest.approx(4 / row["first"]) and row["decode"] > 0
    hard = prune(model, model.config.component_names[0])
    assert list(measure_speed(hard, [1, 2], 1, 1)["models"]) == ["hybrid"]


def test_slow_models_are_timed_twice(monkeypatch):
    monkeypatch.setattr(speed, "ENOUGH", 0.0)
    found = measure_speed(mixed_hybrid(num_blocks=1), [1, 2, 3], new_tokens=1, repeats=4)
    assert found["repeats"] == 2 and len(found["models"]) == 3
