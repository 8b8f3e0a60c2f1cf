"""Hybrids that classify sequences or tokens: scores, padding, caches, losses."""

import pytest
import torch
import torch.nn.functional as F
from classifiers import AUTO, BOTH, scored
from families import components, hybrid, randomise, tiny, tokens
from transformers import AutoModelForSequenceClassification

from manticore_hf import (
    ComponentSpec,
    ManticoreError,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    ManticoreModel,
)
from manticore_hf.training.prune import prune

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
        base = ManticoreModel.forward(causal, tokens(), attention_mask=MASK)
    if model.config.embeddings == "native":
        heads, states = [model.score.heads[f"{name}-1"] for name in model.config.component_names], base.states.values()
        weights = causal.mixture_weights()[-1]
    else:
        heads, states, weights = [model.score.heads["shared"]], [base.last_hidden_state], [1.0]
    expected = sum(w * head(state) for w, head, state in zip(weights, heads, states))
    expected = expected[:, -1] if kind == "sequence" else expected
    torch.testing.assert_close(scored(model, kind, input_ids=tokens(), attention_mask=MASK), expected)


@pytest.mark.quick(every=2)
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
        torch.testing.assert_close(
            scored(model, kind, inputs_embeds=embeds, attention_mask=mask)[0], alone[0], rtol=1e-4, atol=1e-5
        )


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
    assert torch.equal(
        scored(model, "sequence", input_ids=tokens(1)),
        scored(model, "sequence", input_ids=tokens(1), attention_mask=MASK[:1]),
    )


def test_a_cache_goes_on():
    model, ids = made("sequence", num_blocks=2), tokens()
    assert model(ids).past_key_values is None
    first = model(ids[:, :5], attention_mask=MASK[:, :5], use_cache=True)
    second = model(ids[:, 5:], attention_mask=MASK, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(ids, attention_mask=MASK).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_pruned_hybrids_classify(kind, preset, tmp_path):
    causal = hybrid("gpt_neox+mamba", num_blocks=2, preset=preset)
    small = prune(causal, ["gpt_neox", "mamba"])
    model = BOTH[kind].from_causal_lm(small, num_labels=3)
    assert not [key for key in model.state_dict() if "gpt_neox.lm_head" in key or "gpt_neox.embed_out" in key]
    with torch.no_grad():
        base = ManticoreModel.forward(small, tokens(), attention_mask=MASK)
        (head,) = model.score.heads.values()
        expected = head(base.states["mamba"] if preset == "default" else base.last_hidden_state)
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
    with pytest.raises(ManticoreError, match="ManticoreForSequenceClassification is not a causal hybrid"):
        ManticoreForTokenClassification.from_causal_lm(model)
