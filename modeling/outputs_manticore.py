"""What the hybrid's forward returns, its input embeddings, and the module that stands for them."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_manticore import ManticoreError
from .devices_manticore import device_of, place
from .mixing_manticore import resize
from .mixture_manticore import is_active, weighted_sum


@dataclass
class ManticoreModelOutput(BaseModelOutputWithPast):
    """Output of `ManticoreModel`.

    Attributes:
        last_hidden_state: [batch, time, d], the shared state after the last block.
        cache: A ManticoreCache, if caching; `past_key_values` in Transformers 5.23.
        hidden_states: S + 1 shared states [batch, time, d], one per block boundary, if asked for.
        states: Each component's own last state [batch, time, d_k] (None where it was not run).
    """

    states: tuple | None = None


@dataclass
class ManticoreCausalLMOutput(CausalLMOutputWithPast):
    """Output of `ManticoreForCausalLM`.

    Attributes:
        loss: mix_loss_weight * mixture_loss + component_loss_weight * sum(component_losses), with `labels`.
        logits: [batch, time, vocabulary] of the mixture; like any model's, up to a constant per token.
        cache: A ManticoreCache, if caching; `past_key_values` in Transformers 5.23.
        hidden_states: S + 1 shared states [batch, time, d], one per block boundary, if asked for.
        mixture_loss: Cross-entropy of the mixture, nats per token.
        component_losses: [K], cross-entropy of each component's own head, NaN where it was not run (if
            component_loss_weight > 0, or `report_parts` is set on the model).
        ensemble_loss: Cross-entropy of the plain ensemble of the heads (if `report_parts` is set).
        weights: [batch, time, K], the token gate's weights (mixture="token").
    """

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
            own = [model.embed(name, input_ids) for name in model.config.component_names]
            return torch.cat(place(own, input_ids.device), -1)
        return model.mix_embeddings(input_ids)


class Embeds:
    """Mixin of ManticoreModel: what the first blocks read, and vocabularies of another size."""

    def get_input_embeddings(self):
        return self.input_embedding

    def set_input_embeddings(self, value):
        raise ManticoreError("Each component has its own embeddings: use model.component(name).set_input_embeddings().")

    def get_output_embeddings(self):
        return None

    def set_output_embeddings(self, value):
        raise ManticoreError("Each component has its own head: use model.component(name).set_output_embeddings().")

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Resizes the vocabulary of every component; returns `get_input_embeddings()`."""
        if self.config.route is not None and len(self.config.component_names) > 1:
            raise ManticoreError("A hardened hybrid cannot be resized: resize the soft one, then harden it.")
        for name in self.config.component_names:
            component = self.component(name)
            component.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            self.config.vocab_size = component.config.vocab_size
        self._follow()
        return self.get_input_embeddings()

    def embed(self, name, input_ids):
        """A component's own embeddings of the tokens [batch, time, width]."""
        embedding = self._modules[name].get_input_embeddings()
        return embedding(place(input_ids, device_of(embedding)))

    def mix_embeddings(self, input_ids):
        """h_0 = sum_k alpha_1k * pad(E_k[x], d): [batch, time, d]."""
        active = [(w, name) for w, name in zip(self._alpha()[0], self.config.component_names) if is_active(w)]
        return weighted_sum(
            [w for w, _ in active],
            [resize(self._together(self.embed(name, input_ids)), self.config.hidden_size) for _, name in active],
        )

    def _split_embeds(self, inputs_embeds):
        names = self.config.route[:1] if self.config.route else self.config.component_names
        widths = [self._modules[name].get_input_embeddings().weight.shape[1] for name in names]
        if inputs_embeds.shape[-1] != sum(widths):
            raise ManticoreError(
                f"inputs_embeds has width {inputs_embeds.shape[-1]}; with embeddings='native' it must hold every "
                f"component's embeddings side by side ({dict(zip(names, widths))}, in all {sum(widths)}): use "
                "model.get_input_embeddings()(input_ids)."
            )
        return dict(zip(names, inputs_embeds.split(widths, -1)))
