"""Two tokenizers over the same bytes: which tokens of the one may come first where the other's are predicted.

Notation: A is the hybrid's tokenizer, B a component's. x are the bytes of A's tokens so far; A's next token is known to
begin at their end. B's canonical tokens of x are a path whose last tokens may not be final: the text may go on so that
B cuts its last word otherwise. So the next bytes are predicted by several *covers*: a prefix of B's path, and a next
token of B that begins with the rest r of x (r empty: B's tokens end where A's do). `covers` lists them, `pairs` says
for an r which tokens of A may be next, given B's.
"""

import bisect
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .aligned_bytes import Surfaces
from .bounds_manticore import ManticoreError, reason, show

LONGEST_WORD = 64
"""Bytes after which a word without any certain boundary is cut where its tokens no longer seem to change."""

_SPACES = b" \t\n\r"
UNSURE = 0.1
"""What is kept of a way that only an unlikely rest of the word would open."""
FEW = 64
"""Longer tokens that are looked through one by one for what cannot follow a token."""
_KEPT = 1 << 16  # cuts of words that are remembered
_NUMBERS = 1 << 25  # numbers in arrays that are remembered


class ByteTokenizer:
    """A tokenizer that cuts bytes in the middle of a text: nothing is put before them, special tokens are text.

    Args:
        tokenizer: A tokenizer of Transformers, backed by the tokenizers library.
        rows: Rows of the model's embedding; tokens beyond them are passed over. None: all have one.

    Attributes:
        surfaces: Its `Surfaces`.
        size: Rows that an embedding of it has at least.
        table: For each id its bytes; None for special tokens.
        start: Ids that a text begins with.
        prefix: Bytes that it puts before a text (SentencePiece: a space).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> None:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        self.surfaces = Surfaces(tokenizer, rows, parts)
        self.size, self.table = self.surfaces.size, self.surfaces.bytes
        self.core = Tokenizer.from_str(json.dumps(_inside(parts)))
        self.core.encode_special_tokens = True
        roles = self.surfaces.roles
        self.start = list(takewhile(lambda i: i < self.size and self.table[i] is None, tokenizer("x").input_ids))
        if not self.start:
            self.start = [roles[role] for role in ("bos", "eos", "pad") if role in roles][:1] or [0]
        ids = [i for i in tokenizer("x", add_special_tokens=False).input_ids if i < self.size]
        text = b"".join(self.table[i] or b"" for i in ids)
        self.prefix = text[:-1] if text.endswith(b"x") else b""
        self.sorted_bytes = sorted(self.surfaces.ids)
        self.sorted_ids = np.array([self.surfaces.ids[data] for data in self.sorted_bytes], dtype=np.int64)
        codes = np.frombuffer(b"".join(self.sorted_bytes), dtype=np.uint8)
        within = np.ones(len(codes), dtype=bool)
        within[np.cumsum([len(data) for data in self.sorted_bytes], dtype=np.int64) - 1] = False
        self.inside = np.zeros((256, 256), dtype=bool)
        self.inside[codes[:-1][within[:-1]], codes[1:][within[:-1]]] = True
        self._cuts = Memo(_KEPT)

    def bytes_of(self, numbers: Sequence[int]) -> bytes:
        """The bytes that some tokens stand for together; special and unknown ones stand for none."""
        return b"".join((self.table[i] or b"") if i < self.size else b"" for i in numbers)

    def ending(self, numbers: tuple[int, ...], size: int) -> tuple[int, ...]:
        """The last of some tokens, those that the last `size` bytes lie in."""
        first = len(numbers)
        while first and size > 0:
            first -= 1
            size -= len(self.bytes_of(numbers[first : first + 1]))
        return numbers[first:]

    def starting_with(self, data: bytes) -> tuple[int, int]:
        """(first, last) of the range of `sorted_bytes` that begin with some bytes."""
        low = bisect.bisect_left(self.sorted_bytes, data)
        return low, bisect.bisect_left(self.sorted_bytes, data + b"\xff" * 8, low)

    def cut(self, data: bytes) -> tuple[int, ...]:
        """Ids of the canonical tokens of some bytes, as a tuple."""
        found = self._cuts.get(data)
        return self._cuts.keep(data, self.cut_all([data])[0]) if found is None else found

    def cut_all(self, pieces: list[bytes]) -> list[tuple[int, ...]]:
        """`cut` of many pieces of bytes at once."""
        out, texts = [None] * len(pieces), []
        for i, data in enumerate(pieces):
            try:
                texts.append((i, data.decode()))
            except UnicodeDecodeError:
                out[i] = self._cut_broken(data)
        try:
            encoded = self.core.encode_batch_fast([text for _, text in texts], add_special_tokens=False)
        except Exception as err:  # of the tokenizers library, which has one kind for all
            raise ManticoreError(f"A component's tokenizer cannot encode {show(texts[0][1])}: {reason(err)}.") from err
        for (i, _), found in zip(texts, encoded):
            ids = tuple(number for number in found.ids if number < self.size)  # the model has no rows for others
            out[i] = ids if self.bytes_of(ids) == pieces[i] else self._spell(pieces[i], ids)
        return out

    def _cut_broken(self, data):
        """Bytes that are no text: the text in them is cut as text, the rest byte by byte, half a letter as a letter."""
        out = []
        while data:
            try:
                data.decode()
                first = last = len(data)
            except UnicodeDecodeError as err:
                if err.reason == "unexpected end of data" and (letter := _completed(data[err.start :])):
                    return (*out, *self._cut_beginning(data[: err.start] + letter, len(data)))
                first, last = err.start, err.end if err.reason != "unexpected end of data" else len(data)
            out += self.cut(data[:first]) if first else ()
            out += self._spell(data[first:last], ()) if last > first else ()
            data = data[last:]
        return tuple(out)

    def _cut_beginning(self, text, size):
        """The canonical tokens of some bytes within the first `size` of them; what is left of those is spelled."""
        ids = self.cut(text)
        ids = next(ids[:n] for n in range(len(ids), -1, -1) if len(self.bytes_of(ids[:n])) <= size)
        return (*ids, *self._spell(text[len(self.bytes_of(ids)) : size], ()))

    def _spell(self, data, otherwise):
        """Tokens for bytes that the tokenizer would change or does not know."""
        return tuple(self.surfaces.longest_first(data)) or tuple(otherwise)


def _completed(start):
    """A letter whose first bytes are given, else another sign (of four bytes an emoji); empty where there is none."""
    size = 2 if start[0] < 0xE0 else 3 if start[0] < 0xF0 else 4
    rests = (b"\x9f\x98\x80"[len(start) - 1 :],) if size == 4 else (b"\x81" * 2, b"\x95" * 2, b"\xa1" * 2)
    texts = [text for rest in rests if (text := (start + rest)[:size].decode(errors="ignore")).isprintable()]
    return max(texts, key=str.isalpha, default="").encode()


def _inside(parts):
    """A serialised tokenizer without what it does at the beginning of a text, and without limits of length."""
    parts = {**parts, "truncation": None, "padding": None, "post_processor": None}
    for key in ("normalizer", "pre_tokenizer"):
        parts[key] = _without_prefix(parts.get(key))
    return parts


def _without_prefix(stage):
    if not isinstance(stage, dict):
        return stage
    if stage.get("type") == "Prepend":
        return None
    stage = dict(stage)
    for key in ("normalizers", "pretokenizers"):
        if key in stage:
            stage[key] = [one for one in map(_without_prefix, stage[key]) if one is not None]
    if stage.get("type") == "Metaspace":
        stage["prepend_scheme"] = "never"
    if stage.get("type") == "ByteLevel":
        stage["add_prefix_space"] = False
    return stage


class Memo(dict):
    """What was found before, forgotten all at once when it has grown too large.

    Args:
        budget: Numbers that the arrays in it may hold together.
    """

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget, self.held = budget, 0

    def keep(self, key: Hashable, value: Any) -> Any:
        """Keeps a tuple of arrays, or anything else as one number; gives it back."""
        size = 1 + (sum(one.size for one in value if isinstance(one, np.ndarray)) if isinstance(value, tuple) else 0)
        if self.held + size > self.budget:
            self.clear()
            self.held = 0
        self[key], self.held = value, self.held + size
        return value


@dataclass(frozen=True)
class Cover:
    """One way in which B may have cut the bytes so far.

    Attributes:
        path: B's tokens since the beginning of the growing word.
        rest: Bytes after them, with which B's next token begins and beyond which it goes.
        ahead: Bytes of the path's last token beyond those read: A's next token begins with them.
        without: A next token of B that belongs to another cover; -1: none.
    """

    path: tuple
    rest: bytes
    ahead: bytes = b""
    without: int = -1


class Mapping:
    """From B's next tokens to A's.

    Args:
        a: ByteTokenizer of the hybrid.
        b: ByteTokenizer of the component.
    """

    def __init__(self, a: ByteTokenizer, b: ByteTokenizer) -> None:
        self.a, self.b = a, b
        self._covers = Memo(_KEPT)
        self._pairs, self._never, self._blocked = Memo(_NUMBERS), Memo(_NUMBERS), Memo(_NUMBERS)
        self._boundary, self._opens, self._firsts = {}, {}, None
        # What a tokenizer puts before a text is no text to the other, unless both do
        same = a.prefix == b.prefix
        self.put_before, self.begins_with = (b"", b"") if same else (a.prefix, b.prefix)

    # ---- the component's paths -----------------------------------------------------------------------------------

    def covers(self, word: bytes, opens: bool, pieces: int = 1) -> list[Cover]:
        """The Covers of a growing word.

        Args:
            word: Its bytes so far.
            pieces: Tokens of A that it lies in.
            opens: Whether A's last token is a run of spaces that leaves one space to the word after it.
        """
        key = (word, opens, pieces > 1)
        found = self._covers.get(key)
        return self._covers.keep(key, self._find_covers(*key)) if found is None else found

    def first_covers(self) -> list[Cover]:
        """The Covers before any text."""
        return [Cover((), b"", self.put_before)] if self.put_before else self.covers(self.begins_with, False)

    def _find_covers(self, word, opens, rare):
        path, found, at = self.b.cut(word) if word else (), [], 0
        beyond = self.b.cut(word + b" ") if opens else ()
        for length in range(len(path) + 1):
            rest = word[at:] if length < len(path) else b""
            if not rest or self.continues(rest):
                without = beyond[-1] if beyond and rest and beyond[:-1] == path[:length] else -1
                found.append(Cover(path[:length], rest, without=without))
            if length < len(path):
                at += len(self.b.table[path[length]] or b"")
        if len(path) > 1 or (path and rare):
            found += self._shorter(path)
        if word[-1:].isspace():
            self._before_a_letter(word, found)
        if beyond and beyond[: len(path)] != path:
            found.append(Cover(beyond, b"", b" "))
        return found

    def _shorter(self, path):
        """Of a word that is cut already: its last token may turn out shorter, and the next one begin within it."""
        last = self.b.table[path[-1]] or b""
        for end in range(len(last) - 1, 0, -1):
            if (head := self.b.surfaces.ids.get(last[:end])) is not None and self.continues(last[end:]):
                return [Cover((*path[:-1], head), last[end:])]
        return []

    def _before_a_letter(self, word, found):
        """Adds what B makes of spaces at the end of a word if a letter comes after them, where that is another path."""
        path, at = [], 0
        for number in self.b.cut(word + b"a"):
            after = at + len(self.b.table[number] or b"")
            if after > len(word):
                rest = word[at:]
                if rest and self.continues(rest):  # of a word; of a digit the space often is a token by itself
                    found += [Cover(tuple(path), rest), Cover((*path, *self.b.cut(rest)), b"")]
                break
            path, at = [*path, number], after
        if at == len(word):
            found.append(Cover(tuple(path), b""))
        known = set()
        found[:] = [one for one in found if (key := (one.path, one.rest)) not in known and not known.add(key)]

    def continues(self, rest: bytes) -> bool:
        """Whether a token of B begins with some bytes and is longer."""
        low, high = self.b.starting_with(rest)
        return high - low > (low < high and self.b.sorted_bytes[low] == rest)

    def grow(self, word: bytes, more: bytes) -> tuple[bytes, bytes]:
        """(bytes of finished words, the growing word) after some bytes more.

        Args:
            word: The growing word.
            more: Bytes that are read now.
        """
        done, text = b"", word + more
        codes = np.frombuffer(text, dtype=np.uint8)
        sure = np.flatnonzero(~self.b.inside[codes[:-1], codes[1:]]) + 1 if len(codes) > 1 else []
        if len(sure):
            done, text = text[: sure[-1]], text[sure[-1] :]
        if len(text) > LONGEST_WORD:
            at = 0
            for number in self.b.cut(text):
                after = at + len(self.b.table[number] or b"")
                if after > len(text) - LONGEST_WORD // 2:
                    break
                at = after
            done, text = done + text[:at], text[at:]
        return done, text

    # ---- from B's tokens to A's ----------------------------------------------------------------------------------

    def pairs(self, rest: bytes, ahead: bytes, last: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """Which token of A may come first where B's next token is another, sorted by B's.

        Args:
            rest: Bytes so far that B's next token begins with; empty where B's tokens end where A's do.
            ahead: Bytes that A's next token begins with and that B has read.
            last: A's last tokens, as a tuple; those that the rest lies in are looked at.

        Returns:
            (ids of B, ids of A, number of B's id among those that occur), int64 arrays, and float32 arrays: by how much
            A's own probability counts where B's is shared, and how much of B's probability is kept.
        """
        last = tuple(i for i in self.a.ending(last, len(rest)) if self.a.bytes_of((i,)))  # before a text: none
        key = (rest, ahead, last)
        found = self._pairs.get(key)
        if found is None:
            found = self._pairs_of_rest(rest, last) if rest else self._pairs_at_boundary(ahead)
            found = self._pairs.keep(key, found)
        return found

    def at_boundary(self) -> tuple[np.ndarray, ...]:
        """`pairs` where the tokens of both end; kept for good."""
        if not self._boundary:
            self._boundary[b""] = self._pairs_at_boundary(b"")
        return self._boundary[b""]

    def _pairs_at_boundary(self, ahead):
        a, b = self.a, self.b
        numbers = [i for i in b.sorted_ids.tolist() if not ahead or not b.table[i].startswith(b" ")]
        firsts = np.full(b.size, -1, dtype=np.int64)
        follow = self._follow(b, numbers)
        texts = [ahead + b.table[i] + more for i, more in zip(numbers, follow)]
        cuts = zip(a.cut_all(texts), texts, follow)
        firsts[numbers] = [cut[0] if self._is_sure(cut[:1], text, more) else -1 for cut, text, more in cuts]
        if not ahead:
            self._firsts = firsts
        theirs = np.flatnonzero(firsts >= 0)
        numbers = [i for i in a.sorted_ids.tolist() if a.table[i].startswith(ahead) and a.table[i] != ahead]
        texts = [a.table[i][len(ahead) :] + more for i, more in zip(numbers, self._follow(a, numbers))]
        mine = [(cut[0], i) for i, cut in zip(numbers, b.cut_all(texts)) if cut]
        if not ahead:
            self._seconds = np.full(a.size, -1, dtype=np.int64)
            self._seconds[[i for _, i in mine]] = [i for i, _ in mine]
        mine += [] if ahead else self._special_pairs()
        return _unique([*theirs.tolist(), *(i for i, _ in mine)], [*firsts[theirs].tolist(), *(i for _, i in mine)])

    def prefixes(self) -> dict[str, np.ndarray]:
        """Which tokens begin with which: by ranges in both sorted lists, where no other pair of tokens is needed.

        Returns:
            {"b", "a"}: int64 [ids, 4] of a tokenizer's tokens: the place of each in its own sorted list, the range of
            the other's tokens that begin with it (first, last), and the other's token that it is read as at first (-1:
            not known).
        """
        self.at_boundary()
        out = {}
        for name, mine, other, read in (("b", self.b, self.a, self._firsts), ("a", self.a, self.b, self._seconds)):
            found = np.tile(np.array([-1, 0, 0, -1], dtype=np.int64), (mine.size, 1))
            for place, (data, number) in enumerate(zip(mine.sorted_bytes, mine.sorted_ids.tolist())):
                found[number, :3] = (place, *other.starting_with(data))
            found[:, 3] = read
            out[name] = found
        return out

    def _special_pairs(self):
        a, b = self.a.surfaces, self.b.surfaces
        found = {(b.special[text], number) for text, number in a.special.items() if text in b.special}
        for role in ("eos", "bos"):
            if role in a.roles and role in b.roles:
                found.add((b.roles[role], a.roles[role]))
        mapped = {number for _, number in found}
        for text, number in a.special.items():
            if number not in mapped and (cut := self.b.cut(text.encode())):
                found.add((cut[0], number))
        return sorted(found)

    def _is_sure(self, cut, text, more):
        """Whether A's first tokens of a text end before the letter that stands for any at its end (`_follow`)."""
        return bool(cut) and len(self.a.bytes_of(cut)) <= len(text) - bool(more)

    @staticmethod
    def _follow(of, numbers):
        """What follows each token, so that its tokenizer would write it; of interest where it ends with a space."""
        out, blank = [b""] * len(numbers), [(i, n) for i, n in enumerate(numbers) if of.table[n][-1:].isspace()]
        for more in (b" a", b"a"):
            for (i, n), cut in zip(blank, of.cut_all([of.table[n] + more for _, n in blank])):
                if cut[:1] == (n,):
                    out[i] = more
        return out

    def _pairs_of_rest(self, rest, last):
        a, b = self.a, self.b
        low, high = b.starting_with(rest)
        low += low < high and b.sorted_bytes[low] == rest
        numbers = [int(i) for i in b.sorted_ids[low:high]]
        left = [data[len(rest) :] for data in b.sorted_bytes[low:high]]
        follow, before = self._follow(b, numbers), a.bytes_of(last)
        texts = [before + data + more for data, more in zip(left, follow)]
        cuts = a.cut_all(texts)
        pairs, longer = [], []  # (id of B, id of A, its part of the share, what is left of the probability)
        for i, data, cut, text, more in zip(numbers, left, cuts, texts, follow):
            fits = cut[: len(last)] == last and len(cut) > len(last)
            known = not fits and b.table[i] in a.surfaces.ids
            kept = 1.0 if fits else UNSURE**2 if known else UNSURE
            longer.append((len(data), i, data, kept))
            if known:
                continue  # A would have written it as one token, unless more of the word follows
            if fits and self._is_sure(cut[: len(last) + 1], text, more):
                pairs.append((i, cut[len(last)], 1.0, kept))
            # More of the word may follow, and then A may cut it otherwise
            for end in range(1, len(data) + 1):
                if (first := a.surfaces.ids.get(data[:end])) is not None and not (fits and first == cut[len(last)]):
                    pairs.append((i, first, UNSURE, kept))
        # Longer tokens of A: each belongs to the longest of these that it begins with.
        owner = np.full(len(a.sorted_ids), -1, dtype=np.int64)
        part = np.zeros(len(a.sorted_ids))
        for _, i, data, kept in sorted(longer):
            first, end = a.starting_with(data)
            first += first < end and a.sorted_bytes[first] == data
            owner[first:end], part[first:end] = i, kept
        owned = np.flatnonzero(owner >= 0)
        pairs += zip(owner[owned].tolist(), a.sorted_ids[owned].tolist(), [1.0] * len(owned), part[owned].tolist())
        return _sorted(pairs)

    # ---- what A itself would not write ---------------------------------------------------------------------------

    def never(self, last: int) -> np.ndarray:
        """Tokens of A that cannot follow its token `last`, since A would have cut their bytes otherwise; int64."""
        found = self._never.get(last)
        return (self._never.keep(last, (self._find_never(last),)) if found is None else found)[0]

    def blocked(self, last: int) -> np.ndarray:
        """Tokens of B that would be read as a token of A that cannot follow `last`; int64."""
        found = self._blocked.get(last)
        if found is None:
            self.at_boundary()
            found = self._blocked.keep(last, (np.flatnonzero(np.isin(self._firsts, self.never(last))),))
        return found[0]

    def _find_never(self, last):
        a, data = self.a, self.a.table[last] if last < self.a.size else None
        if not data:
            return np.zeros(0, dtype=np.int64)
        low, high = a.starting_with(data)
        rests = {one[len(data) :] for one in a.sorted_bytes[low:high] if len(one) > len(data)}
        candidates = {cut[0] for cut in a.cut_all(sorted(rests)) if cut}
        for rest in rests if len(rests) < FEW else ():
            first, end = a.starting_with(rest)
            if end - first < FEW:
                candidates.update(a.sorted_ids[first:end].tolist())
        candidates = sorted(i for i in candidates if a.table[i])
        gone = set(candidates)
        for more in (b"", b"a", b" a", b"2"):  # what comes after may decide where spaces are cut
            tried = [i for i in gone if not more or a.table[i][-1:].isspace()]
            cuts = a.cut_all([data + a.table[i] + more for i in tried])
            gone -= {i for i, cut in zip(tried, cuts) if cut[:2] == (last, i)}
        out = sorted(gone)
        if data[-1:].isspace():
            out = sorted({*out, *self._never_after_space(last, data)})
        return np.array(out, dtype=np.int64)

    def _never_after_space(self, last, data):
        a = self.a
        letters = {}
        for position, one in enumerate(a.sorted_bytes):
            if (letter := one.decode(errors="ignore")[:1]) and not letter.isspace():
                letters.setdefault(letter, []).append(position)
        names = sorted(letters)
        cuts = a.cut_all([data + letter.encode() for letter in names])
        gone = [position for letter, cut in zip(names, cuts) if cut[:1] != (last,) for position in letters[letter]]
        return a.sorted_ids[np.array(gone, dtype=np.int64)].tolist() if gone else []

    def opens(self, last: int) -> bool:
        """Whether a token of A ends with a space, and A would cut a word after it together with that space."""
        if last not in self._opens:
            data = self.a.table[last] if last < self.a.size else None
            self._opens[last] = bool(data) and data.endswith(b" ") and self.a.cut(data + b"a")[:1] != (last,)
        return self._opens[last]

    def read_special(self, number: int) -> tuple[bytes | None, tuple[int, ...], bool]:
        """How B reads a special token of A.

        Returns:
            (its bytes, where it is text to B, else None; B's tokens; whether a new text begins after it).
        """
        a, b = self.a.surfaces, self.b.surfaces
        name = next((text for text, i in a.special.items() if i == number), None)
        if number in (a.roles.get("bos"), a.roles.get("eos")):
            end = [b.roles["eos"]] if number == a.roles.get("eos") and "eos" in b.roles else []
            return None, (*end, *self.b.start), True
        if name is None or number in (a.roles.get("pad"), a.roles.get("unk")):
            return b"", (), False
        if name in b.special:
            return None, (b.special[name],), False
        return name.encode(), (), False


def _sorted(pairs):
    """Columns of (id of B, id of A, its part of the share, what is left of B's probability), sorted; see `pairs`."""
    pairs = sorted(pairs)
    b, a = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    parts = tuple(np.array([pair[side] for pair in pairs], dtype=np.float32) for side in (2, 3))
    return b, a, np.cumsum(np.diff(b, prepend=b[:1]) != 0), *parts


def _unique(left, right):
    """The different pairs of two lists, sorted, and the number of each left one; see `pairs`."""
    left, right = np.array(left, dtype=np.int64), np.array(right, dtype=np.int64)
    width = int(right.max(initial=0)) + 1
    left, right = np.divmod(np.unique(left * width + right), width)
    ones = np.ones(len(left), dtype=np.float32)
    return left, right, np.cumsum(np.diff(left, prepend=left[:1]) != 0), ones, ones
