"""Small models for the tests of plans, and torch's own account of a micro-batch."""

import gc

import torch
from accelerate.utils import convert_outputs_to_fp32
from transformers import AutoConfig

from manticore_hf import ManticoreConfig, ManticoreForCausalLM, set_stage
from manticore_hf.training.freezing import fix_alpha
from manticore_hf.training.trainer import PartSums

SIZES = {
    "gpt_neox": {"num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 6},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": 5},
    "gemma2": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": 10,
               "head_dim": 16, "sliding_window": 32},
    "mamba": {"state_size": 8, "num_hidden_layers": 6},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "num_hidden_layers": 5},
    "falcon_mamba": {"state_size": 8, "num_hidden_layers": 5},
    "jamba": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": 18,
              "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "num_experts": 4,
              "mamba_d_state": 8},
}  # fmt: skip


def config_of(pair, vocabulary=512, width=64, num_blocks=1, **settings):
    """The ManticoreConfig of a pair of families, "gpt_neox+mamba"."""
    parts = [
        {"name": kind, "config": AutoConfig.for_model(kind, vocab_size=vocabulary, hidden_size=width, **SIZES[kind])}
        for kind in pair.split("+")
    ]
    return ManticoreConfig(components=parts, num_blocks=num_blocks, **settings)


def real(config, stage, autocast=None, checkpointing=False):
    """The hybrid with storage, as a stage trains it."""
    torch.manual_seed(0)
    model = set_stage(ManticoreForCausalLM(config), stage)
    if stage == "finetune":
        fix_alpha(model)
    PartSums(model).__enter__()
    if checkpointing:
        model.activation_checkpointing_enable()
    if autocast is not None:
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", autocast)(model.forward))
    return model.train()


def train_once(model, batch, length):
    """One micro-batch, forward and backward."""
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(batch * (length - 1))).loss.backward()


def allocated(run):
    """Highest number of bytes that torch's CPU allocator gave out during `run` beyond what there was."""
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()  # what earlier tests left would be freed during the run, and be missing in its peak
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    now = peak = 0
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
