"""python examples/compose.py

Joins two pretrained models and compares the untrained hybrid with them: with one block it starts as the mean of its
components' predictions (train.py shows what training adds). Plots the losses on each kind of text. Uses the two tiny
components that ship with the package, and text of Python's standard library that they have not seen: no network, no
GPU, a few seconds.
"""

import argparse
from importlib.resources import files

from transformers import AutoTokenizer

from manticore_hf import ManticoreForCausalLM
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import pack
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.utils.plots import plot_losses

SHIPPED = [str(files("manticore_hf") / "demo_components" / name) for name in ("neox-prose", "mamba-code")]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--components", nargs="+", default=SHIPPED, help="Hub repositories or directories")
    parser.add_argument("--rows", type=int, default=32, help="test rows of 128 tokens for each kind of text")
    parser.add_argument("--picture", default="compose.png", help="where to draw the losses (default: %(default)s)")
    args = parser.parse_args()

    model = ManticoreForCausalLM.from_components(args.components, num_blocks=1)
    tokenizer = AutoTokenizer.from_pretrained(args.components[0])
    print(f"{model.num_parameters():,} parameters; mixture weights {model.mixture_weights().tolist()}")
    found = {}
    for kind in ("prose", "code"):
        losses = compare_losses(model, pack(documents(kind, "test"), tokenizer, 128, args.rows))
        print(f"{kind}, nats per token: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        found |= {f"{name}, {kind}": loss for name, loss in losses.items()}
    plot_losses(found, args.picture)
    print(f"drawn: {args.picture}")
    prompt = tokenizer("def close(self):", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]))
