"""A hybrid from components to the Hub, on real input: recipes run, baselines trained, compared, published, loaded back.

    manticore-hf demo

Runs against the Hub that the environment names; `manticore-hf demo` starts one on loopback for it. The components are
the two shipped with the package, the text is that of the running Python's standard library (modules the components
have not seen). Both are published to that Hub, and the recipes `demo.yaml` (two blocks) and `demo_one_block.yaml` are
run as `manticore-hf run` runs them. The numbers are what they are: baselines are printed beside the hybrids.
"""

import argparse
import json
import random
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import DataArguments, load_rows, pack, pad
from manticore_hf.evaluation.losses import ONLINE, Measured, make_passages, measure
from manticore_hf.hub.publish import publish
from manticore_hf.training.freezing import set_stage
from manticore_hf.training.recipe import load_recipe, run_recipe
from manticore_hf.utils.claims import claim
from manticore_hf.utils.plots import plot_losses

COMPONENTS = Path(__file__).parent.parent / "demo_components"
ORGANISATION = "manticore-demo"
TUNED = "everything tuned"
KINDS = {"neox-prose": "prose", "mamba-code": "code"}
RECIPES = {1: files("manticore_hf.recipes") / "demo_one_block.yaml", 2: files("manticore_hf.recipes") / "demo.yaml"}
PROMPTS = {"prose": "Return the name of the", "code": "def close(self):\n    self."}


def run(output_dir: Path, tokens: int, seed: int) -> int:
    """Runs the demo.

    Args:
        output_dir: Where everything is kept.
        tokens: Training tokens of every model and hybrid.
        seed: Random seed.

    Returns:
        The exit status: 0 if what was published came back equal to the last bit.
    """
    start = time.time()
    logging.set_verbosity_error()
    output_dir.mkdir(parents=True, exist_ok=True)
    api, tokenizer = HfApi(), AutoTokenizer.from_pretrained(COMPONENTS / "neox-prose")
    recipe = load_recipe(RECIPES[1])
    for name in KINDS:
        repo_id = api.create_repo(f"{ORGANISATION}/{name}", exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=COMPONENTS / name)
    _publish_text(api, recipe.data["data"], tokenizer, tokens, seed, output_dir / "text")
    block = recipe.data["block_size"]
    packed = {kind: pack(documents(kind, "test"), tokenizer, block, 60, keep_text=True) for kind in PROMPTS}
    test = {kind: make_passages(rows, tokenizer) for kind, rows in packed.items()}
    tested = sum(int(text.tokens.sum()) for text in test.values())
    _say(f"About {tokens:,} training tokens, {tested:,} test tokens, half prose and half code.")

    stages = {}
    for blocks, path in RECIPES.items():
        _say(f"manticore-hf run recipes/{path.name}")
        results = run_recipe(path, output_dir / path.stem, seed)
        stages[blocks] = {result["stage"]: folder for folder, result in results}
    frozen = _rows_before_tuning(stages, test)
    tuned = _rows_after_tuning(recipe, stages, test, output_dir, seed)
    _print_table("components as they are", frozen, test)
    _print_table("everything tuned on the same tokens", tuned, test)
    _say("Passes over the text: 1 for a component, 2 with a gate (alone, then all), 3 with a search before that.")
    _verdict({**frozen, **tuned}, test)
    plot_losses(_measured({**frozen, **tuned}, test).losses, output_dir / "losses.png")
    model = ManticoreForCausalLM.from_pretrained(stages[1]["finetune"])
    _print_mixture(model, test)

    same = True
    for label, stage, rows in (("components as they are", "pretrain", frozen), (TUNED, "finetune", tuned)):
        loaded, equal = _publish(stages[1][stage], label, test, rows)
        same &= equal
    for kind, prompt in PROMPTS.items():
        given = tokenizer(prompt, return_tensors="pt")
        set_seed(seed)
        out = loaded.generate(**given, max_new_tokens=48, do_sample=True, temperature=0.7, top_k=40)
        print(f"--- {kind} ---\n{tokenizer.decode(out[0], skip_special_tokens=True)}")
    _say(f"Done in {time.time() - start:.0f} s.")
    return 0 if same else 1


def _publish_text(api, repo_id, tokenizer, tokens, seed, folder):
    """A data set repo with as many tokens of prose as of code, document by document in random order."""
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
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))
    api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder)


def _publish(folder, label, test, rows):
    """Publishes a stage's directory and loads it back: the hybrid, and whether its logits are equal to the last bit.

    The card gets the losses of this hybrid and of its baselines on the test text.
    """
    own = next(row for row in rows if row.startswith("hybrid, 1 block"))
    shown = {row: losses for row, losses in rows.items() if row == own or not row.startswith("hybrid")}
    results = [
        {
            "data": f"Python's standard library, {kind}",
            "own": own,
            "note": "Files of their own for the test; every model tuned on the same tokens."
            if label == TUNED
            else "Files of their own for the test; the components as they were published.",
            **_measured(shown, test, [kind]).to_dict(own),
        }
        for kind in test
    ]
    (folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    out = publish(folder, f"{ORGANISATION}/hybrid-{label.replace(' ', '-')}")
    repo_id = out.repo_id
    model, loaded = (AutoModelForCausalLM.from_pretrained(where, dtype="float32") for where in (folder, repo_id))
    weights, total = (folder / "model.safetensors").stat().st_size, sum(p.numel() for p in model.parameters()) * 4
    _say(f"Published {repo_id}@{out.commit[:7]}: {weights:,} bytes of weights, of {total:,} ({label}).")
    ids = pad(test["code"].rows[:2]["input_ids"], 0)
    with torch.no_grad():
        equal = torch.equal(loaded(ids).logits, model(ids).logits)
    _say(f"Loaded it back through AutoModelForCausalLM; logits equal to the last bit: {'yes' if equal else 'NO'}.")
    return loaded, equal


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


def _rows_after_tuning(recipe, stages, test, output_dir, seed):
    """The hybrids trained end to end, and their baselines trained with the same settings on the same rows."""
    tokenizer = AutoTokenizer.from_pretrained(COMPONENTS / "neox-prose")
    train, _ = load_rows(DataArguments(**recipe.data), tokenizer)
    settings, rows, parts = dict(recipe.stages), {}, []
    for repo_id in recipe.components:
        part = AutoModelForCausalLM.from_pretrained(repo_id, dtype="float32")
        _train(part, train, output_dir / "baselines", seed, settings["finetune"])
        parts.append(ComponentSpec(part, name=repo_id.split("/")[-1].replace("-", "_")))
    apart = ManticoreForCausalLM.from_components(parts)
    _train(set_stage(apart, "projectors"), train, output_dir / "baselines", seed, settings["pretrain"])
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
    return Measured(nats, *(np.concatenate([getattr(test[k], key) for k in kinds]) for key in ("tokens", "bytes")))


def _train(model, dataset, output_dir, seed, settings):
    """Trains a baseline with a stage's settings."""
    _say(f"Training a baseline: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters.")
    defaults = {"seed": seed, "report_to": "none", "use_cpu": not torch.accelerator.is_available()}
    set_seed(seed)
    arguments = TrainingArguments(output_dir=str(output_dir), **defaults, **settings)
    Trainer(model=model, args=arguments, train_dataset=dataset).train()
    model.eval()


def _verdict(rows, test):
    """Says how the best hybrid does against the best of everything a user has without one."""
    found = _measured(rows, test)
    hybrids = {label: bits for label, bits in found.bits_per_byte.items() if label.startswith("hybrid")}
    baselines = {label: bits for label, bits in found.bits_per_byte.items() if label not in hybrids}
    one, other = min(hybrids, key=hybrids.get), min(baselines, key=baselines.get)
    size, difference = int(found.bytes.sum()), found.differences(one)[other]
    _say(claim(f"the best baseline ({other})", difference, size, f"The best hybrid ({one})") + "\n")


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
def _print_mixture(model, test):
    names = model.config.component_names
    print("Mixture weights of the tuned one-block hybrid, mean over tokens: " + " / ".join(names))
    for kind in PROMPTS:
        ids = [one for one in test[kind].rows["input_ids"] if len(one) > 64][:16]
        weights = torch.cat([model(torch.tensor([one])).weights[0] for one in ids]).mean(0)
        print(f"  on {kind}: " + " / ".join(f"{w:.2f}" for w in weights.tolist()))
    print()


def _say(text):
    print(f"[demo] {text}", flush=True)


def main() -> None:
    """`python -m manticore_hf.demo.demo`, against the Hub of the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=80_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    raise SystemExit(run(args.output_dir, args.tokens, args.seed))


if __name__ == "__main__":
    main()
