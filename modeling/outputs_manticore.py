"""What the hybrid's forward returns, to whoever calls it and to TRL's trainers.

TRL (>= 1.0) replaces the forward of the model it trains by one that runs `base_model` and multiplies its last state by
one output matrix in tiles. A hybrid has no such matrix: its logits are a mixture of several heads. So a hybrid keeps
its own forward and, when it is called with `fused_lm_head=True`, gives the same fields itself.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput

from .mixture_manticore import widen


@dataclass
class ManticoreModelOutput(BaseModelOutputWithPast):
    """Output of `ManticoreModel`.

    Attributes:
        last_hidden_state: [batch, time, d], the shared state after the last block.
        cache: A ManticoreCache, if caching.
        hidden_states: S + 1 shared states [batch, time, d], one per block boundary, if asked for.
        attentions: Attention weights [batch, heads, time, past + time], if asked for, of every layer that attends, as
            they are run: block by block, in each component by component, in each layer by layer.
        states: {component: [batch, time, d_k]}, the last states of those that were run in the last block.
    """

    states: ModelOutput | None = None


@dataclass
class ManticoreCausalLMOutput(CausalLMOutputWithPast):
    """Output of `ManticoreForCausalLM`.

    Attributes:
        loss: mix_loss_weight * mixture_loss + component_loss_weight * sum(component_losses), with `labels`.
        logits: [batch, time, vocabulary] of the mixture; like any model's, up to a constant per token.
        cache: A ManticoreCache, if caching.
        hidden_states, attentions: As of ManticoreModel.
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


@dataclass
class FusedOutput(ModelOutput):
    """Per-token fields [batch, time - 1] ([batch, time] with `shift_labels`), zero where the label is -100.

    Attributes:
        loss: Sum of -log_probs over the labelled tokens, divided by `num_items_in_batch` or their number.
        log_probs: The objective per token: with component losses, mix_loss_weight * log p + component_loss_weight *
            sum_k log p_k, so that a trainer that only knows log-probabilities trains the hybrid's own loss.
        entropy: Of the mixture, nats.
        is_top1: Whether the label is the mixture's most likely token.
        label_mask: Whether the token is labelled.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def fused_output(config, logits, own, labels=None, shift_labels=None, num_items_in_batch=None):
    """The fields TRL reads.

    Args:
        config: The hybrid's configuration (loss weights).
        logits: [batch, time, vocabulary] of the mixture.
        own: Logits of each component's own head.
        labels: [batch, time], shifted here; or `shift_labels` [batch, time], shifted already.
        num_items_in_batch: Labelled tokens of the whole batch, over all micro-batches and processes.
    """
    if shift_labels is None:
        labels = labels[:, 1:]
        logits, own = logits[:, :-1], [one[:, :-1] for one in own]
    else:
        labels = shift_labels
    mask = labels != -100
    index = labels.clamp(min=0)[..., None]

    def pick(values):
        values = widen(values).log_softmax(-1)
        return values, values.gather(-1, index)[..., 0]

    logprobs, objective = pick(logits)
    if config.mix_loss_weight != 1.0:
        objective = config.mix_loss_weight * objective
    if config.component_loss_weight > 0:
        objective = objective + config.component_loss_weight * sum(pick(one)[1] for one in own)
    objective = objective.masked_fill(~mask, 0.0)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedOutput(
        loss=-objective.sum() / count,
        log_probs=objective,
        entropy=-(logprobs.exp() * logprobs).sum(-1).detach().masked_fill(~mask, 0.0),
        is_top1=(logprobs.argmax(-1) == labels) & mask,
        label_mask=mask,
    )
