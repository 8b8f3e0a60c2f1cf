"""Do bridges pay on plain text? The study's pairs with bridges between their states, beside controls of that size.

    python benchmarks/study_bridges.py --shared SHARED --work WORK    # hours of a core; goes on where it was stopped
    python benchmarks/study_bridges.py --work WORK --collect          # the results of what is finished

Settings, texts and specialists are those of benchmarks/study.py. A pair of specialists is joined by a token gate, with
probabilities mixed (what one block of these settings chose there), and beside that by

* linear bridges of full rank from each component to the other, between all of S blocks: what is asked about;
* nothing (one block);
* the same bridges from each component to itself;
* LoRA in all linear maps that are safe, of the least rank with at least as many weights as the bridges have.

*Tuned*: a pass over the text trains what was added, as the study's recipe does, and a second one everything.
*Frozen*: two passes train what was added. On the first seed every contender is trained with each of RATES (of the
last pass, or of both); validation documents choose one for the other seeds. Every run is a file in WORK.
"""

import argparse
import itertools
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from demo_pair import short_training
from peft import get_peft_model
from study import BATCH, BLOCK, SETTINGS, prepared
from transformers import AutoTokenizer, Trainer, set_seed
from transformers.utils import logging

from manticore_hf import ManticoreForCausalLM
from manticore_hf.compare.scores import load_documents, score
from manticore_hf.evaluation.data import load_rows
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.evaluation.statistics import bootstrap, mean_loss, paired_p
from manticore_hf.training.lora import lora_config, lora_targets
from manticore_hf.utils.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "study_bridges.json"
SPLITS = ("train", "validation", "test")
PAIRS, BLOCKS, SEEDS = ("two-60k", "other-60k"), (2, 4), (0, 1, 2)
BRIDGES, ALONE = "bridges", "one block"
CONTENDERS = {ALONE: None, BRIDGES: "others", "self-bridges": "self", "LoRA": None}
RATES = {"tuned": (1e-4, 1e-3 / 3, 1e-3), "frozen": (1e-2, 3e-2)}
ADDED_RATE = 1e-2  # of the first pass, where a second one trains everything
MIXTURE = {"mixture": "token", "mixture_space": "prob", "mix_loss_weight": 1.0, "component_loss_weight": 0.0}


class Text:
    """A setting's components and text: sources, rows to train on, validation and test documents."""

    def __init__(self, name, shared, work):
        self.sources = prepared(name, shared, work)
        tokenizer, files = AutoTokenizer.from_pretrained(self.sources[0]), (work / name / f"{x}.jsonl" for x in SPLITS)
        train, *others = (DataArguments(str(file), block_size=BLOCK, validation_fraction=0.1) for file in files)
        self.rows, _ = load_rows(train, tokenizer)  # without the tenth that the study's recipe leaves out, too
        self.validation, self.test = (load_documents(one, tokenizer) for one in others)


def build(sources, contender, blocks):
    """A contender's model, untrained; with LoRA one of PEFT."""
    settings, bridges, parts = dict(MIXTURE), CONTENDERS[contender], [str(one) for one in sources]
    if bridges is not None:
        settings |= {"topology": "bridge", "bridge_blocks": blocks, "bridges": bridges}
    model = ManticoreForCausalLM.from_components(parts, num_blocks=1, dtype="float32", **settings)
    if contender != "LoRA":
        return model
    wanted = sum(one.numel() for one in build(sources, BRIDGES, blocks).hybrid_mixer.bridges.parameters())
    maps = [model.get_submodule(name) for name in lora_targets(model)]
    rank = math.ceil(wanted / sum(one.in_features + one.out_features for one in maps))
    return get_peft_model(model, lora_config(model, rank, lora_alpha=2 * rank))


def fit(model, rows, seed, rate, passes, everything):
    """Trains what was added to the components, or everything; returns how many weights were."""
    for name, parameter in model.named_parameters():
        added = ("hybrid_mixer" in name or "lora_" in name) and "original_module" not in name
        parameter.requires_grad_(added or everything and "original_module" not in name)
    arguments = short_training(seed, rate, num_train_epochs=passes, per_device_train_batch_size=BATCH)
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


def run(text, contender, blocks, trained, rate, seed):
    """Trains and scores one model."""
    start = time.time()
    set_seed(seed)
    model = build(text.sources, contender, blocks)
    first = fit(model, text.rows, seed, *((ADDED_RATE, 1) if trained == "tuned" else (rate, 2)), False)
    weights = fit(model, text.rows, seed, rate, 1, True) if trained == "tuned" else first
    seconds = time.time() - start
    nats = {split: score(model, getattr(text, split))["nll"] for split in ("validation", "test")}
    return {"rate": rate, "seed": seed, "weights": weights, "added": first, "seconds": round(seconds, 1), **nats}


class Runs:
    """The runs in a directory, each a file; a key is (setting, contender, blocks, "tuned" or "frozen")."""

    def __init__(self, folder):
        self.folder = folder

    def one(self, key, rate, seed, text=None):
        """A run: as it was kept, or else made of the text; None where that is not given."""
        setting, contender, blocks, trained = key
        blocks = 1 if contender == ALONE else blocks  # it is the same whatever stands beside it
        file = self.folder / f"{setting}_{trained}_{contender.replace(' ', '-')}_{blocks}_{rate:.0e}_s{seed}.json"
        if not file.is_file() and text is None:
            return None
        if not file.is_file():
            made = run(text, contender, blocks, trained, rate, seed)
            write_json(file, made)
            nats = {split: round(sum(made[split]), 1) for split in SPLITS[1:]}
            print(f"{time.strftime('%H:%M:%S')} {file.stem}: {nats}, {made['seconds']} s", flush=True)
        return read_json(file)

    def chosen(self, key, text=None):
        """The runs of all seeds with the rate that validation text chooses on the first one; None if one is missing."""
        grid = [self.one(key, rate, SEEDS[0], text) for rate in RATES[key[-1]]]
        if None in grid:
            return None
        rate = min(grid, key=lambda one: sum(one["validation"]))["rate"]
        runs = [self.one(key, rate, seed, text) for seed in SEEDS]
        return None if None in runs else runs


def compared(runs, tokens):
    """{contender: losses, and by how much it is behind the bridges} of {contender: its runs of all seeds}."""
    nats, out = {name: np.array([one["test"] for one in found]) for name, found in runs.items()}, {}
    for name, found in runs.items():
        each, difference = mean_loss(nats[name], tokens), nats[name] - nats[BRIDGES]
        out[name] = {"loss": each.mean(), "losses": each.tolist(), "interval": bootstrap(nats[name], tokens)}
        out[name] |= {key: found[0][key] for key in ("rate", "weights", "added")}
        if name != BRIDGES:
            each = mean_loss(difference, tokens)
            out[name] |= {"behind": each.mean(), "behind_each": each.tolist(), "p": paired_p(difference)}
            out[name]["behind_interval"] = bootstrap(difference, tokens)
    return out


def collected(folder):
    """What the pages read: all comparisons whose bridges, and one block at least, are finished."""
    runs, rows = Runs(folder), []
    facts = {name: read_json(folder / f"{name}.json") for name in PAIRS if (folder / f"{name}.json").is_file()}
    for setting, blocks, trained in itertools.product(facts, BLOCKS, RATES):
        found = {name: runs.chosen((setting, name, blocks, trained)) for name in CONTENDERS}
        found = {name: one for name, one in found.items() if one is not None}
        if {ALONE, BRIDGES} <= set(found):
            contenders = compared(found, np.array(facts[setting]["tokens"]))
            rows.append({"setting": setting, "blocks": blocks, "trained": trained, "contenders": contenders})
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, **{name: version(name) for name in ("transformers", "peft")}},
        "settings": facts,
        "rows": rows,
    }


def main():
    """Runs what is missing, and writes the results after each contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="directory with components/ and data/")
    parser.add_argument("--work", type=Path, required=True, help="directory for texts, models and runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results of all finished comparisons")
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--blocks", nargs="+", type=int, default=BLOCKS)
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = args.work / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    for name in () if args.collect else args.only:
        text = Text(name, args.shared, args.work)
        facts = {"units": text.test.units, "tokens": text.test.tokens.tolist(), "train_tokens": len(text.rows) * BLOCK}
        write_json(folder / f"{name}.json", {"components": SETTINGS[name].components, **facts})
        for blocks, trained in itertools.product(args.blocks, RATES):
            for contender in CONTENDERS:
                Runs(folder).chosen((name, contender, blocks, trained), text)
                write_json(args.output, collected(folder))
    write_json(args.output, collected(folder))


if __name__ == "__main__":
    main()
