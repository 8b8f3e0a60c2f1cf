"""How every stage runs: finished work is not repeated, killed runs resume, and the result is written last.

A stage is a function of a StageRun. It loads, trains and saves through it, and so does each of these in the same way:
start, load model and text, go on from the last whole checkpoint, save, record the result, print it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
    set_seed,
)

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.evaluation.data import load_rows, without_text
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.evaluation.losses import Passages, make_passages
from manticore_hf.modeling.bounds_manticore import ManticoreError, reason
from manticore_hf.training.asked import asked_for, check_asked, remember_asked
from manticore_hf.training.progress import show_progress
from manticore_hf.utils.deepspeed import Unrounded, take_precision
from manticore_hf.utils.distributed import broadcast_object, gathered, is_main, main_first, on_main, print_main
from manticore_hf.utils.files import read_json, write_json
from manticore_hf.utils.tokenizers import read_tokenizer

RESULT = "stage.json"


@dataclass
class StageRun:
    """One stage in one output directory.

    Attributes:
        stage: Its name.
        arguments: TrainingArguments: where it writes, its seed, and how it trains.
        data: Where its text comes from; None of a stage without text.
        tokenizer: The hybrid's, once it is loaded; saved with the model.
        train, validation: Rows of text as `load_rows` gives them, once they are loaded.
        passages: The texts of the validation rows, to measure on; None where there are none.
        verbose: Whether the Trainer prints what it logs, in the place of one bar and `training.log`.
    """

    stage: str
    arguments: TrainingArguments
    data: DataArguments | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    train: Dataset | None = None
    validation: Dataset | None = None
    passages: Passages | None = None
    verbose: bool = False

    @property
    def output(self) -> Path:
        """The directory that it writes."""
        return Path(self.arguments.output_dir)

    def perform(
        self, work: Callable[["StageRun"], dict], summary: Callable[[dict], Iterable[str]], start: Any = None
    ) -> dict:
        """Does a stage's work unless it is finished, and prints its result; on every rank.

        Args:
            work: Loads, trains and saves through the run; gives the result as `save` or `write` returns it.
            summary: The lines that are printed of a result.
            start: What the stage starts from and was told beside `arguments` and `data`: a mapping or a dataclass.

        Returns:
            The result, as `stage.json` has it.

        Raises:
            ManticoreError: The directory holds the stage as it was asked for with other settings, or another stage.
        """
        asked = asked_for(self.stage, self.output, self.arguments, start, self.data)
        on_main(self._check, asked)
        result = finished(self.output)
        if result is None:
            on_main(remember_asked, self.output, asked)
            set_seed(self.arguments.seed)
            result = work(self)
            lines = list(summary(result))
        else:
            try:
                lines = list(summary(result))
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
                raise ManticoreError(
                    f"{str(self.output / RESULT)!r} is not a result of this stage ({reason(err)}); delete it, then run "
                    "again."
                ) from err
        for line in lines:
            print_main(line)
        return result

    def _check(self, asked):
        file = self.output / RESULT
        result = read_json(file) if file.is_file() else None
        check_asked(self.output, asked, result, last_whole_checkpoint(self.output) is not None)

    def load(self, source: str | Path, dtype: str) -> ManticoreForCausalLM:
        """The hybrid that the stage starts from; its tokenizer and the text are kept here. On every rank.

        Args:
            source: Directory or Hub repo.
            dtype: That the weights are loaded in, "float32", "auto", ...

        Raises:
            ManticoreError: No such dtype, or text that cannot be used.
            OSError: There is no such hybrid.
        """
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ManticoreError(f"{dtype!r} is not a torch dtype to load the weights in; give for example 'bfloat16'.")
        model = ManticoreForCausalLM.from_pretrained(source, dtype=dtype)
        with main_first():
            self.tokenizer = read_tokenizer(source)
            rows = load_rows(self.data, self.tokenizer, keep_text=True)
        if rows[1] is not None:
            self.passages = make_passages(rows[1], self.tokenizer)
        self.train, self.validation = (without_text(part) for part in rows)
        return model

    def load_to_train(self, source: str | Path, dtype: str) -> ManticoreForCausalLM:
        """As `load`, for a stage with gradients."""
        take_precision(self.arguments)
        if self.arguments.ddp_find_unused_parameters is None:
            # Weights that are fixed, components at 0, heads that nothing reads
            self.arguments.ddp_find_unused_parameters = True
        return self.load(source, dtype)

    def trainer(self, cls: type[Trainer], model: torch.nn.Module, **kwargs: Any) -> Trainer:
        """A Trainer of the stage's text and arguments.

        Raises:
            ManticoreError: Arguments that do not go together.
        """
        collator = collator_for(self.train, self.tokenizer)
        given = {"args": self.arguments, "train_dataset": self.train, "processing_class": self.tokenizer, **kwargs}
        try:
            trainer = cls(model=model, data_collator=collator, **given)
        except ManticoreError:
            raise
        except (ValueError, TypeError, ImportError) as err:  # so says Transformers
            raise ManticoreError(" ".join(str(err).split())) from err
        if not self.verbose:
            show_progress(trainer, self.stage, self.output)
        return trainer

    def fit(self, trainer: Trainer) -> Unrounded:
        """Trains, from the last whole checkpoint if there is one; what it returns is for `save`. On every rank."""
        resume = self.arguments.resume_from_checkpoint or broadcast_object(last_whole_checkpoint(self.output))
        if resume:
            print_main(f"{self.output}: resuming from {resume}.")
        kept = Unrounded(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return kept

    def save(
        self,
        model: ManticoreForCausalLM,
        result: dict,
        trained: tuple[Trainer, Unrounded] | None = None,
        facts: Callable[[], dict] | None = None,
        also: Callable[[dict], dict | None] | None = None,
    ) -> dict:
        """Saves the hybrid with its tokenizer, and the result last; on every rank.

        Args:
            model: The hybrid. After a training with DeepSpeed it is for saving only.
            result: Of the stage, but for `facts`.
            trained: The Trainer, and what `fit` returned.
            facts: More of the result, which is read from the whole model.
            also: As in `write`.

        Returns:
            The whole result.
        """
        state = None
        if trained is not None:
            trainer, kept = trained
            state = gathered(trainer, model, kept)
            if is_main() or not trainer.is_deepspeed_enabled:  # which has the model whole on rank 0 only
                result = {**result, **(facts() if facts is not None else {})}
        return on_main(self.write, model, result, state, also)  # the next stage reads what rank 0 has written

    def write(
        self,
        model: ManticoreForCausalLM,
        result: dict,
        state: dict[str, torch.Tensor] | None = None,
        also: Callable[[dict], dict | None] | None = None,
    ) -> dict:
        """What `save` does on rank 0.

        Args:
            model: The hybrid.
            result: Of the stage.
            state: The state dict, where it is not the model's own.
            also: Called with the result when the model is saved: writes more files, and may return more of the result.
        """
        model.save_pretrained(self.output, state_dict=state)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(self.output)
        more = also(result) if also is not None else None
        return record(self.output, {"stage": self.stage, **result, **(more or {})})


def collator_for(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Callable[[list], dict]:
    """What makes batches of rows as `load_rows` gives them: packed ones, or of different lengths, which are padded.

    Args:
        rows: The rows.
        tokenizer: That they were made with; it gets its end-of-text token for padding where it has none.
    """
    if "attention_mask" not in rows.column_names:
        return default_data_collator
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)


def training_defaults() -> dict[str, Any]:
    """What the stages set in TrainingArguments where nothing is given.

    No trackers; a bar, however little Transformers logs; the CPU where there is no other device.
    """
    return {"report_to": "none", "use_cpu": not torch.accelerator.is_available(), "disable_tqdm": False}


def check_training(what: str, cls: type[TrainingArguments], given: dict[str, Any]) -> TrainingArguments:
    """TrainingArguments whose optimizer and schedule can be made, which Transformers finds out after loading.

    Args:
        what: How a message calls them.
        cls: Their class.
        given: Its keyword arguments.

    Raises:
        ManticoreError: Something cannot be used; Transformers raises many kinds of errors.
    """
    try:
        arguments = cls(**given)
        model = torch.nn.Linear(1, 1)  # some optimizers look at a model
        if arguments.optim_target_modules is None:  # which are looked for in the model itself
            kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
            if not {"optimizer_dict", "model", "params"} & set(options):
                kind(model.parameters(), **options)
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD(model.parameters()),
            arguments.get_warmup_steps(10),
            10,
            arguments.lr_scheduler_kwargs or {},
        )
    except Exception as err:
        raise ManticoreError(f"{what}: {reason(err)}") from err
    return arguments


def finished(output: str | Path) -> dict | None:
    """The result of a stage that has ended in this directory, or None; on every rank the same."""
    file = Path(output) / RESULT
    result = broadcast_object(read_json(file) if is_main() and file.is_file() else None)
    if result is not None:
        print_main(f"{output}: this stage is finished; delete {RESULT} there to run it again.")
    return result


def record(output: str | Path, result: dict) -> dict:
    """Writes a stage's result; by rename and last, because its presence says that the stage has ended."""
    write_json(Path(output) / RESULT, result)
    return result


def last_whole_checkpoint(output: str | Path) -> str | None:
    """The newest checkpoint of a run that was written to its end, or None.

    The Trainer writes `trainer_state.json` last; a checkpoint without it, or with half of it, was cut off by a kill.
    """
    found = []
    for folder in Path(output).glob("checkpoint-*"):
        try:
            step = read_json(folder / "trainer_state.json")["global_step"]
        except (OSError, ManticoreError, KeyError):
            continue
        if type(step) is int:
            found.append((step, folder))
    return str(max(found)[1]) if found else None
