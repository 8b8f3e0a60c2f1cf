"""The estimates of a plan against what really happens: allocations, optimizer states, FLOPs, caches."""

import pytest
import torch
from plan_cases import allocated, config_of, real, train_once
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from manticore_hf import ManticoreError, ManticoreForCausalLM, set_stage
from manticore_hf.plan.cache import cache_sizes
from manticore_hf.plan.memory import layers_of, optimizer_bytes
from manticore_hf.plan.schedule import _fixed
from manticore_hf.plan.shrink import find_period
from manticore_hf.plan.step import Rehearsal, meta_hybrid
from manticore_hf.training.distill import DistilTrainer
from manticore_hf.training.prune import prune

BF16 = torch.bfloat16
CASES = [  # pair, blocks, stage, mixed precision, checkpointing, (batch, length)
    ("gpt_neox+mamba", 1, "finetune", BF16, True, (2, 96)),
    ("gpt_neox+mamba", 2, "projectors", BF16, False, (2, 96)),
    ("llama+mamba2", 2, "search", None, True, (4, 64)),
    ("gemma2+falcon_mamba", 2, "finetune", None, False, (2, 64)),
]
# Every stage, family and way of these two is in one of those above
MORE = [
    ("gpt_neox+mamba", 1, "finetune", None, False, (2, 96)),
    ("gpt_neox+mamba", 1, "projectors", None, False, (2, 96)),
    ("llama+mamba2", 1, "finetune", BF16, False, (1, 128)),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("pair, blocks, stage, autocast, checkpointing, size", CASES)
def test_a_micro_batch_takes_what_the_allocator_gives(pair, blocks, stage, autocast, checkpointing, size):
    config = config_of(pair, num_blocks=blocks, **({"mixture": "static"} if stage == "search" else {}))
    model = real(config, stage, autocast, checkpointing)

    def run():
        model.zero_grad(set_to_none=True)
        train_once(model, *size)

    fixed = _fixed(config) if stage == "finetune" else config
    cost = Rehearsal(fixed, stage, device="cpu").micro_batch(*size, autocast, checkpointing)
    assert cost.with_gradients == pytest.approx(allocated(run), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("numba", [pytest.param(True, marks=pytest.mark.slow), False])  # the quick cases above have it
def test_the_scan_s_own_memory_is_counted(numba, monkeypatch):
    if not numba:
        monkeypatch.setenv("MANTICORE_NUMBA", "0")
    # Recomputed layers, wide and long, and hardly any vocabulary: the peak is in the backward of a scan.
    config = config_of("mamba", vocabulary=16, width=256, mixture="static")
    model = real(config, "finetune", None, True)

    def run():
        model.zero_grad(set_to_none=True)
        train_once(model, 4, 256)

    cost = Rehearsal(_fixed(config), "finetune", device="cpu").micro_batch(4, 256, None, True)
    assert cost.with_gradients == pytest.approx(allocated(run), rel=0.05)


def test_distillation_counts_its_teacher(tmp_path):
    config = config_of("gpt_neox+mamba")
    torch.manual_seed(0)
    soft = ManticoreForCausalLM(_fixed(config))
    hard = set_stage(prune(soft, "gpt_neox"), "finetune")
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = DistilTrainer(model=hard, args=arguments, teacher=soft)
    ids = torch.randint(0, 512, (2, 96))

    def run():
        hard.zero_grad(set_to_none=True)
        trainer.compute_loss(hard.train(), {"input_ids": ids, "labels": ids}).backward()

    rehearsal = Rehearsal(hard.config, "finetune", device="cpu", teacher=_fixed(config))
    assert rehearsal.teacher_bytes == sum(p.nbytes for p in soft.parameters())
    # The Trainer picks the labelled rows by a mask, which costs their numbers besides
    assert rehearsal.micro_batch(2, 96).with_gradients == pytest.approx(allocated(run), rel=0.05)


@pytest.mark.parametrize(
    "pair, stage, ways",
    [
        ("gpt_neox+mamba", "projectors", [(None, False), (BF16, False)]),
        # Layers of two kinds in turn
        pytest.param("gemma2+mamba", "finetune", [(None, False), (BF16, True)], marks=pytest.mark.slow),
        pytest.param(
            "gpt_neox+mamba",
            "finetune",
            [(None, False), (None, True), (BF16, False), (BF16, True)],
            marks=pytest.mark.slow,
        ),
        # Of four kinds, some with experts
        pytest.param("gemma2+jamba", "finetune", [(BF16, True)], marks=pytest.mark.slow),
    ],
)
def test_three_periods_stand_for_all_layers(pair, stage, ways):
    short, whole = (Rehearsal(config_of(pair), stage, every_layer=whole) for whole in (False, True))
    assert len(short.ledger.repeats) == 2 and not whole.ledger.repeats
    assert sum(1 for _ in short.model.modules()) < sum(1 for _ in whole.model.modules())
    for way in ways:
        assert short.micro_batch(2, 64, *way) == whole.micro_batch(2, 64, *way)


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpointing, size", [(True, (2, 64)), pytest.param(False, (1, 256), marks=pytest.mark.slow)]
)
def test_gradients_of_layers_are_divided_as_they_come(checkpointing, size):
    """With many devices hardly anything of a layer's gradient stays; those outside layers stay to the end."""
    config = config_of("gpt_neox+mamba", vocabulary=64, mixture="static")
    model = real(config, "finetune", None, checkpointing)
    layers = [one for layer in layers_of(model) for one in layer.parameters()]
    handles = [one.register_post_accumulate_grad_hook(lambda done: setattr(done, "grad", None)) for one in layers]

    def run():
        model.zero_grad(set_to_none=True)
        train_once(model, *size)

    costs = [Rehearsal(_fixed(config), "finetune", device="cpu", share=share) for share in (0, 0.5, 1)]
    none, half, all_of_it = [one.micro_batch(*size, None, checkpointing) for one in costs]
    assert none.with_divided == pytest.approx(allocated(run), rel=0.05)
    assert none.with_divided == half.with_undivided == all_of_it.with_undivided
    assert all_of_it.with_divided == all_of_it.with_gradients == half.with_gradients
    assert none.with_divided <= half.with_divided <= all_of_it.with_divided
    for handle in handles:
        handle.remove()
    if checkpointing:
        most = max(allocated(run) for _ in range(3))  # torch's profiler loses events on a busy machine
        assert none.with_divided < 0.9 * most, "the gradients hardly matter here"


def test_a_rehearsal_repeats_itself():
    rehearsal = Rehearsal(config_of("gpt_neox+mamba"), "projectors")
    first = rehearsal.micro_batch(2, 64)
    assert rehearsal.micro_batch(2, 64, None, True) != first  # checkpointing leaves nothing behind
    rehearsal.evaluation(4, 64)
    assert rehearsal.micro_batch(2, 64) == first


@pytest.mark.parametrize(
    "kinds, found",
    [
        ("aaaaaaaa", (0, 1, 8)),
        ("abababababab", (0, 2, 6)),
        ("xaaaaaz", (1, 1, 5)),
        ("aaa", None),
        ("abcdefgh", None),
        ("aabaabaabaabaac", (0, 3, 4)),
    ],
)
def test_periods(kinds, found):
    assert find_period(list(kinds)) == found


def test_flops_are_torch_s():
    config = config_of("gpt_neox+llama")
    model, (batch, length) = real(config, "finetune"), (2, 48)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_once(model, batch, length)
    # The backward of attention recomputes the scores, which the kernel made of plain products has stored.
    again = 0
    for name in config.component_names:
        layers = getattr(config, name).num_hidden_layers
        again += 2 * batch * length**2 * getattr(config, name).hidden_size * layers
    cost = Rehearsal(_fixed(config), "finetune", device="cpu").micro_batch(batch, length)
    assert cost.operations == counter.get_total_flops() + again


@pytest.mark.parametrize("pair", ["gpt_neox+mamba", "llama+mamba2", "gemma2+jamba"])
def test_caches_are_the_real_ones(pair):
    config, tokens, batch = config_of(pair, num_blocks=2), 50, 2
    found = cache_sizes(meta_hybrid(config), tokens, batch)
    model = ManticoreForCausalLM(config).eval()
    cache = model.make_cache()
    with torch.no_grad():
        model(input_ids=torch.zeros(batch, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    for name in config.component_names:
        layers = [layer for block in range(2) for layer in cache.view(name, block).layers]
        tensors = [getattr(layer, key, None) for layer in layers for key in ("keys", "values")]
        for layer in layers:
            for key in ("conv_states", "recurrent_states"):
                tensors += list(getattr(layer, key, {}).values())
        assert found[name]["total"] == sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
    alone = cache_sizes(meta_hybrid(config), tokens)
    for one in alone.values():
        if pair != "gemma2+jamba":  # whose windows are full by then
            assert one["total"] == one["constant"] + tokens * one["per_token"]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_optimizers_keep_what_they_keep(optim, tmp_path):
    from transformers import Trainer

    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 24), (24,), (8, 16))]
    arguments = TrainingArguments(tmp_path, optim=optim, report_to="none", use_cpu=True)
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = cls(parameters, **options)
    for one in parameters:
        one.grad = torch.randn_like(one)
    optimizer.step()
    kept = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
    shapes = [(tuple(one.shape), one.dtype) for one in parameters]
    assert optimizer_bytes(shapes, {"optim": optim}, "cpu") == (kept, 0)


def test_optimizers_that_cannot_be_planned():
    shapes = [((4, 4), torch.float32)]
    assert optimizer_bytes(shapes, {"optim": "adamw_bnb_8bit"}, "cuda") == (int(16 * (2 + 8 / 256)), 0)
    with pytest.raises(ManticoreError, match="optim='no_such'"):
        optimizer_bytes(shapes, {"optim": "no_such"}, "cuda")
