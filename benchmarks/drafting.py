"""Would self-drafting pay? One component drafts tokens, the soft hybrid verifies them in one pass.

    manticore-hf demo --output-dir demo && python benchmarks/drafting.py demo/demo_one_block/2-finetune \
        --text demo/text/train.jsonl --output benchmarks/results/drafting.json

Measures what decides it, without building it. How often a component's next token is what the hybrid takes (greedy:
along the hybrid's own continuations; sampling: the mass min(p, q) that speculative sampling accepts). What the steps
cost (one cached token of hybrid and component, a cached pass over several). From these follows the speed-up of

* "plain": the component drafts with a cache of its own, the hybrid verifies;
* "shared": for hybrids of one block, where the drafting component's work is part of the hybrid's and is not repeated:
  only the other components still have to read the draft;

for the best draft length, as an upper bound: rolling back recurrent states after a rejection is taken to cost nothing.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, set_seed

from manticore_hf import ManticoreForCausalLM

PROMPT, NEW, LENGTHS = 64, 64, range(1, 9)


def prompts(path, tokenizer, count):
    """Beginnings of documents [count, PROMPT]."""
    rows = []
    for line in Path(path).read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], verbose=False)["input_ids"]
        if len(ids) >= PROMPT:
            rows.append(ids[:PROMPT])
    return torch.tensor(rows[:count])


@torch.no_grad()
def acceptance(model, ids, sample):
    """{component: acceptance [rows, NEW]}: 0 or 1 where greedy, probabilities where sampled."""
    set_seed(0)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=sample, top_k=0)
    hybrid = model(out, use_cache=False).logits[:, PROMPT - 1 : -1].float()
    found = {}
    for name in model.config.component_names:
        own = model.component(name)(input_ids=out, use_cache=False).logits[:, PROMPT - 1 : -1, : hybrid.shape[-1]]
        if sample:
            found[name] = torch.minimum(hybrid.softmax(-1), own.float().softmax(-1)).sum(-1)
        else:
            found[name] = (hybrid.argmax(-1) == own.argmax(-1)).float()
    return found


def tokens_per_round(chances, length, seed=0):
    """Mean tokens a verification yields: the drafts accepted before the first rejection, and the hybrid's own one."""
    draw, total, rounds = random.Random(seed), 0, 0
    for row in chances.tolist():
        at = 0
        while at < len(row):
            taken = 0
            while taken < length and at + taken < len(row) and draw.random() < row[at + taken]:
                taken += 1
            at, total, rounds = at + taken + 1, total + taken + 1, rounds + 1
    return total / rounds


@torch.no_grad()
def step_times(model, ids, repeats):
    """Median seconds of a cached call: {(who, tokens): seconds}, all of them in turn in every repeat."""
    parts = {name: model.component(name) for name in model.config.component_names}
    calls = [("hybrid", 1), *((name, n) for name in parts for n in (1, *(k + 1 for k in LENGTHS)))]
    calls += [("hybrid", k + 1) for k in LENGTHS]
    times = {call: [] for call in calls}
    for _ in tqdm(range(repeats + 1), desc="timing"):
        for who, tokens in calls:
            run = model if who == "hybrid" else parts[who]
            key = "past_key_values" if who == "hybrid" or "mamba" not in run.config.model_type else "cache_params"
            state = getattr(run(input_ids=ids[:1], use_cache=True), key)
            token = ids[:1, :tokens]
            start = time.perf_counter()
            run(input_ids=token, use_cache=True, **{key: state})
            times[who, tokens].append(time.perf_counter() - start)
    return {call: statistics.median(values[1:]) for call, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or repo of a soft hybrid")
    parser.add_argument("--text", required=True, help="jsonl file with a text column, for the prompts")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model, tokenizer = ManticoreForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    model.eval()
    ids, names = prompts(args.text, tokenizer, args.prompts), model.config.component_names
    times = step_times(model, ids, args.repeats)
    hybrid = times["hybrid", 1]
    print({f"{who}, {n} token(s)": round(1e3 * seconds, 2) for (who, n), seconds in times.items()}, "ms")
    results = []
    for kind, sample in (("greedy", False), ("sampling", True)):
        for name, chances in acceptance(model, ids, sample).items():
            gain = {k: tokens_per_round(chances, k) for k in LENGTHS}
            costs = {"plain": {k: k * times[name, 1] + times["hybrid", k + 1] for k in LENGTHS}}
            if model.config.num_blocks == 1:
                rest = [other for other in names if other != name]
                costs["shared"] = {
                    k: (k + 1) * times[name, 1] + sum(times[other, k + 1] for other in rest) for k in LENGTHS
                }
            for way, cost in costs.items():
                best = max(LENGTHS, key=lambda k: gain[k] * hybrid / cost[k])
                results.append({
                    "decoding": kind, "draft": name, "way": way, "acceptance": chances.mean().item(), "length": best,
                    "tokens per round": gain[best], "speed-up at most": gain[best] * hybrid / cost[best],
                })  # fmt: skip
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in results[-1].items()})
    if args.output:
        seconds = {f"{who} {n}": value for (who, n), value in times.items()}
        args.output.write_text(json.dumps({"blocks": model.config.num_blocks, "seconds": seconds, "results": results},
                                          indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
