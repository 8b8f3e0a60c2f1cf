"""The training stages: pretrain (projectors), search, finetune. One function, one command each.

    manticore-hf pretrain --model hybrid --data text.txt --output-dir projectors --learning-rate 1e-3
    manticore-hf search   --model projectors --data text.txt --output-dir searched --strategy gaea
    manticore-hf finetune --model projectors --mixture-from searched --data text.txt --output-dir tuned

Every option of Transformers' TrainingArguments is taken by its usual name. A stage that was killed goes on from its
last whole checkpoint when the same command is given again; a stage that is finished is not run again.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from transformers import Trainer, TrainingArguments

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.evaluation.losses import how_measured, measure, name_of
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.training.calibrate import awaits_calibration, calibrate_projectors
from manticore_hf.training.complementary_errors import ObjectiveWhenSharded, awaits_objective, choose_objective
from manticore_hf.training.freezing import ComponentClipping, alphas, fix_alpha, new_rows, set_stage
from manticore_hf.training.runtime import StageRun
from manticore_hf.training.runtime import last_whole_checkpoint as last_whole_checkpoint
from manticore_hf.training.search import SearchTrainer, alpha_history
from manticore_hf.training.stage_arguments import StageArguments
from manticore_hf.training.trainer import HybridLogging
from manticore_hf.utils.distributed import print_main
from manticore_hf.utils.objective import OBJECTIVE, say_objective

_NAMES = ("pretrain", "search", "finetune")


class HybridTrainer(HybridLogging, Trainer):
    """The standard Trainer, with the hybrid's parts in its logs."""


def run_stage(stage: str, start: StageArguments, data: DataArguments, arguments: TrainingArguments) -> dict:
    """Runs one training stage.

    Args:
        stage: "pretrain", "search" or "finetune".
        start: StageArguments.
        data: DataArguments.
        arguments: TrainingArguments; SearchArguments for "search".

    Returns:
        The stage's result, as written to `stage.json`: losses on the validation text of the hybrid, each component and
        their ensemble, mixture weights, steps.

    Raises:
        ManticoreError: Something in the arguments cannot be used.
    """
    if stage not in _NAMES:
        raise ManticoreError(f"stage={stage!r} is unknown; choose one of {list(_NAMES)}.")
    return StageRun(stage, arguments, data, verbose=start.verbose).perform(partial(_train, start), _summary, start)


run_pretrain = partial(run_stage, "pretrain")
run_search = partial(run_stage, "search")
run_finetune = partial(run_stage, "finetune")


def _train(start: StageArguments, run: StageRun) -> dict:
    arguments, search = run.arguments, run.stage == "search"
    model = run.load_to_train(start.model, start.dtype)
    if awaits_calibration(model):
        found = calibrate_projectors(model.to(arguments.device), run.train)
        print_main(
            f"Projectors calibrated on {found.tokens:,} tokens of the training text, reference {found.reference}."
        )
    if start.mixture_from is not None:
        take_mixture(model, start.mixture_from)
    elif run.stage == "finetune":
        fix_alpha(model)
    if search and not arguments.keep_alpha:
        for alpha in alphas(model):
            alpha.data.zero_()
    if start.new_embeddings:
        model.renew_embeddings()
    set_stage(model, run.stage)
    rate = start.new_rows_learning_rate
    if rate is not None and not rate >= 0:
        raise ManticoreError(f"new_rows_learning_rate={rate} must be 0 (frozen) or more.")
    callbacks = None
    if start.component_max_norm is not None:
        arguments.max_grad_norm = 0.0
        callbacks = [ComponentClipping(start.component_max_norm)]
    kind = SearchTrainer if search else HybridTrainer
    trainer = run.trainer(kind, model, eval_dataset=run.validation, callbacks=callbacks)
    trainer.new_rows_learning_rate = rate or None
    for parameter in new_rows(model) if rate == 0 else ():
        parameter.requires_grad_(False)
    if awaits_objective(model):
        rows = arguments.per_device_train_batch_size
        if trainer.is_fsdp_enabled:
            trainer.add_callback(ObjectiveWhenSharded(run.train, rows, run.output))
        else:
            choose_objective(model.to(arguments.device), run.train, batch_size=rows)
            print_main(f"Objective: {say_objective(model.config)}.")
    trained = trainer, run.fit(trainer)
    result = {"steps": trainer.state.global_step, "components": model.config.component_names}
    result["mixture"] = model.config.mixture
    result["objective"] = {key: getattr(model.config, key) for key in OBJECTIVE}
    if run.passages is not None:
        found = measure(model, run.passages, arguments.per_device_eval_batch_size)
        result |= {"data": name_of(run.data), "note": how_measured(run.data), **found.to_dict()}

    def beside_the_model(result):
        if search:
            _plot(trainer, result, run.output)
        trainer.state.save_to_json(str(run.output / "trainer_state.json"))

    facts = lambda: {"mixture_weights": model.mixture_weights().tolist()}  # noqa: E731
    return run.save(model, result, trained, facts, beside_the_model)


def _plot(trainer, result: dict, output: Path) -> None:
    from manticore_hf.utils.plots import plot_alpha, plot_mixture

    steps, history = alpha_history(trainer.state.log_history)
    if steps:  # a search shorter than its logging_steps has logged nothing
        plot_alpha(steps, history, output / "plots" / "alpha.png")
    plot_mixture(result["mixture_weights"], result["components"], output / "plots" / "mixture.png")


def take_mixture(model: ManticoreForCausalLM, source: str | Path) -> None:
    """Fixes a hybrid's mixture weights at those of another, searched one; a gate or prior goes on from the other's.

    Raises:
        ManticoreError: The other hybrid has other components or blocks.
    """
    other, mine = ManticoreConfig.from_pretrained(source), model.config
    for what in ("component_names", "num_blocks", "mixture", "gate_past_losses", "bridges", "bridge_alpha"):
        if getattr(other, what) != getattr(mine, what):
            raise ManticoreError(
                f"{source!r} has {what} {getattr(other, what)}, this hybrid {getattr(mine, what)}: its mixture weights "
                "do not fit."
            )
    searched = ManticoreForCausalLM.from_pretrained(source)
    fix_alpha(model, searched.mixture_weights())
    if mine.mixture == "token":
        model.hybrid_mixer.token_gate.load_state_dict(searched.hybrid_mixer.token_gate.state_dict())
    elif mine.mixture == "online":
        model.hybrid_mixer.alpha_logits.data[-1] = searched.hybrid_mixer.alpha_logits.data[-1]
    for alpha, other in zip(alphas(model)[1:], alphas(searched)[1:]):
        alpha.data.copy_(other.data)


_LAST_ROW = {
    "token": "the last row is the part of the gate that does not depend on the token",
    "online": "the last row holds at the start of a text",
}


def _summary(result: dict) -> Iterator[str]:
    names = result["components"]
    yield f"\n{result['stage']}: {result['steps']} steps"
    yield f"{'block':>8}" + "".join(f"{name:>24}" for name in names) + "   (mixture weights)"
    for block, row in enumerate(result["mixture_weights"]):
        yield f"{block + 1:>8}" + "".join(f"{weight:24.3f}" for weight in row)
    if result.get("mixture") in _LAST_ROW:
        yield f"{'':>8}  ({_LAST_ROW[result['mixture']]})"
    for name, loss in result.get("losses", {}).items():
        bits = result.get("bits_per_byte", {}).get(name)
        said = "" if bits is None else f"{bits:.4f} bits per byte, "
        yield f"{name:>24}  {said}{loss:.4f} nats per token on the validation text"
