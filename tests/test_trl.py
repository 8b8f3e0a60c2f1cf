"""TRL's trainers on hybrids: three steps of a hybrid of one component are the same steps of the component alone.

A hybrid of several components has no plain twin: what TRL reads of it is compared with its logits, taken by hand.
"""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from cases import case
from datasets import Dataset
from manticore_hf.modeling import modeling_manticore
from peft import LoraConfig
from processes import launch, results, same
from tiny_hybrid import QUIET, WORDS, mamba, mixed_hybrid, neox, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Gemma2Config,
    GPTNeoXForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
    clone_chat_template,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer import dpo_trainer, kto_trainer, sft_trainer
from trl.trainer.utils import add_fused_lm_head
from trl_steps import (
    MARKED,
    ONLINE,
    PAIRS,
    PROMPTED,
    PROMPTS,
    TALKS,
    TEMPLATE,
    TEXTS,
    another,
    brevity,
    close,
    same_steps,
    save_both,
    steps,
    talker,
)

from manticore_hf import (
    ComponentSpec,
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    lora_config,
    prune,
)


@pytest.fixture(scope="module")
def tokenizer():
    return talker()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    return save_both(tmp_path_factory.mktemp("saved"), tokenizer)


SFT = {
    "text": (TEXTS, {"max_length": 8, "gradient_checkpointing": True}),
    "prompts": (PROMPTED, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "chat": (TALKS, {}),
    "dft": (TEXTS, {"loss_type": "dft"}),
    "smoothed": (TEXTS, {"label_smoothing_factor": 0.1}),
    "neftune": (TEXTS, {"neftune_noise_alpha": 5.0}),
}
SLOW_SFT = {
    "packed": (TEXTS, {"packing": True, "max_length": 24, "per_device_train_batch_size": 1}),
    "wrapped": (TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 12}),
    "no padding": (PROMPTED, {"padding_free": True, "max_length": None}),
    "answers": (TALKS, {"assistant_only_loss": True}),
    "wrapped answers": (TALKS, {"assistant_only_loss": True, "packing": True, "packing_strategy": "wrapped",
                                "max_length": 12}),
    "prompts, too": (PROMPTED, {"completion_only_loss": False}),
}  # fmt: skip


@pytest.mark.parametrize("cases", [SFT, pytest.param(SLOW_SFT, marks=pytest.mark.slow)], ids=["usual", "other"])
def test_sft(saved, tmp_path, tokenizer, cases):
    """Texts, prompts, talks; DFT; with TRL's own checkpointing of activations; what changes the loss or the input."""
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = TEMPLATE
    for name, (rows, settings) in cases.items():
        own = talking if rows is TALKS else tokenizer
        same_steps(saved, tmp_path / name, SFTTrainer, SFTConfig, rows, tokenizer=own, **settings)


def test_dpo(saved, tmp_path, tokenizer):
    """With a reference model that TRL loads from the hybrid's own address."""
    for name, settings in (("plain", {}), ("weighted", {"use_weighting": True}), ("ipo", {"loss_type": ["ipo"]})):
        same_steps(saved, tmp_path / name, DPOTrainer, DPOConfig, PAIRS, tokenizer=tokenizer, **settings)


def test_dpo_with_adapters_of_a_mamba(tmp_path, tokenizer):
    """The policy's reference is the model without them; with the same targets as of the component alone."""
    torch.manual_seed(0)
    folders, found = {kind: tmp_path / kind for kind in ("plain", "hybrid")}, {}
    mamba().save_pretrained(folders["plain"])
    ManticoreForCausalLM.from_components([ComponentSpec(folders["plain"], name="part")]).save_pretrained(
        folders["hybrid"]
    )
    for kind, folder in folders.items():
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        targets = [name for name, _ in model.named_modules() if name.endswith("in_proj")]
        more = {"peft_config": LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")}
        logged, model = steps(DPOTrainer, DPOConfig, model, PAIRS, tmp_path, tokenizer, more.items(), learning_rate=9.0)
        found[kind] = logged, {key: one for key, one in model.named_parameters() if "lora" in key}
    close(found["hybrid"][0], found["plain"][0])
    assert found["plain"][0][0]["rewards/chosen"] == 0 != found["plain"][0][2]["rewards/chosen"]
    assert len(found["hybrid"][1]) == len(found["plain"][1]) > 0
    for key, value in found["plain"][1].items():
        mine = found["hybrid"][1][key.replace(".model.backbone.", ".model.part.backbone.")]
        torch.testing.assert_close(mine, value, atol=2e-5, rtol=1e-4, msg=key)
        assert value.any()


def test_kto(saved, tmp_path, tokenizer):
    same_steps(saved, tmp_path, KTOTrainer, KTOConfig, MARKED, tokenizer=tokenizer)


GEMMA = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_grpo(saved, tmp_path, tokenizer):
    """Sampled by either model; with a reference model and an entropy bonus, at a temperature that is not 1."""
    for name, settings in (("plain", {}), ("more", {"beta": 0.1, "temperature": 0.5})):
        same_steps(saved, tmp_path / name, GRPOTrainer, GRPOConfig, PROMPTED, tokenizer=tokenizer, **ONLINE, **settings)


def test_rloo(saved, tmp_path, tokenizer):
    settings = {**ONLINE, "beta": 0.1, "temperature": 0.7}
    same_steps(saved, tmp_path, RLOOTrainer, RLOOConfig, PROMPTED, tokenizer=tokenizer, **settings)


def test_orpo_and_cpo(saved, tmp_path, tokenizer):
    """Their means of logits are over padding, too, where a hybrid counts positions from the mask."""
    settings = {"max_length": 32, "logged": ("loss", "rewards", "logps", "nll")}
    for kind, config in ((ORPOTrainer, ORPOConfig), (CPOTrainer, CPOConfig)):
        same_steps(saved, tmp_path / kind.__name__, kind, config, PAIRS, tokenizer=tokenizer, **settings)


def test_gkd_with_a_hybrid_as_student_and_as_teacher(saved, tmp_path, tokenizer):
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = TEMPLATE
    found = []
    for teacher in saved:
        more = {"teacher_model": another(saved[teacher])}
        settings = {"lmbda": 0.5, "max_new_tokens": 6, "more": more.items()}
        both = same_steps(saved, tmp_path / teacher, GKDTrainer, GKDConfig, TALKS, tokenizer=talking, **settings)
        found.append(both["hybrid"][0])
    close(*found)


def test_distillation_with_a_hybrid_as_student_and_as_teacher(saved, tmp_path, tokenizer):
    """It multiplies what the model says is its last state by what it says is its output matrix."""
    found = []
    for teacher in saved:
        more = {"teacher_model": another(saved[teacher])}
        settings = {"max_completion_length": 6, "temperature": 0.7, "beta": 0.5, "more": more.items()}
        both = same_steps(
            saved,
            tmp_path / teacher,
            DistillationTrainer,
            DistillationConfig,
            [{"prompt": one["prompt"]} for one in PROMPTED],
            tokenizer=tokenizer,
            **settings,
        )
        found.append(both["hybrid"][0])
    close(*found)


@torch.no_grad()
def test_one_matrix_gives_the_logits_where_there_is_one():
    """A hybrid of one component, a pruned one, one with one-hot weights; not where heads are mixed or do more."""
    ids = torch.tensor([[3, 4, 5, 6]])
    lone = ManticoreForCausalLM.from_components([ComponentSpec(neox(), name="one")], num_blocks=2).eval()
    pruned = prune(mixed_hybrid(num_blocks=2), ["part_0", "part_1"])
    one_hot = mixed_hybrid()
    one_hot.set_mixture_weights("part_0")
    for model in (lone, pruned, one_hot):
        out, head = model(ids, logits_to_keep=3), model.one_head()
        assert model.get_output_embeddings() is None
        torch.testing.assert_close(head(out.last_hidden_state), out.logits)
        assert out.logits.shape[1] == 3
    capped = AutoModelForCausalLM.from_config(Gemma2Config(**GEMMA)).eval()
    capped = ManticoreForCausalLM.from_components([ComponentSpec(capped, name="one")]).eval()
    for model in (mixed_hybrid(), mixed_hybrid(num_blocks=2, preset="paper"), capped):
        assert model.one_head() is None
        with pytest.raises(AttributeError, match="TRL's GKDTrainer instead of DistillationTrainer"):
            print(model(ids).last_hidden_state)


def test_a_mixture_of_heads_is_no_student_or_teacher_of_distillation(saved, tmp_path, tokenizer):
    args = DistillationConfig(str(tmp_path), max_steps=1, max_completion_length=4, bf16=False, **QUIET)
    data = {"train_dataset": Dataset.from_list([{"prompt": one} for one in PROMPTS * 2]), "processing_class": tokenizer}
    plain = AutoModelForCausalLM.from_pretrained(saved["plain"])
    for student, teacher in ((mixed_hybrid(), plain), (plain, mixed_hybrid())):
        with pytest.raises(AttributeError, match="TRL's GKDTrainer instead of DistillationTrainer"):
            DistillationTrainer(student, teacher, args=args, **data).train()


def test_reward(saved, tmp_path, tokenizer):
    score = torch.randn(1, 24, generator=torch.Generator().manual_seed(1))
    plain = GPTNeoXForSequenceClassification.from_pretrained(saved["plain"], num_labels=1)
    hybrid = ManticoreForSequenceClassification.from_pretrained(saved["hybrid"], num_labels=1)
    with torch.no_grad():
        plain.score.weight.copy_(score)
        hybrid.score.heads["one-0"].weight.copy_(score)
    rows = [{"chosen": one["prompt"] + one["chosen"], "rejected": one["prompt"] + one["rejected"]} for one in PAIRS]
    found = [steps(RewardTrainer, RewardConfig, one, rows, tmp_path, tokenizer) for one in (plain, hybrid)]
    close(found[1][0], found[0][0])
    own = {
        f"one.{key}" if key != "score.weight" else "score.heads.one-0.weight": p for key, p in plain.named_parameters()
    }
    for key, value in own.items():
        torch.testing.assert_close(dict(hybrid.named_parameters())[key], value, atol=2e-5, rtol=1e-4, msg=key)
    assert (plain.score.weight - score).abs().max() > 1e-4


# ---- hybrids of several components, by hand --------------------------------------------------------------------------


ONLINE_MIXTURE = {"mixture": "online", "online_eta": 0.7, "online_decay": 0.85, "online_share": 0.05}
PAST = {"gate_past_losses": True}


def with_past(**settings):
    """The tiny hybrid, whose gate, if it reads past losses, goes by them."""
    model = mixed_hybrid(**settings)
    if settings.get("gate_past_losses"):
        torch.nn.init.normal_(model.hybrid_mixer.token_gate.past.weight)
    return model


@pytest.mark.parametrize(
    "mixture", [{"mixture_space": "logprob"}, {"mixture_space": "prob"}, ONLINE_MIXTURE, PAST], ids=str
)
def test_the_policy_is_the_mixture_at_the_temperature_that_was_asked_for(tmp_path, tokenizer, mixture):
    """GRPO's log-probabilities and entropies, and the gradients of both, with losses of components in the hybrid."""
    model = with_past(**mixture, mix_loss_weight=0.3, component_loss_weight=1.0)
    args = GRPOConfig(
        str(tmp_path),
        num_generations=4,
        per_device_train_batch_size=4,
        temperature=0.5,
        bf16=False,
        gradient_checkpointing=False,
        **QUIET,
    )
    trainer = GRPOTrainer(
        model, brevity, args=args, train_dataset=Dataset.from_list(PROMPTED), processing_class=tokenizer
    )
    ids = torch.randint(2, 13, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def gradients(log_probs, entropy):
        model.zero_grad()
        (log_probs.sum() + 2 * entropy.sum()).backward()
        return {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}

    found, entropy, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, 6, compute_entropy=True)
    logp = (model(ids, attention_mask=mask, use_cache=False).logits[:, :-1] / 0.5).log_softmax(-1)[:, -6:]
    right = logp.gather(-1, ids[:, -6:, None])[..., 0], -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(found, right[0])
    torch.testing.assert_close(entropy, right[1])
    mine, by_hand = gradients(found, entropy), gradients(*right)
    assert mine.keys() == by_hand.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], by_hand[key], atol=1e-5, rtol=1e-4, msg=key)
    # the trainer that comes next has a temperature of its own
    SFTTrainer(
        model,
        SFTConfig(str(tmp_path), bf16=False, **QUIET),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=tokenizer,
    )
    assert model.fused_settings[0] == copy.deepcopy(model).fused_settings[0] == 1.0


class Accelerator(contextlib.nullcontext):
    """The CPU in an accelerator's place, with one stream, itself; counts the tensors that are brought away from it."""

    count = 0

    def current_stream(self):
        return self

    def stream(self, one):
        self.count += 1
        return one

    def empty_cache(self):
        pass


@pytest.fixture
def accelerator(monkeypatch):
    """From which SFT, DPO and KTO offload activations, as from a device without streams and pinned memory."""
    stand_in = Accelerator()

    def offloading(model):
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            made = get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False, min_offload_size=0)
        made.device_module = stand_in
        return made

    for trainer in (sft_trainer, dpo_trainer, kto_trainer):
        monkeypatch.setattr(trainer, "get_act_offloading_ctx_manager", offloading)
    return stand_in


OFFLOADED = {
    "paper": ({"num_blocks": 2, "preset": "paper"}, {}),
    "past losses": (PAST, {}),
    "checkpointed": ({"num_blocks": 2}, {"gradient_checkpointing": True}),
    "documents": ({}, {"padding_free": True, "max_length": None}),
}


def test_offloaded_activations(saved, tmp_path, tokenizer, accelerator):
    """What the backward pass wants is brought back once: a second request is an error of TRL's."""
    trainers = (SFTTrainer, SFTConfig, TEXTS), (DPOTrainer, DPOConfig, PAIRS), (KTOTrainer, KTOConfig, MARKED)
    for what in trainers:
        same_steps(saved, tmp_path / what[0].__name__, *what, tokenizer=tokenizer, activation_offloading=True)
        assert accelerator.count > 0
        accelerator.count = 0
    for name, (of_model, settings) in OFFLOADED.items():
        with case(name):
            found, counts = [], []
            for is_offloaded in (False, True):
                accelerator.count, model = 0, with_past(**of_model)
                given = {**settings, "activation_offloading": is_offloaded}
                found.append(steps(SFTTrainer, SFTConfig, model, TEXTS, tmp_path, tokenizer, **given))
                counts.append(accelerator.count)
            assert counts[0] == 0 < counts[1]
            close(*[logged for logged, _ in found])
            kept, offloaded = (trained.state_dict() for _, trained in found)
            for key, value in kept.items():
                torch.testing.assert_close(offloaded[key], value, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_activations_are_not_offloaded_from_a_cpu(saved, tmp_path, tokenizer):
    """TRL asks which accelerator there is, and has no answer for none: the same for every model."""
    for folder in saved.values():
        model = AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'type'"):
            steps(SFTTrainer, SFTConfig, model, TEXTS, tmp_path, tokenizer, activation_offloading=True)


def test_every_field_is_what_trl_gives_for_a_plain_model(saved):
    ids = torch.randint(2, 13, (3, 12), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :5] = -100
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    out = []
    for folder in saved.values():
        model = AutoModelForCausalLM.from_pretrained(folder)
        add_fused_lm_head(model, temperature=0.6, outputs=fields)
        out.append(model(ids, labels=labels, fused_lm_head=True))
        add_fused_lm_head(model)
        assert model(ids, labels=labels, fused_lm_head=True).entropy is None  # not asked for, not computed
    for key in (*fields, "loss", "label_mask"):
        torch.testing.assert_close(out[1][key], out[0][key], msg=key)


def test_what_is_infinite_has_no_part_in_the_entropy(saved):
    model = AutoModelForCausalLM.from_pretrained(saved["hybrid"])
    with torch.no_grad():
        head = model.component("one").get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(16))
        head.bias[3] = -torch.inf
    ids = torch.tensor([[4, 5, 6, 7]])
    out = model(ids, labels=ids, fused_lm_head=True)
    kept = torch.arange(16) != 3
    probs = model(ids).logits[:, :-1, kept].softmax(-1)
    torch.testing.assert_close(out.entropy, -(probs * probs.log()).sum(-1))
    out.entropy.sum().backward()
    assert all(
        one.grad.isfinite().all() for key, one in model.named_parameters() if one.grad is not None and "bias" not in key
    )


def test_component_losses_are_said_to_have_no_effect(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_manticore.logger, "warning_once", said.append)
    add_fused_lm_head(mixed_hybrid())
    assert not said
    model = mixed_hybrid(component_loss_weight=1.0)
    add_fused_lm_head(model)
    assert len(said) == 1 and "component_loss_weight have no effect" in said[0]


def test_the_fields_are_the_mixtures_and_the_loss_is_the_hybrids_own():
    model = mixed_hybrid(mix_loss_weight=0.3, component_loss_weight=0.7)
    ids = torch.randint(2, 12, (3, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :4] = -100
    own = model(ids, labels=labels)
    fused = model(ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, own.loss)
    torch.testing.assert_close(-fused.log_probs.sum() / fused.label_mask.sum(), own.mixture_loss)
    assert fused.label_mask.sum() == (labels[:, 1:] != -100).sum()
    assert torch.equal(fused.is_top1, (own.logits[:, :-1].argmax(-1) == labels[:, 1:]) & fused.label_mask)
    whole = model(ids, shift_labels=labels, num_items_in_batch=7, fused_lm_head=True)
    assert whole.log_probs.shape == labels.shape
    shifted = model(ids, shift_labels=torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100), fused_lm_head=True)
    torch.testing.assert_close(shifted.log_probs[:, :-1], fused.log_probs)


def test_sft_trains_every_part(tmp_path, tokenizer):
    """Two blocks, with and without prompts that are no labels; TRL checkpoints activations by itself."""
    for rows in (TEXTS, PROMPTED):
        model = mixed_hybrid(num_blocks=2)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        _, model = steps(
            SFTTrainer, SFTConfig, model, rows, tmp_path, tokenizer, gradient_checkpointing=True, max_length=16
        )
        changed = {
            key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
        }
        assert changed == {"hybrid_mixer", "part_0", "part_1"}


def test_a_chat_template_is_cloned_with_its_tokens(tmp_path):
    source = word_tokenizer([*WORDS, "<user>", "<assistant>"], pad_token="<end>")
    source.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    source.chat_template = TEMPLATE
    source.save_pretrained(tmp_path)
    model = mixed_hybrid()
    model, tokenizer, added = clone_chat_template(model, word_tokenizer(), str(tmp_path), resize_to_multiple_of=8)
    assert tokenizer.chat_template == TEMPLATE and added
    assert model.vocab_size == len(tokenizer.vocab) == model(torch.tensor([added])).logits.shape[-1]


def test_a_hybrid_in_memory_has_no_reference_that_could_be_loaded(tmp_path, tokenizer):
    """Save it first, or hand over the reference; with adapters the hybrid without them is the reference."""
    data = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tokenizer}
    told = "This hybrid was composed in memory and has no address, .*ref_model=copy.deepcopy"
    quiet = {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 4, **QUIET}
    args = DPOConfig(str(tmp_path), max_steps=2, logging_steps=1, **quiet)
    for trainer, config, more, settings in (
        (DPOTrainer, DPOConfig, {}, {}),
        (KTOTrainer, KTOConfig, {"train_dataset": Dataset.from_list(MARKED)}, {}),
        (GRPOTrainer, GRPOConfig, {"reward_funcs": brevity}, {"beta": 0.1, "num_generations": 4}),
        (RLOOTrainer, RLOOConfig, {"reward_funcs": brevity}, {"beta": 0.1, "num_generations": 4}),
    ):
        with pytest.raises(ManticoreError, match=told):
            trainer(mixed_hybrid(), args=config(str(tmp_path), **settings, **quiet), **{**data, **more})
    with pytest.raises(ManticoreError, match=told):
        SFTTrainer(mixed_hybrid(), args=SFTConfig(str(tmp_path), **quiet), train_dataset=Dataset.from_list(TEXTS))
    model = mixed_hybrid()
    run = DPOTrainer(model, ref_model=copy.deepcopy(model), args=args, **data)
    run.train()
    assert run.state.log_history[0]["rewards/chosen"] == 0 != run.state.log_history[1]["rewards/chosen"]
    model = mixed_hybrid()
    run = DPOTrainer(model, args=args, peft_config=lora_config(model, r=2), **data)
    run.train()
    assert run.ref_model is None and run.state.log_history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    address = mixed_hybrid().config._name_or_path
    assert address == "" and copy.deepcopy(address) == "" and not address


def test_a_head_that_would_be_cast_alone_is_not_there(tmp_path, tokenizer):
    args = GRPOConfig(str(tmp_path), cast_lm_head_to_fp32=True, num_generations=4, bf16=False, **QUIET)
    model = mixed_hybrid()
    with pytest.raises(ManticoreError, match="cast_lm_head_to_fp32=True: a hybrid has no lm_head but one head in each"):
        GRPOTrainer(model, brevity, args=args, train_dataset=Dataset.from_list(PROMPTED), processing_class=tokenizer)
    assert not hasattr(model, "lm_head")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 1},
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ({"num_blocks": 2, "preset": "paper"}, ONLINE_MIXTURE, PAST)
        ),
    ],
)
def test_packed_documents_train_as_apart(tmp_path, tokenizer, settings):
    """Of a hybrid with recurrent layers and a gate: in one row, without padding, or each in a row of its own."""
    check_packed(tmp_path, tokenizer, lambda: with_past(**settings))


def test_packed_documents_train_adapters_as_apart(tmp_path, tokenizer):
    """With a gate that reads past losses, where activations are checkpointed, which TRL asks for by itself."""
    check_packed(tmp_path, tokenizer, lambda: with_past(**PAST), adapted=True, gradient_checkpointing=True)


def check_packed(tmp_path, tokenizer, make, adapted=False, **given):
    rows = [{"text": one["prompt"] + one["completion"]} for one in PROMPTED[:4]]
    ways = {
        "apart": {"per_device_train_batch_size": 4},
        "packed": {"packing": True, "max_length": 40, "per_device_train_batch_size": 1},
        "no padding": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
    }
    found = {
        way: steps(
            SFTTrainer,
            SFTConfig,
            make(),
            rows,
            tmp_path / way,
            tokenizer,
            **own,
            **given,
            more={"peft_config": lora_config(make(), r=2)}.items() if adapted else (),
        )
        for way, own in ways.items()
    }
    tokens = [{"input_ids": tokenizer(one["text"])["input_ids"]} for one in rows]
    args = TrainingArguments(
        str(tmp_path / "flat"),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.1,
        logging_steps=1,
        optim="sgd",
        **QUIET,
    )
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    if not adapted:
        run = Trainer(make(), args, train_dataset=Dataset.from_list(tokens), data_collator=flat)
        run.train()
        found["flat"] = [one for one in run.state.log_history if "loss" in one], run.model
    losses, right = found.pop("apart")
    right = dict(right.named_parameters())
    for way, (mine, model) in found.items():
        assert [one["loss"] for one in mine] == pytest.approx([one["loss"] for one in losses], 1e-4), way
        for key, value in model.named_parameters():
            torch.testing.assert_close(value, right[key], atol=2e-5, rtol=1e-4, msg=f"{way} {key}")
    start = dict(make().named_parameters())
    if adapted:
        assert any(value.any() for key, value in right.items() if "lora_B" in key)
    else:
        assert any(not torch.equal(value, right[key]) for key, value in start.items())


@pytest.mark.slow
def test_sft_in_two_processes_is_that_of_one(tmp_path):
    """With one block, and activations checkpointed as TRL does by default."""
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        launch([Path(__file__).with_name("trl_parallel.py"), folder], processes=count)
        found += results(folder, count)
    assert found[1] == found[2]
    same(found[1], found[0])
