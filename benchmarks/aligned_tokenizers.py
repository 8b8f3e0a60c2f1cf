"""Are predictions mapped between two real tokenizers right? Tiny random models with their vocabularies, both ways.

    python benchmarks/aligned_tokenizers.py --tokenizers GPT-2=DIR GPT-NeoX=DIR

DIR holds a tokenizer.json, or a vocab.json and merges.txt. What is measured needs no trained model:

* lost: bits of a text of a finite language that a perfect model of the one tokenizer loses by being mapped, above the
  language's entropy, against counting the texts (`tests/aligned_language.py`, an independent reference);
* sum: how far mapped probabilities are from one in sum; cached, chunks, future: how far log-probabilities are apart
  with a cache token by token, with a cache in chunks, and where what follows is another text;
* generated: tokens that greedy decoding writes with a cache as without;
* odd rows: rows of special tokens, halves of characters, an empty text, of which every number must be finite.

Each result is kept as soon as it is there; what is there is not measured again.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from aligned_language import Ideal, Language, bits, mapped
from aligned_pairs import TEXTS as SHORT
from hub_models import folder_of, tiny
from manticore_hf.modeling.aligned_mapping import ByteTokenizer, Mapping
from test_aligned import LANGUAGES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.utils.files import write_json

RESULTS = Path(__file__).parent / "results" / "aligned_tokenizers.json"
END = "<|endoftext|>"
TEXTS = {
    **SHORT,
    "trailing spaces": "The end of a line.   \n\tand a tab \u00a0 ",
    "special tokens": f"one document{END}and another, <|im_start|>user\nhello<|im_end|>{END}",
    "rare words": "antidisestablishmentarianism \u0416\u0443\u043a \u05e9\u05dc\u05d5\u05dd zzzzqqq 31415926535",
}
FAMILIES = ("llama", "gpt_neox")


def tokenizer_of(folder):
    """A tokenizer of a directory, as Transformers has it; GPT-2's roles."""
    if (folder / "tokenizer.json").exists():
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        core = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END, unk_token=END, pad_token=END)


def lost(home, other):
    """{language: (bits lost, its entropy)} of a perfect model of the other tokenizer, mapped to the home's."""
    a, b = ByteTokenizer(home), ByteTokenizer(other)
    mapping, out = Mapping(a, b), {}
    ends = [one.surfaces.roles["eos"] for one in (a, b)]
    for name, pieces in LANGUAGES.items():
        language = Language(pieces)
        cuts = [lambda text, one=one: one.cut(text.encode()) for one in (a, b)]
        best, theirs = (Ideal(language, cut, end) for cut, end in zip(cuts, ends))

        def known(ids, best=best):
            found = torch.full((a.size,), -20.0)
            for number, probability in best(ids).items():
                found[number] = math.log(probability)
            return found

        entropy = -sum(weight * math.log2(weight) for weight in language.texts.values())
        out[name] = [bits(language, cuts[0], ends[0], mapped(mapping, theirs, known)) - entropy, entropy]
    return out


def hybrid_of(home, other, tokenizers, place):
    """An aligned hybrid of two tiny models with strong random weights."""
    specs = []
    for family, name in zip(FAMILIES, (home, other)):
        tokens = tokenizers[name]
        model = tiny(family, vocabulary=max(tokens.get_vocab().values()) + 1, max_position_embeddings=512)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(8)
        specs.append(ComponentSpec(folder_of(model, place / f"{family}-{name}", tokens), name=family))
    return ManticoreForCausalLM.from_components(specs, mixture="static", mixture_space="prob", verify=False)


def apart(one, two):
    """The largest difference of log-probabilities above -30, below which float32's sums of probabilities end."""
    one, two = one.log_softmax(-1), two.log_softmax(-1)
    return (one.clamp(min=-30) - two.clamp(min=-30)).abs().max().item()


@torch.no_grad()
def checks(model, tokens):
    """What must hold of any weights: the worst case over all texts."""
    worst, name = dict.fromkeys(("sum", "cached", "chunks", "future"), 0.0), model.config.aligned[0]
    for text in TEXTS.values():
        ids = tokens(text, return_tensors="pt", add_special_tokens=False).input_ids
        whole = model(ids, use_cache=False).logits
        half = ids.shape[1] // 2
        for key, sizes in (("cached", [1] * ids.shape[1]), ("chunks", [half, 1, ids.shape[1] - half - 1])):
            cache = model.make_cache()
            read = torch.cat([model(part, cache=cache).logits for part in ids.split(sizes, 1) if part.shape[1]], 1)
            worst[key] = max(worst[key], apart(read, whole))
        other = torch.cat([ids[:, :half], ids[:, half:].flip(1)], 1)
        worst["future"] = max(worst["future"], apart(model(other, use_cache=False).logits[:, :half], whole[:, :half]))
        model.set_mixture_weights(name)
        alone = model(ids, use_cache=False).logits.double().exp().sum(-1)
        model.set_mixture_weights(None)
        worst["sum"] = max(worst["sum"], (alone - 1).abs().max().item())
    same = written = 0
    for text in ("the cat", "for i in", "\u732b\u304c"):
        given = tokens(text, return_tensors="pt", add_special_tokens=False).input_ids
        one, two = (
            model.generate(
                given, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0
            )
            for cache in (True, False)
        )
        same, written = same + int((one == two)[:, given.shape[1] :].sum()), written + 12
    end, broken = tokens.eos_token_id, tokens("\U0001f600", add_special_tokens=False).input_ids[1:]
    odd = ([end], [end, *broken], [*broken, end, *broken], [end, end], tokens(f"a{END}b").input_ids, broken[:1])
    finite = sum(bool(model(torch.tensor([row]), use_cache=False).logits.isfinite().all()) for row in odd)
    return {**worst, "generated": f"{same} of {written}", "odd_rows": f"{finite} of {len(odd)}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizers", nargs=2, required=True, metavar="NAME=DIR")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = {name: tokenizer_of(Path(folder)) for name, _, folder in (one.partition("=") for one in options.tokenizers)}
    done = json.loads(options.results.read_text()) if options.results.exists() else {}
    names = list(found)
    for home, other in (names, names[::-1]):
        key = f"{other} on {home}"
        if key in done:
            continue
        began = time.process_time()
        row = {"lost": lost(found[home], found[other])}
        with tempfile.TemporaryDirectory() as place:
            row |= checks(hybrid_of(home, other, found, Path(place)), found[home])
        row["vocabularies"] = [len(found[name]) for name in (home, other)]
        done[key] = {**row, "seconds": round(time.process_time() - began, 1)}
        options.results.parent.mkdir(exist_ok=True)
        write_json(options.results, done)
        print(key, done[key], flush=True)


if __name__ == "__main__":
    main()
