"""From a model and texts to what the metrics take: log-probabilities of every token, batched.

    texts = ["First text.", "Second text."]
    scores = token_logprobs(model, tokenizer, texts)
    load_metric("token_loss").compute(predictions=scores, references=texts)

`manticore-hf evaluate` packs texts into blocks and compares a hybrid with its baselines on them; here every text stands
alone, every one of its tokens is predicted, and models of different tokenizers compare in bits per byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manticore_hf.evaluation.starts import scored_after
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.tokenizers import tokenise

LOGITS = 2**27
"""Numbers of the logits of a batch, at most, where more than one row is read: half a GiB in float32."""
METRICS = ("mad_accuracy", "token_loss")


def load_metric(name: str, **options: Any) -> Any:
    """Loads a metric of this package; reads the script that is installed with it, and no network.

    Args:
        name: "token_loss" or "mad_accuracy".
        **options: As `evaluate.load` (`keep_in_memory`, `cache_dir`, `num_process`, ...).

    Returns:
        The `evaluate.Metric`; its `inputs_description` says what it takes and returns.

    Raises:
        ManticoreError: There is no metric of that name.
        ImportError: `evaluate` is not installed.
    """
    if name not in METRICS:
        raise ManticoreError(f"There is no metric {name!r} here; there are {list(METRICS)}.")
    try:
        import evaluate
    except ImportError as err:
        raise ImportError(
            f"The metric {name!r} needs the package evaluate, which cannot be imported ({err}): "
            "pip install 'manticore-hf[evaluate]'."
        ) from err
    return evaluate.load(str(Path(__file__).parent / name), **options)


@dataclass(frozen=True)
class _Window:
    """What one row of a batch reads and scores."""

    text: int  # whose tokens these are
    ids: list
    first: int  # the first of them that is scored; all after it are, too
    start: int  # where its log-probability goes among those of the text


def token_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    stride: int | None = None,
    start_token_id: int | None = None,
    prompts: Sequence[str] | None = None,
    progress: bool = True,
) -> list[list[float]]:
    """Log-probabilities of every token of every text, by any causal LM of Transformers.

    Every token of a text is predicted, the first one from a start token, so that the bytes of a text are all paid for
    and bits per byte compare between tokenizers. The start is what the tokenizer itself puts before a text; where it
    puts nothing, its bos_token, or else its eos_token, which is what stands before a document where documents are
    packed. The start itself, and what the tokenizer puts after a text, is not scored.

    Args:
        model: A hybrid or any other causal LM, on its device. It is run in evaluation mode and left as it was.
        tokenizer: Its tokenizer.
        texts: List of texts. Duplicates are scored as often as they occur; an empty text has no token.
        batch_size: Texts (or windows of long ones) per forward pass. They are sorted by length and padded on the
            right, where no causal model looks.
        max_length: Most tokens that the model reads at once, the start included; None for the configuration's
            `max_position_embeddings` (no limit where there is none, as for Mamba).
        stride: How a longer text is read; None: it raises. The first max_length tokens are read at once; then each
            pass scores the next `stride` tokens, with the start and as many of the tokens before them as max_length
            allows. So every token sees max_length - stride tokens or more, from the start of the text on if it is no
            further away; a smaller stride costs more passes and gives lower losses.
        start_token_id: Id of another start token.
        prompts: For each text what is read before it and not scored, after the start; it counts to max_length.
        progress: Show a progress bar.

    Returns:
        For each text the list of its tokens' log-probabilities (natural logarithm, a softmax in float32), in order.

    Raises:
        ManticoreError: A text is longer than max_length and there is no stride, has a token that the tokenizer does
            not know, or an argument is out of range.
    """
    if isinstance(texts, str):
        raise ManticoreError("texts is one str; give a list of them.")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ManticoreError(f"texts[{i}] is of type {type(text).__name__}; give a list of str.")
    if max_length is None:
        max_length = getattr(model.config, "max_position_embeddings", None)
    _check_sizes(batch_size, max_length, stride)
    windows, scores = [], []
    before = [[]] * len(texts)
    if prompts is not None:
        before = [_bare(tokenizer, [prompt])[0] if prompt else [] for prompt in prompts]
    for i, (start, ids) in enumerate(tokens_with_start(tokenizer, texts, start_token_id)):
        windows += _windows(i, start, before[i], ids, max_length, stride)
        scores.append([0.0] * len(ids))
    # The longest first: where memory is too small, that shows at once.
    windows.sort(key=lambda window: -len(window.ids))
    was_training = model.training
    model.eval()
    try:
        batches, rows = [], getattr(model.config, "vocab_size", None) or 1
        for window in windows:  # the first of a batch is its longest
            fits = batches and (len(batches[-1]) + 1) * len(batches[-1][0].ids) * rows <= LOGITS
            if not fits or len(batches[-1]) == batch_size:
                batches.append([])
            batches[-1].append(window)
        for batch in tqdm(batches, desc="Scoring", unit="batch", leave=False, disable=not progress):
            for window, values in zip(batch, _score(model, batch)):
                scores[window.text][window.start : window.start + len(values)] = values
    finally:
        model.train(was_training)
    return scores


def _check_sizes(batch_size, max_length, stride):
    if batch_size < 1:
        raise ManticoreError(f"batch_size={batch_size} must be at least 1.")
    if max_length is not None and max_length < 2:
        raise ManticoreError(f"max_length={max_length} must be at least 2: one token to read and one to predict.")
    if stride is None:
        return
    if max_length is None:
        raise ManticoreError(
            f"stride={stride} needs a max_length, because this model's configuration has no limit: give one, or no "
            "stride."
        )
    if not 1 <= stride < max_length:
        raise ManticoreError(
            f"stride={stride} must be at least 1 and less than max_length={max_length}, so that every token sees one "
            "before it; max_length // 2 is usual."
        )


def tokens_with_start(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], start_token_id: int | None
) -> list[tuple[list[int], list[int]]]:
    """[(start tokens, tokens of the text)] of every text."""
    if not texts:
        return []
    bare = _bare(tokenizer, texts)
    unknown = tokenizer.unk_token_id
    for i, (text, ids) in enumerate(zip(texts, bare)):
        # GPT-2 calls its end-of-text token unknown, too; one that is written out in the text is known.
        if unknown is not None and (lost := ids.count(unknown) - text.count(tokenizer.unk_token)) > 0:
            raise ManticoreError(
                f"texts[{i}] has {lost} piece(s) that the tokenizer does not know; the probability of "
                f"{tokenizer.unk_token!r} is not that of what it stands for. Leave the text out, or write "
                f"{tokenizer.unk_token!r} for them."
            )
    # What stands before a text is the same for every one, so one text shows it.
    shown = next((i for i, ids in enumerate(bare) if ids), None)
    if shown is None:
        return [([], ids) for ids in bare]
    start = [start_token_id] if start_token_id is not None else scored_after(tokenizer, texts[shown])
    return [(start, ids) for ids in bare]


def _bare(tokenizer, texts):
    """Tokens of texts alone; the name of a special token in a text is the characters it is written with."""
    return tokenise(tokenizer, texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _windows(i, start, prompt, ids, max_length, stride):
    if not ids:
        return []
    whole, begin_with = prompt + ids, len(start)
    if max_length is None or begin_with + len(whole) <= max_length:
        return [_Window(i, start + whole, begin_with + len(prompt), 0)]
    if stride is None:
        raise ManticoreError(
            f"texts[{i}] has {begin_with + len(whole)} tokens, its start included, more than max_length={max_length}: "
            f"give stride={max_length // 2} to read it in overlapping windows, a larger max_length if the model can "
            "read more, or a shorter text."
        )
    room = max_length - begin_with
    if len(prompt) >= room:
        raise ManticoreError(
            f"max_length={max_length} leaves no room after the {begin_with + len(prompt)} start tokens."
        )
    windows = [_Window(i, start + whole[:room], begin_with + len(prompt), 0)]
    step = min(stride, room)
    for done in range(room, len(whole), step):
        end = min(done + step, len(whole))
        begin = end - room
        # Behind the start again: some models (Gemma) read a text without it far worse
        windows.append(_Window(i, start + whole[begin:end], begin_with + done - begin, done - len(prompt)))
    return windows


@torch.no_grad()
def _score(model, windows):
    """For each window the log-probabilities of the tokens that it scores."""
    longest = max(len(window.ids) for window in windows)
    # Zero is a token of every vocabulary; a tokenizer's padding token may have no row in the model.
    ids = torch.tensor([window.ids + [0] * (longest - len(window.ids)) for window in windows])
    mask = torch.tensor([[1] * len(window.ids) + [0] * (longest - len(window.ids)) for window in windows])
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    values = []
    for row, window in enumerate(windows):
        # Row by row, so that not the whole batch exists in float32 a second time
        scored = slice(window.first, len(window.ids))
        before = slice(window.first - 1, len(window.ids) - 1)
        logprobs = logits[row, before].float().log_softmax(-1)
        values.append(logprobs.gather(-1, ids[row, scored].to(logits.device)[:, None])[:, 0].tolist())
    return values
