"""Texts that the components wrote themselves, mixed: does the search find who wrote how much?

    python benchmarks/synthetic_mixes.py --pair DIR_A DIR_B --prompts sentences.txt --output mixes.jsonl

As in the paper's code, every component goes on from the first four words of each line of a text (there the validation
split of Penn Treebank), for 30 tokens. (There one component draws them and the other takes the likeliest; here both
draw, so that the texts differ in nothing but who wrote them.) Of both, shares are mixed (there each alone, and both);
on each mix alpha is searched, and the components are tuned at the alpha found and at each fixed one, by the functions
of alpha_grid.py. Every line of the output is one mix and seed; a killed run goes on where it stopped.
"""

import argparse
import hashlib
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from alpha_grid import search, tune
from demo_pair import add_line, read_lines
from manticore_hf.modeling.mixers_manticore import repair_mixers
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from manticore_hf.evaluation.data import pack
from manticore_hf.utils.files import read_json, write_json

WORDS, NEW = 4, 30  # of a prompt, and tokens that are written
BATCH = 32


@torch.no_grad()
def write_texts(source, prompts, seed, file):
    """What a component writes after each prompt, kept in a file."""
    if file.exists():
        return read_json(file)["texts"]
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    repair_mixers(model)
    texts = []
    set_seed(seed)
    for start in range(0, len(prompts), BATCH):
        given = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True)
        given.pop("token_type_ids", None)
        options = {"do_sample": True, "top_k": 0, "min_new_tokens": NEW, "max_new_tokens": NEW}
        out = model.generate(**given, **options, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(out, skip_special_tokens=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"texts": texts})
    return texts


def mixed(texts, share, seed):
    """(training, test) texts of which a share is by the first component; every prompt is in one of them only."""
    order = list(range(len(texts[0])))
    random.Random(seed).shuffle(order)
    first = round(share * len(order))
    chosen = [texts[0 if place < first else 1][number] for place, number in enumerate(order)]
    random.Random(seed + 1).shuffle(chosen)
    kept = round(0.7 * len(chosen))  # as in the paper's code
    return chosen[:kept], chosen[kept:]


def measure(args):
    """Runs what is not in the output yet."""
    lines = [line.split()[:WORDS] for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()]
    prompts = [" ".join(words) for words in lines if len(words) == WORDS][: args.texts]
    results = read_lines(args.output)
    done = {(one["share"], one["seed"]) for one in results}
    tokenizer = AutoTokenizer.from_pretrained(args.pair[0])
    for seed in range(args.seeds):
        texts = []
        for number, source in enumerate(args.pair):
            what = hashlib.sha256("\n".join([source, str(seed), *prompts]).encode()).hexdigest()[:10]
            texts.append(write_texts(source, prompts, seed + 1000 * number, Path(args.work) / f"{what}.json"))
        for share in args.shares:
            if (share, seed) in done:
                continue
            train, test = (pack(part, tokenizer, args.block_size) for part in mixed(texts, share, seed))
            alpha, _ = search(args.pair, args.strategy, train, seed, args.rate, args.alpha_rate)
            grid = {f"{one:g}": tune(args.pair, one, train, test, seed, args.rate)["hybrid"] for one in args.grid}
            losses = tune(args.pair, alpha, train, test, seed, args.rate)
            line = {"pair": [Path(one).name for one in args.pair], "share": share, "seed": seed, "alpha": alpha}
            add_line(args.output, results, **line, losses=losses, grid=grid, tokens=len(train) * args.block_size)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, required=True, metavar="DIRECTORY", help="two components of one tokenizer")
    parser.add_argument("--prompts", required=True, help="text file, a sentence to a line")
    parser.add_argument("--texts", type=int, default=3370, help="prompts at most (as many as Penn Treebank has)")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0, 0.25, 0.5, 0.75, 1], help="of the first one's texts"
    )
    parser.add_argument("--grid", nargs="*", type=float, default=[0, 0.25, 0.5, 0.75, 1], help="alphas that are fixed")
    parser.add_argument("--strategy", default="darts")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of the weights")
    parser.add_argument("--alpha-rate", type=float, default=0.01, help="learning rate of alpha")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to n-1")
    parser.add_argument("--work", default="synthetic-texts", help="directory for what the components write")
    parser.add_argument("--output", default="benchmarks/results/synthetic_mixes.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| share of the first | alpha found | loss there | best fixed alpha | its loss |\n|---|---|---|---|---|")
    for one in sorted(measure(args), key=lambda one: (one["share"], one["seed"])):
        best = min(one["grid"], key=one["grid"].get)
        found = f"{one['alpha']:.3f} | {one['losses']['hybrid']:.4f}"
        print(f"| {one['share']:g} | {found} | {best} | {one['grid'][best]:.4f} |")


if __name__ == "__main__":
    main()
