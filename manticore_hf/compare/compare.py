"""Runs a comparison: every contender over the grid and the seeds, each run kept, nothing finished repeated.

    manticore-hf compare recipes/poc.yaml --test held_out.jsonl --output-dir poc-compared --learning-rates 1e-5 2e-5

On the first seed every contender is trained with every setting of its grid; the setting with the lowest loss on the
validation split is trained with the other seeds, too. Mixtures of components that were tuned apart choose the
components' settings by the loss of the mixture: what is best for a component alone may make it forget its strength.
Only then, and only for the chosen runs, the test documents are read. Every run is a folder with `run.json` (what was
trained, its cost, its validation loss) and, if it was chosen, `test-DIGEST.json` (loss and hits on every document).
`comparison.json`, the table and the picture are made from those.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from manticore_hf.compare.arguments import CompareArguments
from manticore_hf.compare.compared_recipe import read_recipe
from manticore_hf.compare.contenders import Contender, Workshop, count_tokens, read_run
from manticore_hf.compare.scores import load_documents, score, score_text
from manticore_hf.compare.summary import summarise, write_summary
from manticore_hf.compose.component_tokenizers import can_align
from manticore_hf.evaluation.data import DataArguments, load_rows, rows_for, without_text
from manticore_hf.evaluation.losses import compare_losses, own_nats
from manticore_hf.evaluation.records import read_texts
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.claims import ORIGINAL
from manticore_hf.utils.files import read_json, write_json

_HOW_READ = ("block_size", "text_column", "space_characters", "special_tokens")  # of any text, as of the recipe's


def run_compare(recipe: str | Path, arguments: CompareArguments, output_dir: str | Path) -> dict:
    """Trains, tests and compares what is not finished yet.

    Args:
        recipe: Path of a recipe with a finetune stage.
        arguments: CompareArguments.
        output_dir: Where everything is kept; the same call resumes after an interruption.

    Returns:
        The comparison, as written to `comparison.json` there.

    Raises:
        ManticoreError: Something cannot be used; or other text or another recipe was compared in this directory.
    """
    return Comparison(recipe, arguments, output_dir).run()


class Comparison:
    """One recipe, one test text, one output directory."""

    def __init__(self, recipe: str | Path, arguments: CompareArguments, output_dir: str | Path):
        self.arguments, self.output = arguments, Path(output_dir)
        self.recipe = read_recipe(recipe, arguments.allow_outside)
        self._check_held_out(recipe)
        self.output.mkdir(parents=True, exist_ok=True)
        self.identity = self._identify()
        data = DataArguments(**self.recipe.data)
        same = {key: getattr(data, key) for key in _HOW_READ}
        test = {"data": arguments.test, "data_split": arguments.test_split, "max_tokens": arguments.max_test_tokens}
        same |= {"encoding": arguments.encoding, "validation_fraction": 0.0}
        test = DataArguments(**test, **same)
        held_out = arguments.validation and DataArguments(arguments.validation, **same)
        for text in filter(None, (data, test, held_out)):  # before anything is converted or loaded
            read_texts(text, 1)
        self.shop = Workshop(self.recipe, self.output / "untuned")
        self._check_aligned()
        self.documents = load_documents(test, self.shop.tokenizer)
        if held_out:
            self.shop.validation_texts, _ = load_rows(held_out, self.shop.tokenizer, keep_text=True)
            self.shop.validation_rows = without_text(self.shop.validation_texts)
        self.chosen, self.seen, self.by_name = {}, {}, {}

    def _identify(self):
        """What every run depends on; raises if the directory holds another comparison."""
        recipe = dataclasses.asdict(self.recipe)
        what = {key: recipe[key] for key in ("components", "hybrid", "program", "data", "stages") if recipe[key]}
        file = self.output / "recipe.json"
        if file.is_file() and read_json(file) != json.loads(json.dumps(what)):
            raise ManticoreError(f"{self.output} compares another recipe ({file}); give another --output-dir.")
        write_json(file, what)
        return what

    def _check_held_out(self, recipe):
        """Raises where the test text is what the recipe trains on."""
        test = os.path.realpath(self.arguments.test)
        texts = (self.recipe.data, *(settings.get("data") for _, settings in self.recipe.stages))
        if os.path.isfile(test) and test in {os.path.realpath(data["data"]) for data in texts if data}:
            raise ManticoreError(
                f"--test {self.arguments.test} is the text that {recipe} trains on: give text that was kept back."
            )

    def _check_aligned(self):
        """Raises where a contender could not be made of components that read text by tokenizers of their own."""
        names = list(self.shop.own_tokenizers)
        if names and not all(can_align({**self.recipe.hybrid, **changed}) for changed, _ in self._variants()):
            raise ManticoreError(
                f"Components {names} have tokenizers of their own, which needs one block and embeddings 'native': "
                "compare such a hybrid, or write `transplant: auto` into the recipe's hybrid."
            )
        if names and self.arguments.prune:
            raise ManticoreError(
                f"Components {names} have tokenizers of their own: pruned to one of them the hybrid would be another "
                "model with another tokenizer, which is compared untuned; leave --prune out."
            )

    def run(self) -> dict:
        """Trains, tests and summarises; the comparison, as `comparison.json` has it."""
        contenders = self._contenders()
        seeds = len(self.arguments.seeds)
        self.by_name = {one.name: one for one in contenders}
        total = sum(len(one.options) + (seeds - 1 if one.seeded else 0) for one in contenders)
        # A mixture may choose another setting for its components than they do for themselves: then it is a few more.
        with tqdm(total=total, desc="Comparing", unit="run") as self.bar:
            for contender in contenders:
                self.chosen[contender.name] = self._choose(contender)
        with tqdm(contenders, desc="Testing", unit="model") as bar:
            rows = [self._tested(one) for one in bar]
        self._drop_unused(contenders)
        result = summarise(rows, self.documents, self._facts())
        write_summary(result, self.output)
        return result

    # ---- who takes part ----------------------------------------------------------------------------------------------

    def _contenders(self):
        shop, grid = self.shop, self.arguments.grid(self.recipe)
        gates = [{**one, **gate} for one in grid for gate in self.arguments.gate_grid()]
        aligned = shop.own_tokenizers  # such a component by itself is the model that it came as
        out = [self._untuned(name) for name in shop.names if name not in aligned]
        others = [source for source in shop.sources if shop.other_tokenizer(source)]
        out += [self._original(shop.names[shop.sources.index(source)], source) for source in others]
        out.append(self._mixture("ensemble, untuned", "untuned", None, "static"))
        out.append(self._mixture("online mixture, untuned", "untuned", None, "online", self.arguments.online_grid()))
        out += [self._tuned(name, f"{name}, tuned", "component", grid) for name in shop.names]
        parts = [one.name for one in out[-len(shop.names) :]]
        out.append(self._mixture("ensemble of the tuned components", "ensemble", parts, "static", grid))
        online = [{**one, **chosen} for one in grid for chosen in self.arguments.online_grid()]
        out.append(self._mixture("online mixture of the tuned components", "ensemble", parts, "online", online))
        out.append(self._gate("weighted ensemble of the tuned components", "ensemble", parts, "static", gates))
        out.append(self._gate("token gate over the tuned components", "gate", parts, "token", gates))
        many = len(shop.names)
        out += [self._tuned(name, f"{name}, tuned {many} times as long", "single", grid, many) for name in shop.names]
        if shop.earlier:
            label = "{}, tuned on the earlier stages' text, then on this"
            texts = (*shop.earlier, None)  # what the hybrid has seen, in its order
            out += [self._tuned(name, label.format(name), "single", grid, texts=texts) for name in shop.names]
        labels = {source: f"{Path(source).name} (single)" for source in self.arguments.singles}
        replaced = {source: name for name, source in zip(shop.names, shop.sources) if name not in aligned}
        labels |= {one: f"{replaced[one]} with its own tokenizer" for one in others if one in replaced}
        out += [self._other(source, f"{label}, tuned", grid) for source, label in labels.items()]
        if self.arguments.all_text is not None:
            wanted = self.arguments.retrain or shop.names
            if unknown := sorted(set(wanted) - set(shop.names)):
                raise ManticoreError(f"retrain: {unknown[0]!r} is not a component; there are {shop.names}.")
            out += [self._retrained(name, grid) for name in wanted]
        options = self.arguments.hybrid_grid(self.recipe)
        for hybrid, label in self._variants():
            out.append(self._hybrid(label, hybrid, options, None))
            if self.arguments.from_tuned:
                out.append(self._hybrid(f"{label}, from tuned components", hybrid, options, parts))
        if self.arguments.prune:
            out += [self._pruned(one) for one in out if one.kind == "hybrid"]
        return out

    def _variants(self):
        own = self.recipe.hybrid
        for blocks in self.arguments.blocks or (own.get("num_blocks", 1),):
            kinds = (None,) if blocks == 1 else self.arguments.projectors or (own.get("projector", "linear"),)
            for kind in kinds:
                changed = {"num_blocks": blocks} if kind is None else {"num_blocks": blocks, "projector": kind}
                text = {None: "", "none": ", no projectors", "mlp": ", MLP projectors", "linear": ""}[kind]
                yield changed, f"hybrid, {blocks} block{'s' if blocks > 1 else ''}{text}"

    def _untuned(self, name):
        def load(run):
            return self.shop.component(name)

        return Contender(f"{name}, untuned", "untuned", _nothing, load, seeded=False)

    def _tuned(self, name, label, kind, grid, passes=1, texts=(None,)):
        """A component tuned on texts as `rows_of` takes them, one after the other."""
        own = self.shop.own_tokenizers.get(name)

        def train(options, seed, folder):
            model, spent = self.shop.component(name), {}
            for text in texts:
                cost = self.shop.train_plain(model, self.shop.rows_of(own, text), options, seed, folder, passes, own)
                spent = {key: spent.get(key, 0) + value for key, value in cost.items()}
            return spent

        return Contender(label, kind, train, self.shop.load_plain, grid, tokenizer=own and (lambda: own))

    def _original(self, name, source):
        def load(run):
            return self.shop.other(source)[0].eval()

        tokenizer = functools.partial(self.shop.other_tokenizer, source)
        return Contender(ORIGINAL.format(name), "untuned", _nothing, load, seeded=False, tokenizer=tokenizer)

    def _other(self, source, label, grid):
        def train(options, seed, folder):
            model, tokenizer = self.shop.other(source)
            rows = self.shop.rows_of(tokenizer)
            return self.shop.train_plain(model, rows, options, seed, folder, tokenizer=tokenizer)

        tokenizer = functools.partial(self.shop.other_tokenizer, source)
        return Contender(label, "single", train, self.shop.load_plain, grid, tokenizer=tokenizer)

    def _retrained(self, name, grid):
        own = self.shop.own_tokenizers.get(name)

        def train(options, seed, folder):
            rows = self.all_rows(own).shuffle(seed=seed)
            return self.shop.train_plain(self.shop.component(name), rows, options, seed, folder, tokenizer=own)

        needs, label = "the components' training text", f"{name}, retrained on all text"
        return Contender(label, "single", train, self.shop.load_plain, grid, needs, tokenizer=own and (lambda: own))

    @functools.cached_property
    def _more(self):
        """The components' own training text: (DataArguments, rows with their text)."""
        data = {**self.recipe.data, "data": self.arguments.all_text, "validation_fraction": 0.0, "max_tokens": None}
        data |= dict.fromkeys(("where", "max_records", "validation_split"))
        data = DataArguments(**data)
        return data, load_rows(data, self.shop.tokenizer, keep_text=True)[0]

    def all_rows(self, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
        """The rows that are trained on, and those of the components' own training text; see `rows_of`."""
        data, more = self._more
        more = without_text(more) if tokenizer is None else rows_for(more, self.shop.tokenizer, tokenizer, data)
        return concatenate_datasets([self.shop.rows_of(tokenizer), more])

    def _parts(self, names, seed, options, weights=True):
        """The tuned components of a mixture: their runs with the mixture's own choice from the grid."""
        if names is None:
            return [None] * len(self.shop.names)
        tuning = {key: options[key] for key in ("learning_rate", "num_train_epochs")}
        return [self._run(self.by_name[name], tuning, seed, weights) for name in names]

    def _mixture(self, label, kind, names, mixture, options=None):
        def load(run):
            own = {key: value for key, value in run["options"].items() if key.startswith("online_")}
            own |= {"space": "prob"} if mixture == "online" else {}
            return self.shop.mixture(self._parts(names, run["seed"], run["options"]), mixture, **own)

        return Contender(label, kind, _nothing, load, options or [{}], base=names or [], seeded=names is not None)

    def _gate(self, label, kind, names, mixture, options):
        def train(chosen, seed, folder):
            return self.shop.train_gate(self._parts(names, seed, chosen), mixture, chosen, seed, folder)

        def load(run):
            return self.shop.load_gate(run, self._parts(names, run["seed"], run["options"]), mixture)

        return Contender(label, kind, train, load, options, base=names)

    def _hybrid(self, label, hybrid, options, parts):
        def train(chosen, seed, folder):
            tuned = [str(self.chosen[name][seed]["folder"] / "model") for name in parts or ()]
            return self.shop.train_hybrid(hybrid, tuned or self.shop.sources, chosen, seed, folder)

        own = self.shop.hybrid_tokenizer
        return Contender(label, "hybrid", train, self.shop.load_hybrid, options, base=parts or [], tokenizer=own)

    def _pruned(self, hybrid):
        def train(options, seed, folder):
            return self.shop.prune(self.chosen[hybrid.name][seed], options, seed, folder)

        name = f"{hybrid.name}, pruned"
        own = self.shop.hybrid_tokenizer
        return Contender(name, "pruned", train, self.shop.load_hybrid, base=[hybrid.name], tokenizer=own)

    # ---- one run -----------------------------------------------------------------------------------------------------

    def _choose(self, contender):
        """{seed: run} with the setting that is best on the validation split for the first seed."""
        first, *others = self.arguments.seeds
        runs = [self._run(contender, options, first) for options in contender.options]
        best = min(runs, key=lambda run: run["validation"])
        best = self._run(contender, best["options"], first, weights=True)
        if not contender.seeded:
            return dict.fromkeys(self.arguments.seeds, best)
        return {first: best, **{seed: self._run(contender, best["options"], seed, True) for seed in others}}

    def _bases(self, contender, options, seed):
        """The runs that a contender's run starts from."""
        if contender.kind in ("ensemble", "gate"):
            return self._parts(contender.base, seed, options, weights=False)
        own = [self.chosen[name][seed] for name in contender.base]
        return own + [one for name in contender.base for one in self._bases(self.by_name[name], options, seed)]

    def _run(self, contender, options, seed, weights=False):
        """One run, read where it is finished; with `weights` trained again where they were dropped."""
        what = {"recipe": self.identity, "contender": contender.name, "options": options, "seed": seed}
        what |= {"all_text": self.arguments.all_text} if contender.needs else {}
        what |= {"validation": self.arguments.validation} if self.arguments.validation else {}
        if contender.base:  # another choice there is another run here
            what["base"] = [run["folder"].name for run in self._bases(contender, options, seed)]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
        slug = re.sub(r"[^a-z0-9]+", "-", contender.name.lower()).strip("-")
        folder = self.output / "runs" / f"{slug}-s{seed}-{digest}"
        run = read_run(folder)
        if run is not None and weights and run.get("dropped"):
            shutil.rmtree(folder)
            run = None
        if run is None:
            self.bar.set_postfix_str(f"{contender.name}, seed {seed}")
            folder.mkdir(parents=True, exist_ok=True)
            start = time.time()
            with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
                cost = contender.train(options, seed, folder)
            run = {"contender": contender.name, "kind": contender.kind, "seed": seed, "options": options, **cost}
            run["seconds"] = round(time.time() - start, 2)
            model = contender.load({**run, "folder": folder})
            run["validation"] = self._validate(contender, model)
            run["parameters"] = sum(p.numel() for p in model.parameters())
            run["flops_per_token"] = self.shop.flops(model) * self._tokens_for_one(contender)
            if hasattr(model, "mixture_weights"):
                run["mixture_weights"] = model.mixture_weights().tolist()
            write_json(folder / "run.json", run)
            run["folder"] = folder
        if folder not in self.seen:
            self.seen[folder] = run
            self.bar.update()
        return run

    def _validate(self, contender, model):
        """Nats per token of the hybrid's tokenizer on the validation text."""
        own = contender.tokenizer and contender.tokenizer()
        if own is None:
            rows = self.shop.validation_rows
            return compare_losses(model, rows, desc="Validating", baselines=False)["hybrid"]
        passages = self.shop.validation_passages
        return float(own_nats(model, own, passages).sum() / passages.tokens.sum())

    def _tokens_for_one(self, contender):
        """How many tokens a model reads where the hybrid reads one, on the validation text."""
        own = contender.tokenizer and contender.tokenizer()
        if own is None:
            return 1.0
        passages = self.shop.validation_passages
        ids = own(passages.texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return sum(map(len, ids)) / int(passages.tokens.sum())

    def _drop_unused(self, contenders):
        """A run that nothing tested is made of keeps its numbers, not its weights."""
        used = set()
        for contender in contenders:
            for seed, run in self.chosen[contender.name].items():
                used |= {run["folder"], *(base["folder"] for base in self._bases(contender, run["options"], seed))}
        for folder in self.seen.keys() - used:
            _drop_weights(self.seen[folder])

    def _tested(self, contender):
        """A contender with its chosen runs, tested: {"contender", "runs": {seed: run}, "nll", "correct"}."""
        runs, scores = self.chosen[contender.name], []
        for run in runs.values():
            file = run["folder"] / f"test-{self.documents.digest}.json"
            if not file.is_file():
                own, model = contender.tokenizer and contender.tokenizer(), contender.load(run)
                found = score(model, self.documents) if own is None else score_text(model, own, self.documents)
                write_json(file, found)
            scores.append(read_json(file))
        values = {"nll": np.array([one["nll"] for one in scores], dtype=float), "correct": None}
        if all(one["correct"] is not None for one in scores):
            values["correct"] = np.array([one["correct"] for one in scores], dtype=float)
        bases = [self._bases(contender, run["options"], seed) for seed, run in runs.items()]
        return {"contender": contender, "runs": runs, "bases": bases, **values}

    def _facts(self):
        """What the comparison states beside its rows."""
        return {
            "data": Path(self.recipe.data["data"]).name,
            "test": Path(self.arguments.test).name,
            "tokens": count_tokens(self.shop.train_rows),
            "seeds": list(self.arguments.seeds),
            "components": self.shop.names,
            "grid": self.arguments.grid(self.recipe),
            "gate_grid": self.arguments.gate_grid(),
            "hybrid_grid": self.arguments.hybrid_grid(self.recipe),
        }


def _nothing(options, seed, folder):
    return {"training_tokens": 0, "training_flops": 0.0}


def _drop_weights(run):
    """A run that was not chosen keeps its numbers, not its weights."""
    write_json(run["folder"] / "run.json", {key: run[key] for key in run if key != "folder"} | {"dropped": True})
    for file in run["folder"].rglob("*.safetensors"):
        file.unlink()
    if not (run["folder"] / "model").is_symlink():
        shutil.rmtree(run["folder"] / "model", ignore_errors=True)
