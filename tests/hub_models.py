"""Tiny random models of several families on the local Hub, and ways to ask what a saved hybrid holds."""

import copy
import json
from pathlib import Path

import torch
from built_once import built_once
from manticore_hf.modeling.mixers_manticore import repair_mixers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"

FAMILIES = {
    # Stores its head as embed_out; Transformers renames it to lm_head.
    "gpt_neox": dict(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
    "llama": dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        max_position_embeddings=64, tie_word_embeddings=False,
    ),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=64),  # tied
    "bloom": dict(hidden_size=16, n_layer=2, n_head=2),  # tied
    "mamba": dict(hidden_size=16, num_hidden_layers=2, state_size=4, tie_word_embeddings=True),
    "mamba2": dict(hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1),
    # Its checkpoint has one tensor per expert; Transformers fuses them.
    "jamba": dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        num_experts=2, num_experts_per_tok=1, expert_layer_period=2, expert_layer_offset=1, attn_layer_period=2,
        attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False,
    ),
}  # fmt: skip


@built_once
def tiny(family, seed=0, vocabulary=VOCABULARY, **changes):
    """A random causal LM of a family."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, {}), **ids, "vocab_size": vocabulary, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # biases and norms start equal in every model: tell them apart
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def tokenizer(first=(), size=VOCABULARY):
    """A word-level tokenizer of `size` words; `first` swaps in other words, to make it differ."""
    words = ["<pad>", "<s>", "</s>", *first]
    words += [f"w{i}" for i in range(len(words), size)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def folder_of(model, root, tokens=None, **save):
    """Saves a component as its authors would."""
    model.save_pretrained(root, **save)
    if tokens is not None:
        tokens.save_pretrained(root)
    return Path(root)


def publish(hub, repo_id, model, root, tokens=None, private=False, branch="main", edit=None, **save):
    """Puts a component on the Hub; `edit(folder)` may change its files first. Returns the commit."""
    folder = folder_of(model, Path(root) / repo_id.replace("/", "--") / branch, tokens, **save)
    if edit is not None:
        edit(folder)
    return hub.add_repo(repo_id, folder, branch, private=private)


def publish_hybrid(hub, repo_id, folder):
    """Puts a saved hybrid on the Hub without a request."""
    return hub.add_repo(repo_id, folder)


def saved_keys(folder):
    """Names of the tensors in a saved model's files."""
    keys = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            keys += handle.keys()
    assert len(keys) == len(set(keys))
    return set(keys)


def component_keys(folder):
    """The saved tensors that belong to components, not to the hybrid's mixer."""
    return {key for key in saved_keys(folder) if not key.startswith("hybrid_mixer.")}


def read_json(folder, name="config.json"):
    return json.loads((Path(folder) / name).read_text())


def weight_requests(hub):
    """Requests for weights since the log was cleared."""
    return [path for _, path in hub.requests if path.endswith((".safetensors", ".bin", MODEL + ".index.json"))]


def ids(rows=2, length=7):
    return torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids()).logits


def assert_same_model(one, two):
    """Bit-equal state and logits."""
    first, second = one.state_dict(), two.state_dict()
    assert set(first) == set(second)
    for key in first:
        assert first[key].dtype == second[key].dtype, key
        assert torch.equal(first[key], second[key]), key
    assert torch.equal(mended_logits(one), mended_logits(two))


def mended_logits(model):
    """Logits of a copy with mixers as hybrids have them: a plain Mamba's own scan rounds otherwise."""
    model = copy.deepcopy(model)
    repair_mixers(model)
    return logits(model)


@torch.no_grad()
def nudge(model, *keys):
    """Changes parameters by name, as training would."""
    for key in keys:
        parameter = model.get_parameter(key)
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
