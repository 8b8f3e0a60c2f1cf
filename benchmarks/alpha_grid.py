"""Is the searched alpha a good one? Its loss after fine-tuning against those of a grid of fixed alphas.

    python benchmarks/alpha_grid.py --pair LLAMA MAMBA --text shakespeare.txt --document-token "<s>"

One block, static mixture, native embeddings. Every alpha in {0, 0.1, ..., 1} is fixed and everything else fine-tuned on
the same tokens with the same settings; each strategy searches on those tokens, then the components are rewound to their
pretrained weights and fine-tuned at the alpha it found (the paper's order). Every run is one line of the output; a
killed benchmark goes on where it stopped.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from demo_pair import BLOCK, add_line, read_lines, short_training
from tqdm.auto import tqdm
from transformers import AutoTokenizer, Trainer, set_seed

GRID = [round(0.1 * i, 1) for i in range(11)]
BATCH = 4


def _compose(pair, seed):
    from manticore_hf import ManticoreForCausalLM

    set_seed(seed)
    return ManticoreForCausalLM.from_components(pair, num_blocks=1, mixture="static", dtype="float32")


def tune(pair, weight, rows, test, seed, rate):
    """Fine-tunes at a fixed alpha [weight, 1 - weight]; returns the losses on the test rows."""
    from manticore_hf import set_stage
    from manticore_hf.evaluation.losses import compare_losses

    model = _compose(pair, seed)
    model.set_mixture_weights([[weight, 1 - weight]])
    arguments = short_training(seed, rate, per_device_train_batch_size=BATCH)
    Trainer(model=set_stage(model, "finetune"), args=arguments, train_dataset=rows).train()
    return compare_losses(model, test, batch_size=32)


def search(pair, strategy, rows, seed, rate, alpha_rate):
    """The alpha of the first component that a strategy finds, and the way there."""
    from manticore_hf import SearchArguments, SearchTrainer
    from manticore_hf.training.search import alpha_history

    model = _compose(pair, seed)
    more = {"strategy": strategy, "alpha_learning_rate": alpha_rate, "logging_steps": 5, "logging_strategy": "steps"}
    arguments = short_training(seed, rate, SearchArguments, per_device_train_batch_size=BATCH, **more)
    trainer = SearchTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    steps, values = alpha_history(trainer.state.log_history)
    path = next(v for key, v in values.items() if key.endswith(model.config.component_names[0]))
    return model.mixture_weights()[0, 0].item(), dict(zip(steps, path))


def measure(args):
    """Runs what is not in the output yet."""
    from manticore_hf.evaluation.data import pack
    from manticore_hf.training.search import STRATEGIES

    tokenizer = AutoTokenizer.from_pretrained(args.pair[0])
    if args.document_token:
        tokenizer.eos_token = args.document_token
    text = Path(args.text).read_text()
    test = pack([text[-len(text) // 10 :]], tokenizer, BLOCK, 128)
    train = pack([text[: -len(text) // 10]], tokenizer, BLOCK)
    lines = read_lines(args.output)
    done = {(r["seed"], r["how"]) for r in lines}
    also = dict(one.split("=") for one in args.also)
    jobs = [(seed, how) for seed in range(args.seeds) for how in [*map(str, GRID), *STRATEGIES, *also]]
    for seed, how in tqdm(jobs, unit="run"):
        if (seed, how) in done:
            continue
        rows, path = train.shuffle(seed=seed).select(range(args.tokens // BLOCK)), None
        if how in STRATEGIES:
            weight, path = search(args.pair, how, rows, seed, args.rate, args.alpha_rate)
        else:
            weight = float(also.get(how, how))
        losses = tune(args.pair, weight, rows, test, seed, args.rate)
        line = {
            "pair": [Path(p).name for p in args.pair],
            "text": Path(args.text).parent.name,
            "tokens": args.tokens,
            "seed": seed,
            "how": how,
            "alpha": weight,
            "losses": losses,
            "path": path,
        }
        add_line(args.output, lines, **line)


def summarise(lines):
    """Prints the grid and each strategy's loss as a ratio to the best on the grid."""
    for seed in sorted({r["seed"] for r in lines}):
        mine = [r for r in lines if r["seed"] == seed]
        grid = [r for r in mine if r["how"] in map(str, GRID)]
        best = min(grid, key=lambda r: r["losses"]["hybrid"])
        print(f"\nseed {seed}, {mine[0]['tokens']:,} tokens of {mine[0]['text']}: {' + '.join(mine[0]['pair'])}\n")
        print("| alpha of the first | test loss |\n|---|---|")
        for r in grid:
            print(f"| {r['alpha']:.1f} | {r['losses']['hybrid']:.4f}{' (best)' if r is best else ''} |")
        print("\n| strategy | alpha found | test loss | against the best on the grid |\n|---|---|---|---|")
        for r in mine:
            if r not in grid:
                ratio = r["losses"]["hybrid"] / best["losses"]["hybrid"] - 1
                print(f"| {r['how']} | {r['alpha']:.3f} | {r['losses']['hybrid']:.4f} | {ratio:+.2%} |")


def main():
    """Measures, then summarises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, metavar="DIRECTORY", help="two components")
    parser.add_argument("--text", help="text file; its last tenth is the test")
    parser.add_argument("--document-token", help="token that ends a document (default: the tokenizer's eos_token)")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=ALPHA", help="further alphas, fixed")
    parser.add_argument("--tokens", type=int, default=60_000, help="training tokens of every run")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of the weights")
    parser.add_argument("--alpha-rate", type=float, default=0.05, help="learning rate of alpha")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to n-1")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", default="benchmarks/results/alpha_grid.jsonl", help="results, one JSON a line")
    parser.add_argument("--summary", action="store_true", help="only print what is there")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.summary:
        measure(args)
    summarise(read_lines(args.output))


if __name__ == "__main__":
    main()
