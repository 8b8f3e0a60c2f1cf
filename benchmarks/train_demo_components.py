"""Train the two small components that the demo joins: a GPT-NeoX for prose and a Mamba for code, about 1M weights each.

    python benchmarks/train_demo_components.py --output manticore_hf/demo_components    # everything, about an hour
    python benchmarks/train_demo_components.py --component mamba-code --tokens 2e6      # one component, a shorter run

Both read the standard library only (`manticore_hf.demo.text`, split "pretrain") and share one byte-level BPE tokenizer.
A tenth of what each reads is the other's kind, so that every token has a trained embedding, no more: components with
different strengths are the case in which a hybrid pays. The batch of a step depends on the seed and the number of the
step alone; a killed run goes on from its last checkpoint with the same batches. The weights kept are those with the
lowest loss on the validation split; the test split is read once, for the report.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, MambaConfig, PreTrainedTokenizerFast

from manticore_hf.demo.text import KINDS, documents

END = "<|endoftext|>"
END_ID = 0
CONTEXT = 256
VOCAB = 2048
OTHER_KIND = 0.1
SAVE_EVERY = 500


@dataclass(frozen=True)
class Recipe:
    """What one component is, and how fast it learns."""

    kind: str
    family: str
    config: Callable[[], object]
    learning_rate: float


def _neox() -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        # The prose is read many times over; without dropout it is learnt by heart.
        hidden_dropout=0.1,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )


def _mamba() -> MambaConfig:
    return MambaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        state_size=16,
        num_hidden_layers=7,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )


RECIPES = {
    "neox-prose": Recipe("prose", "GPT-NeoX", _neox, learning_rate=3e-3),
    "mamba-code": Recipe("code", "Mamba", _mamba, learning_rate=3e-3),
}

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language:
- en
tags:
- {family_tag}
- demo
---
# {name}

A {family} of {parameters:,} weights ({layers} layers, width {width}, trained at {context} tokens) that has read little
but {what} of the Python standard library. It is one of the two components of the demo of manticore-hf: good enough to
show what joining models of different architectures does, and of no use beyond that.

| kind of text / split, never trained on | loss (nats/token) | bits/byte |
|---|---|---|
{rows}

* **Training text**: the standard library of Python {python} (PSF-2.0), as cut by `manticore_hf/demo/text.py`, split
  `pretrain`; {share:.0%} {kind}, {other:.0%} {other_kind}. Prose is docstrings, comments and the language reference;
  code is what is left. The weights were trained for this project and are under Apache-2.0.
* **How**: `python benchmarks/train_demo_components.py --component {name} --tokens {tokens:.3g} --seed {seed}`, CPU,
  float32, AdamW, peak learning rate {learning_rate}, cosine. The weights are those with the lowest validation loss,
  after {kept:,} tokens.
* **Tokenizer**: byte-level BPE of {vocab} tokens, the same in both components; `{end}` begins, ends and pads.
"""


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train the shared tokenizer, or load the one that an earlier run left in `folder`."""
    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        # There is almost three times as much code as prose, and half of the tokens should suit prose.
        texts = documents("code", "pretrain") + 3 * documents("prose", "pretrain")
        tokenizer.train_from_iterator(texts, trainer, len(texts))
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=END, model_max_length=512
        ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def packed(tokenizer: PreTrainedTokenizerFast, kind: str, split: str, seed: int = 0) -> torch.Tensor:
    """Return all documents of a kind and split in shuffled order as one row of tokens, each after an end token."""
    texts = documents(kind, split)
    random.Random(seed).shuffle(texts)
    return torch.tensor([token for ids in tokenizer(texts, verbose=False).input_ids for token in (END_ID, *ids)])


def batch(streams: dict[str, torch.Tensor], kind: str, size: int, seed: int, step: int) -> torch.Tensor:
    """Draw the windows of one step; nothing but the arguments decides which."""
    draw = random.Random(f"{seed}/{step}")
    rows = []
    for _ in range(size):
        other = draw.random() < OTHER_KIND
        stream = next(streams[k] for k in KINDS if (k == kind) != other)
        start = draw.randrange(len(stream) - CONTEXT)
        rows.append(stream[start : start + CONTEXT])
    return torch.stack(rows)


@torch.no_grad()
def evaluate(model: torch.nn.Module, stream: torch.Tensor) -> float:
    """Return the mean loss in nats per token over non-overlapping windows."""
    model.eval()
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def optimizer_for(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only: Mamba's A and every bias and norm have a meaning that decay destroys."""
    weights = list(model.named_parameters())
    decayed = [weight for name, weight in weights if weight.ndim > 1 and not name.endswith("A_log")]
    others = [weight for name, weight in weights if weight.ndim < 2 or name.endswith("A_log")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Warm up over 3 % of the steps, then follow a cosine down to 2 % of the peak."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def train(name: str, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> None:
    """Train one component, or go on where a checkpoint left off, and write its folder and its part of the report."""
    recipe, checkpoint = RECIPES[name], arguments.checkpoints / f"{name}.pt"
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_config(recipe.config())
    if recipe.family == "Mamba":
        # Transformers' own loop over time takes minutes per step at this context.
        from manticore_hf.modeling.mixers_manticore import repair_mixers

        repair_mixers(model)
    optimizer = optimizer_for(model, recipe.learning_rate)
    steps = math.ceil(arguments.tokens / (arguments.batch_size * CONTEXT))
    settings = {"steps": steps, "batch_size": arguments.batch_size, "seed": arguments.seed}
    state = {"settings": settings, "step": 0, "seconds": 0.0, "best": math.inf, "best_step": 0, "best_model": {}}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise SystemExit(f"{checkpoint} was made with {state['settings']}, now {settings}: use other --checkpoints")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    streams = {kind: packed(tokenizer, kind, "pretrain", arguments.seed) for kind in KINDS}
    held_out = packed(tokenizer, recipe.kind, "validation")
    model.train()
    began, running = time.time() - state["seconds"], None
    bar = tqdm(range(state["step"], steps), desc=name, initial=state["step"], total=steps, mininterval=10)
    for step in bar:
        # Dropout would otherwise depend on where a run was cut off.
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, recipe.learning_rate)
        rows = batch(streams, recipe.kind, arguments.batch_size, arguments.seed, step)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % SAVE_EVERY and step + 1 < steps:
            continue
        validation = evaluate(model, held_out)
        if validation < state["best"]:
            best = {key: value.clone() for key, value in model.state_dict().items()}
            state |= {"best": validation, "best_step": step + 1, "best_model": best}
        state |= {"step": step + 1, "seconds": time.time() - began}
        temporary = checkpoint.with_suffix(".tmp")  # a kill while writing must not cost the old checkpoint
        torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
        temporary.replace(checkpoint)
        line = {"step": step + 1, "seconds": round(state["seconds"]), "train": running, "validation": validation}
        with open(arguments.checkpoints / f"{name}.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        bar.set_postfix(train=f"{running:.3f}", validation=f"{validation:.3f}")
    model.load_state_dict(state["best_model"])
    write(name, model, tokenizer, state, arguments)


def write(name: str, model, tokenizer: PreTrainedTokenizerFast, state: dict, arguments: argparse.Namespace) -> None:
    """Save the component with its card and add its losses to the report of both."""
    recipe, folder = RECIPES[name], arguments.output / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # How this run happened to load the tokenizer is nobody else's business.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    losses = {}
    for split in ("validation", "test"):
        for kind in KINDS:
            stream = packed(tokenizer, kind, split)
            size = sum(len(text.encode()) for text in documents(kind, split))
            nats = evaluate(model, stream)
            bits = nats * len(stream) / math.log(2) / size
            losses[f"{kind}/{split}"] = {
                "tokens": len(stream),
                "nats_per_token": round(nats, 4),
                "bits_per_byte": round(bits, 4),
            }
    per_step = arguments.batch_size * CONTEXT
    result = {
        "family": recipe.family,
        "parameters": model.num_parameters(),
        "trained_tokens": state["step"] * per_step,
        "kept_after_tokens": state["best_step"] * per_step,
        "seconds": round(state["seconds"]),
        "learning_rate": recipe.learning_rate,
        "seed": arguments.seed,
        "python": platform.python_version(),
        "losses": losses,
    }
    path = arguments.output / "train_report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(sorted({**report, name: result}.items())), indent=2) + "\n")
    rows = "\n".join(f"| {k} | {v['nats_per_token']:.3f} | {v['bits_per_byte']:.3f} |" for k, v in losses.items())
    card = CARD.format(
        name=name,
        family=recipe.family,
        family_tag=model.config.model_type,
        parameters=result["parameters"],
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        context=CONTEXT,
        what=f"the {recipe.kind}",
        rows=rows,
        python=result["python"],
        share=1 - OTHER_KIND,
        other=OTHER_KIND,
        kind=recipe.kind,
        other_kind=next(kind for kind in KINDS if kind != recipe.kind),
        tokens=arguments.tokens,
        seed=arguments.seed,
        kept=result["kept_after_tokens"],
        learning_rate=recipe.learning_rate,
        vocab=VOCAB,
        end=END,
    )
    (folder / "README.md").write_text(card)
    print(json.dumps({name: result}))


def main() -> None:
    """Parse the command line and train what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", choices=[*RECIPES, "all"], default="all", help="what to train (default: all)")
    parser.add_argument("--output", type=Path, default=Path("manticore_hf/demo_components"), help="where results go")
    parser.add_argument("--checkpoints", type=Path, default=Path("build/demo_components"), help="folder to resume from")
    parser.add_argument("--tokens", type=float, default=6e6, help="training tokens per component (default: 6e6)")
    parser.add_argument("--batch-size", type=int, default=8, help=f"windows of {CONTEXT} tokens per step (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(arguments.checkpoints / "tokenizer")
    for name in RECIPES if arguments.component == "all" else [arguments.component]:
        train(name, tokenizer, arguments)


if __name__ == "__main__":
    main()
