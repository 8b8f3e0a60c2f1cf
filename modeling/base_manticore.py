"""`ManticoreModel`: the components (whole, under their names) and the mixer; and what all hybrid classes share."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg

from .anatomy_manticore import check_cut
from .bounds_manticore import build_component, construct, trying
from .cache_manticore import ManticoreCache, cache_for_generation
from .components_manticore import ENGINE_REFUSED, NO_PAGES, choose_attention, prepare, settle_attention
from .configuration_manticore import ManticoreConfig, ManticoreError
from .devices_manticore import device_of, onloaded, place, whole_weights
from .dtypes_manticore import MixedDtypes, Quantizable, refuse_adapters
from .mixers_manticore import follow_kernels
from .mixing_manticore import HybridMixer, resize, whole
from .mixture_manticore import weighted_sum, widen
from .outputs_manticore import ManticoreModelOutput
from .recurrent_manticore import keep_state_in_cache
from .running_manticore import active_in, mixture_rows, read_inputs, run
from .segments_manticore import Segments, width_of
from .weights_manticore import ReferencedWeights, keep_loaded_embeddings

takes_old_cache = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
"""Lets a forward take its `cache` as `past_key_values`, as the forwards of Transformers' own models do until then."""


class ManticorePreTrainedModel(ReferencedWeights, MixedDtypes, Quantizable, PreTrainedModel):
    """Loading, saving and initialisation common to all hybrid classes."""

    config_class = ManticoreConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = False
    _is_stateful = True
    _no_split_modules = ["HybridMixer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # Whether the vocabulary has another size than where the hybrid was loaded from.
    is_resized = False

    @classmethod
    @whole_weights()
    def from_pretrained(cls, *args, **kwargs):
        """As in Transformers, with references to components resolved and checked."""
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HybridMixer):
            module.reset()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "peft_config":  # PEFT has wrapped what a configuration, whoever made it, says
            refuse_adapters(self)

    def initialize_weights(self):
        """Components first, each as its own class does it.

        As part of custom code, models without parameters of their own would not fill their layers' buffers (FalconH1).
        """
        for name in self.config.component_names:
            keep_loaded_embeddings(self._modules[name])
            self._modules[name].initialize_weights()
        super().initialize_weights()


class HybridEmbedding(nn.Module):
    """What `get_input_embeddings` gives: token ids -> `inputs_embeds`.

    [batch, time] -> [batch, time, sum of embedding widths] for embeddings="native" (each component's own, side by
    side; of a hardened hybrid the first one's alone), else [batch, time, d]. Holds no parameters: they are the
    components'. The model's forward calls it only where a caller watches it: components that are run whole read the
    tokens themselves.
    """

    def __init__(self, model):
        super().__init__()
        self._owner = (model,)  # in a tuple: not a child, or the model would contain itself

    @property
    def readers(self):
        """Names of the components that read the tokens: all of them, or the first on a hardened hybrid's path."""
        config = self._owner[0].config
        return config.route[:1] if config.route else config.component_names

    @property
    def weight(self):
        """Embedding matrix [vocabulary, width] of the tokenizer's component, or else of the first that reads."""
        model = self._owner[0]
        name = model.config.tokenizer_component
        return model.component(name if name in self.readers else self.readers[0]).get_input_embeddings().weight

    word_embeddings = property(lambda self: self)  # PEFT's prompts look for it before they guess

    @property
    def is_watched(self):
        """Whether a caller has hooked into it or replaced its forward (NEFTune, gradients of frozen embeddings)."""
        return bool(self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self))

    @property
    def num_embeddings(self):
        """Size of the vocabulary."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self):
        """Width of what it gives."""
        model = self._owner[0]
        if model.config.embeddings != "native":
            return model.config.hidden_size
        return sum(width_of(model.component(name).get_input_embeddings()) for name in self.readers)

    def forward(self, input_ids):
        """[batch, time] -> [batch, time, embedding_dim]."""
        model = self._owner[0]
        if model.config.embeddings == "native":
            own = [model.embed(name, input_ids) for name in self.readers]
            return torch.cat(place(own, input_ids.device), -1)
        return model.mix_embeddings(input_ids)


class ManticoreModel(ManticorePreTrainedModel):
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
        for name in config.component_names:
            sub, there = getattr(config, name), list(self.children())
            what = f"Component {name!r} ({sub.model_type})"
            component = build_component(what, sub, there) if components is None else components[name]
            setattr(config, name, component.config)
            prepare(component)
            keep_state_in_cache(component)
            if components is not None:
                for module in component.modules():
                    module._is_hf_initialized = True
            self.add_module(name, component)
            with trying(what):
                try:
                    check_cut(component, self.segments.anatomy(name), config.num_blocks)
                except ManticoreError as err:
                    raise ManticoreError(f"Component {name!r}: {err}") from err
        if config.route is not None:
            self.segments.prune()
        self.hybrid_mixer = construct("The hybrid's mixer", self.new_mixer, list(self.children()))
        self.__dict__["input_embedding"] = HybridEmbedding(self)
        self.post_init()
        self.segments.follow()

    # ---- the parts -------------------------------------------------------------------------------------------------

    @property
    def segments(self):
        """The cut components: their segments and heads, and which layers run where (`Segments`)."""
        found = self.__dict__.get("_segments")
        # A copy of the model, and its replicas on several devices, have components of their own.
        if found is None or found.model is not self:
            found = self.__dict__["_segments"] = Segments(self)
        return found

    def new_mixer(self):
        """A mixer for the present configuration and components, not yet in use."""
        parts = {name: self.component(name) for name in self.config.component_names}
        return HybridMixer(
            self.config,
            {name: width_of(part.get_input_embeddings()) for name, part in parts.items()},
            {name: getattr(self.config, name).hidden_size for name in parts},
            {name: width_of(part.get_output_embeddings()) for name, part in parts.items()},
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

    def set_use_kernels(self, use_kernels, *args, **kwargs):
        """As in Transformers, for the mixers' own forwards, too; says what the Hub had no kernel for."""
        super().set_use_kernels(use_kernels, *args, **kwargs)
        if use_kernels:
            follow_kernels(self)

    def train(self, mode=True):
        super().train(mode)
        if mode and hasattr(self, "peft_config"):  # of adapters that came after the first
            refuse_adapters(self)
        if "input_embedding" in self.__dict__:
            self.input_embedding.train(mode)
        if "hybrid_mixer" in self._modules:
            self.segments.follow()
        return self

    @property
    def device(self):
        """Where inputs should be: of a hybrid whose first weights are offloaded, where they are computed with."""
        first = super().device
        return first if first.type != "meta" else device_of(self) or first

    def together(self, value):
        """States or logits of several components, where the mixer is."""
        return place(value, device_of(self.hybrid_mixer))

    # ---- embeddings ------------------------------------------------------------------------------------------------

    # As models of Transformers have them, for TRL and for PEFT
    vocab_size = property(lambda self: self.config.vocab_size)
    embeddings = property(lambda self: self.get_input_embeddings())

    def get_input_embeddings(self):
        if self.input_embedding._owner[0] is not self:  # a replica on another device: its parts, the same hooks
            self.__dict__["input_embedding"] = copy.copy(self.input_embedding)
            self.input_embedding._owner = (self,)
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
        before = self.config.vocab_size
        for name in self.config.component_names:
            component = self.component(name)
            component.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            self.config.vocab_size = component.config.vocab_size
        self.is_resized = self.is_resized or self.config.vocab_size != before
        self.segments.follow()
        return self.get_input_embeddings()

    def embed(self, name, input_ids):
        """A component's own embeddings of the tokens [batch, time, width]."""
        embedding = self._modules[name].get_input_embeddings()
        return embedding(place(input_ids, device_of(embedding)))

    def mix_embeddings(self, input_ids):
        """h_0 = sum_k alpha_1k * pad(E_k[x], d): [batch, time, d]."""
        active, width = active_in(self, mixture_rows(self)[0]), self.config.hidden_size
        return weighted_sum(
            list(active.values()), [resize(self.together(self.embed(name, input_ids)), width) for name in active]
        )

    # ---- caches and attention --------------------------------------------------------------------------------------

    def make_cache(self, max_cache_len=None):
        """An empty cache for this hybrid.

        Args:
            max_cache_len: Length of a static cache; None for one that grows.

        Raises:
            ManticoreError: A component's own class gives no right results with a static cache.
        """
        parts = {name: self.component(name) for name in self.config.component_names}
        configs = {name: part.config for name, part in parts.items()}
        cache = ManticoreCache(configs, self.segments.ranges, max_cache_len)
        for name, part in parts.items() if max_cache_len is not None else ():
            if cache.attends(name) and not part._can_compile_fullgraph:
                raise ManticoreError(
                    f"Component {name!r} ({part.config.model_type}) does not support a static cache; leave "
                    "cache_implementation at its default."
                )
        return cache

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        cache = cache_for_generation(self, generation_config, model_kwargs.get("cache"), max_cache_length)
        if cache is not None:
            model_kwargs["cache"] = cache

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """Each component makes its own masks from the 2-D one."""
        return attention_mask

    @property
    def init_continuous_batching(self):
        """Not there: `transformers serve --continuous-batching` asks whether it is, and then takes `generate`."""
        raise AttributeError(NO_PAGES)

    def continuous_batching_context_manager(self, *args, **kwargs):
        """Refused: see the error's message."""
        raise ManticoreError(NO_PAGES)

    generate_batch = continuous_batching_context_manager

    @classmethod
    def is_backend_compatible(cls):
        """Never returns: vLLM (0.32) and SGLang (0.5) go on after a False, and fail in a worker with a long trace.

        Raises:
            ManticoreError: Always. Only such engines ask.
        """
        raise ManticoreError(ENGINE_REFUSED.format("An engine that puts its own attention into a model (vLLM, SGLang)"))

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """Sets the implementation of every component that has it; the others keep theirs.

        Args:
            attn_implementation: A name, or a dict {component name: name} that is taken literally.
            *args, **kwargs: As in Transformers.

        Raises:
            ManticoreError: It belongs to an engine with a cache of its own.
            ValueError: No component has it, or a component named in a dict lacks it.
        """
        parts = {name: self.component(name) for name in self.config.component_names}
        super().set_attn_implementation(choose_attention(parts, attn_implementation), *args, **kwargs)

    # ---- forward ---------------------------------------------------------------------------------------------------

    @takes_old_cache
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
            cache: A ManticoreCache (`make_cache`, or one returned before); `past_key_values` is its old name.
            use_cache: Whether to return a cache.
            output_hidden_states: Whether to return the shared state at each block boundary.
            return_dict: False for a tuple.

        Raises:
            ManticoreError: Input that cannot be used, or beyond a component's table of positions.
        """
        keep = self._flag("output_hidden_states", output_hidden_states)
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, keep)
        found = run(self, read_inputs(self, *given))
        out = ManticoreModelOutput(
            last_hidden_state=found.shared,
            cache=found.cache,
            hidden_states=found.hidden_states,
            states=tuple(found.states.get(name) for name in self.config.component_names),
        )
        return out if self._flag("return_dict", return_dict) else out.to_tuple()

    def _flag(self, name, value):
        """An argument of a forward, or what the configuration says where it is None."""
        return bool(getattr(self.config, name)) if value is None else value
