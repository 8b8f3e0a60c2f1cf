"""Differentiable architecture search over the mixture weights, as a Trainer.

A strategy is a small class registered by name; it decides how alpha moves. All but `gaea` step alpha with AdamW:

* `darts`: single-level, alpha and weights on the same batches (what the paper's code does; Liu et al. 2019).
* `darts_alternating`: single-level, the weights and alpha in turn, a step each (an option of the paper's code).
* `darts_bilevel`: first-order, alpha on a held-out half of the text, in turn with the weights (ibid., section 2.3).
* `gaea`: exponentiated gradient on the simplex (Li et al. 2021, eq. 4).
* `dash`: Gumbel-softmax samples of alpha with a falling temperature, as DASH's search does (Shen et al. 2022).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.training.freezing import set_stage
from manticore_hf.training.stage_arguments import AlphaArguments
from manticore_hf.training.trainer import HybridLogging
from manticore_hf.utils.deepspeed import uses_deepspeed
from manticore_hf.utils.distributed import all_reduce, is_sharded, world
from manticore_hf.utils.unwrap import hybrid_of

STRATEGIES = {}


def strategy(name: str) -> Callable[[type], type]:
    """Registers a Strategy class under a name."""

    def register(cls):
        STRATEGIES[name] = cls
        return cls

    return register


@dataclass
class SearchArguments(AlphaArguments, TrainingArguments):
    """TrainingArguments of a search, with the learning rate and decay of alpha apart from the weights'."""

    logging_steps: float = field(default=1, metadata={"help": "Steps between logs, which include alpha."})

    def __post_init__(self):
        super().__post_init__()
        if self.strategy not in STRATEGIES:
            raise ManticoreError(f"strategy={self.strategy!r} is unknown; choose one of {sorted(STRATEGIES)}.")
        if self.alpha_learning_rate <= 0:
            raise ManticoreError(f"alpha_learning_rate={self.alpha_learning_rate!r} must be positive.")


class Strategy:
    """How alpha moves. Subclasses override what they need.

    Args:
        trainer: The SearchTrainer.
    """

    def __init__(self, trainer: "SearchTrainer"):
        self.trainer = trainer

    def split(self, dataset: Dataset) -> tuple[Dataset, Dataset | None]:
        """(text for the weights, text for alpha or None)."""
        return dataset, None

    def before_step(self) -> None:
        """Called at the start of each optimizer step, before its batches."""

    def before_update(self) -> None:
        """Called when the gradients of a step are complete, before the optimizer moves the parameters."""

    def finish(self) -> None:
        """Called when training ends."""


@strategy("darts")
class Darts(Strategy):
    """Alpha and weights move together on the same batches."""


@strategy("darts_alternating")
class DartsAlternating(Strategy):
    """The weights move in one step, alpha in the next, on the same text."""

    def before_update(self) -> None:
        trainer = self.trainer
        for parameter in trainer.model.parameters():
            if (parameter is trainer.alpha) == (trainer.state.global_step % 2 == 0):
                parameter.grad = None  # AdamW leaves parameters without gradient alone


@strategy("darts_bilevel")
class DartsBilevel(Strategy):
    """Alpha moves on held-out batches, then the weights on training batches; first order."""

    def split(self, dataset: Dataset) -> tuple[Dataset, Dataset | None]:
        halves = dataset.train_test_split(test_size=0.5, seed=self.trainer.args.seed)
        return halves["train"], halves["test"]

    def before_step(self) -> None:
        trainer = self.trainer
        alpha, model = trainer.alpha, trainer.model
        others = [p for p in model.parameters() if p.requires_grad and p is not alpha]
        sharded = is_sharded(model)  # FSDP2 notes what is trainable when it wraps: there, gradients are dropped instead
        for parameter in others if not sharded else ():
            parameter.requires_grad_(False)
        searched = trainer.searched
        searched.holds_alpha = False
        model.train()
        try:
            count = sum((batch["labels"][:, 1:] != -100).sum() for batch in trainer.held_out_batches())
            if trainer.args.average_tokens_across_devices:
                all_reduce(count)
            for batch in trainer.held_out_batches():
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model_wrapped, batch, num_items_in_batch=count)
                trainer.accelerator.backward(loss)
            for parameter in others:
                parameter.grad = None
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            optimizer.step()  # only alpha has a gradient, so only alpha moves; its moments live in the checkpoint
            alpha.grad = None
        finally:  # also where it ran out of memory: `auto_find_batch_size` begins again, and trains all of them
            for parameter in others:
                parameter.requires_grad_(True)
        searched.holds_alpha = True

    def finish(self) -> None:
        self.trainer.searched.holds_alpha = False


@strategy("gaea")
class Gaea(Strategy):
    """alpha <- alpha * exp(-eta * dL/dalpha), normalised: mirror descent on the simplex."""

    def before_update(self) -> None:
        alpha = self.trainer.alpha
        if alpha.grad is None:
            return
        with torch.no_grad():
            weights = alpha.float()
            if hasattr(self.trainer.searched, "beyond"):  # rows of bridges, some shorter than others
                beyond = self.trainer.searched.beyond()
                if hasattr(alpha, "device_mesh"):
                    from torch.distributed.tensor import distribute_tensor

                    beyond = distribute_tensor(beyond, alpha.device_mesh, alpha.placements)
                weights = weights.masked_fill(beyond, float("-inf"))
            weights = weights.softmax(-1)
            # dL/da_i = w_i (dL/dw_i - sum_j w_j dL/dw_j): dividing by w gives dL/dw up to a constant per row, which
            # the normalisation of the simplex removes.
            gradient = alpha.grad.float() / weights.clamp(min=1e-6)
            alpha -= self.trainer.alpha_rate() * gradient.to(alpha.dtype)
            alpha -= alpha.mean(-1, keepdim=True)
        alpha.grad = None  # AdamW leaves parameters without gradient alone


@strategy("dash")
class Dash(Strategy):
    """Each step samples alpha: softmax((a + Gumbel noise) / temperature), the temperature falling to 0.5."""

    def before_step(self) -> None:
        trainer = self.trainer
        searched = trainer.searched
        progress = trainer.state.global_step / max(1, trainer.state.max_steps)
        # A generator of the step: the same noise on every process, in every micro-batch and after a resume.
        generator = torch.Generator().manual_seed(trainer.args.seed * 1_000_003 + trainer.state.global_step)
        uniform = torch.rand(searched.alpha_logits.shape, generator=generator).clamp(1e-9, 1 - 1e-9)
        first = trainer.args.temperature
        searched.temperature = first * (0.5 / first) ** progress
        searched.noise = -(-uniform.log()).log().to(searched.alpha_logits.device)

    def finish(self) -> None:
        self.trainer.searched.noise, self.trainer.searched.temperature = None, 1.0


class _Hooks(TrainerCallback):
    def __init__(self, strategy):
        self.strategy = strategy

    def on_step_begin(self, args, state, control, **kwargs):
        self.strategy.before_step()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.strategy.before_update()

    def on_train_end(self, args, state, control, **kwargs):
        self.strategy.finish()


class SearchTrainer(HybridLogging, Trainer):
    """Searches a hybrid's mixture weights while training everything else.

    With `bridge_alpha` the bridges' are searched, and the mixture of predictions is trained like any weight.

    Args:
        model: A hybrid with learned static mixture weights.
        args: SearchArguments.
        train_dataset: Blocks of `input_ids` and `labels`; `darts_bilevel` holds out half of it.
        kwargs: As in Trainer.

    Raises:
        ManticoreError: The mixture weights are fixed, there is nothing to search, or DeepSpeed is to train.
    """

    def __init__(
        self, model: torch.nn.Module, args: SearchArguments, train_dataset: Dataset | None = None, **kwargs: Any
    ):
        hybrid = hybrid_of(model)
        if hybrid.config.mixture_weights is not None:
            raise ManticoreError("The mixture weights are fixed: call set_mixture_weights(None) before the search.")
        if len(hybrid.config.component_names) < 2:
            raise ManticoreError("There is nothing to search in a hybrid of one component.")
        if hybrid.config.mixture == "token" and hybrid.config.num_blocks == 1 and not hybrid.config.bridge_alpha:
            raise ManticoreError(
                "mixture='token' with num_blocks=1 has no alpha to search: the gate is trained like any weight. "
                "Compose with mixture='static' or more blocks, or with bridges and bridge_alpha=True."
            )
        if uses_deepspeed(args):
            raise ManticoreError(
                "A search does not run under DeepSpeed, whose engine holds the optimizer: launch it with DDP or FSDP2 "
                "(recipes/accelerate/ddp.yaml, fsdp2.yaml), or in one process."
            )
        set_stage(model, "search")
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # alpha where it is held, heads that nothing reads
        self.model = model
        self.strategy = STRATEGIES[args.strategy](self)
        self._costs = _relative_costs(hybrid)
        self.args = args
        weights_text, self.alpha_text = self.strategy.split(train_dataset)
        if self.alpha_text is not None and world()[1] > 1:
            needed = args.train_batch_size * args.gradient_accumulation_steps * world()[1]
            if len(self.alpha_text) < needed:
                raise ManticoreError(
                    f"strategy={args.strategy!r} holds out {len(self.alpha_text)} rows, and one step of all processes "
                    f"reads {needed}: give more text, smaller batches or fewer processes."
                )
        super().__init__(model=model, args=args, train_dataset=weights_text, **kwargs)
        self.add_callback(_Hooks(self.strategy))

    @property
    def searched(self) -> torch.nn.Module:
        """What has the mixture weights that are searched: the hybrid's mixer, or its bridges."""
        return _searched(hybrid_of(self.model).hybrid_mixer)

    @property
    def alpha(self) -> torch.nn.Parameter:
        """The parameter [rows, choices]; FSDP2 puts another in its place."""
        return self.searched.alpha_logits

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW with one more parameter group, alpha's."""
        if self.optimizer is None:
            self.alpha.requires_grad_(False)  # out of the groups that Trainer makes
            super().create_optimizer(*args, **kwargs)
            self.alpha.requires_grad_(True)
            self.optimizer.add_param_group(
                {
                    "params": [self.alpha],
                    "lr": self.args.alpha_learning_rate,
                    "weight_decay": self.args.alpha_weight_decay,
                }
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The Trainer's schedule for the weights, alpha's own for alpha."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            optimizer = getattr(optimizer, "optimizer", optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            shapes = [
                get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup, num_training_steps).lr_lambdas[0]
                for kind in (self.args.lr_scheduler_type, self.args.alpha_lr_scheduler_type)
            ]
            groups = len(optimizer.param_groups)
            self.lr_scheduler = LambdaLR(optimizer, [shapes[0]] * (groups - 1) + [shapes[1]])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def alpha_rate(self) -> float:
        """Alpha's present learning rate."""
        return self.optimizer.param_groups[-1]["lr"]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> torch.Tensor | tuple:
        """The model's loss plus the penalties on alpha."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        penalty = self._penalty() if model.training else 0.0
        if num_items_in_batch is not None:
            # Each micro-batch adds its share, so that a step adds the penalty once.
            penalty = penalty / getattr(self, "current_gradient_accumulation_steps", 1)
        loss = loss + penalty
        return (loss, outputs) if return_outputs else loss

    def _penalty(self):
        if not self.args.entropy_penalty and not self.args.cost_penalty:
            return 0.0
        weights = hybrid_of(self.model).hybrid_mixer(_weights)  # FSDP2 gathers it for a call
        entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1).mean()
        cost = (weights * self._costs.to(weights.device)).sum()
        return self.args.entropy_penalty * entropy + self.args.cost_penalty * cost

    def held_out_batches(self) -> Iterator[dict]:
        """This process's held-out batches of the present step.

        They are a function of seed and step, so that a resumed run sees the same.
        """
        rank, ranks = world()
        batch = self._train_batch_size  # the one that fits, where it is found out
        size = batch * self.args.gradient_accumulation_steps * ranks
        per_epoch = max(1, len(self.alpha_text) // size)
        epoch, position = divmod(self.state.global_step, per_epoch)
        order = torch.randperm(
            len(self.alpha_text), generator=torch.Generator().manual_seed(self.args.seed + 7919 * (epoch + 1))
        )
        chosen = order[position * size : (position + 1) * size].tolist()
        for start in range(rank * batch, len(chosen), ranks * batch):
            rows = [self.alpha_text[i] for i in chosen[start : start + batch]]
            yield self._prepare_inputs(self.data_collator(rows))


def _searched(mixer):
    return mixer if mixer.bridges is None or mixer.bridges.alpha_logits is None else mixer.bridges


def _weights(mixer):
    return _searched(mixer).weights_without_noise()


def _relative_costs(hybrid):
    """[S, K]: parameters (the FLOPs per token, but for attention over the past) of each segment, as a share of all.

    Of bridges, [places, 1 + bridges into each], theirs.
    """
    rows, searched = [], _searched(hybrid.hybrid_mixer)
    if searched is not hybrid.hybrid_mixer:
        costs = torch.zeros(searched.alpha_logits.shape)
        for row, mine in zip(costs, searched.rows):
            for column, i in enumerate(mine, 1):
                row[column] = sum(p.numel() for p in searched.edges[i].parameters())
        return costs / costs.sum()
    for block in range(hybrid.config.num_blocks):
        row = []
        for name in hybrid.config.component_names:
            layers = hybrid.segments.segment(name, block).layers
            row.append(float(sum(p.numel() for p in layers.parameters())))
        rows.append(row)
    costs = torch.tensor(rows)
    return costs / costs.sum()


def alpha_history(log_history: list[dict]) -> tuple[list[int], dict]:
    """(steps [n], {"alpha/BLOCK/COMPONENT": values [n]}) from a Trainer's `state.log_history`."""
    rows = [row for row in log_history if "step" in row and any(key.startswith("alpha/") for key in row)]
    keys = [key for key in (rows[0] if rows else {}) if key.startswith("alpha/")]
    return [row["step"] for row in rows], {key: [row.get(key, math.nan) for row in rows] for key in keys}
