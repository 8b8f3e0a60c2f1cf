"""Losses on held-out text: a hybrid's number is never given without its baselines'.

Every text is read by itself, as `separate` takes packed rows apart, so that a loss does not depend on how a model
treats rows of several texts. `measure` predicts every byte, so that models of other tokenizers take part.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from manticore_hf.evaluation.data import NO_LOSS, DataArguments, length_batches, pad, separate, text_rows
from manticore_hf.evaluation.metrics.scoring import LOGITS, token_logprobs
from manticore_hf.evaluation.starts import scored_after
from manticore_hf.evaluation.statistics import bootstrap
from manticore_hf.modeling.past_losses import MOST, decayed_sums, online_weights
from manticore_hf.utils.claims import CLAIM_ROWS
from manticore_hf.utils.claims import ONLINE as ONLINE
from manticore_hf.utils.distributed import all_reduce, bar, component_runner, is_sharded, shares
from manticore_hf.utils.renamed import takes_old_name

_UNITS = CLAIM_ROWS, 500  # fewest that are resampled for an interval, and about how many are enough
_MOST_KINDS = 12  # of text: more are no split that a table can show


@takes_old_name("rivals", "baselines")
def compare_losses(
    model: PreTrainedModel, dataset: Dataset, batch_size: int = 16, desc: str = "Evaluating", baselines: bool = True
) -> dict[str, float]:
    """Mean next-token loss of a hybrid, each component alone, their plain ensemble and online mixture, in one pass.

    Several processes each run a share of the rows; all of them must call this.

    Args:
        model: A hybrid; without baselines any causal LM, which counts as "hybrid".
        dataset: Rows of `input_ids`, as `pack` or `mask_prompts` make them; every text in a row is read by itself, and
            tokens without a label have no loss.
        batch_size: Blocks per forward pass.
        desc: Label of the progress bar.
        baselines: Also run the components; False where their losses on this text are known already.

    Returns:
        {component name: loss, ..., "ensemble": loss, "online mixture": loss, "hybrid": loss} in nats per token; the
        ensemble is the normalised geometric mean of the components' distributions with equal weights, the online
        mixture as in `online_nats`. A pruned hybrid has lost parts of its
        components, and one with new embeddings gives its components embeddings that are not theirs, so only "hybrid"
        is there: their baselines come from the hybrid before pruning, or from the original components.
    """
    rows = separate(dataset)
    nats = _row_nats(model, rows, batch_size, desc, baselines)
    count = sum(label != NO_LOSS for labels in rows["labels"] for label in labels[1:])
    return {name: float(values.sum()) / count for name, values in nats.items()}


def inner_baselines(model: PreTrainedModel) -> list[str]:
    """Names of the components that are baselines as they are inside a hybrid, [] where they are none there."""
    config = model.config
    return [] if config.route or config.embeddings == "fresh" else config.component_names


@torch.no_grad()
def _row_nats(model, rows, batch_size, desc, baselines):
    """{model: [rows] nats}: of the hybrid, and of its components, their ensemble and online mixture."""
    was_training, names = model.training, inner_baselines(model) if baselines else []
    model.eval()
    order = [*names, *(["ensemble", ONLINE] if names else []), "hybrid"]
    sums = torch.zeros(len(order), len(rows), dtype=torch.float64)
    runners = {name: component_runner(model, name) for name in names}
    batches = _batches(rows, batch_size, model.config)
    for numbers, share in bar(list(shares(batches)), desc=desc, unit="batch", leave=False):
        ids, nats = _batch(rows, numbers, model.device)
        found, mean, own = {}, None, []
        logits, parts = _mixture_and_parts(model, ids, names)
        found["hybrid"] = nats(logits)
        del logits  # gigabytes, as are those below
        for name in names:
            logprobs = parts.pop(name) if parts else runners[name](input_ids=ids, use_cache=False).logits
            logprobs = logprobs[..., : model.config.vocab_size].float().log_softmax(-1)  # without rows that only pad
            found[name] = nats(logprobs)
            own.append(_token_nats(logprobs, ids))
            mean = logprobs / len(names) if mean is None else mean.add_(logprobs, alpha=1 / len(names))
        if names:
            found["ensemble"] = nats(mean)
            del logprobs, mean
            found[ONLINE] = nats(online=online_nats(torch.stack(own, -1), model.config))
        if share:
            sums[:, numbers] = torch.stack([found[name] for name in order])
    model.train(was_training)
    sums = all_reduce(sums.to(model.device)).cpu() if torch.distributed.is_initialized() else sums
    return dict(zip(order, sums.numpy()))


def _mixture_and_parts(model, ids, names):
    """(A hybrid's logits, {component: its own, as if it ran alone}); the latter is {} where its pass has no such."""
    config = model.config
    alone = bool(names) and config.num_blocks == 1 and config.embeddings == "native"
    if not alone or config.bridges or config.holds_weights or is_sharded(model):
        return model(input_ids=ids, use_cache=False).logits, {}
    seen, mix = [], model.mix

    def watched(weights, states, own, *rest):
        seen.extend(own)
        return mix(weights, states, own, *rest)

    model.mix = watched
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        del model.mix
    return logits, dict(zip(names, seen)) if len(seen) == len(names) else {}  # components of weight 0 have not run


def _batches(rows, batch_size, config):
    """`length_batches` of rows, as large as one model's predictions have room for."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    fits = LOGITS // (max(lengths, default=1) * config.vocab_size)
    return length_batches(lengths, max(1, min(batch_size, fits)))


def _batch(rows, numbers, device):
    """(ids [batch, time] of some rows, function from logits of them, or nats of each token, to [batch] nats)."""
    part = rows[numbers]
    ids, labels = pad(part["input_ids"], 0).to(device), pad(part["labels"], NO_LOSS)[:, 1:].to(device)

    def nats(logits=None, online=None):
        if online is not None:
            return online.masked_fill(labels == NO_LOSS, 0.0).double().sum(1).cpu()
        logits = logits[:, :-1].float()
        losses = logits.logsumexp(-1) - logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return losses.masked_fill(labels == NO_LOSS, 0.0).double().sum(1).cpu()

    return ids, nats


def _token_nats(logprobs, ids):
    """[batch, time - 1] nats of each token but the first."""
    return -logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def online_nats(nats: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """What the online mixture of models loses: weighed by what each has lost on the tokens before (`past_losses`).

    Everybody who has the models has it, without any training.

    Args:
        nats: [batch, time, K] of each token, by each model.
        config: A hybrid's, for eta, decay and share; the prior is uniform, and probabilities are mixed.

    Returns:
        [batch, time] nats.
    """
    sums = decayed_sums(nats.clamp(max=MOST), torch.full_like(nats, config.online_decay))
    prior = nats.new_full(nats.shape[-1:], 1 / nats.shape[-1])
    weights = online_weights(prior, F.pad(sums[:, :-1], (0, 0, 1, 0)), config.online_eta, config.online_share)
    return -(weights.log() - nats).logsumexp(-1)


# ---- in bits per byte ------------------------------------------------------------------------------------------------


@dataclass
class Passages:
    """Texts to measure models on, and how the hybrid's tokenizer cuts them.

    Attributes:
        texts: What is predicted, all of it.
        prompts: What is read before each text; "" for nothing.
        rows: Dataset of `input_ids` (a start, the prompt, the text) and `labels` (-100 but for the text).
        tokens, bytes: [passages] of the texts.
        kinds: The kind of text of each, None where it is unknown.
    """

    texts: list[str]
    prompts: list[str]
    rows: Dataset
    tokens: np.ndarray
    bytes: np.ndarray
    kinds: list[str | None]

    def __len__(self) -> int:
        return len(self.texts)


def make_passages(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Passages:
    """The texts of rows, each after a start, so that every byte of it is paid for, and without an end.

    Args:
        rows: As `load_rows` makes them with `keep_text`.
        tokenizer: That they were made with.
    """
    start = scored_after(tokenizer)
    texts, kinds, prompts, out = [], [], [], {"input_ids": [], "labels": []}
    for text, kind, prompt, before, ids in text_rows(rows, tokenizer):
        texts.append(text)
        kinds.append(kind)
        prompts.append(prompt)
        before = [*start, *before]
        out["input_ids"].append(before + ids)
        out["labels"].append([NO_LOSS] * len(before) + ids)
    counts = [sum(label != NO_LOSS for label in labels) for labels in out["labels"]]
    sizes = [len(text.encode()) for text in texts]
    return Passages(texts, prompts, Dataset.from_dict(out), np.array(counts), np.array(sizes), kinds)


@dataclass
class Measured:
    """What models lose on passages.

    Attributes:
        nats: {model: [passages] negative log-probabilities of the texts}.
        tokens, bytes: [passages], tokens as the hybrid's tokenizer cuts them.
        missing: {model: why it was not measured}.
        kinds: [passages] the kind of text of each, None where it is unknown.
    """

    nats: dict[str, np.ndarray]
    tokens: np.ndarray
    bytes: np.ndarray
    missing: dict[str, str] = field(default_factory=dict)
    kinds: Sequence[str | None] = ()

    @property
    def losses(self) -> dict[str, float]:
        """Nats per token of the hybrid's tokenizer; of models of other tokenizers, too, so that they compare."""
        return {name: float(values.sum() / self.tokens.sum()) for name, values in self.nats.items()}

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Bits per byte of each model."""
        return {name: float(values.sum() / self.bytes.sum() / np.log(2)) for name, values in self.nats.items()}

    @property
    def by_kind(self) -> dict[str, dict[str, float]]:
        """{kind of text: {model: bits per byte on it}}; {} where one is unknown, or they are one or many."""
        kinds = np.array([kind or "" for kind in self.kinds])
        names = sorted(set(kinds.tolist()))
        if not 1 < len(names) <= _MOST_KINDS or "" in names:
            return {}
        out = {}
        for name in names:
            mine = kinds == name
            nats = {model: values[mine] for model, values in self.nats.items()}
            out[name] = Measured(nats, self.tokens[mine], self.bytes[mine]).bits_per_byte
        return out

    def differences(self, own: str = "hybrid") -> dict[str, list[float | None]]:
        """{baseline: [its bits per byte minus the hybrid's, low, high]}, with the 95 % interval of the bootstrap.

        Passages that follow each other are resampled together where there are many; of too few there is no interval
        (None, None).
        """
        least, most = _UNITS
        parts = np.array_split(np.arange(len(self.bytes)), min(most, len(self.bytes)))
        sizes = np.array([self.bytes[part].sum() for part in parts])
        out = {}
        for name, values in self.nats.items():
            if name != own:
                gain = (values - self.nats[own]) / np.log(2)
                sums = np.array([gain[part].sum() for part in parts])
                pair = bootstrap(sums, sizes) if len(parts) >= least else (None, None)
                out[name] = [float(sums.sum() / sizes.sum()), *pair]
        return out

    def to_dict(self, own: str = "hybrid") -> dict[str, Any]:
        """Plain values, as `evaluation.json` and `stage.json` have them."""
        return {
            "tokens": int(self.tokens.sum()),
            "bytes": int(self.bytes.sum()),
            "rows": len(self.bytes),
            "losses": self.losses,
            "bits_per_byte": self.bits_per_byte,
            "differences": self.differences(own),
            "missing": self.missing,
            **({"by_kind": found} if (found := self.by_kind) else {}),
        }


def measure(
    model: PreTrainedModel, passages: Passages, batch_size: int = 8, desc: str = "Evaluating", baselines: bool = True
) -> Measured:
    """What a hybrid, its components (by their own heads inside it) and two mixtures of those lose on passages.

    The mixtures are their plain ensemble and their online mixture, which needs no training either.

    Args:
        model, batch_size, desc, baselines: As `compare_losses` takes them; on every rank.
        passages: Passages.
    """
    nats = _row_nats(model, passages.rows, batch_size, desc, baselines)
    return Measured(nats, passages.tokens, passages.bytes, kinds=passages.kinds)


def own_nats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Passages,
    batch_size: int = 8,
    progress: bool = True,
) -> np.ndarray:
    """[passages] nats of any causal LM that reads the texts through its own tokenizer, behind its own start.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        passages: Passages.
        batch_size: Texts per forward pass.
        progress: Show a progress bar.

    Raises:
        ManticoreError: Its tokenizer does not know a piece of a text.
    """
    return text_nats(model, tokenizer, passages.texts, batch_size, passages.prompts, progress)


def text_nats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 8,
    prompts: Sequence[str] | None = None,
    progress: bool = True,
) -> np.ndarray:
    """[texts] nats, as `own_nats`; a text that is longer than the model reads is read in windows that overlap by half.

    Args:
        model, tokenizer, batch_size, progress: As `own_nats` takes them.
        texts: Texts.
        prompts: What is read before each, and not scored.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 1 else None
    scores = token_logprobs(
        model,
        tokenizer,
        texts,
        batch_size=batch_size,
        max_length=longest,
        stride=longest and longest // 2,
        prompts=prompts,
        progress=progress,
    )
    return np.array([-sum(values) for values in scores])


def ensemble_nats(
    models: Sequence[Callable], passages: Passages, config: PreTrainedConfig, batch_size: int = 8
) -> dict[str, np.ndarray]:
    """{"ensemble", "online mixture": [passages] nats} of models that share the hybrid's tokenizer.

    Args:
        models: Causal LMs.
        passages: Passages.
        config: The hybrid's, for the size of its vocabulary and for `online_nats`.
        batch_size: Passages per forward pass.
    """
    out, device = {name: np.zeros(len(passages)) for name in ("ensemble", ONLINE)}, models[0].device
    with torch.no_grad():
        for numbers in _batches(passages.rows, batch_size, config):
            ids, nats = _batch(passages.rows, numbers, device)
            logits = [one(input_ids=ids, use_cache=False).logits[..., : config.vocab_size] for one in models]
            logprobs = [one.float().log_softmax(-1) for one in logits]
            own = torch.stack([_token_nats(one, ids) for one in logprobs], -1)
            out["ensemble"][numbers] = nats(sum(logprobs) / len(models)).numpy()
            out[ONLINE][numbers] = nats(online=online_nats(own, config)).numpy()
    return out


def name_of(data: DataArguments) -> str:
    """What a text is called: its repository, or the name of its file."""
    local = Path(data.data)
    return local.name if os.path.exists(local) else data.data


def how_measured(data: DataArguments) -> str:
    """A sentence on how losses on a text were measured."""
    part, rows = "All of it", f"in rows of at most {data.block_size} tokens"
    if data.validation_split is not None:
        part = f"Its split {data.validation_split!r}"
    elif data.validation_fraction:
        part = f"{data.validation_fraction:.0%} of it, held out"
    elif data.max_tokens is not None:
        part = f"At most {data.max_tokens:,} tokens of it"
    if data.one_per_row or data.prompt_column is not None:
        rows = f"each record cut at {data.block_size} tokens"
    return (
        f"{part}, {rows}. Each component predicts with its own head inside this hybrid; the ensemble is their plain "
        "mean; the online mixture's weights follow their losses on the preceding tokens; an original component reads "
        "the same text through its own tokenizer, untrained. Nats per token are per token of the hybrid's tokenizer."
    )
