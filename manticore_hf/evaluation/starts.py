"""What stands before a text: the tokens that a tokenizer begins with, and what a text's first token is scored after."""

from transformers import PreTrainedTokenizerBase

from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.tokenizers import tokenise


def start_tokens(tokenizer: PreTrainedTokenizerBase, text: str = "a") -> list[int]:
    """What a tokenizer itself puts before a text (Llama's and Gemma's `<bos>`; nothing for GPT-2's, GPT-NeoX's).

    Args:
        tokenizer: A tokenizer of Transformers.
        text: Any text with a token: what stands before it is the same for every one.

    Returns:
        Ids, mostly one or none.

    Raises:
        ManticoreError: Special tokens change how the text is cut, so that the tokenizer does not show its start.
    """
    bare = tokenise(tokenizer, text, add_special_tokens=False)["input_ids"]
    found = tokenise(tokenizer, text, return_special_tokens_mask=tokenizer.is_fast)
    whole, first = found["input_ids"], 0
    if tokenizer.is_fast:  # an unknown text may be written with a token that also stands before it
        first = next((i for i, added in enumerate(found["special_tokens_mask"]) if not added), 0)
    for length in range(first, len(whole) - len(bare) + 1):
        if whole[length : length + len(bare)] == bare:
            return whole[:length]
    raise ManticoreError(
        "The tokenizer splits a text differently with and without its special tokens, so it does not show what it "
        "puts before a text: give start_token_id."
    )


def scored_after(tokenizer: PreTrainedTokenizerBase, text: str = "a") -> list[int]:
    """What a text's first token is predicted from, so that every byte of a text is paid for.

    The tokenizer's own start; where it has none, its bos_token, or else its eos_token, which is what stands before a
    document where documents are packed.

    Args:
        tokenizer, text: As `start_tokens` takes them.

    Raises:
        ManticoreError: The tokenizer has nothing of that kind.
    """
    if start := start_tokens(tokenizer, text):
        return start
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise ManticoreError(
        "The tokenizer has no bos_token and no eos_token to predict a text's first token from: give start_token_id."
    )
