"""The parts of a hybrid's cost, one by one: what BENCHMARKS.md says about where the time goes.

    python benchmarks/parts.py --output benchmarks/results/parts.json        # about 2 minutes on two cores

Output mixture (as it is, and spelled out with normalised logits), causal convolution (ours and PyTorch's), padding,
cutting a component, and the shares of one forward of a two-block hybrid. Medians; every comparison runs both sides in
turn.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import speed
import torch
import torch.nn.functional as F
from manticore_hf.modeling import layer_stack_manticore, mixing_manticore, modeling_manticore, segments_manticore
from manticore_hf.modeling.mixture_manticore import confidence, weighted_sum

from manticore_hf.kernels.conv import causal_conv1d


def milliseconds(runs, repeats):
    """{name: median milliseconds} of callables that take turns, after one round that does not count."""
    times = defaultdict(list)
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            seconds = speed.timed(run)
            if repeat:
                times[name].append(1e3 * seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def mixture(tokens, vocabulary, repeats):
    """Mixture of two predictions with a gate's statistics, and the two heads (width 256) it follows."""
    logits = [torch.randn(1, tokens, vocabulary, requires_grad=True) for _ in range(2)]
    gate = torch.rand(1, tokens, 1)
    weights = [gate.requires_grad_(), (1 - gate).detach().requires_grad_()]
    state, head = torch.randn(tokens, 256), torch.randn(vocabulary, 256)

    def ours():
        for one in logits:
            confidence(one)
        return weighted_sum(weights, logits)

    def spelled_out():
        logprobs = [one.log_softmax(-1) for one in logits]
        for one in logprobs:
            one = one.detach()
            (one.exp() * one).nan_to_num(0.0).sum(-1), one.amax(-1)
        return sum(weight * one for weight, one in zip(weights, logprobs))

    runs = {"ours": ours, "spelled out": spelled_out, "two heads": lambda: [state @ head.T for _ in range(2)]}
    for name in ("ours", "spelled out"):
        runs[f"{name}, with backward"] = lambda run=runs[name]: run().sum().backward()
    return milliseconds(runs, repeats)


def convolution(channels, tokens, repeats):
    """Forward and backward of the causal convolution in the mixers' memory layout."""
    x = torch.randn(1, tokens, channels).transpose(1, 2).requires_grad_()
    weight, bias = torch.randn(channels, 4, requires_grad=True), torch.randn(channels, requires_grad=True)
    seed = torch.randn(1, tokens, channels).transpose(1, 2)

    def theirs():
        return F.conv1d(x, weight[:, None], bias, padding=3, groups=channels)[..., :tokens]

    return milliseconds(
        {"ours": lambda: causal_conv1d(x, weight, bias).backward(seed), "PyTorch's": lambda: theirs().backward(seed)},
        repeats,
    )


def shares(repeats):
    """Milliseconds of the parts of one forward of a two-block hybrid, of its components alone, and of cutting them."""
    parts = speed.components(256, 12)
    hybrid, ids = speed.compose(parts, num_blocks=2), torch.randint(0, speed.VOCABULARY, (1, 512))
    spent, state = defaultdict(float), torch.randn(1, 512, 256)

    def watch(owner, method, label):
        original = getattr(owner, method)

        def timed(self, *args, **kwargs):
            start = time.perf_counter()
            out = original(self, *args, **kwargs)
            spent[label(args)] += 1e3 * (time.perf_counter() - start)
            return out

        setattr(owner, method, timed)

    watch(layer_stack_manticore.Segment, "__call__", lambda args: "segments")
    watch(segments_manticore.Whole, "__call__", lambda args: "segments")
    watch(segments_manticore.Head, "__call__", lambda args: "heads")
    watch(modeling_manticore.ManticoreForCausalLM, "mix", lambda args: "output mixture")
    watch(mixing_manticore.HybridMixer, "forward", lambda args: f"mixer: {args[0].__name__}")
    found = defaultdict(list)
    with torch.no_grad():
        for _ in range(repeats):
            spent.clear()
            found["hybrid"].append(1e3 * speed.timed(lambda: hybrid(input_ids=ids, use_cache=False)))
            for name, value in spent.items():
                found[name].append(value)
            found["components"].append(
                1e3 * sum(speed.timed(lambda p=p: p(input_ids=ids, use_cache=False)) for p in parts)
            )
            found["padding to 320"].append(1e3 * speed.timed(lambda: F.pad(state, (0, 64))))
            found["cutting both"].append(
                1e3 * speed.timed(lambda: [layer_stack_manticore.find_layout(p) for p in parts])
            )
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write JSON here")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    results = {f"mixture, 512 tokens, vocabulary {size}": mixture(512, size, args.repeats) for size in (8192, 50304)}
    results |= {f"convolution [1, 512, {n}]": convolution(512, n, 2 * args.repeats) for n in (128, 512)}
    results["one forward, two blocks, 512 tokens"] = shares(args.repeats)
    for what, row in results.items():
        print(what, {name: round(value, 2) for name, value in row.items()}, "ms")
    if args.output:
        args.output.write_text(json.dumps({"threads": torch.get_num_threads(), "ms": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
