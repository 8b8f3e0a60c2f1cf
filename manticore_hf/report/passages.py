"""Where a hybrid gains or loses most against a baseline: tokens with their context, kinds of token, documents."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from manticore_hf.report.measure import scored_positions

_BEFORE, _AFTER, _SHOWN = 24, 8, 320


def documents_of(rows: Dataset, end: int, start: int = 0) -> tuple[torch.Tensor, dict[int, list[int]]]:
    """Document of each scored token: [n] numbers from 0, in order, and {number: its token ids}.

    Packed rows are cut at the end-of-text token; a document that is longer than a row counts once for each row it
    has a piece in, because a row is read by itself.

    Args:
        rows: Held-out rows.
        end: Id of the end-of-text token.
        start: How many tokens stand before every row's text, and are left out.
    """
    row, position = scored_positions(rows)
    numbers, texts, found, ids = [], {}, {}, list(rows["input_ids"])
    starts = [_starts(one, end) for one in ids]
    for r, p in zip(row.tolist(), position.tolist()):
        piece = bisect.bisect_right(starts[r], p) - 1
        number = found.setdefault((r, piece), len(found))
        if number not in texts:
            bounds = [*starts[r], len(ids[r])]
            texts[number] = ids[r][max(start, bounds[piece]) : bounds[piece + 1]]
        numbers.append(number)
    return torch.tensor(numbers), texts


def _starts(ids, end):
    return [0] + [i + 1 for i, token in enumerate(ids[:-1]) if token == end]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What a token stands for, with the space before it, which SentencePiece's decoders leave out of single tokens."""
    text = tokenizer.decode([token])
    begun = str(tokenizer.convert_ids_to_tokens(token)).startswith("\u2581") and not text.startswith(" ")
    return f" {text}" if begun else text


def document_gains(gain: torch.Tensor, documents: torch.Tensor) -> list[tuple[int, float, int]]:
    """Sums per-token gains over documents.

    Args:
        gain: [n] loss of the baseline minus loss of the hybrid, nats.
        documents: [n] document of each token.

    Returns:
        [(document, sum of gains in nats, tokens)], the largest gain first.
    """
    count = int(documents.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, documents, gain.double())
    tokens = torch.bincount(documents, minlength=count)
    order = sums.argsort(descending=True, stable=True).tolist()
    return [(number, sums[number].item(), int(tokens[number])) for number in order]


def kind_gains(gain: torch.Tensor, targets: torch.Tensor) -> list[tuple[int, float, int]]:
    """Sums per-token gains over all occurrences of a token.

    Args:
        gain: [n] loss of the baseline minus loss of the hybrid, nats.
        targets: [n] ids of the tokens.

    Returns:
        [(token id, sum of gains in nats, occurrences)], the largest gain first.
    """
    kinds, index, counts = targets.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(kinds), dtype=torch.float64).index_add_(0, index, gain.double())
    order = sums.argsort(descending=True, stable=True).tolist()
    return [(int(kinds[i]), sums[i].item(), int(counts[i])) for i in order]


def where_it_differs(
    losses: Mapping[str, torch.Tensor],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    gate: torch.Tensor | None = None,
    names: Sequence[str] = (),
    start: int = 0,
    top_tokens: int = 6,
    top_documents: int = 3,
) -> dict[str, Any]:
    """Where the hybrid gains or loses most against each baseline.

    Args:
        losses: As `token_losses` gives them.
        rows: The rows they were measured on.
        tokenizer: The hybrid's.
        gate: The token gate's weights [n, K], or None.
        names: The components, in the gate's order.
        start: How many tokens stand before every row's text: they are not shown.
        top_tokens, top_documents: How many to show each way.

    Returns:
        {baseline: {"gain": mean, nats per token, "better": share of tokens the hybrid predicts better, "tokens": ...,
        "kinds": ..., "documents": {"gains": [...], "loses": [...]}}}; the sums of all documents' gains make the mean.
    """
    row, position = scored_positions(rows)
    documents, texts = documents_of(rows, tokenizer.eos_token_id, start)
    row_ids = list(rows["input_ids"])
    targets = torch.tensor([row_ids[r][p] for r, p in zip(row.tolist(), position.tolist())])

    def token(i, gain):
        ids, p = row_ids[int(row[i])], int(position[i])
        return {
            "before": tokenizer.decode(ids[max(start, p - _BEFORE) : p]),
            "token": token_text(tokenizer, ids[p]),
            "after": tokenizer.decode(ids[p + 1 : p + 1 + _AFTER]),
            "gain": gain[i].item(),
            **({} if gate is None else {"gate": dict(zip(names, gate[i].tolist()))}),
        }

    def document(number, total, count):
        mine = documents == number
        text = tokenizer.decode(texts[number])
        return {
            "text": text[:_SHOWN],
            "cut": len(text) > _SHOWN,
            "gain": total,
            "per_token": total / count,
            "tokens": count,
            **({} if gate is None else {"gate": dict(zip(names, gate[mine].mean(0).tolist()))}),
        }

    def both_ends(ordered, count, make):
        gains, loses = [x for x in ordered if x[1] > 0][:count], [x for x in reversed(ordered) if x[1] < 0][:count]
        return {"gains": [make(*x) for x in gains], "loses": [make(*x) for x in loses]}

    out = {}
    for baseline in losses:
        if baseline == "hybrid":
            continue
        gain = losses[baseline] - losses["hybrid"]
        order = gain.argsort(descending=True, stable=True).tolist()
        out[baseline] = {
            "gain": gain.mean().item(),
            "better": (gain > 0).double().mean().item(),
            "tokens": both_ends([(i, gain[i].item()) for i in order], top_tokens, lambda i, _, g=gain: token(i, g)),
            "kinds": both_ends(
                kind_gains(gain, targets),
                top_tokens,
                lambda kind, total, count: {"token": token_text(tokenizer, kind), "gain": total, "tokens": count},
            ),
            "documents": both_ends(document_gains(gain, documents), top_documents, document),
        }
    return out
