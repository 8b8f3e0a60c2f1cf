"""Half precision: a hybrid's tensors have the dtypes, and give the values, that its components have alone."""

import copy

import families
import pytest
import torch
from manticore_hf.modeling.mixers_manticore import repair_mixers
from manticore_hf.modeling.mixture_manticore import confidence
from transformers import AutoConfig, AutoModelForCausalLM

from manticore_hf import ComponentSpec, ManticoreForCausalLM

HALVES = [torch.bfloat16, torch.float16]
FLOAT32 = {"hybrid_mixer.alpha_logits", "hybrid_mixer.token_gate.linear.weight", "hybrid_mixer.token_gate.linear.bias"}

# Families whose classes keep something in float32: some in float16 only, some always.
KEEPING = {
    "gpt_oss": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=4,
    ),
    "glm4_moe": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
}


def keeping(kind):
    config = AutoConfig.for_model(
        kind,
        vocab_size=families.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **KEEPING[kind],
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=families.tokens(), use_cache=False).logits


def dtypes(model):
    """{name: dtype} of every parameter and buffer of floating point."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {key: one.dtype for key, one in tensors if one.is_floating_point()}


def of_component(found, name):
    return {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}


# Attention that is computed in float32 or scaled, recurrent states of three kinds, experts
QUICK = ["gemma3_text", "gpt2", "gpt_neox", "jamba", "mamba", "mamba2", "recurrent_gemma"]
OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in families.FAMILIES if family not in QUICK]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("family", [*QUICK, *OTHERS])
def test_one_hot_in_half_precision_is_the_component(family, dtype, tmp_path):
    """However the component comes: as files, as an instance in float32, as one that `.to()` has rounded.

    In bfloat16 the two instances are tried of an attention, a Mamba and one of both kinds only.
    """
    model = families.tiny(family)
    model.save_pretrained(tmp_path / "component")
    plain, seen = AutoModelForCausalLM.from_pretrained(tmp_path / "component", dtype=dtype), []
    repair_mixers(plain)  # or it runs Transformers' own scans, which round otherwise
    sources = [tmp_path / "component", copy.deepcopy(model), copy.deepcopy(model).to(dtype)]
    for source in sources[: 3 if dtype == torch.float16 or family in ("gpt_neox", "mamba", "jamba") else 1]:
        parts = [ComponentSpec(source, name="x"), ComponentSpec(families.tiny("llama", 1), name="y")]
        hybrid = ManticoreForCausalLM.from_components(
            parts, dtype=dtype, num_blocks=2, preset="paper", projector_init="identity", verify=False
        )
        families.randomise(hybrid)
        assert hybrid.dtype == hybrid.config.dtype == dtype
        assert of_component(dtypes(hybrid), "x") == dtypes(plain)
        seen.append(logits(hybrid))
        hybrid.set_mixture_weights("x")
        assert torch.equal(logits(hybrid), logits(plain)) and logits(hybrid).dtype == logits(plain).dtype
    assert all(torch.equal(one, seen[0]) for one in seen)
    hybrid.set_mixture_weights(None)
    hybrid.save_pretrained(tmp_path / "hybrid")
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert dtypes(loaded) == dtypes(hybrid) and torch.equal(logits(loaded), seen[0])


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KEEPING)
def test_what_a_class_keeps_in_float32_is_kept_of_it_alone(kind, dtype, tmp_path):
    """Patterns of one class ("norm") name tensors of every other."""
    model, other = keeping(kind), families.tiny("llama", 1)
    model.save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "other")
    alone = {
        "x": AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype),
        "y": AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=dtype),
    }
    stored = {key: one.dtype for key, one in alone["x"].state_dict().items() if one.is_floating_point()}
    kept = {key for key, found in stored.items() if found == torch.float32}
    assert bool(kept) is (kind != "gpt_oss" or dtype == torch.float16) and kept < set(stored)
    for sources in ((tmp_path / "model", tmp_path / "other"), (model, other)):
        parts = [ComponentSpec(source, name=name) for source, name in zip(sources, "xy")]
        hybrid = ManticoreForCausalLM.from_components(parts, dtype=dtype, num_blocks=2, preset="paper")
        hybrid.save_pretrained(tmp_path / "hybrid")
        for one in (hybrid, ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")):
            assert one.dtype == dtype
            for name, plain in alone.items():
                assert of_component(dtypes(one), name) == dtypes(plain)
                one.set_mixture_weights(name)
                assert torch.equal(logits(one), logits(plain))
            one.set_mixture_weights(None)


def test_a_hybrids_own_weights(tmp_path):
    """Projectors have the hybrid's dtype; mixture weights and token gate are float32."""
    model = families.hybrid("gpt_neox+mamba", dtype=torch.bfloat16, mixture="token", embeddings="mixed")
    own = {key: one.dtype for key, one in model.state_dict().items() if key.startswith("hybrid_mixer.")}
    assert {key for key, dtype in own.items() if dtype == torch.float32} == FLOAT32
    assert len(own) > 3 and {dtype for key, dtype in own.items() if key not in FLOAT32} == {torch.bfloat16}
    out, gate, drawn = model(input_ids=families.tokens()), model.hybrid_mixer.token_gate, torch.Generator()
    assert out.logits.dtype == out.weights.dtype == torch.float32
    states = [torch.randn(2, 3, width, generator=drawn).bfloat16() for width in (32, 48)]
    scores = [torch.randn(2, 3, families.VOCABULARY, generator=drawn).bfloat16() for _ in states]

    def weigh(gate, states, scores):
        return gate(states, [confidence(one)[0] for one in scores])

    expected = weigh(copy.deepcopy(gate).double(), *[[one.double() for one in given] for given in (states, scores)])
    for autocast in (False, True):  # a gate in bfloat16 would round the weights to three digits
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(weigh(gate, states, scores), expected.float(), rtol=1e-5, atol=1e-6)
    model.hybrid_mixer.alpha_logits.data += 1e-4  # is nothing in bfloat16
    model.save_pretrained(tmp_path)
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.hybrid_mixer.alpha_logits, model.hybrid_mixer.alpha_logits)
    rounded = copy.deepcopy(model).to(torch.bfloat16)  # as upstream's `.to()`: everything
    assert torch.equal(rounded.hybrid_mixer.alpha_logits.float(), model.hybrid_mixer.alpha_logits.bfloat16().float())
    assert logits(rounded).isfinite().all()


@pytest.mark.parametrize("settings", [{"preset": "paper"}, {"gate": "none", "embeddings": "mixed", "mixture": "token"}])
def test_training_in_half_precision_moves_the_mixture_as_in_float32(settings):
    half = families.hybrid("gpt_neox+mamba", dtype=torch.bfloat16, **settings)
    full = ManticoreForCausalLM.from_components(
        [ComponentSpec(copy.deepcopy(half.component(name)).float(), name=name) for name in half.config.component_names],
        num_blocks=2,
        dtype=torch.float32,
        **settings,
    )
    full.hybrid_mixer.load_state_dict(half.hybrid_mixer.state_dict())
    ids, gradients = families.tokens(4, 24), []
    for model in (half, full):
        model(input_ids=ids, labels=ids).loss.backward()
        found = {key: p.grad for key, p in model.named_parameters() if key in FLOAT32 and p.grad is not None}
        assert found and all(one.dtype == torch.float32 for one in found.values())
        gradients.append(torch.cat([found[key].flatten() for key in sorted(found)]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99, gradients


def test_the_widest_of_an_instances_dtypes_is_taken():
    """Norms that were kept in float32, and trained, are not rounded because the embedding is in bfloat16."""
    part = families.tiny("llama").to(torch.bfloat16)
    part.model.norm.float()
    part.model.norm.weight.data += 1e-4
    expected = part.model.norm.weight.clone()
    model = ManticoreForCausalLM.from_components([ComponentSpec(part, name="x")])
    assert model.dtype == torch.float32 and torch.equal(model.x.model.norm.weight, expected)
    part = keeping("glm4_moe")
    part = ManticoreForCausalLM.from_components([ComponentSpec(part, name="x")], dtype="bfloat16").x
    model = ManticoreForCausalLM.from_components([ComponentSpec(part, name="x")])
    assert model.dtype == torch.bfloat16  # what a class keeps is no reason
