"""Does aligning components before any task make pruned paths across architectures usable?

    python benchmarks/align_stage.py --output benchmarks/results/align_stage.json
    python benchmarks/align_stage.py --pair NEOX MAMBA --train train.txt --valid valid.txt --test test.txt \
        --document-separator '<|endoftext|>' --document-token '<s>'

Two components with one tokenizer (by default the demo's, on its text) in two blocks, cut at 1/2, 3/4 and 7/8 of the
depth, calibrated; then projectors alone are trained, each on what it is asked to do:

* task: the cross-entropy of the text;
* state: each component's last state is to be its own as if it ran alone (mean squared error over its variance);
* mixture, own: KL from the one-block mixture of equal weights, or from the component alone, to the prediction.

"paths" trains the two paths that change the component after the first block, "soft" the hybrid at equal mixture
weights. Then `prune` to both paths, and their test loss beside those of the components alone. All that are trained in
one run read the same batches, and share what the frozen components compute on them. A seed draws rows of the training
text, to calibrate and to train on, and their order. The rate of each kind is chosen on validation text (seed 0, cut
3/4, fewer tokens). With --recover the pruned paths are trained as a whole afterwards, as the stage `prune` does, and
beside them the better component. A run that is in the output is not made again.
"""

import argparse
import copy
import json
import os
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from demo_pair import BLOCK, COMPONENTS, KINDS, rows_of, short_training
from manticore_hf.modeling.shared_manticore import enter, leave
from tqdm.auto import tqdm
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup, set_seed

from manticore_hf import ManticoreForCausalLM, prune, set_stage
from manticore_hf.evaluation.data import NO_LOSS, length_batches, pack, pad, separate
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.training.calibrate import calibrate_projectors
from manticore_hf.training.distill import DistilTrainer

CUTS = {"1/2": 0.5, "3/4": 0.75, "7/8": 0.875}
STUDENTS = {  # what is trained, on what in the first and in the second half of the tokens
    "paths, task": (("task",),) * 2,
    "paths, state": (("state",),) * 2,
    "paths, mixture": (("mixture",),) * 2,
    "paths, state + mixture": (("state", "mixture"),) * 2,
    "paths, state + own": (("state", "own"),) * 2,
    "paths, state + mixture, then task": (("state", "mixture"), ("task",)),
    "soft, task": (("task",),) * 2,
    "soft, state + mixture": (("state", "mixture"),) * 2,
}
RATED = {name: name if "task" in name else f"{name.split(',')[0]}, state + mixture" for name in STUDENTS}
RATED["paths, state + mixture, then task"] = "paths, state + mixture"  # whose rate each one takes
RATES, RATE_TOKENS, RATE_CUT = (3e-3, 1e-2, 3e-2, 0.1), 30_000, "3/4"
BATCH, CALIBRATION_TOKENS, RECOVERY_RATE = 4, 40_000, 1e-3
RECOVERED = ("untrained", "paths, task", "paths, state + mixture")


def compose(pair: list[str], cut: str, train) -> ManticoreForCausalLM:
    """The hybrid of two blocks, the first with this share of each component's layers, calibrated."""
    settings = {"dtype": "float32", "mixture": "static", "mixture_space": "prob"}
    one = ManticoreForCausalLM.from_components(pair, **settings).config
    layers = {}
    for name in one.component_names:
        (depth,) = one.block_layers[name]
        first = min(max(round(CUTS[cut] * depth), 1), depth - 1)
        layers[name] = [first, depth - first]
    model = ManticoreForCausalLM.from_components(pair, num_blocks=2, block_layers=layers, **settings)
    calibrate_projectors(model, train, tokens=CALIBRATION_TOKENS)
    return model.eval().requires_grad_(False)


def sample(texts, tokens: int, seed: int) -> dict:
    """The texts with as many training rows, drawn with this seed, as hold so many tokens, or as there are."""
    train = texts["train"].shuffle(seed=seed)
    rows = max(tokens, CALIBRATION_TOKENS) // BLOCK + BATCH
    return {**texts, "train": train.select(range(min(rows, len(train))))}


def batches_of(rows, tokens: int | None = None, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[(ids, labels)] of about so many tokens (None: of all, once), every text by itself; passes follow each other."""
    texts, out, seen = separate(rows), [], 0
    chunks = length_batches([len(ids) for ids in texts["input_ids"]], BATCH)
    draw = torch.Generator().manual_seed(seed)
    while tokens is None or seen < tokens:
        for i in torch.randperm(len(chunks), generator=draw).tolist():
            part = texts[chunks[i]]
            out.append((pad(part["input_ids"], 0), pad(part["labels"], NO_LOSS)))
            seen += sum(map(len, part["input_ids"]))
            if tokens is not None and seen >= tokens:
                break
        if tokens is None:
            break
    return out


class Frozen:
    """What the components compute alone on a batch, at the positions that are scored.

    Attributes:
        cut: {name: state after its first block [batch, time, width]}.
        last: {name: last state [positions, width]}.
        logprobs: {name: [positions, vocabulary]}.
        mixture: Log of the mean of their predictions [positions, vocabulary].
        target: Tokens to predict [positions].
        kept: Which positions are scored [batch, time - 1].
    """

    def __init__(self, model, ids, labels):
        self.positions = torch.arange(ids.shape[1])[None]
        self.kept = labels[:, 1:] != NO_LOSS
        self.target = labels[:, 1:][self.kept]
        self.cut, self.last, self.logprobs = {}, {}, {}
        with torch.no_grad():
            for name in model.config.component_names:
                self.cut[name] = model.segments.segment(name, 0)(model.embed(name, ids), None, self.positions)
                self.last[name], self.logprobs[name] = self.finish(model, name, self.cut[name])
            self.mixture = mean_of(list(self.logprobs.values()))

    def finish(self, model, name, state):
        """(last state, log-probabilities) at the scored positions, of what a component's second block reads."""
        last = model.segments.segment(name, 1)(state, None, self.positions)[:, :-1][self.kept]
        return last, model.segments.logits(name, last[None])[0].float().log_softmax(-1)

    def terms(self, name, last, logprobs, wanted):
        """{term: its value} of those that are wanted, for a component inside of the hybrid."""
        own = self.last[name]
        makes = {
            "task": lambda: F.nll_loss(logprobs, self.target),
            "state": lambda: (last - own).square().sum() / (own - own.mean(0)).square().sum(),
            "mixture": lambda: F.kl_div(logprobs, self.mixture, log_target=True, reduction="batchmean"),
            "own": lambda: F.kl_div(logprobs, self.logprobs[name], log_target=True, reduction="batchmean"),
        }
        return {term: makes[term]() for term in wanted}


def mean_of(logprobs: list[torch.Tensor]) -> torch.Tensor:
    """Log of the plain mean of distributions."""
    return torch.stack(logprobs).logsumexp(0) - torch.tensor(len(logprobs)).log()


def loss_of(model, mixer, frozen: Frozen, kind: str, wanted: tuple) -> torch.Tensor:
    """What a mixer's projectors are trained on with a batch: the sum of the terms, mean over paths or components."""
    first, second = names = model.config.component_names
    left = {name: mixer(leave, 0, name, frozen.cut[name], 1.0) for name in names}
    if kind == "paths":
        entering = {second: left[first], first: left[second]}
    else:
        entering = dict.fromkeys(names, (left[first] + left[second]) / 2)
    found = {name: frozen.finish(model, name, mixer(enter, 1, name, entering[name], 1.0)) for name in names}
    if kind == "paths":
        values = [sum(frozen.terms(name, *found[name], wanted).values()) for name in names]
        return sum(values) / 2
    of_states = [frozen.terms(name, *found[name], ("state",))["state"] for name in names if "state" in wanted]
    of_mixture = tuple(term for term in wanted if term != "state")
    mixed = frozen.terms(first, None, mean_of([found[name][1] for name in names]), of_mixture)
    return sum(of_states) / 2 + sum(mixed.values())


def train_mixers(model, rows, students: dict, tokens: int, seed: int) -> dict:
    """Trains a copy of the hybrid's projectors for each of {name: (student, rate)}, all on the same batches."""
    batches = batches_of(rows, tokens, seed)
    mixers = {name: copy.deepcopy(model.hybrid_mixer) for name in students}
    steps = {}
    for name, mixer in mixers.items():
        parameters = [one for part in (mixer.into, mixer.out_of) for one in part.parameters()]
        optimizer = torch.optim.Adam([one.requires_grad_() for one in parameters], lr=students[name][1])
        steps[name] = optimizer, get_cosine_schedule_with_warmup(optimizer, 5, len(batches))
    for number, (ids, labels) in enumerate(tqdm(batches, desc="Training", unit="batch", leave=False)):
        frozen = Frozen(model, ids, labels)
        for name, mixer in mixers.items():
            student, (optimizer, schedule) = students[name][0], steps[name]
            terms = STUDENTS[student][2 * number >= len(batches)]
            loss_of(model, mixer, frozen, student.split(",")[0], terms).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return mixers


def with_mixer(model, mixer) -> ManticoreForCausalLM:
    """A copy of a hybrid with other projectors."""
    out = copy.deepcopy(model)
    out.hybrid_mixer.load_state_dict(mixer.state_dict())
    return out


def routes(model) -> dict[str, list[str]]:
    """The two paths that change the component."""
    first, second = model.config.component_names
    return {f"{first} > {second}": [first, second], f"{second} > {first}": [second, first]}


def measure(model, mixers: dict, rows) -> dict:
    """{mixer: {path: {"loss", "state", "mixture"}}}: as pruned to the path, every text by itself."""
    out, scored = {name: {path: Counter() for path in routes(model)} for name in mixers}, 0
    for ids, labels in batches_of(rows):
        frozen = Frozen(model, ids, labels)
        scored += len(frozen.target)
        for name, mixer in mixers.items():
            for path, (first, second) in routes(model).items():
                with torch.no_grad():
                    left = mixer(leave, 0, first, frozen.cut[first], 1.0)
                    found = frozen.finish(model, second, mixer(enter, 1, second, left, 1.0))
                    terms = frozen.terms(second, *found, ("task", "state", "mixture"))
                out[name][path].update({term: value.item() * len(frozen.target) for term, value in terms.items()})
    return {
        name: {path: {term: value / scored for term, value in sums.items()} for path, sums in paths.items()}
        for name, paths in out.items()
    }


def check_pruned(model, mixer, rows) -> None:
    """Stops where a path measured here is not what `prune` makes of the hybrid."""
    soft, found = with_mixer(model, mixer), measure(model, {"": mixer}, rows)[""]
    for path, route in routes(model).items():
        pruned = compare_losses(prune(soft, route), rows, batch_size=32, baselines=False)["hybrid"]
        assert abs(pruned - found[path]["task"]) < 1e-4, (path, pruned, found)


def choose_rates(model, texts) -> dict:
    """{student: {rate: mean validation loss of both paths}} of those whose rate is chosen."""
    rated = dict.fromkeys(RATED.values())
    students = {f"{student} {rate}": (student, rate) for student in rated for rate in RATES}
    losses = measure(model, train_mixers(model, texts["train"], students, RATE_TOKENS, 0), texts["valid"])
    return {
        student: {str(rate): sum(one["task"] for one in losses[f"{student} {rate}"].values()) / 2 for rate in RATES}
        for student in rated
    }


def recover(model, start, pair, texts, tokens, seed) -> dict:
    """{path: test loss after all of it was trained on text and one-block mixture}; also of the components."""
    settings = {"dtype": "float32", "mixture": "static", "mixture_space": "prob"}
    teacher = ManticoreForCausalLM.from_components(pair, **settings)
    rows = texts["train"].shuffle(seed=seed).select(range(min(tokens // BLOCK, len(texts["train"]))))
    if start is None:
        students = {name: prune(teacher, name) for name in model.config.component_names}
    else:
        soft = with_mixer(model, start)
        students = {path: prune(soft, route) for path, route in routes(model).items()}
    out = {}
    for path, hard in students.items():
        arguments = short_training(seed, RECOVERY_RATE, per_device_train_batch_size=BATCH)
        DistilTrainer(model=set_stage(hard, "finetune"), args=arguments, train_dataset=rows, teacher=teacher).train()
        out[path] = compare_losses(hard, texts["test"], 32, baselines=False)["hybrid"]
    return out


def run(pair, texts, alone, cut, tokens, seed, rates, only, recovery) -> dict:
    """All that is measured of one cut, budget and seed, on texts that were drawn for them."""
    began = time.process_time()
    set_seed(seed)
    model = compose(pair, cut, texts["train"])
    names = [name for name in STUDENTS if only is None or name in only]
    students = {name: (name, rates[RATED[name]]) for name in names}
    mixers = {"untrained": model.hybrid_mixer, **train_mixers(model, texts["train"], students, tokens, seed)}
    found = measure(model, mixers, texts["test"])
    check_pruned(model, mixers[names[0]], texts["valid"].select(range(8)))
    out = {"layers": model.config.block_layers, "alone": alone, "paths": found}
    if recovery:
        starts = {"components": None, **{name: mixers[name] for name in RECOVERED}}
        out["recovery_tokens"] = recovery
        out["recovered"] = {name: recover(model, start, pair, texts, recovery, seed) for name, start in starts.items()}
    return {**out, "cpu_seconds": round(time.process_time() - began)}


def texts_of(args, pair) -> dict:
    """{"train", "valid", "test": rows}, of which a seed draws some to train on."""
    limits = {"train": None, "valid": 24, "test": 80}
    if args.pair is None:
        splits = {"train": "train", "valid": "validation", "test": "test"}
        return {name: rows_of(splits[name], limit and limit // 2) for name, limit in limits.items()}
    tokenizer, out = AutoTokenizer.from_pretrained(pair[0]), {}
    if args.document_token:
        tokenizer.eos_token = args.document_token
    for name, limit in limits.items():
        documents = [one.strip() for one in Path(getattr(args, name)).read_text().split(args.document_separator)]
        out[name] = pack([one for one in documents if one], tokenizer, BLOCK, limit)
    return out


def main():
    """Makes the runs that are not in the output yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, help="two components with one tokenizer; default: the demo's")
    parser.add_argument("--train", help="training text of --pair, as --valid and --test")
    parser.add_argument("--valid", help="text that chooses the rates")
    parser.add_argument("--test", help="text that is measured on")
    parser.add_argument("--document-separator", default="\n\n\n", help="stands between documents of these texts")
    parser.add_argument("--document-token", help="token that ends a text, where the tokenizer has none")
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=CUTS, help="shares of the depth")
    parser.add_argument("--tokens", type=int, default=250_000, help="tokens that projectors are trained on")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to n-1")
    parser.add_argument("--only", nargs="+", choices=STUDENTS, help="what is trained; default: all")
    parser.add_argument("--recover", type=int, default=0, help="tokens of recovery distillation afterwards")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", default="benchmarks/results/align_stage.json", help="results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pair = args.pair or [str(COMPONENTS / name) for name in KINDS]
    output, label = Path(args.output), " + ".join(Path(part).name for part in pair)
    results, texts = json.loads(output.read_text()) if output.exists() else {"rates": {}, "runs": []}, None

    def keep():
        output.write_text(json.dumps(results, indent=1) + "\n")

    for seed in range(args.seeds):
        for cut in args.cuts:
            which = {"pair": label, "cut": cut, "tokens": args.tokens, "seed": seed}
            if any(which.items() <= one.items() for one in results["runs"]):
                continue
            if texts is None:
                texts = texts_of(args, pair)
                alone = compare_losses(compose(pair, cut, sample(texts, 0, 0)["train"]), texts["test"], batch_size=32)
                alone.pop("hybrid")
            if label not in results["rates"]:
                drawn = sample(texts, RATE_TOKENS, 0)
                results["rates"][label] = choose_rates(compose(pair, RATE_CUT, drawn["train"]), drawn)
                keep()
            rates = {name: float(min(losses, key=losses.get)) for name, losses in results["rates"][label].items()}
            drawn = sample(texts, max(args.tokens, args.recover), seed)
            found = which | run(pair, drawn, alone, cut, args.tokens, seed, rates, args.only, args.recover)
            results["runs"].append(found)
            keep()
            say(found)


def say(found: dict) -> None:
    """Prints a run."""
    print(*(f"{key} {value}" for key, value in found.items() if key not in ("paths", "recovered")), sep=", ")
    for name, paths in found["paths"].items():
        print(f"  {name:36}" + "".join(f"  {p}: {v['task']:.4f} ({v['state']:.3f})" for p, v in paths.items()))
    for name, paths in found.get("recovered", {}).items():
        print(f"  recovered, {name:25}" + "".join(f"  {p}: {v:.4f}" for p, v in paths.items()), flush=True)


if __name__ == "__main__":
    main()
