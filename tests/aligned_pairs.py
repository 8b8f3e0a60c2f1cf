"""Tiny tokenizers that cut text differently, and hybrids of tiny components that come with them."""

import json

import torch
from built_once import built_once
from hub_models import folder_of, tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from two_tokenizers import FIRST, SECOND, byte_level

from manticore_hf import ComponentSpec, ManticoreForCausalLM

LETTERS = " ".join("abcdefghijklmnopqrstuvwxyz0123456789") * 9
CODE = (
    "def cat(mat):\n    if mat:\n        return mat\n    for dog in mat:\n        run(dog)\n\n\nclass Dog:\n    pass\n"
)
TEXTS = {
    "prose": "The cats waited under the trees, and two dogs ran.",
    "code": CODE,
    "emojis": "a cat 🐈‍⬛ and 😀😀!",
    "no spaces": "猫が木の下で待っている。犬も。",
    "spaces": "the  cat   \n\n  sat    ",
    "umlauts": "Die Kätzchen hören zu, où ça?",
}


def gpt(text=FIRST + CODE + LETTERS, size=380):
    """Like GPT-2's: bytes, a space belongs to the word after it; one special token for all roles."""
    return byte_level(text, size, bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>")


def roles(text=SECOND + CODE + LETTERS, size=390):
    """Bytes too, of another text, with a start token that it puts before a text."""
    return byte_level(text, size, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def gemma(text=SECOND + FIRST + CODE + LETTERS, size=240):
    """Like Gemma's: letters with byte fallback, a mark for a space, runs of spaces are tokens."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\u2581?\p{L}+|\u2581+|\n+|\p{N}|[^\s\p{L}\u2581]+"), "isolated")
    core.train_from_iterator([text + "        " * 3], trainers.BpeTrainer(vocab_size=size, show_progress=False))
    parts = json.loads(core.to_str())["model"]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *parts["vocab"]]
    merges = [tuple(pair) for pair in parts["merges"]]
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def neox(text=SECOND + CODE + LETTERS, size=400):
    """Like GPT-NeoX's: bytes, normalised, and runs of spaces that are added tokens, but not special ones."""
    core = byte_level(text, size, eos_token="<|end|>", bos_token="<|end|>", unk_token="<|end|>").backend_tokenizer
    core.normalizer = normalizers.NFC()
    core.add_tokens([AddedToken(" " * length, normalized=True) for length in (8, 4, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>", pad_token="<|end|>"
    )


def llama(text=FIRST + SECOND + CODE + LETTERS, size=260):
    """Like Llama 2's: letters with byte fallback, a mark for a space and one put before a text; words are not split."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always")
    core.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, show_progress=False))
    parts = json.loads(core.to_str())["model"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *parts["vocab"]]
    merges = [tuple(pair) for pair in parts["merges"]]
    core = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def single(text="", size=257):
    """Every token is one byte."""
    return byte_level(text, size, bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>")


# A Gemma 3 whose window is shorter than a word's bytes
WINDOWS = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=32,
    head_dim=8,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    sliding_window=4,
    max_position_embeddings=512,
)
TOKENIZERS = {"gpt": gpt, "roles": roles, "gemma": gemma, "neox": neox, "llama": llama, "single": single}


@built_once
def tokenizer(kind):
    """One of the tokenizers, trained once."""
    return TOKENIZERS[kind]()


@built_once
def model(family, kind, seed=0):
    """A tiny model for a tokenizer, with weights so strong that differences show; some have rows of no token."""
    size = max(tokenizer(kind).get_vocab().values()) + 1 + (7 if family in ("gpt_neox", "mamba") else 0)
    changes = {"max_position_embeddings": 512} if family in ("llama", "gpt_neox") else {}
    changes = WINDOWS if family == "gemma3_text" else changes
    out = tiny(family, seed=seed, vocabulary=size, **changes)
    with torch.no_grad():
        out.get_output_embeddings().weight.mul_(8)
    return out


def hybrid(root, parts=(("llama", "gpt"), ("gpt_neox", "gemma")), **settings):
    """An aligned hybrid of components {family, tokenizer}, from local directories."""
    specs = []
    for number, (family, kind) in enumerate(parts):
        folder = root / f"{family}-{kind}-{number}"
        if not folder.exists():
            folder_of(model(family, kind), folder, tokenizer(kind))
        specs.append(ComponentSpec(folder, name=f"{family}_{kind}"))
    return ManticoreForCausalLM.from_components(specs, **settings)
