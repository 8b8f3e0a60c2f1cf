"""What the tokens of a tokenizer stand for; most of the code is in `modeling/`, since aligned hybrids carry it."""

from transformers import PreTrainedTokenizerBase

from manticore_hf.modeling import aligned_bytes
from manticore_hf.modeling.aligned_bytes import ROLES
from manticore_hf.utils.tokenizers import check_tokens

__all__ = ["ROLES", "Surfaces"]


class Surfaces(aligned_bytes.Surfaces):
    """The surface form of every token of a tokenizer; see `manticore_hf.modeling.aligned_bytes`.

    Raises:
        ManticoreError: The tokenizer shows no tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int | None = None):
        check_tokens(tokenizer)
        super().__init__(tokenizer, rows)

    def spell(self, data: bytes) -> list[int]:
        """The tokens that together stand for some bytes, as the tokenizer itself cuts them where that can be told.

        Args:
            data: Bytes.

        Returns:
            List of ids, empty if the tokenizer has no tokens for them.
        """
        text = None
        if self._kind == "byte-level":
            text = "".join(aligned_bytes.LETTER_OF[byte] for byte in data)
        elif self._kind == "sentencepiece":
            text = _decoded(data)
            text = None if text is None else text.replace(" ", aligned_bytes.SPACE_MARK)
        if text is not None:
            ids = [piece.id for piece in self._model.tokenize(text)]
            if b"".join(self.bytes[number] or b"" for number in ids) == data:
                return ids
        return self.longest_first(data)


def _decoded(data):
    try:
        return data.decode()
    except UnicodeDecodeError:  # part of a letter
        return None
