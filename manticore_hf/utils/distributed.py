"""One run in several processes (torchrun, accelerate launch): who writes, prints and waits, and what is summed.

Parallelism itself is accelerate's and torch.distributed's (DDP, FSDP2), through the Trainer; what DeepSpeed needs is in
`deepspeed.py`. Everything here is the identity in a single process. Functions marked "on every rank" are collective:
all processes must call them.

Who is who is asked of torch.distributed, not of accelerate's `PartialState` (1.15). That counts two processes as one on
a machine without an accelerator unless it was told `cpu`, and wherever LOCAL_RANK is not set, so that both would write;
and in a process that asks before its TrainingArguments exist it forms the group, with another timeout and backend than
these say. accelerate's own collectives follow it. Its `main_process_first` leaves the other processes waiting where the
first one fails.
"""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer

from manticore_hf.utils.deepspeed import Unrounded, gathered_weights

Item, Result = TypeVar("Item"), TypeVar("Result")


def world() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this is the process that writes and prints, rank 0."""
    return world()[0] == 0


def print_main(*values: Any, **options: Any) -> None:
    """Prints, on rank 0; takes what `print` takes."""
    if is_main():
        print(*values, **options)


def bar(items: Iterable[Item] | None = None, **options: Any) -> Iterable[Item]:
    """A progress bar, on rank 0; takes what `tqdm` takes."""
    return tqdm(items, disable=not is_main(), **options)


def broadcast_object(value: Result) -> Result:
    """Rank 0's value on every rank; any plain Python value that can be pickled. On every rank."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Runs a function on rank 0 while the others wait; on every rank.

    Args:
        function: Is called with the other arguments; what it returns is pickled, if there are several processes.
        *args: Its arguments.
        **kwargs: Its named arguments.

    Returns:
        Its result, on every rank.

    Raises:
        Whatever it raises, on every rank: a rank that went on alone would wait forever.
    """
    if world()[1] == 1:
        return function(*args, **kwargs)
    found, error = None, None
    if is_main():
        try:
            found = function(*args, **kwargs)
        except Exception as err:
            error = err
    try:
        found, error = broadcast_object((found, error))
    except Exception:
        if error is not None:  # an error that cannot be sent
            raise error from None
        raise
    if error is not None:
        raise error
    return found


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, so that what it downloads or prepares is there for them.

    Not for making models: under ZeRO-3 all processes do that together (and downloads of weights lock their files).
    """
    several = world()[1] > 1
    if several and not is_main():
        dist.barrier()
    try:
        yield
    finally:
        if several and is_main():
            dist.barrier()


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place; on every rank."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_dict(values: Mapping[Hashable, float], device: torch.device) -> dict[Hashable, float]:
    """The sums over all processes of a dictionary's numbers; on every rank.

    Args:
        values: Numbers, or tensors of one number; the keys and their order are the same on every rank.
        device: Of this process; the numbers are added up there, in float64.
    """
    if world()[1] == 1:
        return {key: float(value) for key, value in values.items()}
    numbers = [float(value) for value in values.values()]
    return dict(zip(values, all_reduce(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()))


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values of a tensor on every rank, in place; on every rank."""
    if world()[1] > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def shares(batches: Sequence[Item]) -> Iterator[tuple[Item, int]]:
    """This process's share of a list: pairs (item, 1 or 0), as many on every rank.

    Sharded models run a forward pass on all ranks or on none, so a rank whose share is shorter repeats an item with
    weight 0.
    """
    rank, size = world()
    for start in range(0, len(batches), size):
        mine = start + rank
        yield batches[min(mine, len(batches) - 1)], int(mine < len(batches))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model."""
    from torch.distributed.fsdp import FSDPModule  # slow, and only where training is

    return isinstance(model, FSDPModule)


def ready_for_shards(trainer: Trainer) -> None:
    """Changes what accelerate (1.15) does by default where FSDP2 shards and a hybrid suffers; before the training.

    * Under mixed precision every unit rounds its results to the narrow dtype: mixture weights, which then do not add up
      to 1, mixed predictions and losses, which a hybrid computes in float32. Results are left as they were computed.
    * Between the micro-batches of a step every device keeps all gradients whole, as if nothing were sharded. They are
      divided after each one, unless `accelerator_config` says something about accumulation.
    """
    accelerator, plugin = trainer.accelerator, getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype not in (None, torch.float32):
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)
    if getattr(trainer.args.accelerator_config, "gradient_accumulation_kwargs", None) is None:
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def component_runner(model: nn.Module, name: str) -> Callable[..., Any]:
    """The component of that name as a callable that also runs where FSDP2 has sharded the hybrid.

    One that reads text by a tokenizer of its own runs inside the hybrid, alone, and predicts the hybrid's tokens.
    """
    if name in getattr(model.config, "aligned", ()):
        return partial(_run_alone, model, name)
    component = model.component(name)
    if not is_sharded(model):
        return component
    from torch.distributed.fsdp import register_fsdp_forward_method

    if not hasattr(model, "_run_component"):
        # Embeddings, final norms and heads belong to the hybrid's own unit, which is gathered around its methods only.
        model._run_component = types.MethodType(lambda self, which, **inputs: self.component(which)(**inputs), model)
        register_fsdp_forward_method(model, "_run_component")
    return lambda **inputs: model._run_component(name, **inputs)


def _run_alone(model, name, **inputs):
    kept = model.config.mixture_weights
    model.set_mixture_weights(name)
    try:
        return model(**inputs)
    finally:
        model.config.mixture_weights = kept


def gathered(trainer: Trainer, model: nn.Module, kept: Unrounded | None = None) -> dict[str, torch.Tensor] | None:
    """The whole state dict of a model that the Trainer's engine has sharded, in full on rank 0; else None.

    On every rank.

    Args:
        trainer: The Trainer, after its training.
        model: Its model. DeepSpeed's is for saving only afterwards: rank 0's has the whole weights as its parameters.
        kept: The `deepspeed.Unrounded` that was made before the training, if any.
    """
    if is_sharded(model):
        return trainer.accelerator.get_state_dict(model)
    if trainer.is_deepspeed_enabled:
        return gathered_weights(model, kept)
    return None
