"""What a vocabulary transplant covers, takes and costs.

    python benchmarks/transplant.py --gpt2 DIR --neox DIR

DIR holds the tokenizer of GPT-2 (vocab.json, merges.txt) or GPT-NeoX (tokenizer.json): coverage both ways, and seconds
to build the rows of a random embedding of width 768. Then quality with the package's own components: a second tokenizer
and a donor that knows it are trained on the text of the standard library, each component is transplanted to it by each
method, measured on held-out text in bits per byte, and measured again after a short training of its embedding and head
alone. Every row of the second part is one line of the output; a killed benchmark goes on where it stopped.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

import manticore_hf
from manticore_hf.compose.transplant import bits_per_byte, transplant
from manticore_hf.compose.transplant.build import ATOMS, METHODS, match, new_rows
from manticore_hf.compose.transplant.surface import Surfaces
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import pack

COMPONENTS = Path(manticore_hf.__file__).parent / "demo_components"
KINDS = {"neox-prose": "prose", "mamba-code": "code"}
END = "<|endoftext|>"


def byte_level(core):
    """A byte-level tokenizer around a BPE model."""
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return core


def real(args):
    """Coverage and time at real size."""
    folder = Path(args.gpt2)
    core = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    found = {
        "gpt2": PreTrainedTokenizerFast(tokenizer_object=byte_level(core), bos_token=END, eos_token=END, unk_token=END),
        "gpt-neox": PreTrainedTokenizerFast(
            tokenizer_file=str(Path(args.neox) / "tokenizer.json"), bos_token=END, eos_token=END, unk_token=END
        ),
    }
    out = {}
    for one, other in (("gpt2", "gpt-neox"), ("gpt-neox", "gpt2")):
        start = time.perf_counter()
        source, target = Surfaces(found[one]), Surfaces(found[other])
        plan = match(source, target)
        row = {**plan.coverage(), "match": time.perf_counter() - start}
        weight, donor = torch.randn(source.size, args.width), torch.randn(target.size, args.width)
        for name in METHODS:
            start = time.perf_counter()
            new_rows(weight, plan, "input", METHODS[name](plan, "input", donor, ATOMS, True))
            row[name] = time.perf_counter() - start
        out[f"{one} -> {other}"] = row
        print(one, "->", other, json.dumps(row), flush=True)
    return out


def train(model, rows, steps, rate, desc, warmup=5):
    """AdamW with a linear decay, on blocks drawn with a seed."""
    chosen = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in tqdm(range(steps), desc=desc, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / warmup) * (1 - step / steps)
        batch = rows[torch.randint(0, len(rows), (16,), generator=generator)]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def donor_of(folder, steps):
    """A tokenizer of 3000 tokens and a small GPT-NeoX that knows it, made once."""
    if not (folder / "config.json").exists():
        order, texts = random.Random(0), documents("prose", "train") + documents("code", "train")
        order.shuffle(texts)
        core = byte_level(Tokenizer(models.BPE()))
        special = ["<s>", "</s>", "<pad>"]
        core.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=3000,
                special_tokens=special,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        seen = documents("prose", "pretrain") + documents("code", "pretrain")
        order.shuffle(seen)
        set_seed(0)
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=3000,
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=512,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        )
        train(model, torch.tensor(pack(seen, tokenizer, 128)["input_ids"]), steps, 2e-3, "Donor", 50)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def untied(model):
    """The same model with a head of its own."""
    model.config.tie_word_embeddings = False
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    return model


def random_rows(model):
    """What `embeddings="fresh"` starts from."""
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.nn.init.normal_(end.weight, 0.0, 0.02)
    return model


def measure(args):
    """Runs what is not in the output yet."""
    output = Path(args.output)
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {(one["component"], one["head"], one["rows"]) for one in lines}
    donor, tokenizer = donor_of(Path(args.work) / "donor", args.donor_steps)
    for name, kind in KINDS.items():
        own = AutoTokenizer.from_pretrained(COMPONENTS / name)
        texts = [text[:600] for text in random.Random(0).sample(documents(kind, "test"), 25)]
        rows = torch.tensor(pack(documents(kind, "train"), tokenizer, 128)["input_ids"])
        for head in ("tied", "own"):
            for how in ("copied", *METHODS, "random"):
                if (name, head, how) in done:
                    continue
                model = AutoModelForCausalLM.from_pretrained(COMPONENTS / name).eval()
                model = model if head == "tied" else untied(model)
                before = bits_per_byte(model, own, texts, 25)
                set_seed(0)
                method = "mean" if how in ("copied", "random") else how
                found, _ = transplant(model, own, tokenizer, method, donor=donor)
                if how == "random":
                    random_rows(found)
                elif how == "copied":  # nothing is built: the mean row for all others
                    _only_copied(model, found, own, tokenizer)
                after = bits_per_byte(found, tokenizer, texts, 25)
                found.requires_grad_(False)
                for end in (found.get_input_embeddings(), found.get_output_embeddings()):
                    end.requires_grad_(True)
                train(found, rows, args.steps, args.rate, f"{name}, {head}, {how}")
                tuned = bits_per_byte(found, tokenizer, texts, 25)
                line = {"component": name, "head": head, "rows": how, "before": before, "after": after, "tuned": tuned}
                print(json.dumps(line), flush=True)
                lines.append(line)
                with output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return lines


def _only_copied(model, found, own, tokenizer):
    plan, tied = match(Surfaces(own), Surfaces(tokenizer)), found.config.tie_word_embeddings
    for side, one, other in (
        ("input", model.get_input_embeddings(), found.get_input_embeddings()),
        ("head", model.get_output_embeddings(), found.get_output_embeddings()),
    ):
        other.weight.data.copy_(new_rows(one.weight, plan, "tied" if tied else side, {}))


def main():
    """Both parts, as far as their inputs are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt2", help="directory with GPT-2's vocab.json and merges.txt")
    parser.add_argument("--neox", help="directory with GPT-NeoX's tokenizer.json")
    parser.add_argument("--width", type=int, default=768, help="width of the random embeddings")
    parser.add_argument("--work", default="transplant-work", help="directory of the donor")
    parser.add_argument("--output", default="benchmarks/results/transplant.jsonl", help="file of the second part")
    parser.add_argument("--donor-steps", type=int, default=700, help="training steps of the donor")
    parser.add_argument("--steps", type=int, default=15, help="training steps of embedding and head, 2048 tokens each")
    parser.add_argument("--rate", type=float, default=2e-3, help="their learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.gpt2 and args.neox:
        real(args)
    rows = measure(args)
    print(f"\n{'component':12} {'head':5} {'rows':7} {'before':>8} {'after':>8} {'tuned':>8}")
    for row in rows:
        numbers = " ".join(f"{row[key]:8.4f}" for key in ("before", "after", "tuned"))
        print(f"{row['component']:12} {row['head']:5} {row['rows']:7} {numbers}")
    if any(not math.isfinite(row["tuned"]) for row in rows):
        raise SystemExit("a loss is not finite")


if __name__ == "__main__":
    main()
