"""Made the hybrids beside this file, with the code of manticore-hf 0.1.0 (commit 10f9901) and Transformers 5.24.

    git worktree add ../old 10f9901 && cd ../old && pip install -e . && python .../tests/published_0_1/make.py

What that code saved is kept without its code files: `tests/test_published_earlier.py` loads it with today's. Run with
later code, this script makes other files, and there is nothing to be learnt from them.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from manticore_hf import ComponentSpec, ManticoreForCausalLM, ManticoreForSequenceClassification, harden

HERE = Path(__file__).parent
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [0, 0, 5, 3, 5, 8, 9, 7]])
MASK = torch.tensor([[1] * 8, [0] * 2 + [1] * 6])
FAMILIES = {
    "gpt_neox": dict(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32,
        tie_word_embeddings=False,
    ),
    "mamba": dict(hidden_size=8, num_hidden_layers=2, state_size=4, tie_word_embeddings=True),
}  # fmt: skip
HYBRIDS = {
    "one_block": dict(num_blocks=1),  # the default preset: a token gate, native embeddings
    "two_blocks": dict(num_blocks=2),
    "paper": dict(num_blocks=2, preset="paper"),
    "hardened": dict(num_blocks=2),
    "classifier": dict(num_blocks=2),
}


def component(family, seed):
    """A random causal LM [vocabulary 24]."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 24}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family], **ids)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


def hybrid(name):
    """One of HYBRIDS, with mixture weights, gate and projectors as after some training."""
    parts = [ComponentSpec(component(family, seed), name=family) for seed, family in enumerate(FAMILIES)]
    model = ManticoreForCausalLM.from_components(parts, **HYBRIDS[name])
    torch.manual_seed(7)
    for parameter in model.hybrid_mixer.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    if name == "hardened":
        return harden(model, ["gpt_neox", "mamba"])
    if name == "classifier":
        return ManticoreForSequenceClassification.from_causal_lm(model, id2label={0: "no", 1: "yes", 2: "perhaps"})
    return model


@torch.no_grad()
def main():
    """Writes config.json, model.safetensors, generation_config.json, and the logits that this code computes."""
    expected = {}
    for name in HYBRIDS:
        model = hybrid(name).eval()
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        for file in folder.glob("*.py"):
            file.unlink()
        expected[name] = model(input_ids=IDS, attention_mask=MASK).logits.contiguous()
    save_file(expected, HERE / "logits.safetensors")
    print(json.dumps({name: list(value.shape) for name, value in expected.items()}))


if __name__ == "__main__":
    main()
