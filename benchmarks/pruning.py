"""Is a component distilled from the hybrid better than the same component fine-tuned plainly on the same tokens?

    python benchmarks/pruning.py --output benchmarks/results/pruning.jsonl

With the demo's components and text: a one-block hybrid is trained (gate, then everything), pruned to each component
and trained by recovery distillation; the baseline is that component fine-tuned with the same settings on the same rows
for as many steps as hybrid and distillation together let the component see (one pass for the hybrid's tuning, one for
the distillation). Also paths across components, from a two-block hybrid. Every model is one line of the output.
"""

import argparse
import statistics

import torch
from demo_pair import BLOCK, add_line, compose_pair, read_lines, rows_of, short_training
from tqdm.auto import tqdm
from transformers import Trainer, set_seed

from manticore_hf import prune, set_stage
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.training.distill import DistilTrainer

RATE, GATE_RATE = 3e-4, 1e-2


def _arguments(seed, rate, epochs=1):
    return short_training(seed, rate, num_train_epochs=epochs)


def _soft(blocks, train, seed):
    set_seed(seed)
    model = compose_pair(blocks, train)
    for stage, rate in (("projectors", GATE_RATE if blocks == 1 else 1e-3), ("finetune", RATE)):
        Trainer(model=set_stage(model, stage), args=_arguments(seed, rate), train_dataset=train).train()
    return model.eval()


def _models(train, test, seed):
    """(label, test loss) of every model of one seed, one after the other."""
    soft = _soft(1, train, seed)
    losses = compare_losses(soft, test)
    yield "soft hybrid, 1 block", losses["hybrid"]
    for name in soft.config.component_names:
        yield f"{name} inside the soft hybrid", losses[name]
        fresh = compose_pair()
        plain = set_stage(prune(fresh, name), "finetune")
        yield f"{name} as published", compare_losses(plain, test)["hybrid"]
        DistilTrainer(model=plain, args=_arguments(seed, RATE, 2), train_dataset=train, distil_weight=0).train()
        yield f"{name}, tuned plainly, 2 passes", compare_losses(plain, test)["hybrid"]
        for start, passes, label in ((soft, 1, "from inside the hybrid, 1 pass"), (fresh, 2, "as published, 2 passes")):
            hard = set_stage(prune(start, name), "finetune")
            arguments = _arguments(seed, RATE, passes)
            DistilTrainer(model=hard, args=arguments, train_dataset=train, teacher=soft).train()
            yield f"{name}, distilled, {label}", compare_losses(hard, test)["hybrid"]
    soft = _soft(2, train, seed)
    yield "soft hybrid, 2 blocks", compare_losses(soft, test)["hybrid"]
    first, second = soft.config.component_names
    for path in ([first, second], [second, first]):
        hard = set_stage(prune(soft, path), "finetune")
        yield " > ".join(path) + ", before distillation", compare_losses(hard, test)["hybrid"]
        DistilTrainer(model=hard, args=_arguments(seed, RATE), train_dataset=train, teacher=soft).train()
        yield " > ".join(path) + ", distilled, 1 pass", compare_losses(hard, test)["hybrid"]


def main():
    """Measures the seeds that are not in the output yet, then prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=80_000, help="training tokens of one pass")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to n-1")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", default="benchmarks/results/pruning.jsonl", help="results, one JSON a line")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train, test, lines = rows_of("train", args.tokens // 2 // BLOCK), rows_of("test", 60), read_lines(args.output)
    for seed in range(args.seeds):
        done = {r["label"] for r in lines if r["seed"] == seed}
        if sum(" > " in label and label.endswith(", distilled, 1 pass") for label in done) == 2:
            continue
        for label, loss in tqdm(_models(train.shuffle(seed=seed), test, seed), desc=f"seed {seed}", unit="model"):
            if label not in done:
                add_line(args.output, lines, seed=seed, label=label, tokens=args.tokens, loss=loss)
    print("| model | test loss | seeds |\n|---|---|---|")
    for label in dict.fromkeys(r["label"] for r in lines):
        found = [r["loss"] for r in lines if r["label"] == label]
        print(f"| {label} | {statistics.mean(found):.4f} ({max(found) - min(found):.4f}) | {len(found)} |")


if __name__ == "__main__":
    main()
