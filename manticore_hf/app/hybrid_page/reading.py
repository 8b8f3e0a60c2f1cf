"""What a hybrid, and each of its components alone, makes of a text: weights, predictions, continuations, times.

Imports nothing of manticore-hf: in a Space the hybrid's classes come from its own repository. What is asked of a model
is what every hybrid has (`component`, `mixture_weights`, `segments`).
"""

import importlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.convert_slow_tokenizer import bytes_to_unicode

LONGEST = 512
"""Tokens of a text that are read."""
SHOWN = 8
"""Most likely next tokens that are kept of each model."""
PATIENCE = 120.0
"""Seconds after which a model stops writing."""
_BYTES = {letter: code for code, letter in bytes_to_unicode().items()}


@dataclass
class Reading:
    """What was found out about a text of n tokens; token i is predicted at place i, what follows the text at place n.

    Attributes:
        pieces: [n] what each token stands for; joined, the text that was read. A token that completes nothing is "".
        labels: [n] each token's name in its vocabulary.
        names: The K components.
        weights: [n + 1][K] mixture weights of the components' predictions.
        per_token: Whether these depend on the token.
        blocks: [S][K] mixture weights of the blocks, without what depends on the token.
        likely: {model: [n + 1] lists of (token, probability), the most likely first}; the hybrid is "hybrid".
        chances: {model: [n] probability of the token that is there}.
        bits: {model: bits per byte of the text}; a component with a tokenizer of its own reads through that.
        notes: Sentences for the reader.
    """

    pieces: list[str]
    labels: list[str]
    names: list[str]
    weights: list[list[float]]
    per_token: bool
    blocks: list[list[float]]
    likely: dict[str, list[list[tuple[str, float]]]]
    chances: dict[str, list[float]]
    bits: dict[str, float]
    notes: list[str] = field(default_factory=list)


@dataclass
class Written:
    """What a model wrote.

    Attributes:
        model: "hybrid", or the component.
        prompt: The part of the text that it went on from.
        text: What it wrote.
        tokens: Of its own tokenizer.
        first: Seconds to the first token: reading the prompt.
        per_token: Seconds per further token; None if there was no second one.
        parameters: That it runs for each token.
    """

    model: str
    prompt: str
    text: str
    tokens: int
    first: float
    per_token: float | None
    parameters: int


class Hybrid:
    """A hybrid, its tokenizer and its components, for one page; one thing is asked of it at a time.

    Args:
        model: A causal LM of type "manticore".
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if getattr(model.config, "model_type", None) != "manticore" or not model.can_generate():
            raise ValueError(f"A {type(model).__name__} is not a hybrid that generates text; give a causal LM.")
        self.model, self.tokenizer, self.lock = model.eval(), tokenizer, threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of the components."""
        return self.model.config.component_names

    @property
    def alone(self) -> list[str]:
        """Components that can run alone: none of a pruned hybrid, which has parts of them, nor with new embeddings."""
        config = self.model.config
        return [] if config.route or config.embeddings == "fresh" else self.names

    def describe(self) -> list[tuple[str, str, int]]:
        """[(component, its model type, parameters)]."""
        config = self.model.config
        return [(name, getattr(config, name).model_type, count(self.model.component(name))) for name in self.names]

    def tokenizer_of(self, name: str) -> PreTrainedTokenizerBase:
        """The tokenizer through which a component reads text."""
        if name not in self.model.config.aligned:
            return self.tokenizer
        # The hybrid's code: ours, or its repository's
        package = type(self.model.segments).__module__.rpartition(".")[0]
        code = importlib.import_module(f"{package}.aligned_tokenizers")
        return code.tokenizer_of(self.model, name)

    def parameters(self, name: str) -> int:
        """Parameters that are run for each token, of a component alone or of the hybrid ("hybrid")."""
        if name != "hybrid":
            return count(self.model.component(name))
        config, unused = self.model.config, {}
        fixed = [] if config.route else config.mixture_weights or []
        if config.bridges:  # by which a component without weight may be read
            running = self.model.segments.running(fixed or [[1.0] * len(self.names)])
            idle = [self.model.component(part) for part in set(self.names) - {part for part, _ in running}]
            idle += [self.model.segments.segment(*one).layers for one in set(self.model.segments.ranges) - set(running)]
            unused = {id(p): p for one in idle for p in one.parameters()}
            return count(self.model) - sum(p.numel() for p in unused.values())
        for k, part in enumerate(self.names):
            silent = [block for block, row in enumerate(fixed) if row is not None and row[k] == 0.0]
            if len(silent) == config.num_blocks:
                unused |= {id(p): p for p in self.model.component(part).parameters()}
            for block in silent:
                unused |= {id(p): p for p in self.model.segments.segment(part, block).layers.parameters()}
        return count(self.model) - sum(p.numel() for p in unused.values())

    # ---- reading -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, text: str) -> Reading:
        """Reads a text with the hybrid, and with each component.

        Args:
            text: Any text; of a long one the first LONGEST tokens are read, or fewer where the model reads fewer.

        Raises:
            ValueError: The text has no token, or there is nothing to predict its first one from.
        """
        with self.lock:
            limit = self.model.config.max_position_embeddings or LONGEST + 1
            start, ids, pieces, notes = cut(self.tokenizer, text, min(LONGEST, limit - 1))
            read, n, config = "".join(pieces), len(ids), self.model.config
            given = torch.tensor([start + ids], device=self.model.device)
            out = self.model(input_ids=given, use_cache=False)
            fixed = self.model.mixture_weights()
            row = fixed[-1 if config.embeddings == "native" or config.head_mixture == "last" else 0].tolist()
            rows = [row] * (n + 1) if out.weights is None else out.weights[0, -n - 1 :].float().tolist()
            found = Reading(
                pieces,
                [str(one) for one in self.tokenizer.convert_ids_to_tokens(ids)],
                self.names,
                rows,
                out.weights is not None,
                fixed.tolist(),
                likely={},
                chances={},
                bits={},
                notes=[*notes, *self._how_read()],
            )
            self._keep(found, "hybrid", out.logits[0, -n - 1 :], ids, read)
            del out
            for name in self.alone:
                logits = self._component(name, given)[0, -n - 1 :, : config.vocab_size]
                self._keep(found, name, logits, ids, read)
                if name in config.aligned:
                    found.bits[name] = self._own_bits(name, read)
            return found

    def _how_read(self):
        """A sentence for each component whose tokens are not the hybrid's."""
        return [
            f"{name} reads the text with its own tokenizer; what it expects is shown in the hybrid's tokens."
            for name in self.model.config.aligned
        ]

    def _component(self, name, ids):
        """Logits [1, time, vocabulary of the hybrid] of a component; of one with its own tokenizer, mapped."""
        if name not in self.model.config.aligned:
            return self.model.component(name)(input_ids=ids, use_cache=False).logits
        before = self.model.config.mixture_weights
        self.model.set_mixture_weights(name)
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            self.model.config.mixture_weights = before

    def _keep(self, found, name, logits, ids, text):
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(min(SHOWN, logprobs.shape[-1]), dim=-1)
        found.likely[name] = [
            [(token_text(self.tokenizer, number), math.exp(value)) for number, value in zip(numbers, values)]
            for numbers, values in zip(best.indices.tolist(), best.values.tolist())
        ]
        there = logprobs[:-1].gather(-1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0].double()
        found.chances[name] = there.exp().tolist()
        found.bits[name] = bits_per_byte(there, text)

    def _own_bits(self, name, text):
        tokenizer = self.tokenizer_of(name)
        limit = getattr(self.model.component(name).config, "max_position_embeddings", None) or math.inf
        start, ids, pieces, _ = cut(tokenizer, text, len(text.encode()) + 1)
        if len(start) + len(ids) > limit:
            return math.nan
        given = torch.tensor([start + ids], device=self.model.device)
        logprobs = self.model.component(name)(input_ids=given, use_cache=False).logits[0, -len(ids) - 1 : -1]
        there = logprobs.float().log_softmax(-1).gather(-1, given[0, len(start) :, None])[:, 0].double()
        return bits_per_byte(there, text)

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, text: str, tokens: int = 40, temperature: float = 0.0, seed: int = 0) -> Iterator[Written]:
        """Goes on from a text with the hybrid, then with each component alone, through its own tokenizer.

        Args:
            text: The prompt; of one that is too long, its end.
            tokens: Tokens to write at most.
            temperature: 0 takes the most likely token every time; else tokens are drawn, of the 50 most likely.
            seed: Of what is drawn, the same for every model.
        """
        for name in ("hybrid", *self.alone):
            with self.lock:
                written = self._write(name, text, tokens, temperature, seed)
            yield written

    @torch.no_grad()
    def _write(self, name, text, tokens, temperature, seed):
        tokenizer = self.tokenizer if name == "hybrid" else self.tokenizer_of(name)
        model = self.model if name == "hybrid" else self.model.component(name)
        limit = getattr(model.config, "max_position_embeddings", None)
        room = min(LONGEST, limit - tokens if isinstance(limit, int) and limit > 0 else LONGEST)
        ids = tokenizer(text, verbose=False)["input_ids"] or start_of(tokenizer)
        if room < 1:
            raise ValueError(f"{name} reads at most {limit} tokens: ask for fewer than {tokens}.")
        ids = torch.tensor([ids[-room:]], device=self.model.device)
        clock = Clock()
        set_seed(seed)
        drawn = {"temperature": float(temperature), "top_k": 50, "top_p": 1.0} if temperature > 0 else {}
        end = tokenizer.eos_token_id
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=int(tokens),
            do_sample=temperature > 0,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else end
            if end is not None
            else 0,
            max_time=PATIENCE,
            streamer=clock,
            **drawn,
        )[0].tolist()
        prompt, whole = (decode(tokenizer, part) for part in (ids[0].tolist(), out))
        new = len(out) - ids.shape[1]
        return Written(name, prompt, whole[len(prompt) :], new, *clock.times(), self.parameters(name))


class Clock:
    """What `generate` calls a streamer: notes when each token came."""

    def __init__(self):
        self.began, self.came = time.perf_counter(), []

    def put(self, value: torch.Tensor) -> None:
        """Is called with the prompt, then with each token."""
        self.came.append(time.perf_counter())

    def end(self) -> None:
        """Is called after the last token."""

    def times(self) -> tuple[float, float | None]:
        """(seconds to the first token, seconds per further one or None)."""
        came = self.came[1:]  # without the prompt
        return came[0] - self.began, (came[-1] - came[0]) / (len(came) - 1) if len(came) > 1 else None


def count(model: torch.nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def bits_per_byte(logprobs: torch.Tensor, text: str) -> float:
    """Of log-probabilities [n] in nats."""
    return -float(logprobs.sum()) / math.log(2) / len(text.encode())


# ---- tokens as text --------------------------------------------------------------------------------------------------


def start_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a text's first token is predicted after, where the tokenizer itself puts nothing before a text.

    Raises:
        ValueError: It has no such token.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise ValueError("The tokenizer has no start or end token to predict a text's first token from.")


def cut(
    tokenizer: PreTrainedTokenizerBase, text: str, longest: int
) -> tuple[list[int], list[int], list[str], list[str]]:
    """Cuts a text into tokens.

    Args:
        tokenizer: The tokenizer.
        text: Any text.
        longest: Most tokens to keep, those before the text included.

    Returns:
        (ids that stand before the text, ids of the text, what each of these stands for, sentences for the reader).

    Raises:
        ValueError: The text has no token.
    """
    quick = tokenizer.is_fast
    # The name of a special token in a text is text, as where losses are measured
    how = {"split_special_tokens": True, "return_special_tokens_mask": True, "verbose": False}
    found = tokenizer(text, return_offsets_mapping=quick, **how)
    ids, special = found["input_ids"], found["special_tokens_mask"]
    begin = next((i for i, added in enumerate(special) if not added), len(ids))
    stop = next((i for i in range(begin, len(ids)) if special[i]), len(ids)) if quick else len(ids)
    start, whole = ids[:begin] or start_of(tokenizer), ids[begin:stop]
    kept = whole[: max(1, longest - len(start))]
    if not kept:
        raise ValueError("There is no text to read.")
    if quick:
        pieces, at = [], 0
        for _, end in found["offset_mapping"][begin : begin + len(kept)]:  # bytes of one letter all have its place
            pieces.append(text[at:end])
            at = max(at, end)
        if len(kept) == len(whole):
            pieces[-1] += text[at:]
    else:
        pieces = [token_text(tokenizer, one) for one in kept]
    notes = []
    if len(kept) < len(whole):
        notes.append(f"Only the first {len(kept)} of {len(whole):,} tokens are read.")
    return start, kept, pieces, notes


def token_text(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """What a token stands for, with a space before it where it has one; bytes or its name where it is no text."""
    name = str(tokenizer.convert_ids_to_tokens(number))
    text = tokenizer.decode([number])
    if name.startswith("\u2581") and not text.startswith(" "):
        text = " " + text
    if text and "\ufffd" not in text:
        return text
    codes = [_BYTES.get(letter) for letter in name]  # part of a letter, as byte-level tokenizers write it
    return name if None in codes or name.isascii() else "".join(f"<0x{code:02X}>" for code in codes)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Tokens as text, without special ones."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
