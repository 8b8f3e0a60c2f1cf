"""Hybrids that classify sequences or tokens: scores, padding, losses, saving, training, adapters, pipelines."""

import gc

import pytest
import torch
import torch.nn.functional as F
from families import components, hybrid, randomise, tiny, tokens
from hub_models import component_keys, nudge, publish, publish_hybrid, read_json, saved_keys, tokenizer
from hub_models import tiny as published_tiny
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from tiny_hybrid import QUIET
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from manticore_hf import (
    ComponentSpec,
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    lora_config,
    set_stage,
)
from manticore_hf.hardening import harden
from manticore_hf.stages import ComponentClipping

BOTH = {"sequence": ManticoreForSequenceClassification, "token": ManticoreForTokenClassification}
AUTO = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
MASK = torch.ones(2, 9, dtype=torch.long)


def specs(name):
    return [ComponentSpec(part, name=family) for family, part in components(name).items()]


def made(kind, name="gpt_neox+mamba", labels=3, **settings):
    """A classifier whose mixer and score heads are random."""
    model = BOTH[kind].from_components(specs(name), num_labels=labels, **settings)
    randomise(model)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def scored(model, kind, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


# ---- what is scored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("mixture", ["static", "token"])
def test_scores_are_the_mixture_of_the_components_own(kind, mixture):
    """By hand: the plain components' final states, one head each, weights from the mixer's numbers."""
    model = made(kind, mixture=mixture)
    parts, ids, expected, mixer = components("gpt_neox+mamba"), tokens(), 0.0, model.hybrid_mixer
    logits = mixer.token_gate.linear.bias if mixture == "token" else mixer.alpha_logits[-1]
    assert logits.unique().numel() == 2
    for weight, (name, part) in zip(logits.exp() / logits.exp().sum(), parts.items()):
        head = model.score.heads[f"{name}-0"]
        for row in range(len(ids)):
            for position in range(ids.shape[1]):
                state = part.base_model(ids[row : row + 1, : position + 1]).last_hidden_state[0, -1]
                score = head.weight @ state + (0 if head.bias is None else head.bias)
                expected = expected + weight * F.one_hot(torch.tensor(row * 9 + position), 18)[:, None] * score
    expected = expected.view(2, 9, 3)
    expected = expected[:, -1] if kind == "sequence" else expected
    torch.testing.assert_close(scored(model, kind, input_ids=ids, attention_mask=MASK), expected, rtol=1e-4, atol=1e-4)
    assert (head.bias is None) == (kind == "sequence")


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("settings", [{"embeddings": "native"}, {"preset": "paper"}, {"embeddings": "fresh"}])
def test_scores_read_what_the_blocks_end_with(kind, settings):
    torch.manual_seed(0)
    causal = hybrid("gpt_neox+mamba", num_blocks=2, mixture="static", **settings)
    model = BOTH[kind].from_causal_lm(causal, num_labels=4)
    with torch.no_grad():
        base = super(ManticoreForCausalLM, causal).forward(tokens(), attention_mask=MASK)
    if model.config.embeddings == "native":
        heads, states = [model.score.heads[f"{name}-1"] for name in model.config.component_names], base.states
        weights = causal.mixture_weights()[-1]
    else:
        heads, states, weights = [model.score.heads["shared"]], [base.last_hidden_state], [1.0]
    expected = sum(w * head(state) for w, head, state in zip(weights, heads, states))
    expected = expected[:, -1] if kind == "sequence" else expected
    torch.testing.assert_close(scored(model, kind, input_ids=tokens(), attention_mask=MASK), expected)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral", "qwen3", "gemma2"])
def test_a_one_hot_hybrid_is_the_components_own_classifier(kind, family, tmp_path):
    ours = BOTH[kind].from_components([tiny("mamba", 3), ComponentSpec(tiny(family), name="it")], num_labels=3)
    ours.set_mixture_weights("it")
    tiny(family).save_pretrained(tmp_path)
    theirs = AUTO[kind].from_pretrained(tmp_path, num_labels=3)
    head = next(module for name, module in theirs.named_children() if name in ("score", "classifier"))
    with torch.no_grad():
        for name, value in ours.score.heads["it-0"].named_parameters():
            value.copy_(head.get_parameter(name))
    ids = tokens()
    ids[0, -3:] = 0  # padding
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    one, two = scored(ours, kind, **inputs), scored(theirs.eval(), kind, **inputs)
    if kind == "token":  # padding has other positions here
        one, two = one[ids != 0], two[ids != 0]
    assert torch.equal(one, two)


def test_every_family_has_an_end_that_can_be_scored():
    for family in ("opt_projected", "mamba2", "bloom", "jamba", "recurrent_gemma"):
        part = tiny(family)
        model = ManticoreForSequenceClassification.from_components([ComponentSpec(part, name="it")], num_labels=2)
        expected = part.base_model(tokens()).last_hidden_state[:, -1] @ model.score.heads["it-0"].weight.T
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(kind, side):
    model, ids = made(kind, "gpt_neo+mamba2+opt", num_blocks=2), tokens(1)
    alone = scored(model, kind, input_ids=ids, attention_mask=MASK[:1])
    pad = (3, 0) if side == "left" else (0, 3)
    both = torch.cat([F.pad(ids, pad), tokens(1, 12, seed=2)])
    mask = torch.cat([F.pad(MASK[:1], pad), torch.ones(1, 12, dtype=torch.long)])
    out = scored(model, kind, input_ids=both, attention_mask=mask)[0]
    out = out if kind == "sequence" else out[mask[0] == 1]
    torch.testing.assert_close(out, alone[0], rtol=1e-4, atol=1e-5)
    if (kind, side) == ("sequence", "right"):  # padding is also known by its token
        torch.testing.assert_close(scored(model, kind, input_ids=both)[0], alone[0], rtol=1e-4, atol=1e-5)
        embeds = model.get_input_embeddings()(both)
        torch.testing.assert_close(scored(model, kind, inputs_embeds=embeds, attention_mask=mask)[0], alone[0],
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_rows_of_unknown_length_are_refused():
    model = made("sequence")
    embeds = model.get_input_embeddings()(tokens())
    with pytest.raises(ManticoreError, match="2 rows end is unknown: there is neither an attention_mask nor input_ids"):
        model(inputs_embeds=embeds)
    model.config.pad_token_id = None
    for _ in range(2):
        with pytest.raises(ManticoreError, match=r"2 rows end .* a config.pad_token_id. Give an attention_mask."):
            model(tokens())
        vars(model.config).pop("pad_token_id", None)  # as of components that have none
    assert torch.equal(scored(model, "sequence", input_ids=tokens(1)),
                       scored(model, "sequence", input_ids=tokens(1), attention_mask=MASK[:1]))  # fmt: skip


def test_a_cache_goes_on():
    model, ids = made("sequence", num_blocks=2), tokens()
    assert model(ids).past_key_values is None
    first = model(ids[:, :5], attention_mask=MASK[:, :5], use_cache=True)
    second = model(ids[:, 5:], attention_mask=MASK, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(ids, attention_mask=MASK).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_hardened_hybrids_classify(kind, preset, tmp_path):
    causal = hybrid("gpt_neox+mamba", num_blocks=2, preset=preset)
    small = harden(causal, ["gpt_neox", "mamba"])
    model = BOTH[kind].from_causal_lm(small, num_labels=3)
    assert not [key for key in model.state_dict() if "gpt_neox.lm_head" in key or "gpt_neox.embed_out" in key]
    with torch.no_grad():
        base = super(ManticoreForCausalLM, small).forward(tokens(), attention_mask=MASK)
        (head,) = model.score.heads.values()
        expected = head(base.states[1] if preset == "default" else base.last_hidden_state)
    expected = expected[:, -1] if kind == "sequence" else expected
    out = scored(model, kind, input_ids=tokens(), attention_mask=MASK)
    torch.testing.assert_close(out, expected)
    model.save_pretrained(tmp_path)
    again = AUTO[kind].from_pretrained(tmp_path)
    assert torch.equal(scored(again, kind, input_ids=tokens(), attention_mask=MASK), out)


# ---- losses ----------------------------------------------------------------------------------------------------------

PROBLEMS = {
    "regression": (1, torch.tensor([0.5, -2.0]), lambda x, y: ((x[:, 0] - y) ** 2).mean()),
    "regressions": (3, torch.tensor([[0.5, -2.0, 1.0]] * 2), lambda x, y: ((x - y) ** 2).mean()),
    "single_label_classification": (3, torch.tensor([2, 0]), F.cross_entropy),
    "multi_label_classification": (
        3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), F.binary_cross_entropy_with_logits,
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
def test_losses_of_sequences(problem):
    labels, wanted, loss = PROBLEMS[problem]
    model = made("sequence", labels=labels, problem_type="regression" if problem == "regressions" else None)
    inputs = {"input_ids": tokens(), "attention_mask": MASK, "labels": wanted}
    out = model(**inputs)
    torch.testing.assert_close(out.loss, loss(out.logits, wanted))
    assert model.config.problem_type == problem.rstrip("s")
    # Two micro-batches of a Trainer's step: each gets its share
    halves = [
        model(**{key: value[row : row + 1] for key, value in inputs.items()}, num_items_in_batch=wanted.numel()).loss
        for row in range(2)
    ]
    torch.testing.assert_close(sum(halves), out.loss)
    assert model(**inputs, return_dict=False)[0] == out.loss


def test_losses_of_tokens_leave_out_what_has_no_label():
    model = made("token")
    labels = torch.randint(0, 3, (2, 9))
    labels[0, 2:5] = labels[1, 0] = -100
    out = model(tokens(), attention_mask=MASK, labels=labels)
    picked = out.logits.log_softmax(-1)[labels != -100][range(14), labels[labels != -100]]
    torch.testing.assert_close(out.loss, -picked.mean())
    again = model(tokens(), attention_mask=MASK, labels=labels, num_items_in_batch=torch.tensor(28))
    torch.testing.assert_close(again.loss, out.loss / 2)


@pytest.mark.parametrize("kind", BOTH)
def test_components_have_losses_of_their_own(kind):
    labels = torch.tensor([2, 0]) if kind == "sequence" else torch.randint(0, 3, (2, 9))
    inputs = {"input_ids": tokens(), "attention_mask": MASK}
    model = made(kind, mixture="static", mix_loss_weight=0.5, component_loss_weight=2.0)
    loss, expected = model(**inputs, labels=labels).loss, 0.0
    for weight, who in ((0.5, None), (2.0, "gpt_neox"), (2.0, "mamba")):
        model.set_mixture_weights(who)
        scores = scored(model, kind, **inputs)
        expected += weight * F.cross_entropy(scores.view(-1, 3), labels.view(-1))
    torch.testing.assert_close(loss, expected)


def test_dropout_of_tokens_only_in_training():
    model = made("token")
    assert model.score.dropout.p == 0.1 and made("sequence").score.dropout.p == 0.0
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)
    model.train()
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)


# ---- labels, saving, loading -----------------------------------------------------------------------------------------


def test_labels_have_names(tmp_path):
    names = {0: "bad", 1: "fair", 2: "good"}
    model = ManticoreForSequenceClassification.from_components(specs("gpt_neox+mamba"), id2label=names)
    assert model.score.heads["mamba-0"].weight.shape == (3, 48)
    model.save_pretrained(tmp_path)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    assert config.id2label == names and config.label2id == {"bad": 0, "fair": 1, "good": 2}
    with pytest.raises(ManticoreError, match="num_labels=2 contradicts id2label, which has 3 labels"):
        ManticoreForSequenceClassification.from_components(specs("gpt_neox+mamba"), id2label=names, num_labels=2)
    with pytest.raises(ManticoreError, match="num_labels=0 must be at least 1"):
        ManticoreForSequenceClassification.from_components(specs("gpt_neox+mamba"), num_labels=0)
    with pytest.raises(ManticoreError, match="ManticoreForSequenceClassification is no causal hybrid"):
        ManticoreForTokenClassification.from_causal_lm(model)


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
    assert info["missing_keys"] == scores and not info["unexpected_keys"] and len(scores) == (2 if kind == "sequence"
                                                                                             else 4)  # fmt: skip
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
    with pytest.raises(ManticoreError, match=r"another shape .* score\.heads\.a-0\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(tokens() % 60).logits.shape == (2, 5)


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
        out.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": seen[-1] if kind == "sequence" else
                    seen})  # fmt: skip
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
            str(tmp_path), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=2e-2, lr_scheduler_type="constant", **{**QUIET, "save_strategy": "steps"}, save_steps=4,
            logging_steps=1, max_grad_norm=0.0,
        )  # fmt: skip
        return Trainer(model=model, args=args, train_dataset=rows(kind), eval_dataset=rows(kind, 6),
                       data_collator=collate, callbacks=[ComponentClipping()])  # fmt: skip

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


@pytest.mark.parametrize("kind", BOTH)
def test_adapters(kind, repos, hub, owner, tmp_path):
    model = BOTH[kind].from_components(repos, num_labels=2)
    model.save_pretrained(tmp_path / "base")
    commit = publish_hybrid(hub, f"{owner}/classifier", tmp_path / "base")
    remote = get_class_from_dynamic_module(f"modeling_manticore.{BOTH[kind].__name__}", f"{owner}/classifier")
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
        assert torch.equal(scored(AUTO[kind].from_pretrained(tmp_path / "merged"), kind, **batch),
                           scored(merged, kind, **batch))  # fmt: skip
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
        publish(hub, f"{owner}/{name}", published_tiny(family, vocabulary=77), tmp_path / "src")
    model = ManticoreForSequenceClassification.from_components([f"{owner}/a", f"{owner}/b"])
    gc.collect()
    heads = [one for one in gc.get_objects() if isinstance(one, torch.nn.Linear) and one.out_features == 77]
    assert not heads and model.config.vocab_size == 77
