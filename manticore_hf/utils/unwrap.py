"""Recognising a hybrid, and finding the one inside what wraps it.

By the `model_type` of its configuration: loaded as remote code, a hybrid's class is of another copy of the files, so
that `isinstance` says no, and FSDP2 or a user's own subclass gives it another name.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from manticore_hf.modeling.configuration_manticore import ManticoreConfig


def is_hybrid(model_or_config: Any) -> bool:
    """Whether something is a hybrid or the configuration of one.

    Args:
        model_or_config: Any model or configuration. What wraps a hybrid (PEFT, DDP) is none: see `hybrid_of`.
    """
    if isinstance(model_or_config, nn.Module):
        # PEFT and others answer with the attributes of the model that they wrap.
        if not isinstance(model_or_config, PreTrainedModel):
            return False
        model_or_config = model_or_config.config
    return getattr(model_or_config, "model_type", None) == ManticoreConfig.model_type


def hybrid_of(model: nn.Module) -> PreTrainedModel | None:
    """The hybrid inside whatever wraps it (accelerate, DDP, FSDP, DeepSpeed, PEFT, torch.compile).

    Args:
        model: A hybrid, or a module that has one somewhere inside.

    Returns:
        The first hybrid among its modules, itself included; None if there is none.
    """
    return next((module for module in model.modules() if is_hybrid(module)), None)
