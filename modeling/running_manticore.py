"""One pass of a hybrid: what it reads, the ways to run, and what it returns.

`run` takes one of three functions of one signature: `run_straight` (one block that reads native embeddings: whole
components side by side, nothing cut), `run_all` (all components in every block, mixed after each: shared_manticore) and
`run_path` (a pruned hybrid's one component per block: path_manticore).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import Cache, PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import resolve_hidden_states_indices, selected_hidden_states

from .bounds_manticore import guard
from .cache_manticore import ManticoreCache, cache_for
from .carried_manticore import optional
from .configuration_manticore import ManticoreError
from .mixing_manticore import HybridMixer, resize
from .mixture_manticore import is_active, weighted_sum
from .rows_manticore import IN_PARTS, Documents, Opt, check_mask, check_not_told, find_documents, has_values, run_cut

logger = logging.get_logger(__name__)


@dataclass
class Inputs:
    """What one pass reads.

    Attributes:
        ids: [batch, time] token ids, or None.
        embeds: What `get_input_embeddings` gives for them, or None; one of the two is there. What is here is read.
        mask: [batch, past + time], 1 for real tokens, or None.
        positions: [batch or 1, time].
        explicit: Whether the caller gave the positions.
        cache: A ManticoreCache, or None.
        keep: Whether the shared states at the blocks' boundaries are wanted, or which: an index, or a list of them.
        documents: The Documents of rows that are not one text each, or None.
        own: What the caller gets as cache: `cache`, or a DynamicCache of the caller's own with its layers.
        attentions: List that takes the layers' attention weights as they are computed, or None.
        last: Whether predictions of each row's last token are all that is wanted.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor | None
    mask: torch.Tensor | None
    positions: torch.Tensor
    explicit: bool
    cache: ManticoreCache | None
    keep: bool | int | list
    documents: Documents | None = None
    own: Cache | None = None
    attentions: list | None = None
    last: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, time)."""
        return tuple((self.embeds if self.ids is None else self.ids).shape[:2])

    def around(self, name: str, block: int) -> tuple:
        """(mask, positions, view of the cache, list for attentions) of `name`'s segment that begins in `block`."""
        if self.cache is None:
            return self.mask, self.positions, None, self.attentions
        mask = self.cache.stretch(self.mask, name, block, *self.shape, self.positions.device)
        return mask, self.positions, self.cache.view(name, block), self.attentions


@dataclass
class Pass:
    """What one pass gives.

    Attributes:
        states: {component: [batch, time, d_k]}, the last states of those that were run in the last block.
        weights: S rows of K mixture weights: numbers where they are fixed, else scalar tensors.
        shared: [batch, time, d], the shared state after the last block; None where nobody asked and no head reads it.
        hidden_states: The shared states at the blocks' boundaries, if they were wanted.
        cache: The cache, with the new tokens; None without.
        own_logits: Where heads alone do not give them: (positions to keep) -> {component: its logits}.
        attentions: The layers' attention weights, if they were wanted.
    """

    states: dict
    weights: list
    shared: torch.Tensor | None
    hidden_states: tuple | None
    cache: Cache | None = None
    attentions: tuple | None = None
    own_logits: Callable | None = None


def read_inputs(
    model: PreTrainedModel,
    ids: Opt,
    mask: Opt,
    positions: Opt,
    cache: Cache | None,
    embeds: Opt,
    use_cache: bool | None,
    keep: bool | int | list,
    told: dict | None = None,
) -> Inputs:
    """The Inputs of a call, checked.

    Args:
        model: The hybrid.
        ids, mask, positions, cache, embeds, use_cache, keep: The arguments of its forward.
        told: Its other keyword arguments: `output_attentions`, and some may say where documents begin.

    Raises:
        ManticoreError: Input that does not fit together.
    """
    if (ids is None) == (embeds is None):
        raise ManticoreError("Give exactly one of input_ids and inputs_embeds.")
    if ids is not None and (ids.dtype not in (torch.long, torch.int) or ids.ndim != 2):
        raise ManticoreError(f"input_ids is {ids.dtype} of shape {tuple(ids.shape)}; give integers [batch, time].")
    if embeds is None and model.get_input_embeddings().is_watched:
        embeds = model.get_input_embeddings()(ids)
    given = embeds if ids is None else ids
    batch, time = given.shape[:2]
    if mask is not None and mask.ndim != 2:
        raise ManticoreError(
            f"attention_mask has shape {tuple(mask.shape)}; a hybrid takes [batch, past + time], since its recurrent "
            "components cannot use a 4-D mask."
        )
    wants = (told or {}).get("output_attentions")
    wants = model.config.output_attentions if wants is None else wants
    if wants and cache is None:  # with one, rows that are padded on the right would be run in parts
        use_cache = bool(use_cache)
    told = {key: (told or {}).get(key) for key in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")}
    mask = None if mask is None else check_mask(mask, time)
    documents = find_documents(mask, positions, (batch, time), **told)
    if documents is not None and documents.are_several:
        if cache is not None or use_cache:
            raise ManticoreError(
                "position_ids, seq_idx or cu_seq_lens_q begin several documents in one row, and a cache continues "
                "only one: call with use_cache=False, or give each document a row of its own."
            )
        use_cache = False
    own, cache = cache, cache_for(model, cache, use_cache)
    past, explicit = 0 if cache is None else cache.get_seq_length(), positions is not None
    if mask is not None and mask.shape != (batch, past + time):
        raise ManticoreError(
            f"attention_mask has shape {tuple(mask.shape)}; {(batch, past + time)} is needed for {past} cached and "
            f"{time} new tokens."
        )
    if not explicit and mask is None:
        positions = torch.arange(past, past + time, device=given.device)[None]
    elif not explicit:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -time:]
    documents = None if cache is not None else documents
    own = cache if own is None or cache is None else own
    return Inputs(ids, embeds, mask, positions, explicit, cache, keep, documents, own, [] if wants else None)


def run(model: PreTrainedModel, inputs: Inputs, shared: bool = True) -> Pass:
    """Runs the blocks of a hybrid.

    Args:
        model: The hybrid.
        inputs: Its Inputs.
        shared: Whether the shared state after the last block is wanted even where no head reads it.

    Returns:
        A Pass.

    Raises:
        ManticoreError: Input beyond the table of positions of a component that is run.
    """
    model.segments.follow()
    if any("adapter_names" in getattr(hook, "keywords", ()) for hook in model.hybrid_mixer._forward_pre_hooks.values()):
        check_not_told(model, "adapter_names", "each has a full mixer (train_mixer=False: none), a batch one mixture")
    if any(getattr(one, "alora_invocation_tokens", None) for one in getattr(model, "peft_config", {}).values()):
        check_not_told(model, "alora_offsets", "aLoRA counts tokens of rows that hybrids run in parts")
    try:
        found = (optional("aligned_hybrid").run_aligned if model.config.aligned else run_any)(model, inputs, shared)
    except IndexError as err:
        largest = -1 if inputs.ids is None else int(inputs.ids.max())
        if largest < model.config.vocab_size:
            raise
        raise ManticoreError(
            f"input_ids holds token {largest}; the components have embeddings for {model.config.vocab_size} tokens. "
            f"Use their tokenizer without added tokens, or, where all have one, resize_token_embeddings({largest + 1})."
        ) from err
    if inputs.attentions is not None:
        found.attentions = tuple(inputs.attentions)
        if not found.attentions:
            logger.warning_once(
                "output_attentions=True: no component of this hybrid returns attention weights; those that attend do "
                "with attn_implementation='eager'."
            )
    if inputs.keep and not isinstance(inputs.keep, bool):
        wanted = resolve_hidden_states_indices(model, selected_hidden_states(inputs.keep), len(found.hidden_states))
        found.hidden_states = tuple(x if i in wanted else None for i, x in enumerate(found.hidden_states))
    if inputs.own is not inputs.cache:
        inputs.own._read = inputs.cache.mask, inputs.cache.has_padding
    found.cache = inputs.own
    return found


def run_any(model: PreTrainedModel, inputs: Inputs, shared: bool, weights: list | None = None) -> Pass:
    """`run`, whatever the rows are, of components that read the same tokens.

    Args:
        model, inputs, shared: As in `run`.
        weights: S rows of K mixture weights; None: the hybrid's.
    """
    if inputs.documents is not None:
        if inputs.attentions is not None:
            raise ManticoreError(IN_PARTS)
        check_not_told(model, "adapter_names", "rows with several documents, or padding inside, run in another order")
        return inputs.documents.run(lambda part: run_rows(model, part, shared, weights), inputs, takes_turns(model))
    cache, mask = inputs.cache, inputs.mask
    if cache is not None and cache.mask is not None and mask is None:
        mask = torch.ones(inputs.shape[0], cache.seen + inputs.shape[1], dtype=torch.long, device=cache.mask.device)
        inputs = replace(inputs, mask=mask)
    if cache is None or mask is None or cache.is_plain:
        return run_rows(model, inputs, shared, weights)
    if not has_values(mask):
        cache.mask = mask
        return run_rows(model, inputs, shared, weights)
    return run_cut(lambda part: run_rows(model, part, shared, weights), inputs)


def takes_turns(model: PreTrainedModel) -> bool:
    """Whether each pass gathers weights that other processes keep, all of which must make it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    kept = any(hasattr(one, "full_tensor") or hasattr(one, "ds_id") for one in model.parameters())
    return kept or any(type(one).__name__ == "FullyShardedDataParallel" for one in model.modules())


def run_rows(model: PreTrainedModel, inputs: Inputs, shared: bool, weights: list | None = None) -> Pass:
    """`run`, of rows that are one text each, with padding on the left or right only."""
    config, segments, cache = model.config, model.segments, inputs.cache
    weights, (_, time) = weights or mixture_rows(model), inputs.shape
    length = time if cache is None else cache.max_cache_len or cache.get_seq_length() + time
    if not torch.compiler.is_compiling():  # looking at values would break the graph
        running = [(name, segments.segment(name, block)) for name, block in segments.running(weights)]
        guard().positions(running, inputs.positions, length, inputs.explicit)
    if config.route is not None:
        found = optional("path_manticore").run_path(model, inputs, weights, shared)
    elif config.bridges:
        found = optional("bridges").run_bridged(model, inputs, weights, shared)
    elif config.num_blocks == 1 and config.embeddings == "native":
        found = run_straight(model, inputs, weights, shared)
    else:
        found = optional("shared_manticore").run_all(model, inputs, weights, shared)
    if cache is not None:
        if time == 1 and cache.seen and cache.is_recurrent and torch.is_grad_enabled() and has_values():
            found.states = {name: NoGradient.apply(state) for name, state in found.states.items()}
            found.shared = None if found.shared is None else NoGradient.apply(found.shared)
        cache.seen += time
    return found


class NoGradient(torch.autograd.Function):
    """Stands behind recurrent layers that wrote their new state over the one that gradients would need."""

    @staticmethod
    def forward(ctx: object, state: torch.Tensor) -> torch.Tensor:
        return state.view_as(state)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> None:
        raise ManticoreError(
            "A backward pass reached a call with a cache in which recurrent components read single tokens and keep no "
            "gradients: call the model with use_cache=False, or, where all have one tokenizer, with several tokens."
        )


def run_straight(model: PreTrainedModel, inputs: Inputs, weights: list, shared: bool) -> Pass:
    """One block that reads native embeddings: whole components, each by its own forward and with its own cache."""
    own, segments = native_inputs(model, inputs, weights[0]), model.segments
    states = {name: segments.segment(name, 0)(entering, *inputs.around(name, 0)) for name, entering in own.items()}
    state = mix_native(model, weights[0], states) if shared or inputs.keep else None
    boundaries = (mix_native(model, weights[0], own), state) if inputs.keep else None
    return Pass(states, weights, state, boundaries)


# ---- mixture weights, and what the first block reads -----------------------------------------------------------------


def mixture_rows(model: PreTrainedModel) -> list[list[float | torch.Tensor]]:
    """S rows of K mixture weights: numbers in blocks where they are fixed, else scalar tensors."""
    fixed = model.config.mixture_weights
    if fixed is not None and None not in fixed:
        return fixed
    learned = [list(row.unbind()) for row in model.hybrid_mixer(HybridMixer.weights)]
    return [mine if mine is not None else row for mine, row in zip(fixed or [None] * len(learned), learned)]


def active_in(model: PreTrainedModel, row: list[float | torch.Tensor]) -> dict[str, float | torch.Tensor]:
    """{component: mixture weight} of those that a row of mixture weights lets run."""
    return {name: weight for name, weight in zip(model.config.component_names, row) if is_active(weight)}


def native_inputs(model: PreTrainedModel, inputs: Inputs, row: list[float | torch.Tensor]) -> dict[str, torch.Tensor]:
    """{component: what its first segment reads}: its own embeddings; the token ids, where it is run whole."""
    if inputs.embeds is None:
        whole = {name: model.segments.segment(name, 0).is_whole for name in active_in(model, row)}
        return {name: inputs.ids if whole[name] else model.embed(name, inputs.ids) for name in whole}
    names = model.get_input_embeddings().readers
    widths = [model.component(name).get_input_embeddings().weight.shape[1] for name in names]
    if inputs.embeds.shape[-1] != sum(widths):
        raise ManticoreError(
            f"inputs_embeds has width {inputs.embeds.shape[-1]}; with embeddings='native' it must hold every "
            f"component's embeddings side by side ({dict(zip(names, widths))}, in all {sum(widths)}): use "
            "model.get_input_embeddings()(input_ids)."
        )
    split = dict(zip(names, inputs.embeds.split(widths, -1)))
    return {name: split[name] for name in active_in(model, row)}


def mix_native(model: PreTrainedModel, row: list, states: dict[str, torch.Tensor]) -> torch.Tensor:
    """Components' own states (or token ids) as one state of the shared width, for those who ask for hidden states."""
    active = active_in(model, row)
    states = {n: x if x.is_floating_point() else model.embed(n, x) for n, x in states.items() if n in active}
    padded = [resize(model.together(states[name]), model.config.hidden_size) for name in active]
    return weighted_sum(list(active.values()), padded)
