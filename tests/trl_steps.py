"""Three steps of TRL's trainers on a component and on the hybrid made of it, which are to be the same steps."""

import pytest
import torch
from datasets import Dataset
from tiny_hybrid import QUIET, WORDS, neox, word_tokenizer
from transformers import AutoModelForCausalLM

from manticore_hf import ComponentSpec, ManticoreForCausalLM

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ ' ' }}{% endfor %}"
)
PROMPTS = ["the cat", "a mat and two", "dogs", "the dogs saw a"]
PROMPTED = [
    {"prompt": one, "completion": " sat on a mat <end>" if i % 2 else " run <end>"} for i, one in enumerate(PROMPTS * 3)
]
PAIRS = [{"prompt": one["prompt"], "chosen": one["completion"], "rejected": " a a saw"} for one in PROMPTED]
MARKED = [{**one, "label": i % 3 == 0} for i, one in enumerate(PROMPTED)]
TALKS = [
    {"messages": [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["completion"]}]}
    for one in PROMPTED
]
TEXTS = [{"text": one["prompt"] + one["completion"]} for one in PROMPTED]


def brevity(completion_ids, **kwargs):
    """A reward: for few tokens, of small numbers."""
    return [-float(len(one)) - 0.01 * sum(one) for one in completion_ids]


ONLINE = {"num_generations": 4, "max_completion_length": 6, "more": {"reward_funcs": brevity}.items()}


NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def talker():
    """The tokenizer of both, with room for conversations."""
    return word_tokenizer(
        [*WORDS, "user", "assistant", "<pad>"], pad_token="<pad>", model_max_length=64, padding_side="left"
    )


def save_both(place, tokenizer, model=None):
    """Folders of one component (by default of the tiny one) and of the hybrid made of it, with their tokenizer."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = model or neox(**NO_DROPOUT)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folders = {"plain": place / "plain", "hybrid": place / "hybrid"}
    model.save_pretrained(folders["plain"])
    ManticoreForCausalLM.from_components([ComponentSpec(folders["plain"], name="one")]).save_pretrained(
        folders["hybrid"]
    )
    for folder in folders.values():
        tokenizer.save_pretrained(folder)
    return folders


LOGGED = ("loss", "entropy", "logits", "rewards", "kl", "mean_token")


def steps(trainer, config, model, rows, folder, tokenizer, more=(), logged=LOGGED, **settings):
    """(what was logged of losses and policy, the trained model) of three steps; Adam would enlarge rounding."""
    values = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "optim": "sgd",
        "bf16": False,
        "gradient_checkpointing": False,
        **QUIET,
        **settings,
    }
    torch.manual_seed(0)
    args = config(str(folder), **values)
    run = trainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **dict(more))
    run.train()
    kept = [{k: v for k, v in one.items() if k.startswith(logged)} for one in run.state.log_history]
    return [one for one in kept if one], run.model


def close(one, two):
    """What two trainings have logged is the same but for rounding."""
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and "loss" in a
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=2e-4, rel=2e-4), key


def same_steps(saved, tmp_path, *what, load=AutoModelForCausalLM.from_pretrained, parts=("one.", ""), **settings):
    """{kind: what `steps` gave} of both folders, compared, and something has changed.

    Args:
        saved: As `save_both` gives it.
        tmp_path: To write in.
        *what: Trainer, its configuration's class, rows.
        load: Makes the model of a folder.
        parts: What stands before the names of the hybrid's parameters, and of the component's.
        **settings: As in `steps`.
    """
    found, start = {}, None
    for kind, folder in saved.items():
        model = load(folder)
        start = start or {key: value.clone() for key, value in model.state_dict().items()}
        found[kind] = steps(what[0], what[1], model, *what[2:], folder=tmp_path / kind, **settings)
    close(found["hybrid"][0], found["plain"][0])
    hybrid, plain = (dict(found[kind][1].named_parameters()) for kind in ("hybrid", "plain"))
    for key, value in plain.items():
        torch.testing.assert_close(hybrid[parts[0] + key], value, atol=2e-5, rtol=1e-4, msg=key)
    assert any((value - start[key]).abs().max() > 1e-4 for key, value in plain.items())
    return found


@torch.no_grad()
def another(folder):
    """A teacher: the model of a folder with other embeddings."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for key, parameter in model.named_parameters():
        if key.endswith("embed_in.weight"):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model
