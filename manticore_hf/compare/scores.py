"""Held-out documents, and what a model does on each of them.

Every token of a document is predicted once, the first one from the token that stands before a document. A document
longer than a row is read row by row, each without the rows before it, as training rows are.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manticore_hf.evaluation.data import DataArguments, read_records, text_of
from manticore_hf.evaluation.metrics.scoring import tokens_with_start
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.flops import count_flops

KIND_COLUMN = "kind"  # where records have it, losses are also given for each kind of text
_UNIT_LIMIT = 20  # fewer documents than this carry no interval: rows are resampled instead


@dataclass
class Documents:
    """Held-out text, tokenised.

    Attributes:
        rows: [(unit, ids)]; the first id is read only, all others are predicted.
        units: What is resampled: "document" or "row".
        kinds: The kind of text of every unit, or None.
        tokens, bytes: [units] predicted tokens, and bytes of text they stand for (0 for every unit but the first of
            a document where units are rows).
        digest: Of texts and rows.
    """

    rows: list
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
        tokenizer: The tokenizer that all models of a comparison share.

    Raises:
        ManticoreError: The source cannot be read, holds instruction data, or has no token.
    """
    if arguments.prompt_column is not None:
        raise ManticoreError("A comparison reads plain text: prompt_column must not be set for its test text.")
    texts, kinds = [], []
    for record in read_records(arguments):
        texts.append(text_of(record, arguments.text_column, arguments))
        kinds.append(record.get(KIND_COLUMN))
    rows, lengths, left = [], [], arguments.max_tokens
    for document, (start, ids) in enumerate(tokens_with_start(tokenizer, texts, None)):
        ids = ids if left is None else ids[:left]
        left = left if left is None else left - len(ids)
        whole, step = [*start[-1:], *ids], arguments.block_size - 1
        rows += [(document, whole[first : first + step + 1]) for first in range(0, len(ids), step)]
        lengths.append(len(ids))
    if not rows:
        raise ManticoreError(f"{arguments.data!r} holds no token to test on.")
    sizes = [len(text.encode()) for text in texts]
    used = [document for document, length in enumerate(lengths) if length]
    units = "document" if len(used) >= _UNIT_LIMIT else "row"
    if units == "document":
        place = {document: unit for unit, document in enumerate(used)}
        rows = [(place[document], ids) for document, ids in rows]
        kinds, counted = [kinds[one] for one in used], [sizes[one] for one in used]
    else:
        first = {document: row for row, (document, _) in reversed(list(enumerate(rows)))}
        counted = [sizes[document] if first[document] == row else 0 for row, (document, _) in enumerate(rows)]
        kinds = [kinds[document] for document, _ in rows]
        rows = [(row, ids) for row, (_, ids) in enumerate(rows)]
    tokens = np.zeros(len(counted), dtype=np.int64)
    for unit, ids in rows:
        tokens[unit] += len(ids) - 1
    if arguments.max_tokens is not None and left <= 0:
        counted = [0] * len(counted)  # the last text was cut: its bytes are not those of its tokens
    known = kinds if all(isinstance(kind, str) for kind in kinds) else None
    digest = hashlib.sha256(repr((texts, rows)).encode()).hexdigest()[:16]
    return Documents(rows, units, known, tokens, np.array(counted, dtype=np.int64), digest)


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
    was_training = model.training
    model.eval()
    nll, correct = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64)
    rows = sorted(documents.rows, key=lambda row: -len(row[1]))
    for start in tqdm(range(0, len(rows), batch_size), desc=desc, unit="batch", leave=False):
        batch = rows[start : start + batch_size]
        longest = len(batch[0][1])
        ids = torch.tensor([one + [0] * (longest - len(one)) for _, one in batch], device=model.device)
        # Padded on the right, where no causal model looks, so no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().cpu()
        hits = (logits.argmax(-1) == ids[:, 1:]).cpu()
        for (unit, one), loss, hit in zip(batch, losses, hits):
            nll[unit] += loss[: len(one) - 1].sum().item()
            correct[unit] += int(hit[: len(one) - 1].sum())
    model.train(was_training)
    return {"nll": nll.tolist(), "correct": correct.tolist()}


def forward_flops(model: PreTrainedModel, tokens: int = 128) -> float:
    """FLOPs per token of a forward pass without a past, as `count_flops` counts them.

    Args:
        model: A causal LM, which is run once on its device.
        tokens: Length of the pass.
    """
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    return count_flops(lambda: model(input_ids=ids, use_cache=False)) / tokens
