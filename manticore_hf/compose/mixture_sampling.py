"""Sampling from a mixture at the price of one component per token.

To draw a component with the mixture's weights, and then a token from that component alone, is to draw a token from
sum_k w_k p_k (ancestral sampling of a mixture). So with weights that are known beforehand only the component that was
drawn need run at a step. The others read the tokens later, many at a time: when they are drawn, or when the gate is
asked again. Static weights are always known. A gate per token, or the online mixture, is asked every `gate_lag` tokens
and kept in between: so is a hybrid's whose setting `gate_lag` says so, which is trained and scored like that; for any
other this is another mixture than its own (`with_lag` gives its weights, to score it).
"""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from manticore_hf.modeling.cache_manticore import ManticoreCache
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.past_losses import MOST, decayed_sums, decays_of
from manticore_hf.modeling.running_manticore import Inputs, active_in, mixture_rows, native_inputs
from manticore_hf.utils.positions import check_positions

GATE_LAG = 16


def with_lag(weights: torch.Tensor, lag: int) -> torch.Tensor:
    """A gate's weights as they are if it is asked at the first of every `lag` tokens and kept until the next.

    Args:
        weights: [batch, time, K], of rows that begin together, without padding.
        lag: Tokens; 1 changes nothing.
    """
    at = torch.arange(weights.shape[1], device=weights.device)
    return weights[:, at - at % lag]


@dataclass
class _Reader:
    """One component, which reads a row of tokens through its own part of a cache when it is asked to."""

    model: PreTrainedModel
    name: str
    cache: ManticoreCache
    seen: int = 0
    state: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    sums: torch.Tensor | float = 0.0
    known: torch.Tensor | None = None

    @torch.no_grad()
    def read(self, ids):
        """Reads what it has not read of a row of ids [time]: its last state and logits are then of the last token."""
        if self.seen == len(ids):
            return
        segments, new = self.model.segments, ids[None, self.seen :]
        segment = segments.segment(self.name, 0)
        positions = torch.arange(self.seen, len(ids), device=ids.device)[None]
        check_positions([(self.name, segment)], positions, len(ids), False)
        self.cache.seen = self.seen  # the others may be ahead
        embedding = self.model.get_input_embeddings()
        embeds = embedding(new) if embedding.is_watched else None
        inputs = Inputs(new, embeds, None, positions, False, self.cache, False)
        row = [float(name == self.name) for name in self.model.config.component_names]
        entering = native_inputs(self.model, inputs, row)[self.name]
        states = segment(entering, None, positions, self.cache.view(self.name, 0), None)
        self.state = states[:, -1:]
        if self.model.config.reads_past_losses:
            logits = segments.logits(self.name, states)
            self._lose(logits[0].float().log_softmax(-1), new[0])
            self.logits = logits[:, -1:]
        else:
            self.logits = segments.logits(self.name, self.state)
        self.seen = len(ids)

    def _lose(self, log_probs, new):
        """Adds the losses of new tokens [new] to the decayed `sums` [decays]; log_probs [new, size] are after them."""
        # Of a text's first token nothing was expected
        before = torch.zeros_like(log_probs[:1]) if self.known is None else self.known
        losses = -torch.cat([before, log_probs[:-1]]).gather(1, new[:, None].to(log_probs.device))
        decays, shares = (losses.new_tensor(x) for x in decays_of(self.model.config))
        values = losses.clamp(0, MOST) * shares
        values[0] += decays * self.sums
        self.sums, self.known = decayed_sums(values[None], decays.expand_as(values)[None])[0, -1], log_probs[-1:]


def sample_components(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    gate_lag: int | None = None,
    **model_kwargs: object,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """What `generate` calls to choose tokens, in the place of its own sampling; rows are written one after the other.

    Args:
        model: A hybrid of one block with native embeddings and mixture_space "prob".
        input_ids: [batch, time], padded on the left.
        logits_processor: As `generate` has made it, which must be empty.
        stopping_criteria: As `generate` has made them; asked of one row at a time.
        generation_config: As `generate` has made it.
        synced_gpus: Not supported.
        streamer: Gets the tokens of a single row.
        gate_lag: Tokens between two questions to the gate; None: the hybrid's setting, or GATE_LAG where that is 1.
        **model_kwargs: `attention_mask` [batch, time].

    Returns:
        [batch, time + new tokens], shorter rows padded on the right; or a GenerateDecoderOnlyOutput that has it.

    Raises:
        ManticoreError: The hybrid cannot be sampled so, or something was asked for that would change the mixture.
    """
    held = model.config.gate_lag if model.config.holds_weights else None
    gate_lag = held or GATE_LAG if gate_lag is None else gate_lag
    _check(model, logits_processor, generation_config, synced_gpus, gate_lag)
    if model_kwargs.get("inputs_embeds") is not None or "prepare_inputs_for_generation" in vars(model):
        raise ManticoreError(
            "mixture_sampling reads tokens, and neither inputs_embeds nor a soft prompt (PEFT's prompt tuning): "
            "generate without it."
        )
    mask, out = model_kwargs.get("attention_mask"), []
    model.segments.follow()
    for i, row in enumerate(input_ids):
        real = slice(None) if mask is None else mask[i].bool()
        out.append(_sample(model, row, row[real], stopping_criteria, streamer, gate_lag))
    if streamer is not None:
        streamer.end()
    pad = generation_config._pad_token_tensor
    pad = 0 if pad is None else int(pad)
    sequences = torch.nn.utils.rnn.pad_sequence(out, batch_first=True, padding_value=pad)
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


def _sample(model, row, ids, stopping_criteria, streamer, lag):
    cache = model.make_cache()
    readers = {name: _Reader(model, name, cache) for name in model.config.component_names}
    active = active_in(model, mixture_rows(model)[0])
    gated = model.config.mixture != "static" and len(active) > 1
    gated = gated and not all(isinstance(one, float) for one in active.values())
    shares, names = torch.tensor([float(one) for one in active.values()]), list(active)
    # The hybrid's own lag counts from the beginning of the text, any other from that of what is written
    first, asked, done = 0 if model.config.holds_weights else len(ids) - 1, None, False
    while not done:
        at = len(ids) - 1 - (len(ids) - 1 - first) % lag
        if gated and at != asked:
            for name in names:
                readers[name].read(ids[: at + 1])
            shares, asked = _ask_gate(model, [readers[name] for name in names], list(active.values())), at
        one = readers[names[int(torch.multinomial(shares, 1))]]
        one.read(ids)
        token = torch.multinomial(one.logits[0, -1].float().softmax(-1), 1).to(row.device)
        ids, row = torch.cat([ids, token]), torch.cat([row, token])
        if streamer is not None:
            streamer.put(token.cpu())
        done = bool(stopping_criteria(row[None], None).all())
    return row


@torch.no_grad()
def _ask_gate(model, readers, weights):
    """The gate's weights [K] after the last token."""

    def past(own, norms):
        return torch.stack([one.sums.to(own[0].device) for one in readers])[None, None]

    losses = past if model.config.reads_past_losses else None
    _, found = model.mix(weights, [one.state for one in readers], [one.logits for one in readers], losses)
    return found[0, -1].cpu()


def _check(model, logits_processor, generation_config, synced_gpus, lag):
    config = model.config
    if config.num_blocks != 1 or config.embeddings != "native" or config.aligned or config.bridges:
        what = f"num_blocks={config.num_blocks}, embeddings={config.embeddings!r}"
        what += ", bridges between components" if config.bridges else ""
        what += f", components with tokenizers of their own: {list(config.aligned)}" if config.aligned else ""
        raise ManticoreError(
            f"mixture_sampling runs one whole component at a time, and this hybrid has {what}: generate without it."
        )
    if config.mixture_space != "prob" and len(config.component_names) > 1:
        raise ManticoreError(
            f"mixture_sampling draws from the arithmetic mean of the components, and mixture_space is "
            f"{config.mixture_space!r}: generate without it, or train the hybrid with mixture_space='prob'."
        )
    if not generation_config.do_sample or generation_config.num_beams > 1:
        raise ManticoreError("mixture_sampling samples: give do_sample=True and num_beams=1.")
    if len(logits_processor):
        names = sorted(type(one).__name__ for one in logits_processor)
        raise ManticoreError(
            f"mixture_sampling draws from the mixture as it is, and {names} would change it component by component: "
            "leave temperature, top_k, top_p and the like at 1, 0 and 1."
        )
    wanted = [key for key in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
              if getattr(generation_config, key)]  # fmt: skip
    if wanted or synced_gpus:
        raise ManticoreError(f"mixture_sampling does not support {wanted or ['synced_gpus']}: generate without it.")
    if type(lag) is not int or lag < 1:
        raise ManticoreError(f"gate_lag={lag!r} must be a whole number of tokens, at least 1.")
    if config.holds_weights and lag != config.gate_lag:
        raise ManticoreError(
            f"gate_lag={lag}: this hybrid's weights are kept for {config.gate_lag} tokens, as it was trained; leave it "
            "out."
        )
