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

from manticore_hf.modeling.aligned_hybrid import aligner_of
from manticore_hf.modeling.bounds_manticore import ManticoreError

ENOUGH = 60.0
"""Seconds after which no further repetition begins, once there are two."""


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel, prompt: Sequence[int], new_tokens: int = 32, repeats: int = 5
) -> dict[str, Any]:
    """Median times to read a prompt and to write tokens after it, greedily, one sequence at a time.

    Args:
        model: A hybrid in evaluation mode, in the dtype and on the device to measure.
        prompt: [time] token ids.
        new_tokens: Tokens to write.
        repeats: Repetitions of each model, in turn, after one that does not count; fewer, at least two, where they take
            longer than ENOUGH.

    Returns:
        {"device", "dtype", "threads", "prompt_tokens", "new_tokens", "reads_past_losses": whether
        the hybrid's mixture needs all predictions of a prompt, "repeats", "models": {name:
        {"prefill": tokens per second read, "decode": tokens per second written, "first": seconds to the first token,
        "weights": bytes, "working": largest bytes in use beside the weights while running, or None where this machine
        does not tell, "tokens_for_one"}}}; the hybrid is "hybrid". A pruned one has no whole components: it stands
        alone. Tokens are the hybrid's for all: a component that reads text by a tokenizer of its own reads the prompt's
        text, and what it reads and writes is divided by `tokens_for_one`, its tokens of that text for one of the
        hybrid's (1 for the others).

    Raises:
        ManticoreError: A component has a tokenizer of its own, and the prompt has no text.
    """
    names = [] if model.config.route else model.config.component_names
    models = {**{name: model.component(name) for name in names}, "hybrid": model}
    prompts = {name: list(prompt) for name in models}
    ratios = dict.fromkeys(models, 1.0)
    for name in model.config.aligned:
        prompts[name], ratios[name] = _own_prompt(model, name, prompts[name])
    given = {name: torch.as_tensor(one, device=model.device)[None] for name, one in prompts.items()}
    times = {name: ([], []) for name in models}
    working = dict.fromkeys(models)
    steps, began = [(repeat, name) for repeat in range(repeats + 1) for name in models], time.monotonic()
    for repeat, name in tqdm(steps, desc="Speed", leave=False):
        if repeat > 2 and name == next(iter(models)) and time.monotonic() - began > ENOUGH:
            break
        if repeat == 0:  # warms up, and is the one whose memory is watched: watching takes time
            working[name] = _watched_memory(
                lambda name=name: _generate(models[name], given[name], new_tokens + 1), model.device
            )
            continue
        for count, kept in zip((1, new_tokens + 1), times[name]):
            kept.append(_generate(models[name], given[name], count))
    rows = {}
    for name, one in models.items():
        first, whole = (statistics.median(kept) for kept in times[name])
        rows[name] = {
            "prefill": len(prompt) / first,
            "decode": new_tokens / ratios[name] / max(whole - first, 1e-9),
            "first": first,
            "tokens_for_one": ratios[name],
            "weights": sum(p.numel() * p.element_size() for p in one.parameters()),
            "working": working[name],
        }
    return {
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "reads_past_losses": model.config.reads_past_losses,
        "repeats": min(len(kept) for kept, _ in times.values()),
        "models": rows,
    }


def _own_prompt(model, name, prompt):
    """(a component's own tokens of a prompt, behind its start; how many it needs for one of the hybrid's)."""
    aligner = aligner_of(model)
    home, own = aligner.bytes_of(model, model.config.tokenizer_component), aligner.bytes_of(model, name)
    kept = [one for one in prompt if home.bytes_of([one])]
    if not kept:
        raise ManticoreError(f"Component {name!r} has a tokenizer of its own: the prompt to measure with needs text.")
    ids = own.cut(home.bytes_of(kept))
    return [*own.start, *ids], len(ids) / len(kept)


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
    """Runs something; returns by how many bytes the memory in use rose at most, or None where it cannot be measured."""
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
