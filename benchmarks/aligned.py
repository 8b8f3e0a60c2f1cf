"""What mapping one model's predictions to another's tokenizer costs: bits per byte, as it came and mapped.

    python benchmarks/aligned.py --models DIR_A DIR_B --texts prose=wiki.txt code=code.py --bytes 3000

For each text and both directions: each model with its own tokenizer behind its own start tokens; the other mapped to
the first's tokenizer; the uniform mixture of both, arithmetic; and the nodes that are read beside the text's own
tokens. Each result is kept as soon as it is there, in benchmarks/results/aligned.json; what is there is not measured
again. Text is read in windows of `--window` bytes, each behind start tokens.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from manticore_hf.modeling.aligned_hybrid import aligner_of

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.utils.files import write_json

RESULTS = Path(__file__).parent / "results" / "aligned.json"


def windows(text, size):
    """Pieces of about `size` bytes, cut at the ends of lines where there are some."""
    out, piece = [], ""
    for line in text.splitlines(keepends=True):
        if piece and len((piece + line).encode()) > size:
            out.append(piece)
            piece = ""
        piece += line
    return [*out, piece] if piece else out


@torch.no_grad()
def own_bits(model, tokens, text):
    """Bits of a text under a model with its own tokenizer, behind its start tokens; special tokens in it are text."""
    ids = list(tokens.cut(tokens.prefix + text.encode()))
    logits = model(torch.tensor([[*tokens.start, *ids]])).logits[0, len(tokens.start) - 1 : -1].float()
    picked = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])
    return -picked.double().sum().item() / math.log(2), len(ids)


@torch.no_grad()
def measure(hybrid, text):
    """Bits of a text: each component with its own tokenizer, the other one mapped, and their mixture."""
    home, other = hybrid.config.tokenizer_component, hybrid.config.aligned[0]
    aligner = aligner_of(hybrid)
    a, b = (aligner.bytes_of(hybrid, name) for name in (home, other))
    mapping = aligner.mapping(hybrid, other)
    mapping.at_boundary()
    out = {"bytes": len(text.encode())}
    out["own"], out["own_tokens"] = own_bits(hybrid.component(other), b, text)
    ids = list(a.cut(a.prefix + text.encode()))
    seen, whole = {}, hybrid.mix
    hybrid.mix = lambda weights, states, own, *past: (seen.update(own=own), whole(weights, states, own, *past))[1]
    read, began = aligner.read, time.perf_counter()
    aligner.read = lambda *args: seen.setdefault("reading", read(*args))
    try:
        hybrid(torch.tensor([[*a.start, *ids]]), use_cache=False)
    finally:
        del hybrid.mix, aligner.read
    out["seconds"] = time.perf_counter() - began
    first = len(a.start) - 1
    order = [name for name in hybrid.config.component_names]
    logs = [seen["own"][order.index(name)][0, first:-1].float().log_softmax(-1) for name in (home, other)]
    picked = [one.gather(-1, torch.tensor(ids)[:, None])[:, 0].double() for one in logs]
    out["home"], out["tokens"] = -picked[0].sum().item() / math.log(2), len(ids)  # it reads the hybrid's tokens
    out["mapped"] = -picked[1].sum().item() / math.log(2)
    out["mixture"] = -(torch.stack(picked).logsumexp(0) - math.log(2)).sum().item() / math.log(2)
    out["nodes"] = len(seen["reading"].states) - 1
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs=2, required=True, help="Directories or repositories.")
    parser.add_argument("--texts", nargs="+", required=True, help="NAME=FILE, UTF-8.")
    parser.add_argument("--bytes", type=int, default=3000, help="Of each text.")
    parser.add_argument("--window", type=int, default=1500, help="Bytes that are read at once.")
    parser.add_argument("--names", nargs=2, default=["a", "b"], help="What the results call the models.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    done = json.loads(options.results.read_text()) if options.results.exists() else {}
    hybrids = {}
    for pair in options.texts:
        kind, _, path = pair.partition("=")
        text = Path(path).read_text(encoding="utf-8").encode()[: options.bytes].decode(errors="ignore")
        for home, other in ((0, 1), (1, 0)):
            key = f"{options.names[other]} on {options.names[home]}'s tokenizer: {kind}"
            if key in done:
                continue
            if home not in hybrids:
                specs = [ComponentSpec(options.models[i], name=options.names[i]) for i in (home, other)]
                settings = {"mixture": "static", "mixture_space": "prob", "verify": False}
                hybrids[home] = ManticoreForCausalLM.from_components(specs, dtype=torch.float32, **settings)
            parts = [measure(hybrids[home], part) for part in windows(text, options.window)]
            total = {name: sum(part[name] for part in parts) for name in parts[0]}
            size = total["bytes"]
            row = {name: round(total[name] / size, 4) for name in ("home", "own", "mapped", "mixture")}
            row["loss"] = round(row["mapped"] - row["own"], 4)
            row |= {name: total[name] for name in ("bytes", "tokens", "own_tokens", "nodes")}
            row["seconds"] = round(total["seconds"], 1)
            done[key] = row
            options.results.parent.mkdir(exist_ok=True)
            write_json(options.results, done)
            print(key, row, flush=True)


if __name__ == "__main__":
    main()
