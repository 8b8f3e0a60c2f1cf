"""Two real models with tokenizers of their own, joined and not: bits per byte of every kind of text, and of all.

    python benchmarks/real_pair.py --models gemma smollm2 --texts prose=prose.txt code=code.txt ... --work WORK

The first model's tokenizer is the hybrid's. Each text is cut into windows of whole lines, each read behind start
tokens: the last 20 kB are the test, the 5 kB before them validate, the windows from the beginning train. Components are
frozen, probabilities are mixed, and a mixture of probabilities needs of each token no more than the components'
log-probabilities of it, and a gate their last states and what it knows of their predictions: these are computed once
per window, kept in WORK (a run goes on where it was stopped), and every gate is trained on them, by AdamW and the
schedule that the Trainer has. Nothing is chosen on test text but the best static weight, a baseline.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from aligned import own_bits, windows
from manticore_hf.modeling.aligned_hybrid import aligner_of
from manticore_hf.modeling.gate_manticore import TokenGate
from manticore_hf.modeling.mixture_manticore import confidence
from manticore_hf.modeling.past_losses import GATE_DECAYS, LossGate, online_weights
from past_losses import fit, known
from tqdm import tqdm
from transformers import AutoConfig

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.evaluation.statistics import bootstrap, paired_p
from manticore_hf.report.speed import measure_speed
from manticore_hf.utils.files import write_json

RESULTS = Path(__file__).parent / "results" / "real_pair.json"
PROMPT = 256  # tokens that are read before any is written
TEST, VALIDATION = 20_480, 5_120  # bytes of each text
SEEDS, RATES, EPOCHS = (0, 1, 2), (1e-3, 3e-3, 1e-2), (1, 3, 10)
WEIGHTS = np.linspace(0, 1, 21)
NODES = (1 - np.cos(np.linspace(0, math.pi, 9))) / 2  # weights of the second model, Chebyshev's
ONLINE = {"eta": 0.1, "decay": 0.95, "share": 0.05}  # the hybrid's defaults


def splits(text, size, test=TEST):
    """{"test" (bytes), "validation", "train": windows of a text}, in the order in which they are worth measuring."""
    pieces, out, counted = windows(text, size), {"test": [], "validation": []}, 0
    while counted < test + VALIDATION:
        piece = pieces.pop()
        out["test" if counted < test else "validation"].append(piece)
        counted += len(piece.encode())
    return {**out, "train": pieces}


@torch.no_grad()
def measure(hybrid, text, alone=True):
    """What every mixture of a window needs, and what its components make of it `alone`.

    Returns:
        {"nats" [tokens, K] of the hybrid's tokens, the other component's mapped; "norms" [tokens, NODES]: the logarithm
        of what normalises their geometric mixtures; "read" [tokens, features] of a gate; "own" bits of each component
        with its own tokenizer; "bytes"; "seconds" of the processor: hybrid, components}.
    """
    aligner, names = aligner_of(hybrid), hybrid.config.component_names
    tokens, ids = {name: aligner.bytes_of(hybrid, name) for name in names}, None
    own, start = [], time.process_time()
    for name in names if alone else ():
        own.append(own_bits(hybrid.component(name), tokens[name], text)[0])
    began = time.process_time()
    home = tokens[hybrid.config.tokenizer_component]
    ids, first = torch.tensor(list(home.cut(home.prefix + text.encode()))), len(home.start) - 1
    seen, whole = {}, hybrid.mix

    def mix(weights, states, logits, *past):
        seen.update(states=states, logits=logits)
        return whole(weights, states, logits, *past)

    hybrid.mix = mix
    try:
        hybrid(torch.tensor([[*home.start, *ids.tolist()]]), use_cache=False)
    finally:
        del hybrid.mix
    seconds = [time.process_time() - began, began - start]
    nats, read, norms = [], [], []
    pair = [logits[0, first:-1].float().log_softmax(-1) for logits in seen["logits"]]
    for rows in zip(*(one.split(16) for one in pair)):  # small enough for the processor's cache
        norms.append(torch.stack([torch.lerp(*rows, weight).logsumexp(-1) for weight in NODES], -1))
    for state, logits in zip(seen["states"], pair):
        state = state[0, first:-1].float()
        nats.append(-logits.gather(-1, ids[:, None]))
        read += [state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6), confidence(logits[None])[0][0]]
    return {
        "nats": torch.cat(nats, -1),
        "norms": torch.cat(norms),
        "read": torch.cat(read, -1),
        "own": own,
        "bytes": len(text.encode()),
        "seconds": seconds,
    }


def joined(options, mixture="static"):
    """A hybrid of the two models under the first one's tokenizer, whose probabilities are mixed."""
    specs = [ComponentSpec(path, name=name) for path, name in zip(options.models, options.names)]
    return ManticoreForCausalLM.from_components(
        specs,
        dtype=torch.float32,
        mixture=mixture,
        mixture_space="prob",
        verify=False,
        tokenizer_component=options.names[0],
    ).eval()


def keep(file, measured):
    """Writes what was measured of a window, whole or not at all."""
    torch.save(measured, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


def collect(options):
    """{(kind, split): measured windows}, those that are missing measured now, up to the wanted number of tokens."""
    texts, found, hybrid = dict(pair.split("=", 1) for pair in options.texts), {}, None
    plan = {kind: splits(Path(path).read_text(encoding="utf-8"), options.window) for kind, path in texts.items()}
    jobs = [
        (kind, split, i) for split in ("test", "validation") for kind in plan for i in range(len(plan[kind][split]))
    ]
    most = max(len(plan[kind]["train"]) for kind in plan)
    jobs += [(kind, "train", i) for i in range(most) for kind in plan if i < len(plan[kind]["train"])]
    trained = 0
    for kind, split, i in tqdm(jobs, desc="windows"):
        file = options.work / f"{kind}-{split}-{i}.pt"
        if split == "train" and trained >= options.tokens:
            break
        if not file.exists():
            if options.analyse:
                continue
            hybrid = hybrid or joined(options)
            keep(file, measure(hybrid, plan[kind][split][i], split == "test"))
        found.setdefault((kind, split), []).append(torch.load(file, weights_only=True))
        trained += len(found[kind, split][-1]["nats"]) if split == "train" else 0
    for one in itertools.chain(*found.values()):
        losses = known(one["nats"][None], GATE_DECAYS, True)[0]
        one["losses"] = (losses - losses.mean(-2, keepdim=True)).flatten(-2)
    return found


def measured_speed(options):
    """`measure_speed` of the hybrid and of each model alone, on the beginning of the first text."""
    text = Path(options.texts[0].split("=", 1)[1]).read_text(encoding="utf-8")
    hybrid = joined(options)
    home = aligner_of(hybrid).bytes_of(hybrid, hybrid.config.tokenizer_component)
    prompt = [*home.start, *home.cut(text[: 8 * PROMPT].encode())][:PROMPT]
    return measure_speed(hybrid, prompt, new_tokens=32, repeats=5)


def mixed(weights, one):
    """Nats of a window under a mixture of probabilities with `weights` [tokens or 1, K]."""
    return -(weights.log() - one["nats"]).logsumexp(-1).sum()


def geometric(weights, one):
    """Nats of a window under a geometric mixture with `weights` [tokens or 1, 2]."""
    norms = one["norms"].to(weights.dtype)
    return ((weights * one["nats"]).sum(-1) + (lagrange(weights[..., 1]) * norms).sum(-1)).sum()


def lagrange(weight):
    """[..., NODES]: what each node's value counts at a weight (polynomial interpolation)."""
    nodes, basis = torch.tensor(NODES, dtype=weight.dtype), []
    for i, node in enumerate(nodes):
        others = torch.cat([nodes[:i], nodes[i + 1 :]])
        basis.append(((weight[..., None] - others) / (node - others)).prod(-1))
    return torch.stack(basis, -1)


SPACES = {"": mixed, "geometric ": geometric}


def online(one):
    """Nats of a window under the online mixture."""
    prior = one["nats"].new_full((one["nats"].shape[-1],), 1 / one["nats"].shape[-1])
    sums = known(one["nats"][None], [ONLINE["decay"]], False)[..., 0]
    return mixed(online_weights(prior, sums, ONLINE["eta"], ONLINE["share"])[0], one)


class Gate:
    """A token gate over a mixture (of SPACES) that is trained on windows, with past losses or without."""

    def __init__(self, widths, past, space):
        self.module, self.past, self.mixed = (LossGate if past else TokenGate)(widths), past, SPACES[space]
        self.module.reset()

    def nats(self, one):
        scores = self.module.linear(one["read"])
        return self.mixed((scores + self.module.past(one["losses"]) if self.past else scores).softmax(-1), one)

    def train(self, rows, rate, epochs, seed):
        def loss(batch):
            return sum(self.nats(rows[i]) for i in batch) / sum(len(rows[i]["nats"]) for i in batch)

        fit(self.module, loss, len(rows), rate, epochs, seed)
        return self


def best_gate(found, kinds, widths, past, space, tokens, seed):
    """(settings, gate) that the validation text chooses of those trained on `tokens` tokens of all kinds."""
    rows, counted = [], 0
    pools = [
        [
            found[kind, "train"][i]
            for i in torch.randperm(len(found[kind, "train"]), generator=torch.Generator().manual_seed(100 + seed))
        ]
        for kind in kinds
    ]
    for one in itertools.chain(*itertools.zip_longest(*pools)):
        if one is not None and counted < tokens:
            rows.append(one)
            counted += len(one["nats"])
    held, runs = [one for kind in kinds for one in found[kind, "validation"]], []
    for rate, epochs in itertools.product(RATES, EPOCHS):
        gate = Gate(widths, past, space).train(rows, rate, epochs, seed)
        with torch.no_grad():
            runs.append((sum(gate.nats(one).item() for one in held), rate, epochs, gate))
    loss, rate, epochs, gate = min(runs, key=lambda run: run[0])
    return {"learning_rate": rate, "epochs": epochs, "tokens": counted}, gate


def rate_of(bits, sizes):
    """Bits per byte of [windows] or [seeds, windows] bits, with the middle 95 % of the bootstrap."""
    bits = np.atleast_2d(np.asarray(bits, dtype=float))
    return {
        "bits": round(float(bits.mean(0).sum() / sum(sizes)), 4),
        "interval": [round(one, 4) for one in bootstrap(bits, sizes)],
    }


def analyse(found, names, widths):
    """The results, by contender and kind of text; "all" is every kind together."""
    kinds = sorted({kind for kind, split in found if split == "test"})
    tests = {kind: found[kind, "test"] for kind in kinds}
    sizes = {kind: [one["bytes"] for one in rows] for kind, rows in tests.items()}
    held = [one for kind in kinds for one in found[kind, "validation"]]

    def bits(nats_of):
        return {kind: np.array([float(nats_of(one)) / math.log(2) for one in rows]) for kind, rows in tests.items()}

    def fixed(weight, space=""):
        return lambda one: SPACES[space](torch.tensor([[1 - weight, weight]]).clamp(min=1e-30), one)

    contenders = {}
    for k, name in enumerate(names):
        own = {kind: np.array([one["own"][k] for one in rows]) for kind, rows in tests.items()}
        contenders[f"{name}, as it came"] = own
    contenders[f"{names[1]}, mapped"] = bits(lambda one: one["nats"][:, 1].sum())
    contenders["uniform mixture"] = bits(fixed(0.5))
    chosen = min(WEIGHTS, key=lambda weight: sum(float(fixed(weight)(one)) for one in held))
    contenders["static, chosen on validation text"] = bits(fixed(chosen))
    best = min(WEIGHTS, key=lambda weight: sum(values.sum() for values in bits(fixed(weight)).values()))
    contenders["static, best on the test text"] = bits(fixed(best))
    contenders["online mixture"] = bits(online)
    contenders["geometric mixture, uniform"] = bits(fixed(0.5, "geometric "))
    product = min(WEIGHTS, key=lambda weight: sum(float(fixed(weight, "geometric ")(one)) for one in held))
    contenders["geometric mixture, static, chosen on validation text"] = bits(fixed(product, "geometric "))
    weights, settings = {"chosen": float(chosen), "best": float(best), "geometric": float(product)}, {}
    trained = sum(len(one["nats"]) for kind in kinds for one in found.get((kind, "train"), []))
    for tokens, past, space in itertools.product((5_000, 20_000, 60_000), (False, True), SPACES):
        if trained < tokens:
            continue
        label = f"{space}token gate{', past losses' if past else ''}, {tokens:,} tokens"
        runs = []
        for seed in SEEDS:
            how, gate = best_gate(found, kinds, widths, past, space, tokens, seed)
            with torch.no_grad():
                runs.append(bits(gate.nats))
            settings[f"{label}, seed {seed}"] = how
        contenders[label] = {kind: np.stack([run[kind] for run in runs]) for kind in kinds}
    every = [size for kind in kinds for size in sizes[kind]]
    out = {
        "rows": {},
        "weights": weights,
        "settings": settings,
        "train_tokens": trained,
        "bytes": {kind: sum(sizes[kind]) for kind in kinds},
        "tokens": {kind: sum(len(one["nats"]) for one in tests[kind]) for kind in kinds},
    }
    whole = {label: np.concatenate([values[kind] for kind in kinds], -1) for label, values in contenders.items()}
    single = min((label for label in contenders if label.endswith("as it came")), key=lambda label: whole[label].sum())
    for label, values in contenders.items():
        row = {kind: rate_of(values[kind], sizes[kind]) for kind in kinds} | {"all": rate_of(whole[label], every)}
        gain = np.atleast_2d(whole[single]) - np.atleast_2d(whole[label])
        row["gain"] = {
            "percent": round(100 * float(gain.mean(0).sum() / whole[single].sum()), 2),
            "bits": rate_of(gain, every),
            "p": paired_p(gain),
        }
        row["worst"] = round(
            max(100 * (row[k]["bits"] / out["rows"].get(single, row)[k]["bits"] - 1) for k in kinds), 2
        )
        out["rows"][label] = row
    out["single"] = single
    hybrid, apart = np.array([one["seconds"] for rows in tests.values() for one in rows]).sum(0)
    out["cost"] = {
        "hybrid / components": round(hybrid / apart, 2),
        "components, tokens per second of the processor": round(sum(out["tokens"].values()) / apart, 1),
    }
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs=2, required=True, help="directories or repositories; the first has the tokenizer"
    )
    parser.add_argument("--names", nargs=2, default=["Gemma", "SmolLM2"], help="what the results call them")
    parser.add_argument("--texts", nargs="+", required=True, help="KIND=FILE, UTF-8")
    parser.add_argument("--work", type=Path, required=True, help="where windows that were read are kept")
    parser.add_argument("--tokens", type=int, default=60_500, help="training tokens to read, of all kinds together")
    parser.add_argument("--window", type=int, default=1500, help="bytes that are read at once")
    parser.add_argument("--analyse", action="store_true", help="only what has been read so far")
    parser.add_argument("--speed", action="store_true", help="only speed and memory, to real_pair_speed.json")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    made_with = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    if options.speed:
        made = {"date": time.strftime("%Y-%m-%d"), "versions": made_with}
        write_json(options.results.with_name("real_pair_speed.json"), measured_speed(options) | made)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    found = collect(options)
    widths = [AutoConfig.from_pretrained(path).hidden_size for path in options.models]
    result = analyse(found, options.names, widths)
    result |= {"date": time.strftime("%Y-%m-%d"), "versions": made_with, "window": options.window}
    write_json(options.results, result)
    for label, row in result["rows"].items():
        bits = {kind: row[kind]["bits"] for kind in (*result["bytes"], "all")}
        print(f"{label:40}", bits, f"{row['gain']['percent']:+.2f} %, worst {row['worst']:+.2f} %")


if __name__ == "__main__":
    main()
