"""The hybrid as an ordinary Transformers causal LM (Roberts et al., arXiv 2406.00894, section 3).

`ManticoreForCausalLM` adds the heads' mixture, the losses, and generation to `ManticoreModel` (base_manticore); one
pass through the blocks is in running_manticore, the cut components in segments_manticore, the classifiers are in
heads_manticore. Weights come by reference: see weights_manticore.
"""

import torch
from transformers import GenerationMixin

from .base_manticore import ManticoreModel, takes_old_cache
from .configuration_manticore import ManticoreConfig
from .devices_manticore import place
from .heads_manticore import ManticoreForSequenceClassification, ManticoreForTokenClassification
from .mixing_manticore import HybridMixer, resize
from .mixture_manticore import SPACES, sum_to_one, sureness, weighted_sum, widen
from .outputs_manticore import ManticoreCausalLMOutput, fused_output
from .running_manticore import active_in, read_inputs, run
from .segments_manticore import width_of


class ManticoreForCausalLM(ManticoreModel, GenerationMixin):
    """A hybrid with the mixture of its components' heads: an ordinary causal LM."""

    # Set by trainers that log them: compute the losses of the parts and of the plain ensemble in every call.
    report_parts = False

    @takes_old_cache
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """Next-token logits of the mixture, and the loss.

        Args:
            labels: [batch, time]; -100 is ignored; shifted inside, as in every causal LM of Transformers.
            logits_to_keep: Compute logits of the last n positions only (0: all), or of the positions in a 1-D tensor.
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, output_hidden_states,
                return_dict: As in ManticoreModel.
            **kwargs: `num_items_in_batch` reaches the loss, as the Trainer expects.
        """
        keep = self._flag("output_hidden_states", output_hidden_states)
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, keep)
        inputs = read_inputs(self, *given, kwargs)
        if inputs.documents is not None:
            labels = None if labels is None else inputs.documents.labels(labels)
            if kwargs.get("shift_labels") is not None:
                kwargs["shift_labels"] = inputs.documents.labels(kwargs["shift_labels"], True)
        found = run(self, inputs, shared=False)
        weights, states = self._what_heads_read(found, logits_to_keep)
        own = {name: self.segments.logits(name, state) for name, state in states.items()}
        logits, token_weights = self.mix(weights, list(states.values()), list(own.values()))
        if kwargs.pop("fused_lm_head", False):
            labelling = {"labels": labels, **{k: kwargs.get(k) for k in ("shift_labels", "num_items_in_batch")}}
            return fused_output(self.config, logits, list(own.values()), **labelling)

        loss, parts = None, {}
        if labels is not None:
            loss, parts = self._losses(logits, own, labels, kwargs)
        out = ManticoreCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=found.cache,
            hidden_states=found.hidden_states,
            weights=token_weights,
            **parts,
        )
        return out if self._flag("return_dict", return_dict) else out.to_tuple()

    def _what_heads_read(self, found, logits_to_keep=0):
        """(K' mixture weights, {component: [batch, kept, width]}) of the K' heads that are mixed, from a Pass."""
        config = self.config
        if not isinstance(logits_to_keep, int):
            kept = logits_to_keep
        else:
            kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        row = found.weights[-1 if config.embeddings == "native" or config.head_mixture == "last" else 0]
        active = active_in(self, row)
        if config.embeddings == "native":
            return list(active.values()), {name: found.states[name][:, kept] for name in active}
        shared, heads = found.shared[:, kept], {name: self.component(name).get_output_embeddings() for name in active}
        return list(active.values()), {name: resize(shared, width_of(head)) for name, head in heads.items()}

    def mix(self, weights, states, own):
        """The output mixture.

        Args:
            weights: The last block's mixture weights of the K' components that were run.
            states: What their heads read, [batch, time, width] each.
            own: Their logits [batch, time, vocabulary].

        Returns:
            (logits [batch, time, vocabulary], the token gate's weights [batch, time, K'] or None).
        """
        if len(own) == 1:
            return own[0], None
        token_weights = norms = None
        if self.config.mixture == "token" and not isinstance(weights[0], float):
            sure, norms = zip(*[sureness(one) for one in own])
            token_weights = sum_to_one(self.hybrid_mixer(HybridMixer.gate_tokens, states, list(sure)))
            weights = list(token_weights.split(1, -1))
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

    def __setattr__(self, name, value):
        # TRL (>= 1.0) would replace the forward by one that assumes a single output matrix: see `FusedOutput`.
        code = getattr(getattr(value, "__func__", None), "__code__", None)
        if name != "forward" or code is None or "fused_lm_head" not in code.co_varnames:
            super().__setattr__(name, value)


ManticoreConfig.register_for_auto_class()
ManticoreModel.register_for_auto_class("AutoModel")
ManticoreForCausalLM.register_for_auto_class("AutoModelForCausalLM")
ManticoreForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
ManticoreForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
