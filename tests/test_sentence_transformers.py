"""sentence-transformers on a hybrid: sentences are embedded as the mean of its last states, and that is trained."""

import pytest
import torch
from datasets import Dataset
from tiny_hybrid import mixed_hybrid, save
from transformers import AutoModel

WORDS = "the cat sat on a mat and saw two dogs run <pad>".split()
TEXTS = ["the cat sat", "a mat", "two dogs saw the cat and run", "on a mat"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"num_blocks": 2, "embeddings": "mixed"}, {"mixture": "online"}], ids=str)
def test_sentences_are_embedded_and_trained(tmp_path, settings):
    package = pytest.importorskip("sentence_transformers")  # no extra installs it
    folder = save(mixed_hybrid(**settings), tmp_path / "hybrid", WORDS)
    modules = package.sentence_transformer.modules
    reads = modules.Transformer(str(folder))
    reads.tokenizer.pad_token = "<pad>"
    pools = modules.Pooling(reads.get_embedding_dimension(), "mean")
    model = package.SentenceTransformer(modules=[reads, pools], device="cpu")
    plain = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        states = [plain(reads.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state for text in TEXTS]
    wanted = torch.stack([one[0].mean(0) for one in states])
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True, batch_size=4), wanted)
    rows = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    args = package.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=2, learning_rate=0.01, use_cpu=True, report_to="none", save_strategy="no"
    )
    loss = package.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    package.SentenceTransformerTrainer(model, args, train_dataset=rows, loss=loss).train()
    trained = model.encode(TEXTS, convert_to_tensor=True)
    assert not torch.allclose(trained, wanted, atol=1e-3)
    model.save(str(tmp_path / "saved"))
    again = package.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), trained)
