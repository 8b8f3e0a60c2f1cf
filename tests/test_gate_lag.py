"""Weights kept for several tokens: against a hybrid that asks for them at each, and by every hybrid's contract."""

import cache_rows
import pytest
import torch
from cases import case
from decoding_contract import check_decoding
from families import tokens
from test_past_losses import GATE, ONLINE, hybrid, own_logits

from manticore_hf import ManticoreConfig, ManticoreError
from manticore_hf.compose.mixture_sampling import with_lag
from manticore_hf.families import contract
from manticore_hf.families.contract import close

LAG = 3
MODELS = {
    "gate": ("gpt_neox+mamba", {"num_blocks": 1, "mixture": "token"}),
    "gate, past losses, attending": ("llama+opt", {"num_blocks": 1, **GATE}),
    "online": ("gpt_neox+mamba", {"num_blocks": 1, "mixture_space": "prob", **ONLINE}),
    "three, in blocks": ("gpt_neo+mamba2+opt", {"num_blocks": 2, "mixture": "token"}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    name, settings = MODELS[request.param]
    return hybrid(name, gate_lag=LAG, **settings)


def weights_by_hand(model, ids):
    """[batch, time, K]: those of the same hybrid that asks at each token, held by hand."""
    model.config.gate_lag = 1
    try:
        weights = model(input_ids=ids, use_cache=False).weights
    finally:
        model.config.gate_lag = LAG
    return torch.stack([weights[:, t - t % LAG] for t in range(ids.shape[1])], 1)


@torch.no_grad()
def test_weights_and_logits_are_held_by_hand(model):
    ids = tokens(2, 11, 3)
    out, _, own = own_logits(model, ids)
    wanted = weights_by_hand(model, ids)
    close(out.weights, wanted, "weights")
    assert (wanted[:, LAG] - wanted[:, LAG - 1]).abs().max() > 1e-4  # they move, when they are asked for
    logprobs = torch.stack([one.log_softmax(-1) for one in own], 2)
    mean = (wanted[..., None] * (logprobs.exp() if model.config.mixture_space == "prob" else logprobs)).sum(2)
    mean = mean.log() if model.config.mixture_space == "prob" else mean.log_softmax(-1)
    close(out.logits.log_softmax(-1), mean, "the mixture and the components' own, mixed by hand")
    close(with_lag(weights_by_hand(model, ids), LAG), wanted, "what is held already")


def test_the_loss_and_its_gradients_are_those_of_weights_held_by_hand(model):
    ids, grads = tokens(2, 10, 3), []
    for by_hand in (False, True):
        model.zero_grad()
        if by_hand:
            model.config.gate_lag = 1
            whole = type(model).mix

            def mix(self, weights, states, own, *past, whole=whole):
                logits, token_weights = whole(self, weights, states, own, *past[:1])
                held = with_lag(token_weights, LAG)
                logprobs = torch.stack([one.log_softmax(-1) for one in own], 2)
                prob = self.config.mixture_space == "prob"
                mean = (held[..., None] * (logprobs.exp() if prob else logprobs)).sum(2)
                return mean.log() if prob else mean, held

            model.__dict__["mix"] = mix.__get__(model)
        try:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        finally:
            model.config.gate_lag = LAG
            model.__dict__.pop("mix", None)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    for name, grad in grads[1].items():
        close(grads[0][name], grad, name)


@pytest.mark.quick(every=3)
def test_the_contract_of_decoding(model):
    check_decoding(model)


@torch.no_grad()
def test_few_logits_wanted(model):
    """What holds for them may have been asked for at tokens whose logits nobody wants."""
    ids = tokens(2, 11, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 7:] = 0
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False)
    for kept in (2, torch.tensor([10, 4])):
        out = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False)
        where = slice(-2, None) if isinstance(kept, int) else kept
        close(out.logits, whole.logits[:, where])
        close(out.weights, whole.weights[:, where])
    cache = model.make_cache()
    model(input_ids=ids[:, :8], attention_mask=mask[:, :8], cache=cache, logits_to_keep=1)
    tail = model(input_ids=ids[:, 8:], attention_mask=mask, cache=cache)
    real = mask[:, 8:].bool()
    close(tail.logits[real], whole.logits[:, 8:][real])


@torch.no_grad()
def test_rows_of_a_cache(model):
    ids = tokens(3, 12, 5)
    cache_rows.check_picked(model, ids, model(input_ids=ids, use_cache=False).logits)
    cache = model.make_cache()
    model(input_ids=ids, cache=cache)
    with pytest.raises(
        ManticoreError,
        match="gate_lag is more than 1 cannot undo|tokens cannot be taken back|quantised layers, .* cannot undo",
    ):
        cache.crop(-1)


def test_saved_with_the_code_it_needs(tmp_path, model):
    contract.check_saved(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "gate_lag.py").is_file()


def test_what_cannot_be_right_is_said():
    for wrong in (0, -1, 1.5, True, "16", 10**30):
        with case(str(wrong)[:9]), pytest.raises(ManticoreError, match="must be a whole number of tokens, 1 to"):
            ManticoreConfig(gate_lag=wrong)
    assert not ManticoreConfig(gate_lag=8, mixture="static").holds_weights  # which are the same for all tokens


@pytest.mark.parametrize("cut", [5, 6])
def test_gradients_go_through_what_a_cache_holds(model, cut):
    """Weights that one call asked for count in the next, and so do their gradients."""
    ids, grads = tokens(2, 12, 3), []
    for pieces in ((12,), (cut, 12 - cut)):
        model.zero_grad()
        out, logits = None, []
        for piece in ids.split(pieces, 1):
            cache = None if out is None else out.past_key_values
            out = model(input_ids=piece, past_key_values=cache, use_cache=len(pieces) > 1)
            logits.append(out.logits)
        torch.nn.functional.cross_entropy(torch.cat(logits, 1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        close(grads[1][name], wanted, name)
