"""Two byte-level tokenizers of different texts, and tiny components that come with them, for tests of transplants."""

import torch
from tiny_hybrid import mamba, neox
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FIRST = (
    "The cat sat on the mat and saw two dogs run. The dogs ran after the cat, and the cat ran up the tree. "
    "There it sat, and the dogs sat under it, and they all waited for the rain to stop. "
)
SECOND = (
    "Waiting under trees for rain, three dogs and that cat were the talk of the town. Under the rain the trees stand, "
    "and after it they drip: two trees, three drips, and a wet cat that waits on its mat. "
)


def byte_level(text, size, **special):
    """A byte-level BPE tokenizer trained on a text; `special` as the tokenizer's (`eos_token="</s>"`)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(dict.fromkeys(special.values())),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def first():
    """Like GPT-2's: one special token for all roles. 310 tokens."""
    return byte_level(FIRST, 310, bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>")


def second():
    """Like Llama's roles: one token for each. 325 tokens."""
    return byte_level(SECOND, 325, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def component(kind, tokenizer, extra=0, **settings):
    """A tiny model for a tokenizer, with `extra` rows of padding and weights so strong that differences show."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    make = {"neox": neox, "mamba": mamba}[kind]
    model = make(vocab_size=max(tokenizer.get_vocab().values()) + 1 + extra, **ids, **settings).eval()
    with torch.no_grad():
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight.mul_(10)
    return model
