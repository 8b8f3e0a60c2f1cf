"""The study: where does a hybrid pay? Real text, tiny specialists, every baseline, seeds and intervals.

    python benchmarks/study.py --shared SHARED --work WORK                # all settings, hours on two cores
    python benchmarks/study.py --shared SHARED --work WORK --only two-60k # one of them
    python benchmarks/study.py --work WORK --collect                      # tables of what is finished

SHARED holds `components/` and `data/` (tiny stories models with one tokenizer of 512 tokens; Shakespeare, WikiText-2,
Alpaca); the demo's pair and the Python standard library come with the package. Specialists are those models trained on
one kind of text each; a setting is a set of components, a mixture of texts, and a number of training tokens. Every
setting is one `manticore-hf compare`, so a killed study goes on where it was, and settings can be run side by side.
Results are kept in benchmarks/results/study/SETTING.json.
"""

import argparse
import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from manticore_hf.modeling.mixers_manticore import repair_mixers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

import manticore_hf
from manticore_hf.compare import CompareArguments, run_compare
from manticore_hf.compare.summary import as_markdown
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import pack

RESULTS = Path(__file__).parent / "results" / "study"
DEMO = Path(manticore_hf.__file__).parent / "demo_components"
BLOCK, BATCH = 256, 4
DOCUMENT = 1500  # characters, about
TEST_TOKENS, VALIDATION_TOKENS, SPECIALIST_TOKENS = 25_000, 8_000, 600_000  # of each kind of text
LLAMA, MAMBA, NEOX = "stories260k-llama", "stories-mamba-280k", "stories-neox-352k"


@dataclass
class Setting:
    """Components as (base model, the text it was made a specialist on, or None), and what they are tuned on."""

    components: list
    kinds: list
    tokens: int
    arguments: dict = field(default_factory=dict)
    all_text: bool = False


HYBRID_GRID = {"spaces": ("logprob", "prob"), "loss_weights": ((1.0, 0.0), (0.3, 1.0))}
TWO = [(LLAMA, "shakespeare"), (MAMBA, "python")]
THREE = [*TWO, (NEOX, "wikitext")]
SETTINGS = {
    "two-60k": Setting(TWO, ["shakespeare", "python"], 60_000, {**HYBRID_GRID, "prune": True}),
    "other-60k": Setting([(NEOX, "wikitext"), (LLAMA, "alpaca")], ["wikitext", "alpaca"], 60_000, HYBRID_GRID),
    "three-60k": Setting(THREE, ["shakespeare", "python", "wikitext"], 60_000, HYBRID_GRID),
    "alike-60k": Setting([(LLAMA, None), (MAMBA, None)], ["shakespeare"], 60_000, HYBRID_GRID),
    "demo-40k": Setting([("neox-prose", None), ("mamba-code", None)], ["prose", "code"], 40_000, HYBRID_GRID),
    "two-20k": Setting(TWO, ["shakespeare", "python"], 20_000, HYBRID_GRID),
    "blocks-40k": Setting(
        TWO, ["shakespeare", "python"], 40_000,
        {"blocks": (1, 2, 4), "projectors": ("linear", "none"), "from_tuned": True,
         "learning_rates": (1e-3 / 3, 1e-3, 3e-3, 1e-2)},
    ),
    "all-text-60k": Setting(
        TWO, ["shakespeare", "python"], 60_000,
        {"spaces": ("prob",), "learning_rates": (1e-3, 3e-3), "gate_learning_rates": (1e-2,),
         "retrain": ("llama_shakespeare",)},
        all_text=True,
    ),
    "two-200k": Setting(TWO, ["shakespeare", "python"], 200_000, HYBRID_GRID),
    "alike-200k": Setting([(LLAMA, None), (MAMBA, None)], ["shakespeare"], 200_000, HYBRID_GRID),
}  # fmt: skip


def texts(kind, split, shared):
    """Documents of a kind; `split` is specialist, train, validation or test: no document is in two of them."""
    if kind in ("prose", "code"):
        return documents(kind, {"specialist": "pretrain"}.get(split, split))
    if kind == "python":
        return texts("code", split, shared)
    data = Path(shared) / "data"
    if kind == "wikitext":
        name = "valid" if split == "specialist" else "test"
        found = _grouped((data / "wikitext2" / f"{name}.txt").read_text().replace("<unk>", "unknown").split("\n"))
        return found if split == "specialist" else _part(found, split, 0.0, 0.6)
    if kind == "shakespeare":
        found = _grouped((data / "tinyshakespeare" / "input.txt").read_text().split("\n\n"))
    elif kind == "alpaca":
        records = json.loads((data / "alpaca" / "alpaca_en_demo.json").read_text())
        found = ["\n".join(filter(None, (r["instruction"], r["input"], r["output"]))) for r in records]
    else:
        raise ValueError(f"kind={kind!r} is none of this study's")
    return _part(found, split, 0.65, 0.87)


def _part(found, split, specialist, train):
    """Consecutive parts: up to share `specialist`, up to `train`, a quarter of the rest for validation, the rest."""
    first, second = int(specialist * len(found)), int(train * len(found))
    third = second + (len(found) - second) // 4
    parts = {"specialist": found[:first], "train": found[first:second], "validation": found[second:third]}
    return parts.get(split, found[third:])


def _grouped(paragraphs):
    out, document = [], ""
    for paragraph in paragraphs:
        document += paragraph.strip() + "\n"
        if len(document) > DOCUMENT:
            out.append(document)
            document = ""
    return out


def write_texts(kinds, split, tokens, tokenizer, shared, path):
    """A jsonl file with as many tokens of every kind, documents in random order; one with what nobody knows is left."""
    chosen = []
    for kind in kinds:
        left = tokens // len(kinds)
        for text in texts(kind, split, shared):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if tokenizer.unk_token_id in ids and tokenizer.unk_token_id != tokenizer.eos_token_id:
                continue
            chosen.append({"kind": kind, "text": text if len(ids) < left else tokenizer.decode(ids[:left])})
            left -= len(ids)
            if left <= 0:
                break
        else:
            print(f"{kind}, {split}: {left:,} tokens fewer than asked")
    random.Random(0).shuffle(chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in chosen))


def specialist(base, kind, shared, work):
    """The directory of a model that was trained on one kind of text."""
    if kind is None:
        return (DEMO if (DEMO / base).is_dir() else Path(shared) / "components") / base
    folder = work / "specialists" / f"{base.split('-')[-2 if base != LLAMA else -1]}_{kind}"
    if (folder / "model.safetensors").is_file():
        return folder
    source = Path(shared) / "components" / base
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    repair_mixers(model)
    file = folder / "text.jsonl"
    write_texts([kind], "specialist", SPECIALIST_TOKENS, tokenizer, shared, file)
    rows = pack((json.loads(line)["text"] for line in file.open()), tokenizer, BLOCK)
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        use_cpu=not torch.accelerator.is_available(),
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def prepared(name, shared, work):
    """The directories of a setting's components, once they and its texts (WORK/NAME/SPLIT.jsonl) are there."""
    setting = SETTINGS[name]
    sources = [specialist(base, kind, shared, work) for base, kind in setting.components]
    tokenizer, many = AutoTokenizer.from_pretrained(sources[0]), len(setting.kinds)
    sizes = {"train": setting.tokens, "validation": VALIDATION_TOKENS * many, "test": TEST_TOKENS * many}
    for split, tokens in sizes.items():
        file = work / name / f"{split}.jsonl"
        if not file.is_file():
            write_texts(setting.kinds, split, tokens, tokenizer, shared, file)
    return sources


def run(name, shared, work):
    """Prepares and compares one setting."""
    setting, sources, folder = SETTINGS[name], prepared(name, shared, work), work / name
    rate = 3.0e-4 if setting.components[0][0] == "neox-prose" else 1.0e-3
    if setting.all_text and not (folder / "all.jsonl").is_file():
        (folder / "all.jsonl").write_text("".join((source / "text.jsonl").read_text() for source in sources))
    common = {"per_device_train_batch_size": BATCH, "lr_scheduler_type": "cosine", "warmup_steps": 5}
    common |= {"save_strategy": "no", "logging_steps": 20}
    recipe = {
        "name": name, "seed": 0, "components": [str(source.resolve()) for source in sources],
        "hybrid": {"num_blocks": 1, "dtype": "float32"},
        "data": {"data": str((folder / "train.jsonl").resolve()), "block_size": BLOCK, "validation_fraction": 0.1},
        "stages": [
            {"calibrate": {"tokens": min(setting.tokens, 40_000)}},
            {"pretrain": {"num_train_epochs": 1, "learning_rate": 1e-2, **common}},
            {"finetune": {"num_train_epochs": 1, "learning_rate": rate, **common}},
        ],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    grid = {"learning_rates": (rate / 10, rate / 3, rate, 3 * rate), "gate_learning_rates": (1e-2, 3e-2, 1e-1)}
    files = {"test": str(folder / "test.jsonl"), "validation": str(folder / "validation.jsonl")}
    files["all_text"] = str(folder / "all.jsonl") if setting.all_text else None
    arguments = CompareArguments(**files, allow_outside=True, **{**grid, **setting.arguments})
    run_compare(folder / "recipe.yaml", arguments, folder / "compare")
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "compare" / "comparison.json", RESULTS / f"{name}.json")
    shutil.copyfile(folder / "compare" / "comparison.png", RESULTS / f"{name}.png")


SHOWN = {
    "best component, tuned": "component", "the same, K times as long": "single", "ensemble": "ensemble",
    "token gate": "gate", "hybrid, 1 block": None, "oracle": "oracle",
}  # fmt: skip


def _best(rows, kind=None):
    return min((row for row in rows if kind in (None, row["kind"])), key=lambda row: row["loss"])


def overview(results):
    """One row per setting: test losses of the best of each kind, and the hybrid against the best baseline.

    Args:
        results: {setting: comparison}.
    """
    head = ["setting", *SHOWN, "best baseline - hybrid", "95 % interval", "p", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, result in results.items():
        rows = [row for row in result["rows"] if not row["needs"] or row["kind"] == "oracle"]
        own = next(row for row in rows if row["name"] == "hybrid, 1 block")
        best = {label: _best(rows, kind) if kind else own for label, kind in SHOWN.items()}
        baseline = _best([row for row in rows if row["kind"] not in ("hybrid", "pruned", "hardened", "oracle")])
        cells = [name, *(f"{row['loss']:.3f}" for row in best.values())]
        if result["hybrid"] == own["name"]:
            low, high = baseline["difference_interval"]
            cells += [f"{baseline['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{baseline['p']:.4f}"]
            cells += [f"{baseline['seeds_won']} of {len(baseline['losses'])}"]
        else:
            cells += [f"{baseline['loss'] - own['loss']:+.3f}", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="directory with components/ and data/")
    parser.add_argument("--work", type=Path, required=True, help="directory for texts, models and runs")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--collect", action="store_true", help="print the tables of the finished settings")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.collect:
        files = {name: RESULTS / f"{name}.json" for name in args.only}
        results = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
        for name, result in results.items():
            print(f"\n## {name}\n\n{as_markdown(result)}")
        print(overview(results))
        return
    for name in args.only:
        print(f"== {name}", flush=True)
        run(name, args.shared, args.work)


if __name__ == "__main__":
    main()
