"""Sampling from a mixture at the price of one component per token.

To draw a component with the mixture's weights, and then a token from that component alone, is to draw a token from
sum_k w_k p_k (ancestral sampling of a mixture). So with weights that are known beforehand only the component that was
drawn need run at a step. The others read the tokens later, many at a time: when they are drawn, or when the gate is
asked again. Static weights are always known. A gate per token, or the online mixture, is asked every `gate_lag` tokens
and kept in between: so is a hybrid's whose setting `gate_lag` says so, which is trained and scored like that; for any
other this is another mixture than its own (`with_lag` gives its weights, to score it).

A component with a tokenizer of its own predicts the hybrid's tokens by a mapping in which the component whose tokenizer
is the hybrid's has a share: where several tokens of the hybrid may come of one of its tokens, and in a small part of
all. What it gives each token without that share, `certain`, is at most its whole probability q. So a token is drawn
from `certain`; with the probability that is left the other component reads on, too, and q - certain is drawn from.
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from manticore_hf.modeling.aligned_hybrid import MOVED, TRUST, Piece, Reading, aligner_of
from manticore_hf.modeling.aligned_reading import fork
from manticore_hf.modeling.cache_manticore import ManticoreCache
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.gate_lag import Lag
from manticore_hf.modeling.mixture_manticore import widen, without_autocast
from manticore_hf.modeling.past_losses import read_losses
from manticore_hf.modeling.running_manticore import Inputs, native_inputs, read_inputs, run
from manticore_hf.utils.positions import check_positions

GATE_LAG = 16
LAST = slice(-1, None)


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
    """One component, which reads a row of tokens through its own part of a cache when it is asked to.

    Attributes:
        seen: Tokens of the row that it has read.
        logits: [1, 1, vocabulary] after them, where they are known.
        reading: What it read last, if it has a tokenizer of its own.
    """

    model: PreTrainedModel
    name: str
    cache: ManticoreCache
    seen: int
    logits: torch.Tensor | None
    reading: Reading | None = None

    def read(self, ids):
        """Reads what it has not read of a row of ids [time]."""
        if self.seen == len(ids):
            return
        segments, new = self.model.segments, ids[None, self.seen :]
        positions = torch.arange(self.seen, len(ids), device=ids.device)[None]
        embedding = self.model.get_input_embeddings()
        embeds = embedding(new) if embedding.is_watched else None
        inputs = Inputs(new, embeds, None, positions, False, self.cache, False, last=True)
        if self.name in self.model.config.aligned:
            aligner, self.logits = aligner_of(self.model), None
            if embeds is not None:
                aligner.check_embeds(self.model, inputs)
            self.reading = aligner.read(self.model, self.name, inputs)
        else:
            segment = segments.segment(self.name, 0)
            check_positions([(self.name, segment)], positions, len(ids), False)
            self.cache.seen = self.seen  # the others may be ahead
            row = [float(name == self.name) for name in self.model.config.component_names]
            entering = native_inputs(self.model, inputs, row)[self.name]
            states = segment(entering, None, positions, self.cache.view(self.name, 0), None)
            self.logits = segments.logits(self.name, states[:, LAST])
        self.seen = len(ids)

    def draw(self, ids, home):
        """A token [1] that may follow a row of ids [time]; `home` reads the hybrid's own tokens."""
        self.read(ids)
        if self.logits is not None:
            return torch.multinomial(widen(self.logits[0, -1]).softmax(-1), 1)
        certain = self.certain()
        token = torch.multinomial(torch.cat([certain, 1 - certain.sum(0, keepdim=True)]).clamp_(min=0), 1)
        if token < len(certain):
            return token
        home.read(ids)
        aligner = aligner_of(self.model)
        self.logits = aligner.log_probs(self.model, self.name, self.reading, home.logits, LAST)
        whole = self.logits[0, -1].exp()
        # The small number is for rounding that leaves nothing
        return torch.multinomial((whole - certain).clamp_(min=0) + 1e-12 * whole, 1)

    def certain(self):
        """[vocabulary]: at least so likely is each token after what was read, whatever the home component predicts."""
        model, aligner = self.model, aligner_of(self.model)
        mapping, size = aligner.mapping(model, self.name), model.config.vocab_size
        piece = Piece(aligner, mapping, [self.reading.positions[-1]], size)
        head, nodes = model.segments.head(self.name), piece.nodes.tolist()
        logits = self.reading.logits(head, model.together(self.reading.states), nodes, True)
        with without_autocast(logits.device.type):
            probs, weight, ended = piece.ways(logits.to(torch.promote_types(model.dtype, torch.float32)))
            boundary = aligner.boundary(mapping, logits.device)
            b, a = boundary.single
            # What is shared at most, before some are left out
            total = ended[0, b].sum() + ended[0, boundary.shared].sum()
            values, numbers = boundary.likely("b", ended)
            least = ended.scatter_add(1, numbers, -MOVED * values)  # whatever the home component expects
            out = ended.new_zeros(size).index_add_(0, a, least[0, b])
            if piece.sparse is not None:
                number, node, _, b, a, group, groups, _, kept = (
                    one.to(logits.device) if isinstance(one, torch.Tensor) else one for one in piece.sparse
                )
                values = probs[node, b] * weight[number] * kept
                alone = group.bincount(minlength=groups)[group] == 1
                out.index_add_(0, a[alone], values[alone])
                total = total + values.new_zeros(groups).scatter_reduce_(0, group, values, "amax").sum()
            out[piece.never.to(out.device)] = 0
            return out * ((1 - TRUST) / total) if out.sum() > 1e-30 else torch.zeros_like(out)


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
        **model_kwargs: `attention_mask` [batch, time]; `cache`, with which a single row without padding goes on.

    Returns:
        [batch, time + new tokens], shorter rows padded on the right; or a GenerateDecoderOnlyOutput that has it, and of
        a single row without padding the cache.

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
    mask, out, begun = model_kwargs.get("attention_mask"), [], None
    for i, row in enumerate(input_ids):
        ids = row if mask is None else row[mask[i].bool()]
        if begun is None or not torch.equal(ids, begun[0]):  # else several answers to one prompt
            cache = _cache_for(model, row, ids, input_ids, model_kwargs)
            begun = ids, cache, _ask(model, ids, cache)
        cache = begun[1] if len(input_ids) == 1 else _fork(begun[1])
        out.append(_sample(model, row, ids, cache, begun[2], stopping_criteria, streamer, gate_lag))
    if streamer is not None:
        streamer.end()
    pad = generation_config._pad_token_tensor
    pad = 0 if pad is None else int(pad)
    sequences = torch.nn.utils.rnn.pad_sequence(out, batch_first=True, padding_value=pad)
    if not generation_config.return_dict_in_generate:
        return sequences
    # It lacks tokens since the gate was asked; whoever goes on with it reads them
    alone = len(input_ids) == 1 and len(begun[0]) == input_ids.shape[1]
    return GenerateDecoderOnlyOutput(sequences=sequences, cache=begun[1] if alone else None)


def _cache_for(model, row, ids, rows, given):
    """The cache that a row begins with: the caller's where it is of this row alone and holds no padding, else empty."""
    cache = given.get("cache")
    if len(rows) > 1 or len(ids) < len(row) or getattr(cache, "options", None) != (None, False, None):
        return model.make_cache()
    return cache if cache.mask is None or bool(cache.mask.all()) else model.make_cache()


def _fork(cache):
    """A copy of a hybrid's cache that can be read on by itself."""
    out = fork(cache)
    out.readers, out.kept = dict(cache.readers), dict(cache.kept)
    return out


def _sample(model, row, ids, cache, known, stopping_criteria, streamer, lag):
    shares, own, gated = known
    start, done, readers = len(ids), False, None
    while not done:
        # The hybrid's own lag counts from the beginning of the text, any other from that of what is written
        if gated and len(ids) > start and (len(ids) - (1 if model.config.holds_weights else start)) % lag == 0:
            (shares, own, _), readers = _ask(model, ids, cache), None
        if readers is None:
            copy, names = _fork(cache), model.config.component_names
            readers = {name: _Reader(model, name, copy, len(ids), own.get(name)) for name in names}
        one = readers[list(own)[int(torch.multinomial(shares, 1))]]
        token = one.draw(ids, readers.get(model.config.tokenizer_component)).to(row.device)
        ids, row = torch.cat([ids, token]), torch.cat([row, token])
        if streamer is not None:
            streamer.put(token.cpu())
        done = bool(stopping_criteria(row[None], None).all())
    return row


def _ask(model, ids, cache):
    """All components read a row [time] to its end, into a cache.

    Returns:
        (the mixture's weights [K'] of those that run, {component: its logits [1, 1, vocabulary]}, whether the weights
        depend on the token), after the last token.
    """
    config = model.config
    inputs = read_inputs(model, ids[None, cache.seen :], None, None, cache, None, True, False)
    lag = Lag(config.gate_lag, inputs, LAST) if config.holds_weights else None
    kept = LAST if lag is None else lag.places
    inputs.last = not config.reads_past_losses and (lag is None or len(kept) == 1)
    found = run(model, inputs, shared=False)
    weights, states, own = model.apply_heads(found, kept)
    past = None
    if config.reads_past_losses:
        past = partial(read_losses, model, inputs, kept, lambda places: model.apply_heads(found, places)[2])
    shares = model.mix(weights, list(states.values()), list(own.values()), past, lag)[1]
    own = {name: one[:, LAST] for name, one in own.items()}
    gated = shares is not None
    return shares[0, -1].cpu() if gated else torch.tensor([float(one) for one in weights]), own, gated


def _check(model, logits_processor, generation_config, synced_gpus, lag):
    config = model.config
    if config.num_blocks != 1 or config.embeddings != "native" or config.bridges:
        what = f"num_blocks={config.num_blocks}, embeddings={config.embeddings!r}"
        what += ", bridges between components" if config.bridges else ""
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
    wanted = [
        key
        for key in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if getattr(generation_config, key)
    ]
    if wanted or synced_gpus:
        raise ManticoreError(f"mixture_sampling does not support {wanted or ['synced_gpus']}: generate without it.")
    if model.training and model.is_activation_checkpointing:
        raise ManticoreError(
            "mixture_sampling needs a cache, and gradient checkpointing uses none while training: call model.eval()."
        )
    if type(lag) is not int or lag < 1:
        raise ManticoreError(f"gate_lag={lag!r} must be a whole number of tokens, at least 1.")
    if config.holds_weights and lag != config.gate_lag:
        raise ManticoreError(
            f"gate_lag={lag}: this hybrid's weights are kept for {config.gate_lag} tokens, as it was trained; leave it "
            "out."
        )
