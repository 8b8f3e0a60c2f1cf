"""Pruning as a stage: choose a path, drop the rest, recover by distillation from the soft hybrid.

    manticore-hf prune --model tuned --data text.txt --output-dir hard --path loss --max-steps 200
    manticore-hf prune --model tuned --data text.txt --output-dir hard --path llama --distil-weight 0   # plain tuning

Takes every option of TrainingArguments for the distillation. A killed stage goes on from its last whole checkpoint.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments

from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.evaluation.losses import how_measured, measure, name_of
from manticore_hf.training.freezing import set_stage
from manticore_hf.training.prune import pick_path, prune
from manticore_hf.training.runtime import StageRun
from manticore_hf.training.stage_arguments import PruneArguments
from manticore_hf.utils.distributed import on_main, ready_for_shards
from manticore_hf.utils.renamed import old_names


class DistilTrainer(Trainer):
    """Trains a pruned hybrid (or any causal LM) on text and on the distribution of a teacher.

    loss = (1 - w) CE(text) + w KL(teacher || student), both means over the labelled tokens of the whole batch.

    Args:
        teacher: A frozen causal LM with the same vocabulary, in evaluation mode; None if `distil_weight` is 0.
        distil_weight: w.
        kwargs: As in Trainer.
    """

    def __init__(self, *args: Any, teacher: nn.Module | None = None, distil_weight: float = 0.5, **kwargs: Any):
        super().__init__(*args, **kwargs)
        ready_for_shards(self)
        self.distil_weight = distil_weight
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> torch.Tensor | tuple:
        """As in Trainer, with the distance to the teacher while the model is trained."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        if self.distil_weight and model.training:
            labels = inputs["labels"][:, 1:]
            kept = labels != -100
            given = {key: value for key, value in inputs.items() if key != "labels"}
            with torch.no_grad():
                target = self.teacher(**given, use_cache=False).logits[:, :-1][kept].float().log_softmax(-1)
            own = outputs["logits"][:, :-1][kept].float().log_softmax(-1)
            items = kept.sum() if num_items_in_batch is None else num_items_in_batch
            # 0 times minus infinity is no number: what a head rules out is very unlikely here
            own, target = (one.clamp(min=torch.finfo(one.dtype).min / 4) for one in (own, target))
            distance = F.kl_div(own, target, log_target=True, reduction="sum") / items
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                distance = distance * self.accelerator.num_processes  # as Trainer: the ranks average
            loss = (1 - self.distil_weight) * loss + self.distil_weight * distance
        return (loss, outputs) if return_outputs else loss


def run_prune(start: PruneArguments, data: DataArguments, arguments: TrainingArguments) -> dict:
    """Prunes a saved hybrid, distils it on text, and saves it.

    Args:
        start: PruneArguments.
        data: DataArguments; path "loss" is measured on the validation text.
        arguments: TrainingArguments of the distillation; `max_steps=0` or `num_train_epochs=0` for none.

    Returns:
        The stage's result, as written to `stage.json`: the path, its share of the soft hybrid's parameters, losses on
        the validation text of the soft hybrid, its components, their ensemble, and the pruned hybrid before and
        after distillation.

    Raises:
        ManticoreError: Something in the arguments cannot be used.
    """
    return StageRun("prune", arguments, data, verbose=start.verbose).perform(partial(_prune, start), _summary, start)


def _prune(start: PruneArguments, run: StageRun) -> dict:
    arguments, measured = run.arguments, {}
    soft = run.load_to_train(start.model, start.dtype).to(arguments.device)
    if start.path in ("alpha", "loss") and not soft.config.bridges:
        options = {"budget": start.budget, "cost": start.cost, "beam": start.beam}
        choice = on_main(pick_path, soft, start.path, run.validation, **options)
        path, measured = choice.path, choice.losses
    else:
        path = start.path.split(",") if "," in start.path else start.path
    hard = prune(soft, path, **({"budget": start.budget} if soft.config.bridges else {}))
    batch = arguments.per_device_eval_batch_size
    result = {"path": hard.config.route, "components": hard.config.component_names}
    if soft.config.bridges:
        result |= {"bridges": len(soft.config.bridges), "bridges_kept": len(hard.config.bridges or ())}
    result["share"] = hard.num_parameters() / soft.num_parameters()
    found = None
    if run.passages is not None:
        found = measure(soft, run.passages, batch)
        found.nats["unpruned hybrid"] = found.nats.pop("hybrid")
        found.nats["pruned, before distillation"] = measure(hard, run.passages, batch).nats["hybrid"]
    trained = None
    if arguments.max_steps != 0 and arguments.num_train_epochs > 0:
        teacher = {"teacher": soft if start.distil_weight else None, "distil_weight": start.distil_weight}
        trainer = run.trainer(DistilTrainer, set_stage(hard, "finetune"), **teacher)
        trained = trainer, run.fit(trainer)
        result["steps"] = trainer.state.global_step
        if found is not None:
            found.nats["pruned, distilled"] = measure(hard, run.passages, batch).nats["hybrid"]
    result["losses"] = {}
    if found is not None:
        own = list(found.nats)[-1]
        result |= {"data": name_of(run.data), "note": how_measured(run.data), "own": own, **found.to_dict(own)}
    return run.save(hard, {**result, "measured_paths": measured}, trained)


def _summary(result: dict) -> Iterator[str]:
    kept = f"{result.get('bridges_kept')} of {result.get('bridges')} bridges kept"
    names = result["path"] if "path" in result else result["route"]  # of version 0.1
    path = kept if names is None else " > ".join(names)
    yield f"\nprune: {path}, {result['share']:.1%} of the unpruned hybrid's parameters"
    for name, loss in result["losses"].items():
        bits = result.get("bits_per_byte", {}).get(name)
        said = "" if bits is None else f"{bits:.4f} bits per byte, "
        yield f"{name:>32}  {said}{loss:.4f} nats per token on the validation text"


__getattr__ = old_names(__name__, {"HealTrainer": "DistilTrainer", "run_harden": "run_prune"})
