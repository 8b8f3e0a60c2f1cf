"""Bytes that do not depend on the batch: weights, gradients, and what the optimizer keeps of its own."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, Trainer, TrainingArguments

from manticore_hf.modeling.bounds_manticore import ManticoreError, show

# Bytes per parameter of optimizers that cannot be stepped without values: two moments in 8 bits with a float32 maximum
# for every 256 (bitsandbytes); Lion has one.
_PER_PARAMETER = {
    "adamw_bnb_8bit": 2 + 2 * 4 / 256, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "paged_adamw_32bit": 8, "paged_adamw": 8, "lion_8bit": 1 + 4 / 256, "paged_lion_8bit": 1 + 4 / 256,
    "lion_32bit": 4, "paged_lion_32bit": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A stage's parameters, in numbers of elements, and in bytes as they are loaded.

    Attributes:
        count, trainable: Elements, and those of them that are trained.
        bytes, gradient_bytes: Of all, and of the gradients of those that are trained.
        layer, layer_trainable: Elements of the largest layer: what FSDP gathers at once.
        root, root_trainable: Elements outside layers (embeddings, heads, mixer), which stay gathered for a whole step.
        quantised, largest_quantised: Elements that QLoRA keeps in 4 bits, and of the largest of these maps.
        shapes: [(shape, dtype)] of what is trained.
    """

    count: int
    trainable: int
    bytes: int
    gradient_bytes: int
    layer: int
    layer_trainable: int
    root: int
    root_trainable: int
    quantised: int
    largest_quantised: int
    shapes: tuple

    def widened(self) -> "Weights":
        """The same with what is trained in float32."""
        more = sum((4 - t.itemsize) * torch.Size(shape).numel() for shape, t in self.shapes if t.itemsize < 4)
        shapes = tuple((shape, torch.float32 if t.itemsize < 4 else t) for shape, t in self.shapes)
        return replace(self, bytes=self.bytes + more, gradient_bytes=self.gradient_bytes + more, shapes=shapes)


def weigh(model: nn.Module, hybrid: PreTrainedModel, quantised: Sequence[torch.Tensor] = ()) -> Weights:
    """The Weights of a model that is whole, on the meta device.

    Args:
        model: The model that is trained, with `requires_grad` as in its stage.
        hybrid: The hybrid inside it.
        quantised: Parameters that QLoRA keeps in 4 bits.
    """
    parameters = list(model.parameters())
    layers, inside = [], set()
    for layer in layers_of(hybrid):
        own = list(layer.parameters())
        inside |= {id(one) for one in own}
        layers.append((_count(own), _count(own, trained=True)))
    root = [one for one in parameters if id(one) not in inside]
    trained = [one for one in parameters if one.requires_grad]
    sizes = [one.numel() for one in quantised]
    return Weights(
        count=_count(parameters),
        trainable=_count(trained),
        bytes=sum(one.nbytes for one in parameters),
        gradient_bytes=sum(one.nbytes for one in trained),
        layer=max((a for a, _ in layers), default=0),
        layer_trainable=max((b for _, b in layers), default=0),
        root=_count(root),
        root_trainable=_count(root, trained=True),
        quantised=sum(sizes),
        largest_quantised=max(sizes, default=0),
        shapes=tuple((tuple(one.shape), one.dtype) for one in trained),
    )


def layers_of(hybrid: PreTrainedModel) -> Iterator[nn.Module]:
    """The layers of all components, one after the other."""
    for name in hybrid.config.component_names:
        component = hybrid.component(name)
        layout = hybrid.segments.layout(name)
        yield from getattr(component.get_submodule(layout.path), layout.layers)


def _count(parameters, trained=False):
    return sum(one.numel() for one in parameters if one.requires_grad or not trained)


def optimizer_bytes(
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], settings: Mapping[str, Any], device: str
) -> tuple[int, int]:
    """What the optimizer of a stage keeps, and what one of its steps takes beside that.

    The real optimizer makes one step on fake tensors.

    Args:
        shapes: [(shape, dtype)] of the parameters.
        settings: The stage's settings; `optim` and what belongs to it count.
        device: "cpu" or "cuda".

    Returns:
        (bytes kept, bytes that a step takes and frees).

    Raises:
        ManticoreError: The optimizer is unknown, or a package that it needs is not installed.
    """
    wanted = {key: value for key, value in settings.items() if key in _OF_OPTIMIZERS}
    name = str(getattr(wanted.get("optim"), "value", wanted.get("optim", "")))
    if name in _PER_PARAMETER:
        return int(_PER_PARAMETER[name] * sum(torch.Size(shape).numel() for shape, _ in shapes)), 0
    with tempfile.TemporaryDirectory(prefix="manticore-plan-") as folder:
        try:
            arguments = TrainingArguments(output_dir=folder, report_to="none", use_cpu=True, **wanted)
            cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        except (ImportError, ValueError) as err:
            raise ManticoreError(f"optim={show(wanted.get('optim'))} cannot be planned with: {err}") from err
    with FakeTensorMode():
        parameters = [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape, dtype in shapes]
        for one in parameters:
            one.grad = torch.empty_like(one)
        if not parameters:
            return 0, 0
        try:
            optimizer = cls(parameters, **options)
            optimizer.step()
        except Exception as err:
            raise ManticoreError(
                f"optim={show(wanted.get('optim'))} ({cls.__name__}) looks at values, which a plan does not have: "
                f"plan with optim: adamw_torch or one of {sorted(_PER_PARAMETER)}."
            ) from err
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        kept = sum(one.nbytes for one in states)
        # On CUDA, what is not fused goes over all tensors at once and makes a copy of each on the way.
        at_once = device == "cuda" and not options.get("fused") and "foreach" in optimizer.defaults
        return kept, sum(one.nbytes for one in parameters) if at_once else 0


_OF_OPTIMIZERS = {
    "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"
}  # fmt: skip
