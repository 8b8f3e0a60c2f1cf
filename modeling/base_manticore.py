"""`ManticoreModel`: the components (whole, under their names) and the mixer; and what all hybrid classes share."""

import copy
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from .bounds_manticore import TESTED, VERSION, build_component, construct, trying
from .cache_manticore import ManticoreCache, cache_for_generation
from .carried_manticore import check_carried, is_needed, optional
from .components_manticore import ENGINES, EngineError, choose_attention, prepare, settle_attention
from .configuration_manticore import ManticoreConfig, ManticoreError
from .devices_manticore import check_whole_rows, device_of, onloaded, place, whole_weights
from .dtypes_manticore import MixedDtypes, check_adapted
from .mixing_manticore import HybridMixer, gathered
from .mixture_manticore import widen
from .running_manticore import read_inputs, run
from .segments_manticore import Segments
from .weights_manticore import ReferencedWeights, keep_loaded_embeddings

takes_old_cache = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
"""Lets a forward take its `cache` as `past_key_values`, as the forwards of Transformers' own models do until then."""
UNTESTED = (
    "This hybrid's code was tested with Transformers {}.{} to {}.{}, and a newer one is installed: if something is "
    "wrong, install one of these, or bring the repository's code up to date (manticore-hf push --code-only)."
).format(*TESTED[0], *TESTED[1])


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


class ManticorePreTrainedModel(ReferencedWeights, MixedDtypes, PreTrainedModel):
    """What Transformers asks of all hybrid classes; loading, saving and initialisation."""

    config_class = ManticoreConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = False
    _no_split_modules = ["HybridMixer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # Whether the vocabulary has another size than where the hybrid was loaded from.
    is_resized = False

    @classmethod
    @whole_weights()
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As in Transformers, with references to components resolved and checked."""
        if VERSION > TESTED[1]:
            logging.get_logger(__name__).warning_once(UNTESTED)
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HybridMixer):
            module.reset()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "peft_config":  # PEFT has wrapped what was asked for
            if is_needed("mixers_manticore", self.config):
                optional("mixers_manticore").check_adapted(self)
            check_adapted(self)

    def initialize_weights(self) -> None:
        """Components first, each as its own class does it.

        As part of custom code, models without parameters of their own would not fill their layers' buffers (FalconH1).
        """
        for name in self.config.component_names:
            keep_loaded_embeddings(self._modules[name])
            self._modules[name].initialize_weights()
        super().initialize_weights()


class HybridEmbedding(nn.Module):
    """What `get_input_embeddings` gives: token ids [batch, time] -> `inputs_embeds` [batch, time, embedding_dim].

    For embeddings="native" each component's own, side by side (of a pruned hybrid the first one's alone), else the
    shared state. Holds no parameters: they are the components'. The model's forward calls it only where a caller
    watches it: components that are run whole read the tokens themselves.
    """

    def __init__(self, model: "ManticoreModel") -> None:
        super().__init__()
        self._owner = (model,)  # in a tuple: not a child, or the model would contain itself

    @property
    def readers(self) -> list[str]:
        """Names of the components that read the tokens: all of them, or the first on a pruned hybrid's path."""
        config = self._owner[0].config
        return config.route[:1] if config.route else [n for n in config.component_names if n not in config.aligned]

    @property
    def weight(self) -> nn.Parameter:
        """Embedding matrix [vocabulary, width] of the tokenizer's component, or else of the first that reads."""
        model = self._owner[0]
        name = model.config.tokenizer_component
        return model.component(name if name in self.readers else self.readers[0]).get_input_embeddings().weight

    word_embeddings = property(lambda self: self)  # of `model.embeddings`, which PEFT's prompts look for

    @property
    def is_watched(self) -> bool:
        """Whether a caller has hooked into it or replaced its forward (NEFTune, gradients of frozen embeddings)."""
        return bool(self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self))

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Width of what it gives."""
        model = self._owner[0]
        if model.config.embeddings != "native":
            return model.config.hidden_size
        return sum(model.component(name).get_input_embeddings().weight.shape[1] for name in self.readers)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        model = self._owner[0]
        if model.config.embeddings != "native":
            return optional("shared_manticore").mix_embeddings(model, input_ids)
        return torch.cat(place([model.embed(name, input_ids) for name in self.readers], input_ids.device), -1)


class ManticoreModel(ManticorePreTrainedModel):
    """K components in S blocks, joined; without output head (the components keep theirs, unused here).

    Args:
        config: A ManticoreConfig with at least one component.
        components: Instantiated components by name; None builds them with initial weights.
    """

    def __init__(self, config: ManticoreConfig, components: dict | None = None) -> None:
        with trying("The hybrid"):
            super().__init__(config)
        if not config.component_names:
            raise ManticoreError("A hybrid needs at least one component; ManticoreConfig(components=[...]) is empty.")
        check_carried(config)  # what is missing is said before anything is made
        settle_attention(config)
        for name in config.component_names:
            sub, there = getattr(config, name), list(self.children())
            what = f"Component {name!r} ({sub.model_type})"
            component = build_component(what, sub, there) if components is None else components[name]
            setattr(config, name, component.config)
            prepare(component, config)
            for module in component.modules() if components is not None else ():
                module._is_hf_initialized = True
            self.add_module(name, component)
            with trying(what):
                try:
                    layout = self.segments.layout(name)
                    if is_needed("layer_stack_manticore", config):
                        optional("layer_stack_manticore").check_cut(component, layout, len(self.segments.blocks(name)))
                except ManticoreError as err:
                    raise ManticoreError(f"Component {name!r}: {err}") from err
        if config.route is not None:
            optional("path_manticore").prune(self.segments)
        self.hybrid_mixer = construct("The hybrid's mixer", self.new_mixer, list(self.children()))
        self.__dict__["input_embedding"] = HybridEmbedding(self)
        self.post_init()
        self.segments.follow()

    def init_parallel_plans(self) -> None:
        """As in Transformers, without what a component no longer has (its head, in a classifier)."""
        super().init_parallel_plans()
        names = [name for name, module in self.named_modules() if not hasattr(module, "is_dropped")]
        there = {*map(replace_layer_number_by_wildcard, (*names, *(name for name, _ in self.named_parameters())))}
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if name in there}
        self._ep_plan = {name: style for name, style in self._ep_plan.items() if name in there}

    # ---- the parts -------------------------------------------------------------------------------------------------

    @property
    def segments(self) -> Segments:
        """The cut components: their segments and heads, and which layers run where (`Segments`)."""
        found = self.__dict__.get("_segments")
        # A copy of the model, and its replicas on several devices, have components of their own.
        if found is None or found.model is not self:
            found = self.__dict__["_segments"] = Segments(self)
        return found

    def new_mixer(self) -> HybridMixer:
        """A mixer for the present configuration and components, not yet in use."""
        parts = {name: self.component(name) for name in self.config.component_names}
        return HybridMixer(
            self.config,
            {name: part.get_input_embeddings().weight.shape[1] for name, part in parts.items()},
            {name: getattr(self.config, name).hidden_size for name in parts},
            {name: part.get_output_embeddings().weight.shape[1] for name, part in parts.items()},
        )

    def component(self, name: str) -> PreTrainedModel:
        """The component as a model of its own class; `model.component(name).save_pretrained(dir)` gives it back.

        Raises:
            ManticoreError: There is no component of that name.
        """
        if name not in self.config.component_names:
            raise ManticoreError(f"No component is named {name!r}; the components are {self.config.component_names}.")
        return self._modules[name]

    def is_gone(self, key: str) -> bool:
        """Whether a tensor belongs to a language-model head that this model leaves out."""
        return key.startswith(self.__dict__.get("_gone", ()))

    def mixture_weights(self) -> torch.Tensor:
        """alpha [S, K]; with mixture="token" the last row is softmax(b), the part that does not depend on the token."""
        mixer, gate = self.hybrid_mixer, self.hybrid_mixer.token_gate
        with onloaded(mixer, *([] if gate is None else [gate.linear])):
            alpha = widen(gathered(mixer.alpha_logits.detach())).softmax(-1)
            if gate is not None:
                alpha[-1] = widen(gathered(gate.linear.bias.detach())).softmax(-1)
        for block, row in enumerate(self.config.mixture_weights or ()):
            if row is not None:
                alpha[block] = torch.tensor(row)
        return alpha

    def set_mixture_weights(self, weights: torch.Tensor | list | str | None) -> None:
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
            raise ManticoreError(f"This hybrid was pruned to the path {self.config.route}: no other weights fit it.")
        self.config.mixture_weights = weights

    def set_use_kernels(self, use_kernels: bool, *args: Any, **kwargs: Any) -> None:
        """As in Transformers, for the mixers' own forwards, too; says what the Hub had no kernel for."""
        super().set_use_kernels(use_kernels, *args, **kwargs)
        if use_kernels and is_needed("mixers_manticore", self.config):
            optional("mixers_manticore").follow_kernels(self)

    def train(self, mode: bool = True) -> "ManticoreModel":
        """As in torch, for the shells of the segments, too."""
        check_whole_rows()
        super().train(mode)
        if "input_embedding" in self.__dict__:
            self.input_embedding.train(mode)
        if "hybrid_mixer" in self._modules:
            self.segments.follow()
        return self

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where inputs should be: of a hybrid whose first weights are offloaded, where they are computed with."""
        first = super().device
        return first if first.type != "meta" else device_of(self) or first

    def together(self, value: torch.Tensor | list) -> torch.Tensor | list:
        """States or logits of several components, on the mixer's device."""
        return place(value, device_of(self.hybrid_mixer))

    # ---- embeddings ------------------------------------------------------------------------------------------------

    embeddings = property(lambda self: self.get_input_embeddings())  # where PEFT's prompts look first

    def get_input_embeddings(self) -> HybridEmbedding:
        """One module for the embeddings of all components."""
        if self.input_embedding._owner[0] is not self:  # a replica on another device: its parts, the same hooks
            self.__dict__["input_embedding"] = copy.copy(self.input_embedding)
            self.input_embedding._owner = (self,)
        return self.input_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Raises ManticoreError: there are several."""
        raise ManticoreError("Each component has its own embeddings: use model.component(name).set_input_embeddings().")

    def get_output_embeddings(self) -> None:
        """None: the heads are the components', and there is no matrix that gives the mixture."""
        return None

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Raises ManticoreError: there are several."""
        raise ManticoreError("Each component has its own head: use model.component(name).set_output_embeddings().")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> HybridEmbedding:
        """Resizes the vocabulary of every component; ManticoreError for a pruned hybrid of several."""
        if self.config.aligned:
            raise ManticoreError("The components have tokenizers of their own: resize each before it is composed.")
        if self.config.route is not None and len(self.config.component_names) > 1:
            raise ManticoreError("A pruned hybrid cannot be resized: resize the full one, then prune it.")
        before = self.config.vocab_size
        for name in self.config.component_names:
            component = self.component(name)
            component.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            self.config.vocab_size = component.config.vocab_size
        self.is_resized = self.is_resized or self.config.vocab_size != before
        self.segments.follow()
        return self.get_input_embeddings()

    def embed(self, name: str, input_ids: torch.Tensor) -> torch.Tensor:
        """A component's own embeddings of the tokens [batch, time, width]."""
        embedding = self._modules[name].get_input_embeddings()
        return embedding(place(input_ids, device_of(embedding)))

    # ---- caches and attention --------------------------------------------------------------------------------------

    @property
    def _is_stateful(self):
        """Whether drafts that are rejected could not be taken back: of recurrent components, and of aligned ones."""
        return bool(self.config.aligned) or self.make_cache().is_recurrent

    def make_cache(
        self, max_cache_len: int | None = None, offloading: bool = False, quantized: dict | None = None
    ) -> ManticoreCache:
        """An empty cache for this hybrid.

        Args:
            max_cache_len: Length of a static cache; None for one that grows.
            offloading, quantized: As in ManticoreCache.

        Raises:
            ManticoreError: A component's own class gives no right results with a static cache.
        """
        parts = {name: self.component(name) for name in self.config.component_names}
        configs = {name: part.config for name, part in parts.items()}
        beside = [i for i, bridge in enumerate(self.config.bridges or ()) if bridge["kind"] == "attention"]
        cache = ManticoreCache(configs, self.segments.ranges, max_cache_len, offloading, quantized, beside)
        # Rows that read on as text what was padding would be known by it
        cache.keeps_more = bool(self.config.aligned) or self.config.reads_past_losses or self.config.holds_weights
        cache.is_plain &= not cache.keeps_more
        if self.config.aligned and max_cache_len is not None:
            raise ManticoreError(
                f"Components {list(self.config.aligned)} read text by tokenizers of their own, which needs a cache "
                "that grows; leave cache_implementation at its default."
            )
        for name, part in parts.items() if max_cache_len is not None else ():
            if self.segments.layout(name).attends and not part._can_compile_fullgraph:
                raise ManticoreError(
                    f"Component {name!r} ({part.config.model_type}) does not support a static cache; leave "
                    "cache_implementation at its default."
                )
        return cache

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        given, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
        cache = cache_for_generation(self, generation_config, given, max_cache_length, mask)
        if cache is not None:
            model_kwargs["cache"] = cache

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor | None:
        """Each component makes its own masks from the 2-D one."""
        return attention_mask

    @property
    def init_continuous_batching(self) -> NoReturn:
        """Not there: `transformers serve --continuous-batching` asks whether it is, and then takes `generate`."""
        raise AttributeError("init_continuous_batching")

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises EngineError, for `generate_batch` too."""
        raise EngineError("Continuous batching")

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """False; an engine, which would go on and fail in a worker (vLLM 0.32, SGLang 0.5), gets an EngineError."""
        engine = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if engine in ENGINES:
            raise EngineError(engine)
        return False

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As in Transformers: of every component that has it; the others keep theirs.

        Raises:
            ManticoreError: It belongs to an engine with a cache of its own.
            ValueError: No component has it, or a component named in a dict {component name: name} lacks it.
        """
        parts = {name: self.component(name) for name in self.config.component_names}
        super().set_attn_implementation(choose_attention(parts, attn_implementation), *args, **kwargs)

    # ---- forward ---------------------------------------------------------------------------------------------------

    @can_return_tuple
    @takes_old_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: ManticoreCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list | None = None,
        **kwargs: Any,
    ) -> ManticoreModelOutput | tuple:
        """Runs the blocks.

        Args:
            input_ids: [batch, time] token ids; or `inputs_embeds`, see `get_input_embeddings`.
            attention_mask: [batch, past + time], 1 for real tokens; padding may stand anywhere.
            position_ids: [batch, time]; default: counted from the mask. Where they start again, as where `seq_idx`
                changes or `cu_seq_lens_q` says so, a document begins that knows nothing of those before it.
            cache: A ManticoreCache (`make_cache`, or one returned before); `past_key_values` is its old name.
            use_cache: Whether to return a cache.
            output_attentions: Whether to return attention weights, and a cache only if that is asked for; only
                attn_implementation="eager" has any.
            output_hidden_states: Whether to return the shared state at each block boundary; or which, by index.
            **kwargs: `return_dict=False` for a tuple.

        Raises:
            ManticoreError: Input that cannot be used, or beyond a component's table of positions.
        """
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, keep)
        found = run(self, read_inputs(self, *given, {**kwargs, "output_attentions": output_attentions}))
        kept = found.cache, found.hidden_states, found.attentions
        return ManticoreModelOutput(found.shared, *kept, ModelOutput(found.states))


ManticoreConfig.register_for_auto_class()
ManticoreModel.register_for_auto_class("AutoModel")
