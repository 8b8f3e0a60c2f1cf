"""Our scans and convolution against Transformers' own paths and against attention, side by side in one process.

    python benchmarks/scan.py --output benchmarks/results/scan.json        # about 3 minutes on two cores

Forward and backward of one layer of Mamba (width 256, state 16), of Mamba-2 (heads of 64, state 128) and of GPT-NeoX (4
heads), and of the scan function alone at the layer's shapes. "theirs" is Transformers' scan and convolution, without
CUDA kernels. Every repeat runs all variants in turn, so a change of the machine's speed hits all alike; the ratio is
the median over repeats. `--profile` prints where a layer's time goes instead.
"""

import argparse
import copy
import inspect
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers.models.mamba.modeling_mamba as mamba
import transformers.models.mamba2.modeling_mamba2 as mamba2
from manticore_hf.modeling import mixers_manticore, ssd_manticore
from tqdm.auto import tqdm
from transformers import GPTNeoXConfig, GPTNeoXModel, Mamba2Config, Mamba2Model, MambaConfig, MambaModel

SCANS = {"mamba": mamba.mamba_selective_scan, "mamba2": mamba2.mamba2_chunk_scan}


def layers(width):
    """One layer of each kind, of equal width."""
    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": width, "num_hidden_layers": 1, "use_cache": False}
    return {
        "mamba": MambaModel(MambaConfig(state_size=16, **common)),
        "mamba2": Mamba2Model(Mamba2Config(head_dim=64, num_heads=2 * width // 64, n_groups=1, **common)),
        "gpt_neox": GPTNeoXModel(GPTNeoXConfig(intermediate_size=4 * width, num_attention_heads=4, **common)),
    }


def scan_of(kind, ours):
    """The function that a mixer calls: ours or Transformers'."""
    made = {"mamba": mixers_manticore._make_scan, "mamba2": ssd_manticore.make_chunk_scan}
    return made[kind](SCANS[kind]) if ours else inspect.unwrap(SCANS[kind])


def layer_step(model, hidden):
    """Forward and backward of a model of one layer."""
    return lambda: model(inputs_embeds=hidden).last_hidden_state.square().mean().backward()


def mamba_scan(width, batch, tokens, ours):
    """Forward and backward of Mamba's scan, with its skip and gate, at a layer's shapes and memory layout."""
    d, n = 2 * width, 16
    u, z = (torch.randn(batch, tokens, d).transpose(1, 2).requires_grad_() for _ in range(2))
    B, C = (torch.randn(batch, tokens, n).transpose(1, 2).requires_grad_() for _ in range(2))
    dt, A, D = torch.rand(batch, d, tokens).requires_grad_(), -torch.rand(d, n).requires_grad_(), torch.ones(d)
    scan = scan_of("mamba", ours)
    return lambda: scan(u, dt, A, B, C, D=D, z=z).square().mean().backward()


def mamba2_scan(width, batch, tokens, ours):
    """The same of Mamba-2's."""
    heads = 2 * width // 64
    x, dt = torch.randn(batch, tokens, heads, 64).requires_grad_(), torch.randn(batch, tokens, heads).requires_grad_()
    B, C = (torch.randn(batch, tokens, 1, 128).requires_grad_() for _ in range(2))
    A, D = -torch.rand(heads).requires_grad_(), torch.ones(heads)
    scan = scan_of("mamba2", ours)
    return lambda: scan(x, F.softplus(dt), A, B, C, chunk_size=256, D=D).square().mean().backward()


def measure(width, batch, tokens, repeats, with_upstream):
    """Median milliseconds of one forward and backward of every variant, and its ratio to what it is compared with.

    Args:
        width: Width of the layers.
        batch, tokens: Shape of the input.
        repeats: Counted repeats, after two that are not.
        with_upstream: Also time Mamba's own path in Transformers (its backward grows quadratically in `tokens`).
    """
    models, hidden = layers(width), torch.randn(batch, tokens, width)
    theirs = {name: copy.deepcopy(model) for name, model in models.items() if name in SCANS}
    for model in models.values():
        mixers_manticore.repair_mixers(model)
    runs = {f"{name} layer": layer_step(model, hidden) for name, model in models.items()}
    scans = {"mamba": mamba_scan, "mamba2": mamba2_scan}
    runs |= {f"{name} scan": scan(width, batch, tokens, True) for name, scan in scans.items()}
    for name in SCANS if with_upstream else ("mamba2",):
        runs[f"{name} layer, theirs"] = layer_step(theirs[name], hidden)
        runs[f"{name} scan, theirs"] = scans[name](width, batch, tokens, False)
    times = {name: [] for name in runs}
    for repeat in tqdm(range(repeats + 2), desc=f"{batch} x {tokens}", leave=False):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat > 1:
                times[name].append(time.perf_counter() - start)

    def ratio(slow, fast):
        return round(statistics.median(a / b for a, b in zip(times[slow], times[fast])), 2)

    return {
        "batch": batch,
        "tokens": tokens,
        "width": width,
        "repeats": repeats,
        "milliseconds": {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()},
        "theirs / ours": {n: ratio(f"{n}, theirs", n) for n in runs if f"{n}, theirs" in runs},
        "layer / gpt_neox layer": {n: ratio(f"{n} layer", "gpt_neox layer") for n in ("mamba", "mamba2")},
    }


def profile(width, batch, tokens):
    """Prints the operators of one Mamba layer's forward and backward, longest first."""
    model = layers(width)["mamba"]
    mixers_manticore.repair_mixers(model)
    step = layer_step(model, torch.randn(batch, tokens, width))
    for _ in range(5):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(10):
            step()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:16]:
        print(f"{row.key[:56]:56} {row.count // 10:4} calls {100 * row.self_cpu_time_total / total:6.1f} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-numba", action="store_true", help="time the torch scan even where numba is installed")
    parser.add_argument("--profile", nargs=2, type=int, metavar=("BATCH", "TOKENS"), help="only profile a Mamba layer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.no_numba:
        sys.modules["numba"] = None
    if args.profile:
        return profile(args.width, *args.profile)
    shapes = [(1, 128, True), (4, 128, True), (1, 512, False), (1, 1024, False)]
    rows = [measure(args.width, batch, tokens, args.repeats, slow) for batch, tokens, slow in shapes]
    out = {
        "kernel": "torch" if args.no_numba else f"numba {version('numba')}", "date": time.strftime("%Y-%m-%d"),
        "threads": args.threads, "machine": platform.machine(), "torch": torch.__version__,
        "transformers": version("transformers"), "rows": rows,
    }  # fmt: skip
    for row in rows:
        print(f"\nbatch {row['batch']}, {row['tokens']} tokens: {row['milliseconds']} ms")
        print(f"  theirs / ours {row['theirs / ours']}; layer / gpt_neox layer {row['layer / gpt_neox layer']}")
    if args.output:
        args.output.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
