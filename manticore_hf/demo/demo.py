"""A hybrid from components to the Hub, on real input: recipes run, baselines trained, compared, published, loaded back.

    manticore-hf demo

The components are the two shipped with the package, the text is that of the running Python's standard library (modules
the components have not seen). Both are written beside the recipes, `one_block.yaml` and `two_blocks.yaml`, which are
run as `manticore-hf run` runs them. What is published goes to the Hub that the environment names; `manticore-hf demo`
starts one on loopback for it. The numbers are what they are: baselines are printed beside the hybrids.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import load_rows, pack, pad
from manticore_hf.evaluation.losses import ONLINE, Measured, make_passages, measure
from manticore_hf.hub.publish import publish
from manticore_hf.modeling.bounds_manticore import ManticoreError
from manticore_hf.modeling.mixers_manticore import repair_mixers
from manticore_hf.report.write import write_report
from manticore_hf.training.freezing import set_stage
from manticore_hf.training.progress import show_progress
from manticore_hf.training.recipe import load_recipe, run_recipe, stage_data
from manticore_hf.training.runtime import training_defaults
from manticore_hf.utils.claims import ORIGINAL, claim
from manticore_hf.utils.formatting import short_duration
from manticore_hf.utils.objective import OBJECTIVE
from manticore_hf.utils.plots import plot_losses

COMPONENTS = Path(__file__).parent.parent / "demo_components"
ORGANISATION = "manticore-demo"
TESTED, REPORTED = 40, 8_000  # rows of each kind of text that all is tested on; tokens that the report measures on
UNTUNED, TUNED = "untuned components", "everything tuned"
KINDS = {"neox-prose": "prose", "mamba-code": "code"}
NAMES = {1: "one_block", 2: "two_blocks"}
SHIPPED = {1: "demo_one_block.yaml", 2: "demo.yaml"}
TRAIN, TEST = "text/train.jsonl", "text/test.jsonl"
PROMPTS = {"prose": "Return the name of the", "code": "def close(self):\n    self."}


def run(output_dir: Path, tokens: int, seed: int, scratch: Path, verbose: bool = False) -> int:
    """Runs the demo.

    Args:
        output_dir: Where everything is kept.
        tokens: Training tokens of every model and hybrid.
        seed: Random seed.
        scratch: For what is not kept: the Trainers' own files, what is published.
        verbose: Whether the training stages print what they log at every step.

    Returns:
        The exit status: 0 if what was published came back equal to the last bit.

    Raises:
        ManticoreError: The directory holds a demo on other text.
    """
    start = time.time()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(COMPONENTS / "neox-prose")
    recipes = prepare(output_dir, tokenizer, tokens, seed)
    recipe = load_recipe(recipes[1])
    block = recipe.data["block_size"]
    packed = {kind: pack(documents(kind, "test"), tokenizer, block, TESTED, keep_text=True) for kind in PROMPTS}
    test = {kind: make_passages(rows, tokenizer) for kind, rows in packed.items()}
    tested = sum(int(text.tokens.sum()) for text in test.values())
    _say(f"Trains on about {tokens:,} tokens and tests on {tested:,}, half prose and half code.")

    stages = {}
    for blocks, path in recipes.items():
        _say(f"manticore-hf run {shlex.quote(str(path))} --output-dir {shlex.quote(str(path.with_suffix('')))}")
        results = run_recipe(path, path.with_suffix(""), seed, verbose=verbose)
        stages[blocks] = {result["stage"]: folder for folder, result in results}
    frozen = _rows_before_tuning(stages, test)
    tuned = _rows_after_tuning(recipe, stages, test, scratch, seed)
    _print_table("before tuning the components", frozen, test)
    _print_table("after tuning everything on the same text", tuned, test)
    _say("Components were trained on the text once, models with a gate twice, the searched hybrid three times.")
    plot_losses(_measured({**frozen, **tuned}, test).losses, output_dir / "losses.png")

    found = [*_verdicts(frozen, tuned, test), _gate(ManticoreForCausalLM.from_pretrained(stages[1]["finetune"]), test)]
    published = []
    for repo in KINDS:
        HfApi().create_repo(f"{ORGANISATION}/{repo}")
        HfApi().upload_folder(repo_id=f"{ORGANISATION}/{repo}", folder_path=COMPONENTS / repo)
    for label, stage, rows in ((UNTUNED, "pretrain", frozen), (TUNED, "finetune", tuned)):
        shown = _beside_one_block(rows, frozen)
        loaded, size, same = _publish(stages[1][stage], label, test, shown, scratch)
        published.append(size)
        if not same:
            _say(f"The logits of the published hybrid, {label}, are not those of the local one.")
            return 1
    found.append(
        f"The one-block hybrid, published to a Hub on this machine and loaded back, gives the same logits to the last "
        f"bit; it takes {published[0]:,} bytes with the untuned components referenced, {published[1]:,} once they are "
        "tuned."
    )
    for kind, prompt in PROMPTS.items():
        given = tokenizer(prompt, return_tensors="pt")
        set_seed(seed)
        out = loaded.generate(**given, max_new_tokens=48, do_sample=True, temperature=0.7, top_k=40)
        print(f"--- written by the published hybrid: {kind} ---\n{tokenizer.decode(out[0], skip_special_tokens=True)}")
    _, html, _ = write_report(recipes[1].with_suffix(""), data=output_dir / TEST, max_tokens=REPORTED, block_size=block)
    print("\nWhat was found")
    for line in found:
        print(f"  {line}")
    print("Next")
    for what, command in next_commands(output_dir):
        print(f"  # {what}\n  {command}")
    _say(f"Done in {short_duration(time.time() - start)}. The report: {html.absolute().as_uri()}")
    return 0


def next_commands(output_dir: Path) -> list[tuple[str, str]]:
    """(what it does, command) of what can be done with what the demo leaves."""
    place = {name: shlex.quote(str(output_dir / name)) for name in (f"{NAMES[1]}.yaml", NAMES[1], TEST)}
    recipe, run_of, test = place.values()
    return [
        (
            "train every baseline on the same budget, for a verdict (this is one seed; without --seeds 0 it is three)",
            f"manticore-hf compare {recipe} --test {test} --output-dir {run_of}/compared --seeds 0",
        ),
        ("write the report again, now with that verdict", f"manticore-hf report {run_of} --data {test}"),
        ("see what the hybrid consists of and what it costs", f"manticore-hf inspect {run_of}/2-finetune"),
        (
            "publish the hybrid (log in first: hf auth login)",
            f"manticore-hf push {run_of}/2-finetune you/my-first-hybrid",
        ),
    ]


def prepare(output_dir: Path, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> dict[int, Path]:
    """Writes what the recipes name, and the recipes, with paths that count from where they are.

    Args:
        output_dir: Directory.
        tokenizer: That tokens are counted with.
        tokens: Of the training text, half prose and half code, document by document in random order.
        seed: Of that order.

    Returns:
        {number of blocks: path of the recipe}.

    Raises:
        ManticoreError: The directory holds a demo on other text.
    """
    chosen = []
    for kind in PROMPTS:
        left = tokens // 2
        for text in documents(kind, "train"):
            ids = tokenizer(text, verbose=False)["input_ids"]
            chosen.append({"kind": kind, "text": text if len(ids) < left else tokenizer.decode(ids[:left])})
            left -= len(ids) + 1
            if left <= 0:
                break
    random.Random(seed).shuffle(chosen)
    tested = [{"kind": kind, "text": text} for kind in PROMPTS for text in documents(kind, "test")]
    for name, records in ((TRAIN, chosen), (TEST, tested)):
        file, text = output_dir / name, "".join(json.dumps(record) + "\n" for record in records)
        if file.exists() and file.read_text() != text:
            raise ManticoreError(
                f"{output_dir} holds a demo on other text (different --tokens, --seed or Python): remove it, or give "
                "another --output-dir."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in KINDS:
        shutil.copytree(COMPONENTS / name, output_dir / "components" / name, dirs_exist_ok=True)
    recipes = {}
    for blocks, shipped in SHIPPED.items():
        text = (files("manticore_hf.recipes") / shipped).read_text()
        for name in KINDS:
            text = text.replace(f"{ORGANISATION}/{name}", f"components/{name}")
        recipes[blocks] = output_dir / f"{NAMES[blocks]}.yaml"
        recipes[blocks].write_text(text.replace(f"{ORGANISATION}/prose-and-code", TRAIN))
    return recipes


def _beside_one_block(rows, frozen):
    """Of the rows of hybrids and baselines, the one-block hybrid's and the baselines', and the original components'.

    Inside a hybrid whose components are frozen, each is what it was.
    """
    own = next(row for row in rows if row.startswith("hybrid, 1 block"))
    names = [repo.replace("-", "_") for repo in KINDS]
    shown = {row: nats for row, nats in rows.items() if row == own or not row.startswith("hybrid")}
    originals = {ORIGINAL.format(name): frozen[name] for name in names}
    untuned = {f"untuned {name}": frozen[name] for name in ("ensemble", ONLINE) if name in frozen.keys() - rows.keys()}
    return {**{row: nats for row, nats in shown.items() if row not in names}, **untuned, **originals}


def _publish(folder, label, test, rows, scratch):
    """Publishes the hybrid of a stage's directory by reference, and loads it back.

    The directory holds the weights of its components; on the Hub they are repositories of their own, and the hybrid's
    has what differs from them. The card and the report get the losses of this hybrid and of its baselines that the demo
    prints, over the same text: they may not tell another story.

    Returns:
        (the hybrid that was loaded, bytes of its own weights, whether its logits are equal to the last bit).
    """
    own = next(row for row in rows if row.startswith("hybrid, 1 block"))
    told = "untuned components"
    if label == TUNED:
        told = "every model tuned on the same tokens, components once and models with a gate twice"
    result = {
        "data": f"{Path(TEST).name} (Python's standard library, {' and '.join(test)})",
        "own": own,
        "note": f"The first {TESTED} rows of each kind; {told}; the original components as they were published.",
        **_measured(rows, test).to_dict(own),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    parts = [
        ComponentSpec(f"{ORGANISATION}/{repo}", name=name, model=model.component(name))
        for repo, name in zip(KINDS, model.config.component_names)
    ]
    hybrid = ManticoreForCausalLM.from_components(parts, num_blocks=model.config.num_blocks)
    hybrid.hybrid_mixer.load_state_dict(model.hybrid_mixer.state_dict())
    hybrid.config.update({key: getattr(model.config, key) for key in OBJECTIVE})
    place = scratch / folder.name
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors*", "*.log"))
    hybrid.save_pretrained(place)
    out = publish(place, f"{ORGANISATION}/hybrid-{label.replace(' ', '-')}")
    loaded = AutoModelForCausalLM.from_pretrained(out.repo_id, dtype="float32")
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    ids = pad(test["code"].rows[:2]["input_ids"], 0)
    with torch.no_grad():
        equal = torch.equal(loaded(ids).logits, model(ids).logits)
    return loaded, size, equal


def _rows_before_tuning(stages, test):
    """Hybrids whose components are as they were published, and their baselines: {row: losses by kind of text}."""
    rows = {}
    for label, folder in (
        ("hybrid, 1 block, gate trained", stages[1]["pretrain"]),
        ("hybrid, 2 blocks, calibrated only", stages[2]["calibrate"]),
        ("hybrid, 2 blocks, projectors and gate trained", stages[2]["pretrain"]),
    ):
        # The components are the same in all three: their rows come from the first.
        found = _evaluate(ManticoreForCausalLM.from_pretrained(folder), test, label, baselines=not rows)
        rows[label] = found.pop("hybrid")
        rows = {**found, **rows}
    return rows


def _rows_after_tuning(recipe, stages, test, scratch, seed):
    """The hybrids trained end to end, and their baselines trained with the same settings on the same rows."""
    tokenizer = AutoTokenizer.from_pretrained(COMPONENTS / "neox-prose")
    train, _ = load_rows(stage_data(recipe, {}), tokenizer)
    settings, rows, parts = dict(recipe.stages), {}, []
    for repo in KINDS:
        part, name = AutoModelForCausalLM.from_pretrained(COMPONENTS / repo, dtype="float32"), repo.replace("-", "_")
        repair_mixers(part)  # as a hybrid does: the same results, sooner
        _train(part, train, scratch, seed, settings["finetune"], f"{name}, tuned alone")
        parts.append(ComponentSpec(part, name=name))
    apart = set_stage(ManticoreForCausalLM.from_components(parts), "projectors")
    _train(apart, train, scratch, seed, settings["pretrain"], "token gate over the tuned components")
    losses = _evaluate(apart, test, "tuned components")
    for name in apart.config.component_names:
        rows[f"{name}, tuned alone"] = losses[name]
    rows["ensemble of the tuned components"] = losses["ensemble"]
    rows[f"{ONLINE} of the tuned components"] = losses[ONLINE]
    rows["token gate over the tuned components"] = losses["hybrid"]
    for label, folder in (
        ("hybrid, 1 block, tuned jointly", stages[1]["finetune"]),
        ("hybrid, 2 blocks, searched and tuned", stages[2]["finetune"]),
    ):
        model = ManticoreForCausalLM.from_pretrained(folder)
        rows[label] = _evaluate(model, test, label, baselines=False)["hybrid"]
    return rows


def _evaluate(model, test, label, baselines=True):
    """{row: {kind of text: nats of each of its passages}}."""
    rows = {}
    for kind, text in test.items():
        found = measure(model, text, 16, f"Testing {label}, {kind}", baselines)
        for name, nats in found.nats.items():
            rows.setdefault(name, {})[kind] = nats
    return rows


def _measured(rows, test, kinds=None):
    """Rows as measured on some kinds of text, or on all."""
    kinds = kinds or list(test)
    nats = {row: np.concatenate([found[kind] for kind in kinds]) for row, found in rows.items()}
    sizes = (np.concatenate([getattr(test[k], key) for k in kinds]) for key in ("tokens", "bytes"))
    return Measured(nats, *sizes, kinds=[kind for kind in kinds for _ in range(len(test[kind]))])


def _train(model, dataset, scratch, seed, settings, name):
    """Trains a baseline with a stage's settings."""
    set_seed(seed)
    place = {"output_dir": str(scratch / "baselines"), "seed": seed}
    trainer = Trainer(model, TrainingArguments(**place, **training_defaults(), **settings), train_dataset=dataset)
    show_progress(trainer, f"Baseline: {name}", scratch)
    trainer.train()
    model.eval()


def _verdicts(frozen, tuned, test):
    """Sentences on the best hybrid and the best of what a user has without one: of all, and untuned; and on blocks."""
    for rows, when in (({**frozen, **tuned}, ""), (frozen, "Before tuning the components, ")):
        bits = _measured(rows, test).bits_per_byte
        one, other = (
            min((row for row in rows if row.startswith("hybrid") == hybrid), key=bits.get) for hybrid in (True, False)
        )
        what = f"{when}{'the' if when else 'The'} best hybrid ({one.removeprefix('hybrid, ')})"
        yield _compared(rows, one, other, f"the best baseline ({other})", what, test)
    one, two = (next(row for row in tuned if row.startswith(f"hybrid, {n} block")) for n in (1, 2))
    yield _compared(tuned, two, one, "the tuned one-block hybrid", "The tuned two-block hybrid", test)


def _compared(rows, one, other, name, what, test):
    found = _measured(rows, test)
    difference = found.differences(one)[other]
    return claim(name, difference, int(found.bytes.sum()), what, len(found.bytes))


def _print_table(title, rows, test):
    whole, width = _measured(rows, test), max(map(len, rows))
    by_kind = {kind: _measured(rows, test, [kind]).losses for kind in test}
    print(f"\nTest loss in nats per token, and bits per byte (lower is better), {title}")
    print(" " * width + "".join(f"{kind:>9}" for kind in (*test, "both")) + "   bits per byte")
    for label in rows:
        losses = [*(found[label] for found in by_kind.values()), whole.losses[label]]
        cells = "".join(f"{loss:9.3f}" for loss in losses)
        print(f"{label:{width}}{cells}{whole.bits_per_byte[label]:16.4f}")
    print()


@torch.no_grad()
def _gate(model, test):
    """A line on the mean weights over the tokens of each kind of text."""
    said, names = [], model.config.component_names
    for kind in PROMPTS:
        ids = [one for one in test[kind].rows["input_ids"] if len(one) > 64][:16]
        weights = torch.cat([model(torch.tensor([one])).weights[0] for one in ids]).mean(0)
        said.append(f"on {kind}, " + " and ".join(f"{w:.2f} to {name}" for name, w in zip(names, weights.tolist())))
    return f"Mean weights from the gate of the tuned one-block hybrid: {'; '.join(said)}."


def _say(text):
    print(f"[demo] {text}", flush=True)


def main() -> None:
    """The process that `manticore-hf demo` starts, whose environment names the Hub."""
    parser = argparse.ArgumentParser(prog="manticore-hf demo")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="manticore-demo-") as scratch:
            status = run(args.output_dir, args.tokens, args.seed, Path(scratch), args.verbose)
    except ManticoreError as err:
        print(f"manticore-hf demo: {err}", file=sys.stderr)
        status = 2
    raise SystemExit(status)
