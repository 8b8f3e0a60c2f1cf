"""The compression task's model: everything a causal LM has read, read off its last hidden state.

Source: the autoencoder of MAD (Poli et al., arXiv 2403.17844; github.com/athms/mad-lab, `mad/model/auto_encoder.py`):
the encoder is the model under test, its state at the last token (the compression token) is all that the decoder sees.
For every position it adds that position's sine and cosine embedding and applies a small MLP as wide as the state (norm,
linear, GELU, twice; then norm and a linear head), which says the token that was read there. So the score tells how
much of a sequence the model packs into one vector, not how well the decoder reads a sequence.

The causal LM's own head is not used: no loss reaches it.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class CompressionModel(nn.Module):
    """Wraps a causal LM (a hybrid, or any of Transformers) as an autoencoder that the standard Trainer trains.

    Args:
        model: The causal LM. Of a hybrid the shared state after its last block counts (with native heads: the
            components' last states, padded to one width and mixed by the last block's weights).
        seq_len: Tokens per sequence, the compression token included.
        vocab_size: Tokens that the decoder tells apart.
    """

    def __init__(self, model: PreTrainedModel, seq_len: int, vocab_size: int):
        super().__init__()
        self.model = model
        width = model.config.get_text_config().hidden_size
        self.register_buffer("positions", sincos(seq_len, width), persistent=False)
        layers = []
        for _ in range(2):
            layers += [nn.RMSNorm(width, eps=1e-6), nn.Linear(width, width), nn.GELU()]
        self.decoder = nn.Sequential(*layers, nn.RMSNorm(width, eps=1e-6), nn.Linear(width, vocab_size))
        for module in self.decoder:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def config(self) -> PretrainedConfig:
        """The causal LM's configuration, where the Trainer looks for it."""
        return self.model.config

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The model's state at the last token: [batch, width]."""
        out = self.model(input_ids=input_ids, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1][:, -1]

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Reconstructs the tokens.

        Args:
            input_ids: [batch, seq_len], the compression token last.
            labels: [batch, seq_len], the token to say at each position, not shifted; -100 is ignored.

        Returns:
            {"loss": mean cross-entropy (with labels), "logits": [batch, seq_len, vocab_size]}.
        """
        logits = self.decoder(self.encode(input_ids)[:, None] + self.positions)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


def sincos(length: int, width: int) -> torch.Tensor:
    """Sine and cosine embeddings of positions 0, 1, ...: [length, width], wavelengths from 2 pi to 20000 pi."""
    half = -(-width // 2)
    angles = torch.arange(length)[:, None] * 10_000.0 ** -(torch.arange(half) / max(1, half - 1))
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :width]
