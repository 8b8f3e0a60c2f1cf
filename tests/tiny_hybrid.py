"""A tiny hybrid as its users have one, for tests of training: two components, their tokenizer, a text, folders.

The models are as Transformers makes them, so that a few steps train them; `families.py` has models of every family,
with weights so strong that differences show.
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from manticore_hf import ComponentSpec, ManticoreForCausalLM

WORDS = "the cat sat on a mat and saw two dogs run".split()

# Settings of a trainer that only trains: no log but its own, no device, no bar, no checkpoint
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
QUIET_RECIPE = {key: value for key, value in QUIET.items() if key != "report_to"}  # which a recipe may not say


def neox(**settings):
    """An attention component, drawn from torch's current seed; `settings` override its configuration."""
    sizes = {
        "vocab_size": 16, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes, **settings}))


def mamba(**settings):
    """A state-space component of another width, drawn from torch's current seed."""
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**{**sizes, **settings}))


def pair(**settings):
    """The two components of the tiny hybrid, always the same; `settings` are of the attention component."""
    torch.manual_seed(0)
    return [neox(**settings), mamba()]


def word_tokenizer(words=WORDS, **settings):
    """A tokenizer of 13 whole words, fewer than the components' rows; `settings` as those of any fast tokenizer."""
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unknown>", **settings)


def save(model, folder, words=WORDS):
    """Saves a component or a hybrid with its tokenizer; returns the folder."""
    model.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder


def save_pair(folder, words):
    """Saves the two components as `neox` and `mamba`, and a text of that many words; returns the folder."""
    for name, model in zip(("neox", "mamba"), pair()):
        save(model, folder / name)
    write_text(folder / "text.txt", words)
    return folder


def write_text(file, words, seed=1):
    """Writes that many random words of the tokenizer, the same for the same seed; returns the file."""
    drawn = torch.randint(0, len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    file.write_text(" ".join(WORDS[i] for i in drawn.tolist()))
    return file


def rows_of(count=6, length=12, seed=3):
    """Rows of random tokens; the end-of-text token (0) closes a document here and there."""
    drawn = torch.randint(0, 15, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": drawn, "labels": drawn})


def mixed_hybrid(**settings):
    """The tiny hybrid, with a mixture, a gate and features that differ: random weights in everything it adds."""
    torch.manual_seed(1)
    parts = [ComponentSpec(part, name=f"part_{i}") for i, part in enumerate(settings.pop("parts", None) or pair())]
    model = ManticoreForCausalLM.from_components(parts, projector_init="default", **settings).eval()
    with torch.no_grad():
        model.hybrid_mixer.alpha_logits.normal_()
        if model.hybrid_mixer.token_gate is not None:
            model.hybrid_mixer.token_gate.linear.weight.normal_()
        for part in model.config.component_names:
            for parameter in model.component(part).parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return model
