"""The hybrid as an ordinary Transformers causal LM (Roberts et al., arXiv 2406.00894, section 3).

`ManticoreForCausalLM` adds the heads' mixture, the losses, and generation to `ManticoreModel` (base_manticore); one
pass through the blocks is in running_manticore, the cut components in segments_manticore, the classifiers are in
heads_manticore. Weights come by reference: see weights_manticore.
"""

import sys
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .base_manticore import ManticoreModel, takes_old_cache
from .cache_manticore import ManticoreCache
from .carried_manticore import optional
from .configuration_manticore import ManticoreConfig
from .devices_manticore import place
from .mixing_manticore import HybridMixer, resize
from .mixture_manticore import SPACES, confidence, sum_to_one, weighted_sum, widen
from .outputs_manticore import FIELDS, TRL_LOSS, FusedOutput, ManticoreCausalLMOutput, asked_by_trl, fused_output
from .rows_manticore import check_mask
from .running_manticore import Pass, active_in, read_inputs, run

logger = logging.get_logger(__name__)


class ManticoreForCausalLM(ManticoreModel, GenerationMixin):
    """A hybrid with the mixture of its components' heads: an ordinary causal LM."""

    # Set by trainers that log them: compute the losses of the parts and of the plain ensemble in every call.
    report_parts = False
    # The temperature and the fields that TRL last asked for, with the forward that it would give the model.
    fused_settings = (1.0, FIELDS)

    @can_return_tuple
    @takes_old_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: ManticoreCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list | None = None,
        **kwargs: Any,
    ) -> ManticoreCausalLMOutput | FusedOutput | tuple:
        """Next-token logits of the mixture, and the loss.

        Args:
            labels: [batch, time]; -100 is ignored; shifted inside, as in every causal LM of Transformers.
            logits_to_keep: Compute logits of the last n positions only (0: all), or of the positions in a 1-D tensor.
            **kwargs: `num_items_in_batch` reaches the loss, as the Trainer expects. All others as in ManticoreModel.
        """
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        fused = kwargs.pop("fused_lm_head", False)
        use_cache = False if fused else use_cache
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, keep)
        inputs = read_inputs(self, *given, {**kwargs, "output_attentions": output_attentions})
        if inputs.documents is not None:
            labels = None if labels is None else inputs.documents.labels(labels)
            if kwargs.get("shift_labels") is not None:
                kwargs["shift_labels"] = inputs.documents.labels(kwargs["shift_labels"], True)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # -0 is 0: all
        lag = optional("gate_lag").Lag(self.config.gate_lag, inputs, kept) if self.config.holds_weights else None
        kept = kept if lag is None else lag.places
        inputs.last = isinstance(kept, slice) and kept.start == -1 and not (keep or self.config.reads_past_losses)
        found = run(self, inputs, shared=False)
        weights, states, own = self.apply_heads(found, kept)
        past = optional("past_losses").read_losses if self.config.reads_past_losses else None
        past = past and partial(past, self, inputs, kept, lambda places: self.apply_heads(found, places)[2])
        logits, token_weights = self.mix(weights, list(states.values()), list(own.values()), past, lag)
        own = own if lag is None else {name: lag.cut(one) for name, one in own.items()}
        if fused:
            labelling = {"labels": labels, **{k: kwargs.get(k) for k in ("shift_labels", "num_items_in_batch")}}
            return fused_output(self.config, logits, list(own.values()), self.fused_settings, **labelling)
        loss, parts = (None, {}) if labels is None else self._losses(logits, own, labels, kwargs)
        kept = found.cache, found.hidden_states, found.attentions
        state = None if self.one_head() is None else (lag.cut if lag else lambda x: x)(states.popitem()[1])
        return ManticoreCausalLMOutput(loss, logits, *kept, weights=token_weights, head_state=state, **parts)

    def get_output_embeddings(self) -> nn.Module | None:
        """None, as for all hybrids; `one_head` for TRL alone: accelerate (FSDP2) would take it out of its component."""
        return self.one_head() if sys._getframe(1).f_globals.get("__name__", "").startswith("trl.") else None

    def one_head(self) -> nn.Module | None:
        """The matrix that alone gives the logits, of `head_state`; None where there is no such."""
        config, row = self.config, self.config.mixture_weights
        names = config.component_names
        if len(names) > 1:
            row = row and row[-1 if config.embeddings == "native" or config.head_mixture == "last" else 0]
            names = [name for name, weight in zip(names, row or ()) if weight > 0]
        if len(names) != 1 or getattr(config, names[0]).vocab_size != config.vocab_size:
            return None
        return self.component(names[0]).get_output_embeddings() if self.segments.head(names[0]).is_linear else None

    def _prepare_model_inputs(self, inputs=None, bos_token_id=None, model_kwargs=None):
        mask = (model_kwargs or {}).get("attention_mask")
        if mask is not None and mask.ndim == 2:  # `generate` counts positions from it, and goes on with ones
            model_kwargs["attention_mask"] = check_mask(mask, mask.shape[1])
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # whose arguments `generate` looks at
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        out = super().prepare_inputs_for_generation(*args, **kwargs)
        # PEFT (0.21) puts its own in this place while it generates, and looks for the cache under its old name to see
        # whether its prompt has been read already.
        peft = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        if "cache" in out and getattr(getattr(peft, "active_peft_config", None), "is_prompt_learning", False):
            out["past_key_values"] = out.pop("cache")
        return out

    def apply_heads(self, found: Pass, kept: slice | torch.Tensor) -> tuple[list, dict, dict]:
        """(K' mixture weights, {component: what its head reads}, {component: its logits}) of the K' that are mixed."""
        config = self.config
        row = found.weights[-1 if config.embeddings == "native" or config.head_mixture == "last" else 0]
        active = active_in(self, row)
        if config.embeddings == "native":
            states = {name: found.states[name][:, kept] for name in active}
        else:
            widths = {name: self.component(name).get_output_embeddings().weight.shape[1] for name in active}
            states = {name: resize(found.shared[:, kept], width) for name, width in widths.items()}
        if found.own_logits is not None:
            return list(active.values()), states, found.own_logits(kept)
        return list(active.values()), states, {name: self.segments.logits(name, one) for name, one in states.items()}

    def mix(self, weights: list, states: list, own: list, past: Any = None, lag: Any = None) -> tuple:
        """The output mixture.

        Args:
            weights: The last block's mixture weights of the K' components that were run.
            states: What their heads read, [batch, time, width] each.
            own: Their logits [batch, time, vocabulary].
            past: Gives, of those logits and what normalises them, the losses so far, where the mixture goes by them.
            lag: A `Lag` where weights are kept for several tokens: what comes out is of the positions it was made for.

        Returns:
            (logits [batch, time, vocabulary], weights [batch, time, K'] that depend on the token, or None).
        """
        if len(own) == 1:
            return own[0] if lag is None else lag.cut(own[0]), None
        token_weights = norms = None
        if self.config.mixture != "static" and not isinstance(weights[0], float):
            conf, norms = zip(*[confidence(one) for one in own])
            losses = [] if past is None else [past(own, norms)]
            if self.config.mixture == "online":
                token_weights = optional("past_losses").mix_online(self.config, weights, *losses)
            else:
                token_weights = sum_to_one(self.hybrid_mixer(HybridMixer.gate_tokens, states, list(conf), *losses))
                # The gate stands for alpha, which gets a gradient of zeros: DDP waits for all that may be trained.
                token_weights = token_weights + 0.0 * sum(weights)
            if lag is not None:
                token_weights, norms = lag.hold(token_weights), [lag.cut(one) for one in norms]
            weights = list(token_weights.split(1, -1))
        own = own if lag is None else [lag.cut(one) for one in own]
        return SPACES[self.config.mixture_space](weights, [widen(one) for one in own], norms), token_weights

    def _losses(self, logits, own, labels, kwargs):
        """(loss, its parts by output name). The parts are means over this call's own tokens, whatever the loss is."""
        labels = place(labels, logits.device)

        def cross_entropy(values):
            return self.loss_function(logits=values, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        def part(value):
            items = kwargs.get("num_items_in_batch")
            return value.detach() if items is None else value.detach() * items / (labels[:, 1:] != -100).sum()

        mixture = cross_entropy(logits)
        loss = self.config.mix_loss_weight * mixture if self.config.mix_loss_weight != 1.0 else mixture
        parts, trained = {"mixture_loss": part(mixture)}, self.config.component_loss_weight > 0
        if trained or self.report_parts:
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                losses = {name: cross_entropy(values) for name, values in own.items()}
            if trained:
                loss = loss + self.config.component_loss_weight * sum(losses.values())
            missing = torch.full_like(mixture, float("nan")).detach()
            parts["component_losses"] = torch.stack(
                [part(losses[name]) if name in losses else missing for name in self.config.component_names]
            )
        if self.report_parts:
            with torch.no_grad():
                mean = weighted_sum([1 / len(own)] * len(own), [widen(values) for values in own.values()])
                parts["ensemble_loss"] = part(cross_entropy(mean))
        return loss, parts

    def _get_name(self):
        return "ManticoreForCausalLM"  # also as FSDP2 and others rename the class: the Trainer goes by it, see below

    def __setattr__(self, name, value):
        # TRL (>= 1.0) would replace the forward by one that assumes a single output matrix: see `FusedOutput`.
        asked = asked_by_trl(value) if name == "forward" else None
        if asked is None:
            return super().__setattr__(name, value)
        self.fused_settings = asked
        if (self.config.mix_loss_weight, self.config.component_loss_weight) != (1.0, 0.0):
            logger.warning_once(TRL_LOSS)


# By this table the Trainer knows whose labels to shift before it smooths them, and pipelines what generates text.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ManticoreConfig.model_type] = "ManticoreForCausalLM"

ManticoreForCausalLM.register_for_auto_class("AutoModelForCausalLM")
