"""Held-out documents, and what a model does on each of them.

Every token of a document is predicted once, the first one from what stands before a document. A document longer than a
row is read row by row, each behind a start and without the rows before it, as training rows are. Models of other
tokenizers read the same pieces of text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manticore_hf.evaluation.data import DataArguments, cut_texts, pad
from manticore_hf.evaluation.losses import text_nats
from manticore_hf.evaluation.records import KIND_COLUMN, read_records, text_of
from manticore_hf.evaluation.starts import scored_after
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.flops import count_flops

_UNIT_LIMIT = 20  # fewer documents than this carry no interval: rows are resampled instead


@dataclass
class Documents:
    """Held-out text, cut into pieces that are read by themselves, and tokenised.

    Attributes:
        rows: [(unit, ids)]; the first `start` ids are read only, all others are predicted.
        texts: The text of each row, for models of other tokenizers.
        start: Tokens before each piece.
        units: What is resampled: "document" or "row".
        kinds: The kind of text of every unit, or None.
        tokens, bytes: [units] predicted tokens, and bytes of text they stand for.
        digest: Of texts and rows.
    """

    rows: list
    texts: list
    start: int
    units: str
    kinds: list | None
    tokens: np.ndarray
    bytes: np.ndarray
    digest: str

    def __len__(self):
        return len(self.tokens)


def load_documents(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Reads held-out documents.

    Args:
        arguments: DataArguments; `block_size` is the length of a row, `max_tokens` bounds the tokens read.
        tokenizer: The hybrid's tokenizer, which cuts the text into rows for all models.

    Raises:
        ManticoreError: The source cannot be read, holds instruction data, or has no token.
    """
    if arguments.prompt_column is not None:
        raise ManticoreError("A comparison reads plain text: prompt_column must not be set for its test text.")
    documents, kinds = [], []
    for record in read_records(arguments):
        documents.append(text_of(record, arguments.text_column, arguments))
        kinds.append(record.get(KIND_COLUMN))
    start = scored_after(tokenizer)
    step, left = arguments.block_size - len(start), arguments.max_tokens
    if step < 1:
        raise ManticoreError(f"block_size={arguments.block_size} leaves no room after the {len(start)} start tokens.")
    owners, rows, texts = [], [], []
    for document, (ids, piece) in enumerate(cut_texts(documents, tokenizer, arguments.special_tokens)):
        whole = len(ids) if left is None else min(left, len(ids))
        left = left if left is None else left - whole
        for first in range(0, whole, step):
            last = min(first + step, whole)
            owners.append(document)
            rows.append([*start, *ids[first:last]])
            texts.append(piece(first, last))
    if not rows:
        raise ManticoreError(f"{arguments.data!r} holds no token to test on.")
    used = list(dict.fromkeys(owners))
    units = "document" if len(used) >= _UNIT_LIMIT else "row"
    place = {document: unit for unit, document in enumerate(used)}
    unit_of = [place[document] for document in owners] if units == "document" else list(range(len(rows)))
    kinds = [kinds[document] for document in (used if units == "document" else owners)]
    tokens, sizes = (np.zeros(len(kinds), dtype=np.int64) for _ in range(2))
    for unit, ids, text in zip(unit_of, rows, texts):
        tokens[unit] += len(ids) - len(start)
        sizes[unit] += len(text.encode())
    known = kinds if all(isinstance(kind, str) for kind in kinds) else None
    digest = hashlib.sha256(repr((texts, rows)).encode()).hexdigest()[:16]
    return Documents(list(zip(unit_of, rows)), texts, len(start), units, known, tokens, sizes, digest)


@torch.no_grad()
def score(model: PreTrainedModel, documents: Documents, batch_size: int = 16, desc: str = "Testing") -> dict[str, list]:
    """Loss and hits of a causal LM on every unit.

    Args:
        model: Of the vocabulary that the documents are tokenised for, on its device; it is left in the mode it was in.
        documents: Documents.
        batch_size: Rows per forward pass.
        desc: Label of the progress bar.

    Returns:
        {"nll": [units] sums of the negative log-probabilities in nats, "correct": [units] tokens whose most probable
        guess was right}, plain lists.
    """
    was_training, before = model.training, documents.start - 1
    model.eval()
    nll, correct = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64)
    rows = sorted(documents.rows, key=lambda row: -len(row[1]))
    for start in tqdm(range(0, len(rows), batch_size), desc=desc, unit="batch", leave=False):
        batch = rows[start : start + batch_size]
        # Padded on the right, where no causal model looks, so no mask is needed.
        ids = pad([one for _, one in batch], 0).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().cpu()
        hits = (logits.argmax(-1) == ids[:, 1:]).cpu()
        for (unit, one), loss, hit in zip(batch, losses, hits):
            nll[unit] += loss[before : len(one) - 1].sum().item()
            correct[unit] += int(hit[before : len(one) - 1].sum())
    model.train(was_training)
    return {"nll": nll.tolist(), "correct": correct.tolist()}


def score_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Documents, batch_size: int = 16
) -> dict[str, list | None]:
    """As `score`, by a model that reads the same pieces of text through its own tokenizer, behind its own start.

    Args:
        model: Any causal LM, on its device.
        tokenizer: Its tokenizer.
        documents: Documents.
        batch_size: Pieces per forward pass.

    Returns:
        {"nll": [units] nats, "correct": None: its tokens are others}.
    """
    nll = np.zeros(len(documents))
    for (unit, _), nats in zip(documents.rows, text_nats(model, tokenizer, documents.texts, batch_size)):
        nll[unit] += nats
    return {"nll": nll.tolist(), "correct": None}


def forward_flops(model: PreTrainedModel, tokens: int = 128, text: Sequence[int] | None = None) -> float:
    """FLOPs per token of a forward pass without a past, as `count_flops` counts them.

    Args:
        model: A causal LM, which is run once on its device.
        tokens: Length of the pass.
        text: Ids of a text, of which `tokens` are read. Only an aligned hybrid needs them: how many tokens its other
            components read of a text depends on the text.

    Raises:
        ManticoreError: An aligned hybrid is given no text.
    """
    if text is None and getattr(model.config, "aligned", ()):
        raise ManticoreError(
            f"Components {list(model.config.aligned)} have tokenizers of their own: what the hybrid computes for a "
            "token depends on the text, so give one."
        )
    ids = [0] * tokens if text is None else list(text)[:tokens]
    given = torch.tensor([ids], device=model.device)
    return count_flops(lambda: model(input_ids=given, use_cache=False)) / len(ids)
