"""Closed-form projectors: the algebra, and what it does to a hybrid."""

import pytest
import torch
from datasets import Dataset
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.training.calibrate import Moments, calibrate_projectors, solve_ridge


def _llama(width=32, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
    )


def _neox(width=24, seed=1):
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=60,
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def _text(rows=64, length=16):
    ids = torch.randint(0, 60, (rows, length)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def _moments(x, y, parts=3):
    out = Moments(x.shape[1], y.shape[1], x.device)
    for a, b in zip(x.chunk(parts), y.chunk(parts)):
        out.add(a, b)
    return out


def test_recovers_an_affine_map():
    x = torch.randn(400, 7)
    weight, bias = torch.randn(5, 7).double(), torch.randn(5).double()
    y = x.double() @ weight.T + bias
    got, offset, ridge, r2 = solve_ridge(_moments(x[:300], y[:300]), _moments(x[300:], y[300:]))
    assert ridge == 1e-6 and r2 > 1 - 1e-9
    torch.testing.assert_close(got, weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(offset, bias, atol=1e-4, rtol=0)


def test_equals_ridge_on_the_whole_matrix_and_its_error():
    x, y = torch.randn(200, 6).double(), torch.randn(200, 4).double()
    got, offset, ridge, r2 = solve_ridge(_moments(x[:150], y[:150]), _moments(x[150:], y[150:]), ridges=(0.3,))
    centred, target = x[:150] - x[:150].mean(0), y[:150] - y[:150].mean(0)
    gram = centred.T @ centred
    naive = torch.linalg.solve(gram + 0.3 * gram.diagonal().mean() * torch.eye(6), centred.T @ target).T
    torch.testing.assert_close(got, naive)
    error = (x[150:] @ got.T + offset - y[150:]).square().sum()
    total = (y[150:] - y[150:].mean(0)).square().sum()
    assert r2 == pytest.approx((1 - error / total).item(), abs=1e-9)


def test_noise_chooses_a_larger_ridge():
    x = torch.randn(60, 40)
    y = x[:, :1].double() + 3 * torch.randn(60, 1)
    held_x = torch.randn(500, 40)
    ridge = solve_ridge(_moments(x, y), _moments(held_x, held_x[:, :1].double()))[2]
    assert ridge >= 1e-1


@pytest.mark.parametrize("rows", [16, 32])
def test_of_few_batches_one_is_held_out(rows):
    model = ManticoreForCausalLM.from_components([_llama(), _neox()], num_blocks=2)
    found = calibrate_projectors(model, _text(rows=rows), batch_size=8)
    assert found.r2 and all(score == score and score < 1 for score in found.r2.values())


def test_a_rank_deficient_input_is_no_problem():
    x = torch.randn(100, 3).repeat(1, 2)
    weight, bias, _, r2 = solve_ridge(_moments(x, x.double()), _moments(x, x.double()))
    assert torch.isfinite(weight).all() and torch.isfinite(bias).all() and r2 > 0.999


@pytest.mark.parametrize("reference", ["llama", "gpt_neox"])
def test_projectors_map_between_the_components_states(reference):
    model = ManticoreForCausalLM.from_components([_llama(), _neox()], num_blocks=3, gate="none")
    text = _text()
    found = calibrate_projectors(model, text, tokens=1024, batch_size=8, reference_component=reference)
    other = {"llama": "gpt_neox", "gpt_neox": "llama"}[reference]
    assert found.reference == model.config.reference_component == reference
    assert model.config.projector_init == "calibrated"
    # Native embeddings: no map into the first block, none out of the last.
    assert set(found.r2) == {
        f"{side}:{other}-{b}" for side, b in (("out_of", 0), ("out_of", 1), ("into", 1), ("into", 2))
    }
    assert all(value > 0 for value in found.r2.values()), found.r2
    assert model(torch.tensor(text[:2]["input_ids"])).logits.isfinite().all()


def test_the_reference_is_the_better_component_and_the_start_is_better_than_identity():
    torch.manual_seed(0)
    ids = (torch.arange(16)[None] + torch.randint(0, 60, (64, 1))) % 60
    text = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    good, bad = _neox(), _llama()
    for model, steps in ((good, 80), (bad, 40)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model = ManticoreForCausalLM.from_components([bad.eval(), good.eval()], num_blocks=2, mixture="static")
    before = model(ids, labels=ids).loss.item()
    found = calibrate_projectors(model, text, tokens=1024, batch_size=8)
    assert found.reference == "gpt_neox" and found.losses["gpt_neox"] < found.losses["llama"]
    assert model(ids, labels=ids).loss.item() < before


def test_three_components_mixed_embeddings_and_the_paper_gate():
    parts = [_llama(), _neox(), _llama(40, seed=2)]
    from manticore_hf import ComponentSpec

    specs = [ComponentSpec(part, name=f"c{i}") for i, part in enumerate(parts)]
    model = ManticoreForCausalLM.from_components(specs, num_blocks=2, preset="paper")
    found = calibrate_projectors(model, _text(), tokens=1024, batch_size=8, reference_component="c1")
    assert len(found.r2) == 12  # K = 3, S = 2, in and out: the paper's gate keeps the reference's projectors, too
    assert model(torch.tensor(_text()[:2]["input_ids"])).logits.isfinite().all()


def test_survives_saving(tmp_path):
    model = ManticoreForCausalLM.from_components([_llama(), _neox()], num_blocks=2)
    calibrate_projectors(model, _text(), tokens=1024, batch_size=8, reference_component="gpt_neox")
    model.save_pretrained(tmp_path / "hybrid")
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")
    ids = torch.randint(0, 60, (2, 9))
    assert loaded.config.reference_component == "gpt_neox"
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_refusals():
    model = ManticoreForCausalLM.from_components([_llama(), _neox()], num_blocks=2)
    with pytest.raises(ManticoreError, match="reference_component='nobody'"):
        calibrate_projectors(model, _text(), reference_component="nobody")
    with pytest.warns(FutureWarning, match="calibrate_projectors: reference is now reference_component"):
        with pytest.raises(ManticoreError, match="reference_component='nobody'"):
            calibrate_projectors(model, _text(), reference="nobody")
    with pytest.raises(ManticoreError, match="two batches"):
        calibrate_projectors(model, _text(rows=4), batch_size=8)
    mlp = ManticoreForCausalLM.from_components([_llama(), _neox()], num_blocks=2, projector="mlp")
    with pytest.raises(ManticoreError, match="no closed form"):
        calibrate_projectors(mlp, _text())
