"""One run in several processes (torchrun, accelerate launch): who writes, prints and waits, and what is summed.

Parallelism itself is accelerate's and torch.distributed's (DDP, FSDP2), through the Trainer; what DeepSpeed needs is in
`zero.py`. Everything here is the identity in a single process. Functions marked "on every rank" are collective: all
processes must call them.
"""

import contextlib
import dataclasses
import types

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from manticore_hf.utils.deepspeed import whole_weights


def world():
    """(rank of this process, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main():
    """Whether this is the process that writes and prints."""
    return world()[0] == 0


def print_main(*values, **options):
    """Prints, on rank 0."""
    if is_main():
        print(*values, **options)


def bar(items=None, **options):
    """A progress bar, on rank 0."""
    return tqdm(items, disable=not is_main(), **options)


def broadcast_object(value):
    """Rank 0's value on every rank; any plain Python value."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function, *args, **kwargs):
    """Runs a function on rank 0 while the others wait; on every rank.

    Returns:
        Its result, on every rank.

    Raises:
        Whatever it raises, on every rank: a rank that went on alone would wait forever.
    """
    found, error = None, None
    if is_main():
        try:
            found = function(*args, **kwargs)
        except Exception as err:
            error = err
    if world()[1] == 1:
        if error is not None:
            raise error
        return found
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
def main_first():
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


def all_reduce(tensor):
    """The sum of a tensor over all processes, in place; on every rank."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_dict(values, device):
    """The sums over all processes of a dictionary's numbers, its keys being the same on every rank; on every rank."""
    if world()[1] == 1:
        return {key: float(value) for key, value in values.items()}
    numbers = [float(value) for value in values.values()]
    return dict(zip(values, all_reduce(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()))


def broadcast(tensor):
    """Rank 0's values of a tensor on every rank, in place."""
    if world()[1] > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def shares(batches):
    """This process's share of a list: pairs (item, 1 or 0), as many on every rank.

    Sharded models run a forward pass on all ranks or on none, so a rank whose share is shorter repeats an item with
    weight 0.
    """
    rank, size = world()
    for start in range(0, len(batches), size):
        mine = start + rank
        yield batches[min(mine, len(batches) - 1)], int(mine < len(batches))


def is_sharded(model):
    """Whether FSDP2 has sharded a model."""
    return any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__)


def ready_for_shards(trainer):
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


def component_runner(model, name):
    """The component of that name as a callable that also runs where FSDP2 has sharded the hybrid."""
    component = model.component(name)
    if not is_sharded(model):
        return component
    from torch.distributed.fsdp import register_fsdp_forward_method

    if not hasattr(model, "_run_component"):
        # Embeddings, final norms and heads belong to the hybrid's own unit, which is gathered around its methods only.
        model._run_component = types.MethodType(lambda self, which, **inputs: self.component(which)(**inputs), model)
        register_fsdp_forward_method(model, "_run_component")
    return lambda **inputs: model._run_component(name, **inputs)


def gathered(trainer, model, kept=None):
    """The whole state dict of a model that the Trainer's engine has sharded, in full on rank 0; else None.

    On every rank.

    Args:
        trainer: The Trainer, after its training.
        model: Its model. DeepSpeed's is for saving only afterwards: rank 0's has the whole weights as its parameters.
        kept: The `zero.Unrounded` that was made before the training, if any.
    """
    if is_sharded(model):
        return trainer.accelerator.get_state_dict(model)
    if trainer.is_deepspeed_enabled:
        return whole_weights(model, kept)
    return None
