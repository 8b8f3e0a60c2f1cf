"""The selective scan against Transformers' own path and against attention, side by side in one process.

    python benchmarks/scan.py --output benchmarks/results/scan.json

One layer of Mamba (width 256, state 16) and of GPT-NeoX (width 256, 4 heads), forward and backward. Every repeat runs
all variants in turn, so a change of the machine's speed hits all alike; the ratio is the median over repeats.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers.models.mamba.modeling_mamba as upstream
from manticore_hf.modeling import scan_manticore
from tqdm.auto import tqdm
from transformers import GPTNeoXConfig, GPTNeoXModel, MambaConfig, MambaModel


def _models(width):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=width, state_size=16, num_hidden_layers=1, use_cache=False)
    mamba = MambaModel(config)
    neox = GPTNeoXModel(
        GPTNeoXConfig(vocab_size=64, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=1,
                      num_attention_heads=4, use_cache=False)
    )  # fmt: skip
    return mamba, neox


def _step(model, hidden):
    start = time.perf_counter()
    model(inputs_embeds=hidden).last_hidden_state.square().mean().backward()
    return time.perf_counter() - start


def measure(width, batch, tokens, repeats, with_upstream):
    """Median times of one forward and backward, and their ratios.

    Args:
        width: Width of the layers.
        batch, tokens: Shape of the input.
        repeats: Counted repeats, after one that is not.
        with_upstream: Also time Transformers' own scan (it is slow: its backward grows quadratically).
    """
    mamba, neox = _models(width)
    hidden = torch.randn(batch, tokens, width)
    ours = upstream.mamba_selective_scan
    times = {}
    for repeat in tqdm(range(repeats + 1), desc=f"{batch} x {tokens}", leave=False):
        runs = {"gpt_neox": lambda: _step(neox, hidden), "ours": lambda: _step(mamba, hidden)}
        if with_upstream:
            def theirs():
                upstream.mamba_selective_scan = ORIGINAL
                try:
                    return _step(mamba, hidden)
                finally:
                    upstream.mamba_selective_scan = ours
            runs["transformers"] = theirs
        for name, run in runs.items():
            seconds = run()
            if repeat:
                times.setdefault(name, []).append(seconds)
    row = {"batch": batch, "tokens": tokens, "width": width, "repeats": repeats}
    row["milliseconds"] = {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()}
    paired = {name: [a / b for a, b in zip(times[name], times["ours"])] for name in times if name != "ours"}
    row["ratio_to_ours"] = {name: round(statistics.median(values), 2) for name, values in paired.items()}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-numba", action="store_true", help="time the torch scan even where numba is installed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.no_numba:
        import sys

        sys.modules["numba"] = None
    scan_manticore.install("mamba")
    rows = [measure(args.width, 1, 128, args.repeats, True), measure(args.width, 4, 128, args.repeats, True)]
    rows += [measure(args.width, 1, n, args.repeats, False) for n in (512, 1024)]
    try:
        kernel = "torch" if args.no_numba else f"numba {version('numba')}"
    except Exception:
        kernel = "torch"
    out = {
        "kernel": kernel, "threads": args.threads, "machine": platform.machine(), "torch": torch.__version__,
        "transformers": version("transformers"), "rows": rows,
    }  # fmt: skip
    for row in rows:
        shape = f"batch {row['batch']}, {row['tokens']} tokens"
        print(f"{shape}: {row['milliseconds']} ms, over ours {row['ratio_to_ours']}")
    if args.output:
        args.output.write_text(json.dumps(out, indent=1) + "\n")


ORIGINAL = upstream.mamba_selective_scan

if __name__ == "__main__":
    main()
