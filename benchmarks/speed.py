"""What being a hybrid costs: ratios against the components themselves, measured side by side in one process.

    python benchmarks/speed.py --output benchmarks/results/speed.json        # under 10 minutes on two cores
    python benchmarks/speed.py --device cuda --dtype bfloat16 --width 1024 --large-width 1024 --tokens 1024 --batch 4 \
        --repeats 5 --output benchmarks/results/speed_cuda.json

A GPT-NeoX and a Mamba of equal width, random weights, float32; depth and the head's share are those of models of a few
hundred million parameters. Every repeat runs both sides in turn, so that a change of the machine's speed hits both; the
ratio is the median over repeats. `benchmarks/scan.py` measures the scan itself, `benchmarks/gpu_kernels.py` CUDA's.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from manticore_hf.modeling.mixers_manticore import repair_mixers
from tqdm.auto import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaConfig, MambaForCausalLM

from manticore_hf import ComponentSpec, ManticoreForCausalLM, prune, set_stage

VOCABULARY = 8192
PLACE = {"device": "cpu", "dtype": torch.float32}
"""Where the models are, and what they compute in."""


def components(width, layers):
    """A GPT-NeoX and a Mamba [width], random weights."""
    torch.manual_seed(0)
    neox = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
    )
    mamba = MambaConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, eos_token_id=None)
    parts = tuple(model.to(**PLACE).eval() for model in (GPTNeoXForCausalLM(neox), MambaForCausalLM(mamba)))
    repair_mixers(parts[1])  # the component alone uses the same scan
    return parts


def compose(parts, **settings):
    """A soft hybrid of these components; they are its own modules afterwards."""
    specs = [ComponentSpec(part, name=name) for part, name in zip(parts, ("neox", "mamba"))]
    return ManticoreForCausalLM.from_components(specs, verify=False, **settings).eval()


def timed(run):
    """Seconds of one call, the GPU's work included."""
    if PLACE["device"] == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if PLACE["device"] == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def random_tokens(rows, length):
    """Token ids [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length)).to(PLACE["device"])


def ratio(label, ours, theirs, repeats, aim, results):
    """Median ratio of two callables over paired repeats, after one that does not count."""
    ours(), theirs()
    pairs = [(timed(ours), timed(theirs)) for _ in tqdm(range(repeats), desc=label, leave=False)]
    note(
        results,
        label,
        statistics.median(a / b for a, b in pairs),
        aim,
        seconds=[statistics.median(side) for side in zip(*pairs)],
    )


def note(results, label, value, aim, **more):
    """Keeps and prints one result; `aim` is the largest (or, with a leading >, the smallest) ratio wanted."""
    limit = float(aim.strip("<>= "))
    reached = value >= limit if aim.startswith(">") else value <= limit
    results.append({"what": label, "ratio": value, "aim": aim, "reached": reached, **more})
    print(f"{label:78} {value:7.3f}   aim {aim:8} {'reached' if reached else 'NOT reached'}", flush=True)


def overhead(args, results):
    """Forward, and forward with backward, against the sum of the components."""
    ids = random_tokens(args.batch, args.tokens)
    for blocks, settings in ((1, {}), (2, {}), (2, {"preset": "paper"})):
        parts = components(args.width, args.layers)
        hybrid = compose(parts, num_blocks=blocks, **settings)
        label = f"{blocks} block(s), {settings.get('preset', 'default')} preset"
        with torch.no_grad():
            ratio(
                f"forward / sum of the components, {label}",
                lambda h=hybrid: h(input_ids=ids, use_cache=False),
                lambda p=parts: [one(input_ids=ids, use_cache=False) for one in p],
                args.repeats,
                "<= 1.03" if blocks == 1 else "<= 1.05",
                results,
            )

        def step(model):
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        ratio(
            f"forward+backward / sum of the components, {label}",
            lambda h=hybrid: step(h),
            lambda p=parts: [step(one) for one in p],
            args.repeats,
            "<= 1.03" if blocks == 1 else "<= 1.05",
            results,
        )


def one_mamba(args, results):
    """A step of training of a whole two-layer Mamba: Transformers' own against the one whose mixers are repaired."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=args.width, num_hidden_layers=2, eos_token_id=None)
    theirs, ours = (MambaForCausalLM(config).to(**PLACE).train() for _ in range(2))
    repair_mixers(ours)
    ids = random_tokens(1, 128)

    def step(model):
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    label = "a two-layer Mamba trained on 128 tokens: Transformers' own / repaired"
    ratio(label, lambda: step(theirs), lambda: step(ours), 2 * args.repeats, ">= 10", results)


def recomputation(args, results):
    """256 tokens with a cache against a full forward for each, at the width of models of 100 million parameters."""
    model = compose(components(args.large_width, args.layers), num_blocks=2)
    ids = random_tokens(1, 288)

    def cached():
        token, cache = ids[:, :1], model.make_cache()
        model(input_ids=ids[:, :32], cache=cache, use_cache=True, logits_to_keep=1)
        for _ in range(255):
            model(input_ids=token, cache=cache, use_cache=True)

    def recomputed(length):
        return timed(lambda: model(input_ids=ids[:, :length], use_cache=False, logits_to_keep=1))

    recomputed(288)
    values = []
    for _ in tqdm(range(3), desc="recomputation", leave=False):
        # The cost grows evenly with the length: the mean over 9 lengths stands for all 256.
        values.append(256 * statistics.mean(recomputed(n) for n in range(32, 289, 32)) / timed(cached))
    note(results, "recomputation / cached, 256 tokens after 32", statistics.median(values), ">= 10")


@torch.no_grad()
def decoding(args, results):
    """Cached decoding against the components' own, against recomputation, and along the length."""
    parts = components(args.width, args.layers)
    hybrid, ids = compose(parts, num_blocks=2), random_tokens(1, 32)

    def generate(model, new=64, **more):
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **more)

    for blocks, model in ((2, hybrid), (1, compose(components(args.width, args.layers), num_blocks=1))):
        ratio(
            f"cached decoding, 64 tokens / sum of the components', {blocks} block(s)",
            lambda m=model: generate(m),
            lambda: [generate(one) for one in parts],
            args.repeats,
            "<= 1.05" if blocks == 1 else "<= 1.10",
            results,
        )
    recomputation(args, results)
    pair = [MambaForCausalLM(parts[1].config).to(**PLACE).eval() for _ in range(2)]
    mambas = ManticoreForCausalLM.from_components([ComponentSpec(m, name=n) for m, n in zip(pair, "ab")], verify=False)
    caches, token = [mambas.make_cache() for _ in range(2)], ids[:, :1]

    def step(cache):
        return timed(lambda: mambas(input_ids=token, cache=cache, use_cache=True))

    for _ in tqdm(range(1024), desc="a long text", leave=False):
        step(caches[0])
    step(caches[1])
    values = [step(caches[0]) / step(caches[1]) for _ in range(128)]
    note(results, "Mamba-only hybrid: a step after 1024 tokens / after none", statistics.median(values), "<= 1.05")
    hard = prune(hybrid, "neox")
    ratio(
        "pruned to one component: cached decoding / the component's",
        lambda: generate(hard),
        lambda: generate(parts[0]),
        args.repeats,
        "<= 1.02",
        results,
    )
    long = random_tokens(1, args.tokens)
    ratio(
        "pruned to one component: forward / the component's",
        lambda: hard(input_ids=long, use_cache=False),
        lambda: parts[0](input_ids=long, use_cache=False),
        2 * args.repeats,
        "<= 1.03",
        results,
    )


def stages(args, results):
    """Optimizer steps of the stages against a full fine-tuning step."""
    ids = random_tokens(args.batch, args.tokens)

    def stepper(stage):
        model = set_stage(compose(components(args.width, args.layers), num_blocks=2, mixture="static"), stage).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

        def step():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    finetune = stepper("finetune")
    ratio("projectors step / finetune step", stepper("projectors"), finetune, args.repeats, "<= 0.75", results)
    ratio("search step / finetune step", stepper("search"), finetune, args.repeats, "<= 1.05", results)


def fused(args, results):
    """Would one product for all projectors that read the same h be faster? What it has to beat: 1."""
    for tokens in (1, args.tokens):
        state = torch.randn(tokens, args.width, **PLACE)
        two = [torch.nn.Linear(args.width, args.width, **PLACE) for _ in range(2)]

        def apart(state=state, two=two):
            for _ in range(20):
                (two[0](state).sum() + two[1](state).sum()).backward()

        def together(state=state, two=two):
            for _ in range(20):
                weight, bias = torch.cat([p.weight for p in two]), torch.cat([p.bias for p in two])
                left, right = torch.nn.functional.linear(state, weight, bias).chunk(2, -1)
                (left.sum() + right.sum()).backward()

        label = f"two projectors in one product / in two, forward+backward, {tokens} token(s)"
        ratio(label, together, apart, 4 * args.repeats, "<= 1", results)


_LOAD = """
import sys, time, torch
from transformers import AutoModelForCausalLM
import manticore_hf
manticore_hf.ManticoreForCausalLM.from_pretrained(sys.argv[1])  # imports whatever loading imports
def peak():  # of this program alone: getrusage would begin with the parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
base = peak()
start = time.perf_counter()
models = [AutoModelForCausalLM.from_pretrained(path) for path in sys.argv[2:]]
seconds = time.perf_counter() - start
size = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
print(seconds, (peak() - base) / size)
"""


def loading(args, results):
    """Wall time and peak memory of loading, in processes of their own: of one block, and of two, which are cut."""
    with tempfile.TemporaryDirectory() as folder:
        small, large = components(64, 2), components(args.large_width, args.layers)
        compose(small, num_blocks=2).save_pretrained(f"{folder}/small")
        for name, part in zip("ab", large):
            part.save_pretrained(f"{folder}/{name}")
        for blocks in (1, 2):
            compose(large, num_blocks=blocks).save_pretrained(f"{folder}/{blocks}")

        def load(*names):
            command = [sys.executable, "-c", _LOAD, f"{folder}/small", *(f"{folder}/{name}" for name in names)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            return float(out[-2]), float(out[-1])

        rounds = max(3, args.repeats)
        runs = [(load("a", "b"), load("1"), load("2")) for _ in tqdm(range(rounds), desc="loading")]
    parts, *hybrids = zip(*runs)
    alone = statistics.median(peak for _, peak in parts)
    for blocks, hybrid in zip(("one block", "two blocks"), hybrids):
        times = statistics.median(mine / theirs for (mine, _), (theirs, _) in zip(hybrid, parts))
        seconds = [statistics.median(seconds for seconds, _ in side) for side in (hybrid, parts)]
        note(results, f"loading / sum of the components, {blocks}", times, "<= 1.2", seconds=seconds)
        peak = statistics.median(peak for _, peak in hybrid)
        label = f"peak memory of loading over base / bytes of the weights, {blocks}"
        note(results, label, peak, "<= 1.15", components=alone)


def write(args, results, start):
    """Everything measured so far."""
    if args.output is None:
        return
    about = {
        "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")}, "seconds": time.time() - start,
        "settings": {key: str(value) for key, value in vars(args).items()}, "results": results,
    }  # fmt: skip
    args.output.write_text(json.dumps(about, indent=1) + "\n")


def main():
    """Runs all parts, prints and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write JSON here")
    parser.add_argument("--width", type=int, default=256, help="width of the components")
    parser.add_argument("--layers", type=int, default=12, help="layers of each component")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--large-width", type=int, default=768, help="width for loading and recomputation")
    parser.add_argument("--repeats", type=int, default=9, help="counted repeats")
    parser.add_argument(
        "--only", nargs="+", choices=("overhead", "one_mamba", "decoding", "stages", "fused", "loading")
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the models are")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what they compute in")
    args = parser.parse_args()
    PLACE.update(device=args.device, dtype=getattr(torch, args.dtype))
    results, start = [], time.time()
    for part in (overhead, one_mamba, decoding, stages, fused, loading):
        if args.only is None or part.__name__ in args.only:
            part(args, results)
            write(args, results, start)


if __name__ == "__main__":
    main()
