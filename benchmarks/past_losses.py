"""What the components' past losses are worth, and what else a token gate could know: gates with each and without.

    python benchmarks/past_losses.py --work WORK       # minutes on two idle cores; goes on where it was stopped

The demo's pair, frozen, on its two kinds of text: rows of one kind each (mixed), and rows that change from one kind to
the other in the middle (shifted). Nothing is chosen on test text but the best static mixture, a baseline, which gets
the weight that is best there. Gates are trained alone, over the frozen components, with probabilities mixed, so that a
gate needs of each token the components' last states, what it knows of their predictions, and their losses: these are
computed once, kept in WORK, and every gate is trained on them by Transformers' schedule and AdamW as the Trainer has
them. One line of each text says how far the hybrid, run as users run it, is from that. Every result is a line of the
output.

VARIANTS are gates with more than the package's: a small hidden layer beside the linear map, whether the components'
most probable tokens are the same, and a temperature for each component's prediction, learned with the gate. All start
where the gate without them does.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_pair import BLOCK, add_line, compose_pair, read_lines, rows_of
from manticore_hf.modeling.gate_manticore import TokenGate
from manticore_hf.modeling.mixture_manticore import confidence
from manticore_hf.modeling.past_losses import GATE_DECAYS, MOST, LossGate, decayed_sums, online_weights
from torch import nn
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from manticore_hf.demo.demo import COMPONENTS, KINDS
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import pack
from manticore_hf.evaluation.statistics import bootstrap, paired_p

ROWS = {"train": 160, "validation": 24, "test": 60}  # of each kind of text
TEXTS = ("mixed", "shifted")
SEEDS, RATES, BATCH = (0, 1, 2), (1e-3, 3e-3, 1e-2), 4
EPOCHS = {2_000: (3, 10, 30, 100), 20_000: (1, 3, 10, 30), 60_000: (1, 3, 10)}  # by training tokens
WIDTHS = (128, 128)  # of the pair's states
ETAS, DECAYS, SHARES = (0.03, 0.1, 0.3, 1.0), (0.5, 0.8, 0.9, 0.95, 0.98), (0.02, 0.1)
WEIGHTS = np.linspace(0, 1, 21)
# Validation text chooses among the settings of each; temperatures have so many times the gate's learning rate.
VARIANTS = {
    "hidden layer": [{"hidden": 16}, {"hidden": 64}],
    "agreement": [{"agreement": True}],
    "temperatures": [{"temperature": 10.0}],
    "all three": [{"hidden": 16, "agreement": True, "temperature": 10.0}],
}
VARIED_RATES = RATES[:2]  # no gate chose the third
VARIED = (2_000, 20_000)  # training tokens
COLDEST, HOTTEST = 0.5, 2.0  # temperatures
NODES = 1.25 + 0.75 * np.cos(np.pi * (np.arange(9) + 0.5) / 9)  # Chebyshev's, between their inverses


def rows(text: str, split: str) -> torch.Tensor:
    """Rows [count, BLOCK] of token ids, the two kinds in turn."""
    each = ROWS[split]
    if text == "mixed":
        found = torch.tensor(rows_of(split, each)["input_ids"])
        return found.view(2, each, BLOCK).transpose(0, 1).reshape(-1, BLOCK)
    tokenizer, half = AutoTokenizer.from_pretrained(COMPONENTS / "neox-prose"), BLOCK // 2
    one, other = (
        torch.tensor(pack(documents(kind, split), tokenizer, half, 2 * each)["input_ids"]) for kind in KINDS.values()
    )
    return torch.stack([torch.cat([one, other], 1)[:each], torch.cat([other, one], 1)[each:]], 1).reshape(-1, BLOCK)


@torch.no_grad()
def features(model, ids: torch.Tensor, static: bool) -> dict[str, torch.Tensor]:
    """Of each token but the last: what gates read, and each component's loss on the next one; if `static`, mixtures'.

    Returns:
        {"states": [rows, time, sum of widths] per component, "confidences", "nats": [rows, time, K], "norms": [rows,
        time, K, NODES] what normalises log-probabilities that are multiplied by NODES, "agree": [rows, time, 1] whether
        the most probable tokens are one, "geometric": [rows, weights] nats of geometric static mixtures with WEIGHTS on
        the second component, or no weights}.
    """
    out = {"states": [], "confidences": [], "nats": [], "norms": [], "agree": [], "geometric": []}
    for batch in ids.split(16):
        states, confidences, logprobs = [], [], []
        for name in model.config.component_names:
            state = model.segments.segment(name, 0)(batch, None, torch.arange(BLOCK)[None])
            states.append(state[:, :-1])
            logits = model.segments.logits(name, states[-1])
            confidences.append(confidence(logits)[0])
            logprobs.append(logits.log_softmax(-1))
        names = batch[:, 1:, None]
        out["states"].append(torch.stack(states))
        out["confidences"].append(torch.stack(confidences))
        out["nats"].append(torch.cat([-one.gather(-1, names) for one in logprobs], -1))
        norms = [torch.stack([(float(node) * one).logsumexp(-1) for node in NODES], -1) for one in logprobs]
        out["norms"].append(torch.stack(norms, -2))
        first, second = (one.argmax(-1, keepdim=True) for one in logprobs)
        out["agree"].append((first == second).float())
        mixed = []
        for weight in WEIGHTS if static else ():
            mean = (1 - weight) * logprobs[0] + weight * logprobs[1]
            mixed.append((mean.logsumexp(-1) - mean.gather(-1, names)[..., 0]).sum(-1))
        out["geometric"].append(torch.stack(mixed, -1) if static else torch.empty(len(batch), 0))
    return {key: torch.cat(values, 1 if key in ("states", "confidences") else 0) for key, values in out.items()}


def known(nats: torch.Tensor, decays, means: bool) -> torch.Tensor:
    """[rows, time, K, decays]: the decayed losses that are known where each token is predicted."""
    decays = torch.tensor(decays, dtype=nats.dtype)
    values = nats.clamp(max=MOST)[..., None] * ((1 - decays) if means else torch.ones_like(decays))
    sums = decayed_sums(values, decays.expand_as(values))
    return F.pad(sums[:, :-1], (0, 0, 0, 0, 1, 0))


def row_nats(weights: torch.Tensor, nats: torch.Tensor) -> torch.Tensor:
    """[rows] of a mixture of probabilities."""
    return -(weights.log() - nats).logsumexp(-1).sum(-1)


def online(nats, eta, decay, share):
    """[rows] nats of the online mixture with a uniform prior."""
    prior = nats.new_full((nats.shape[-1],), 1 / nats.shape[-1])
    return row_nats(online_weights(prior, known(nats, [decay], False)[..., 0], eta, share), nats)


def gate_inputs(found: dict[str, torch.Tensor]) -> None:
    """Adds what gates read of each token: "read" [rows, time, features], as `TokenGate` has them, and "losses"."""
    parts = []
    for state, confidences in zip(found.pop("states"), found.pop("confidences")):
        parts += [state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6), confidences]
    found["read"] = torch.cat(parts, -1)
    losses = known(found["nats"], GATE_DECAYS, True)
    found["losses"] = (losses - losses.mean(-2, keepdim=True)).flatten(-2)


def fit(module, loss, count, rate, epochs, seed):
    """Trains a module on the `loss` of batches (indices below `count`), by the AdamW and schedule of the Trainer."""
    generator, steps = torch.Generator().manual_seed(seed), epochs * -(-count // BATCH)
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(5, steps // 4), steps)
    for _ in range(epochs):
        for batch in torch.randperm(count, generator=generator).split(BATCH):
            value = loss(batch)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def tempered(nats, norms, power):
    """[..., K] nats of predictions whose log-probabilities are multiplied by `power` [K], an inverse temperature.

    What normalises them is smooth in it, and interpolated between NODES (by Lagrange's polynomials).
    """
    nodes = torch.tensor(NODES, dtype=power.dtype)
    basis = []
    for node in nodes:
        others = nodes[nodes != node]
        basis.append(((power[:, None] - others) / (node - others)).prod(-1))
    return (norms * torch.stack(basis, -1)).sum(-1) + power * nats


class Gate(nn.Module):
    """A gate that is trained on features.

    Args:
        widths: Of the components' states.
        past: Whether it reads past losses.
        hidden: Units of a hidden layer beside the linear map, 0 for none.
        agreement: Whether it reads if the components' most probable tokens are the same.
        temperature: How many times the gate's learning rate temperatures have, 0 for none.
    """

    def __init__(self, widths, past, hidden=0, agreement=False, temperature=0.0):
        super().__init__()
        self.module, self.past = (LossGate if past else TokenGate)(widths), past
        self.module.reset()
        count, self.speed = len(widths), temperature
        size = self.module.linear.in_features + past * count * len(GATE_DECAYS) + agreement
        last = nn.Linear(hidden, count, bias=False) if hidden else None
        self.hidden = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), last) if hidden else None
        self.agreement = nn.Linear(1, count, bias=False) if agreement else None
        self.powers = nn.Parameter(torch.zeros(count)) if temperature else None
        for zero in (self.agreement, last):
            if zero is not None:
                nn.init.zeros_(zero.weight)

    def nats(self, found, index=slice(None)):
        """[rows] nats of some rows."""
        read = [found["read"][index]]
        scores, nats = self.module.linear(read[0]), found["nats"][index]
        if self.past:
            read.append(found["losses"][index])
            scores = scores + self.module.past(read[-1])
        if self.agreement is not None:
            read.append(found["agree"][index])
            scores = scores + self.agreement(read[-1])
        if self.hidden is not None:
            scores = scores + self.hidden(torch.cat(read, -1))
        if self.powers is not None:
            nats = tempered(nats, found["norms"][index], 1 / self.temperatures())
        return row_nats(scores.softmax(-1), nats)

    def temperatures(self):
        """[K], 1 at the start."""
        return (self.speed * self.powers).exp().clamp(COLDEST, HOTTEST)

    def fitted(self, found, chosen, rate, epochs, seed):
        """Itself, after one run over the rows `chosen`."""

        def loss(batch):
            return self.nats(found, chosen[batch]).sum() / (len(batch) * (BLOCK - 1))

        fit(self, loss, len(chosen), rate, epochs, seed)
        return self


def best_gate(data, text, past, tokens, seed, variants=({},), rates=RATES):
    """(validation loss, settings, [rows] nats on the test text, gate) of the run that the validation text chooses."""
    train, validation = data[text, "train"], data[text, "validation"]
    order = torch.randperm(len(train["nats"]), generator=torch.Generator().manual_seed(100 + seed))
    chosen, runs = order[: round(tokens / BLOCK)], []
    for variant, rate, epochs in itertools.product(variants, rates, EPOCHS[tokens]):
        torch.manual_seed(seed)
        gate = Gate(WIDTHS, past, **variant).fitted(train, chosen, rate, epochs, seed)
        with torch.no_grad():
            settings = {**variant, "learning_rate": rate, "epochs": epochs}
            if variant.get("temperature"):
                settings["temperatures"] = gate.temperatures().tolist()
            runs.append((gate.nats(validation).sum().item(), settings, gate))
    loss, settings, gate = min(runs, key=lambda run: run[0])
    with torch.no_grad():
        return loss / validation["nats"][..., 0].numel(), settings, gate.nats(data[text, "test"]), gate


def losses(nats):
    """Loss per token and its interval of [rows] or [seeds, rows] nats."""
    nats = np.atleast_2d(np.asarray(nats, dtype=float))
    tokens = np.full(nats.shape[1], BLOCK - 1)
    return {"loss": float(nats.mean() / (BLOCK - 1)), "interval": bootstrap(nats, tokens)}


def gain(nats, better):
    """By how much `better` is below, with interval and p, of [rows] or [seeds, rows] nats."""
    nats = np.atleast_2d(np.asarray(nats, dtype=float)) - np.atleast_2d(np.asarray(better, dtype=float))
    tokens = np.full(nats.shape[1], BLOCK - 1)
    won = (nats.mean(1) > 0).sum()
    return {
        "gain": float(nats.mean() / (BLOCK - 1)),
        "interval": bootstrap(nats, tokens),
        "p": paired_p(nats),
        "seeds_won": int(won),
        "seeds": len(nats),
    }


def untrained(data, text):
    """({name: [rows] test nats}, {name: what was chosen}) of what needs no training."""
    test, validation, names = data[text, "test"], data[text, "validation"], list(KINDS)
    out = {name: test["nats"][..., k].sum(-1) for k, name in enumerate(names)}
    static = {w: row_nats(torch.tensor([1 - w, w], dtype=torch.float32), test["nats"]) for w in WEIGHTS}
    out["uniform, probabilities"] = static[0.5]
    out["uniform, log-probabilities"] = test["geometric"][:, list(WEIGHTS).index(0.5)]
    best = min(static, key=lambda w: static[w].sum().item())
    where = int(test["geometric"].sum(0).argmin())
    out["best static, probabilities"] = static[best]
    out["best static, log-probabilities"] = test["geometric"][:, where]
    default = compose_pair().config
    default = {"eta": default.online_eta, "decay": default.online_decay, "share": default.online_share}
    grid = [dict(zip(default, one)) for one in itertools.product(ETAS, DECAYS, SHARES)]
    chosen = min(grid, key=lambda one: online(validation["nats"], **one).sum().item())
    out["online, defaults"] = online(test["nats"], **default)
    out["online, chosen on validation text"] = online(test["nats"], **chosen)
    settings = {"best static, probabilities": {"weight of the second": float(best)}, "online, defaults": default}
    settings |= {"best static, log-probabilities": {"weight of the second": float(WEIGHTS[where])}}
    return out, settings | {"online, chosen on validation text": chosen}


@torch.no_grad()
def as_users_run_it(gate, data, text, ids):
    """The largest difference, in nats per token of a row, between what was measured and the hybrid's own forward."""
    wanted = {"gate": gate.nats(data[text, "test"], slice(0, 16)).sum() / 16}
    model = compose_pair(mixture="token", mixture_space="prob", gate_past_losses=True).eval()
    model.hybrid_mixer.token_gate.load_state_dict(gate.module.state_dict())
    found = {"gate": model(input_ids=ids[:16], labels=ids[:16], use_cache=False).loss * (BLOCK - 1)}
    model = compose_pair(mixture="online", mixture_space="prob").eval()
    default = [getattr(model.config, f"online_{key}") for key in ("eta", "decay", "share")]
    wanted["online"] = online(data[text, "test"]["nats"][:16], *default).mean()
    found["online"] = model(input_ids=ids[:16], labels=ids[:16], use_cache=False).loss * (BLOCK - 1)
    return {key: abs(found[key] - wanted[key]).item() / (BLOCK - 1) for key in found}


def measure_variants(data, text, tokens, past, output, lines):
    """Measures what is not in the output yet of VARIANTS, against the gate without them."""
    key = {"what": "variant", "text": text, "tokens": tokens, "past_losses": past}
    done = [one["variant"] for one in lines if {name: one.get(name) for name in key} == key]
    if set(VARIANTS) <= set(done):
        return
    plain = torch.stack([best_gate(data, text, past, tokens, seed, rates=VARIED_RATES)[2] for seed in SEEDS])
    for name, variants in VARIANTS.items():
        if name not in done:
            runs = [best_gate(data, text, past, tokens, seed, variants, VARIED_RATES) for seed in SEEDS]
            nats = torch.stack([run[2] for run in runs])
            add_line(
                output,
                lines,
                **key,
                variant=name,
                loss=losses(nats)["loss"],
                plain=losses(plain)["loss"],
                **gain(plain, nats),
                each=((plain - nats).mean(1) / (BLOCK - 1)).tolist(),
                validation=[run[0] for run in runs],
                settings=[run[1] for run in runs],
            )
            print(lines[-1], flush=True)


@torch.no_grad()
def interpolation_error(model, data):
    """The largest error, in nats, of a component's loss under temperatures that are between NODES, on a few rows."""
    ids, found, worst = rows("mixed", "test")[:2], data["mixed", "test"], 0.0
    for k, name in enumerate(model.config.component_names):
        state = model.segments.segment(name, 0)(ids, None, torch.arange(BLOCK)[None])
        logprobs = model.segments.logits(name, state)[:, :-1].log_softmax(-1)
        for power in np.linspace(1 / HOTTEST, 1 / COLDEST, 31):
            wanted = -(power * logprobs).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            powers = torch.full((len(WIDTHS),), power, dtype=torch.float32)
            given = tempered(found["nats"][:2], found["norms"][:2], powers)[..., k]
            worst = max(worst, (wanted - given).mean().abs().item())
    return worst


def main():
    """Measures what is not in the output yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for what is computed once")
    parser.add_argument("--output", default="benchmarks/results/past_losses.jsonl", help="results, one JSON a line")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, data, lines = compose_pair().eval(), {}, read_lines(args.output)
    for text, split in itertools.product(TEXTS, ROWS):
        file = args.work / f"features-{text}-{split}.pt"
        if not file.is_file():
            torch.save(features(model, rows(text, split), split == "test"), file)
            print(f"{file.name} is made", flush=True)
        found = data[text, split] = torch.load(file)
        gate_inputs(found)
    for text in TEXTS:
        if any(one["text"] == text and one["what"] == "users" for one in lines):
            continue
        nats, settings = untrained(data, text)
        if not any(one["text"] == text and one["what"] == "untrained" for one in lines):
            for name, values in nats.items():
                add_line(
                    args.output,
                    lines,
                    what="untrained",
                    text=text,
                    name=name,
                    **losses(values),
                    settings=settings.get(name),
                )
            static = min(("best static, probabilities", "best static, log-probabilities"), key=lambda k: nats[k].sum())
            for name in ("online, defaults", "online, chosen on validation text"):
                add_line(
                    args.output,
                    lines,
                    what="over static",
                    text=text,
                    name=name,
                    than=static,
                    **gain(nats[static], nats[name]),
                )
        for tokens in EPOCHS:
            if any(
                (one["what"], one["text"], one["tokens"]) == ("past", text, tokens) for one in lines if "tokens" in one
            ):
                continue
            runs = {past: [best_gate(data, text, past, tokens, seed) for seed in SEEDS] for past in (False, True)}
            for past, found in runs.items():
                add_line(
                    args.output,
                    lines,
                    what="gate",
                    text=text,
                    past_losses=past,
                    tokens=tokens,
                    **losses(torch.stack([run[2] for run in found])),
                    validation=[run[0] for run in found],
                    settings=[run[1] for run in found],
                )
            both = [torch.stack([run[2] for run in runs[past]]) for past in (False, True)]
            add_line(args.output, lines, what="past", text=text, tokens=tokens, **gain(*both))
            print(lines[-1], flush=True)
        *_, gate = best_gate(data, text, True, min(EPOCHS), SEEDS[0])
        add_line(
            args.output,
            lines,
            what="users",
            text=text,
            difference=as_users_run_it(gate, data, text, rows(text, "test")),
        )
    if not any(one["what"] == "interpolation" for one in lines):
        add_line(args.output, lines, what="interpolation", text="mixed", error=interpolation_error(model, data))
    for past, text, tokens in itertools.product((False, True), TEXTS, VARIED):
        measure_variants(data, text, tokens, past, args.output, lines)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
