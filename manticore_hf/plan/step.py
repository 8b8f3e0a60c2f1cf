"""One micro-batch of a stage on fake tensors: the memory it takes beside the weights, and its operations."""

import contextlib
import copy
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from manticore_hf.plan import kernels
from manticore_hf.plan.aligned import Amount, PlannedAligner
from manticore_hf.plan.ledger import Ledger
from manticore_hf.plan.memory import layers_of, weigh
from manticore_hf.plan.shrink import shrink
from manticore_hf.training.calibrate import collect, loss_alone
from manticore_hf.training.freezing import set_stage
from manticore_hf.training.trainer import PartSums
from manticore_hf.utils.distributed import component_runner


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch does to the memory beside weights, gradients of before, and optimizer.

    Attributes:
        activations: Bytes alive at the peak, gradients that are complete left out.
        with_gradients: The same with the gradients that the micro-batch leaves.
        with_divided: The same where FSDP2 divides each layer's gradient once it is complete, and the others at the end.
        with_undivided: The same where layers' gradients leave the device then.
        operations: FLOPs of matrix products, convolutions and attention, forward and backward (and again where
            activations are recomputed).
    """

    activations: int
    with_gradients: int
    with_divided: int
    with_undivided: int
    operations: int


def meta_hybrid(config: ManticoreConfig, dtype: torch.dtype = torch.float32) -> ManticoreForCausalLM:
    """The hybrid of a configuration, on the meta device.

    Args:
        config: The hybrid's ManticoreConfig; it is copied.
        dtype: Of all weights.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = ManticoreForCausalLM(config).to(dtype)
    kernels.group_experts(model)
    return model


class Rehearsal:
    """A stage's model on fake tensors, to rehearse micro-batches of any size with.

    Args:
        config: The hybrid's ManticoreConfig.
        stage: "projectors", "search" or "finetune", as `set_stage` takes them.
        dtype: Of the weights.
        device: "cpu" or "cuda": whose kernels are assumed.
        teacher: Configuration of a hybrid to learn from (recovery distillation), or None.
        prepare: Function of the unshortened meta model that returns what is trained (LoRA), or None.
        every_layer: Keep every layer, also of those that repeat.
        share: How many bytes FSDP2 keeps on each device of a byte of a layer's gradient.
        amounts: {component that reads text by a tokenizer of its own: Amount}, or None.

    Attributes:
        weights: The Weights of the unshortened model.
        teacher_bytes: Bytes of the teacher's weights.
    """

    def __init__(
        self,
        config: ManticoreConfig,
        stage: str,
        dtype: torch.dtype = torch.float32,
        device: str = "cuda",
        teacher: ManticoreConfig | None = None,
        prepare: Callable[[ManticoreForCausalLM], tuple[nn.Module, Iterable[nn.Parameter]]] | None = None,
        every_layer: bool = False,
        share: float = 1.0,
        amounts: Mapping[str, Amount] | None = None,
    ):
        self.ledger, self.device, self.config, self.teacher = Ledger(), device, config, None
        self.hybrid = hybrid = meta_hybrid(config, dtype)
        set_stage(hybrid, stage)
        self.model, quantised = (hybrid, ()) if prepare is None else prepare(hybrid)
        self.weights, self.teacher_bytes = weigh(self.model, hybrid, quantised), 0
        if not every_layer:
            shrink(hybrid, self.ledger)
        if teacher is not None:
            self.teacher = meta_hybrid(teacher, dtype).requires_grad_(False)
            self.teacher_bytes = sum(one.nbytes for one in self.teacher.parameters())
            if not every_layer:
                shrink(self.teacher, self.ledger, "teacher")
        for one in filter(None, (hybrid, self.teacher)):
            if one.config.aligned:
                one.__dict__["_aligner"] = PlannedAligner(one.config.tokenizer_component, amounts)
        for one in filter(None, (self.model, self.teacher)):
            with self.ledger:
                one.to_empty(device="cpu")
        hybrid.tie_weights()
        self.ledger.shares = {id(one): share for layer in layers_of(hybrid) for one in layer.parameters()}
        if teacher is None:
            PartSums(hybrid).__enter__()  # the Trainer's logs have the parts' losses
        else:
            self.teacher.tie_weights()
            self.teacher.eval()
        self.model.train()

    def micro_batch(
        self, batch: int, length: int, autocast: torch.dtype | None = None, checkpointing: bool = False
    ) -> StepCost:
        """Runs one micro-batch, forward and backward.

        Args:
            batch, length: Rows, tokens of each.
            autocast: dtype of mixed precision, or None.
            checkpointing: Recompute activations in the backward pass.

        Returns:
            A StepCost.
        """

        def run(ids):
            count = torch.zeros((), dtype=torch.long)
            out = self.model(input_ids=ids, labels=ids, num_items_in_batch=count)
            loss = out.loss if self.teacher is None else out.loss + self._distance(out.logits, ids, autocast)
            del out
            loss.backward()

        with self._checkpointing(checkpointing), self._mixed(autocast):
            return self._count(run, batch, length)

    def _distance(self, logits, ids, autocast):
        """As DistilTrainer's, with every token labelled."""
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            with torch.no_grad():
                target = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
                target = target.float().log_softmax(-1)
            own = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
            return F.kl_div(own, target, log_target=True, reduction="sum")

    def calibration(self, batch: int, length: int) -> tuple[StepCost, int]:
        """Runs one batch of a calibration, without its solving.

        Args:
            batch, length: Rows, tokens of each.

        Returns:
            (a StepCost, bytes that solving for the largest map takes).
        """
        was_training = self.model.training
        self.model.eval()

        @torch.no_grad()
        def run(ids):
            for name in self.config.component_names:
                loss_alone(self.hybrid, name, ids, ids)
            # Every token, by its numbers: which values of a mask are true cannot be told without storage
            numbers = torch.meshgrid(torch.arange(ids.shape[0]), torch.arange(ids.shape[1]), indexing="ij")
            batches = [(ids, ids, tuple(one.flatten() for one in numbers))]
            with contextlib.redirect_stderr(io.StringIO()):  # its bar
                collect(self.hybrid, batches, self.config.reference_component, 2)

        try:
            cost = self._count(run, batch, length)
        finally:
            self.model.train(was_training)
        # The covariance, its vectors, the rotated sums, and a weight, in float64, and what the solver works in
        return cost, 6 * 8 * self.config.hidden_size**2

    def evaluation(self, batch: int, length: int, autocast: torch.dtype | None = None) -> StepCost:
        """Runs one batch of the losses that end a stage (`compare_losses`): of components, ensemble and hybrid.

        Args:
            batch, length: Rows, tokens of each.
            autocast: dtype of mixed precision, or None.

        Returns:
            A StepCost, without gradients.
        """
        route = self.config.route
        names = [] if route else self.config.component_names

        @torch.no_grad()
        def run(ids):
            def loss(logits):
                F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")

            mean = 0.0
            for name in names:
                logits = component_runner(self.hybrid, name)(input_ids=ids, use_cache=False).logits
                logprobs = logits[..., : self.config.vocab_size].float().log_softmax(-1)
                loss(logprobs)
                mean = mean + logprobs / len(names)
            if names:
                loss(mean)
            loss(self.model(input_ids=ids, use_cache=False).logits)

        self.model.eval()
        try:
            with self._mixed(autocast):
                return self._count(run, batch, length)
        finally:
            self.model.train()

    def _count(self, run, batch, length):
        with kernels.on(self.device):
            with self.ledger:
                ids = torch.zeros(batch, length, dtype=torch.long)
            with self.ledger.step(*filter(None, (self.model, self.teacher))):
                run(ids)
        self.model.zero_grad(set_to_none=True)
        return StepCost(*map(int, self.ledger.peak), self.ledger.operations)

    @contextlib.contextmanager
    def _checkpointing(self, wanted):
        if wanted:
            self.hybrid.activation_checkpointing_enable()
        try:
            yield
        finally:
            if wanted:
                self.hybrid.activation_checkpointing_disable()
                self.hybrid.disable_input_require_grads()  # stays on otherwise, and lets gradients reach what is frozen

    @contextlib.contextmanager
    def _mixed(self, dtype):
        """Mixed precision as accelerate does it: around the model's forward, whose results become float32."""
        if dtype is None:
            yield
            return
        self.model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(self.model.forward))
        try:
            yield
        finally:
            del self.model.forward
