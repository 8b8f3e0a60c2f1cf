"""Aligned hybrids: nothing looks ahead, what a cache gives, gradients, and tokenizers like those in use."""

import math
import random

import pytest
import torch
from aligned_language import Ideal, Language, bits, mapped
from aligned_pairs import CODE, TEXTS, hybrid, tokenizer
from cases import case
from manticore_hf.modeling.aligned_hybrid import aligner_of
from manticore_hf.modeling.aligned_mapping import ByteTokenizer, Mapping
from manticore_hf.modeling.aligned_reading import Row, grow
from peft import get_peft_model

from manticore_hf import lora_config
from manticore_hf.families import contract
from manticore_hf.families.precision import Float64, doubled

PAIRS = {
    "attention": (("llama", "gpt"), ("gpt_neox", "gemma")),
    "recurrent": (("llama", "gemma"), ("mamba", "gpt")),
    "three": (("llama", "gpt"), ("gpt_neox", "gemma"), ("mamba", "roles")),
    "prefix": (("gpt_neox", "llama"), ("llama", "neox")),
    "windows": (("llama", "gpt"), ("gemma3_text", "gemma")),
}
KINDS = ("gpt", "neox", "gemma", "llama")


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("aligned"), {}
    return lambda kind: made.setdefault(kind, hybrid(root, PAIRS[kind]))


def ids_of(kind, text):
    return tokenizer(PAIRS[kind][0][1])(text, add_special_tokens=False).input_ids


# ---- nothing looks ahead ---------------------------------------------------------------------------------------------


def futures(made, kind, past, length, shaped):
    """Texts that may follow: random tokens; `shaped`: such that all components read trees of one shape."""
    draw, found, wanted = random.Random(0), [], None
    digits = [ids_of(kind, digit)[-1] for digit in "0123456789"]
    while len(found) < 3:
        choice = digits if shaped else range(3, made.config.vocab_size)
        tail = [draw.choice(choice) for _ in range(length)]
        if shaped:
            trees = [
                grow(aligner_of(made).mapping(made, name), Row(), [*past, *tail])[0] for name in made.config.aligned
            ]
            shape = [(tree.parents, tree.trunk) for tree in trees]
            wanted = wanted or shape
            if shape != wanted:
                continue
        if tail not in found:
            found.append(tail)
    return found


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("kind", PAIRS)
def test_logits_do_not_look_ahead(hybrids, kind):
    """Bit-equal where the future has another text of the same shape; whatever it is, up to the rounding of float64."""
    made = hybrids(kind)
    for name in ("code", "emojis"):
        past = ids_of(kind, TEXTS[name])[:30]
        kept = torch.arange(len(past))
        for shaped in (True, False):
            made.to(torch.float32 if shaped else torch.float64)
            for way in ("at once", "prefill", "chunk"):
                found = []
                for tail in futures(made, kind, past, 7, shaped):
                    ids = torch.tensor([[*past, *tail]])
                    with torch.no_grad():
                        if way == "at once":
                            out = made(ids, use_cache=False, logits_to_keep=kept).logits
                        elif way == "prefill":
                            out = made(ids, use_cache=True, logits_to_keep=kept).logits
                        else:
                            cache = made.make_cache()
                            first = made(ids[:, :9], cache=cache).logits
                            out = torch.cat([first, made(ids[:, 9:], cache=cache, logits_to_keep=kept[:-9]).logits], 1)
                    found.append(out)
                with case(name, way, "same shape" if shaped else "float64"):
                    assert found[0].std() > 0.5
                    for other in found[1:]:
                        if shaped:
                            assert torch.equal(other, found[0])
                        else:
                            torch.testing.assert_close(other, found[0], atol=1e-9, rtol=1e-9)
    made.to(torch.float32)


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("kind", PAIRS)
def test_what_every_hybrid_must_do_with_a_cache(hybrids, kind):
    """The checks that every family of hybrids must pass; tokens at random, so letters and words begin in the middle."""
    made = hybrids(kind)
    checks = [
        contract.check_greedy,
        contract.check_padding,
        contract.check_padding_inside,
        contract.check_turns,
        contract.check_beams,
        lambda made: contract.check_chunks(made, (4, 1, 1, 3, 2)),
    ]
    made.to(torch.float64)
    for check in checks:
        check(made)
    made.to(torch.float32)


@pytest.mark.parametrize("kind", PAIRS)
def test_documents_in_a_row(hybrids, kind):
    made = hybrids(kind)
    made.to(torch.float64)
    with Float64():
        contract.check_documents(made)
    made.to(torch.float32)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("kind", PAIRS)
def test_a_second_turn_goes_on_from_the_first(hybrids, kind):
    made = hybrids(kind)
    first, more = torch.tensor([ids_of(kind, "Two dogs ran and")]), torch.tensor([ids_of(kind, ". The cat sat")])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "return_dict_in_generate": True}
    for asked in ({}, {"do_sample": True}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            out = made.generate(first, attention_mask=torch.ones_like(first), use_cache=use_cache, **settings, **asked)
            turn = torch.cat([out.sequences, more], 1)
            kept = {"cache": out.cache} if use_cache else {"use_cache": False}
            out = made.generate(turn, attention_mask=torch.ones_like(turn), **kept, **settings, **asked)
            found.append(out.sequences.tolist())
        assert found[0] == found[1], asked


# ---- gradients -------------------------------------------------------------------------------------------------------


def slope(loss, parameters, direction, step=1e-5):
    """(f(p + step d) - f(p - step d)) / 2 step."""
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, one in zip(parameters, direction):
                parameter.add_(one, alpha=sign * step)
            values.append(loss().item())
        for parameter, one in zip(parameters, direction):
            parameter.add_(one, alpha=step)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("kind", ("attention", "recurrent"))
def test_gradients_of_the_other_component_are_measured_slopes(tmp_path, kind):
    """Of every parameter along a random direction, by fine-tuning, by LoRA, and of the hybrid's own mixer."""
    settings = {"mix_loss_weight": 1.0, "component_loss_weight": 0.5}
    made = doubled(hybrid(tmp_path, PAIRS[kind], **settings)).train()
    name = made.config.aligned[0]
    one = ids_of(kind, CODE[:24])
    ids = torch.tensor([one, one[::-1]])

    def compare(trained, parameters):
        def loss():
            with Float64():  # scans, gates and losses ask for float32
                return trained(input_ids=ids, labels=ids).loss

        trained.zero_grad()
        loss().backward()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for key, parameter in parameters:
                with case(key):
                    direction = torch.randn_like(parameter)
                    wanted = slope(loss, [parameter], [direction])
                    got = (parameter.grad * direction).sum().item()
                    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-7)

    mine = [*made.component(name).named_parameters()]
    compare(made, [*mine, *made.hybrid_mixer.token_gate.named_parameters()])
    adapted = get_peft_model(made, lora_config(made, r=2, train_mixer=False)).train()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    found = [(key, p) for key, p in adapted.named_parameters() if p.requires_grad and f".{name}." in key]
    assert found
    compare(adapted, found)


# ---- tokenizers like those in use ------------------------------------------------------------------------------------

HARD = {
    "emojis": "a 😀😀 and 🐈‍⬛!",
    "no spaces": "猫が木の下で待っている。",
    "trailing": "the cat   ",
    "runs": "if mat:\n        return  mat\n\n\n    for",
    "special": "the cat</s> sat <|end|><eos>",
    "nothing": "",
    "digits": "12345 and 6",
    "tabs": "\tcat\t\tdog \n",
}


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("home", KINDS)
def test_rows_sum_to_one_whatever_the_text(tmp_path, home):
    """Also rows that begin in the middle of a letter, and special tokens in a row."""
    others = [kind for kind in KINDS if kind != home]
    made = hybrid(tmp_path, [("llama", home), *(("gpt_neox", kind) for kind in others)])
    tokens = tokenizer(home)
    rows = [tokens(text).input_ids for text in HARD.values()]
    rows += [row[1:] for row in rows[:2]] + [row[2:] for row in rows[:2]]
    rows += [[tokens.eos_token_id], [tokens.eos_token_id, *rows[0], tokens.eos_token_id, *rows[1]]]
    for row in filter(None, rows):
        ids = torch.tensor([row])
        with torch.no_grad():
            own = made.component(made.config.tokenizer_component)(ids).logits
            for name in made.config.aligned:
                made.set_mixture_weights(name)
                out = made(ids, use_cache=False).logits
                with case(home, name, tokens.decode(row)):
                    torch.testing.assert_close(out.exp().sum(-1), torch.ones(ids.shape), atol=1e-4, rtol=1e-4)
                    assert (out - own.log_softmax(-1)).abs().max() > 0.1  # the other's, not the home's
        made.set_mixture_weights(None)


LANGUAGES = {
    "words": [["The", "There", "the"], [" cat", " cats", " tree"], [" wait", " ran", " 12"], [".", ", and"]],
    "letters": [["é", "猫", "😀", "a"], ["ü", "が", "🐈‍⬛", " "], [" b", "犬", "</s>"]],
    "spaces": [["if mat:", "x"], ["\n    ", "\n        ", "  ", "\n"], ["return", " a", "\t"]],
}


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("other", KINDS)
def test_byte_by_byte_a_perfect_component_stays_perfect(other):
    """The hybrid's tokens are single bytes, and the exact probability of the next byte is known: by counting texts."""
    a, b = ByteTokenizer(tokenizer("single")), ByteTokenizer(tokenizer(other))
    mapping, end = Mapping(a, b), b.surfaces.roles["eos"]
    for name, pieces in LANGUAGES.items():
        language = Language(pieces)
        entropy = -sum(weight * math.log2(weight) for weight in language.texts.values())
        theirs = Ideal(language, lambda text: b.cut(b.prefix + text.encode()), end)
        predict = mapped(mapping, theirs, lambda ids: torch.zeros(a.size))
        lost = bits(language, lambda text: a.cut(text.encode()), a.surfaces.roles["eos"], predict) - entropy
        with case(other, name):
            assert -1e-3 < lost < 2e-2, lost
