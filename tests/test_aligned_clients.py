"""Hybrids whose components have tokenizers of their own, where Trainer, TRL, PEFT, compilers and classifiers go."""

import copy

import pytest
import torch
from aligned_pairs import hybrid, tokenizer
from cases import case
from datasets import Dataset
from peft import get_peft_model
from tiny_hybrid import QUIET
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.integrations.neftune import activate_neftune
from trl import SFTConfig, SFTTrainer

from manticore_hf import ManticoreError, ManticoreForSequenceClassification, lora_config, prompt_config
from manticore_hf.families.contract import close

PAIRS = {"attention": (("llama", "gpt"), ("gpt_neox", "gemma")), "recurrent": (("llama", "gemma"), ("mamba", "gpt"))}
TEXTS = ("The cats waited under the trees, and two dogs ran.", "They all waited for the rain to stop; a cat sat.")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root, held = tmp_path_factory.mktemp("aligned"), {}
    return root, lambda kind: held.setdefault(kind, hybrid(root, PAIRS[kind]))


def batch(home):
    """(ids, mask) of the texts, padded on the right."""
    rows = [torch.tensor(tokenizer(home)(text, add_special_tokens=False).input_ids) for text in TEXTS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


def gradients(model, ids, mask):
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return loss.detach(), {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("kind", PAIRS)
def test_checkpointed_activations_change_nothing(made, kind):
    """Layers that are checkpointed leave out their cache, by which recurrent components read a text piece by piece."""
    model = copy.deepcopy(made[1](kind)).train()
    ids, mask = batch(PAIRS[kind][0][1])
    adapted = get_peft_model(copy.deepcopy(model), lora_config(model, r=2)).train()
    with torch.no_grad():
        for key, one in adapted.named_parameters():
            if "lora_B" in key:
                one.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    for name, one in (("all", model), ("adapters", adapted)):
        loss, right = gradients(one, ids, mask)
        for reentrant in (True, False):
            with case(f"{name}, use_reentrant={reentrant}"):
                one.gradient_checkpointing_enable({"use_reentrant": reentrant})
                one.enable_input_require_grads()
                found, mine = gradients(one.train(), ids, mask)
                close(found, loss)
                assert mine.keys() == right.keys()
                for key, value in right.items():
                    close(mine[key], value, key)
                assert one.is_activation_checkpointing


@torch.no_grad()
@pytest.mark.parametrize("kind, home", [("attention", 1), ("recurrent", 0), ("recurrent", 1)])
def test_classifiers_weigh_each_component_by_its_own_weight(made, kind, home):
    """Whichever component the tokenizer is of."""
    root, _ = made
    names = [f"{family}_{own}" for family, own in PAIRS[kind]]
    model = hybrid(root, PAIRS[kind], tokenizer_component=names[home])
    model.hybrid_mixer.token_gate.linear.bias.copy_(torch.tensor([0.9, -0.4]))
    folder = root / f"{kind}-{home}"
    model.save_pretrained(folder)
    ids, mask = batch(PAIRS[kind][home][1])
    states, shares = AutoModel.from_pretrained(folder)(ids, attention_mask=mask).states, model.mixture_weights()[0]
    for cls in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        scored = cls.from_pretrained(folder, num_labels=3)
        wanted = sum(shares[i] * scored.score.heads[f"{name}-0"](states[name]) for i, name in enumerate(names))
        wanted = wanted[torch.arange(2), mask.sum(1) - 1] if cls is AutoModelForSequenceClassification else wanted
        got = scored(ids, attention_mask=mask).logits
        real = slice(None) if got.ndim == 2 else mask.bool()
        close(got[real], wanted[real])
    scored = ManticoreForSequenceClassification.from_causal_lm(model, num_labels=2)
    one_hot = copy.deepcopy(scored)
    one_hot.set_mixture_weights(names[1])
    last = mask.sum(1) - 1
    wanted = scored.score.heads[f"{names[1]}-0"](states[names[1]])[torch.arange(2), last]
    close(one_hot(ids, attention_mask=mask).logits, wanted)


def test_what_reaches_one_tokenizers_tokens_alone_is_refused(made):
    model = copy.deepcopy(made[1]("attention"))
    ids, mask = batch("gpt")
    rows = "components .'gpt_neox_gemma'. have tokenizers of their own, in which these are other tokens"
    with pytest.raises(ManticoreError, match=rows):
        lora_config(model, trainable_token_indices=[5, 6])
    lora_config(model, trainable_token_indices={"llama_gpt.model.embed_tokens": [5, 6]})
    with pytest.raises(ManticoreError, match="PromptTuningConfig: soft prompts have no token ids, which a hybrid"):
        prompt_config(model)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=3)
    with pytest.raises(ManticoreError, match="holds token 99999; .* or, where all have one, resize"):
        model(torch.tensor([[99999]]))
    with pytest.raises(ManticoreError, match="The prompt has no token to begin with"):
        model.generate(ids[:1, :0], max_new_tokens=3)
    right = model(ids, attention_mask=mask).logits
    model.enable_input_require_grads()  # changes nothing
    assert torch.equal(model(ids, attention_mask=mask).logits, right)
    adapted = get_peft_model(copy.deepcopy(model), lora_config(model, r=2, train_mixer=False)).eval()
    with pytest.raises(
        ManticoreError, match="adapter_names: component 'gpt_neox_gemma', with its own tokenizer, reads"
    ):
        adapted(input_ids=ids, attention_mask=mask, adapter_names=["default", "__base__"])
    torch.testing.assert_close(adapted(input_ids=ids, attention_mask=mask).logits, right)  # and does so no longer
    alone = adapted(input_ids=ids[:1], attention_mask=mask[:1], adapter_names=["default"]).logits
    torch.testing.assert_close(alone, right[:1], atol=1e-5, rtol=1e-5)
    activate_neftune(model, 5.0)
    with pytest.raises(ManticoreError, match="such as NEFTune's. changes only what component 'llama_gpt' reads"):
        model.train()(ids, attention_mask=mask)
    assert torch.equal(model.eval()(ids, attention_mask=mask).logits, right)


def test_a_backward_pass_through_a_cache_of_single_tokens_is_said(tmp_path):
    """A recurrent component with its own tokenizer is read piece by piece, some of which are single tokens."""
    model = hybrid(tmp_path, (("llama", "gpt"), ("mamba", "gemma")))
    ids = tokenizer("gpt")("The cats waited under the trees.", return_tensors="pt")["input_ids"]
    loss = model(ids, labels=ids).loss  # in evaluation mode there is a cache
    with pytest.raises(ManticoreError, match="call the model with use_cache=False"):
        loss.backward()
    without = model(ids, labels=ids, use_cache=False).loss
    without.backward()
    assert torch.equal(without, loss) and model.component("mamba_gemma").get_input_embeddings().weight.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"mixture": "online"}], ids=["gate", "online"])
def test_packed_documents_train_as_apart(made, tmp_path, settings):
    """Three steps of TRL's trainer, where activations are checkpointed; a Mamba reads other tokens than the hybrid."""
    own = copy.deepcopy(tokenizer("gemma"))
    own.model_max_length = 128
    texts = [text[: 20 + 5 * i] for i, text in enumerate(TEXTS * 2)]
    found = {}
    for way, given in {
        "apart": {"per_device_train_batch_size": 4},
        "packed": {"packing": True, "max_length": 120, "per_device_train_batch_size": 1},
        "no padding": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
    }.items():
        values = {"max_steps": 3, "learning_rate": 0.01, "logging_steps": 1, "optim": "sgd", "bf16": False}
        args = SFTConfig(str(tmp_path / way), gradient_checkpointing=True, **QUIET, **values, **given)
        data = Dataset.from_list([{"text": text} for text in texts])
        model = hybrid(made[0], PAIRS["recurrent"], **settings)
        run = SFTTrainer(model, args, train_dataset=data, processing_class=own)
        run.train()
        losses = [one["loss"] for one in run.state.log_history if "loss" in one]
        found[way] = losses, dict(run.model.named_parameters())
    losses, right = found.pop("apart")
    assert losses[2] < losses[0]
    for way, (mine, parameters) in found.items():
        assert mine == pytest.approx(losses, 1e-4), way
        for key, value in parameters.items():
            torch.testing.assert_close(value, right[key], atol=2e-5, rtol=1e-4, msg=f"{way} {key}")


def test_dropout_does_not_hide_that_attention_reads_trees(made):
    """Whether a component can is tried at its first text, which may be one of a training."""
    model = copy.deepcopy(made[1]("attention")).train()
    model.__dict__.pop("_aligner", None)
    for one in model.modules():
        if isinstance(one, torch.nn.Dropout):
            one.p = 0.5
    model(input_ids=batch("gpt")[0])
    assert model.__dict__["_aligner"].trees["gpt_neox_gemma"][1]
    assert all(one.training for one in model.modules())


@torch.no_grad()
def test_compiled_and_exported(made):
    model = copy.deepcopy(made[1]("attention"))
    ids, mask = batch("gpt")
    compiled = torch.compile(model, backend="eager")
    close(compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits, model(ids, attention_mask=mask).logits)
    with pytest.raises(ManticoreError, match="which no graph can hold: export model.component"):
        torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
