"""Would self-drafting pay? One component drafts tokens, the soft hybrid verifies them in one pass.

    manticore-hf demo --output-dir demo && python benchmarks/drafting.py demo/one_block/2-finetune \
        --text demo/text/train.jsonl --output benchmarks/results/drafting.json

Measures what decides it, without building it. How often a component's next token is what the hybrid takes (greedy:
along the hybrid's own continuations; sampling: the mass min(p, q) that speculative sampling accepts). What the steps
cost (one cached token of hybrid and component, a cached pass over several). From these follows the speed-up of

* "plain": the component drafts with a cache of its own, the hybrid verifies;
* "shared": for hybrids of one block, where the drafting component's work is part of the hybrid's and is not repeated:
  only the other components still have to read the draft;

for the best draft length, as an upper bound: rolling back recurrent states after a rejection is taken to cost nothing.
Greedy "plain" decoding is then run for real and timed against `generate`. After a rejection the recurrent states go
back to what they were before the pass, and the tokens accepted since are read again with the next draft, so that a
round is one pass of the hybrid; the texts must be equal.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from manticore_hf.modeling.components_manticore import cache_argument
from tqdm.auto import tqdm
from transformers import AutoTokenizer, set_seed
from transformers.cache_utils import LinearAttentionCacheLayerMixin

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
            key = cache_argument(run.forward)
            state = getattr(run(input_ids=ids[:1], use_cache=True), key)
            token = ids[:1, :tokens]
            start = time.perf_counter()
            run(input_ids=token, use_cache=True, **{key: state})
            times[who, tokens].append(time.perf_counter() - start)
    return {call: statistics.median(values[1:]) for call, values in times.items()}


class Rollback:
    """Takes a hybrid's or component's cache back to where it was: attention is cropped, recurrent states are copied."""

    def __init__(self, cache):
        self.cache = cache
        self.attention = [layer for layer in cache.layers if not isinstance(layer, LinearAttentionCacheLayerMixin)]
        self.seen = self.attention[0].get_seq_length() if self.attention else 0
        self.recurrent = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        self.states = [
            {at: state.clone() for at, state in states.items()}
            for layer in self.recurrent
            for states in (layer.conv_states, layer.recurrent_states)
        ]

    def __call__(self):
        now = [states for layer in self.recurrent for states in (layer.conv_states, layer.recurrent_states)]
        for states, kept in zip(now, self.states):
            for at, state in kept.items():
                states[at].copy_(state)
        for layer in self.attention:
            layer.crop(self.seen - layer.get_seq_length())
        if hasattr(self.cache, "seen"):
            self.cache.seen = self.seen


@torch.no_grad()
def speculate(model, name, prompt, new, length):
    """Greedy decoding of `new` tokens after prompt [1, time] with a component's drafts. Returns (tokens, passes)."""
    draft = model.component(name)
    key = cache_argument(draft.forward)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    cache, drafted = out.cache, getattr(draft(input_ids=prompt, use_cache=True), key)
    pending, text, passes = [out.logits[0, -1].argmax().item()], [], 1
    text += pending
    while len(text) < new:
        back, draft_back, guess, given = Rollback(cache), Rollback(drafted), [], list(pending)
        for _ in range(length):
            seen = draft(input_ids=torch.tensor([given]), use_cache=True, **{key: drafted}).logits[0, -1]
            given = [seen[: model.config.vocab_size].argmax().item()]
            guess += given
        logits = model(input_ids=torch.tensor([pending + guess]), cache=cache, use_cache=True).logits[0]
        passes += 1
        right = logits[len(pending) - 1 :].argmax(-1).tolist()
        taken = next((n for n, token in enumerate(guess) if token != right[n]), length)
        text += right[: taken + 1]
        if taken == length:  # all was read rightly; the draft has yet to read its own last guess
            draft(input_ids=torch.tensor([given]), use_cache=True, **{key: drafted})
            pending = right[-1:]
        else:
            back(), draft_back()
            pending = pending + right[: taken + 1]
    return text[:new], passes


def race(model, name, ids, length):
    """Median speed-up over `generate` of real greedy decoding, whether the texts are equal, and tokens per pass."""
    gains, equal, total = [], True, 0
    for row in tqdm(ids.split(1), desc=f"decoding with {name}"):
        start = time.perf_counter()
        plain = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )[0, PROMPT:].tolist()
        middle = time.perf_counter()
        text, passes = speculate(model, name, row, NEW, length)
        gains.append((middle - start) / (time.perf_counter() - middle))
        equal, total = equal and text == plain, total + passes
    return {"speed-up": statistics.median(gains), "texts equal": equal, "tokens per pass": NEW * len(ids) / total}


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
                results.append(
                    {
                        "decoding": kind,
                        "draft": name,
                        "way": way,
                        "acceptance": chances.mean().item(),
                        "length": best,
                        "tokens per round": gain[best],
                        "speed-up at most": gain[best] * hybrid / cost[best],
                    }
                )
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in results[-1].items()})
    races = {}
    for name in names:
        for length in (2, 3, 4):
            races[f"{name}, {length} drafts"] = found = race(model, name, ids, length)
            print(name, length, found)
    if args.output:
        found = {
            "blocks": model.config.num_blocks,
            "seconds": {f"{who} {n}": value for (who, n), value in times.items()},
            "results": results,
            "greedy, measured": races,
        }
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
