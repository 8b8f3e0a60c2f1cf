"""The hybrid as an ordinary Transformers model (Roberts et al., arXiv 2406.00894, section 3).

`ManticoreModel` holds the components (whole, under their names) and the mixer; `ManticoreForCausalLM` adds the heads'
mixture, the losses, and generation. Weights come by reference: see weights_manticore.
"""

import torch
from transformers import GenerationMixin, PreTrainedModel

from .anatomy_manticore import check_cut
from .attention_manticore import PerComponentAttention, settle_attention
from .components_manticore import build, prepare
from .configuration_manticore import ManticoreConfig, ManticoreError
from .decoding_manticore import CachedDecoding
from .devices_manticore import Placed, onloaded, place
from .dtypes_manticore import MixedDtypes
from .heads_manticore import ScoresSequences, ScoresTokens
from .mixers_manticore import follow_kernels
from .mixing_manticore import HybridMixer, resize, whole
from .mixture_manticore import SPACES, is_active, sum_to_one, weighted_sum, widen
from .outputs_manticore import Embeds, HybridEmbedding, ManticoreCausalLMOutput, ManticoreModelOutput
from .positions_manticore import check_positions
from .quantization_manticore import Quantizable
from .recurrent_manticore import keep_state_in_cache
from .route_manticore import Dropped, RunsRoute
from .segments_manticore import Cuts
from .sft_manticore import KeepsForward, fused_output
from .sharding_manticore import KeepsBuffers
from .sizes_manticore import construct, trying
from .versions_manticore import CACHE, CACHE_NAMES, takes_cache
from .weights_manticore import ReferencedWeights, keep_loaded_embeddings


class ManticorePreTrainedModel(ReferencedWeights, KeepsBuffers, MixedDtypes, Quantizable, PreTrainedModel):
    """Loading, saving and initialisation common to all hybrid classes."""

    config_class = ManticoreConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _is_stateful = True
    _no_split_modules = ["HybridMixer"]
    _skip_keys_device_placement = list(CACHE_NAMES)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HybridMixer):
            module.reset()

    def initialize_weights(self):
        """Components first, each as its own class does it.

        As part of custom code, models without parameters of their own would not fill their layers' buffers (FalconH1).
        """
        for name in self.config.component_names:
            keep_loaded_embeddings(self._modules[name])
            self._modules[name].initialize_weights()
        super().initialize_weights()


class ManticoreModel(Embeds, CachedDecoding, RunsRoute, PerComponentAttention, Placed, ManticorePreTrainedModel):
    """K components in S blocks, joined; without output head (the components keep theirs, unused here).

    Args:
        config: A ManticoreConfig with at least one component.
        components: Instantiated components by name; None builds them with initial weights.
    """

    def __init__(self, config, components=None):
        with trying("The hybrid"):
            super().__init__(config)
        if not config.component_names:
            raise ManticoreError("A hybrid needs at least one component; ManticoreConfig(components=[...]) is empty.")
        settle_attention(config)
        self.__dict__["_cuts"] = Cuts()
        for name in config.component_names:
            sub, there = getattr(config, name), list(self.children())
            component = build(name, sub, there) if components is None else components[name]
            setattr(config, name, component.config)
            prepare(component)
            keep_state_in_cache(component)
            if components is not None:
                for module in component.modules():
                    module._is_hf_initialized = True
            self.add_module(name, component)
            with trying(f"Component {name!r} ({sub.model_type})"):
                try:
                    check_cut(component, self._cuts.anatomy(component), config.num_blocks)
                except ManticoreError as err:
                    raise ManticoreError(f"Component {name!r}: {err}") from err
        if config.route is not None:
            self._harden()
        self.hybrid_mixer = construct("The hybrid's mixer", self.new_mixer, list(self.children()))
        self.__dict__["input_embedding"] = HybridEmbedding(self)
        self.post_init()
        self._follow()

    def set_use_kernels(self, use_kernels, *args, **kwargs):
        super().set_use_kernels(use_kernels, *args, **kwargs)
        if use_kernels:
            follow_kernels(self)

    # ---- the parts -------------------------------------------------------------------------------------------------

    def new_mixer(self):
        """A mixer for the present configuration and components, not yet in use."""
        names = self.config.component_names
        return HybridMixer(
            self.config,
            {name: _width(self.component(name).get_input_embeddings()) for name in names},
            {name: getattr(self.config, name).hidden_size for name in names},
            {name: _width(self.component(name).get_output_embeddings()) for name in names},
        )

    def component(self, name):
        """The component as a model of its own class; `model.component(name).save_pretrained(dir)` gives it back.

        Raises:
            ManticoreError: There is no component of that name.
        """
        if name not in self.config.component_names:
            raise ManticoreError(f"No component is named {name!r}; the components are {self.config.component_names}.")
        return self._modules[name]

    def mixture_weights(self):
        """alpha [S, K]; with mixture="token" the last row is softmax(b), the part that does not depend on the token."""
        mixer, gate = self.hybrid_mixer, self.hybrid_mixer.token_gate
        with onloaded(mixer, *([] if gate is None else [gate.linear])):
            alpha = widen(whole(mixer.alpha_logits.detach())).softmax(-1)
            if gate is not None:
                alpha[-1] = widen(whole(gate.linear.bias.detach())).softmax(-1)
        for block, row in enumerate(self.config.mixture_weights or ()):
            if row is not None:
                alpha[block] = torch.tensor(row)
        return alpha

    def set_mixture_weights(self, weights):
        """Fixes the mixture weights exactly: a component with weight 0 in a block is not run there.

        Args:
            weights: [S, K], rows summing to 1; or a component's name (one-hot on it everywhere); or None (learned
                again, from the values the parameters have). A list may hold None for a block that is to be learned.

        Raises:
            ManticoreError: A wrong shape, a negative weight, or rows that do not sum to 1.
        """
        if isinstance(weights, str):
            self.component(weights)
            row = [float(name == weights) for name in self.config.component_names]
            weights = [row] * self.config.num_blocks
        elif isinstance(weights, torch.Tensor):
            weights = weights.double().tolist()
        weights = self.config._check_mixture_weights(weights)
        if self.config.route is not None and weights != self.config.mixture_weights:
            raise ManticoreError(
                f"This hybrid was hardened to the route {self.config.route}: it has no other mixture weights."
            )
        self.config.mixture_weights = weights

    def _alpha(self):
        """S rows of K weights: floats in blocks where they are fixed, else tensors."""
        fixed = self.config.mixture_weights
        if fixed is not None and None not in fixed:
            return fixed
        learned = [list(row.unbind()) for row in self.hybrid_mixer("weights")]
        return [mine if mine is not None else row for mine, row in zip(fixed or [None] * len(learned), learned)]

    def _segment(self, name, block):
        return self._cuts.segment(self._modules[name], *self._range(name, block))

    def _follow(self):
        """Makes the segments and heads, or lets them follow changes in the components."""
        if torch.compiler.is_compiling():
            return
        for name in self.config.component_names:
            for block in self._blocks_of(name):
                self._segment(name, block)
            self._cuts.head(self._modules[name])
        self._cuts.refresh()

    def train(self, mode=True):
        super().train(mode)
        if "_cuts" in self.__dict__:
            self._follow()
        return self

    # ---- forward ---------------------------------------------------------------------------------------------------

    @takes_cache
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """Runs the blocks.

        Args:
            input_ids: [batch, time] token ids; or `inputs_embeds`, see `get_input_embeddings`.
            attention_mask: [batch, past + time], 1 for real tokens (left padding is right for every component).
            position_ids: [batch, time]; default: counted from the mask.
            cache: A ManticoreCache (`make_cache`, or one returned before); `past_key_values` is the same.
            use_cache: Whether to return a cache.
            output_hidden_states: Whether to return the shared state at each block boundary.
            return_dict: False for a tuple.

        Raises:
            ManticoreError: Input that cannot be used, or beyond a component's table of positions.
        """
        run = self._run(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            self._flag(output_hidden_states, "output_hidden_states"),
            shared=True,
        )
        out = ManticoreModelOutput(
            last_hidden_state=run["shared"],
            **{CACHE: run["cache"]},
            hidden_states=run["hidden_states"],
            states=tuple(run["states"].get(name) for name in self.config.component_names),
        )
        return out if self._flag(return_dict, "return_dict") else out.to_tuple()

    def _flag(self, value, name):
        return bool(getattr(self.config, name)) if value is None else value

    def _run(self, ids, mask, positions, cache, embeds, use_cache, keep, shared):
        self._follow()
        if (ids is None) == (embeds is None):
            raise ManticoreError("Give exactly one of input_ids and inputs_embeds.")
        given = embeds if ids is None else ids
        batch, time = given.shape[:2]
        if mask is not None and mask.ndim != 2:
            raise ManticoreError(
                f"attention_mask has shape {tuple(mask.shape)}; a hybrid takes [batch, past + time], since its "
                "recurrent components cannot use a 4-D mask."
            )
        cache = self._cache_for(cache, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        if mask is not None and mask.shape != (batch, past + time):
            raise ManticoreError(
                f"attention_mask has shape {tuple(mask.shape)}; {(batch, past + time)} is needed for {past} cached and "
                f"{time} new tokens."
            )
        explicit = positions is not None
        if not explicit:
            if mask is None:
                positions = torch.arange(past, past + time, device=given.device)[None]
            else:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -time:]

        names, blocks = self.config.component_names, self.config.num_blocks
        native, width = self.config.embeddings == "native", self.config.hidden_size
        alpha = self._alpha()
        length = past + time if cache is None or cache.max_cache_len is None else cache.max_cache_len
        check_positions([(n, self._segment(n, s)) for n, s in self._running(alpha)], positions, length, explicit)
        own, state, boundaries = None, None, ()
        if native:
            readers = self.config.route[:1] if self.config.route else names
            own = self._split_embeds(embeds) if ids is None else {name: self.embed(name, ids) for name in readers}
            if keep:
                boundaries += (self._shared(alpha[0], own),)
        else:
            state = embeds if ids is None else self.mix_embeddings(ids)
            if state.shape[-1] != width:
                raise ManticoreError(f"inputs_embeds has width {state.shape[-1]}; this hybrid's is {width}.")
            boundaries += (state,) if keep else ()
        if self.config.route is not None:
            return self._run_route(own, state, mask, positions, cache, keep, boundaries)
        for block in range(blocks):
            active = {name: w for name, w in zip(names, alpha[block]) if is_active(w)}
            states, last = {}, block == blocks - 1
            for name, w in active.items():
                entering = own[name] if native and block == 0 else self.hybrid_mixer("enter", block, name, state, w)
                view = None if cache is None else cache.view(name, block)
                states[name] = self._segment(name, block)(entering, mask, positions, view)
            if native and last:
                state = self._shared(alpha[block], states) if shared or keep else None
            else:
                weights = list(active.values())
                state = weighted_sum(
                    weights, [self.hybrid_mixer("leave", block, n, states[n], w) for n, w in active.items()]
                )
            boundaries += (state,) if keep else ()
        return self._ran(state, states, alpha, cache, boundaries if keep else None, mask, time)

    def _running(self, alpha):
        """(component, block) of the segments that are run."""
        if self.config.route is not None:
            return list(self._plan())
        names = self.config.component_names
        return [(name, s) for s, row in enumerate(alpha) for name, w in zip(names, row) if is_active(w)]

    def _ran(self, shared, states, alpha, cache, boundaries, mask, time):
        if cache is not None:
            cache.advance(time)
            if time == 1 and mask is not None:
                cache.forget_padding(mask.any(-1))
        return {"shared": shared, "states": states, "alpha": alpha, "cache": cache, "hidden_states": boundaries}

    def _shared(self, weights, states):
        """Components' native states as one state of the shared width, for those who ask for hidden states."""
        active = [(w, name) for w, name in zip(weights, self.config.component_names) if is_active(w)]
        padded = [resize(self._together(states[name]), self.config.hidden_size) for _, name in active]
        return weighted_sum([w for w, _ in active], padded)


def _width(module):
    """Width of an embedding or head; 0 where a hardened hybrid dropped it."""
    return 0 if isinstance(module, Dropped) else module.weight.shape[1]


class ManticoreForCausalLM(KeepsForward, ManticoreModel, GenerationMixin):
    """A hybrid with the mixture of its components' heads: an ordinary causal LM."""

    # Set by trainers that log them: compute the losses of the parts and of the plain ensemble in every call.
    report_parts = False

    @takes_cache
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
        run = self._run(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            self._flag(output_hidden_states, "output_hidden_states"),
            shared=False,
        )
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        else:
            kept = logits_to_keep
        names, alpha, states = self.config.component_names, run["alpha"], run["states"]
        if self.config.embeddings == "native":
            row, read = alpha[-1], {name: state[:, kept] for name, state in states.items()}
        else:
            row = alpha[-1 if self.config.head_mixture == "last" else 0]
            shared = run["shared"][:, kept]
            width = {n: _width(self._modules[n].get_output_embeddings()) for n in names}
            read = {name: resize(shared, width[name]) for name, w in zip(names, row) if is_active(w)}
        weights = [w for name, w in zip(names, row) if name in read]
        own = {name: self._own_logits(name, state) for name, state in read.items()}
        logits, token_weights = self._mix(weights, read, own)
        if kwargs.pop("fused_lm_head", False):
            labelling = {"labels": labels, **{k: kwargs.get(k) for k in ("shift_labels", "num_items_in_batch")}}
            return fused_output(self.config, logits, list(own.values()), **labelling)

        loss, parts = None, {}
        if labels is not None:
            loss, parts = self._losses(logits, own, labels, kwargs)
        out = ManticoreCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: run["cache"]},
            hidden_states=run["hidden_states"],
            weights=token_weights,
            **parts,
        )
        return out if self._flag(return_dict, "return_dict") else out.to_tuple()

    def _own_logits(self, name, states):
        """A component's own logits, without those of rows that only pad its vocabulary."""
        logits = self._together(self._cuts.head(self._modules[name])(states))
        size = self.config.vocab_size
        return logits if logits.shape[-1] == size else logits[..., :size]

    def _mix(self, weights, read, own):
        """The output mixture. Returns logits [batch, time, vocabulary] and the token gate's weights or None."""
        logits = list(own.values())
        if len(logits) == 1:
            return logits[0], None
        token_weights = None
        if self.config.mixture == "token" and not isinstance(weights[0], float):
            token_weights = sum_to_one(self.hybrid_mixer("gate_tokens", list(read.values()), logits))
            weights = list(token_weights.split(1, -1))
        return SPACES[self.config.mixture_space](weights, [widen(one) for one in logits]), token_weights

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


class ManticoreForSequenceClassification(ScoresSequences, ManticoreModel):
    """A hybrid that scores whole sequences, at their last token that is no padding.

    `model.component(name)` is the component without language-model head, unless that is tied to its embeddings.
    """


class ManticoreForTokenClassification(ScoresTokens, ManticoreModel):
    """A hybrid that scores every token, from what stands before it and itself; its components as for sequences."""


ManticoreConfig.register_for_auto_class()
ManticoreModel.register_for_auto_class("AutoModel")
ManticoreForCausalLM.register_for_auto_class("AutoModelForCausalLM")
ManticoreForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
ManticoreForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
