"""Sampling one component per token: is it the mixture, what does the gate's lag cost, and how long does a token take?

    python benchmarks/mixture_sampling.py --output benchmarks/results/mixture_sampling.jsonl

Three questions, each result a line of the output; what is there is not measured again.

* "draws": 100,000 first and second tokens of a tiny hybrid against the model's own distribution (chi-square).
* "lag": the demo's pair, its gate trained on 40,000 tokens (three seeds); nats per token on the test text if the gate
  is asked at every token, or every 4, 16 or 64.
* "trained": the same with gates trained with the lag that they are tested with, by gradients of the mixture's loss on
  what the frozen components said of each token.
* "past", "online": the same with gates that read past losses, and with the online mixture, which nobody trains.
* "speed": a GPT-NeoX and a Mamba of width 512 and eight layers, untrained; seconds per new token of each alone (by
  Transformers' `generate`), of the hybrid's `generate`, and drawn, with static weights and with a gate asked every 16.
  "speed, three": the same with a Llama as the third.
"""

import argparse
import copy
import os
import statistics
import time

import numpy as np
import torch
from demo_pair import add_line, compose_pair, read_lines, rows_of, short_training
from manticore_hf.modeling.mixers_manticore import repair_mixers
from manticore_hf.modeling.mixture_manticore import mix_prob, sureness
from manticore_hf.modeling.past_losses import GATE_DECAYS, LossGate, online_weights
from manticore_hf.modeling.running_manticore import read_inputs, run
from past_losses import known
from tqdm.auto import tqdm
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    set_seed,
)

from manticore_hf import ManticoreForCausalLM, set_stage
from manticore_hf.compose.mixture_sampling import with_lag
from manticore_hf.evaluation.statistics import bootstrap

LAGS, PROMPT, NEW, REPEATS = (1, 4, 16, 64), 64, 128, 5


def tiny_pair():
    """A hybrid of 13 tokens with a gate that is not uniform."""
    set_seed(0)
    wide = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 1}
    parts = [
        GPTNeoXForCausalLM(GPTNeoXConfig(**wide, num_attention_heads=2, intermediate_size=32)),
        MambaForCausalLM(MambaConfig(**wide, state_size=4)),
    ]
    for part in parts:
        part.get_output_embeddings().weight.data.normal_(std=1.0)
    model = ManticoreForCausalLM.from_components(parts, num_blocks=1, mixture="token", mixture_space="prob")
    torch.nn.init.normal_(model.hybrid_mixer.token_gate.linear.weight, std=0.5)
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.no_grad()
def draws(count):
    """Chi-square of the tokens drawn at two positions, each against the model's own distribution there."""
    model, prompt, size = tiny_pair(), torch.tensor([[5, 3, 9]]), 500
    found = []
    for _ in tqdm(range(count // size), desc="Drawing", unit=f"{size} rows"):
        given = {"do_sample": True, "mixture_sampling": True, "gate_lag": 1, "max_new_tokens": 2}
        found.append(model.generate(prompt, num_return_sequences=size, **given)[:, 3:])
    found, out = torch.cat(found), []
    first = model(prompt).logits[0, -1].softmax(-1).double()
    rows = torch.cat([prompt.repeat(13, 1), torch.arange(13)[:, None]], 1)
    second = first @ model(rows).logits[:, -1].softmax(-1).double()
    for at, wanted in enumerate((first, second)):
        counts = torch.bincount(found[:, at], minlength=13).double()
        expected = wanted * len(found)
        out.append(float(((counts - expected) ** 2 / expected).sum()))
    return {"drawn": len(found), "chi_square": out, "degrees": 12, "limit_95": 21.03}


def trained(seed):
    """The demo's pair with a gate trained on 40,000 tokens."""
    set_seed(seed)
    model = set_stage(compose_pair(), "projectors")
    Trainer(model, short_training(seed, 3e-3), train_dataset=rows_of("train", 78).shuffle(seed=seed)).train()
    return model.eval()


@torch.no_grad()
def lags(model, rows):
    """{lag: nats of each row}."""
    found = {lag: [] for lag in LAGS}
    for row in tqdm(rows, desc="Lags", unit="row"):
        ids = torch.tensor([row])
        weights = model(ids, use_cache=False).weights
        own = [model.component(name)(ids, use_cache=False).logits for name in model.config.component_names]
        for lag in LAGS:
            mixed = mix_prob(list(with_lag(weights, lag).split(1, -1)), own)
            loss = torch.nn.functional.cross_entropy(mixed[0, :-1], ids[0, 1:], reduction="sum")
            found[lag].append(loss.item())
    return found


@torch.no_grad()
def seen(model, rows):
    """What a gate sees and earns: [(states, sureness, log-probabilities [time - 1, K] of the tokens that came)]."""
    out, names = [], model.config.component_names
    for row in tqdm(rows, desc="Reading", unit="row"):
        ids = torch.tensor([row])
        inputs = read_inputs(model, ids, None, None, None, None, False, False)
        states = run(model, inputs, shared=False).states
        logits = [model.segments.logits(name, states[name]) for name in names]
        came = [one.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]) for one in logits]
        out.append(([states[name] for name in names], [sureness(one)[0] for one in logits], torch.cat(came, 1)))
    return out


def gated_nats(gate, one, lag):
    """Nats [time - 1] of a row under a gate that is asked every `lag` tokens."""
    states, sure = ([x[:, :-1] for x in xs] for xs in one[:2])
    losses = [known(-one[2][None], GATE_DECAYS, True)] if isinstance(gate, LossGate) else []
    return lagged_nats(gate(states, sure, *losses), one, lag)


def lagged_nats(weights, one, lag):
    """Nats [time - 1] of a row under weights [1, time - 1, K] that are kept for `lag` tokens."""
    return -(with_lag(weights, lag)[0].log() + one[2]).logsumexp(-1)


@torch.no_grad()
def online_with_lags(rows):
    """{lag: nats of each row} of the online mixture, with its default settings."""
    model, found = compose_pair().eval(), {lag: [] for lag in LAGS}
    prior = torch.full((len(model.config.component_names),), 1 / len(model.config.component_names))
    for one in seen(model, rows):
        sums = known(-one[2][None], [model.config.online_decay], False)[..., 0]
        weights = online_weights(prior, sums, model.config.online_eta, model.config.online_share)
        for lag in LAGS:
            found[lag].append(lagged_nats(weights, one, lag).sum().item())
    return found


def train_with_lags(seed, train, rows, past=False):
    """{lag: nats of each row}, of a gate for each lag: Adam, four passes, one row a step."""
    model, found = compose_pair().eval(), {}
    train, test = seen(model, train), seen(model, rows)
    for lag in LAGS:
        set_seed(seed)
        gate = copy.deepcopy(model.hybrid_mixer.token_gate).requires_grad_(True)
        if past:
            gate = LossGate([one.shape[-1] for one in train[0][0]])
            gate.reset()
        optimizer = torch.optim.Adam(gate.parameters(), lr=1e-3)
        steps = [i for _ in range(4) for i in torch.randperm(len(train)).tolist()]
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
        for i in steps:
            gated_nats(gate, train[i], lag).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.no_grad():
            found[lag] = [gated_nats(gate, one, lag).sum().item() for one in test]
    return found


def wide_pair(mixture, count=2):
    """A GPT-NeoX and a Mamba of 512 and eight layers, and a Llama as the third."""
    set_seed(0)
    wide = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8}
    parts = [
        GPTNeoXForCausalLM(GPTNeoXConfig(**wide, num_attention_heads=8, intermediate_size=2048)),
        MambaForCausalLM(MambaConfig(**wide)),
        LlamaForCausalLM(LlamaConfig(**wide, num_attention_heads=8, intermediate_size=1536)),
    ][:count]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=1, mixture=mixture, mixture_space="prob").eval()
    model.generation_config.eos_token_id = None
    return model


def seconds(generate):
    """Seconds per new token: of a call with NEW tokens minus one with a single token."""
    took = []
    for new in (1, NEW):
        start = time.perf_counter()
        generate(new)
        took.append(time.perf_counter() - start)
    return (took[1] - took[0]) / (NEW - 1)


def speed(count=2):
    """Median seconds per token of each way, measured in turn."""
    gated, static = wide_pair("token", count), wide_pair("static", count)
    ids, ways = torch.randint(0, 8192, (1, PROMPT)), {}

    def way(model, **given):
        return lambda new: model.generate(
            ids, do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=None, eos_token_id=None, **given
        )

    for name in gated.config.component_names:
        repair_mixers(gated.component(name))
        ways[name] = way(gated.component(name))
    ways |= {"hybrid": way(gated), "drawn, static": way(static, mixture_sampling=True)}
    ways["drawn, gate asked every 16"] = way(gated, mixture_sampling=True, gate_lag=16)
    times = {name: [] for name in ways}
    for _ in tqdm(range(REPEATS), desc="Timing"):
        for name, generate in ways.items():
            times[name].append(seconds(generate))
    return {"seconds_per_token": {name: statistics.median(values) for name, values in times.items()}}


SPEEDS = {"speed": speed, "speed, three": lambda: speed(3)}
DRAWS = {"draws": draws}


def main():
    """Measures what the output does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/mixture_sampling.jsonl")
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", help="Of the questions, those that are asked; default: all.")
    args = parser.parse_args()
    lines = read_lines(args.output)
    known_lines = {(line["what"], line.get("seed")) for line in lines}

    def asked(what, seed=None):
        return (what, seed) not in known_lines and (args.only is None or what in args.only)

    for what, measure in SPEEDS.items():
        if asked(what):
            result = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], **measure()}
            add_line(args.output, lines, what=what, **result)
    rows = rows_of("test", 40)["input_ids"]
    rows = [row for row in rows if len(row) > 64]
    tokens, train = [len(row) - 1 for row in rows], rows_of("train", 78)["input_ids"]
    for seed in range(3):
        for what, measure in (
            ("lag", lambda seed: lags(trained(seed), rows)),
            ("trained", lambda seed: train_with_lags(seed, train, rows)),
            ("past", lambda seed: train_with_lags(seed, train, rows, past=True)),
            ("online", lambda seed: online_with_lags(rows)),
        ):
            if asked(what, seed) and (what != "online" or seed == 0):
                found = measure(seed)
                losses = {lag: sum(found[lag]) / sum(tokens) for lag in LAGS}
                ends = {lag: bootstrap(np.array(found[lag]) - np.array(found[1]), tokens) for lag in LAGS}
                add_line(args.output, lines, what=what, seed=seed, tokens=sum(tokens), losses=losses, cost_95=ends)
    for what, measure in DRAWS.items():
        if asked(what):
            add_line(args.output, lines, what=what, **measure(args.draws))


if __name__ == "__main__":
    main()
