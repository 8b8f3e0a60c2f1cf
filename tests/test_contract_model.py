"""Contract: a hybrid behaves as Transformers documents a causal LM, for every family: training, attention, dtypes,
arguments, resizing, copying, compiling."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, PAIRS, components, hybrid, representatives, tiny, tokens

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM

NAMES = [*FAMILIES, *PAIRS]
# Their classes have one implementation only: none of attention, or their own.
ONE_ATTENTION = {"gpt_neo", "gptj", "bloom", "mamba", "mamba2", "falcon_mamba", "gemma2"}


@pytest.fixture(scope="module", params=representatives(NAMES))
def model(request):
    model = hybrid(request.param)  # as the other contracts have it: built once
    model.config.component_loss_weight = 0.5
    return model


def close(got, wanted, atol=2e-5, rtol=1e-5):
    torch.testing.assert_close(got, wanted, atol=atol, rtol=rtol)


def gradients(model, **kwargs):
    """Loss and gradients of one training step, without dropout (the tiny models have none)."""
    model.zero_grad()
    out = model(input_ids=tokens(), labels=tokens(), **kwargs)
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.loss.detach(), found


def test_checkpointed_gradients_are_the_gradients(model):
    model = copy.deepcopy(model).train()
    loss, wanted = gradients(model)
    assert len(wanted) > 10 and all(g.isfinite().all() for g in wanted.values())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        name = model.config.component_names[-1]
        layout = model.segments.layout(name)
        layer = getattr(model.component(name).get_submodule(layout.path), layout.layers)[1]
        # Of a child: Transformers runs a layer's own hooks once. And before its forward: the second one stops as
        # soon as it has what it needs.
        handle = next(layer.children()).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if reentrant:
            # Re-entrant checkpoints need an input that requires a gradient, as the embeddings give
            model.enable_input_require_grads()
        got_loss, got = gradients(model)
        handle.remove()
        assert len(calls) == 2, "the layer was not run again in the backward pass"
        assert torch.equal(got_loss, loss) and got.keys() == wanted.keys()
        for key in wanted:
            close(got[key], wanted[key], atol=1e-6)
        model.gradient_checkpointing_disable()


@torch.no_grad()
def test_attention_implementations_agree(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    before = {name: model.component(name).config._attn_implementation for name in model.config.component_names}
    logits = {}
    if set(before) <= ONE_ATTENTION - {"gpt_neo", "gptj", "bloom"}:  # of these Transformers only warns
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            model.set_attn_implementation("sdpa")
        return
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for name in set(before) - ONE_ATTENTION:
            assert model.component(name).config._attn_implementation == implementation
            assert model.segments.segment(name, 1).stack.config._attn_implementation == implementation
        logits[implementation] = model(input_ids=ids, attention_mask=mask).logits
        for name in set(before) - ONE_ATTENTION:
            assert model.segments.segment(name, 1).config._attn_implementation == implementation
    close(logits["eager"][mask.bool()], logits["sdpa"][mask.bool()])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_from_the_settings(implementation):
    for name in ("gpt_neox+mamba", "gemma2+jamba"):
        config = hybrid(name).config
        model = ManticoreForCausalLM._from_config(copy.deepcopy(config), attn_implementation=implementation)
        found = {part: model.component(part).config._attn_implementation for part in config.component_names}
        assert all(found[part] == implementation for part in set(found) - ONE_ATTENTION), found
        assert model(input_ids=tokens()).logits.isfinite().all()


def test_outputs_are_as_documented(model):
    ids, labels = tokens(), tokens().clone()
    labels[:, :2] = -100
    names, d = model.config.component_names, model.config.hidden_size
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels, output_hidden_states=True)
        assert out.logits.shape == (2, 9, 99) and out.component_losses.shape == (len(names),)
        assert [tuple(state.shape) for state in out.hidden_states] == [(2, 9, d)] * 3
        predicted, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        close(out.mixture_loss, torch.nn.functional.cross_entropy(predicted, targets))
        close(out.loss, out.mixture_loss + 0.5 * out.component_losses.sum())
        assert out.past_key_values.get_seq_length() == 9
        # Embeddings instead of ids, a tuple instead of an object
        embeds = model.get_input_embeddings()(ids)
        assert embeds.shape[-1] == model.get_input_embeddings().embedding_dim
        assert torch.equal(model(inputs_embeds=embeds).logits, out.logits)
        loss, logits, *_ = model(input_ids=ids, labels=labels, return_dict=False)
        assert torch.equal(logits, out.logits) and torch.equal(loss, out.loss)
        # Logits of some positions only
        for keep, index in ((1, [-1]), (4, [-4, -3, -2, -1]), (torch.tensor([0, 5]), [0, 5])):
            close(model(input_ids=ids, logits_to_keep=keep).logits, out.logits[:, index])
        # The Trainer's way of averaging over accumulated batches
        summed = model(input_ids=ids, labels=labels, num_items_in_batch=7)
        close(summed.loss, out.loss * 14 / 7)
        # What is reported stays a mean over this call's own tokens
        close(summed.mixture_loss, out.mixture_loss)
        close(summed.component_losses, out.component_losses)
    with pytest.raises(ManticoreError, match="exactly one of"):
        model(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(ManticoreError, match="attention_mask has shape"):
        model(input_ids=ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ManticoreError, match="inputs_embeds has width"):
        model(inputs_embeds=embeds[..., :-1])


@torch.no_grad()
def test_copies_are_independent_and_equal(model):
    ids = tokens()
    wanted = model(input_ids=ids).logits
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(input_ids=ids).logits, wanted)
        for parameter in clone.parameters():
            parameter.zero_()
        assert not torch.equal(clone(input_ids=ids).logits, wanted)
    assert torch.equal(model(input_ids=ids).logits, wanted)


@pytest.mark.quick(every=2)
@torch.no_grad()
def test_what_was_saved_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, ids = ManticoreForCausalLM.from_pretrained(tmp_path), tokens()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), wanted)


@torch.no_grad()
def test_bfloat16(model):
    ids = tokens()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    # Random weights amplify rounding: compare with float32 arithmetic on the rounded weights
    rounded = copy.deepcopy(half).to(torch.float32)
    got, wanted = half(input_ids=ids, labels=ids), rounded(input_ids=ids, labels=ids)
    assert got.loss.isfinite() and abs(got.loss - wanted.loss) < 0.15
    assert half.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


@pytest.mark.quick(every=2)
@torch.no_grad()
def test_resizing_the_vocabulary(model):
    resized, ids = copy.deepcopy(model), tokens()
    wanted = model(input_ids=ids).logits
    for size in (107, 64, 99):
        embeddings = resized.resize_token_embeddings(size, mean_resizing=False)
        assert embeddings.num_embeddings == resized.config.vocab_size == size
        for name in resized.config.component_names:
            assert getattr(resized.config, name).vocab_size == size
        out = resized(input_ids=ids % size, labels=ids % size)
        assert out.logits.shape[-1] == size and out.loss.isfinite()
        if size == 64:
            assert resized.generate(ids % size, max_new_tokens=3, do_sample=False).shape == (2, 12)
        if size == 107 and len(resized.config.component_names) == 1:
            # One component's logits of the old tokens do not depend on the new ones
            close(out.logits[..., :99], wanted)


@torch.no_grad()
def check_compiled(model, backend, times):
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=backend)
    for time in times:
        ids, mask = tokens(2, time), torch.ones(2, time, dtype=torch.long)
        for given in (None, mask)[: len(times)]:
            wanted = model(input_ids=ids, attention_mask=given, use_cache=False).logits
            close(compiled(input_ids=ids, attention_mask=given, use_cache=False).logits, wanted, atol=1e-4)
    torch._dynamo.reset()


QUICK = ["gpt_neox+mamba"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_compiled_forward(name):
    check_compiled(hybrid(name), "eager", [9])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_forward_with_inductor(name):
    check_compiled(hybrid(name), "inductor", [9, 6])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "llama", "gemma2", "jamba"])
def test_training_mode_reaches_the_segments(name):
    keys = {"gpt2": "resid_pdrop", "gpt_neox": "hidden_dropout", "opt": "dropout"}
    part = tiny(name, **{keys.get(name, "attention_dropout"): 0.5})
    model = ManticoreForCausalLM.from_components([part], num_blocks=2)
    quiet = model(input_ids=tokens()).logits
    assert torch.equal(model(input_ids=tokens()).logits, quiet)
    model.train()
    assert all(model.segments.segment(n, b).shell.module.training for n in model.config.component_names for b in (0, 1))
    assert not torch.equal(model(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    model.eval()
    assert torch.equal(model(input_ids=tokens()).logits, quiet)


def test_one_and_three_components():
    for names in (["llama"], ["llama", "mamba", "gpt2"]):
        parts = [ComponentSpec(components(name)[name], name=name) for name in names]
        model = ManticoreForCausalLM.from_components(parts, num_blocks=2, preset="paper")
        assert model.mixture_weights().shape == (2, len(names))
        assert model.generate(tokens(), max_new_tokens=3, do_sample=False).shape == (2, 12)
