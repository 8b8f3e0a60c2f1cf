"""Loss per token, perplexity and bits per byte of texts, as a metric of the `evaluate` library.

    metric = evaluate.load("<this folder>")
    metric.compute(predictions=[[-1.2, -0.3], [-2.0]], references=["two tokens", "one"])

The script stands alone: it needs evaluate, datasets and numpy, and no network.
"""

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Loss per token, perplexity and bits per byte of a causal language model on a corpus.

All three are of the corpus, not means over its texts: a long text weighs more than a short one.
Loss and perplexity count tokens, so they compare only between models of one tokenizer. Bits per byte counts the bytes
of the text, which are the same for every tokenizer.
"""

_INPUTS = """
Args:
    predictions: For each text, the natural log-probabilities that the model gave to the text's tokens, in any order.
        Numbers at most 0; -inf (a token that the model held for impossible) is honest and makes the loss inf.
    references: For each text, the text those tokens make up, all of it and nothing else. No model predicts a text's
        first token unless something stands before it. So put a start token before the text (the model's own, or its
        end-of-text token), which is read and not predicted: then every byte is paid for, whatever the tokenizer.
        Otherwise leave the first token's text out of the reference; with its bytes counted and its bits not, the
        tokenizer with the longest first tokens would win. An end-of-text token has no bytes: leave it out, too.

Returns:
    loss: Nats per token.
    perplexity: exp(loss).
    bits_per_byte: Bits of all texts by their UTF-8 bytes.
    tokens: Number of log-probabilities.
    bytes: UTF-8 bytes of the references.

Raises:
    ValueError: A log-probability is positive or not a number, a text has bytes and no log-probabilities or the other
        way round, or there is no token at all.
"""


class TokenLoss(evaluate.Metric):
    """Loss per token, perplexity and bits per byte of a corpus; see `inputs_description`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        rows, sizes = [], []
        for i, (logprobs, text) in enumerate(zip(predictions, references)):
            # None becomes NaN, and a text that is None altogether one NaN
            rows.append(np.array([None] if logprobs is None else logprobs, dtype=np.float64))
            sizes.append(len(text.encode()))
            _check(i, rows[-1], sizes[-1])
        tokens, size = sum(map(len, rows)), sum(sizes)
        if not tokens:
            raise ValueError(
                f"The {len(rows)} text(s) given have no token, so there is no loss: give at least one text."
            )
        nats = 0.0 - float(np.concatenate(rows).sum())  # a certain model's loss is 0.0, not -0.0
        loss = nats / tokens
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(loss))
        return {
            "loss": loss,
            "perplexity": perplexity,
            "bits_per_byte": nats / (math.log(2) * size),
            "tokens": tokens,
            "bytes": size,
        }


def _check(i, logprobs, size):
    wrong = np.flatnonzero(~(logprobs <= 0))  # NaN compares with nothing
    if wrong.size:
        value = logprobs[wrong[0]]
        remedy = (
            "find out where the model or its input overflows"
            if np.isnan(value)
            else "give logarithms of probabilities, which are at most 0 (not losses, probabilities or logits)"
        )
        raise ValueError(f"predictions[{i}][{wrong[0]}] is {value}, which is no log-probability: {remedy}.")
    if bool(size) != bool(len(logprobs)):
        raise ValueError(
            f"predictions[{i}] has {len(logprobs)} log-probabilities and references[{i}] {size} bytes: give for each "
            "text its own tokens' log-probabilities, or leave the text out."
        )
