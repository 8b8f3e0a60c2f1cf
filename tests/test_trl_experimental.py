"""Trainers of `trl.experimental`, as in `test_trl.py`: three steps of a hybrid of one component are the component's."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny_hybrid import QUIET, mixed_hybrid
from transformers import AutoModelForCausalLM, GPTNeoXForSequenceClassification
from trl import DPOConfig
from trl.experimental.a2po import A2POConfig, A2POTrainer
from trl.experimental.bema_for_ref_model import BEMACallback
from trl.experimental.bema_for_ref_model import DPOTrainer as BEMATrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl_steps import (
    LOGGED,
    NO_DROPOUT,
    ONLINE,
    PAIRS,
    PROMPTED,
    TALKS,
    TEMPLATE,
    another,
    brevity,
    close,
    same_steps,
    save_both,
    talker,
)
from two_tokenizers import component, first, second

from manticore_hf import ManticoreError, ManticoreForSequenceClassification

pytestmark = pytest.mark.slow

ALL = (
    *LOGGED,
    "objective",
    "logps",
    "implicit_reward",
    "v_star",
    "advantage",
    "self_distillation",
    "iw_opd",
    "on_policy",
)
ASKED = [{"prompt": one["prompt"], "privileged_context": f"a mat {one['completion']}"} for one in PROMPTED]


@pytest.fixture(scope="module")
def tokenizer():
    return talker()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    return save_both(tmp_path_factory.mktemp("saved"), tokenizer)


@pytest.fixture
def talking(tokenizer):
    out = copy.deepcopy(tokenizer)
    out.chat_template = TEMPLATE
    return out


def odd(completions, **kwargs):
    """A reward of 0 or 1."""
    return [float(len(one) % 2) for one in completions]


def scorer(folder):
    """A reward model of a folder, the same of both kinds."""
    plain = folder.name == "plain"
    cls = GPTNeoXForSequenceClassification if plain else ManticoreForSequenceClassification
    model = cls.from_pretrained(folder, num_labels=1)
    weight = model.score.weight if plain else model.score.heads["one-0"].weight
    with torch.no_grad():
        weight.copy_(torch.randn(1, 24, generator=torch.Generator().manual_seed(1)))
    return model


def test_online_dpo(saved, tmp_path, tokenizer):
    """Pairs that the policy samples, judged by a function, and by a hybrid that classifies as by its component.

    Its means of entropy and divergence are over padding, too, where a hybrid counts positions from the mask.
    """
    logged = (*LOGGED, "logps", "objective/scores")
    settings = {"max_new_tokens": 6, "temperature": 0.7, "logged": logged, "tokenizer": tokenizer}
    for loss in ("sigmoid", "ipo"):
        same_steps(
            saved,
            tmp_path / loss,
            OnlineDPOTrainer,
            OnlineDPOConfig,
            PROMPTED,
            loss_type=loss,
            **settings,
            more={"reward_funcs": brevity}.items(),
        )
    found = []
    for kind in saved:
        judge = {"reward_funcs": scorer(saved[kind]), "reward_processing_classes": copy.deepcopy(tokenizer)}
        both = same_steps(
            saved, tmp_path / kind, OnlineDPOTrainer, OnlineDPOConfig, PROMPTED, **settings, more=judge.items()
        )
        found.append(both["hybrid"][0])
    close(*found)


def test_a2po_and_gmpo(saved, tmp_path, tokenizer):
    """A reference that is a copy of the policy, from which values are sampled; GRPO with geometric means."""
    settings = {"max_completion_length": 6, "temperature": 0.7, "num_value_samples": 3, "beta2": 0.5, "logged": ALL}
    same_steps(
        saved,
        tmp_path / "a2po",
        A2POTrainer,
        A2POConfig,
        PROMPTED,
        tokenizer=tokenizer,
        more={"reward_funcs": odd}.items(),
        **settings,
    )
    for name, settings in (("plain", {}), ("more", {"beta": 0.1, "temperature": 0.5, "num_iterations": 2})):
        same_steps(saved, tmp_path / name, GMPOTrainer, GMPOConfig, PROMPTED, tokenizer=tokenizer, **ONLINE, **settings)


def test_tpo(saved, tmp_path, tokenizer):
    rows = [{**one, "reference": " sat <end>"} for one in PAIRS]
    for loss in ("sigmoid", "hinge", "ipo", "tpo-l"):
        same_steps(
            saved,
            tmp_path / loss,
            TPOTrainer,
            TPOConfig,
            rows,
            tokenizer=tokenizer,
            loss_type=loss,
            beta=0.1,
            logged=ALL,
        )


def test_dpo_whose_reference_follows_the_policy(saved, tmp_path, tokenizer):
    """The callback keeps a running mean of the weights, puts it into the reference; the mean can be saved."""
    refs = {}
    for kind, folder in saved.items():
        follow = BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=1)
        run = BEMATrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            args=DPOConfig(
                str(tmp_path / kind),
                max_steps=3,
                learning_rate=0.1,
                optim="sgd",
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=4,
                logging_steps=1,
                **QUIET,
            ),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
            callbacks=[follow],
        )
        before = {key: value.clone() for key, value in run.ref_model.named_parameters()}
        run.train()
        follow.running_model.save_pretrained(tmp_path / kind / "mean")
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / kind / "mean")
        for key, value in kept.named_parameters():
            torch.testing.assert_close(value, dict(follow.running_model.named_parameters())[key])
        refs[kind] = dict(run.ref_model.named_parameters()), before
    for key, value in refs["plain"][0].items():
        torch.testing.assert_close(refs["hybrid"][0][f"one.{key}"], value, atol=2e-5, rtol=1e-4, msg=key)
    assert any(not torch.equal(value, refs["plain"][1][key]) for key, value in refs["plain"][0].items())


def test_self_distillation(saved, tmp_path, tokenizer):
    """Teachers that are the first policy, a running mean of it, or the policy itself, and know more."""
    usual = {
        "num_generations": 2,
        "max_completion_length": 6,
        "temperature": 0.7,
        "logged": ALL,
        "tokenizer": tokenizer,
    }
    for kind, mode in (("base", "topk_logits"), ("ema", "full_logits"), ("live", "sampled_token")):
        settings = {"teacher_model_kind": kind, "distillation_mode": mode, "distillation_topk": 5, **usual}
        settings |= {"distillation_alpha": 1.0} if mode == "sampled_token" else {}
        same_steps(saved, tmp_path / f"sdft {kind}", SDFTTrainer, SDFTConfig, ASKED, **settings)
        settings |= {"include_environment_feedback": True, "distillation_weight": 0.5, "distillation_alpha": 1.0}
        same_steps(
            saved,
            tmp_path / f"sdpo {kind}",
            SDPOTrainer,
            SDPOConfig,
            ASKED,
            more={"reward_funcs": odd}.items(),
            **settings,
        )


def test_gold_with_a_hybrid_as_student_and_as_teacher(tmp_path):
    """With the student's tokenizer, and with another one, by sorted probabilities."""
    folders, tokenizers = {}, {"first": first(), "second": second()}
    for name, one in tokenizers.items():
        one.pad_token, one.chat_template, one.padding_side, one.model_max_length = one.eos_token, TEMPLATE, "left", 128
        (tmp_path / name).mkdir()
        folders[name] = save_both(tmp_path / name, one, component("neox", one, **NO_DROPOUT))
    for name, more in (("first", {}), ("second", {"use_uld_loss": True})):
        found = []
        for kind, folder in folders[name].items():
            settings = {"lmbda": 0.5, "max_completion_length": 6, "more": {"teacher_model": another(folder)}.items()}
            settings |= {**more, "teacher_tokenizer_name_or_path": str(folder)} if more else {}
            both = same_steps(
                folders["first"],
                tmp_path / name / f"from {kind}",
                GOLDTrainer,
                GOLDConfig,
                TALKS,
                tokenizer=tokenizers["first"],
                **settings,
            )
            found.append(both["hybrid"][0])
        close(*found)


def test_iw_opd_with_a_hybrid_as_student_and_as_teacher(saved, tmp_path, talking):
    for objective in ("iw_opd", "jsd"):
        found = []
        for teacher in saved:
            talking.save_pretrained(saved[teacher])  # they are compared
            more = {"teacher_model": another(saved[teacher])}.items()
            settings = {"max_completion_length": 6, "max_length": 64, "distillation_objective": objective, "more": more}
            place = tmp_path / objective / teacher
            both = same_steps(saved, place, IWOPDTrainer, IWOPDConfig, TALKS, tokenizer=talking, logged=ALL, **settings)
            found.append(both["hybrid"][0])
        close(*found)


def test_hybrids_in_memory(tmp_path, tokenizer):
    """Those that copy the policy train them; those that load their teacher from the policy's address say what to do."""
    quiet = {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 4, "max_steps": 1, **QUIET}
    data = {"train_dataset": Dataset.from_list(ASKED), "processing_class": tokenizer}
    for trainer, config, settings in (
        (OnlineDPOTrainer, OnlineDPOConfig, {"max_new_tokens": 4}),
        (A2POTrainer, A2POConfig, {"max_completion_length": 4, "filter_all_incorrect": False}),
    ):
        model = mixed_hybrid(num_blocks=2)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        args = config(str(tmp_path), learning_rate=0.1, **settings, **quiet)
        trainer(model, reward_funcs=odd, args=args, **data).train()
        changed = {
            key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
        }
        assert changed == {"hybrid_mixer", "part_0", "part_1"}
    for trainer, config, more in ((SDFTTrainer, SDFTConfig, {}), (SDPOTrainer, SDPOConfig, {"reward_funcs": odd})):
        args = config(str(tmp_path), num_generations=2, teacher_model_kind="base", **quiet)
        with pytest.raises(ManticoreError, match="This hybrid was composed in memory and has no address"):
            trainer(mixed_hybrid(), args=args, **data, **more)
