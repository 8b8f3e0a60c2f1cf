"""What it costs that a repository carries no faster convolution and scan, and what it would cost without Mamba-2's.

    python benchmarks/without_package.py --output benchmarks/results/without_package.json     # a few minutes

A Mamba and a Mamba-2 of random weights, each beside itself with Transformers' own torch version in the place of one of
our functions, or with the scan that repositories carry in the place of the package's ("selective_scan"); seconds of the
processor, in turn, and the median of their ratios. Elsewhere the selective scan is the package's on both sides.
"""

import argparse
import contextlib
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from manticore_hf.modeling import mixers_manticore, scan_manticore
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import manticore_hf  # noqa: F401 - which registers what is faster

VOCABULARY = 1000


def mamba(width):
    """A Mamba of four layers."""
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=4))


def mamba2(width):
    """A Mamba-2 of four layers."""
    heads = {"num_heads": 2 * width // 64, "head_dim": 64, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=4, **heads))


def repaired(model, plain=None):
    """The model with mixers of ours, but for one function that is left as Transformers has it."""
    kept = dict(mixers_manticore._FAST)
    mixers_manticore._FAST.pop(plain, None)
    mixers_manticore._ways.cache_clear()
    mixers_manticore.repair_mixers(model)
    mixers_manticore._FAST.update(kept)
    mixers_manticore._ways.cache_clear()
    return model


@contextlib.contextmanager
def carried(function):
    """Context in which scans are those that a repository carries, if that is what is measured."""
    scan = scan_manticore._shared.scan
    if function == "selective_scan":
        del scan_manticore._shared.scan
    try:
        yield
    finally:
        scan_manticore._shared.scan = scan


def read(model, ids):
    """One call without gradients."""
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def train(model, ids):
    """Forward and backward."""
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write JSON here")
    parser.add_argument("--width", type=int, default=512, help="width of the models")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512], help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=7, help="counted repeats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for make, function in (
        (mamba, "causal_conv1d_fn"),
        (mamba, "mamba_selective_scan"),
        (mamba, "selective_scan"),
        (mamba2, "causal_conv1d_fn"),
        (mamba2, "mamba2_chunk_scan"),
    ):
        torch.manual_seed(0)
        model = make(args.width)
        plain, ours = repaired(copy.deepcopy(model), function), repaired(model)
        for tokens in args.tokens:
            ids = torch.randint(VOCABULARY, (1, tokens))
            for run in (read, train):
                run(plain, ids), run(ours, ids)
                ratios = []
                for _ in range(args.repeats):
                    times = [time.process_time()]
                    for one, left_out in ((plain, function), (ours, None)):
                        with carried(left_out):
                            run(one, ids)
                        times.append(time.process_time())
                    ratios.append((times[1] - times[0]) / (times[2] - times[1]))
                what = {"model": make.__name__, "plain": function, "run": run.__name__, "tokens": tokens}
                results.append({**what, "ratio": round(statistics.median(ratios), 3)})
                print(results[-1], flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps({"width": args.width, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
