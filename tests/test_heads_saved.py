"""Hybrids that classify, kept and used: saving, publishing, training, adapters, pipelines."""

import gc

import pytest
import torch
from classifiers import AUTO, BOTH, scored
from families import tiny, tokens
from hub_models import component_keys, nudge, publish, publish_hybrid, read_json, saved_keys, tokenizer
from hub_models import tiny as published_tiny
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from tiny_hybrid import QUIET
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from manticore_hf import (
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreModel,
    lora_config,
    set_stage,
)
from manticore_hf.training.freezing import ComponentClipping


@pytest.fixture
def repos(hub, owner, tmp_path):
    """An attention component with a head of its own, and a Mamba whose head is its embeddings."""
    for name, family in (("a", "llama"), ("b", "mamba")):
        publish(hub, f"{owner}/{name}", published_tiny(family, ord(name)), tmp_path / "src", tokenizer())
    return [f"{owner}/a", f"{owner}/b"]


@pytest.mark.parametrize("kind", BOTH)
def test_only_what_is_its_own_is_written(kind, repos, tmp_path):
    model = BOTH[kind].from_components(repos, num_labels=3, num_blocks=2)
    ids, own = tokens(2, 7) % 60, {key for key in model.state_dict() if key.startswith(("hybrid_mixer.", "score."))}
    assert not [key for key in model.state_dict() if key.startswith("a.lm_head")]
    assert model.component("a").get_output_embeddings() is None
    assert model.component("b").lm_head.weight is model.component("b").get_input_embeddings().weight
    for key in (None, "a.model.layers.0.mlp.up_proj.weight", "b.backbone.embeddings.weight"):
        nudge(model, *([] if key is None else [key]))
        own |= set() if key is None else {key}
        model.save_pretrained(tmp_path / "out")
        assert saved_keys(tmp_path / "out") == own
        again, info = AUTO[kind].from_pretrained(tmp_path / "out", output_loading_info=True)
        assert type(again) is BOTH[kind] and not any(info.values())
        assert torch.equal(scored(again, kind, input_ids=ids), scored(model, kind, input_ids=ids))
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    assert read_json(tmp_path / "out")["architectures"] == [BOTH[kind].__name__]


@pytest.mark.parametrize("kind", BOTH)
def test_a_published_hybrid_becomes_a_classifier(kind, repos, hub, owner, tmp_path):
    causal = nudge(ManticoreForCausalLM.from_components(repos), "b.backbone.layers.0.norm.weight")
    causal.save_pretrained(tmp_path / "causal")
    publish_hybrid(hub, f"{owner}/hybrid", tmp_path / "causal")
    model, info = AUTO[kind].from_pretrained(f"{owner}/hybrid", num_labels=5, output_loading_info=True)
    scores = {key for key in model.state_dict() if key.startswith("score.")}
    assert (
        info["missing_keys"] == scores
        and not info["unexpected_keys"]
        and len(scores) == (2 if kind == "sequence" else 4)
    )
    for name, value in model.state_dict().items():
        if name in scores:
            assert value.std() < 0.05 and (value.count_nonzero() > 0) == name.endswith("weight")
        else:
            assert torch.equal(causal.state_dict()[name], value), name
    # Saved as it is now, its heads must be there
    model.save_pretrained(tmp_path / "out")
    config = (tmp_path / "out" / "config.json").read_text()
    causal.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(config)
    with pytest.raises(ManticoreError, match=r"tensors are neither in the hybrid's file .* score\.heads"):
        AUTO[kind].from_pretrained(tmp_path / "out")


def test_another_number_of_labels_is_refused_unless_asked_for(repos, tmp_path):
    ManticoreForSequenceClassification.from_components(repos, num_labels=3).save_pretrained(tmp_path)
    for kind in (ManticoreError, RuntimeError):  # as Transformers' own
        with pytest.raises(kind, match=r"3 labels in the file.*num_labels=5.*ignore_mismatched_sizes=True"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(tokens() % 60).logits.shape == (2, 5)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_classifier_in_other_classes(tmp_path, preset):
    """AutoModel has no use for the heads that a classifier lacks; a causal LM says that it does."""
    model = ManticoreForCausalLM.from_components([tiny("gpt_neox"), tiny("llama")], num_blocks=2, preset=preset)
    classifier = ManticoreForSequenceClassification.from_causal_lm(model, num_labels=3)
    wanted = ManticoreModel.forward(model, tokens()).last_hidden_state
    classifier.save_pretrained(tmp_path / "0")
    for i in range(2):  # and again, of what AutoModel saves
        base = AutoModel.from_pretrained(tmp_path / f"{i}").eval()
        assert torch.equal(base(tokens()).last_hidden_state, wanted)
        assert not [key for key in base.state_dict() if "lm_head" in key or "embed_out" in key]
        base.save_pretrained(tmp_path / f"{i + 1}")
    for cls in (AutoModelForCausalLM, ManticoreForCausalLM):
        with pytest.raises(ManticoreError, match="saved as a classifier .*AutoModelForSequenceClassification"):
            cls.from_pretrained(tmp_path / "0")


def test_the_models_that_were_given_keep_their_heads():
    parts = {name: tiny(name) for name in ("llama", "gpt_neox")}
    before = {name: part(tokens()).logits for name, part in parts.items()}
    model = ManticoreForSequenceClassification.from_components(list(parts.values()), num_labels=2)
    for (name, part), own in zip(parts.items(), model.config.component_names):
        assert torch.equal(part(tokens()).logits, before[name])
        assert model.component(own).base_model is part.base_model  # the weights are not copied
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == 120 and model(tokens() + 20).logits.shape == (2, 2)


# ---- training and pipelines ------------------------------------------------------------------------------------------


def rows(kind, count=16):
    """The label says whether token 5 was seen; at most nine tokens, padded on the right by the collator."""
    out = []
    for i in range(count):
        ids = (tokens(1, 5 + i % 5, seed=i)[0] % 50 + 6).tolist()
        ids[2] = 5 if i % 2 else 7
        seen = [int(5 in ids[: n + 1]) for n in range(len(ids))]
        out.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": seen[-1] if kind == "sequence" else seen}
        )
    return out


def collate(batch):
    width, out = max(len(row["input_ids"]) for row in batch), {}
    for key, pad in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        values = [row[key] for row in batch]
        if isinstance(values[0], list):
            values = [value + [pad] * (width - len(value)) for value in values]
        out[key] = torch.tensor(values)
    return out


@pytest.mark.parametrize("kind", BOTH)
def test_the_trainer_trains_resumes_and_saves(kind, repos, tmp_path):
    def trainer(model, steps):
        args = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            **{**QUIET, "save_strategy": "steps"},
            save_steps=4,
            logging_steps=1,
            max_grad_norm=0.0,
        )
        return Trainer(
            model=model,
            args=args,
            train_dataset=rows(kind),
            eval_dataset=rows(kind, 6),
            data_collator=collate,
            callbacks=[ComponentClipping()],
        )

    torch.manual_seed(1)
    model = set_stage(BOTH[kind].from_components(repos, num_labels=2), "finetune")
    whole = trainer(model, 8)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[0] < 1.5 and losses[-1] < 0.5 * losses[0]
    prediction = whole.predict(rows(kind, 6))
    assert prediction.predictions.shape == ((6, 2) if kind == "sequence" else (6, 9, 2))
    resumed = trainer(set_stage(BOTH[kind].from_components(repos, num_labels=2), "finetune"), 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    loaded = AUTO[kind].from_pretrained(tmp_path / "checkpoint-8")
    ids = tokens() % 60
    assert torch.equal(scored(loaded.eval(), kind, input_ids=ids), scored(model.eval(), kind, input_ids=ids))


def test_the_first_stage_trains_the_heads(repos):
    model = set_stage(ManticoreForSequenceClassification.from_components(repos, embeddings="fresh"), "projectors")
    names = {name.partition(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert names == {"a", "b", "hybrid_mixer", "score"}
    trained = {name for name, value in model.named_parameters() if value.requires_grad and name[0] in "ab"}
    assert trained == {"a.model.embed_tokens.weight", "b.backbone.embeddings.weight"}


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("kind", BOTH)
def test_adapters(kind, repos, hub, owner, tmp_path):
    model = BOTH[kind].from_components(repos, num_labels=2)
    model.save_pretrained(tmp_path / "base")
    commit = publish_hybrid(hub, f"{owner}/classifier", tmp_path / "base")
    remote = get_class_from_dynamic_module(f"hybrid_manticore.{BOTH[kind].__name__}", f"{owner}/classifier")
    assert remote is not BOTH[kind]
    for cls in (BOTH[kind], remote):
        model = cls.from_pretrained(f"{owner}/classifier")
        config = lora_config(model, r=2)
        assert config.task_type == ("SEQ_CLS" if kind == "sequence" else "TOKEN_CLS") and config.revision == commit
        assert set(config.modules_to_save) >= {"hybrid_mixer", "score"}
        assert not any("score" in target or "lm_head" in target for target in config.target_modules)
        peft = get_peft_model(model, config)
        before, batch = scored(peft.eval(), kind, **collate(rows(kind))), collate(rows(kind))
        optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            peft(**batch).loss.backward()
            optimizer.step()
        expected = scored(peft, kind, **batch)
        assert (expected - before).abs().max() > 1e-2
        peft.save_pretrained(tmp_path / "adapter")
        fresh = PeftModel.from_pretrained(BOTH[kind].from_pretrained(f"{owner}/classifier"), tmp_path / "adapter")
        assert torch.equal(scored(fresh.eval(), kind, **batch), expected)
        if kind == "sequence":
            auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
            assert torch.equal(scored(auto.eval(), kind, **batch), expected)
        merged = peft.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(
            scored(AUTO[kind].from_pretrained(tmp_path / "merged"), kind, **batch), scored(merged, kind, **batch)
        )
    assert set(lora_config(merged, train_mixer=False).modules_to_save) == {"score"}
    assert lora_config(merged, task_type="FEATURE_EXTRACTION").task_type == "FEATURE_EXTRACTION"
    plain = get_peft_model(merged, LoraConfig(task_type=config.task_type, target_modules=["q_proj"]))
    assert any("score.modules_to_save" in name for name, _ in plain.named_parameters())  # as of any classifier


def test_pipelines(repos, hub, owner, tmp_path, caplog):
    texts = ["w5 w6 w7 w8", "w9 w10"]
    for kind, task in (("sequence", "text-classification"), ("token", "token-classification")):
        model = BOTH[kind].from_components(repos, id2label={0: "no", 1: "yes"})
        model.save_pretrained(tmp_path / kind)
        tokenizer().save_pretrained(tmp_path / kind)
        publish_hybrid(hub, f"{owner}/{kind}", tmp_path / kind)
        pipe = pipeline(task, model=f"{owner}/{kind}", batch_size=2)
        found = pipe(texts)
        for text, result in zip(texts, found):
            scores = scored(model, kind, **tokenizer()(text, return_tensors="pt", return_token_type_ids=False))
            probabilities = scores.softmax(-1)[0]
            results = [result] if kind == "sequence" else result
            for one, row in zip(results, probabilities.view(-1, 2), strict=True):
                assert one["label" if kind == "sequence" else "entity"] == ("yes" if row[1] > row[0] else "no")
                assert one["score"] == pytest.approx(row.max().item(), abs=1e-5)
    assert "is not supported" not in caplog.text
    assert component_keys(tmp_path / "token") == {key for key in saved_keys(tmp_path / "token") if "score" in key}


def test_heads_that_are_gone_take_no_memory(hub, owner, tmp_path):
    for name, family in (("a", "llama"), ("b", "gpt_neox")):
        # Of its own, not a copy of one that is kept
        publish(hub, f"{owner}/{name}", published_tiny.__wrapped__(family, vocabulary=77), tmp_path / "src")
    model = ManticoreForSequenceClassification.from_components([f"{owner}/a", f"{owner}/b"])
    gc.collect()
    heads = [one for one in gc.get_objects() if isinstance(one, torch.nn.Linear) and one.out_features == 77]
    assert not heads and model.config.vocab_size == 77
