"""The tokenizer in a GGUF file, cut as the file says: Transformers reads its tokens, but not how words are split.

`tokenizer.ggml.pre` names the split of a byte-level BPE tokenizer. What is read is checked against the file's own
merges or scores, applied here one by one to a text of many kinds of characters.
"""

from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from manticore_hf.evaluation.starts import start_tokens
from manticore_hf.modeling.configuration_manticore import ManticoreError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": ("gpt-2", "phi-2", "olmo", "mpt", "jais", "roberta-bpe", "jina-v1-en", "jina-es", "jina-de"),
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-3": ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"),
    "qwen2": ("qwen2", "stablelm2", "hunyuan", "megrez"),
}
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}
_SPACE = "\u2581"
_USER_DEFINED = 4  # of the kinds of tokens in GGUF files

SAMPLE = (
    "the year 2024, and 12345.678: it's WE'LL  two  spaces\n\n    if (a_b == c[0]):\n\treturn \"x\" # tab\r\n"
    "caf\u00e9 na\u00efve \u03c0\u2248\u00bd \u65e5\u672c\u8a9e\u3067\u3059 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 "
    "\U0001f600\U0001f44d\U0001f3fd https://example.org/?q=1&r=2   \nEnd. "
)
"""Digits, contractions, runs of spaces, code, other scripts, emojis of several parts."""


def read_gguf_tokenizer(what: str, path: str | Path) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer in a GGUF file.

    Args:
        what: What messages call the checkpoint.
        path: The file.

    Returns:
        (tokenizer, a sentence on what the file does not say or None).

    Raises:
        ManticoreError: It has none that Transformers can read, or what Transformers reads cuts text differently than
            the file's own merges do.
    """
    path = Path(path)
    try:
        from gguf import GGUFReader

        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        fields = GGUFReader(path).fields
        keys = ("model", "pre", "tokens", "merges", "scores", "token_type", "add_bos_token", "add_space_prefix")
        found = {key: fields[f"tokenizer.ggml.{key}"].contents() for key in keys if f"tokenizer.ggml.{key}" in fields}
    except Exception as err:  # it reads a stranger's bytes, and says in many ways what it cannot read
        raise ManticoreError(
            f"{what}: Transformers cannot read the tokenizer in {path.name} ({' '.join(str(err).split())[:300]}); give "
            "--tokenizer."
        ) from err
    note = None
    if found.get("model") == "gpt2":
        note = _split_words(tokenizer, found.get("pre"))
    _begin(tokenizer, found.get("add_bos_token"))
    wrong = _difference(tokenizer, found)
    if wrong is not None:
        raise ManticoreError(
            f"{what}: the tokenizer in {path.name}, as Transformers reads it, {wrong}; give --tokenizer."
        )
    return tokenizer, note


def _split_words(tokenizer, name):
    """Sets the split that a byte-level BPE tokenizer names; what is not known of it, or None."""
    split = _SPLIT_OF.get(name)
    if split is None:
        named = (
            "no pre-tokenizer" if name in (None, "default") else f"the pre-tokenizer {name!r}, which is unknown here"
        )
        return (
            f"The GGUF file names {named}: where words end was guessed (as GPT-2 ends them), and text may be cut "
            "otherwise than the model learnt. If you know its tokenizer, give --tokenizer."
        )
    core = tokenizer.backend_tokenizer
    if split in ("gpt-2", "digits"):
        parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        parts = [pre_tokenizers.Digits(individual_digits=True), *parts] if split == "digits" else parts
    else:
        pattern = _LLAMA3 if split == "llama-3" else _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
        parts = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    core.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    if split == "llama-3":
        core.model.ignore_merges = True  # a word that is a token is not merged together
    return None


def _begin(tokenizer, wanted):
    """Makes a tokenizer begin texts with its bos token, or with nothing, as the file says."""
    if wanted is None or tokenizer.bos_token is None:
        return
    start = [tokenizer.bos_token_id] if wanted else []
    if start_tokens(tokenizer) != start:
        template = f"{tokenizer.bos_token} $A" if wanted else "$A"
        special = [(tokenizer.bos_token, tokenizer.bos_token_id)] if wanted else []
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)


def _difference(tokenizer, found):
    """How a tokenizer differs from what the file says, or None."""
    spaced = found.get("model") == "llama"  # where tokens of the user's own are written with spaces
    tokens = found.get("tokens", ())
    tokens = {token.replace(" ", _SPACE) if spaced else token: number for number, token in enumerate(tokens)}
    read = tokenizer.get_vocab()
    if other := next((token for token, number in tokens.items() if read.get(token) != number), None):
        return f"gives the token {other!r} the id {read.get(other)}, not {tokens[other]}"
    ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    if (back := tokenizer.decode(ids, clean_up_tokenization_spaces=False)) != SAMPLE:
        # Some drop a space at the start, or cannot write a character that no text of theirs had
        known = all(letter in tokens for letter in pre_tokenizers.ByteLevel.alphabet()) or "<0x0A>" in tokens
        if known and back.strip() != SAMPLE.strip():
            return f"does not give back the text that it cut ({back[:40]!r}...)"
    ranks = {tuple(one.split(" ")): rank for rank, one in enumerate(found.get("merges", ()))}
    if found.get("model") == "gpt2" and ranks:
        whole = getattr(tokenizer.backend_tokenizer.model, "ignore_merges", False)
        words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(SAMPLE)]
        own = [
            piece
            for word in words
            for piece in ([word] if whole and word in tokens else _merged(word, lambda a, b: ranks.get((a, b))))
        ]
    elif spaced and "scores" in found:
        plain = {token: -found["scores"][number] for token, number in tokens.items()}
        text = (" " if found.get("add_space_prefix", True) else "") + SAMPLE
        kinds = found.get("token_type", ())
        fixed = {token for token, number in tokens.items() if number < len(kinds) and kinds[number] == _USER_DEFINED}
        own = []
        for part in _parts(text.replace(" ", _SPACE), fixed):
            own += [part] if part in fixed else _merged(part, lambda a, b: plain.get(a + b))
        own = [p for one in own for p in ([one] if one in tokens else [f"<0x{byte:02X}>" for byte in one.encode()])]
    else:
        return None
    mine = tokenizer.convert_ids_to_tokens(ids)
    if mine == own:
        return None
    place = next((i for i, (a, b) in enumerate(zip(mine, own)) if a != b), min(len(mine), len(own)))
    return f"cuts {mine[place : place + 4]} where the file's own merges give {own[place : place + 4]}"


def _parts(text, fixed):
    """A text cut at tokens that are never cut or joined (runs of spaces), the longest first."""
    longest, start, at = max(map(len, fixed), default=0), 0, 0
    while at < len(text):
        size = next((n for n in range(longest, 0, -1) if text[at : at + n] in fixed and at + n <= len(text)), 0)
        if size:
            yield from filter(None, (text[start:at], text[at : at + size]))
            start = at + size
        at += size or 1
    if text[start:]:
        yield text[start:]


def _merged(word, rank):
    """A word's pieces once the pair of the lowest rank has been joined, again and again."""
    pieces = list(word)
    while True:
        ranks = [(found, i) for i, pair in enumerate(zip(pieces, pieces[1:])) if (found := rank(*pair)) is not None]
        if not ranks:
            return pieces
        _, i = min(ranks)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
