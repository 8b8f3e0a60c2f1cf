"""Text to blocks of tokens that every causal LM trainer takes."""

from datasets import Dataset
from tqdm.auto import tqdm

from manticore_hf.modeling.configuration_manticore import ManticoreError


def pack(documents, tokenizer, block_size, limit=None, desc="Tokenising"):
    """Documents end to end, each closed by the end-of-text token, cut into blocks of equal length.

    Args:
        documents: Texts.
        tokenizer: A Transformers tokenizer with an `eos_token_id`.
        block_size: Tokens per block.
        limit: Largest number of blocks, or None for all.
        desc: Label of the progress bar.

    Returns:
        A Dataset with `input_ids` and `labels` (equal; the model shifts), [block_size] each.

    Raises:
        ManticoreError: The text is too short for one block, or the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ManticoreError("The tokenizer has no eos_token: documents cannot be told apart once they are packed.")
    tokens, blocks = [], []
    for document in tqdm(documents, desc=desc, unit="doc", leave=False):
        tokens += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        while len(tokens) >= block_size:
            blocks.append(tokens[:block_size])
            tokens = tokens[block_size:]
        if limit is not None and len(blocks) >= limit:
            blocks = blocks[:limit]
            break
    if not blocks:
        raise ManticoreError(
            f"The text has {len(tokens)} tokens, fewer than one block of {block_size}: give more text or"
            " smaller blocks."
        )
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})
