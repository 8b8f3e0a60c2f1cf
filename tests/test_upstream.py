"""Faults of other libraries that this project works around: each test passes while the fault is there.

A test that fails here says that a library has been mended: take the workaround out (UPSTREAM.md says where it is), and
then the test. Other tests of this kind stand beside what they are about; UPSTREAM.md lists all.
"""

import os
from types import FunctionType, SimpleNamespace

import pytest
import torch
from families import tiny
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedConfig, Trainer, TrainingArguments
from transformers.cache_utils import LinearAttentionLayer

IDS = torch.arange(3, 11)[None]


def read(model, ids, cache, **inputs):
    """Logits of the last token of a call that goes on from a cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, cache=cache, **inputs).logits[:, -1]


# ---- Transformers: recurrent models ----------------------------------------------------------------------------------


def test_upstream_still_keeps_recurrent_gemmas_state_in_its_modules():
    """Two texts that are read by turns, each with a cache of its own, disturb each other."""
    model = tiny("recurrent_gemma").eval()
    caches = [DynamicCache(config=model.config) for _ in range(3)]
    position = {"position_ids": torch.tensor([[3]])}
    read(model, IDS[:, :3], caches[0])
    wanted = read(model, IDS[:, 3:4], caches[0], **position)
    read(model, IDS[:, :3], caches[1])
    read(model, IDS[:, 4:7], caches[2])
    assert (read(model, IDS[:, 3:4], caches[1], **position) - wanted).abs().max() > 1e-3


def test_upstream_still_reads_a_padded_first_token():
    """A call's only token is taken for a generated one: padding that comes alone reaches the state."""
    model = tiny("mamba2").eval()
    cache = DynamicCache(config=model.config)
    read(model, IDS[:, :1], cache, attention_mask=torch.zeros(1, 1, dtype=torch.long))
    assert cache.layers[0].recurrent_states[0].abs().max() > 0


def test_upstream_still_cannot_repeat_recurrent_states():
    assert not hasattr(LinearAttentionLayer, "batch_repeat_interleave")


def test_upstream_still_reads_a_text_again_after_a_cache_without_attention(monkeypatch):
    """`generate` takes the length of such a cache for unknown, and gives the model all tokens again (from 5.24 on)."""
    if not hasattr(DynamicCache, "is_linear"):
        pytest.skip("older than the fault")
    model, seen = tiny("mamba2").eval(), []
    cache = DynamicCache(config=model.config)
    read(model, IDS[:, :5], cache)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: seen.append(kwargs) or forward(*args, **kwargs))
    model.generate(IDS, max_new_tokens=1, do_sample=False, cache=cache)
    assert seen[0]["input_ids"].shape[1] == 8  # three of them are new


# ---- Transformers: loading, saving, training -------------------------------------------------------------------------


def test_upstream_still_reads_settings_through_python():
    assert isinstance(PreTrainedConfig.__getattribute__, FunctionType)
    assert not isinstance(ManticoreConfig.__getattribute__, FunctionType)


def test_upstream_still_looks_into_the_first_file_for_what_is_offloaded(tmp_path):
    """Of several files without an index, tensors of all but the first are not found on the disk, nor their ties."""
    from transformers.integrations.accelerate import accelerate_disk_offload

    model = tiny("llama", tie_word_embeddings=True)
    weights = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    first = {"model.norm.weight": weights.pop("model.norm.weight")}
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for file, tensors in zip(files, (first, weights)):
        save_file(tensors, file)
    assert set(accelerate_disk_offload(model, str(tmp_path), files, {"": "disk"}, None)) == set(first)


def test_upstream_still_forgets_the_best_checkpoint_that_is_written_late(tmp_path, monkeypatch):
    """Sharded weights are written after the Trainer has looked for the directory of the best checkpoint."""
    trainer = Trainer(tiny("gpt2"), TrainingArguments(str(tmp_path), save_strategy="steps", use_cpu=True))
    trainer.state.global_step = trainer.state.best_global_step = 7
    monkeypatch.setattr(trainer, "save_model", lambda *args, **kwargs: None)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", os.makedirs)
    monkeypatch.setattr(trainer, "_save_scaler", lambda *args: None)
    trainer._save_checkpoint(trainer.model, None)
    assert (tmp_path / "checkpoint-7").is_dir() and trainer.state.best_model_checkpoint is None


def test_upstream_still_gives_gpt2s_maps_back_as_others():
    """Dequantised, a transposed map (Conv1D) is a linear one: the state dict fits no checkpoint."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers.integrations.bitsandbytes import dequantize_and_replace

    quantised = bitsandbytes.nn.Linear4bit(8, 24, quant_type="nf4")  # what stands for a Conv1D(24, 8)
    quantised.source_cls = type(tiny("gpt2").transformer.h[0].attn.c_attn)
    model = torch.nn.ModuleDict({"c_attn": quantised}).to("cpu")
    model["c_attn"](torch.randn(1, 8))
    method = SimpleNamespace(quantization_method=lambda: "bitsandbytes")
    assert type(dequantize_and_replace(model, method)["c_attn"]) is torch.nn.Linear


def test_upstream_still_multiplies_experts_in_groups_of_any_width():
    """torch refuses rows that are no multiple of 16 bytes; Transformers does not look at them first."""
    from transformers.integrations.moe import _can_use_grouped_mm

    rows, weights, ends = torch.randn(4, 5), torch.randn(2, 5, 3), torch.tensor([2, 4], dtype=torch.int32)
    assert _can_use_grouped_mm(rows, weights, ends)
    with pytest.raises(RuntimeError, match="16 bytes"):
        torch.nn.functional.grouped_mm(rows, weights, offs=ends)


# ---- accelerate ------------------------------------------------------------------------------------------------------


def test_upstream_still_expects_no_buffer_among_shards():
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict

    model = torch.nn.Module()
    model.register_buffer("scale", torch.ones(1))
    with pytest.raises(AttributeError, match="device_mesh"):
        fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=True), model, {"scale": torch.ones(1)})


def test_upstream_still_rounds_the_results_of_every_shard():
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16


def test_upstream_still_keeps_whole_gradients_between_micro_batches():
    from accelerate.utils import GradientAccumulationPlugin

    assert GradientAccumulationPlugin().sync_each_batch is False


# ---- PEFT, bitsandbytes, TRL, torch ----------------------------------------------------------------------------------


def test_upstream_still_adapts_what_mamba_reads_raw():
    """An adapter of `dt_proj` is made without a word, and gets no gradient."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("mamba").train(), LoraConfig(target_modules=["dt_proj", "in_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    has_gradient = {"dt_proj": [], "in_proj": []}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            has_gradient[name.split(".lora_B")[0].rpartition(".")[2]].append(parameter.grad is not None)
    assert all(has_gradient["in_proj"]) and has_gradient["dt_proj"] and not any(has_gradient["dt_proj"])


def test_upstream_still_trains_through_a_kernel_without_backward(monkeypatch):
    """Weights that bitsandbytes packed for inference on a CPU go to its inference kernel in training, too."""
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    monkeypatch.setattr(functions.F, "gemv_4bit", lambda A, B, **kwargs: A.detach())  # needs AVX512-BF16 otherwise
    state = SimpleNamespace(shape=(4, 4), packing_format_for_cpu=True)
    out = functions.matmul_4bit(torch.randn(1, 4, requires_grad=True), torch.zeros(8, dtype=torch.uint8), state)
    assert not out.requires_grad


def test_upstream_still_replaces_the_forward_of_what_it_trains():
    """By one that multiplies one last state by one output matrix; a hybrid knows it by the name of this parameter."""
    from trl.trainer.utils import add_fused_lm_head

    model = tiny("gpt2")
    add_fused_lm_head(model, temperature=0.5)
    code = model.forward.__func__.__code__
    assert "fused_lm_head" in code.co_varnames and {"temperature", "outputs"} <= set(code.co_freevars)


def test_upstream_still_reads_soft_prompts_again_with_every_token():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny("gpt_neox"), config).eval()
    settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    said = [model.generate(input_ids=IDS, use_cache=use, **settings).logits[1] for use in (True, False)]
    assert (said[0] - said[1]).abs().max() > 1e-3


def test_upstream_still_keeps_the_hooks_of_a_call_that_failed():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("gpt_neox"), LoraConfig(target_modules=["query_key_value"])).eval()
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(input_ids=IDS, adapter_names=["default"] * (len(IDS) + 1))
    assert any(module._forward_pre_hooks for module in model.modules())


def test_upstream_still_shifts_smoothed_labels_by_the_name_of_a_class(tmp_path):
    model = tiny("gpt2").eval()
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    losses = []
    for name in ("GPT2LMHeadModel", "FSDPGPT2LMHeadModel"):
        model.__class__ = type(name, (type(model),), {})
        losses.append(Trainer(model, args).compute_loss(model, {"input_ids": IDS, "labels": IDS}).item())
    assert abs(losses[0] - losses[1]) > 1e-3


def test_upstream_still_drops_the_streamer_of_a_custom_generate():
    def choose(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **kwargs):
        found.append(streamer)
        return input_ids

    model, found, streamer = tiny("gpt_neox"), [], SimpleNamespace(put=lambda ids: None, end=lambda: None)
    model.generate(IDS, max_new_tokens=2, do_sample=True, custom_generate=choose, streamer=streamer)
    assert found == [None]


def test_upstream_still_convolves_with_weights_that_are_not_there():
    """With weights on the meta device torch's convolution returns memory as it finds it, where others raise."""
    values, weights = torch.randn(1, 2, 4), torch.empty(2, 1, 2, device="meta")
    assert torch.nn.functional.conv1d(values, weights, groups=2).device.type == "cpu"


def test_upstream_still_writes_weights_for_their_owner_alone(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o600


# ---- the Hub's clients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503])
def test_upstream_still_gives_up_on_a_busy_hub(hub, owner, tmp_path, status):
    hub.add_repo(f"{owner}/a", {"model.safetensors": b"x" * 100})
    hub.fault(f"GET /{owner}/a/resolve/.*safetensors", "status", times=1, status=status)
    with pytest.raises(HfHubHTTPError, match=str(status)):
        hf_hub_download(f"{owner}/a", "model.safetensors", cache_dir=tmp_path)


def test_upstream_still_takes_another_revision_of_a_data_set(hub, owner):
    """Where the Hub does not answer, whatever revision was prepared last."""
    from datasets import load_dataset

    repo = f"{owner}/texts"
    first = hub.add_repo(f"datasets/{repo}", {"train.jsonl": b'{"text": "one"}\n'})
    assert len(load_dataset(repo, split="train", revision=first)) == 1
    hub.fault(f"datasets/{repo}", "missing", times=-1, code="RepoNotFound")
    assert len(load_dataset(repo, split="train", revision="0" * 40)) == 1
