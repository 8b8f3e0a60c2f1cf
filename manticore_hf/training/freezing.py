"""What is trainable in each stage of making a hybrid, and how its gradients are clipped."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.deepspeed import uses_deepspeed
from manticore_hf.utils.unwrap import hybrid_of

STAGES = ("projectors", "search", "finetune")
_COMMANDS = {"pretrain": "projectors"}  # where the command has another name


def set_stage(model: torch.nn.Module, stage: str) -> torch.nn.Module:
    """Sets `requires_grad` for a stage; the standard Trainer then trains just that.

    Args:
        model: A hybrid, or what wraps one (MAD's CompressionModel; what it adds is trained in every stage but
            "projectors").
        stage: "projectors" (projectors, bridges, mixture weights, gate and score heads, and embeddings and heads that
            are new, with embeddings="fresh" or by a transplanted vocabulary; the rest of the components frozen),
            "search" (everything) or "finetune" (everything but the static mixture weights, which keep their present
            values exactly). The command's name is taken, too: "pretrain" is "projectors".

    Returns:
        The model.

    Raises:
        ManticoreError: An unknown stage.
    """
    stage = _COMMANDS.get(stage, stage)
    if stage not in STAGES:
        raise ManticoreError(f"stage={stage!r} is unknown; choose one of {list(STAGES)}.")
    model.requires_grad_(stage != "projectors")
    hybrid = hybrid_of(model)
    for name, part in hybrid.named_children():
        if name not in hybrid.config.component_names:
            part.requires_grad_(True)
    for parameter in new_rows(hybrid):
        parameter.requires_grad_(True)
    if stage == "finetune":
        for alpha in alphas(hybrid):
            alpha.requires_grad_(False)
    return model


def new_rows(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Embeddings and heads that are new: all of them with embeddings="fresh", and those of a transplanted vocabulary.

    Args:
        model: A hybrid.
    """
    out = {}
    for entry in model.config.components:
        if model.config.embeddings == "fresh" or entry["transplant"] is not None:
            component = model.component(entry["name"])
            for end in (component.get_input_embeddings(), component.get_output_embeddings()):
                if end is not None:  # classifiers have no such head
                    out |= {id(parameter): parameter for parameter in end.parameters()}
    return list(out.values())


def alphas(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """A hybrid's static mixture weights, as logits: of its blocks, and of its bridges where they have any."""
    mixer = model.hybrid_mixer
    own = [] if mixer.bridges is None or mixer.bridges.alpha_logits is None else [mixer.bridges.alpha_logits]
    return [mixer.alpha_logits, *own]


def fix_alpha(model: torch.nn.Module, weights: torch.Tensor | None = None) -> torch.nn.Module:
    """Fixes the static mixture weights exactly; a mixture per token keeps its gate or prior, trained like any weight.

    Args:
        model: A hybrid.
        weights: [S, K]; default: the present ones.

    Returns:
        The model.
    """
    rows = (model.mixture_weights() if weights is None else weights).double().tolist()
    if model.config.mixture != "static":
        rows[-1] = None
    if any(row is not None for row in rows):
        model.set_mixture_weights(rows)
    return model


class ComponentClipping(TrainerCallback):
    """Clips the gradient of each component, of the mixer and of a classifier's score heads by its own norm.

    One norm over all would let the component with the largest gradients decide the step of the others. Use it with
    `max_grad_norm=0` in the TrainingArguments; not with fp16, whose gradients are still scaled when it runs.

    Args:
        max_norm: Largest norm of each part's gradient.
    """

    def __init__(self, max_norm: float = 1.0):
        if not max_norm > 0:
            raise ManticoreError(f"max_norm={max_norm!r} must be positive.")
        self.max_norm = max_norm

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises ManticoreError where the gradients cannot be seen: fp16, DeepSpeed."""
        if args.fp16:
            raise ManticoreError("ComponentClipping cannot see fp16's loss scale; use bf16 or max_grad_norm.")
        if uses_deepspeed(args):
            raise ManticoreError("ComponentClipping cannot see DeepSpeed's gradients; use max_grad_norm, DDP or FSDP2.")

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Clips, when the gradients of a step are complete."""
        hybrid = hybrid_of(model)
        for part in hybrid.children():
            parameters = [p for p in part.parameters() if p.grad is not None]
            if parameters:
                torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
