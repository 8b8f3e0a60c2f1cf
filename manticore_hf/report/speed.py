"""Measured speed and memory of a hybrid beside each component alone: same run, same prompt, in turn."""

import ctypes
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel, prompt: Sequence[int], new_tokens: int = 32, repeats: int = 5
) -> dict[str, Any]:
    """Median times to read a prompt and to write tokens after it, greedily, one sequence at a time.

    Args:
        model: A hybrid in evaluation mode, in the dtype and on the device to measure.
        prompt: [time] token ids.
        new_tokens: Tokens to write.
        repeats: Repetitions of each model, in turn, after one that does not count.

    Returns:
        {"device", "dtype", "threads", "prompt_tokens", "new_tokens", "repeats", "models": {name:
        {"prefill": tokens per second read, "decode": tokens per second written, "first": seconds to the first token,
        "weights": bytes, "working": largest bytes in use beside the weights while running, or None where this machine
        does not tell}}}; the hybrid is "hybrid". A pruned one has no whole components: it stands alone.
    """
    names = [] if model.config.route else model.config.component_names
    models = {**{name: model.component(name) for name in names}, "hybrid": model}
    ids = torch.as_tensor(prompt, device=model.device)[None]
    times = {name: ([], []) for name in models}
    working = dict.fromkeys(models)
    steps = [(repeat, name) for repeat in range(repeats + 1) for name in models]
    for repeat, name in tqdm(steps, desc="Speed", leave=False):
        if repeat == 0:  # warms up, and is the one whose memory is watched: watching takes time
            working[name] = _watched_memory(lambda one=models[name]: _generate(one, ids, new_tokens + 1), model.device)
            continue
        for count, kept in zip((1, new_tokens + 1), times[name]):
            kept.append(_generate(models[name], ids, count))
    rows = {}
    for name, one in models.items():
        first, whole = (statistics.median(kept) for kept in times[name])
        rows[name] = {
            "prefill": ids.shape[1] / first, "decode": new_tokens / max(whole - first, 1e-9), "first": first,
            "weights": sum(p.numel() * p.element_size() for p in one.parameters()), "working": working[name],
        }  # fmt: skip
    return {
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prompt_tokens": ids.shape[1],
        "new_tokens": new_tokens,
        "repeats": repeats,
        "models": rows,
    }


def _generate(model, ids, count):
    """Seconds to write `count` tokens."""
    _wait(ids.device)
    start = time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )
    _wait(ids.device)
    return time.perf_counter() - start


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _watched_memory(run, device):
    """Runs something; returns by how many bytes the memory in use rose at most, or None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    run()  # what is made once and kept is not the run's
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed: it would hide what the run needs
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, TypeError, KeyError):
        run()
        return None


def _status(key):
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(line[1]) * 1024 for line in lines if line and line[0] == f"{key}:")
