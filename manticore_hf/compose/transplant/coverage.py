"""What a transplant costs: which rows were copied, and the loss of the component alone before and after.

Losses are in bits per byte, every byte of a text paid for, so that they compare between tokenizers.
"""

import math
from dataclasses import asdict, dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manticore_hf.compose.transplant.build import Plan
from manticore_hf.evaluation.metrics.scoring import token_logprobs
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.tokenizers import tokenise

_WINDOW = 1024  # tokens that are read at once


@dataclass
class TransplantReport:
    """What a transplant did.

    Attributes:
        method: How rows that are not copied were made; "identical" where there was nothing to do.
        rows: Rows of the embedding before and after.
        coverage: {"copied", "by role", "built", "none": tokens of the new tokenizer}.
        text_coverage: The same as shares of the texts' tokens, as the new tokenizer cuts them; None without texts.
        bits_before: Bits per byte of the component with its own tokenizer; None without texts.
        bits_after: {method: bits per byte with the new one} of every method that was tried.
    """

    method: str
    rows: tuple
    coverage: dict
    text_coverage: dict | None = None
    bits_before: float | None = None
    bits_after: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain values."""
        return {**asdict(self), "rows": list(self.rows)}

    def __str__(self):
        whole = sum(self.coverage.values())
        shares = ", ".join(f"{count:,} {kind} ({count / whole:.1%})" for kind, count in self.coverage.items() if count)
        text = f"{self.method}: {self.rows[0]:,} -> {self.rows[1]:,} rows; {shares}"
        if self.text_coverage is not None:
            text += f"; {self.text_coverage['copied']:.1%} of the text's tokens copied"
        if self.bits_before is not None:
            after = ", ".join(f"{bits:.4f} with {name!r}" for name, bits in self.bits_after.items())
            text += f"; bits per byte {self.bits_before:.4f} before, {after}"
        return text


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    batch_size: int = 8,
    progress: bool = True,
) -> float:
    """Bits per byte of a causal LM on texts; long ones are read in windows of 1024 tokens that overlap by half.

    A text file is one text, and the logits of all its tokens fit no memory.

    Args:
        model: Any causal LM.
        tokenizer: Its tokenizer.
        texts: List of texts.
        batch_size: Texts or windows per forward pass.
        progress: Show a progress bar.

    Raises:
        ManticoreError: The texts are empty, or have pieces that the tokenizer does not know.
    """
    size = sum(len(text.encode()) for text in texts)
    if not size:
        raise ManticoreError("The texts to measure on are empty; give some that the component was not trained on.")
    limit = getattr(model.config, "max_position_embeddings", None)
    limit = min(limit, _WINDOW) if isinstance(limit, int) and limit > 1 else _WINDOW
    scores = token_logprobs(
        model, tokenizer, texts, batch_size=batch_size, max_length=limit, stride=limit // 2, progress=progress
    )
    return -sum(map(sum, scores)) / math.log(2) / size


def text_coverage(plan: Plan, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, float]:
    """Shares of the texts' tokens by where their rows come from.

    Args:
        plan: Plan of the transplant.
        tokenizer: The new tokenizer.
        texts: List of texts.
    """
    counts = {"copied": 0, "by role": 0, "built": 0, "none": 0}
    special = {*plan.roles["input"], *plan.roles["head"]}
    for ids in tokenise(tokenizer, texts, add_special_tokens=False)["input_ids"]:
        for token in ids:
            kind = "copied" if token in plan.copied else "by role" if token in special else "none"
            counts["built" if plan.pieces.get(token) else kind] += 1
    whole = max(1, sum(counts.values()))
    return {kind: count / whole for kind, count in counts.items()}
