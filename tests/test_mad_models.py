"""What the MAD tasks are trained on: the compression task's autoencoder, models and hybrids from scratch."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from manticore_hf import ManticoreError
from manticore_hf.experiments import CompressionModel, from_scratch, generate, hybrid_from_scratch, mad_task
from manticore_hf.experiments.scratch_models import scratch_config


def encoder(kind):
    if kind == "llama":
        return from_scratch("llama", 16, 2, 32, 33)
    return hybrid_from_scratch(["llama", "mamba"], 16, 2, 32, 33, num_blocks=2, preset=kind)


@pytest.mark.parametrize("kind", ["llama", "default", "paper"])
def test_compression_reads_everything_from_the_last_state(kind):
    """The decoder by hand, one position after another, from the state at the compression token alone."""
    task = mad_task("compression", num_test=3)
    ids, labels = map(torch.tensor, generate(task, "test"))
    model = CompressionModel(encoder(kind), task.seq_len, task.vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as zeros and ones, which would hide them
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        out = model(input_ids=ids, labels=labels)
        states = model.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        norm, first, _, second_norm, second, _, last_norm, head = model.decoder

        def rms(module, x):
            return x / (x.square().mean() + 1e-6).sqrt() * module.weight

        total = 0.0
        for row in range(len(ids)):
            for position in range(task.seq_len):
                rates = [10_000 ** -(i / 15) for i in range(16)]
                angles = torch.tensor([position * rate for rate in rates])
                x = states[row, -1] + torch.cat([angles.sin(), angles.cos()])
                x = F.gelu(first.weight @ rms(norm, x) + first.bias)
                x = F.gelu(second.weight @ rms(second_norm, x) + second.bias)
                x = head.weight @ rms(last_norm, x) + head.bias
                assert torch.allclose(out["logits"][row, position], x, atol=1e-4)
                total -= x.log_softmax(-1)[labels[row, position]].item()
    assert math.isclose(out["loss"].item(), total / labels.numel(), rel_tol=1e-4)


@pytest.mark.parametrize("kind", ["default", "paper"])
def test_compression_trains_all_components_of_a_hybrid(kind, tmp_path):
    task = mad_task("compression", num_train=16)
    model = CompressionModel(encoder(kind), task.seq_len, task.vocab_size)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-2,
    )
    Trainer(model=model, args=arguments, train_dataset=task.dataset("train")).train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    for part in ("llama.model.layers.0", "llama.model.layers.1", "backbone.layers.1", "alpha_logits", "decoder.7"):
        assert any(part in name for name in moved), part


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt", "llama", "gemma2", "mamba", "mamba2", "falcon_mamba"])
def test_models_from_scratch_have_the_size_that_was_asked_for(family):
    model = from_scratch(family, 17, 3, 64, 40, seed=1)
    config = model.config
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (17, 3, 64)
    assert model.get_input_embeddings().weight.shape == (17, 64)
    again, other = from_scratch(family, 17, 3, 64, 40, seed=1), from_scratch(family, 17, 3, 64, 40, seed=2)
    ids = torch.randint(17, (2, 40))
    model.train()  # no dropout
    assert torch.equal(model(input_ids=ids).logits, again.eval()(input_ids=ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    # Every token's embedding is trained by what it is read as, whatever the family takes for padding
    assert getattr(model.get_input_embeddings(), "padding_idx", None) is None


def test_a_hybrid_from_scratch_starts_from_the_weights_of_its_baselines():
    model = hybrid_from_scratch(["llama", "mamba", "llama"], 16, 2, 32, 33, seed=4, num_blocks=2)
    assert model.config.component_names == ["llama_1", "mamba", "llama_2"]
    ids = torch.randint(16, (2, 9))
    for i, name in enumerate(model.config.component_names):
        alone = from_scratch(name.partition("_")[0], 16, 2, 32, 33, seed=4 + i).eval()
        assert torch.equal(model.component(name)(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_models_that_cannot_be_made_are_refused():
    with pytest.raises(ManticoreError, match="model='lama' is not a model type with a causal LM"):
        scratch_config("lama", 16, 2, 64, 33)
    with pytest.raises(ManticoreError, match="model='vit' is not a model type with a causal LM"):
        scratch_config("vit", 16, 2, 64, 33)
    with pytest.raises(ManticoreError, match="llama: 0 layers of width 64"):
        scratch_config("llama", 16, 0, 64, 33)
    with pytest.raises(ManticoreError, match="hidden_size=70 cannot be cut into heads"):
        scratch_config("llama", 16, 2, 70, 33)
    with pytest.raises(ManticoreError, match=r"hybrid='llama' has 1 component\(s\)"):
        hybrid_from_scratch(["llama"], 16, 2, 64, 33)
