"""Tells rounding from mistakes: makes models compute in float64 throughout.

Two right ways to one result differ by rounding. In float32 that can be as much as a mistake: where a recurrence is run
in chunks and step by step, and where a model chooses (of two experts that are nearly alike it takes one or the other,
and all that follows differs). In float64 rounding is nine orders smaller, and a mistake is not.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class Float64(TorchFunctionMode):
    """A context in which whatever asks for float32 gets float64; models in it are to be `doubled`.

    Norms, routers, scans and mixed predictions convert to float32, whatever their model's dtype.
    """

    paused = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if Float64.paused:
            return func(*args, **(kwargs or {}))
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(_wider(value) for value in args)
        return func(*args, **{key: _wider(value) for key, value in (kwargs or {}).items()})


@contextlib.contextmanager
def as_asked() -> Iterator[None]:
    """Within `Float64`: float32 where that is asked for. Random numbers of float64 are others than those of float32."""
    before, Float64.paused = Float64.paused, True
    try:
        yield
    finally:
        Float64.paused = before


def _wider(value):
    return torch.float64 if value is torch.float32 else value


def doubled(model: PreTrainedModel) -> PreTrainedModel:
    """A model of Transformers in float64. Its experts run one after another: torch multiplies no groups in float64."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.double()
