"""What the hybrid's forward returns, and the module that stands for its input embeddings."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .cache_manticore import ManticoreCache


@dataclass
class ManticoreModelOutput(ModelOutput):
    """Output of `ManticoreModel`.

    Attributes:
        last_hidden_state: [batch, time, d], the shared state after the last block.
        past_key_values: A ManticoreCache, if caching.
        hidden_states: S + 1 shared states [batch, time, d], one per block boundary, if asked for.
        states: Each component's own last state [batch, time, d_k] (None where it was not run).
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: ManticoreCache | None = None
    hidden_states: tuple | None = None
    states: tuple | None = None


@dataclass
class ManticoreCausalLMOutput(ModelOutput):
    """Output of `ManticoreForCausalLM`.

    Attributes:
        loss: mix_loss_weight * mixture_loss + component_loss_weight * sum(component_losses), with `labels`.
        logits: [batch, time, vocabulary] of the mixture; like any model's, up to a constant per token.
        past_key_values: A ManticoreCache, if caching.
        hidden_states: S + 1 shared states [batch, time, d], one per block boundary, if asked for.
        mixture_loss: Cross-entropy of the mixture, nats per token.
        component_losses: [K], cross-entropy of each component's own head, NaN where it was not run (if
            component_loss_weight > 0, or `report_parts` is set on the model).
        ensemble_loss: Cross-entropy of the plain ensemble of the heads (if `report_parts` is set).
        weights: [batch, time, K], the token gate's weights (mixture="token").
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: ManticoreCache | None = None
    hidden_states: tuple | None = None
    mixture_loss: torch.Tensor | None = None
    component_losses: torch.Tensor | None = None
    ensemble_loss: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class HybridEmbedding(nn.Module):
    """What `get_input_embeddings` gives: token ids -> `inputs_embeds`.

    [batch, time] -> [batch, time, sum of embedding widths] for embeddings="native" (each component's own, side by
    side), else [batch, time, d]. Holds no parameters: they are the components'.
    """

    def __init__(self, model):
        super().__init__()
        self._owner = (model,)  # in a tuple: not a child, or the model would contain itself

    @property
    def weight(self):
        """Embedding matrix of the tokenizer's component [vocabulary, width]."""
        model = self._owner[0]
        return model.component(model.config.tokenizer_component).get_input_embeddings().weight

    @property
    def num_embeddings(self):
        return self.weight.shape[0]

    @property
    def embedding_dim(self):
        model = self._owner[0]
        if model.config.embeddings != "native":
            return model.config.hidden_size
        return sum(model.component(n).get_input_embeddings().weight.shape[1] for n in model.config.component_names)

    def forward(self, input_ids):
        model = self._owner[0]
        if model.config.embeddings == "native":
            return torch.cat([model.embed(name, input_ids) for name in model.config.component_names], -1)
        return model.mix_embeddings(input_ids)
