"""On a CUDA device: the contract of families, CUDA kernels against the portable path, and training in half precision.

The kernels are those of mamba-ssm and causal-conv1d, which Transformers takes where they are installed; without them
the tests of kernels are skipped, and the others test the portable path.
"""

import importlib.util

import families
import pytest
import torch
from datasets import Dataset
from manticore_hf.modeling import mixers_manticore as mixers
from manticore_hf.modeling.components_manticore import cache_argument
from scans import make_inputs
from test_qlora import four_bits, twin
from transformers import DynamicCache, TrainingArguments

from manticore_hf import ComponentSpec, ManticoreForCausalLM, lora_config
from manticore_hf.families.contract import PADDING, left_padded
from manticore_hf.families.examine import Examined, examine
from manticore_hf.families.precision import doubled
from manticore_hf.families.tiny import tokens
from manticore_hf.kernels import scan, triton_scan
from manticore_hf.training.trained_stages import HybridTrainer

pytestmark = pytest.mark.gpu
needs_kernels = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d")),
    reason="needs mamba-ssm and causal-conv1d",
)

# Those of the README's guarantee, and all that call a CUDA kernel when its package is installed
STATE_SPACE = ["bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h"]
FUSED = [kind for kind in STATE_SPACE if kind != "jamba"]
TYPES = sorted({model_type for model_type, _ in families.FAMILIES.values()} | {*STATE_SPACE})
# Left alone a component fails in causal-conv1d if what a mixer projects is no multiple of 8 wide; Mamba-2's kernels
# compute in tiles of 16
_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
SETTINGS = {
    "bamba": _HEADS, "falcon_h1": _HEADS, "granitemoehybrid": _HEADS,
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "chunk_size": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "chunk_size": 16},
}  # fmt: skip


def subject(model_type):
    return Examined(model_type, device="cuda", **SETTINGS.get(model_type, {}))


@pytest.fixture(autouse=True)
def full_precision():
    """Products in float32, not TF32: what is compared are ways to one result."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("model_type", TYPES)
def test_the_contract_holds(model_type):
    found = examine(model_type, "cuda", **SETTINGS.get(model_type, {}))
    assert found["verdict"] == "passes", found["checks"] or found["reason"]


def far(got, wanted):
    """The largest difference, in units of the largest value."""
    return ((got.double() - wanted).abs().max() / wanted.abs().max()).item()


def results(model, ids):
    """Logits in evaluation, those of chunked and single tokens, training's, and gradients; all at once, in float64."""
    model.eval()
    cache = DynamicCache(config=model.config)
    name = cache_argument(model.forward)
    with torch.no_grad():
        found, past = {"whole": model(input_ids=ids, use_cache=False).logits, "cached": []}, 0
        for part in ids.split([5, 1, 1, ids.shape[1] - 7], 1):
            where = torch.arange(past, past + part.shape[1], device=ids.device)[None]
            given = {"position_ids": where} if model.config.model_type == "bamba" else {}  # it counts from 0 each time
            found["cached"].append(model(input_ids=part, **{name: cache}, use_cache=True, **given).logits)
            past += part.shape[1]
    found["cached"] = torch.cat(found["cached"], 1)
    model.train().zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    found["training"] = out.logits.detach()
    found |= {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: value.double() for key, value in found.items()}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", FUSED)
def test_kernels_are_as_near_to_the_truth_as_the_portable_path(model_type, dtype, monkeypatch):
    """Both against float64: rounding apart, they compute the same."""
    model = subject(model_type).component
    mixers.repair_mixers(model)
    taken = next(m for m in model.modules() if isinstance(vars(m).get("forward"), mixers.OwnForward))
    bound = [name for name, _, kernel in mixers._called(type(taken).forward) if kernel]
    assert len(bound) >= 4, bound
    ids = tokens(2, 40, device="cuda")
    model = doubled(model.to(dtype))  # weights that bfloat16 holds, too
    truth = results(model, ids)  # in float64 no kernel is called
    model.to(dtype)
    kernels = results(model, ids)
    monkeypatch.setattr(mixers, "_kernel_takes", lambda tensor: False)
    portable = results(model, ids)
    assert kernels.keys() == portable.keys() == truth.keys()
    assert any(not torch.equal(kernels[key], portable[key]) for key in truth)  # two ways were taken
    # Mamba-2's kernels multiply in TF32. Sums of gradients of a few numbers (A, step sizes) are coarse in bfloat16.
    floor = {torch.float32: 1e-4 if "mamba2_chunk_scan" not in bound else 2e-2, torch.bfloat16: 0.1}[dtype]
    for key, wanted in truth.items():
        if wanted.abs().max() > 1e-8 and not (dtype == torch.bfloat16 and key.endswith(("A_log", "dt_bias"))):
            assert far(kernels[key], wanted) <= max(floor, 3 * far(portable[key], wanted)), key


@needs_kernels
@pytest.mark.parametrize("model_type", FUSED)
def test_padding_changes_nothing_in_training(model_type):
    """The fused kernels alone would start from a state that the padding left."""
    model = subject(model_type).hybrid().train()
    ids, mask, positions = left_padded(12, "cuda")
    labels = ids.masked_fill(mask == 0, -100)
    padded = model(input_ids=ids, attention_mask=mask, labels=labels, position_ids=positions, use_cache=False)
    alone = [model(input_ids=row, labels=row, use_cache=False) for row in (ids[:1, PADDING:], ids[1:])]
    for got, one in zip((padded.logits[:1, PADDING:], padded.logits[1:]), alone):
        assert far(got, one.logits.double()) < 1e-3


@pytest.mark.parametrize("pair", families.PAIRS)
def test_a_hybrid_gives_what_it_gives_on_the_cpu(pair):
    torch.manual_seed(0)
    model = families.hybrid(pair)
    ids, mask, _ = left_padded(12)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        model.to("cuda")
        got = model(input_ids=ids.cuda(), attention_mask=mask.cuda()).logits[mask.cuda().bool()]
    assert far(got.cpu(), wanted.double()) < 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_training_in_bfloat16(blocks, checkpointing, tmp_path):
    """It learns what it learns in float32 on the CPU, and is saved and loaded."""
    rows = tokens(8, 32).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    losses = []
    for use_cpu in (True, False):
        torch.manual_seed(0)
        model = families.hybrid("gpt_neox+mamba", num_blocks=blocks)
        arguments = TrainingArguments(
            output_dir=tmp_path,
            use_cpu=use_cpu,
            bf16=not use_cpu,
            max_steps=30,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            gradient_checkpointing=checkpointing,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        trainer = HybridTrainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert next(model.parameters()).is_cuda
    on_cpu, on_gpu = losses
    assert abs(on_gpu[0] - on_cpu[0]) < 0.03 * on_cpu[0]
    assert on_gpu[-1] < 0.5 * on_gpu[0] and on_cpu[-1] < 0.5 * on_cpu[0]
    model.save_pretrained(tmp_path / "saved")
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "saved", device_map="cuda").eval()
    ids = tokens(device="cuda")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_composing_on_the_gpu():
    """Components that are on a GPU make a hybrid there."""
    parts = [ComponentSpec(subject(kind).component, name=kind) for kind in ("llama", "mamba")]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2)
    assert {one.device.type for one in (*model.parameters(), *model.buffers())} == {"cuda"}
    ids = tokens(device="cuda")
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, ids.shape[1] + 5)


@pytest.mark.parametrize("family", ["llama", "mamba", "mamba2", "falcon_mamba", "gpt2"])
def test_qlora(family, tmp_path):
    """Four bits are the rounded weights here, too, and adapters on them learn."""
    pytest.importorskip("bitsandbytes")
    from peft import get_peft_model, prepare_model_for_kbit_training

    plain = families.hybrid(family, num_blocks=1, mixture="token", projector="mlp")
    plain.save_pretrained(tmp_path)
    settings = four_bits(plain)
    model = ManticoreForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cuda").eval()
    expected, ids = twin(model, plain.cuda()), tokens(device="cuda")
    with torch.no_grad():
        assert far(model(ids).logits, expected(ids).logits.double()) < 2e-3
    model = get_peft_model(prepare_model_for_kbit_training(model), lora_config(model, r=4)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("batch, d, n, time", [(2, 5, 3, 37), (1, 40, 16, 16), (3, 70, 8, 5), (2, 256, 16, 1000)])
def test_the_scan_in_triton_is_the_scan_in_torch(batch, d, n, time, monkeypatch):
    arguments = [x.detach().float().cuda() for x in make_inputs(batch, d, n, time)]
    found, calls = [], []
    run_triton = triton_scan.run_triton
    monkeypatch.setattr(triton_scan, "run_triton", lambda *args: calls.append(1) or run_triton(*args))
    for given, dtype in ((1, torch.float32), (0, torch.float64)):
        monkeypatch.setenv("MANTICORE_TRITON", str(given))
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in arguments]
        y, last = scan.selective_scan(*inputs)
        weights = [torch.linspace(-1, 1, x.numel(), device="cuda", dtype=dtype).reshape(x.shape) for x in (y, last)]
        ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
        found.append([y, last, *(x.grad for x in inputs)])
    assert len(calls) == 2
    for got, wanted in zip(*found):
        assert far(got, wanted) < 1e-5


def test_compiled_on_the_gpu():
    model = families.hybrid("gpt_neox+mamba").cuda()
    ids = tokens(device="cuda")
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        got = torch.compile(model)(input_ids=ids, use_cache=False).logits
    assert far(got, wanted.double()) < 1e-3
