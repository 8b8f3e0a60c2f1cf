"""Which loss weights and which mixture space: what a cheap measurement says beforehand, and what is true in the end.

    python benchmarks/objective.py --shared SHARED --work WORK --output benchmarks/results/objective.jsonl

For every setting (components and texts, most of them of `benchmarks/study.py`) a one-block hybrid is trained as a
recipe would (gate, then everything) with each pair of loss weights and in each space, at two rates; and before any
training the components are measured by `manticore_hf.training.complementary_errors`, forward only. The question is
whether the measurement says what is better. Every run is a line of the output; a killed benchmark goes on.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from study import LLAMA, MAMBA, NEOX, SETTINGS, TEST_TOKENS, TWO, Setting, specialist, write_texts
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from manticore_hf import ManticoreForCausalLM, set_stage
from manticore_hf.evaluation.data import pack
from manticore_hf.training.complementary_errors import WINDOW, measure_complementary_errors
from manticore_hf.utils.objective import ALIKE, DIFFERENT, SPECIALISTS

BLOCK, BATCH = 256, 4
WEIGHTS, SPACES = ((1.0, 0.0), (0.3, 1.0)), ("prob", "logprob")
RATES = (1 / 3, 1.0)  # of the recipe's
CHOSEN = {
    **{name: SETTINGS[name] for name in ("two-60k", "other-60k", "three-60k", "alike-60k", "demo-40k")},
    "alike-neox": Setting([(LLAMA, None), (NEOX, None)], ["shakespeare"], 60_000),
    "alike-wikitext": Setting([(MAMBA, None), (NEOX, None)], ["wikitext"], 60_000),
    "alike-three": Setting([(LLAMA, None), (MAMBA, None), (NEOX, None)], ["alpaca"], 60_000),
    "alike-mix": Setting([(LLAMA, None), (MAMBA, None)], ["shakespeare", "python"], 60_000),
    "two-one": Setting(TWO, ["shakespeare"], 60_000),
    "two-third": Setting(TWO, ["wikitext"], 60_000),
    "same-kind": Setting([(LLAMA, "shakespeare"), (MAMBA, "shakespeare")], ["shakespeare"], 60_000),
}


def load(name, shared, work):
    """(components, training rows, test rows, rate) of a setting."""
    setting = CHOSEN[name]
    sources = [specialist(base, kind, shared, work) for base, kind in setting.components]
    tokenizer, rows = AutoTokenizer.from_pretrained(sources[0]), []
    for split, tokens in (("train", setting.tokens), ("test", TEST_TOKENS * len(setting.kinds))):
        file = work / name / f"{split}.jsonl"
        if not file.is_file():
            write_texts(setting.kinds, split, tokens, tokenizer, shared, file)
        rows.append(pack((json.loads(line)["text"] for line in file.open()), tokenizer, BLOCK))
    rate = 3e-4 if setting.components[0][0] == "neox-prose" else 1e-3
    return [str(source) for source in sources], *rows, rate


def fit(model, rows, rate, seed):
    """One pass of AdamW with warm-up and a cosine."""
    chosen = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    batches = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).split(BATCH)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 5) * 0.5 * (1 + np.cos(np.pi * step / len(batches)))
        ids = rows[batch]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def mixture_loss(model, rows):
    """Nats per token of the mixture."""
    losses = [model(input_ids=b, labels=b, use_cache=False).mixture_loss.item() * len(b) for b in rows.split(16)]
    return sum(losses) / len(rows)


def run(name, seed, shared, work, done):
    """The lines of one setting and seed that are not there yet."""
    sources, train, test, rate = load(name, shared, work)
    ids, tested = (torch.tensor(rows["input_ids"]) for rows in (train, test))

    def composed(space):
        set_seed(seed)
        return ManticoreForCausalLM.from_components(
            sources, num_blocks=1, dtype="float32", mixture_space=space, verify=False
        )

    if (name, seed, "before") not in done and seed == 0:
        measured = {
            w: measure_complementary_errors(composed("prob"), train, tokens=16_384, window=w) for w in (32, 64, 256)
        }
        untrained = {space: mixture_loss(composed(space), ids[:64]) for space in SPACES}
        strengths = {str(w): one.to_dict() for w, one in measured.items()}
        yield {"setting": name, "seed": seed, "run": "before", "strengths": strengths, "untrained": untrained}
    for space in SPACES:
        runs = [
            (scale, w)
            for scale, w in itertools.product(RATES, WEIGHTS)
            if (name, seed, f"{space} {w} {scale:.2f}") not in done
        ]
        if not runs:
            continue
        model = fit(set_stage(composed(space), "projectors"), ids, 1e-2, seed)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        for scale, weights in runs:
            model.load_state_dict(start)
            set_stage(model, "finetune")
            model.config.mix_loss_weight, model.config.component_loss_weight = weights
            loss = mixture_loss(fit(model, ids, rate * scale, seed), tested)
            yield {"setting": name, "seed": seed, "run": f"{space} {weights} {scale:.2f}", "loss": loss}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="directory with components/ and data/")
    parser.add_argument("--work", type=Path, required=True, help="directory for texts and specialists")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/objective.jsonl"))
    parser.add_argument("--only", nargs="+", choices=list(CHOSEN), default=list(CHOSEN))
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    done = {(one["setting"], one["seed"], one["run"]) for one in lines}
    for seed, name in itertools.product(range(args.seeds), args.only):
        for line in run(name, seed, args.shared, args.work, done):
            print(json.dumps(line), flush=True)
            lines.append(line)
            with args.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
    print_table(lines)


def print_table(lines):
    """Per setting: what was measured before, and the best loss with each pair of weights and in each space."""
    head = ["setting", *(f"gain, {w} tokens" for w in (32, 64, 256)), *(f"{s} {w}" for s in SPACES for w in WEIGHTS)]
    head += ["(1, 0) - (0.3, 1)", "prob - logprob", "chosen - best"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in dict.fromkeys(line["setting"] for line in lines):
        mine = [line for line in lines if line["setting"] == name]
        before = next((line["strengths"] for line in mine if line["run"] == "before"), {})
        seeds = sorted({line["seed"] for line in mine if "loss" in line})

        def best(prefix, mine=mine, seeds=seeds):
            each = [[one["loss"] for one in mine if one["seed"] == s and one["run"].startswith(prefix)] for s in seeds]
            return float(np.mean([min(one) for one in each if one])) if any(each) else float("nan")

        losses = {(s, w): best(f"{s} {w}") for s in SPACES for w in WEIGHTS}
        weights = min(losses[s, WEIGHTS[0]] for s in SPACES) - min(losses[s, WEIGHTS[1]] for s in SPACES)
        space = min(losses["prob", w] for w in WEIGHTS) - min(losses["logprob", w] for w in WEIGHTS)
        cells = [f"{before[w]['gain']:.3f}" if w in before else "" for w in ("32", "64", "256")]
        chosen = SPECIALISTS if before and before[str(WINDOW)]["gain"] > DIFFERENT else ALIKE
        missed = losses[chosen["mixture_space"], chosen["loss_weights"]] - min(losses.values())
        cells += [f"{loss:.4f}" for loss in losses.values()] + [f"{weights:+.4f}", f"{space:+.4f}", f"{missed:.4f}"]
        print("| " + " | ".join([name, *cells]) + " |")


if __name__ == "__main__":
    main()
