"""The pair of real_pair.py tuned: LoRA in both models and the gate at once, in each model alone; and one transplanted.

    python benchmarks/real_pair_tuned.py --models gemma smollm2 --texts prose=prose.txt code=code.txt ... --work WORK

Test windows are those of real_pair.py, and so are the training windows, as many as hold `--tokens` tokens of the first
model, all kinds in turn. The hybrid and each model alone get adapters of one rank in the same modules and read the same
windows as often, one a step, at one rate that nobody chose by any text: this is a comparison, not the best of either.
The transplanted hybrid is the other way to join the two: the second model reads the first one's tokens by an embedding
and a head that are made from its own. Windows that were read are kept in WORK, and so are trained adapters.
"""

import argparse
import itertools
import math
import resource
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from aligned import own_bits
from manticore_hf.modeling.aligned_hybrid import aligner_of
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from real_pair import TEST, joined, keep, measure, mixed, online, rate_of, splits
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from manticore_hf import ComponentSpec, compose_transplanted
from manticore_hf.evaluation.statistics import paired_p
from manticore_hf.utils.files import write_json

RESULTS = Path(__file__).parent / "results" / "real_pair_tuned.json"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def row_of(tokens, text):
    """Ids [1, time] of a text behind start tokens."""
    return torch.tensor([[*tokens.start, *tokens.cut(tokens.prefix + text.encode())]])


def loss_of(model, ids, begun):
    """Mean nats of a row's tokens after its `begun` start tokens."""
    labels = ids.clone()
    labels[:, :begun] = -100
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def tune(model, tokens, texts, options, file, **more):
    """A model with adapters that were trained on texts, one a step; from a file where one run has left them.

    Returns:
        (the PeftModel, seconds of the processor that the training took, weights that were trained).
    """
    torch.manual_seed(options.seed)
    model = get_peft_model(
        model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS, **more)
    )
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if file.exists():
        kept = torch.load(file, weights_only=True)
        set_peft_model_state_dict(model, kept["weights"])
        return model.eval(), kept["seconds"], size
    rows = [row_of(tokens, text) for text in texts]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.epochs * len(rows))
    start = time.process_time()
    model.train()
    for _ in range(options.epochs):
        for i in tqdm(torch.randperm(len(rows)).tolist(), desc=f"training {file.stem}"):
            loss_of(model, rows[i], len(tokens.start)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    seconds = time.process_time() - start
    torch.save({"weights": get_peft_model_state_dict(model), "seconds": seconds}, file)
    return model.eval(), seconds, size


@torch.no_grad()
def read(plan, file, number_of):
    """{kind: numbers of each test window}, kept in a file after each."""
    found = torch.load(file, weights_only=True) if file.exists() else {}
    wanted = {f"{kind}-{i}": text for kind in plan for i, text in enumerate(plan[kind]["test"])}
    for key, text in tqdm(wanted.items(), desc=file.stem):
        if key not in found:
            found[key] = number_of(text)
            keep(file, found)
    return {kind: [found[f"{kind}-{i}"] for i in range(len(plan[kind]["test"]))] for kind in plan}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs=2, required=True, help="directories; the first has the tokenizer")
    parser.add_argument("--names", nargs=2, default=["Gemma", "SmolLM2"], help="what the results call them")
    parser.add_argument("--texts", nargs="+", required=True, help="KIND=FILE, UTF-8, as for real_pair.py")
    parser.add_argument("--work", type=Path, required=True, help="the folder of real_pair.py, or a new one")
    parser.add_argument("--tokens", type=int, default=5_000, help="training tokens of all kinds together")
    parser.add_argument("--window", type=int, default=1500, help="bytes that are read at once")
    parser.add_argument("--test-bytes", type=int, default=TEST, help="of each kind; the first of real_pair.py's")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    texts = dict(pair.split("=", 1) for pair in options.texts)
    plan = {
        kind: splits(Path(path).read_text(encoding="utf-8"), options.window, options.test_bytes)
        for kind, path in texts.items()
    }
    plan = dict(sorted(plan.items()))
    home, other = options.names
    sizes = {kind: [len(text.encode()) for text in plan[kind]["test"]] for kind in plan}
    base = untrained(options, plan)
    found = {
        f"{name}, as it came": {kind: [one["own"][k] for one in base[kind]] for kind in plan}
        for k, name in enumerate(options.names)
    }
    untouched = {"uniform mixture": lambda one: mixed(torch.tensor([[0.5, 0.5]]), one), "online mixture": online}
    for label, of in untouched.items():
        found[label] = {kind: [float(of(one)) / math.log(2) for one in base[kind]] for kind in plan}
    out = {"training": {}, "rank": options.rank, "rate": options.rate, "epochs": options.epochs, "seed": options.seed}

    hybrid = joined(options, mixture="token")
    aligner = aligner_of(hybrid)
    tokens = {name: aligner.bytes_of(hybrid, name) for name in options.names}
    rows, counted = [], 0
    for text in itertools.chain(*itertools.zip_longest(*(plan[kind]["train"] for kind in plan))):
        if text is not None and counted < options.tokens:
            rows.append(text)
            counted += len(tokens[home].cut(tokens[home].prefix + text.encode()))
    out |= {"train_tokens": counted, "windows": len(rows)}

    run = f"{options.tokens}-{options.rank}-{options.rate}-{options.epochs}-{options.seed}"
    for path, name in zip(options.models, options.names):
        file = options.work / f"lora-{name}-{run}.pt"
        alone = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        alone, seconds, size = tune(alone, tokens[name], rows, options, file)
        out["training"][f"{name}, LoRA"] = {"seconds": round(seconds, 1), "weights": size}
        bits_of = partial(own_bits, alone, tokens[name])
        found[f"{name}, LoRA"] = read(plan, file.with_suffix(".test.pt"), lambda text, of=bits_of: of(text)[0])
    file, begun = options.work / f"lora-hybrid-{run}.pt", len(tokens[home].start)
    tuned, seconds, size = tune(hybrid, tokens[home], rows, options, file, modules_to_save=["hybrid_mixer"])
    out["training"]["hybrid, LoRA and gate"] = {"seconds": round(seconds, 1), "weights": size}

    def hybrid_bits(text):
        ids = row_of(tokens[home], text)
        return float(loss_of(tuned, ids, begun)) * (ids.shape[1] - begun) / math.log(2)

    found["hybrid, LoRA and gate"] = read(plan, file.with_suffix(".test.pt"), hybrid_bits)
    out["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)
    write(options, out, found, sizes)
    test = transplanted(options, plan, tokens[home])
    for label, of in {other: lambda one: one["nats"][:, 1].sum(), **untouched}.items():
        found[f"{label}, transplanted"] = {
            kind: [float(of(one)) / math.log(2) for one in rows] for kind, rows in test.items()
        }
    write(options, out, found, sizes)


def untrained(options, plan):
    """{kind: what real_pair.py measures of each test window}, from WORK where that has it."""
    hybrid, found = None, {kind: [] for kind in plan}
    options.work.mkdir(parents=True, exist_ok=True)
    jobs = [(kind, i, text) for kind in plan for i, text in enumerate(plan[kind]["test"])]
    for kind, i, text in tqdm(jobs, desc="untrained"):
        if not (file := options.work / f"{kind}-test-{i}.pt").exists():
            hybrid = hybrid or joined(options)
            keep(file, measure(hybrid, text))
        found[kind].append(torch.load(file, weights_only=True))
    return found


def transplanted(options, plan, tokens):
    """{kind: {"nats" [tokens, 2]} of each test window}: both models on the first one's tokens."""
    specs = [ComponentSpec(path, name=name) for path, name in zip(options.models, options.names)]
    hybrid, _, _ = compose_transplanted(
        specs, tokenizer_component=options.names[0], dtype=torch.float32, mixture_space="prob", mixture="static"
    )
    hybrid, seen = hybrid.eval(), {}
    whole, first = hybrid.mix, len(tokens.start)

    def mix(weights, states, logits, *past):
        seen["own"] = logits
        return whole(weights, states, logits, *past)

    def nats(text):
        ids = row_of(tokens, text)
        hybrid(ids, use_cache=False)
        picked = ids[0, first:, None]
        return torch.cat([-x[0, first - 1 : -1].float().log_softmax(-1).gather(-1, picked) for x in seen["own"]], -1)

    hybrid.mix = mix
    found = read(plan, options.work / "transplanted.pt", nats)
    return {kind: [{"nats": one} for one in rows] for kind, rows in found.items()}


def write(options, out, found, sizes):
    """The results so far: bits per byte of each contender, and its gain over the best single model as it came."""
    every = [size for kind in sizes for size in sizes[kind]]
    whole = {label: np.concatenate([np.asarray(rows[kind]) for kind in sizes]) for label, rows in found.items()}
    single = min((label for label in whole if label.endswith("as it came")), key=lambda label: whole[label].sum())
    tuned = min((label for label in whole if label.endswith(", LoRA")), key=lambda label: whole[label].sum())
    rows = {}
    for label, values in found.items():
        rows[label] = {kind: rate_of(values[kind], sizes[kind]) for kind in sizes}
        rows[label]["all"] = rate_of(whole[label], every)
        for key, against in (("gain", single), ("gain over the tuned", tuned)):
            gain = np.atleast_2d(whole[against] - whole[label])
            percent = round(100 * float(gain.sum() / whole[against].sum()), 2)
            rows[label][key] = {"percent": percent, "bits": rate_of(gain, every), "p": paired_p(gain)}
        print(f"{label:32}", {kind: rows[label][kind]["bits"] for kind in (*sizes, "all")}, flush=True)
    made_with = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    bytes_of = {kind: sum(one) for kind, one in sizes.items()}
    about = {"date": time.strftime("%Y-%m-%d"), "versions": made_with, "window": options.window, "bytes": bytes_of}
    write_json(options.results, {**about, **out, "single": single, "tuned": tuned, "rows": rows})


if __name__ == "__main__":
    main()
