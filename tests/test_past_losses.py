"""Mixtures that go by the components' past losses: against a plain loop, and by the contract of every other hybrid."""

import json
import math

import cache_rows
import pytest
import torch
from aligned_pairs import TEXTS
from aligned_pairs import hybrid as aligned_hybrid
from aligned_pairs import tokenizer as aligned_tokenizer
from decoding_contract import check_decoding
from families import tiny, tokens
from manticore_hf.modeling import past_losses
from manticore_hf.modeling.past_losses import GATE_DECAYS, MOST, decayed_sums
from transformers import DynamicCache

from manticore_hf import (
    ComponentSpec,
    ManticoreConfig,
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
)
from manticore_hf.families import contract
from manticore_hf.families.contract import close
from manticore_hf.training.trained_stages import take_mixture

ONLINE = {"mixture": "online", "online_eta": 0.7, "online_decay": 0.85, "online_share": 0.05}
GATE = {"mixture": "token", "gate_past_losses": True}
MODELS = {
    "gate": ("gpt_neox+mamba", {"num_blocks": 1, **GATE}),
    "attending": ("llama+opt", {"num_blocks": 1, **ONLINE}),
    "recurrent, geometric": ("gpt_neox+mamba", {"num_blocks": 1, "mixture_space": "logprob", **ONLINE}),
    "three, in blocks": ("gpt_neo+mamba2+opt", {"num_blocks": 2, **ONLINE}),
    "paper": ("gpt_neox+mamba", {"num_blocks": 3, "preset": "paper", **ONLINE}),
}


def hybrid(name, **settings):
    """A hybrid of tiny components of these families, of several depths."""
    names = name.split("+")
    parts = [ComponentSpec(tiny(one, seed=i), name=one) for i, one in enumerate(names)]
    model = ManticoreForCausalLM.from_components(parts, verify=False, **settings).eval()
    contract.randomise(model)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    name, settings = MODELS[request.param]
    return hybrid(name, **settings)


def naive_weights(model, ids, logits, states=None):
    """The weights [time, K] of one row, one token after the other."""
    return (
        naive_gate(model, ids, logits, states) if model.config.mixture == "token" else naive_online(model, ids, logits)
    )


def naive_gate(model, ids, logits, states):
    """A token gate that reads past losses: its parameters by name, and a loop."""
    own = dict(model.hybrid_mixer.token_gate.named_parameters())
    means, out = torch.zeros(len(logits), len(GATE_DECAYS)), []
    for t, token in enumerate(ids.tolist()):
        features = []
        for k, (one, state) in enumerate(zip(logits, states)):
            logprob = one[t].log_softmax(-1)
            features.append(state[t] / (state[t].square().mean() + 1e-6).sqrt())
            features.append(torch.stack([-(logprob.exp() * logprob).sum(), logprob.max()]))
            if t > 0:
                loss = -one[t - 1].log_softmax(-1)[token]
                for j, decay in enumerate(GATE_DECAYS):
                    means[k, j] = decay * means[k, j] + (1 - decay) * loss
        scores = own["linear.weight"] @ torch.cat(features) + own["linear.bias"]
        scores = scores + own["past.weight"] @ (means - means.mean(0)).flatten()
        out.append(scores.softmax(-1))
    return torch.stack(out)


def naive_online(model, ids, logits):
    """The online mixture, with Python's own numbers."""
    config, alpha = model.config, model.mixture_weights()
    prior = alpha[-1 if config.embeddings == "native" or config.head_mixture == "last" else 0].tolist()
    sums, out = [0.0] * len(prior), []
    for t, token in enumerate(ids.tolist()):
        for k, own in enumerate(logits):
            if t > 0:
                loss = -own[t - 1].double().log_softmax(-1)[token].item()
                sums[k] = config.online_decay * sums[k] + min(loss, MOST)
        scores = [p * math.exp(-config.online_eta * s) for p, s in zip(prior, sums)]
        share = config.online_share
        out.append([(1 - share) * one / sum(scores) + share * p for one, p in zip(scores, prior)])
    return torch.tensor(out)


def own_logits(model, ids, **given):
    """(output, what every component's head reads, its logits), inside the hybrid."""
    found = []
    heads = type(model).apply_heads

    def listening(self, *args):
        found[:] = [heads(self, *args)]
        return found[0]

    model.__dict__["apply_heads"] = listening.__get__(model)
    try:
        out = model(input_ids=ids, use_cache=False, **given)
    finally:
        del model.__dict__["apply_heads"]
    return out, *(list(one.values()) for one in found[0][1:])


@torch.no_grad()
def test_weights_and_logits_are_those_of_a_plain_loop(model):
    ids = tokens(2, 24, 3)
    out, states, own = own_logits(model, ids)
    for row in range(2):
        wanted = naive_weights(model, ids[row], *([one[row] for one in them] for them in (own, states)))
        close(out.weights[row], wanted, "weights of a scan and of a loop")
        logprobs = torch.stack([one[row].log_softmax(-1) for one in own], 1)
        mean = (wanted[..., None] * (logprobs.exp() if model.config.mixture_space == "prob" else logprobs)).sum(1)
        mean = mean.log() if model.config.mixture_space == "prob" else mean.log_softmax(-1)
        close(out.logits[row].log_softmax(-1), mean, "the mixture and the components' own, mixed by hand")
    assert (out.weights.amax(1) - out.weights.amin(1)).max() > 0.1  # it moves


@torch.no_grad()
def test_the_future_is_not_known(model):
    ids = tokens(1, 16, 3)
    other = ids.clone()
    other[0, 10:] = tokens(1, 6, 9)
    one, two = (model(input_ids=x, use_cache=False) for x in (ids, other))
    close(one.weights[:, :10], two.weights[:, :10], "weights before a text goes on otherwise")
    assert (one.weights[:, 11:] - two.weights[:, 11:]).abs().max() > 1e-3


@pytest.mark.quick(every=3)
def test_the_contract_of_decoding(model):
    check_decoding(model)


def test_sampling_and_a_second_turn(model):
    ids, mask, _ = contract.left_padded(8)
    given = {"do_sample": True, "num_return_sequences": 3, "top_k": 20}
    torch.manual_seed(3)
    wanted, wanted_logits, _ = contract.generate(model, ids, mask, use_cache=False, **given)
    torch.manual_seed(3)
    got, logits, out = contract.generate(model, ids, mask, **given)
    assert torch.equal(got, wanted)
    close(logits, wanted_logits)
    more = torch.cat([got, tokens(6, 3, 8)], -1)
    mask = torch.cat([mask.repeat_interleave(3, 0), torch.ones(6, 9, dtype=torch.long)], -1)
    wanted, wanted_logits = contract.naive_greedy(model, more, mask, 4)
    got, logits, _ = contract.generate(model, more, mask, 4, cache=out.cache)
    assert torch.equal(got, wanted)
    close(logits, wanted_logits)


@torch.no_grad()
def test_a_second_turn_that_calls_padding_what_was_read_as_text():
    """As `generate` reads the end of rows that ended before others: attention could leave it out, a loss cannot."""
    ids, mask = tokens(2, 11, 5), torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:8] = 0
    for settings in (ONLINE, GATE):
        model = hybrid("llama+opt", num_blocks=1, **settings)
        wanted, wanted_logits = contract.naive_greedy(model, ids, mask, 4)
        cache = model(input_ids=ids[:, :8]).cache
        with pytest.raises(ManticoreError, match="attention_mask differs from before for tokens in the cache"):
            model(input_ids=ids[:, 8:], attention_mask=mask, cache=cache)
        got, logits, _ = contract.generate(model, ids, mask, 4, cache=cache)
        assert torch.equal(got, wanted)
        close(logits, wanted_logits)


@torch.no_grad()
def test_few_logits_wanted_and_made_in_pieces(model, monkeypatch):
    """The losses of a prompt are known even where only its last logits are wanted; a row is read piece by piece."""
    ids = tokens(2, 11, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 7:] = 0
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False)
    for piece in (past_losses.PIECE, 1000):
        monkeypatch.setattr(past_losses, "PIECE", piece)
        cache = model.make_cache()
        for kept in (3, torch.tensor([10, 4])):
            out = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False)
            where = slice(-3, None) if isinstance(kept, int) else kept
            close(out.logits, whole.logits[:, where])
            close(out.weights, whole.weights[:, where])
        model(input_ids=ids[:, :9], attention_mask=mask[:, :9], cache=cache, logits_to_keep=1)
        tail = model(input_ids=ids[:, 9:], attention_mask=mask, cache=cache)
        real = mask[:, 9:].bool()
        close(tail.logits[real], whole.logits[:, 9:][real])


@torch.no_grad()
def test_rows_of_a_cache_are_picked_repeated_and_taken_back():
    model = hybrid("llama+opt", num_blocks=1, **ONLINE)
    ids = tokens(3, 12, 5)
    whole = model(input_ids=ids, use_cache=False).logits

    read = cache_rows.reader(model, ids)
    cache_rows.check_picked(model, ids, whole)
    cache = model.make_cache()
    cache.activate_past_recording()
    read(cache, slice(None), 0, 4)
    model(input_ids=tokens(3, 5, 9), cache=cache)
    cache.crop(-2)
    cache.crop(-3)
    close(read(cache, slice(None), 4, 12), whole[:, 4:])
    cache.reset()
    close(read(cache, slice(None), 0, 12), whole)
    cache.crop(-12)
    close(read(cache, slice(None), 0, 12), whole)
    cache = model.make_cache()
    read(cache, slice(None), 0, 4)
    with pytest.raises(ManticoreError, match="activate_past_recording"):
        cache.crop(-1)


def test_drafts_are_verified():
    """Assisted decoding takes refused drafts back."""
    model = hybrid("llama+opt", num_blocks=1, **ONLINE)
    ids = tokens(1, 8, 3).repeat(1, 3)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), wanted)


@torch.no_grad()
def test_the_scan_is_a_loop():
    generator = torch.Generator().manual_seed(0)
    for time in (1, 2, 3, 8, 13):
        values, factors = (torch.rand(2, time, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        wanted, state = [], torch.zeros(2, 3, 2, dtype=torch.float64)
        for t in range(time):
            state = factors[:, t] * state + values[:, t]
            wanted.append(state)
        torch.testing.assert_close(decayed_sums(values, factors), torch.stack(wanted, 1))


def test_half_precision_and_impossible_tokens_stay_finite():
    ids = tokens(2, 10, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = hybrid("llama+opt", num_blocks=1, **ONLINE).to(dtype).train()
        model.hybrid_mixer.float()
        ruled_out = ids[:, 4].tolist() + ids[:, 6].tolist()  # the text holds them
        hook = (
            model.component("llama")
            .get_output_embeddings()
            .register_forward_hook(
                lambda module, args, out: out.index_fill(-1, torch.tensor(ruled_out), -torch.inf)  # noqa: B023
            )
        )
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        hook.remove()
        assert out.loss.isfinite() and out.weights.isfinite().all(), dtype
        assert (out.weights[:, -1, 0] < out.weights[:, 0, 0]).all()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert model.component("opt").get_output_embeddings().weight.grad.abs().sum() > 0
        assert model.hybrid_mixer.alpha_logits.grad.abs().sum() > 0


@torch.no_grad()
def test_aligned_tokenizers(tmp_path):
    model = aligned_hybrid(tmp_path, **ONLINE)
    ids = torch.tensor([aligned_tokenizer("gpt")(TEXTS["prose"] + TEXTS["umlauts"])["input_ids"]])
    out, _, own = own_logits(model, ids)
    close(out.weights[0], naive_weights(model, ids[0], [one[0] for one in own]), "weights of a scan and of a loop")
    cache = model.make_cache()
    ends = (0, 9, 10, 11, ids.shape[1])
    parts = [model(input_ids=ids[:, a:b], cache=cache, logits_to_keep=1).logits for a, b in zip(ends, ends[1:])]
    close(torch.cat(parts, 1), out.logits[:, [end - 1 for end in ends[1:]]], "logits in chunks and at once", 1e-4)
    model.save_pretrained(tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").glob("*.py")}
    assert {"aligned_hybrid.py", "past_losses.py"} <= names
    close(ManticoreForCausalLM.from_pretrained(tmp_path / "saved")(input_ids=ids).logits, out.logits)


def test_what_cannot_be_right_is_said():
    model = hybrid("llama+opt", num_blocks=1, **ONLINE)
    with pytest.raises(ManticoreError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(tokens()))
    with pytest.raises(ManticoreError, match="a hybrid takes a ManticoreCache"):
        model(input_ids=tokens(), cache=DynamicCache())
    for key, value in (("online_eta", -1), ("online_decay", 1.5), ("online_share", 2), ("online_share", "all")):
        with pytest.raises(ManticoreError, match=f"{key}=.*must be a non-negative number"):
            ManticoreConfig(**{key: value})
    with pytest.raises(ManticoreError, match="gate_past_losses='yes' must be true or false"):
        ManticoreConfig(gate_past_losses="yes")


@torch.no_grad()
def test_a_gate_starts_where_one_that_reads_no_losses_does(tmp_path):
    """Its new weights are zero, and nothing of an older hybrid's gate has changed."""
    plain, ids = hybrid("gpt_neox+mamba", num_blocks=1, mixture="token"), tokens()
    model = hybrid("gpt_neox+mamba", num_blocks=1, **GATE)
    state = {key: value for key, value in plain.state_dict().items() if key.startswith("hybrid_mixer.")}
    model.hybrid_mixer.reset()
    assert not model.hybrid_mixer.token_gate.past.weight.any()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert "hybrid_mixer.token_gate.past.weight" in missing and not unexpected
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "past_losses.py").exists()
    values = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert values.pop("gate_past_losses") is False  # as hybrids that are older than this setting
    (tmp_path / "plain" / "config.json").write_text(json.dumps(values))
    close(ManticoreForCausalLM.from_pretrained(tmp_path / "plain")(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_gates_new_weights_are_trained():
    model, ids = hybrid("gpt_neox+mamba", num_blocks=1, **GATE).train(), tokens(2, 10)
    model.hybrid_mixer.reset()
    model(input_ids=ids, labels=ids).loss.backward()
    assert (model.hybrid_mixer.token_gate.past.weight.grad != 0).all()
    model = ManticoreForSequenceClassification.from_components(
        [ComponentSpec(tiny(one), name=one) for one in ("gpt_neox", "mamba")], verify=False, **GATE
    ).train()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1])).loss.backward()
    assert all(one.grad is not None for one in model.hybrid_mixer.token_gate.parameters())  # DDP waits for all


@torch.no_grad()
def test_a_search_leaves_its_alpha_as_the_prior(tmp_path):
    searched, new = (hybrid("gpt_neox+mamba", num_blocks=2, **ONLINE) for _ in range(2))
    searched.save_pretrained(tmp_path / "searched")
    new.hybrid_mixer.alpha_logits.zero_()
    take_mixture(new, tmp_path / "searched")
    assert new.config.mixture_weights[1] is None and new.config.mixture_weights[0] is not None
    close(new.mixture_weights(), searched.mixture_weights())
    first = new(input_ids=tokens(1, 1)).weights  # of a text of which nothing is known
    close(first[0, 0], searched.mixture_weights()[1])


@torch.no_grad()
def test_weights_that_are_fixed_are_exact():
    model = hybrid("llama+opt", num_blocks=1, **ONLINE)
    try:
        model.set_mixture_weights("opt")
        close(model(input_ids=tokens()).logits, model.component("opt")(input_ids=tokens()).logits)
    finally:
        model.set_mixture_weights(None)


def test_saved_with_the_code_it_needs(tmp_path, model):
    contract.check_saved(model, tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").glob("*.py")}
    assert "past_losses.py" in names and not any(name.startswith("aligned") for name in names)
    assert (
        ManticoreConfig.from_pretrained(tmp_path / "saved").auto_map["AutoModel"] == "hybrid_manticore.ManticoreModel"
    )
