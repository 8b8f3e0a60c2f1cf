"""State-space layers on a GPU: mamba-ssm's CUDA kernels, our portable path and Transformers' torch path.

    python benchmarks/gpu_kernels.py --output benchmarks/results/gpu_kernels.json

One layer of Mamba and one of Mamba-2 (width 1024 by default) of random weights, with mamba-ssm and causal-conv1d
installed: reading a batch, training on it (forward and backward), and one token with a cache. Every repeat runs all
ways in turn. *portable* is what a hybrid runs without the packages: our scan where Transformers has a loop over
tokens, Transformers' chunked scan for Mamba-2. Errors are the largest differences from the same layer in float64, in
units of the largest value, of outputs and of the gradients of weights.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from manticore_hf.modeling import mixers_manticore as mixers
from manticore_hf.modeling.components_manticore import cache_argument
from tqdm.auto import tqdm
from transformers import DynamicCache, Mamba2Config, Mamba2Model, MambaConfig, MambaModel

WAYS = ("kernels", "portable", "torch")


def layer(kind, width):
    """A model of one layer, float32, on the GPU."""
    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": width, "num_hidden_layers": 1, "use_cache": False}
    if kind == "mamba":
        model = MambaModel(MambaConfig(state_size=16, **common)).cuda()
    else:
        model = Mamba2Model(Mamba2Config(head_dim=64, num_heads=2 * width // 64, n_groups=1, **common)).cuda()
    mixers.repair_mixers(model)
    return model


@contextlib.contextmanager
def way(name, model):
    """Runs a layer in one of the three ways."""
    taken = [m for m in model.modules() if isinstance(vars(m).get("forward"), mixers.OwnForward)]
    with contextlib.ExitStack() as stack:
        if name != "kernels":
            stack.enter_context(mock.patch.object(mixers, "_kernel_takes", lambda tensor: False))
        for mixer in taken if name == "torch" else ():
            plain = {key: mixers.plain_of(function) for key, function, _ in mixers._called(type(mixer).forward)}
            inner = inspect.unwrap(type(mixer).forward)
            own = mixers._rebuild(type(mixer).forward, inner.__code__, inner.__globals__ | plain)
            stack.enter_context(mock.patch.object(mixer, "forward", functools.partial(own, mixer)))
        yield


def seconds(run):
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def runs(model, hidden):
    """What is timed: name -> callable."""

    def read():
        with torch.no_grad():
            model.eval()(inputs_embeds=hidden)

    def train():
        model.train()
        model.zero_grad()
        model(inputs_embeds=hidden).last_hidden_state.float().square().mean().backward()

    cache = {cache_argument(model.forward): DynamicCache(config=model.config), "use_cache": True}
    with torch.no_grad():
        model.eval()(inputs_embeds=hidden[:, :8], **cache)

    def step():
        with torch.no_grad():
            model.eval()(inputs_embeds=hidden[:, :1], **cache)

    return {"read": read, "train": train, "step": step}


def gradients(model, hidden, target):
    """Output [batch, time, width] and the weights' gradients, in float64."""
    model.train().zero_grad()
    out = model(inputs_embeds=hidden).last_hidden_state
    (out.float() * target).mean().backward() if out.dtype != torch.float64 else (out * target).mean().backward()
    found = {"output": out.detach(), **{key: p.grad for key, p in model.named_parameters() if p.grad is not None}}
    return {key: value.double() for key, value in found.items()}


def errors(kind, width, batch, tokens, dtype):
    """Per way: the error of the output and the largest of any gradient."""
    model = layer(kind, width).to(dtype)
    hidden = torch.randn(batch, tokens, width, device="cuda").to(dtype)
    target = torch.randn(batch, tokens, width, device="cuda")
    exact = copy.deepcopy(model).double()
    with way("portable", exact):
        truth = gradients(exact, hidden.double(), target.double())
    out = {}
    for name in WAYS:
        with way(name, model):
            got = gradients(model, hidden, target)
        far = {key: ((got[key] - wanted).abs().max() / wanted.abs().max()).item() for key, wanted in truth.items()}
        out[name] = {"output": far.pop("output"), "gradients": max(far.values())}
    return out


def write(args, rows):
    """Everything measured so far."""
    if args.output is None:
        return
    names = ("torch", "transformers", "mamba_ssm", "causal_conv1d")
    about = {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(), "width": args.width,
        "repeats": args.repeats, "versions": {name: version(name) for name in names}, "rows": rows,
    }  # fmt: skip
    args.output.write_text(json.dumps(about, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", nargs="+", default=["mamba", "mamba2"], choices=("mamba", "mamba2"))
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    for kind in args.layers:
        mixer = type(layer(kind, args.width).layers[0].mixer)
        if not any(kernel for _, _, kernel in mixers._called(mixer.forward)):
            raise SystemExit("mamba_ssm and causal_conv1d are not installed: there is nothing to compare with.")
        for dtype in (torch.float32, torch.bfloat16):
            far = errors(kind, args.width, 2, 200, dtype)
            row = {"layer": kind, "dtype": str(dtype), "errors, 2 x 200 tokens": far}
            print(row, flush=True)
            rows.append(row)
        for dtype, batch, tokens in ((torch.bfloat16, 4, 1024), (torch.float32, 4, 1024), (torch.bfloat16, 1, 4096)):
            model = layer(kind, args.width).to(dtype)
            calls = runs(model, torch.randn(batch, tokens, args.width, device="cuda").to(dtype))
            # Transformers' loop over tokens keeps every state: a fraction of the text, and few repeats, must do
            ways = WAYS[:2] if kind == "mamba" and tokens > 1024 else WAYS
            for what, call in calls.items():
                times = {name: [] for name in ways}
                for repeat in tqdm(range(args.repeats + 2), desc=f"{kind} {what}", leave=False):
                    for name in ways:
                        if name == "torch" and what != "step" and repeat > 3:
                            continue
                        with way(name, model):
                            passed = seconds(call)
                        if repeat > 1:
                            times[name].append(passed)
                medians = {name: statistics.median(values) for name, values in times.items()}
                row = {
                    "layer": kind, "dtype": str(dtype), "batch": batch, "tokens": tokens if what != "step" else 1,
                    "what": what, "milliseconds": {name: 1e3 * value for name, value in medians.items()},
                    "over kernels": {name: value / medians["kernels"] for name, value in medians.items()},
                }  # fmt: skip
                print(row, flush=True)
                rows.append(row)
                write(args, rows)


if __name__ == "__main__":
    main()
