"""Hybrids where Transformers' own models go: outputs, caches, drafts, exporters, pipelines, parallel processes.

Each right value comes from a plain model: a hybrid of one component has to be that component, and of several each part
can be asked alone. Transformers' own tests of these things run on hybrids in `test_transformers_own.py`.
"""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from families import tiny, tokens
from hub_models import tokenizer
from processes import launch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, CompileConfig, DynamicCache, QuantizedCache, pipeline
from transformers.generation import utils as generation_utils
from transformers.utils import logging

from manticore_hf import (
    ComponentSpec,
    ManticoreConfig,
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    ManticoreModel,
    prune,
)

BLOCKS = ({"num_blocks": 1}, {"num_blocks": 2}, {"num_blocks": 2, "preset": "paper"})
ATTENDING = ("llama", "gpt_neox", "mistral")  # mistral's window is four tokens


def join(*families, eager=False, **settings):
    """A hybrid of tiny models, its components named after their family; and the models."""
    models = {family: copy.deepcopy(tiny(family, seed)) for seed, family in enumerate(families)}
    parts = [ComponentSpec(model, name=family) for family, model in models.items()]
    model = ManticoreForCausalLM.from_components(parts, **settings).eval()
    if eager:
        model.set_attn_implementation("eager")
    return model, models


def alone(family, **settings):
    """A hybrid of one component that leaves its states as they are, and that component."""
    model, parts = join(family, projector="none", mixture="static", **settings)
    return model, parts[family]


# ---- outputs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_weights_are_those_of_the_components():
    ids = tokens(2, 9)
    for settings in BLOCKS[:2]:
        for family in ATTENDING:
            model, part = alone(family, eager=True, **settings)
            got, wanted = (one(ids, output_attentions=True).attentions for one in (model, part))
            assert len(got) == len(wanted) == 5
            for one, other in zip(got, wanted):
                torch.testing.assert_close(one, other)
    again = model(ids, output_attentions=True)  # hooks are installed once, whoever asks
    part(ids, output_attentions=True)
    assert len(again.attentions) == len(model(ids, output_attentions=True).attentions) == 5
    first = model(ids[:, :6], output_attentions=True, use_cache=True)
    rest = model(ids[:, 6:], cache=first.cache, output_attentions=True).attentions
    torch.testing.assert_close(rest[0][..., -6:], part(ids, output_attentions=True).attentions[0][:, :, 6:, -6:])
    part.config.layer_norm_eps, part.config.output_attentions = 1e-4, True  # a layout that is looked for anew
    told = ManticoreForCausalLM.from_components([part], num_blocks=2)
    told.set_attn_implementation("eager")
    assert told(ids).attentions is None and len(told(ids, output_attentions=True).attentions) == 5
    model.config.output_attentions = True
    out = model.generate(ids, max_new_tokens=2, do_sample=False, output_attentions=True, return_dict_in_generate=True)
    assert [len(step) for step in out.attentions] == [5, 5]


@torch.no_grad()
def test_attention_weights_come_block_by_block():
    ids = tokens(2, 9)
    model, parts = join("llama", "mamba", "gpt_neox", eager=True)
    whole = model(ids, output_attentions=True).attentions
    wanted = [w for name in ("llama", "gpt_neox") for w in parts[name](ids, output_attentions=True).attentions]
    assert len(whole) == len(wanted) and all(torch.equal(*two) for two in zip(whole, wanted))
    cut, parts = join("llama", "gpt_neox", eager=True, num_blocks=2)
    got = cut(ids, output_attentions=True).attentions
    assert len(got) == 10
    # Block 1 of native embeddings is each component's own first layers, then come those of block 2
    firsts = [w for name in ("llama", "gpt_neox") for w in parts[name](ids, output_attentions=True).attentions[:3]]
    for one, other in zip(got, firsts):
        torch.testing.assert_close(one, other)
    for cls in (ManticoreForSequenceClassification, ManticoreForTokenClassification):
        scored = cls.from_causal_lm(cut, num_labels=2)(ids, attention_mask=torch.ones_like(ids), output_attentions=True)
        assert all(torch.equal(*two) for two in zip(scored.attentions, got))


@torch.no_grad()
def test_attention_weights_of_padded_rows():
    model, ids = join("llama", "mamba", eager=True)[0], tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    wanted = model(ids[:1, 2:], output_attentions=True).attentions
    for use_cache in (False, True):
        got = model(ids, attention_mask=mask, use_cache=use_cache, output_attentions=True).attentions
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted):
            torch.testing.assert_close(one[:1, :, 2:, 2:], other)
        right = model(ids, attention_mask=mask.flip(1), output_attentions=True)  # which makes no cache by itself
        assert right.cache is None and len(right.attentions) == len(wanted)
        mask[0, 3] = 0
        with pytest.raises(ManticoreError, match="padding between tokens"):
            model(ids, attention_mask=mask, use_cache=use_cache, output_attentions=True)
        mask[0, 3] = 1
    with pytest.raises(ManticoreError, match="rows with several documents"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), use_cache=False, output_attentions=True)


def test_no_attention_weights_without_a_word(monkeypatch):
    said = []
    monkeypatch.setattr("manticore_hf.modeling.running_manticore.logger.warning_once", said.append)
    for families, settings in ((("mamba",), {}), (("llama",), {})):
        model = join(*families, **settings)[0]
        assert model(tokens(1, 5), output_attentions=True).attentions == ()
    assert len(said) == 2 and all("attn_implementation='eager'" in one for one in said)


@torch.no_grad()
def test_hidden_states_are_chosen_by_index():
    ids = tokens(2, 7)
    for settings in BLOCKS:
        model = join("gpt_neox", "llama", **settings)[0]
        count = model.config.num_blocks + 1
        every = model(ids, output_hidden_states=True).hidden_states
        assert len(every) == count
        for asked in ([0], [-1], [0, -1], [1], 1, -1, [99]):
            wanted = {i % count for i in ([asked] if isinstance(asked, int) else asked) if i < count}
            for one in (model, ManticoreForSequenceClassification.from_causal_lm(model, num_labels=2)):
                mask = torch.ones_like(ids)
                got = one(ids, attention_mask=mask, output_hidden_states=asked).hidden_states
                assert [state is not None for state in got] == [i in wanted for i in range(count)]
                assert all(state is None or torch.equal(state, other) for state, other in zip(got, every))
        assert model(ids, output_hidden_states=[]).hidden_states is None


@torch.no_grad()
def test_features_of_a_pipeline_do_not_depend_on_the_batch(tmp_path):
    texts = ["w3 w4", "w5", "w6 w7 w8", "w9", "w10"]
    model, part = alone("gpt_neox")
    for name, one in (("hybrid", model), ("plain", part)):
        one.save_pretrained(tmp_path / name)
    found = {}
    for name in ("hybrid", "plain"):
        extract = pipeline("feature-extraction", AutoModel.from_pretrained(tmp_path / name), tokenizer=tokenizer())
        found[name] = extract(texts, batch_size=4, return_tensors=True)
    assert len(found["hybrid"]) == len(texts)
    for text, got, wanted in zip(texts, found["hybrid"], found["plain"]):
        assert got.shape == wanted.shape
        real = len(text.split())
        torch.testing.assert_close(got[:, :real], wanted[:, :real])
    pair = join("gpt_neox", "mamba", num_blocks=2)[0]
    out = ManticoreModel.forward(pair, tokens())
    assert list(out.states) == ["gpt_neox", "mamba"] and out.states["mamba"] is out.states[1]


def test_sizes_follow_the_vocabulary_and_the_labels():
    model, _ = join("gpt_neox", "llama", num_blocks=2)
    model.resize_token_embeddings(110)
    assert model.vocab_size == model.config.vocab_size == 110
    for cls in (ManticoreForSequenceClassification, ManticoreForTokenClassification):
        assert cls.from_causal_lm(model, num_labels=5).num_labels == 5
    with pytest.raises(ManticoreError, match=r"token 200; .* 110 tokens.*resize_token_embeddings\(201\)"):
        model(torch.tensor([[3, 200]]))


def test_a_folder_that_is_not_there():
    for path in ("./no/such/folder", "no/such/folder"):
        with pytest.raises(OSError, match=f"'{path}' is not there: it is neither a directory nor a Hub repository id"):
            ManticoreConfig.from_pretrained(path)
        with pytest.raises(OSError, match=path):
            ManticoreForCausalLM.from_pretrained(path)


def test_the_parallel_plan_names_what_is_there():
    model = join("llama", "gpt_neox", num_blocks=2)[0]
    assert "llama.lm_head" in model.tp_plan
    classifier = ManticoreForSequenceClassification.from_causal_lm(model, num_labels=2)
    hard = prune(copy.deepcopy(model), ["llama", "gpt_neox"])
    for one, gone in ((classifier, "llama.lm_head"), (hard, "llama.lm_head")):
        one.init_parallel_plans()
        assert gone not in one.tp_plan and "llama.model.layers.*.self_attn.q_proj" in one.tp_plan


# ---- caches ----------------------------------------------------------------------------------------------------------


def test_the_configuration_says_whether_to_cache():
    model, part = alone("llama")
    for one in (model, part):
        assert one.config.use_cache is True and one(tokens()).cache is not None
        one.config.use_cache = False
        assert one(tokens()).cache is None
        assert one(tokens(), use_cache=True).cache is not None


@torch.no_grad()
def test_a_dynamic_cache_of_the_callers_own():
    ids = tokens(2, 9)
    for settings in BLOCKS:
        model = join("llama", "mistral", **settings)[0]
        wanted, cache = model(ids).logits, DynamicCache()
        first = model(ids[:, :5], cache=cache)
        assert first.cache is cache and cache.get_seq_length() == 5
        kept = copy.deepcopy(cache)
        torch.testing.assert_close(model(ids[:, 5:], cache=cache).logits, wanted[:, 5:])
        torch.testing.assert_close(model(ids[:, 5:], cache=kept).logits, wanted[:, 5:])
        new = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(ids, cache=DynamicCache(), **new), model.generate(ids, **new))
    fresh = DynamicCache()
    fresh.activate_past_recording()
    model = join("llama", "gpt_neox")[0]
    model(ids, cache=fresh)
    fresh.crop(-4)
    torch.testing.assert_close(model(ids[:, 5:], cache=fresh).logits, model(ids).logits[:, 5:])
    other = tiny("llama")(ids, use_cache=True).cache
    for one, given in ((join("llama", "mamba")[0], DynamicCache()), (model, other)):
        with pytest.raises(ManticoreError, match="cache is a DynamicCache; a hybrid takes"):
            one(ids, cache=given)


@torch.no_grad()
def test_a_quantised_cache():
    ids, new = tokens(2, 9), {"max_new_tokens": 6, "do_sample": False}
    how = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    for settings in BLOCKS[:2]:
        model, part = alone("llama", **settings)
        cache = QuantizedCache(backend="fp8", config=part.config)
        part(ids[:, :5], cache=cache)
        wanted = part(ids[:, 5:], cache=cache).logits
        own = model.make_cache(quantized={"backend": "fp8"})
        model(ids[:, :5], cache=own)
        torch.testing.assert_close(model(ids[:, 5:], cache=own).logits, wanted)
        assert not torch.equal(wanted, part(ids).logits[:, 5:])  # it is quantised
        assert torch.equal(model.generate(ids, **how, **new), part.generate(ids, **how, **new))
    pair = join("llama", "mamba", num_blocks=2)[0]
    kinds = {type(layer).__name__ for layer in pair.make_cache(quantized={"backend": "fp8"}).layers}
    assert kinds == {"Fp8QuantizedLayer", "LinearAttentionLayer"}
    assert pair.generate(ids, **how, **new).shape == (2, 15)
    with pytest.raises(ManticoreError, match="component 'mistral' .*sliding_attention"):
        join("mistral")[0].generate(ids, **how, **new)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("backend, package", [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_a_cache_quantised_in_groups(backend, package):
    """What is behind the last few tokens is quantised again and again; no extra installs these packages."""
    pytest.importorskip(package)
    ids, new = tokens(2, 9), {"max_new_tokens": 9, "do_sample": False}
    settings = {"backend": backend, "nbits": 4, "q_group_size": 8, "residual_length": 3}
    how = {"cache_implementation": "quantized", "cache_config": settings}
    pair, parts = join("llama", "gpt_neox")
    pair.set_mixture_weights("gpt_neox")
    ways = [(pair, parts["gpt_neox"]), *(alone("llama", **blocks) for blocks in BLOCKS[:2])]
    for model, part in ways:
        given = QuantizedCache(config=part.config, **settings), model.make_cache(quantized=settings)
        wanted, got = (
            torch.cat([one(ids[:, at : at + 2], cache=cache).logits for at in range(0, 9, 2)], 1)
            for one, cache in zip((part, model), given)
        )
        torch.testing.assert_close(got, wanted)
        assert not torch.allclose(wanted, part(ids).logits, atol=1e-3)  # it is quantised
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        for more in ({}, {"num_beams": 3}, {"attention_mask": mask}):
            one, other = (each.generate(ids, **{**how, **new, **more}, pad_token_id=0) for each in (model, part))
            assert torch.equal(one, other), more
    mixed = join("llama", "mamba", num_blocks=2)[0]
    kinds = [type(layer).__name__ for layer in mixed.make_cache(quantized=settings).layers]
    assert len(set(kinds)) == 2 and "LinearAttentionLayer" in kinds
    assert mixed.generate(ids, **how, **new).shape == (2, 18)
    with pytest.raises(ManticoreError, match="component 'mistral' .*sliding_attention"):
        join("mistral")[0].generate(ids, **how, **new)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("backend, package", [("fp8", "torch"), ("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_a_mixture_over_quantised_caches(backend, package):
    """By hand: each component with a quantised cache of its own, and the mean of what they find probable."""
    pytest.importorskip(package)
    ids = tokens(2, 9)
    settings = {"backend": backend, **({} if backend == "fp8" else {"q_group_size": 8, "residual_length": 3})}
    pair, parts = join("llama", "gpt_neox", mixture="static", mixture_space="prob")
    pair.set_mixture_weights([[0.3, 0.7]])
    caches = [QuantizedCache(config=part.config, **settings) for part in parts.values()]
    own = pair.make_cache(quantized=settings)
    for at in range(0, 9, 2):
        now = ids[:, at : at + 2]
        found = [part(now, cache=cache).logits.softmax(-1) for part, cache in zip(parts.values(), caches)]
        wanted = 0.3 * found[0] + 0.7 * found[1]
        torch.testing.assert_close(pair(now, cache=own).logits.softmax(-1), wanted)
    assert not torch.allclose(pair(ids).logits.softmax(-1)[:, -1:], wanted, atol=1e-4)  # it is quantised


@torch.no_grad()
def test_a_static_cache_is_not_compiled_and_who_asks_is_told(monkeypatch):
    """Its counter is a number of Python's, so `generate` never compiles by itself; who asks for it gets a warning."""
    said, ids, new = [], tokens(2, 9), {"max_new_tokens": 4, "do_sample": False}
    monkeypatch.setattr(generation_utils.logger, "warning_once", said.append)
    compiled = CompileConfig(backend="eager")
    compiled._compile_all_devices = True
    model = join("llama", "mamba")[0]
    wanted = model.generate(ids, **new)
    assert torch.equal(model.generate(ids, cache_implementation="static", **new), wanted) and not said
    found = model.generate(ids, cache_implementation="static", compile_config=compiled, **new)
    assert torch.equal(found, wanted) and "Compilation will be skipped" in said[0]
    assert not model._can_compile_fullgraph


class Stream(contextlib.nullcontext):
    """A stream of no device."""

    def wait_stream(self, other):
        pass


@torch.no_grad()
def test_an_offloaded_cache(monkeypatch):
    """Streams are an accelerator's; without one they are stood in for, and what moves where is counted."""
    moved = []
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    for name in ("offload", "prefetch"):
        original = getattr(DynamicCache().layer_class_to_replicate, name)
        monkeypatch.setattr(
            "transformers.cache_utils.CacheLayerMixin." + name,
            lambda self, name=name, original=original: (moved.append((name, id(self))), original(self))[1],
        )
    ids = tokens(2, 9)
    for families in (("llama", "mistral"), ("llama", "mamba")):
        for settings in BLOCKS[:2]:
            model = join(*families, **settings)[0]
            for static in (None, 16):
                cache = model.make_cache(static, offloading=True)
                moved.clear()
                out = [model(part, cache=cache).logits for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:])]
                torch.testing.assert_close(torch.cat(out, 1), model(ids).logits)
                attending = [layer for layer in cache.layers if hasattr(layer, "keys")]
                for name in ("offload", "prefetch"):
                    assert {one for way, one in moved if way == name} == {id(layer) for layer in attending}


@torch.no_grad()
def test_generation_begins_with_embeddings():
    ids, new = tokens(2, 6), {"max_new_tokens": 5, "do_sample": False}
    for settings in BLOCKS:
        model, mask = join("llama", "mamba", **settings)[0], torch.ones_like(ids)
        mask[0, :2] = 0
        wanted = model.generate(ids, attention_mask=mask, **new)
        embeds = model.get_input_embeddings()(ids)
        for use_cache in (True, False):
            said = model.generate(inputs_embeds=embeds, attention_mask=mask, use_cache=use_cache, **new)
            assert torch.equal(said, wanted[:, 6:])


# ---- drafts ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_drafts_are_taken_back():
    ids = tokens(1, 12)
    new = {"max_new_tokens": 16, "do_sample": False}
    target, draft = copy.deepcopy(tiny("llama")), tiny("gpt_neox", 7)
    wanted = target.generate(ids, **new)
    for settings in BLOCKS:
        model = join("mistral", "gpt_neox", **settings)[0]
        assert torch.equal(target.generate(ids, assistant_model=model, **new), wanted)
        greedy = model.generate(ids, **new)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **new), greedy)
        assert torch.equal(model.generate(ids, assistant_model=draft, **new), greedy)
    recurrent = join("llama", "mamba")[0]
    with pytest.raises(ValueError, match="stateful"):
        recurrent.generate(ids, prompt_lookup_num_tokens=3, **new)


# ---- exporters -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "families, settings",
    [(("gpt_neox", "mamba"), BLOCKS[0]), pytest.param(("gpt_neox", "llama"), BLOCKS[2], marks=pytest.mark.slow)],
)
def test_exporters_take_hybrids_and_their_caches(families, settings):
    from transformers.exporters import DynamoConfig, DynamoExporter
    from transformers.exporters.utils import get_leaf_tensors

    parts = [tiny(family, num_hidden_layers=2) for family in families]
    model, ids = ManticoreForCausalLM.from_components(parts, **settings), tokens()
    out = model(ids)
    leaves = get_leaf_tensors(out)
    assert any(key.startswith("cache") for key in leaves) and torch.equal(leaves["logits"], out.logits)
    program = DynamoExporter().export(model, {"input_ids": ids, "use_cache": False}, DynamoConfig(dynamic=False))
    torch.testing.assert_close(program(input_ids=ids).logits, out.logits)


# ---- several processes -----------------------------------------------------------------------------------------------


def test_every_parameter_of_a_hybrid_has_a_gradient():
    """DDP stops at one without: that of alpha in a one-block hybrid, whose weights come from the token gate."""
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs a process group of its own")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for settings in (*BLOCKS, {"mixture": "static"}):
            model = join("gpt_neox", "mamba", **settings)[0].train()
            parallel = DistributedDataParallel(model, find_unused_parameters=False)
            for _ in range(2):
                parallel(input_ids=tokens(), labels=tokens()).loss.backward()
            assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_tensor_parallel(tmp_path):
    """Two processes hold half of each layer's matrices, and compute what one computes."""
    parts = [ComponentSpec(tiny(family, num_hidden_layers=2), name=family) for family in ("llama", "gpt_neox")]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2).eval()
    model.save_pretrained(tmp_path / "hybrid")
    model = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")
    launch(
        [__file__.replace("test_as_transformers.py", "tensor_parallel.py"), tmp_path / "hybrid", tmp_path / "out.pt"]
    )
    found = torch.load(tmp_path / "out.pt")
    assert any("llama.model.layers.0.self_attn.q_proj" in name for name in found["cut"])
    assert any("gpt_neox" in name for name in found["cut"])
    ids = torch.arange(24).view(2, 12) % 60 + 3
    out = model(ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(found["logits"], out.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["tokens"], model.generate(ids[:1], max_new_tokens=4, do_sample=False))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found["grads"][name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


logging.disable_progress_bar()
