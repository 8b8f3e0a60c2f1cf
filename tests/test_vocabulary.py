"""The same vocabulary padded to different sizes, as Pythia's and Mamba's are."""

import pytest
import torch
from tiny_hybrid import WORDS, mamba, neox, rows_of, save
from transformers import GPTNeoXForCausalLM, MambaForCausalLM

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.evaluation.losses import compare_losses


def _save(folder, name, size, words=WORDS):
    torch.manual_seed(size)
    model = {"neox": neox, "mamba": mamba}[name](vocab_size=size)
    return str(save(model, folder / name, words))


@pytest.mark.parametrize("embeddings,mixture", [("native", "token"), ("native", "static"), ("mixed", "static")])
def test_padding_rows_never_get_probability(tmp_path, embeddings, mixture):
    parts = [_save(tmp_path, "neox", 20), _save(tmp_path, "mamba", 16)]
    model = ManticoreForCausalLM.from_components(parts, embeddings=embeddings, mixture=mixture, mixture_space="logprob")
    assert model.config.vocab_size == 16
    ids = torch.randint(0, 12, (2, 7))
    logits = model(ids).logits
    assert logits.shape == (2, 7, 16)
    if embeddings == "native":
        neox, mamba = (model.component(n)(ids).logits[..., :16].log_softmax(-1) for n in ("neox", "mamba"))
        torch.testing.assert_close(logits.log_softmax(-1), ((neox + mamba) / 2).log_softmax(-1))
    model.save_pretrained(tmp_path / "hybrid")
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert torch.equal(loaded(ids).logits, logits)
    assert loaded.component("neox").config.vocab_size == 20
    assert loaded.generate(ids, max_new_tokens=3).max() < 16
    model.set_mixture_weights("neox")
    assert model(ids, labels=ids).loss.isfinite()


def test_rows_are_brought_to_one_size_by_resizing(tmp_path):
    parts = [_save(tmp_path, "neox", 20), _save(tmp_path, "mamba", 16)]
    model = ManticoreForCausalLM.from_components(parts)
    model.resize_token_embeddings(18)
    assert model(torch.randint(0, 18, (1, 5))).logits.shape[-1] == 18


def test_losses_are_over_the_rows_of_all(tmp_path):
    parts = [_save(tmp_path, "neox", 20), _save(tmp_path, "mamba", 16)]
    model = ManticoreForCausalLM.from_components(parts, mixture_space="logprob")
    losses = compare_losses(model, rows_of(), batch_size=4)
    assert losses["hybrid"] == pytest.approx(losses["ensemble"], rel=1e-5)  # whose gate is untrained
    ids = torch.tensor(rows_of()["input_ids"])
    logits = model.component("neox")(ids).logits[:, :-1, :16].flatten(0, 1)
    assert losses["neox"] == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item())


def test_really_different_vocabularies_are_refused(tmp_path):
    parts = [_save(tmp_path, "neox", 20), _save(tmp_path, "mamba", 16, WORDS[::-1])]
    with pytest.raises(ManticoreError, match="different vocabularies"):
        ManticoreForCausalLM.from_components(parts, num_blocks=2)


def test_a_component_without_rows_for_all_tokens_is_refused(tmp_path):
    parts = [_save(tmp_path, "neox", 20), _save(tmp_path, "mamba", 10)]
    with pytest.raises(ManticoreError, match="differ in size"):
        ManticoreForCausalLM.from_components(parts)


def test_instances_of_different_size_are_refused_with_the_remedy(tmp_path):
    neox = GPTNeoXForCausalLM.from_pretrained(_save(tmp_path, "neox", 20))
    mamba = MambaForCausalLM.from_pretrained(_save(tmp_path, "mamba", 16))
    with pytest.raises(ManticoreError, match="resize_token_embeddings"):
        ManticoreForCausalLM.from_components([neox, mamba])
    neox.resize_token_embeddings(16)
    assert ManticoreForCausalLM.from_components([neox, mamba]).config.vocab_size == 16
