"""What the components' past losses are worth: the online mixture, and a token gate with them and without.

    python benchmarks/past_losses.py --work WORK       # minutes on two idle cores; goes on where it was stopped

The demo's pair, frozen, on its two kinds of text: rows of one kind each (mixed), and rows that change from one kind to
the other in the middle (shifted). Nothing is chosen on test text but the best static mixture, a baseline, which gets
the weight that is best there. Gates are trained alone, over the frozen components, with probabilities mixed, so that a
gate needs of each token the components' last states, what it knows of their predictions, and their losses: these are
computed once, kept in WORK, and every gate is trained on them by Transformers' schedule and AdamW as the Trainer has
them. The last line says how far the hybrid, run as users run it, is from that. Every result is a line of the output.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_pair import BLOCK, add_line, compose_pair, read_lines, rows_of
from manticore_hf.modeling.mixing_manticore import TokenGate
from manticore_hf.modeling.mixture_manticore import sureness
from manticore_hf.modeling.past_losses import GATE_DECAYS, MOST, LossGate, decayed_sums, online_weights
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
def features(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each token but the last: what a gate reads, and each component's loss on the next one; of static mixtures too.

    Returns:
        {"states": [rows, time, sum of widths] per component, "sure", "nats": [rows, time, K], "geometric": [rows,
        weights] nats of geometric static mixtures with WEIGHTS on the second component}.
    """
    out = {"states": [], "sure": [], "nats": [], "geometric": []}
    for batch in ids.split(16):
        states, sure, logprobs = [], [], []
        for name in model.config.component_names:
            state = model.segments.segment(name, 0)(batch, None, torch.arange(BLOCK)[None])
            states.append(state[:, :-1])
            logits = model.segments.logits(name, states[-1])
            sure.append(sureness(logits)[0])
            logprobs.append(logits.log_softmax(-1))
        names = batch[:, 1:, None]
        out["states"].append(torch.stack(states))
        out["sure"].append(torch.stack(sure))
        out["nats"].append(torch.cat([-one.gather(-1, names) for one in logprobs], -1))
        mixed = []
        for weight in WEIGHTS:
            mean = (1 - weight) * logprobs[0] + weight * logprobs[1]
            mixed.append((mean.logsumexp(-1) - mean.gather(-1, names)[..., 0]).sum(-1))
        out["geometric"].append(torch.stack(mixed, -1))
    return {key: torch.cat(values, 1 if key in ("states", "sure") else 0) for key, values in out.items()}


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
    for state, sure in zip(found.pop("states"), found.pop("sure")):
        parts += [state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6), sure]
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


class Gate:
    """A gate that is trained on features."""

    def __init__(self, widths, past):
        self.module, self.past = (LossGate if past else TokenGate)(widths), past
        self.module.reset()

    def nats(self, found, index=slice(None)):
        """[rows] nats of some rows."""
        scores = self.module.linear(found["read"][index])
        if self.past:
            scores = scores + self.module.past(found["losses"][index])
        return row_nats(scores.softmax(-1), found["nats"][index])

    def train(self, found, chosen, rate, epochs, seed):
        """One run over the rows `chosen`."""

        def loss(batch):
            return self.nats(found, chosen[batch]).sum() / (len(batch) * (BLOCK - 1))

        fit(self.module, loss, len(chosen), rate, epochs, seed)
        return self


def best_gate(data, text, past, tokens, seed):
    """(validation loss, settings, [rows] nats on the test text, gate) of the run that the validation text chooses."""
    train, validation = data[text, "train"], data[text, "validation"]
    order = torch.randperm(len(train["nats"]), generator=torch.Generator().manual_seed(100 + seed))
    chosen, runs = order[: round(tokens / BLOCK)], []
    for rate, epochs in itertools.product(RATES, EPOCHS[tokens]):
        gate = Gate(WIDTHS, past).train(train, chosen, rate, epochs, seed)
        with torch.no_grad():
            runs.append((gate.nats(validation).sum().item(), {"learning_rate": rate, "epochs": epochs}, gate))
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
    return {"gain": float(nats.mean() / (BLOCK - 1)), "interval": bootstrap(nats, tokens), "p": paired_p(nats),
            "seeds_won": int(won), "seeds": len(nats)}  # fmt: skip


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


def main():
    """Measures what is not in the output yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for what is computed once")
    parser.add_argument("--output", default="benchmarks/results/past_losses.jsonl", help="results, one JSON a line")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, data, lines = compose_pair().eval(), {}, read_lines(args.output)
    for text, split in itertools.product(TEXTS, ROWS):
        file = args.work / f"{text}-{split}.pt"
        if not file.is_file():
            torch.save(features(model, rows(text, split)), file)
            print(f"{file.name} is made", flush=True)
        found = data[text, split] = torch.load(file)
        gate_inputs(found)
    for text in TEXTS:
        if any(one["text"] == text and one["what"] == "users" for one in lines):
            continue
        nats, settings = untrained(data, text)
        if not any(one["text"] == text and one["what"] == "untrained" for one in lines):
            for name, values in nats.items():
                add_line(args.output, lines, what="untrained", text=text, name=name, **losses(values),
                         settings=settings.get(name))  # fmt: skip
            static = min(("best static, probabilities", "best static, log-probabilities"), key=lambda k: nats[k].sum())
            for name in ("online, defaults", "online, chosen on validation text"):
                add_line(args.output, lines, what="over static", text=text, name=name, than=static,
                         **gain(nats[static], nats[name]))  # fmt: skip
        for tokens in EPOCHS:
            if any(
                (one["what"], one["text"], one["tokens"]) == ("past", text, tokens) for one in lines if "tokens" in one
            ):
                continue
            runs = {past: [best_gate(data, text, past, tokens, seed) for seed in SEEDS] for past in (False, True)}
            for past, found in runs.items():
                add_line(args.output, lines, what="gate", text=text, past_losses=past, tokens=tokens,
                         **losses(torch.stack([run[2] for run in found])),
                         validation=[run[0] for run in found], settings=[run[1] for run in found])  # fmt: skip
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
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
