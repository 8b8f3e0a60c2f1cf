"""Which learning rates the demo's recipes use: every rate on the validation split, never on the test split.

    python benchmarks/demo_rates.py --output benchmarks/results/demo_rates.jsonl

The rate of the fine-tuning is chosen for the *components* alone, so that the hybrid's baselines have the best one; the
rates of gate and projectors with the components frozen. Same text, tokens and settings as the demo. Every run is one
line of the output; a killed benchmark goes on where it stopped.
"""

import argparse

import torch
from demo_pair import BLOCK, add_line, compose_pair, read_lines, rows_of, short_training
from manticore_hf.modeling.mixers_manticore import repair_mixers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, Trainer, set_seed

from manticore_hf import set_stage
from manticore_hf.demo.demo import COMPONENTS, KINDS

TUNING = (1e-4, 3e-4, 1e-3)
PROJECTING = (1e-3, 3e-3, 1e-2)


def _jobs():
    for name in KINDS:
        for rate in TUNING:
            yield name, rate
    for what in ("gate", "two blocks"):
        for rate in PROJECTING:
            yield what, rate


def run(what, rate, train, validation, seed):
    """Trains one model at one rate; returns its loss on the validation rows."""
    set_seed(seed)
    if what in KINDS:
        model = AutoModelForCausalLM.from_pretrained(COMPONENTS / what, dtype="float32")
        repair_mixers(model)  # as a hybrid does
    else:
        model = set_stage(compose_pair(1 if what == "gate" else 2, train), "projectors")
    Trainer(model=model, args=short_training(seed, rate), train_dataset=train).train()
    model.eval()
    with torch.no_grad():
        batches = torch.tensor(validation["input_ids"]).split(16)
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids) for ids in batches]
    return sum(losses) / len(validation)


def main():
    """Measures what is not in the output yet, then prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=80_000, help="training tokens, as in the demo")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", default="benchmarks/results/demo_rates.jsonl", help="results, one JSON a line")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train = rows_of("train", args.tokens // BLOCK // 2).shuffle(seed=args.seed)
    validation, lines = rows_of("validation", 60), read_lines(args.output)
    done = {(r["what"], r["rate"]) for r in lines}
    for what, rate in tqdm([job for job in _jobs() if job not in done], unit="run"):
        loss = run(what, rate, train, validation, args.seed)
        result = {"what": what, "rate": rate, "tokens": args.tokens, "seed": args.seed, "validation_loss": loss}
        add_line(args.output, lines, **result)
    print("| trained | " + " | ".join(f"{rate:g}" for rate in sorted({*TUNING, *PROJECTING})) + " |")
    for what in dict.fromkeys(r["what"] for r in lines):
        found = {r["rate"]: f"{r['validation_loss']:.4f}" for r in lines if r["what"] == what}
        print(f"| {what} | " + " | ".join(found.get(rate, "") for rate in sorted({*TUNING, *PROJECTING})) + " |")


if __name__ == "__main__":
    main()
