"""What a stage takes on each engine, per device, and the first one that fits.

Weights, gradients and optimizer are counted, the rest comes from rehearsals. Engines are those of the Trainer: one
device, DDP, FSDP2 (each layer a unit, everything else one that stays gathered for the step), with activation
checkpointing, with parameters offloaded to the CPU, and LoRA or QLoRA instead of training everything.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from manticore_hf.plan.memory import optimizer_bytes
from manticore_hf.plan.schedule import Task
from manticore_hf.plan.step import Rehearsal
from manticore_hf.training.lora import lora_config, lora_targets
from manticore_hf.utils.formatting import plural

LORA_RANK = 16
_NF4 = 0.5 + 4 / 64  # bytes per parameter in 4 bits: with a float32 maximum for every 64


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        devices: How many.
        memory: Bytes of each.
        reserve: Share of it that is left to the CUDA context, communication and fragments.
        device: "cuda" or "cpu".
    """

    devices: int
    memory: int
    reserve: float
    device: str

    @property
    def usable(self) -> int:
        """Bytes of each device that training may take."""
        return int(self.memory * (1 - self.reserve))


@dataclass
class Option:
    """A way of running a stage.

    Attributes:
        engine: Its name.
        batch: Rows per device and micro-batch.
        parts: {what: bytes on one device}; their sum is the peak.
        operations: FLOPs of a micro-batch on one device.
        eval_batch: Rows of the evaluation at the stage's end, where they must be fewer than the stage's; else None.
        host: Bytes of the node's memory that it takes (offloaded parameters, all devices of the machine), or None.
        fits: Whether the peak is within what is usable.
    """

    engine: str
    batch: int
    parts: dict
    operations: int
    host: int | None = None
    eval_batch: int | None = None
    fits: bool = field(default=False)

    @property
    def peak(self) -> int:
        """Bytes on one device at the highest."""
        return sum(self.parts.values())

    def record(self) -> dict[str, Any]:
        """The fields and `peak` as plain values, for a JSON file."""
        return {**asdict(self), "peak": self.peak}


class StagePlanner:
    """All options of one training stage.

    Args:
        task: The stage's Task (see schedule).
        machine: A Machine.
        say: Called with what is rehearsed, before each: a rehearsal takes seconds.
    """

    def __init__(self, task: Task, machine: Machine, say: Callable[[str], object] = lambda text: None):
        self.task, self.machine, self._costs, self._optimizers = task, machine, {}, {}
        self.say = say

    # ---- rehearsals, made when they are needed -----------------------------------------------------------------------

    def _rehearse(self, dtype, prepare=None):
        task = self.task
        wide = 4 if task.autocast else dtype.itemsize  # what is trained with mixed precision is float32
        return Rehearsal(
            task.config,
            task.trains,
            dtype,
            self.machine.device,
            teacher=task.teacher,
            prepare=prepare,
            share=wide / dtype.itemsize / self.machine.devices,
            amounts=task.amounts,
        )

    @cached_property
    def plain(self) -> Rehearsal:
        """A rehearsal with the weights as the stage loads them."""
        return self._rehearse(self.task.dtype)

    @cached_property
    def sharded(self) -> Rehearsal:
        """A rehearsal with the weights as FSDP gathers them: in the dtype that it computes in."""
        return self.plain if self.task.compute == self.task.dtype else self._rehearse(self.task.compute)

    @cached_property
    def adapted(self) -> Rehearsal:
        """A rehearsal with LoRA, frozen weights in bfloat16."""
        return self._rehearse(torch.bfloat16, _with_lora)

    def _cost(self, name, batch, checkpointing):
        key = (name, batch, checkpointing)
        if key not in self._costs:
            more = ", checkpointing" if checkpointing else ""
            self.say(f"{self.task.stage}, {name} weights, {plural(batch, 'row')}{more}")
            autocast = self.task.autocast if name != "adapted" else torch.bfloat16
            self._costs[key] = getattr(self, name).micro_batch(batch, self.task.length, autocast, checkpointing)
        return self._costs[key]

    def _optimizer(self, weights):
        shapes = weights.shapes
        if shapes not in self._optimizers:
            self._optimizers[shapes] = optimizer_bytes(shapes, self.task.settings, self.machine.device)
        return self._optimizers[shapes]

    # ---- options -----------------------------------------------------------------------------------------------------

    def options(self) -> list[Option]:
        """Every Option at the stage's batch, in the order in which they are preferred."""
        batch, given = self.task.batch, self.task.checkpointing
        many = self.machine.devices > 1
        out = [self.unsharded(batch, given)] + ([self.unsharded(batch, given, ddp=True)] if many else [])
        if not given:
            out.append(self.unsharded(batch, True, ddp=many))
        if self.machine.device == "cuda":
            if many:
                out += [self.fsdp(batch, given)] + ([] if given else [self.fsdp(batch, True)])
            out.append(self.fsdp(batch, True, offload=True))
        if self.task.adaptable:
            out.append(self.lora(batch))
            if self.machine.device == "cuda":
                out += [self.lora(batch, fsdp=True)] if many else []
                out.append(self.lora(batch, four_bits=True))
        return out

    def choose(self, options: list[Option]) -> Option | None:
        """The option to take, or None: of those that train the same with the stage's batch, then with a smaller one."""
        many = self.machine.devices > 1
        same = [one for one in options if "LoRA" not in one.engine and not (many and one.engine.startswith("one "))]
        adapters = [one for one in options if "LoRA" in one.engine]
        offloaded = [one for one in same if one.host is not None]
        for one in same:
            if one.fits and one.host is None:
                return one
        smaller = [2**n for n in range(self.task.batch.bit_length() - 1, -1, -1) if 2**n < self.task.batch]
        for batch in smaller:
            sharded = many and self.machine.device == "cuda"
            one = self.fsdp(batch, True) if sharded else self.unsharded(batch, True, ddp=many)
            if one.fits:
                return one
        for one in offloaded:
            if one.fits:
                return one
        for batch in smaller if offloaded else ():
            if (one := self.fsdp(batch, True, offload=True)).fits:
                return one
        for one in adapters:
            if one.fits:
                return one
        for batch in smaller if adapters else ():
            for make in ({}, {"fsdp": True}, {"four_bits": True}):
                if (self.machine.device == "cuda" or not make) and (many or "fsdp" not in make):
                    if (one := self.lora(batch, **make)).fits:
                        return one
        return None

    def unsharded(self, batch: int, checkpointing: bool, ddp: bool = False) -> Option:
        """The option that keeps everything on every device.

        Args:
            batch: Rows per device and micro-batch.
            checkpointing: Recompute activations in the backward pass.
            ddp: On all devices (DDP); else on one.
        """
        made, left = self._step("plain", batch, checkpointing)
        weights = self.plain.weights
        kept, step = self._optimizer(weights)
        parts = {"weights": weights.bytes + self.plain.teacher_bytes, "gradients": left, "optimizer": kept}
        if ddp:
            parts["gradient buckets"] = weights.gradient_bytes
        parts["activations"] = made
        self._after(parts, weights.gradient_bytes, step)
        return self._finish("DDP" if ddp else "one device", checkpointing, batch, parts, "plain")

    def fsdp(self, batch: int, checkpointing: bool, offload: bool = False, name: str = "sharded") -> Option:
        """The option that divides weights, gradients and optimizer (FSDP2) and gathers layers while they are needed.

        Args:
            batch: Rows per device and micro-batch.
            checkpointing: Recompute activations in the backward pass.
            offload: Keep parameters, and so the optimizer, in the node's memory.
            name: The rehearsal that it is made of: "sharded", or "adapted" with LoRA.
        """
        weights, cost = self._divided(name), self._cost(name, batch, checkpointing)
        count, size = self.machine.devices, self.task.compute.itemsize if name == "sharded" else 2
        kept, step = (amount // count for amount in self._optimizer(weights))
        shards = {"weights": weights.bytes // count, "gradients": weights.gradient_bytes // count, "optimizer": kept}
        # Two layers are gathered at a time, the next being fetched; so are their gradients, one divided, one coming.
        gathered = size * (weights.root + 2 * weights.layer)
        arriving = size * weights.layer_trainable
        peak = cost.with_undivided if offload else cost.with_divided
        gradients = max(0, peak + arriving - cost.activations)
        if self.task.accumulation > 1 and not offload:
            gradients = shards["gradients"] + min(gradients, size * weights.root_trainable + arriving)
        parts = {**shards, "gradients": gradients, "gathered": gathered, "activations": cost.activations}
        if offload:
            parts.pop("weights"), parts.pop("optimizer")
        elif shards["gradients"] + step > gradients + gathered + cost.activations:  # the optimizer's step takes more
            parts |= {"gradients": shards["gradients"], "gathered": 0, "activations": step}
        if self.task.teacher is not None:  # the Trainer does not divide it
            parts["teacher"] = self.plain.teacher_bytes
        label = "FSDP2" if name == "sharded" else "LoRA, FSDP2"
        out = self._finish(label, checkpointing, batch, parts, name, offload)
        out.host = count * (sum(shards.values()) + step) if offload else None
        return out

    def _divided(self, name):
        """The Weights that FSDP2 divides: with mixed precision accelerate makes what is trained float32."""
        weights = self.plain.weights if name == "sharded" else self.adapted.weights
        if self.task.autocast is None:
            return weights
        return weights.widened()

    def lora(self, batch: int, fsdp: bool = False, four_bits: bool = False) -> Option:
        """The option with adapters of rank 16 on the linear maps, the mixer in full, activations recomputed.

        Args:
            batch: Rows per device and micro-batch.
            fsdp: Divide over the devices (FSDP2).
            four_bits: Keep the maps in 4 bits (QLoRA; Dettmers et al., arXiv 2305.14314).
        """
        if fsdp:
            return self.fsdp(batch, True, name="adapted")
        made, left = self._step("adapted", batch, True)
        weights = self.adapted.weights
        kept, step = self._optimizer(weights)
        size = weights.bytes
        if four_bits:
            size -= int((2 - _NF4) * weights.quantised)
            made += 2 * weights.largest_quantised  # in bfloat16 while it is multiplied
        parts = {"weights": size, "gradients": left, "optimizer": kept}
        if self.machine.devices > 1:
            parts["gradient buckets"] = weights.gradient_bytes
        parts["activations"] = made
        self._after(parts, weights.gradient_bytes, step)
        label = ("QLoRA" if four_bits else "LoRA") + (", DDP" if self.machine.devices > 1 else "")
        return self._finish(label, True, batch, parts, "adapted")

    def _step(self, name, batch, checkpointing):
        """(activations, gradients) at a step's peak."""
        cost = self._cost(name, batch, checkpointing)
        if self.task.accumulation > 1:  # gradients of the micro-batches before are there from the beginning
            return cost.activations, getattr(self, name).weights.gradient_bytes
        gradients = cost.with_gradients - cost.activations
        return cost.activations, gradients

    def _after(self, parts, gradients, step):
        """Raises what an optimizer's step takes over the peak of the backward pass, if it is more."""
        held, activations = parts["gradients"], parts["activations"]
        if gradients + step > held + activations:
            parts["gradients"], parts["activations"] = gradients, step

    def _evaluate(self, option, name):
        """Has the peak be that of the evaluation at the stage's end, if it is higher; with fewer rows if it must be."""
        rows, parts = self.task.eval_batch, option.parts
        if rows is None:
            return
        training = parts.get("gradients", 0) + parts["activations"]
        rest = option.peak - training
        while rows > 1 and rest + self._evaluation(name, rows) > max(self.machine.usable, option.peak):
            rows //= 2
        made = self._evaluation(name, rows)
        option.eval_batch = rows if rows != self.task.eval_batch else None
        if made > training:
            option.parts = {key: value for key, value in parts.items() if key not in ("gradients", "activations")}
            option.parts["evaluation"] = made

    def _evaluation(self, name, rows):
        key = (name, rows, "evaluation")
        if key not in self._costs:
            self.say(f"{self.task.stage}, {name} weights, evaluation with {plural(rows, 'row')}")
            autocast = self.task.autocast if name != "adapted" else torch.bfloat16
            self._costs[key] = getattr(self, name).evaluation(rows, self.task.length, autocast)
        return self._costs[key].activations

    def _finish(self, engine, checkpointing, batch, parts, name, offload=False):
        label = engine + (" + activation checkpointing" if checkpointing and "LoRA" not in engine else "")
        label += " + CPU offload" if offload else ""
        out = Option(label, batch, parts, self._cost(name, batch, checkpointing).operations)
        self._evaluate(out, name)
        out.fits = out.peak <= self.machine.usable
        return out


def _with_lora(hybrid):
    """(the hybrid with adapters, the parameters that QLoRA would quantise)."""
    from peft import get_peft_model

    quantised = [hybrid.get_submodule(name).weight for name in lora_targets(hybrid)]
    hybrid.requires_grad_(False)
    return get_peft_model(hybrid, lora_config(hybrid, r=LORA_RANK)), quantised
