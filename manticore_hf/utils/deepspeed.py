"""What DeepSpeed's ZeRO needs of the training stages: the precision given to its launcher, and weights for saving.

In half precision DeepSpeed trains weights that it keeps in float32 beside the model, whose own are rounded. What is
saved here are the former, and what is not trained as it was before; else a stage would leave another model than it
leaves without DeepSpeed: rounded, also in mixture weights, and with frozen components that are no longer the published
ones.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def uses_deepspeed(arguments: TrainingArguments) -> bool:
    """Whether DeepSpeed trains, by TrainingArguments or as `accelerate launch` was told."""
    return getattr(arguments, "deepspeed_plugin", None) is not None


def take_precision(arguments: TrainingArguments) -> TrainingArguments:
    """Sets bf16 or fp16 in TrainingArguments where DeepSpeed trains and only `accelerate launch` was told so.

    Transformers refuses to train where DeepSpeed's configuration, which accelerate makes, says something else.
    """
    if uses_deepspeed(arguments) and not (arguments.bf16 or arguments.fp16):
        arguments.bf16, arguments.fp16 = (arguments.mixed_precision == kind for kind in ("bf16", "fp16"))
    return arguments


@contextlib.contextmanager
def present(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters are whole in the block, to be read, also where ZeRO-3 has split them up; on every rank."""
    split = [one for one in parameters if hasattr(one, "ds_id") and one.numel() < one.ds_numel]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


class Unrounded(TrainerCallback):
    """Keeps a Trainer's weights, before it trains, from being rounded by DeepSpeed; does nothing where that does not.

    DeepSpeed makes its float32 weights from those that it has rounded, so those that are trained are set as they were
    when a training begins, and then let go. What is not trained is kept until the end, on rank 0. All on the CPU, where
    it usually is already: DeepSpeed makes tensors of its own.

    Args:
        trainer: The Trainer, which gets this as a callback.
    """

    def __init__(self, trainer: Trainer):
        self.dtypes, self.fixed, self.trained = {}, {}, {}
        if not trainer.is_deepspeed_enabled or trainer.accelerator.mixed_precision == "no":
            return
        for name, one in trainer.model.named_parameters():
            self.dtypes[name] = one.dtype
            if one.requires_grad:
                self.trained[name] = one.data.to("cpu")
            elif dist.get_rank() == 0:
                self.fixed[name] = one.data.to("cpu")
        trainer.add_callback(self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Sets what is trained as it was before DeepSpeed rounded it, at the first step of a run."""
        if state.global_step == 0:  # a checkpoint has the weights in float32
            for name, one in model.named_parameters():
                if name in self.trained:
                    _set_float32(one, self.trained[name])
        self.trained.clear()


def _set_float32(parameter, value):
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):  # ZeRO-1 and ZeRO-2
        safe_set_full_fp32_param(parameter, value.float())
        return
    rank, size = dist.get_rank(getattr(parameter, "ds_process_group", None)), parameter.ds_tensor.numel()
    own = value.float().flatten()[rank * size : (rank + 1) * size]
    safe_set_local_fp32_param(parameter, F.pad(own, (0, size - own.numel())))  # the last rank's part is filled up


@torch.no_grad()
def gathered_weights(model: nn.Module, kept: Unrounded | None = None) -> dict[str, torch.Tensor] | None:
    """The state dict of a model that DeepSpeed has trained, on rank 0, whose parameters become these; else None.

    On every rank: parameters are gathered one by one, on the CPU.

    Args:
        model: The model that was trained, not its engine.
        kept: The Trainer's Unrounded, if it has one.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    dtypes, fixed = ({}, {}) if kept is None else (kept.dtypes, kept.fixed)
    main, state, known = dist.get_rank() == 0, {}, {}
    for name, one in model.named_parameters(remove_duplicate=False):  # both ends of a tie
        if id(one) not in known:
            rounded = one.dtype in (torch.bfloat16, torch.float16)
            value = safe_get_full_fp32_param(one) if one.requires_grad and rounded else None
            with present([one] if value is None else ()):
                value = fixed.get(name, one.data if value is None else value)
                known[id(one)] = value.to("cpu", dtypes.get(name), copy=True) if main else None
        state[name] = known[id(one)]
    if not main:
        return None
    for name, one in model.named_parameters():
        one.data = state[name]  # so that the model has the dtype of what is saved
    return {key: state.get(key, value) for key, value in model.state_dict().items()}
