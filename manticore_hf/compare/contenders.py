"""The models of a comparison: how each is made from the recipe, trained, and loaded again.

A contender's `train(options, seed, folder)` leaves what `load(run)` needs in the folder, and returns what it cost.
Components are tuned by the standard Trainer with the settings of the recipe's finetune stage, gates with those of its
pretrain stage; hybrids run the recipe itself, changed in the keys that a variant is about.
"""

import contextlib
import functools
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from manticore_hf.compare.arguments import stage_settings
from manticore_hf.compare.compared_recipe import earlier_texts, only_training, training_settings
from manticore_hf.compare.scores import forward_flops
from manticore_hf.compose.component_tokenizers import can_align, find_tokenizer
from manticore_hf.compose.components import ComponentSpec, load, resolve
from manticore_hf.compose.convert.converted_files import convert_files
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.evaluation.data import DataArguments, load_rows, rows_for, without_text
from manticore_hf.evaluation.losses import Passages, make_passages
from manticore_hf.modeling.aligned_tokenizers import tokenizer_of
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.mixers_manticore import repair_mixers
from manticore_hf.training.distill import run_prune
from manticore_hf.training.freezing import set_stage
from manticore_hf.training.recipe import Recipe, run_recipe
from manticore_hf.training.runtime import collator_for, last_whole_checkpoint, training_defaults
from manticore_hf.training.stage_arguments import PruneArguments
from manticore_hf.training.stages import STAGES
from manticore_hf.training.untrained_stages import run_compose
from manticore_hf.utils.tokenizers import read_tokenizer, tokenizer_at

# FLOPs of training a token, in forward passes: all weights trained; through frozen layers to what is before or between
# them; no gradient through the components at all.
ALL, THROUGH, NONE = 3, 2, 1
HUB = {"token": None, "cache_dir": None, "local_files_only": False}


@dataclass
class Contender:
    """One row of the comparison.

    Attributes:
        name: Its label.
        kind: untuned, component, ensemble, gate, single, hybrid, pruned or oracle.
        train: (options, seed, folder) -> {"training_flops", "training_tokens"}.
        load: (run) -> model.
        options: The grid it is chosen from, on the first seed; the others train with what was chosen.
        needs: What a user must have for it, beyond the components and the text.
        base: Names of contenders it starts from; their training is part of its cost.
        seeded: False where nothing is trained, so that one run is all there is.
        tokenizer: () -> the tokenizer of a model that has another than the hybrid; None for the hybrid's.
    """

    name: str
    kind: str
    train: Callable[[dict, int, Path], dict]
    load: Callable[[dict], PreTrainedModel]
    options: list[dict] = field(default_factory=lambda: [{}])
    needs: str = ""
    base: list = field(default_factory=list)
    seeded: bool = True
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None


class Workshop:
    """Trains and loads the contenders of one recipe.

    Args:
        recipe: As `read_recipe` gives it.
        folder: Where the untuned hybrid of one block is kept, whose components are the starting points.
        dtype: Of all weights in training.

    Attributes:
        own_tokenizers: {component: tokenizer} of those that read text by another than the hybrid's (aligned hybrids).
        hybrid_tokenizer: () -> the tokenizer of hybrids whose recipe gives one of its own; else None.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, dtype: str = "float32"):
        self.recipe, self.folder, self.dtype = recipe, Path(folder), dtype
        keys = ("tokenizer_component", "tokenizer_data", "transplant", "transplant_data")
        settings = {key: recipe.hybrid[key] for key in keys if key in recipe.hybrid}
        if "transplant" in settings:
            settings.setdefault("transplant_data", DataArguments(**recipe.data))
        recipe.components = convert_files(recipe.components, self.folder)
        with contextlib.redirect_stdout(io.StringIO()):
            arguments = TrainingArguments(output_dir=str(self.folder), seed=recipe.seed, **training_defaults())
            text = DataArguments(**recipe.data) if can_align(recipe.hybrid) else None
            run_compose(recipe.components, arguments, text=text, num_blocks=1, dtype=dtype, **settings)
        self.tokenizer = read_tokenizer(self.folder)
        config = self.untuned().config
        self.names = config.component_names
        # A branch that moves while the comparison runs must not change what is compared.
        self.sources = [
            f"{entry['repo_id']}@{entry['revision']}" if entry["repo_id"] and not entry["subfolder"] else source
            for entry, source in zip(config.components, recipe.components)
        ]
        if recipe.hybrid.pop("tokenizer_data", None) is not None or config.aligned:  # it was chosen, once for all
            recipe.hybrid["tokenizer_component"] = config.tokenizer_component
        given = recipe.hybrid.get("tokenizer")  # of the hybrids alone: components keep theirs
        self.hybrid_tokenizer = given and functools.cache(functools.partial(tokenizer_at, given))
        self.home, untuned = config.tokenizer_component, self.untuned() if config.aligned else None
        self.own_tokenizers = {name: tokenizer_of(untuned, name) for name in config.aligned}
        rows = load_rows(DataArguments(**recipe.data), self.tokenizer, keep_text=True)
        self.train_texts, self.validation_texts = rows
        self.earlier = earlier_texts(recipe)
        self.train_rows, self.validation_rows = (without_text(part) for part in rows)

    def untuned(self) -> ManticoreForCausalLM:
        """The hybrid of the components as they were, in one block."""
        return ManticoreForCausalLM.from_pretrained(self.folder, dtype=self.dtype)

    def component(self, name: str, run: dict | None = None) -> PreTrainedModel:
        """A component as its own class: as it was, or as a run tuned it."""
        if run is None:
            return self.untuned().component(name)
        return self.load_plain(run)

    def load_plain(self, run: dict) -> PreTrainedModel:
        """The single model that a run tuned."""
        model = AutoModelForCausalLM.from_pretrained(run["folder"] / "model", dtype=self.dtype)
        repair_mixers(model)
        return model

    def other(self, source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """A causal LM that is no part of the hybrid, and its tokenizer if that is another one than the hybrid's.

        Args:
            source: Directory, or "repo" or "repo@revision" of the Hub.

        Raises:
            ManticoreError: It comes without a tokenizer and has too few rows for the hybrid's.
        """
        found = resolve(ComponentSpec(source), HUB)
        model = load(found, getattr(torch, self.dtype), HUB)
        repair_mixers(model)
        if (tokenizer := self.other_tokenizer(source)) is not None:
            return model, tokenizer
        if model.config.vocab_size < len(self.tokenizer):
            raise ManticoreError(
                f"{source!r} has a vocabulary of {model.config.vocab_size} and comes without a tokenizer; the hybrid's "
                f"has {len(self.tokenizer)} tokens. Put its tokenizer beside its weights."
            )
        return model, None

    @functools.cache  # noqa: B019 - as long as the comparison
    def other_tokenizer(self, source: str) -> PreTrainedTokenizerBase | None:
        """The tokenizer of another model, None if it is the hybrid's or there is none; without its weights."""
        tokenizer = find_tokenizer(resolve(ComponentSpec(source), HUB, weights=False), HUB)
        same = tokenizer is None or tokenizer.get_vocab() == self.tokenizer.get_vocab()
        return None if same else tokenizer

    @functools.cached_property
    def validation_passages(self) -> Passages:
        """The validation text, for models of other tokenizers."""
        return make_passages(self.validation_texts, self.tokenizer)

    def rows_of(self, tokenizer: PreTrainedTokenizerBase | None, text: dict | None = None) -> Dataset:
        """A training text as rows of a tokenizer.

        Args:
            tokenizer: None for the hybrid's.
            text: Keys of DataArguments, of one that a stage has to itself; None for the finetune stage's.
        """
        if tokenizer is None and text is None:
            return self.train_rows
        data = DataArguments(**(self.recipe.data if text is None else text))
        texts = self.train_texts if text is None else self._earlier_rows(self.earlier.index(text))
        return without_text(texts) if tokenizer is None else rows_for(texts, self.tokenizer, tokenizer, data)

    @functools.cache  # noqa: B019 - as long as the comparison
    def _earlier_rows(self, number):
        return load_rows(DataArguments(**self.earlier[number]), self.tokenizer, keep_text=True)[0]

    # ---- single models -----------------------------------------------------------------------------------------------

    def train_plain(
        self,
        model: PreTrainedModel,
        rows: Dataset,
        options: dict,
        seed: int,
        folder: Path,
        passes: int = 1,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> dict:
        """Tunes any causal LM, `passes` times as long as the options say; `tokenizer` if it is not the hybrid's."""
        options = {**options, "num_train_epochs": passes * options["num_train_epochs"]}
        settings = training_settings(self.recipe, "finetune", **options)
        if settings.get("max_steps", -1) > 0:
            settings["max_steps"] *= passes  # which outweighs the epochs
        model.requires_grad_(True)
        cost = self._fit(model, rows, settings, seed, folder, ALL, tokenizer)
        model.save_pretrained(folder / "model")
        (tokenizer or self.tokenizer).save_pretrained(folder / "model")
        return cost

    def _fit(self, model, rows, settings, seed, folder, factor, tokenizer=None):
        repair_mixers(model)
        set_seed(seed)
        scratch = folder / "trainer"
        arguments = _arguments(scratch, **{"seed": seed, **settings})
        collator = collator_for(rows, tokenizer or self.tokenizer)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(scratch))
        shutil.rmtree(scratch, ignore_errors=True)
        model.eval()
        tokens = self._tokens(trainer.state.global_step, arguments, rows)
        return {"training_tokens": tokens, "training_flops": factor * tokens * self.flops(model)}

    def flops(self, model: PreTrainedModel) -> float:
        """FLOPs of a forward pass per token of the model's own tokenizer; of an aligned hybrid on the training text."""
        text = self.train_rows[0]["input_ids"] if getattr(model.config, "aligned", ()) else None
        return forward_flops(model, text=text)

    def _tokens(self, steps, arguments, rows):
        """Tokens that were trained on; the last batch of a pass may be smaller."""
        size, row = len(rows), count_tokens(rows) / len(rows)
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        passes, rest = divmod(steps, -(-size // batch))
        return round((passes * size + min(rest * batch, size)) * row)

    # ---- mixtures of models that were trained apart ------------------------------------------------------------------

    def mixture(
        self, runs: list[dict | None], mixture: str, space: str = "logprob", **more: float
    ) -> ManticoreForCausalLM:
        """The one-block hybrid of tuned components (None: untuned), at its start; `more` settings of its mixture.

        Its weights are made as the recipe's hybrid makes them: kept for as many tokens, from past losses, too.
        """
        settings = {"mixture": mixture, "mixture_space": space, "embeddings": "native", **more}
        alike = {"token": ("gate_lag", "gate_past_losses"), "online": ("gate_lag",)}.get(mixture, ())
        settings |= {key: self.recipe.hybrid[key] for key in alike if key in self.recipe.hybrid}
        if self.own_tokenizers:  # which are at the components' addresses, and beside what was tuned
            where = [one if run is None else run["folder"] / "model" for one, run in zip(self.sources, runs)]
            parts = [ComponentSpec(one, name=name) for one, name in zip(where, self.names)]
            settings |= {"tokenizers": "aligned", "tokenizer_component": self.home}
        else:
            parts = [ComponentSpec(self.component(name, run), name=name) for name, run in zip(self.names, runs)]
        return ManticoreForCausalLM.from_components(parts, num_blocks=1, dtype=self.dtype, verify=False, **settings)

    def train_gate(self, runs: list[dict], mixture: str, options: dict, seed: int, folder: Path) -> dict:
        """Trains only the mixture weights (one per component, or a gate per token) over frozen components."""
        model = set_stage(self.mixture(runs, mixture, options.get("mixture_space", "logprob")), "projectors")
        rate = {"learning_rate": options["gate_learning_rate"]} if "gate_learning_rate" in options else {}
        settings = training_settings(self.recipe, "pretrain", **rate)
        cost = self._fit(model, self.train_rows, settings, seed, folder, NONE)
        (folder / "model").mkdir(exist_ok=True)
        state = {key: value.contiguous() for key, value in model.hybrid_mixer.state_dict().items()}
        save_file(state, folder / "model" / "mixer.safetensors")
        return cost

    def load_gate(self, run: dict, runs: list[dict], mixture: str) -> ManticoreForCausalLM:
        """The mixture of tuned components whose weights or gate a run trained."""
        model = self.mixture(runs, mixture, run["options"].get("mixture_space", "logprob"))
        model.hybrid_mixer.load_state_dict(load_file(run["folder"] / "model" / "mixer.safetensors"))
        return model.eval()

    # ---- hybrids -----------------------------------------------------------------------------------------------------

    def train_hybrid(self, hybrid: dict, sources: list[str], options: dict, seed: int, folder: Path) -> dict:
        """Runs the recipe with other settings of the hybrid and of its finetune stage.

        Args:
            hybrid: Keys of ManticoreConfig, instead of the recipe's.
            sources: The components: `self.sources`, or directories of tuned ones.
            options: The choice from the grid.
            seed: Random seed of all stages.
            folder: The run's.
        """
        keys = ("mixture_space", "mix_loss_weight", "component_loss_weight")
        if sources is not self.sources:  # they have the hybrid's vocabulary
            hybrid = {**hybrid, "transplant": None, "transplant_data": None}
            sources = [_named(folder / name, source) for name, source in zip(self.names, sources)]
        hybrid = {**self.recipe.hybrid, **hybrid, **{key: options[key] for key in keys if key in options}}
        tuning = {key: value for key, value in options.items() if key not in keys}
        stages = []
        for stage, settings in self.recipe.stages:
            settings = {**settings, **tuning} if stage == "finetune" else settings
            one_block = hybrid.get("num_blocks", 1) == 1
            if stage == "calibrate" and (one_block or hybrid.get("projector", "linear") != "linear"):
                continue  # nothing to calibrate
            nothing = one_block and hybrid.get("mixture", "token") == "token" and not hybrid.get("bridge_alpha")
            if stage == "search" and nothing:
                continue  # no static alpha to search: the gate is trained like any weight
            if stage != "prune":
                stages.append({stage: settings if stage == "calibrate" else {**settings, "disable_tqdm": True}})
        hybrid = {key: value for key, value in hybrid.items() if value is not None}
        values = {"name": self.recipe.name, "seed": seed, "components": sources, "hybrid": hybrid}
        values |= {"data": self.recipe.data, "stages": stages}
        values |= {"program": self.recipe.program} if self.recipe.program else {}
        variant = folder / "variant.yaml"
        variant.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        results = run_recipe(variant, folder / "stages", allow_outside=True)  # what it names was found by `read_recipe`
        last = results[-1][0]
        flops, tokens = 0.0, 0
        model = ManticoreForCausalLM.from_pretrained(last, dtype=self.dtype)
        forward = self.flops(model)
        for (name, settings), (_, result) in zip([next(iter(s.items())) for s in stages], results[1:]):
            if STAGES[name].trains is None:
                flops += result["tokens"] * forward
                continue
            joined = model.config.num_blocks > 1 or model.config.embeddings != "native" or model.config.bridges
            through = THROUGH if joined else NONE
            rows = self.rows_of(self.hybrid_tokenizer and self.hybrid_tokenizer(), settings.get("data"))
            seen = self._tokens(result["steps"], _arguments(last, **only_training(settings)), rows)
            tokens += seen
            flops += (through if STAGES[name].trains == "projectors" else ALL) * seen * forward
        for stage, _ in results[:-1]:  # the last one is loaded; of the others the results stay
            for weights in stage.glob("*.safetensors"):
                weights.unlink()
        (folder / "model").unlink(missing_ok=True)
        (folder / "model").symlink_to(last.relative_to(folder))
        return {"training_tokens": tokens, "training_flops": flops}

    def load_hybrid(self, run: dict) -> ManticoreForCausalLM:
        """The hybrid that a run tuned or pruned."""
        return ManticoreForCausalLM.from_pretrained(run["folder"] / "model", dtype=self.dtype).eval()

    def prune(self, soft: dict, options: dict, seed: int, folder: Path) -> dict:
        """Prunes a tuned hybrid and distils it with the finetune stage's settings, by distillation."""
        settings = training_settings(self.recipe, "prune") or training_settings(self.recipe, "finetune")
        given = stage_settings(self.recipe, "prune")
        given = {"path": "loss"} if given is None else given
        own = {key: given[key] for key in PruneArguments.__dataclass_fields__ if key in given}
        arguments = _arguments(folder / "model", **{"seed": seed, "save_strategy": "no", **settings, **options})
        start = PruneArguments(**{**own, "model": str((soft["folder"] / "model").resolve())})
        result = run_prune(start, DataArguments(**self.recipe.data), arguments)
        hard, whole = (ManticoreForCausalLM.from_pretrained(p) for p in (folder / "model", start.model))
        tokens = self._tokens(result["steps"], arguments, self.train_rows)
        flops = tokens * (ALL * self.flops(hard) + self.flops(whole))
        return {"training_tokens": tokens, "training_flops": flops}


def count_tokens(rows: Dataset) -> int:
    """Tokens of rows as `load_rows` makes them: all of one length, if they are packed."""
    if "attention_mask" in rows.column_names:
        return sum(map(len, rows["input_ids"]))
    return len(rows) * len(rows[0]["input_ids"])


def _arguments(output_dir, **settings):
    return TrainingArguments(output_dir=str(output_dir), **{**training_defaults(), "disable_tqdm": True, **settings})


def _named(link, source):
    """A directory under another name: a component is called after its directory."""
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(source, link.parent))
    return str(link.absolute())


def read_run(folder: str | Path) -> dict | None:
    """What a finished run left in its folder, or None."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        return None
    try:
        return {**json.loads(file.read_text()), "folder": Path(folder)}
    except ValueError as err:
        raise ManticoreError(f"{file} is not JSON ({err}); delete that folder to repeat the run.") from None
