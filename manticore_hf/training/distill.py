"""Hardening as a stage: choose a route, drop the rest, heal by distillation from the soft hybrid.

    manticore-hf harden --model tuned --data text.txt --output_dir hard --route loss --max_steps 200
    manticore-hf harden --model tuned --data text.txt --output_dir hard --route llama --distil_weight 0   # plain tuning

Takes every option of TrainingArguments for the healing. A stage that was killed goes on from its last whole checkpoint.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.evaluation.data import DataArguments, load_rows
from manticore_hf.evaluation.losses import compare_losses, measured_on
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.training.freezing import set_stage
from manticore_hf.training.prune import harden, pick_route
from manticore_hf.training.trained_stages import collator, last_whole_checkpoint
from manticore_hf.training.untrained_stages import finished, record, training_defaults
from manticore_hf.utils.deepspeed import Unrounded, take_precision
from manticore_hf.utils.distributed import broadcast_object, gathered, main_first, on_main, print_main, ready_for_shards


@dataclass
class HardenArguments:
    """What is hardened, and how its route is chosen."""

    model: str = field(metadata={"help": "The soft hybrid: directory or Hub repo."})
    route: str = field(
        default="alpha",
        metadata={
            "help": "alpha (by the mixture weights), loss (measured on the validation text), a component's name, "
            "or one name per block with commas between."
        },
    )
    budget: float | None = field(
        default=None, metadata={"help": "Largest cost of the route, as a share of the soft hybrid's."}
    )
    cost: str = field(default="parameters", metadata={"help": "What the budget counts: parameters, flops or latency."})
    beam: int = field(default=4, metadata={"help": "Routes kept where there are too many to measure all."})
    distil_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the soft hybrid's distribution in the healing's loss; the text has the rest."},
    )
    train_dtype: str = field(default="float32", metadata={"help": "dtype the weights are loaded in."})

    def __post_init__(self):
        if not 0 <= self.distil_weight <= 1:
            raise ManticoreError(f"distil_weight={self.distil_weight} must be in [0, 1].")


class HealTrainer(Trainer):
    """Trains a hardened hybrid (or any causal LM) on text and on the distribution of a teacher.

    loss = (1 - w) CE(text) + w KL(teacher || student), both means over the labelled tokens of the whole batch.

    Args:
        teacher: A frozen causal LM with the same vocabulary, in evaluation mode; None if `distil_weight` is 0.
        distil_weight: w.
        kwargs: As in Trainer.
    """

    def __init__(self, *args, teacher=None, distil_weight=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        ready_for_shards(self)
        self.distil_weight = distil_weight
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        if self.distil_weight and model.training:
            labels = inputs["labels"][:, 1:]
            kept = labels != -100
            given = {key: value for key, value in inputs.items() if key != "labels"}
            with torch.no_grad():
                target = self.teacher(**given, use_cache=False).logits[:, :-1][kept].float().log_softmax(-1)
            own = outputs["logits"][:, :-1][kept].float().log_softmax(-1)
            items = kept.sum() if num_items_in_batch is None else num_items_in_batch
            distance = F.kl_div(own, target, log_target=True, reduction="sum") / items
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                distance = distance * self.accelerator.num_processes  # as Trainer: the ranks average
            loss = (1 - self.distil_weight) * loss + self.distil_weight * distance
        return (loss, outputs) if return_outputs else loss


def run_harden(start, data, arguments):
    """Hardens a saved hybrid, heals it on text, and saves it.

    Args:
        start: HardenArguments.
        data: DataArguments; route "loss" is measured on the validation text.
        arguments: TrainingArguments of the healing; `max_steps=0` or `num_train_epochs=0` for none.

    Returns:
        The stage's result, as written to `stage.json`: the route, its share of the soft hybrid's parameters, losses on
        the validation text of the soft hybrid, its components, their ensemble, and the hardened hybrid before and
        after healing.
    """
    output = Path(arguments.output_dir)
    result = finished(output)
    if result is None:
        result = _run(start, data, arguments, output)
    print_main(f"\nharden: {' > '.join(result['route'])}, {result['share']:.1%} of the soft hybrid's parameters")
    for name, loss in result["losses"].items():
        print_main(f"{name:>32}  {loss:.4f} nats per token on the validation text")
    return result


def _run(start, data, arguments, output):
    take_precision(arguments)
    set_seed(arguments.seed)
    soft = ManticoreForCausalLM.from_pretrained(start.model, dtype=start.train_dtype)
    with main_first():
        tokenizer = AutoTokenizer.from_pretrained(start.model)
        train, validation = load_rows(data, tokenizer)
    soft.to(arguments.device)
    measured = {}
    if start.route in ("alpha", "loss"):
        options = {"budget": start.budget, "cost": start.cost, "beam": start.beam}
        choice = on_main(pick_route, soft, start.route, validation, **options)
        route, measured = choice.route, choice.losses
    else:
        route = start.route.split(",") if "," in start.route else start.route
    hard = harden(soft, route)
    batch = arguments.per_device_eval_batch_size
    result = {"stage": "harden", "route": hard.config.route, "components": hard.config.component_names}
    result["share"] = hard.num_parameters() / soft.num_parameters()
    losses = {}
    if validation is not None:
        found = compare_losses(soft, validation, batch)
        losses = {("soft hybrid" if name == "hybrid" else name): loss for name, loss in found.items()}
        losses["hardened, before healing"] = compare_losses(hard, validation, batch)["hybrid"]
    state = None
    if arguments.ddp_find_unused_parameters is None:
        arguments.ddp_find_unused_parameters = True
    if arguments.max_steps != 0 and arguments.num_train_epochs > 0:
        trainer = HealTrainer(
            model=set_stage(hard, "finetune"),
            args=arguments,
            train_dataset=train,
            processing_class=tokenizer,
            data_collator=collator(data, tokenizer),
            teacher=soft if start.distil_weight else None,
            distil_weight=start.distil_weight,
        )
        resume = arguments.resume_from_checkpoint or broadcast_object(last_whole_checkpoint(output))
        if resume:
            print_main(f"{output}: going on from {resume}.")
        kept = Unrounded(trainer)
        trainer.train(resume_from_checkpoint=resume)
        result["steps"] = trainer.state.global_step
        if validation is not None:
            losses["hardened, healed"] = compare_losses(hard, validation, batch)["hybrid"]
        state = gathered(trainer, hard, kept)
    if losses:
        result.update(measured_on(data, validation), own=list(losses)[-1])
    return on_main(_write, hard, state, tokenizer, output, {**result, "losses": losses, "measured_routes": measured})


def _write(hard, state, tokenizer, output, result):
    hard.save_pretrained(output, state_dict=state)
    tokenizer.save_pretrained(output)
    return record(output, result)


def main(stage, argv):
    """`manticore-hf harden ...`; returns the exit status."""
    kinds = (HardenArguments, DataArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, prog=f"manticore-hf {stage}", description=__doc__)
    parser.set_defaults(**training_defaults())
    try:
        run_harden(*parser.parse_args_into_dataclasses(argv))
    except ManticoreError as err:
        print(f"manticore-hf {stage}: {err}", file=sys.stderr)
        return 2
    return 0
