"""What the causal hybrid's forward returns, to whoever calls it and to TRL's trainers.

TRL (>= 1.0) replaces the forward of the model it trains by one that multiplies the last state of `base_model` by one
output matrix in tiles. A hybrid's logits are a mixture of several heads instead: it keeps its own forward and, when it
is called with `fused_lm_head=True`, gives the same fields itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from .mixture_manticore import widen

TRL_LOSS = (
    "TRL's trainers compute their losses from the mixture's log-probabilities: this hybrid's mix_loss_weight and "
    "component_loss_weight have no effect there. Train with Transformers' Trainer to have them."
)


@dataclass
class ManticoreCausalLMOutput(CausalLMOutputWithPast):
    """Output of `ManticoreForCausalLM`.

    Attributes:
        loss: mix_loss_weight * mixture_loss + component_loss_weight * sum(component_losses), with `labels`.
        logits: [batch, time, vocabulary] of the mixture; like any model's, up to a constant per token.
        cache: A ManticoreCache, if caching.
        hidden_states, attentions: As in ManticoreModelOutput (base_manticore).
        mixture_loss: Cross-entropy of the mixture, nats per token.
        component_losses: [K], cross-entropy of each component's own head, NaN where it was not run (if
            component_loss_weight > 0, or `report_parts` is set on the model).
        ensemble_loss: Cross-entropy of the plain ensemble of the heads (if `report_parts` is set).
        weights: [batch, time, K], the mixture weights of each prediction (mixture="token" or "online").
        head_state: [batch, time, d] of which the matrix of `one_head` makes the logits; None where heads are mixed, or
            do more than that.
    """

    mixture_loss: torch.Tensor | None = None
    component_losses: torch.Tensor | None = None
    ensemble_loss: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    head_state: torch.Tensor | None = None

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """`head_state`, for those who multiply it by the output matrix themselves; AttributeError where it is None."""
        if self.head_state is not None:
            return self.head_state
        raise AttributeError(
            "This hybrid's logits are a mixture of several heads, or its head does more than multiply: no single state "
            "and output matrix give them. Use what reads logits (to distil, TRL's GKDTrainer instead of "
            "DistillationTrainer)."
        )


@dataclass
class FusedOutput(ModelOutput):
    """Per-token fields [batch, time - 1] ([batch, time] with `shift_labels`), zero where the label is -100.

    All are of the mixture, which is the policy of whoever asks; None if they were not asked for.

    Attributes:
        loss: The hybrid's own loss, that of its components included: a sum over the labelled tokens, divided by
            `num_items_in_batch` or their number.
        log_probs: Of the labels.
        entropy: In nats.
        log_sum_sq_probs: log sum_v p_v^2.
        mean_logits: Mean of the logits over the vocabulary.
        is_top1: Whether the label is the most likely token.
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


FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # computed only if they are asked for


def asked_by_trl(forward: Any) -> tuple[float, tuple[str, ...]] | None:
    """(temperature, FIELDS wanted) of the forward that TRL would put in a model's place; None if it is another one."""
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    if code is None or "fused_lm_head" not in code.co_varnames:
        return None
    given = dict(zip(code.co_freevars, forward.__func__.__closure__))
    return given["temperature"].cell_contents, given["outputs"].cell_contents


def fused_output(
    config: PreTrainedConfig,
    logits: torch.Tensor,
    own: list[torch.Tensor],
    asked: tuple[float, tuple[str, ...]],
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> FusedOutput:
    """The fields TRL reads, of logits [batch, time, vocabulary] of the mixture and of each component's own head.

    `asked`: (what all logits are divided by, FIELDS wanted). `labels` [batch, time] are shifted here, `shift_labels`
    were before; `num_items_in_batch` counts the labelled tokens of the whole batch, over micro-batches and processes.
    """
    temperature, wanted = asked
    if shift_labels is None:
        shift_labels, logits, own = labels[:, 1:], logits[:, :-1], [one[:, :-1] for one in own]
    mask, index = shift_labels != -100, shift_labels.clamp(min=0)[..., None]

    def scaled(values):
        return widen(values) if temperature == 1.0 else widen(values) / temperature

    def pick(values):
        return values.gather(-1, index)[..., 0].masked_fill(~mask, 0.0)

    logits = scaled(logits)
    logprobs = logits.log_softmax(-1)
    chosen = pick(logprobs)
    objective = config.mix_loss_weight * chosen
    if config.component_loss_weight > 0:
        objective = objective + config.component_loss_weight * sum(pick(scaled(one).log_softmax(-1)) for one in own)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    fixed = logprobs.detach()
    makers = {
        # Recomputed in backward: whoever trains on it (GRPO) need not keep probabilities beside their logarithms.
        "entropy": lambda: checkpoint(_entropy, logprobs, use_reentrant=False, preserve_rng_state=False),
        "log_sum_sq_probs": lambda: (2 * fixed).logsumexp(-1),
        "mean_logits": lambda: logits.detach().mean(-1),
        "is_top1": lambda: fixed.argmax(-1) == shift_labels,
    }
    return FusedOutput(
        loss=-objective.sum() / count,
        log_probs=chosen,
        label_mask=mask,
        **{name: make().masked_fill(~mask, 0) for name, make in makers.items() if name in wanted},
    )


def _entropy(logprobs):
    finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # 0 times minus infinity is no number
    return -(finite.exp() * finite).sum(-1)
