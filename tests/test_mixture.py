"""Mixtures over the vocabulary and the statistics of predictions, against what they stand for."""

import pytest
import torch
from manticore_hf.modeling import mixture_manticore
from manticore_hf.modeling.mixture_manticore import confidence, mix_prob, weighted_sum


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True, params=["with the package", "without"])
def ways(request, monkeypatch):
    """Of mixing: those that `import manticore_hf` has registered, and those that a repository has."""
    if request.param == "without":
        monkeypatch.delattr(mixture_manticore._shared, "log_mean")
        monkeypatch.delattr(mixture_manticore._shared, "weighted_sum")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_geometric_mean_and_its_gradients(count):
    logits = [draw(2, 3, 7, seed=k).requires_grad_() for k in range(count)]
    raw = draw(2, 3, count, seed=9).requires_grad_()

    def plain():
        weights = raw.softmax(-1)
        return sum(weights[..., k, None] * one.log_softmax(-1) for k, one in enumerate(logits)).log_softmax(-1)

    ours = weighted_sum(list(raw.softmax(-1).split(1, -1)), logits).log_softmax(-1)
    torch.testing.assert_close(ours, plain())
    seed = draw(2, 3, 7, seed=5)
    for mine, theirs in zip(
        torch.autograd.grad(ours, [raw, *logits], seed, retain_graph=True),
        torch.autograd.grad(plain(), [raw, *logits], seed),
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 1), ()])
def test_derivatives_by_number(shape):
    weights = [draw(*shape, seed=k).sigmoid().requires_grad_() for k in range(2)]
    logits = [draw(2, 3, 4, seed=k + 2).requires_grad_() for k in range(2)]

    def mix(*tensors):
        return weighted_sum(list(tensors[:2]), list(tensors[2:]))

    assert torch.autograd.gradcheck(mix, (*weights, *logits))
    assert torch.autograd.gradgradcheck(mix, (*weights, *logits))


@pytest.mark.parametrize("frozen", ["weights", "logits"])
def test_nothing_is_computed_for_what_is_frozen(frozen):
    weights = [torch.rand(2, 3, 1, requires_grad=frozen != "weights") for _ in range(2)]
    logits = [torch.randn(2, 3, 4, requires_grad=frozen != "logits") for _ in range(2)]
    weighted_sum(weights, logits).square().sum().backward()
    assert all((one.grad is None) == (frozen == "weights") for one in weights)
    assert all((one.grad is None) == (frozen == "logits") for one in logits)


def test_the_operands_are_left_alone():
    weights, logits = [torch.rand(2, 3, 1) for _ in range(3)], [torch.randn(2, 3, 4) for _ in range(3)]
    before = [one.clone() for one in logits]
    weighted_sum(weights, logits)
    assert all(torch.equal(one, other) for one, other in zip(logits, before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 1), ()])
def test_lower_precision_trains(dtype, shape):
    weights = [torch.rand(shape, requires_grad=True) for _ in range(2)]
    terms = [torch.randn(2, 3, 4, dtype=dtype, requires_grad=True) for _ in range(2)]
    out = weighted_sum(weights, terms)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    plain = [one.detach().clone().requires_grad_() for one in weights]
    sum(w * x.detach().float() for w, x in zip(plain, terms)).square().sum().backward()
    for mine, theirs in zip(weights, plain):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("mix", [weighted_sum, mix_prob])
@pytest.mark.parametrize("weights", [[0.3, 0.7], [torch.tensor(0.3), torch.tensor(0.7)]], ids=["floats", "scalars"])
def test_weights_that_do_not_depend_on_the_token(mix, weights):
    logits = [draw(2, 3, 7, seed=k) for k in range(2)]
    probs = [one.softmax(-1) for one in logits]
    mean = 0.3 * probs[0] + 0.7 * probs[1] if mix is mix_prob else probs[0] ** 0.3 * probs[1] ** 0.7
    torch.testing.assert_close(mix(weights, logits).softmax(-1), mean / mean.sum(-1, keepdim=True))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_arithmetic_mean_and_its_gradients(count):
    logits = [(5 * draw(2, 3, 7, seed=k)).requires_grad_() for k in range(count)]
    raw = draw(2, 3, count, seed=9).requires_grad_()
    weights, norms = list(raw.softmax(-1).split(1, -1)), [confidence(one)[1] for one in logits]
    ours = mix_prob(weights, logits)
    torch.testing.assert_close(mix_prob(weights, logits, norms), ours)
    plain = sum(raw.softmax(-1)[..., k, None] * one.softmax(-1) for k, one in enumerate(logits)).log()
    torch.testing.assert_close(ours, plain)
    seed = draw(2, 3, 7, seed=5)
    for mine, theirs in zip(
        torch.autograd.grad(ours, [raw, *logits], seed), torch.autograd.grad(plain, [raw, *logits], seed)
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)


def test_the_arithmetic_mean_at_its_edges():
    """A component that is silenced (weight 0), a token that all think impossible, and one that only one does."""
    impossible = torch.zeros(1, 1, 4)
    impossible[..., 0] = -torch.inf
    other = impossible.clone()
    other[..., 1] = -torch.inf
    for weights, expected in (([1.0, 0.0], [0, 1 / 3, 1 / 3, 1 / 3]), ([0.5, 0.5], [0, 1 / 6, 5 / 12, 5 / 12])):
        logits = [impossible.clone().requires_grad_(), other.clone().requires_grad_()]
        weights = [torch.full((1, 1, 1), weight, requires_grad=True) for weight in weights]
        out = mix_prob(weights, logits)
        torch.testing.assert_close(out.exp(), torch.tensor(expected)[None, None])
        out[..., 2].sum().backward()
        assert all(one.grad.isfinite().all() for one in (*weights, *logits))
    torch.testing.assert_close(logits[0].grad.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("frozen", ["weights", "logits"])
def test_the_arithmetic_mean_leaves_what_is_frozen_alone(frozen):
    weights = [torch.full((2, 3, 1), 0.5, requires_grad=frozen != "weights") for _ in range(2)]
    logits = [torch.randn(2, 3, 4, requires_grad=frozen != "logits") for _ in range(2)]
    before = [one.detach().clone() for one in logits]
    mix_prob(weights, logits).square().sum().backward()
    assert all((one.grad is None) == (frozen == "weights") for one in weights)
    assert all((one.grad is None) == (frozen == "logits") for one in logits)
    assert all(torch.equal(one, other) for one, other in zip(logits, before))


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1, 5), (3, 50, 11), (2, 0, 7)])
@pytest.mark.parametrize("piece", [1, 1 << 19])
def test_confidence(shape, piece, monkeypatch):
    monkeypatch.setattr(mixture_manticore, "PIECE", piece)
    logits = draw(*shape).float().requires_grad_()
    found, norm = confidence(logits)
    assert found.shape == (*shape[:-1], 2) and found.dtype == torch.float32 and not found.requires_grad
    assert norm.shape == (*shape[:-1], 1) and not norm.requires_grad
    if not logits.numel():
        return
    expected = torch.distributions.Categorical(logits=logits.detach())
    torch.testing.assert_close(found[..., 0], expected.entropy(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[..., 1], logits.detach().log_softmax(-1).amax(-1))
    torch.testing.assert_close(norm, logits.detach().logsumexp(-1, keepdim=True))


def test_confidence_with_impossible_tokens():
    logits = torch.tensor([[[0.0, -torch.inf, 0.0, 0.0]], [[5.0, -torch.inf, -torch.inf, -torch.inf]]])
    found, norm = confidence(logits)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([3.0, 1.0]).log())
    torch.testing.assert_close(norm, logits.logsumexp(-1, keepdim=True))
    assert (logits == -torch.inf).sum() == 4  # nothing was changed in place


def test_the_number_of_pieces_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(mixture_manticore, "PIECE", 1)
    calls, original = [], torch.linalg.vecdot  # once a piece
    monkeypatch.setattr(torch.linalg, "vecdot", lambda *args: calls.append(1) or original(*args))
    for time in (100, 10_000):
        calls.clear()
        confidence(torch.zeros(1, time, 3))
        assert len(calls) <= mixture_manticore.PIECES
