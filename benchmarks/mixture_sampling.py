"""Sampling one component per token: is it the mixture, what does the gate's lag cost, and how long does a token take?

    python benchmarks/mixture_sampling.py --output benchmarks/results/mixture_sampling.jsonl

Three questions, each result a line of the output; what is there is not measured again.

* "draws": 100,000 first and second tokens of a tiny hybrid against the model's own distribution (chi-square). "draws,
  aligned": after three texts, where the components have tokenizers of their own.
* "lag": the demo's pair, its gate trained on 40,000 tokens (three seeds); nats per token on the test text if the gate
  is asked at every token, or every 4, 16 or 64.
* "trained": the same with gates trained with the lag that they are tested with, by gradients of the mixture's loss on
  what the frozen components said of each token.
* "past", "online": the same with gates that read past losses, and with the online mixture, which nobody trains.
* "speed": a GPT-NeoX and a Mamba of width 512 and eight layers, untrained; CPU seconds per new token, in one thread, of
  each alone (by Transformers' `generate`), of the hybrid's `generate`, and drawn, with static weights and with a gate
  asked every 16. "speed, three": the same with a Llama as the third. "speed, aligned", with `--models DIR_A DIR_B
  --names a b`: of two models with tokenizers of their own; the hybrid has that of the first.
"""

import argparse
import copy
import functools
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from demo_pair import add_line, compose_pair, read_lines, rows_of, short_training
from manticore_hf.modeling.aligned_hybrid import aligner_of
from manticore_hf.modeling.mixers_manticore import repair_mixers
from manticore_hf.modeling.mixture_manticore import confidence, mix_prob
from manticore_hf.modeling.past_losses import GATE_DECAYS, LossGate, online_weights
from manticore_hf.modeling.running_manticore import read_inputs, run
from past_losses import known
from scipy.stats import chi2
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    Trainer,
    set_seed,
)

from manticore_hf import ComponentSpec, ManticoreForCausalLM, set_stage
from manticore_hf.compose import mixture_sampling as sampling
from manticore_hf.compose.mixture_sampling import with_lag
from manticore_hf.evaluation.statistics import bootstrap

LAGS, PROMPT, NEW, REPEATS = (1, 4, 16, 64), 64, 64, 3
TEXT = "In the evening the people of the town"


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
    return gated(parts)


def tiny_aligned_pair():
    """A hybrid of 6 tokens, whose second component cuts the same letters otherwise."""
    set_seed(0)
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, *words in ((GPTNeoXForCausalLM, "ab", "bc"), (MambaForCausalLM, "ca", "cab")):
            vocabulary = {word: number for number, word in enumerate(("</s>", "a", "b", "c", *words))}
            core = Tokenizer(BPE(vocabulary, [(word[:-1], word[-1]) for word in words]))
            tokens = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="</s>")
            settings = (
                {"num_attention_heads": 2, "intermediate_size": 32} if kind is GPTNeoXForCausalLM else {"state_size": 4}
            )
            part = kind(kind.config_class(vocab_size=6, hidden_size=16, num_hidden_layers=1, **settings))
            part.get_output_embeddings().weight.data.normal_(std=1.0)
            for one in (part, tokens):
                one.save_pretrained(Path(folder, words[0]))
            parts.append(ComponentSpec(Path(folder, words[0]), name=words[0]))
        return gated(parts, gate_lag=4)


def gated(parts, **settings):
    """A one-block hybrid with a token gate that is not uniform, and writes on after any token."""
    given = {"num_blocks": 1, "mixture": "token", "mixture_space": "prob", **settings}
    model = ManticoreForCausalLM.from_components(parts, **given)
    torch.nn.init.normal_(model.hybrid_mixer.token_gate.linear.weight, std=0.5)
    model.generation_config.eos_token_id = None
    return model.eval()


def chi_square(found, probs):
    """Of tokens [count] that were drawn, against their probabilities [vocabulary]."""
    expected = probs.double() * len(found)
    return float(((torch.bincount(found, minlength=len(probs)) - expected) ** 2 / expected).sum())


def tested(count, squares, degrees):
    return {"drawn": count, "chi_square": squares, "degrees": degrees, "limit_95": round(chi2.ppf(0.95, degrees), 2)}


@torch.no_grad()
def draws(count):
    """Of the tokens drawn at two positions, each against the model's own distribution there."""
    model, prompt, size = tiny_pair(), torch.tensor([[5, 3, 9]]), 500
    found = []
    for _ in tqdm(range(count // size), desc="Drawing", unit=f"{size} rows"):
        given = {"do_sample": True, "mixture_sampling": True, "gate_lag": 1, "max_new_tokens": 2}
        found.append(model.generate(prompt, num_return_sequences=size, **given)[:, 3:])
    first, second = torch.cat(found).unbind(1)
    probs = model(prompt).logits[0, -1].softmax(-1).double()
    after = model(torch.cat([prompt.repeat(13, 1), torch.arange(13)[:, None]], 1)).logits[:, -1].softmax(-1).double()
    return tested(count, [chi_square(first, probs), chi_square(second, probs @ after)], 12)


@torch.no_grad()
def aligned_draws(count):
    """Of the tokens drawn after three texts, for which no component reads anew at each draw; see `draws`."""
    model, squares = tiny_aligned_pair(), []
    home, aligner = model.config.tokenizer_component, aligner_of(model)
    cache, asked = model.make_cache(), torch.tensor([1, 4, 3, 2, 5])  # the gate is asked at each fourth token
    shares, own, _ = sampling._ask(model, asked, cache)
    for text in ([1], [1, 3], [1, 3, 2]):
        ids, readers = torch.cat([asked, torch.tensor(text)]), {}
        for name in own:
            readers[name] = sampling._Reader(model, name, sampling._fork(cache), len(asked), None)
            readers[name].read(ids)
        (other,) = (readers[name] for name in model.config.aligned)
        certain = other.certain()
        whole = aligner.log_probs(model, other.name, other.reading, readers[home].logits, sampling.LAST)
        held = patch.object(sampling._Reader, "certain", lambda self, held=certain: held)
        with held, patch.object(aligner, "log_probs", lambda *_, held=whole: held):
            found = []
            for _ in tqdm(range(count), desc="Drawing"):
                one = readers[list(own)[int(torch.multinomial(shares, 1))]]
                found.append(replace(one).draw(ids, readers[home]))
        squares.append(chi_square(torch.cat(found), model(ids[None]).logits[0, -1].softmax(-1)))
    return tested(count, squares, model.config.vocab_size - 1)


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
    """What a gate sees and earns: [(states, confidence, log-probabilities [time - 1, K] of the tokens that came)]."""
    out, names = [], model.config.component_names
    for row in tqdm(rows, desc="Reading", unit="row"):
        ids = torch.tensor([row])
        inputs = read_inputs(model, ids, None, None, None, None, False, False)
        states = run(model, inputs, shared=False).states
        logits = [model.segments.logits(name, states[name]) for name in names]
        came = [one.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]) for one in logits]
        out.append(([states[name] for name in names], [confidence(one)[0] for one in logits], torch.cat(came, 1)))
    return out


def gated_nats(gate, one, lag):
    """Nats [time - 1] of a row under a gate that is asked every `lag` tokens."""
    states, confidences = ([x[:, :-1] for x in xs] for xs in one[:2])
    losses = [known(-one[2][None], GATE_DECAYS, True)] if isinstance(gate, LossGate) else []
    return lagged_nats(gate(states, confidences, *losses), one, lag)


def lagged_nats(weights, one, lag):
    """Nats [time - 1] of a row under weights [1, time - 1, K] that are kept for `lag` tokens."""
    return -(with_lag(weights, lag)[0].log() + one[2]).logsumexp(-1)


@torch.no_grad()
def online_with_lags():
    """{lag: nats of each row} of the online mixture, with its default settings."""
    (model, _, rows), found = pair_seen(), {lag: [] for lag in LAGS}
    prior = torch.full((len(model.config.component_names),), 1 / len(model.config.component_names))
    for one in rows:
        sums = known(-one[2][None], [model.config.online_decay], False)[..., 0]
        weights = online_weights(prior, sums, model.config.online_eta, model.config.online_share)
        for lag in LAGS:
            found[lag].append(lagged_nats(weights, one, lag).sum().item())
    return found


@functools.cache
def pair_seen():
    """The demo's pair, and what a gate sees of the training rows and of the test rows, read once."""
    model = compose_pair().eval()
    return model, seen(model, rows_of("train", 78)["input_ids"]), seen(model, test_rows())


@functools.cache
def test_rows():
    """Rows of both kinds of text that are long enough for every lag but one to be asked twice."""
    return [row for row in rows_of("test", 40)["input_ids"] if len(row) > 64]


def train_with_lags(seed, past=False):
    """{lag: nats of each row}, of a gate for each lag: Adam, four passes, one row a step."""
    (model, train, test), found = pair_seen(), {}
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


class Clock(StoppingCriteria):
    """CPU seconds at which each token was there."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def seconds(generate, new):
    """CPU seconds per new token after the first."""
    clock = Clock()
    generate(max_new_tokens=new + 1, stopping_criteria=[clock])
    return (clock.times[-1] - clock.times[0]) / new


def median_seconds(ways, new=NEW, repeats=REPEATS):
    """Median seconds per token of each way, measured in turn."""
    times = {name: [] for name in ways}
    for _ in tqdm(range(repeats), desc="Timing"):
        for name, generate in ways.items():
            times[name].append(seconds(generate, new))
    return {name: statistics.median(values) for name, values in times.items()}


def way(model, ids, before=None, **given):
    """A way to sample, after a call of `before`; always the same text."""

    def generate(**settings):
        if before is not None:
            before()
        set_seed(0)
        return model.generate(ids, do_sample=True, top_k=0, eos_token_id=None, **settings, **given)

    return generate


def speed(count=2):
    """Each way to write with components that have one tokenizer."""
    gated, static = wide_pair("token", count), wide_pair("static", count)
    ids, ways = torch.randint(0, 8192, (1, PROMPT)), {}
    for name in gated.config.component_names:
        repair_mixers(gated.component(name))
        ways[name] = way(gated.component(name), ids)
    ways |= {"hybrid": way(gated, ids), "drawn, static": way(static, ids, mixture_sampling=True)}
    ways["drawn, gate asked every 16"] = way(gated, ids, mixture_sampling=True, gate_lag=16)
    return {"seconds_per_token": median_seconds(ways)}


def aligned_speed(models, names):
    """Each way to write with components that have tokenizers of their own, for the first time and then again.

    A mapping remembers what it has found out about pieces of words.
    """
    specs = [ComponentSpec(source, name=name) for source, name in zip(models, names)]
    model = ManticoreForCausalLM.from_components(specs, dtype="float32", mixture="token", verify=False).eval()
    ids = {}
    for name, source in zip(names, models):
        ids[name] = AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt").input_ids
    ways = {name: way(model.component(name), ids[name]) for name in names}

    def weigh(weights):
        return lambda: model.set_mixture_weights(weights)

    home, even, new = ids[names[0]], [[1 / len(names)] * len(names)], 24
    ways["hybrid"] = way(model, home, weigh(None))
    ways["drawn, static"] = way(model, home, weigh(even), mixture_sampling=True)
    ways["drawn, gate asked every 16"] = way(model, home, weigh(None), mixture_sampling=True, gate_lag=16)
    model(home)  # what is found out once for all texts
    first = {name: seconds(generate, new) for name, generate in ways.items()}
    return {"names": names, "first": first, "seconds_per_token": median_seconds(ways, new, 2)}


SPEEDS = {
    "speed": lambda args: speed(),
    "speed, three": lambda args: speed(3),
    "speed, aligned": lambda args: aligned_speed(args.models, args.names),
}
DRAWS = {"draws": draws, "draws, aligned": aligned_draws}


def main():
    """Measures what the output does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/mixture_sampling.jsonl")
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", help="Of the questions, those that are asked; default: all.")
    parser.add_argument("--models", nargs=2, help="Directories of the models of the aligned case.")
    parser.add_argument("--names", nargs=2, default=["a", "b"], help="What the results call them.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = read_lines(args.output)
    known_lines = {(line["what"], line.get("seed")) for line in lines}

    def asked(what, seed=None):
        return (what, seed) not in known_lines and (args.only is None or what in args.only)

    for what, measure in SPEEDS.items():
        if asked(what) and (args.models or what != "speed, aligned"):
            result = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], **measure(args)}
            add_line(args.output, lines, what=what, **result)
    for seed in range(3):
        for what, measure in (
            ("lag", lambda seed: lags(trained(seed), test_rows())),
            ("trained", train_with_lags),
            ("past", lambda seed: train_with_lags(seed, past=True)),
            ("online", lambda seed: online_with_lags()),
        ):
            if asked(what, seed) and (what != "online" or seed == 0):
                found, tokens = measure(seed), [len(row) - 1 for row in test_rows()]
                losses = {lag: sum(found[lag]) / sum(tokens) for lag in LAGS}
                ends = {lag: bootstrap(np.array(found[lag]) - np.array(found[1]), tokens) for lag in LAGS}
                add_line(args.output, lines, what=what, seed=seed, tokens=sum(tokens), losses=losses, cost_95=ends)
    for what, measure in DRAWS.items():
        if asked(what):
            add_line(args.output, lines, what=what, **measure(args.draws))


if __name__ == "__main__":
    main()
