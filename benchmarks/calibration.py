"""What a calibrated start saves: loss against tokens of projector training, for each way to initialise projectors.

    python benchmarks/calibration.py --pair LLAMA MAMBA --pair NEOX MAMBA --train train.txt --valid valid.txt \
        --test test.txt --document-separator '<|endoftext|>' --output benchmarks/results/calibration.jsonl

Two components that share a tokenizer are cut into two blocks; components stay frozen, projectors and mixture are
trained by the standard Trainer at a constant rate after a short warmup, so that one run passes every budget of the
curve. Left free, alpha drifts to one component, which hides what the projectors are worth: `--alpha fixed` keeps it at
1/2 in the first block and gives every start the same reference component (the better one on validation text). The rate
is chosen for each pair and variant on validation text (seed 0, 100k tokens). Every run is one line of the output; a
killed benchmark goes on where it stopped. `--summary` prints the tables and draws the curves from the file alone.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

VARIANTS = {
    "paper": {"preset": "paper"},  # default initialisation, gates equal to alpha, mixed embeddings
    "default": {"projector_init": "default"},  # from here on: no gates, native embeddings and heads
    "identity": {"projector_init": "identity"},
    "calibrated": {"projector_init": "identity"},  # then calibrated
}
BUDGETS = (0, 10_000, 30_000, 100_000, 300_000, 1_000_000)
RATES, RATE_TOKENS = (3e-3, 1e-2, 3e-2, 1e-1), 100_000
BLOCK, BATCH, BLOCKS, CALIBRATION_TOKENS = 256, 4, 2, 40_000
STEP = BLOCK * BATCH


class Curve(TrainerCallback):
    """Notes the loss on a text whenever a budget is spent."""

    def __init__(self, model, text):
        self.model, self.ids, self.losses = model, torch.tensor(text["input_ids"]), {}
        self.note(0)

    @torch.no_grad()
    def note(self, tokens):
        training = self.model.training
        self.model.eval()
        total = 0.0
        for ids in self.ids.split(32):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        self.losses[str(tokens)] = total / self.ids[:, 1:].numel()
        self.model.train(training)

    def on_step_end(self, args, state, control, **kwargs):
        for budget in BUDGETS[1:]:
            if state.global_step == round(budget / STEP):
                self.note(budget)


def run(pair, variant, texts, tokens, seed, rate, test, fixed):
    """One training run. Returns its curve, the baselines' losses, and what the mixture has become."""
    from manticore_hf import ManticoreForCausalLM, set_stage
    from manticore_hf.evaluation.losses import compare_losses
    from manticore_hf.training.calibrate import calibrate_projectors

    set_seed(seed)
    rows = texts["train"].shuffle(seed=seed)
    settings = {"num_blocks": BLOCKS, "dtype": "float32", **VARIANTS[variant]}
    model = ManticoreForCausalLM.from_components(pair, **settings)
    reference = None
    if fixed:
        alone = compare_losses(model, texts["valid"].select(range(32)))
        reference = min(model.config.component_names, key=alone.get)
        set_seed(seed)
        model = ManticoreForCausalLM.from_components(pair, reference_component=reference, **settings)
        model.set_mixture_weights([[0.5, 0.5], None])
    if variant == "calibrated":
        calibrate_projectors(model, rows, tokens=CALIBRATION_TOKENS, reference_component=reference)
    set_stage(model, "projectors")
    baselines = compare_losses(model, texts[test], batch_size=32)
    baselines.pop("hybrid")
    curve = Curve(model, texts[test])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=round(tokens / STEP),
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            save_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=True,
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[curve]).train()
    return {"curve": curve.losses, "baselines": baselines, "mixture_weights": model.mixture_weights().tolist()}


def _jobs(pairs, seeds):
    """(pair, variant, purpose, seed, rate or None): first what chooses the rates, then the curves, seed by seed."""
    for pair in pairs:
        for variant in VARIANTS:
            for rate in RATES:
                yield pair, variant, "rate", 0, rate
    for seed in range(seeds):
        for pair in pairs:
            for variant in VARIANTS:
                yield pair, variant, "curve", seed, None


def _best_rate(lines, pair, variant):
    tried = [r for r in lines if (r["pair"], r["variant"], r["purpose"]) == (pair, variant, "rate")]
    return min(tried, key=lambda r: r["curve"][str(RATE_TOKENS)])["rate"]


def _texts(args, tokenizer):
    from manticore_hf.evaluation.data import pack

    limits = {"train": max(BUDGETS) // BLOCK + BATCH, "valid": 128, "test": 128}
    texts = {}
    for name, limit in limits.items():
        documents = [d.strip() for d in Path(getattr(args, name)).read_text().split(args.document_separator)]
        texts[name] = pack([d for d in documents if d], tokenizer, BLOCK, limit)
    return texts


def measure(args):
    """Runs what is not in the output yet."""
    tokenizer = AutoTokenizer.from_pretrained(args.pair[0][0])
    if args.document_token:
        tokenizer.eos_token = args.document_token
    texts = _texts(args, tokenizer)
    paths = {" + ".join(Path(part).name for part in pair): pair for pair in args.pair}
    lines = _read(args.output)
    done = {
        (r["pair"], r["variant"], r["purpose"], r["seed"], r["rate_asked"])
        for r in lines
        if r["purpose"] == "rate" or max(map(int, r["curve"])) >= args.tokens
    }
    for job in tqdm(list(_jobs(list(paths), args.seeds)), unit="run"):
        if job in done:
            continue
        pair, variant, purpose, seed, rate = job
        used = rate or _best_rate(lines, pair, variant)
        tokens, text = (RATE_TOKENS, "valid") if purpose == "rate" else (args.tokens, "test")
        found = run(paths[pair], variant, texts, tokens, seed, used, text, args.alpha == "fixed")
        found = {
            "pair": pair,
            "variant": variant,
            "purpose": purpose,
            "seed": seed,
            "rate_asked": rate,
            "rate": used,
            **found,
        }
        lines.append(found)
        with open(args.output, "a") as file:
            file.write(json.dumps(found) + "\n")


def _read(path):
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarise(lines, picture):
    """Prints a table for each pair (mean over seeds; in brackets their range and number) and draws the curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = [r for r in lines if r["purpose"] == "curve"]
    budgets = [n for n in BUDGETS if any(str(n) in r["curve"] for r in curves)]
    pairs = list(dict.fromkeys(r["pair"] for r in curves))
    figure, axes = plt.subplots(1, len(pairs), figsize=(5.2 * len(pairs), 4.2), squeeze=False)
    for axis, pair in zip(axes[0], pairs):
        baselines = next(r.get("baselines", r.get("rivals")) for r in curves if r["pair"] == pair)
        print(f"\n{pair}; untrained: " + ", ".join(f"{name} {loss:.3f}" for name, loss in baselines.items()))
        print("\n| start | rate | " + " | ".join(f"{n:,}" for n in budgets) + " | alpha in block 1 |")
        print("|---" * (len(budgets) + 3) + "|")
        for variant in VARIANTS:
            runs = [r for r in curves if (r["pair"], r["variant"]) == (pair, variant)]
            if not runs:
                continue
            # A seed may have a short run and a long one, whose first points are the same: the long one counts.
            runs = [
                max((r for r in runs if r["seed"] == seed), key=lambda r: len(r["curve"]))
                for seed in sorted({r["seed"] for r in runs})
            ]
            points = {n: [r["curve"][str(n)] for r in runs if str(n) in r["curve"]] for n in budgets}
            points = {n: losses for n, losses in points.items() if losses}
            means = [statistics.mean(losses) for losses in points.values()]
            cells = [f"{statistics.mean(p):.3f} ({max(p) - min(p):.3f}, {len(p)})" for p in points.values()]
            alpha = " / ".join(f"{statistics.mean(r['mixture_weights'][0][k] for r in runs):.2f}" for k in range(2))
            print(f"| {variant} | {runs[0]['rate']:g} | " + " | ".join(cells) + f" | {alpha} |")
            axis.plot([max(n, 3_000) for n in points], means, marker="o", label=variant)
        axis.axhline(baselines["ensemble"], color="grey", linestyle="--", label="plain ensemble, untrained")
        axis.set(
            xscale="log",
            title=pair,
            xlabel="tokens of projector training (leftmost: none)",
            ylabel="test loss, nats per token",
        )
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main():
    """Measures, then summarises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar="DIRECTORY", help="two components")
    for name in ("train", "valid", "test"):
        parser.add_argument(f"--{name}", help=f"text file to {name} on")
    parser.add_argument("--document-separator", default="\n\n", help="what stands between the documents of a file")
    parser.add_argument("--document-token", help="token that ends a document (default: the tokenizer's eos_token)")
    parser.add_argument("--output", default="benchmarks/results/calibration.jsonl", help="results, one JSON a line")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to n-1")
    parser.add_argument("--tokens", type=int, default=max(BUDGETS), help="length of the curves")
    parser.add_argument("--alpha", choices=("free", "fixed"), default="free", help="whether alpha is trained")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--summary", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.summary:
        measure(args)
    summarise(_read(args.output), Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
