"""A tokenizer as bytes: what each token stands for, and how bytes that continue a text are split.

Byte-level BPE (GPT-2, GPT-NeoX, Llama 3) writes each byte as a letter of its own, SentencePiece (Llama 2, Gemma) writes
a space as a mark and a rare byte as `<0x0A>`, WordPiece marks what goes on with a word. Which of them a tokenizer is
can be read from its decoder, which must know it to turn tokens into text.
"""

import json
import re

from transformers import PreTrainedTokenizerBase

ROLES = ("bos", "eos", "pad", "unk")
SPACE_MARK = "\u2581"
_CONTINUES = "##"


def _byte_letters():
    """The letter that byte-level BPE writes for each byte: its own if it is visible, else the next one from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)}


LETTER_OF = _byte_letters()
_BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}


class Surfaces:
    """The surface form of every token of a tokenizer.

    Args:
        tokenizer: A tokenizer of Transformers, backed by the tokenizers library.
        rows: Rows of a model's embedding; tokens beyond them are passed over. None: all have one.
        parts: The tokenizer serialised, where the caller has it so.

    Attributes:
        size: Rows that an embedding of it has at least: the largest id and one.
        bytes: For each id the bytes it stands for; None for special tokens, and for ids without a token.
        special: {text: id} of the special tokens.
        roles: {"bos", "eos", "pad" or "unk": id}, those that the tokenizer has.
        ids: {bytes: id}; of several tokens with the same bytes the one that the tokenizer writes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int | None = None, parts: dict | None = None) -> None:
        core, vocabulary = tokenizer.backend_tokenizer, tokenizer.get_vocab()
        vocabulary = {token: number for token, number in vocabulary.items() if not rows or number < rows}
        self._model, self._kind = core.model, _kind(json.loads(core.to_str()) if parts is None else parts)
        self.size = max(vocabulary.values()) + 1
        roles = [(role, getattr(tokenizer, f"{role}_token_id")) for role in ROLES]
        self.roles = {role: i for role, i in roles if i is not None and not (rows and i >= rows)}
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self.special = {token: number for token, number in vocabulary.items() if number in special}
        self.bytes, ranks = [None] * self.size, {}
        for token, number in vocabulary.items():
            if number not in special:
                self.bytes[number] = token.encode() if number in added else self._read(token)
                single = self._kind == "sentencepiece" and _byte_token(token) is not None
                # Text is cut at added tokens first; byte tokens are written where there is no other.
                ranks[number] = (number in added, not single, -number)
        self.ids = {}
        for number in sorted(ranks, key=ranks.get):
            if self.bytes[number]:
                self.ids[self.bytes[number]] = number
        self._longest = max(map(len, self.ids), default=0)

    def _read(self, token):
        """The bytes of a token as the vocabulary spells it."""
        if self._kind == "byte-level":
            if all(letter in _BYTE_OF for letter in token):
                return bytes(_BYTE_OF[letter] for letter in token)
        elif self._kind == "sentencepiece":
            single = _byte_token(token)
            return bytes([single]) if single is not None else token.replace(SPACE_MARK, " ").encode()
        elif self._kind == "wordpiece":
            return (token.removeprefix(_CONTINUES) if token.startswith(_CONTINUES) else f" {token}").encode()
        return token.encode()

    def longest_first(self, data: bytes) -> list[int]:
        """The longest token first, from left to right; empty if the tokenizer has no tokens for the bytes."""
        out, at = [], 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                if data[at:end] in self.ids:
                    out.append(self.ids[data[at:end]])
                    at = end
                    break
            else:
                return []
        return out


def _kind(parts):
    """Which way of spelling a serialised tokenizer has."""
    for stage in ("decoder", "pre_tokenizer"):
        found = list(_stages(parts.get(stage)))
        kinds = {one["type"] for one in found}
        if "ByteLevel" in kinds:
            return "byte-level"
        if "Metaspace" in kinds or any(SPACE_MARK in str(one.get("pattern")) for one in found):
            return "sentencepiece"
        if "WordPiece" in kinds:
            return "wordpiece"
    return "plain"


def _stages(stage):
    """A stage of a serialised tokenizer, or those of a sequence."""
    if stage is not None and stage.get("type") == "Sequence":
        for one in stage.get("decoders") or stage.get("pretokenizers") or stage.get("normalizers") or ():
            yield from _stages(one)
    elif stage is not None:
        yield stage


def _byte_token(token):
    """The byte that SentencePiece's `<0x0A>` stands for, or None."""
    found = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token) if token[:1] == "<" else None
    return int(found[1], 16) if found else None
