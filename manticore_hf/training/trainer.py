"""What a hybrid adds to the Trainer's logs: its parts' losses and its mixture, beside the loss."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from manticore_hf.training.freezing import new_rows
from manticore_hf.training.stage_arguments import check_best
from manticore_hf.utils.bridge_settings import bridge_weights
from manticore_hf.utils.deepspeed import present
from manticore_hf.utils.distributed import all_reduce_dict, ready_for_shards
from manticore_hf.utils.unwrap import hybrid_of

# Of the mixer: what its weights are computed from
MIXTURE = ("alpha_logits", "token_gate.linear.bias", "bridges.alpha_logits")


class HybridLogging:
    """Mixin before a Trainer class: logs alpha (and, where the model gives them, the losses of its parts).

    What is logged, and trained on, is not rounded where FSDP2 shards.

    With `push_to_hub` the model card is that of a hybrid, with what people wrote into it, and not the Trainer's own.

    Keys: "alpha/BLOCK/COMPONENT", "bridge/FROM BLOCK to TO BLOCK" (with `bridge_alpha`), "loss/mixture",
    "loss/COMPONENT", "loss/ensemble", "gate/COMPONENT" (mean token weight); with the prefix "eval_" after an
    evaluation.
    """

    new_rows_learning_rate: float | None = None
    """Learning rate of embeddings and heads that are new; None for that of everything."""
    _watch = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_best(self.args.metric_for_best_model, self.args.greater_is_better, hybrid_of(self.model).config)

    def _parts(self) -> "PartSums":
        # Looked for once per training: an engine may wrap the model while it runs.
        if self._watch is None or not self._watch.entered and self._watch.model is not hybrid_of(self.model):
            self._watch = PartSums(hybrid_of(self.model))
        return self._watch

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Trainer; the model reports of its parts until it returns, and no longer."""
        ready_for_shards(self)
        with self._parts() as parts:
            parts.clear()
            return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args, **kwargs):
        self._parts().clear()  # of an attempt with more rows than fit: `auto_find_batch_size` begins again
        return super()._inner_training_loop(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer, with the parts' means in the metrics."""
        with self._parts() as parts:
            parts.clear()
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update({f"{prefix}_{key}": value for key, value in parts.means().items()})
            parts.clear()
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in Trainer; rows that are new have a group of their own where `new_rows_learning_rate` is set."""
        first = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.new_rows_learning_rate
        if first and rate is not None:
            rows = {id(parameter) for parameter in new_rows(hybrid_of(self.model))}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in rows]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in rows]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def prediction_step(self, model: torch.nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> tuple:
        """As in Trainer; rows that accelerate repeats do not count."""
        return super().prediction_step(model, without_repeats(inputs, self.accelerator), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Trainer, with alpha and the parts' means since the last log."""
        if "loss" in logs:
            logs = {**logs, **alpha_logs(hybrid_of(self.model)), **self._parts().means()}
            self._parts().clear()
        return super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        # Transformers (5.24) remembers the best checkpoint where its directory exists; sharded weights are written only
        # after it has looked, so that load_best_model_at_end would load another checkpoint or none.
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            Path(self._get_output_dir(trial=trial), folder).mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)

    def create_model_card(
        self,
        license: str | None = None,
        tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the hybrid's card to the output directory; arguments as in Transformers, others are not used."""
        if self.is_world_process_zero():
            from manticore_hf.hub.publish import update_card  # brings much that training does not need

            listed = [[one] if isinstance(one, str) else list(one or ()) for one in (tags, dataset)]
            update_card(
                self.args.output_dir,
                self.hub_model_id or self.args.hub_model_id,
                token=self.args.hub_token,
                license=license,
                tags=listed[0],
                datasets=listed[1],
            )


def without_repeats(inputs: dict, accelerator: Accelerator) -> dict:
    """A batch of this process, without the labels of rows that accelerate repeats to make the last batches even.

    The Trainer drops what it gathers of them; what a forward pass reports of its parts is summed before.
    """
    state, labels = accelerator.gradient_state, inputs.get("labels")
    if labels is None or labels.ndim != 2 or labels.is_floating_point():  # not of tokens
        return inputs
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs
    own = state.remainder - accelerator.process_index * len(labels)  # rows are handed out in order of the ranks
    if own >= len(labels):
        return inputs
    labels = labels.clone()
    labels[max(own, 0) :] = -100
    return {**inputs, "labels": labels}


def alpha_logs(model: torch.nn.Module) -> dict[str, float]:
    """{"alpha/BLOCK/COMPONENT": weight, "bridge/FROM BLOCK to TO BLOCK": weight}, these with alpha; on every rank."""
    config = model.config
    with present(one for name, one in model.hybrid_mixer.named_parameters() if name in MIXTURE):
        rows, bridges = model.mixture_weights().tolist(), bridge_weights(model) if config.bridge_alpha else []
    edges = [
        f"{one['from']} {one['from_block']} to {one['to']} {one['to_block']}" + " attention" * (one["kind"] != "linear")
        for one in config.bridges or ()
    ]
    return {
        **{f"alpha/{b}/{name}": w for b, row in enumerate(rows) for name, w in zip(config.component_names, row)},
        **{f"bridge/{edge}": w for edge, w in zip(edges, bridges)},
    }


class PartSums:
    """Means over tokens of what each forward with labels reports about its parts, within `with`.

    Outside of it the model is as it was: no hook, and `report_parts` as before. An evaluation within a training enters
    it again.

    Args:
        model: A hybrid.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.names = model, model.config.component_names
        self.entered, self._hook, self._before = 0, None, False
        self.clear()

    def __enter__(self) -> "PartSums":
        if self.entered == 0:
            self._before, self.model.report_parts = self.model.report_parts, True
            self._hook = self.model.register_forward_hook(self._add, with_kwargs=True)
        self.entered += 1
        return self

    def __exit__(self, *error) -> None:
        self.entered -= 1
        if self.entered == 0:
            self._hook.remove()
            self.model.report_parts = self._before

    def clear(self) -> None:
        """Forgets what was summed."""
        self.sums, self.counts = {}, {}

    @torch.no_grad()
    def _add(self, module, args, kwargs, out):
        labels = kwargs.get("labels")
        if labels is None or getattr(out, "mixture_loss", None) is None:
            return
        labelled = labels[:, 1:] != -100
        tokens = labelled.sum()
        self._sum("loss/mixture", out.mixture_loss, tokens)
        if out.component_losses is not None:
            for name, value in zip(self.names, out.component_losses.unbind()):
                self._sum(f"loss/{name}", value, tokens)
        if out.ensemble_loss is not None:
            self._sum("loss/ensemble", out.ensemble_loss, tokens)
        if out.weights is not None:
            means = (out.weights[:, :-1] * labelled[..., None]).sum((0, 1)) / tokens.clamp(min=1)
            for name, value in zip(self.names, means.unbind()):
                self._sum(f"gate/{name}", value, tokens)

    def _sum(self, key, value, tokens):
        # Kept on the device: reading a number in every step would make the accelerator wait. No tokens: no mean.
        found = torch.where(tokens > 0, value.detach().float() * tokens, 0.0)
        self.sums[key] = self.sums.get(key, 0.0) + found
        self.counts[key] = self.counts.get(key, 0) + tokens

    def means(self) -> dict[str, float]:
        """{key: mean over all processes' tokens since the last `clear`}; components that were not run are left out."""
        device = next((total.device for total in self.sums.values()), None)
        sums, counts = all_reduce_dict(self.sums, device), all_reduce_dict(self.counts, device)
        means = {key: sums[key] / counts[key] for key in sums}
        return {key: value for key, value in means.items() if not math.isnan(value)}
