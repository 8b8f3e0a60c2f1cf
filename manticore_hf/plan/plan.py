"""`manticore-hf plan`: does it fit, on what, and how long does it take, before a weight is downloaded.

manticore-hf plan recipes/poc.yaml --devices 8 --memory 80GB
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from manticore_hf.modeling.bounds_manticore import ManticoreError, show
from manticore_hf.plan import kernels
from manticore_hf.plan.amounts import parse_bytes, parse_count
from manticore_hf.plan.cache import cache_sizes
from manticore_hf.plan.engines import Machine, Option, StagePlanner
from manticore_hf.plan.schedule import make_task
from manticore_hf.plan.step import Rehearsal, meta_hybrid
from manticore_hf.plan.subject import load_subject
from manticore_hf.utils.defence import memory_of
from manticore_hf.utils.flops import reached_flops
from manticore_hf.utils.formatting import short_bytes, short_duration
from manticore_hf.utils.renamed import takes_old_name

RESULT = "plan.json"
_H100 = 989e12  # FLOP/s in bfloat16, without sparsity, as its data sheet has them


@takes_old_name("sequence_length", "block_size")
def make_plan(
    source: str | Path,
    devices: int = 1,
    memory: str | int | None = None,
    *,
    device: str = "cuda",
    flops: float | None = None,
    utilization: float = 0.35,
    reserve: float = 0.08,
    tokens: str | float | None = None,
    block_size: int | None = None,
    batch_size: int | None = None,
    configs: str | Path | None = None,
    allow_outside: bool = False,
) -> dict:
    """Plans the stages of a recipe, or the fine-tuning of a saved hybrid. Weights are not downloaded.

    Args:
        source: A recipe (.yaml), or a saved hybrid: directory or Hub repo.
        devices: Number of devices.
        memory: Memory of each: bytes, or text like "80GB" and "24GiB". Default: 80GB; for "cpu" this machine's.
        device: "cuda" or "cpu".
        flops: FLOP/s that a device reaches at best in the type that is computed in. Default: those of an H100 in
            bfloat16; for "cpu" those that matrix products in float32 reach on this machine.
        utilization: Share of them that training reaches.
        reserve: Share of the memory that is left free.
        tokens: Tokens of the training text, for hours (default: counted where that takes no download).
        block_size: Tokens per row (default: the recipe's block_size).
        batch_size: Rows per device and micro-batch (default: the stages').
        configs: Directory with `org/name/config.json` of components, read instead of the Hub.
        allow_outside: Whether what the recipe names on this machine may lie outside of the folder that it is in.

    Returns:
        Plain values: "components", "hybrid", "cache", "stages" with all options and the one chosen, "assumptions",
        "notes", "verdict".

    Raises:
        ManticoreError: Something cannot be read, joined or planned.
    """
    if device not in kernels.NOTES:
        raise ManticoreError(f"device={show(device)} is unknown; choose one of {sorted(kernels.NOTES)}.")
    if memory is None:
        memory = (memory_of(torch.device("cpu")) if device == "cpu" else None) or "80GB"
    machine = Machine(_positive("devices", devices), parse_bytes(memory), reserve, device)
    if flops is None:
        flops = _H100 if device == "cuda" else reached_flops()
    for name, value, most in (("flops", flops, 1e20), ("utilization", utilization, 1), ("reserve", reserve, 0.9)):
        if not 0 <= value <= most or (value == 0 and name != "reserve"):
            raise ManticoreError(f"{name}={show(value)} must be a number up to {most:g}.")
    if block_size is not None:
        _positive("block_size", block_size)
    tokens = None if tokens is None else parse_count(tokens, "tokens")
    subject = load_subject(source, configs, allow_outside)
    model = meta_hybrid(subject.config, subject.config.dtype or torch.float32)
    tasks = []
    for stage, settings in subject.stages:
        if batch_size is not None:
            settings = {**settings, "per_device_train_batch_size": _positive("batch_size", batch_size)}
        tasks.append(make_task(subject, stage, settings, block_size, tokens, machine.devices))
    length = max((task.length for task in tasks), default=512)
    plan = {
        "source": str(source),
        "name": subject.name,
        "dtype": _name(subject.config.dtype or torch.float32),
        "components": [_size(name, model, model.component(name)) for name in subject.config.component_names],
        "own_parameters": sum(p.numel() for p in model.hybrid_mixer.parameters()),
        "parameters": model.num_parameters(),
        "bytes": sum(p.nbytes for p in model.parameters()),
        "cache_tokens": length,
        "cache": cache_sizes(model, length),
    }
    rate = flops * utilization
    bar = tqdm(tasks, desc="Planning", unit="stage", leave=False)
    plan["stages"] = [_plan_stage(task, machine, rate, plan["parameters"], bar.set_postfix_str) for task in bar]
    plan["assumptions"] = {
        "devices": machine.devices,
        "memory": machine.memory,
        "usable": machine.usable,
        "reserve": reserve,
        "device": device,
        "flops": flops,
        "utilization": utilization,
        "kernels": kernels.NOTES[device],
    }
    plan["notes"] = subject.notes
    plan["verdict"] = _overall(plan)
    return plan


def _positive(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ManticoreError(f"{name}={show(value)} must be a positive integer.")
    return value


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _size(name, model, component):
    parameters = list(component.parameters())
    kind = getattr(model.config, name).model_type
    return {
        "name": name,
        "model_type": kind,
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.nbytes for p in parameters),
    }


def _plan_stage(task, machine, rate, parameters, say):
    out = {
        "stage": task.stage,
        "batch": task.batch,
        "accumulation": task.accumulation,
        "length": task.length,
        "dtype": _name(task.dtype),
        "autocast": task.autocast and _name(task.autocast),
        "checkpointing": task.checkpointing,
        "tokens": task.tokens,
        "counted": task.counted,
    }
    say(task.stage)
    if task.trains is None:
        options, devices = [_calibration(task, machine)], 1
        choice = options[0] if options[0].fits else None
        out["trainable"] = 0
    else:
        planner, devices = StagePlanner(task, machine, say), machine.devices
        options = planner.options()
        choice = planner.choose(options)
        out["trainable"] = planner.plain.weights.trainable
        out["optimizer"] = planner._optimizer(planner.plain.weights)[0]
    used = choice or options[0]
    per_token = used.operations / (used.batch * task.length)
    out |= {
        "options": [one.record() for one in options],
        "choice": choice and choice.record(),
        "flops_per_token": per_token,
        "hours_per_billion_tokens": per_token * 1e9 / (devices * rate) / 3600,
        "hours": task.tokens and per_token * task.tokens / (devices * rate) / 3600,
        "flops": task.tokens and per_token * task.tokens,
    }
    out["advice"] = _advise(task, choice, options, machine, parameters)
    return out


def _calibration(task, machine):
    rehearsal = Rehearsal(task.config, "projectors", task.dtype, machine.device, amounts=task.amounts)
    if rehearsal.config.projector != "linear":
        raise ManticoreError(f"calibrate: projector={rehearsal.config.projector!r} has no closed form; drop the stage.")
    cost, solving = rehearsal.calibration(task.batch, task.length)
    parts = {"weights": rehearsal.weights.bytes, "activations": cost.activations, "solving": solving}
    out = Option("one device", task.batch, parts, cost.operations)
    out.fits = out.peak <= machine.usable
    return out


def _advise(task, choice, options, machine, parameters):
    if choice is None:
        return _too_big(task, options, machine)
    out, engine = [], choice.engine
    if "FSDP2" in engine:
        out.append("launch with accelerate and FSDP2" + (", fsdp_offload_params: true" if choice.host else ""))
    elif "DDP" in engine:
        out.append("launch with accelerate or torchrun")
    if "LoRA" in engine:
        out.append("train adapters (lora_config) on weights in " + ("4 bits" if "QLoRA" in engine else "bfloat16"))
    if "checkpointing" in engine or "LoRA" in engine:
        out += [] if task.checkpointing else ["activation_checkpointing: true"]
    if choice.batch != task.batch:
        steps = task.accumulation * task.batch // choice.batch
        out.append(f"per_device_train_batch_size: {choice.batch}, gradient_accumulation_steps: {steps}")
    if choice.eval_batch is not None:
        out.append(f"per_device_eval_batch_size: {choice.eval_batch}")
    if task.converts and machine.devices > 1:
        held = machine.devices * task.dtype.itemsize * parameters
        out.append(
            f"while loading, each of the {machine.devices} processes holds all weights in {_name(task.dtype)}, "
            f"{short_bytes(held)} of the machine's memory (in {_name(task.converts)}, as stored, they share one copy)"
        )
    if choice.host:
        out.append(f"the node needs {short_bytes(choice.host)} of memory for what is offloaded")
    return out or ["no changes needed"]


def _too_big(task, options, machine):
    """What would help."""
    divided = [one for one in options if one.engine.startswith("FSDP2") and one.host is None]
    if divided:
        one = divided[-1]
        shared = sum(one.parts.get(key, 0) for key in ("weights", "gradients", "optimizer")) * machine.devices
        rest = one.peak - shared // machine.devices
        if rest < machine.usable:
            needed = math.ceil(shared / (machine.usable - rest))
            return [f"{needed} devices with this much memory would do, with {one.engine} and this batch size"]
    return ["use devices with more memory, shorter rows (block_size) or smaller components"]


def _overall(plan):
    missing = [one["stage"] for one in plan["stages"] if one["choice"] is None]
    if missing:
        return (
            f"Does not fit: {', '.join(missing)}. "
            + "; ".join(
                f"{one['stage']}: {'; '.join(one['advice'])}" for one in plan["stages"] if one["choice"] is None
            )
            + "."
        )
    ways = "; ".join(f"{one['stage']} with {one['choice']['engine']}" for one in plan["stages"])
    hours = [one["hours"] for one in plan["stages"]]
    if None in hours:
        return f"Fits: {ways}. The duration is unknown without the number of tokens (--tokens)."
    return f"Fits: {ways}; {short_duration(3600 * sum(hours))} in total, at the stated utilisation."


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Transformers' remarks on kernels that are not installed: a plan runs none."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
