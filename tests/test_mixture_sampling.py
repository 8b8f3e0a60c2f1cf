"""Sampling one component per token: each is drawn with the mixture's weights, and writes with its own probabilities."""

import copy
import itertools

import pytest
import torch
from families import tiny
from peft import get_peft_model
from tiny_hybrid import pair
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from manticore_hf import ManticoreError, ManticoreForCausalLM, prompt_config
from manticore_hf.compose import mixture_sampling
from manticore_hf.compose.mixture_sampling import with_lag

PROMPT = torch.tensor([[5, 3, 9, 2, 7]])
FORCED = [4, 8, 6, 1, 3, 9, 5, 2, 7, 4, 8]  # the tokens that are "drawn"


def one_block(parts=None, mixture="token", **settings):
    settings = {"mixture_space": "prob", **settings}
    parts = list(pair()) if parts is None else parts
    model = ManticoreForCausalLM.from_components(parts, num_blocks=1, mixture=mixture, **settings)
    if mixture == "token":
        torch.nn.init.normal_(model.hybrid_mixer.token_gate.linear.weight, std=0.3)
    else:
        torch.nn.init.normal_(model.hybrid_mixer.alpha_logits)
    model.generation_config.eos_token_id = None
    return model.eval()


def sample(model, ids=PROMPT, **given):
    return model.generate(ids, **{"do_sample": True, "mixture_sampling": True, "max_new_tokens": len(FORCED), **given})


class Script:
    """In the place of torch.multinomial: components in some order, tokens as forced; keeps what it was given."""

    order = (0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1)

    def __init__(self):
        self.drawn, self.shares, self.probs = itertools.chain.from_iterable(zip(self.order, FORCED)), [], []

    def __call__(self, probs, size):
        kept = self.shares if len(self.shares) == len(self.probs) else self.probs
        kept.append(probs.detach().clone())
        return torch.tensor([next(self.drawn)])


@pytest.mark.parametrize("mixture,lag", [("static", 16), ("token", 1), ("token", 4), ("online", 1), ("online", 4)])
def test_every_draw_has_the_mixtures_probabilities(monkeypatch, mixture, lag):
    """Weighted by the shares that were drawn with, the components' probabilities are the model's own distribution."""
    model, script = one_block(mixture=mixture), Script()
    monkeypatch.setattr(mixture_sampling.torch, "multinomial", script)
    out = sample(model, gate_lag=lag)
    assert out[0].tolist() == [*PROMPT[0].tolist(), *FORCED]
    monkeypatch.undo()
    with torch.no_grad():
        whole = model(out, use_cache=False)
        own = [model.component(n)(out, use_cache=False).logits.softmax(-1)[0] for n in model.config.component_names]
    start = PROMPT.shape[1] - 1
    for step, (shares, probs, which) in enumerate(zip(script.shares, script.probs, script.order)):
        torch.testing.assert_close(probs, own[which][start + step], rtol=1e-4, atol=1e-6)
        asked = start + step - (step % lag if mixture != "static" else 0)
        wanted = model.mixture_weights()[0] if mixture == "static" else whole.weights[0, asked]
        torch.testing.assert_close(shares, wanted, rtol=1e-4, atol=1e-6)
        if mixture == "static" or lag == 1:
            mixed = sum(share * one[start + step] for share, one in zip(shares, own))
            torch.testing.assert_close(mixed, whole.logits[0, start + step].softmax(-1), rtol=1e-4, atol=1e-6)


HELD = {
    "gate": {"mixture": "token"},
    "gate, past losses": {"mixture": "token", "gate_past_losses": True},
    "online": {"mixture": "online", "online_eta": 0.7, "online_decay": 0.85},
}


@pytest.mark.parametrize("kind", HELD)
def test_a_hybrid_with_a_lag_of_its_own_is_sampled_exactly(monkeypatch, kind):
    """Whatever its weights go by, and wherever in a stretch of kept weights the prompt ends."""
    model, script = one_block(gate_lag=4, **HELD[kind]), Script()
    if kind == "gate, past losses":
        torch.nn.init.normal_(model.hybrid_mixer.token_gate.past.weight, std=0.5)
    monkeypatch.setattr(mixture_sampling.torch, "multinomial", script)
    out = sample(model)
    monkeypatch.undo()
    with torch.no_grad():
        whole = model(out, use_cache=False)
        own = [model.component(n)(out, use_cache=False).logits.softmax(-1)[0] for n in model.config.component_names]
    assert (whole.weights[0, 4] - whole.weights[0, 8]).abs().max() > 1e-3
    for at, (shares, probs, which) in enumerate(zip(script.shares, script.probs, script.order), PROMPT.shape[1] - 1):
        torch.testing.assert_close(probs, own[which][at], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(shares, whole.weights[0, at], rtol=1e-4, atol=1e-6)
        mixed = sum(share * one[at] for share, one in zip(shares, own))
        torch.testing.assert_close(mixed, whole.logits[0, at].softmax(-1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ManticoreError, match="gate_lag=3: this hybrid's weights are kept for 4 tokens"):
        sample(model, gate_lag=3)


@pytest.mark.parametrize("family", ["jamba", "recurrent_gemma", "mamba2", "bloom", "gpt_neo"])
def test_components_read_what_they_have_missed(monkeypatch, family):
    model, script = one_block([tiny(family), tiny("llama")], "static"), Script()
    monkeypatch.setattr(mixture_sampling.torch, "multinomial", script)
    out = sample(model)
    monkeypatch.undo()
    with torch.no_grad():
        own = [model.component(n)(out, use_cache=False).logits.softmax(-1)[0] for n in model.config.component_names]
    for step, (probs, which) in enumerate(zip(script.probs, script.order)):
        torch.testing.assert_close(probs, own[which][PROMPT.shape[1] - 1 + step], rtol=1e-3, atol=1e-5)


def test_only_what_was_drawn_runs():
    model, calls = one_block(), []
    for name in model.config.component_names:
        model.component(name).base_model.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    sample(model, max_new_tokens=32)
    assert 32 <= len(calls) <= 32 + 2 * 2  # one for each token, and the others when the gate is asked, twice


def test_rows_are_written_as_if_alone():
    model = one_block()
    padded, mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), PROMPT], 1), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    torch.manual_seed(3)
    alone = sample(model)
    torch.manual_seed(3)
    both = sample(model, padded.repeat(2, 1), attention_mask=mask.repeat(2, 1))
    assert both.shape == (2, 7 + len(FORCED)) and both[0, 2:].tolist() == alone[0].tolist()
    torch.manual_seed(3)
    many = sample(model, num_return_sequences=3, return_dict_in_generate=True).sequences
    assert len(many) == 3 and many[0].tolist() == alone[0].tolist()


def test_a_cache_is_gone_on_with_and_given():
    """Read on by who samples, by who does not, and by both in turn; a DynamicCache of the caller's stays as it is."""
    held = {"mixture": "token", "gate_past_losses": True, "gate_lag": 4}
    attending = [tiny("llama"), tiny("gpt_neox")]
    for parts, settings in ((None, held), (attending, {"mixture": "static"})):
        model, given = one_block(parts, **settings), {"return_dict_in_generate": True, "max_new_tokens": 6}
        torch.manual_seed(4)
        first = sample(model, **given)
        text = torch.cat([first.sequences, PROMPT], 1)
        greedy = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True}
        second = model.generate(text, cache=first.cache, **greedy)
        assert second.sequences.tolist() == model.generate(text, use_cache=False, **greedy).sequences.tolist()
        found = []
        for cache in (second.cache, None, *((DynamicCache(),) if parts else ())):
            torch.manual_seed(5)
            found.append(sample(model, second.sequences, cache=cache, **given).sequences.tolist())
        assert all(one == found[0] for one in found)


def test_it_stops_pads_and_streams():
    class Streamer(BaseStreamer):
        kept, ended = (), False

        def put(self, value):
            self.kept = (*self.kept, *value.flatten().tolist())

        def end(self):
            self.ended = True

    model, streamer = one_block(), Streamer()
    torch.manual_seed(0)
    out = sample(model, streamer=streamer)
    assert list(streamer.kept) == out[0].tolist() and streamer.ended
    torch.manual_seed(0)
    end = out[0, PROMPT.shape[1] + 2].item()
    rows = sample(model, PROMPT.repeat(2, 1), eos_token_id=end, pad_token_id=0)
    first = rows[0, PROMPT.shape[1] :].tolist()
    length = first.index(end) + 1
    assert length <= 3 and set(first[length:]) <= {0}


def test_what_would_change_the_mixture_is_refused():
    model = one_block()
    for given, said in (
        ({"temperature": 0.7}, "TemperatureLogitsWarper.* would change it"),
        ({"top_k": 5}, "TopKLogitsWarper.* would change it"),
        ({"do_sample": False}, "do_sample=True"),
        ({"output_scores": True, "return_dict_in_generate": True}, "does not support .*output_scores"),
        ({"gate_lag": 0}, "gate_lag=0 must be"),
    ):
        with pytest.raises(ManticoreError, match=said):
            sample(model, **given)
    for settings, said in (
        ({"mixture_space": "logprob"}, "mixture_space is 'logprob'"),
        ({"embeddings": "mixed"}, "embeddings='mixed'"),
    ):
        with pytest.raises(ManticoreError, match=said):
            sample(one_block(**settings))
    two = ManticoreForCausalLM.from_components(list(pair()), num_blocks=2, mixture_space="prob")
    with pytest.raises(ManticoreError, match="num_blocks=2"):
        sample(two)


def test_hooks_on_the_embeddings_are_heard_and_soft_prompts_refused():
    model = one_block(mixture="static")
    hooked = copy.deepcopy(model)
    hooked.get_input_embeddings().register_forward_hook(lambda module, inputs, output: 3 * output)
    for name in model.config.component_names:
        model.component(name).get_input_embeddings().register_forward_hook(lambda module, inputs, output: 3 * output)
    torch.manual_seed(2)
    wanted = sample(model)
    torch.manual_seed(2)
    assert torch.equal(sample(hooked), wanted)
    prompted = get_peft_model(model, prompt_config(model, num_virtual_tokens=2)).eval()
    for given in (
        lambda: sample(hooked, None, inputs_embeds=hooked.get_input_embeddings()(PROMPT)),
        lambda: prompted.generate(input_ids=PROMPT, do_sample=True, mixture_sampling=True, max_new_tokens=2),
    ):
        with pytest.raises(ManticoreError, match="neither inputs_embeds nor a soft prompt"):
            given()


def test_fixed_weights_run_their_component_alone():
    model = one_block(mixture="static")
    model.set_mixture_weights([[0.0, 1.0]])
    torch.manual_seed(1)
    out = sample(model)
    plain = model.component(model.config.component_names[1])
    probs, drawn = plain(out).logits.softmax(-1)[0], out[0, PROMPT.shape[1] :]
    assert (probs[PROMPT.shape[1] - 1 : -1].gather(1, drawn[:, None]) > 0).all()


def test_weights_with_a_lag():
    weights = torch.arange(10.0).view(1, 10, 1)
    assert with_lag(weights, 4).flatten().tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert torch.equal(with_lag(weights, 1), weights)
