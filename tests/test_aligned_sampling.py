"""Sampling one component per token where components have tokenizers of their own."""

import dataclasses
import itertools

import pytest
import torch
from aligned_pairs import TEXTS, hybrid, tokenizer
from cases import case
from hub_models import folder_of, tiny
from manticore_hf.modeling.aligned_hybrid import aligner_of
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.compose import mixture_sampling

PAIRS = {
    "attention": (("llama", "gpt"), ("gpt_neox", "gemma")),
    "recurrent": (("llama", "gemma"), ("mamba", "gpt")),
    "three": (("llama", "gpt"), ("gpt_neox", "gemma"), ("mamba", "roles")),
}
MIXTURES = {
    "static": {"mixture": "static"},
    "gate": {"mixture": "token", "gate_lag": 3},
    "gate, past losses": {"mixture": "token", "gate_past_losses": True, "gate_lag": 3},
    "online": {"mixture": "online", "online_eta": 0.7, "online_decay": 0.85, "gate_lag": 3},
}
PROMPT, WRITTEN = "two dogs ra", "n and  saw the trées\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root, held = tmp_path_factory.mktemp("sampled"), {}

    def make(kind, mixture):
        if (kind, mixture) not in held:
            model = held[kind, mixture] = hybrid(root, PAIRS[kind], **MIXTURES[mixture])
            for name, parameter in model.hybrid_mixer.named_parameters():
                torch.nn.init.normal_(parameter, std=0.5 if "alpha" in name else 0.2)
            model.generation_config.eos_token_id = None
        return held[kind, mixture]

    return make


def ids_of(kind, text):
    return torch.tensor([tokenizer(PAIRS[kind][0][1])(text, add_special_tokens=False).input_ids])


def sample(model, ids, **given):
    return model.generate(ids, **{"do_sample": True, "mixture_sampling": True, "max_new_tokens": 12, **given})


class Script:
    """In the place of torch.multinomial: components in some order, tokens as forced, at times by way of the rest."""

    def __init__(self, tokens, count, size):
        self.tokens, self.count, self.size = iter(tokens), count, size
        self.components, self.ways = itertools.cycle(range(count)), itertools.cycle((True, True, False))
        self.draws = []  # (component, its share of each component, what was drawn from, one after the other)

    def __call__(self, probs, size):
        probs = probs.detach().clone()
        if len(probs) == self.count:
            # Each component twice in a row, then the next one
            which = next(self.components) if len(self.draws) % 2 == 0 else self.draws[-1][0]
            self.draws.append((which, probs, []))
            return torch.tensor([which])
        self.draws[-1][2].append(probs)
        if len(probs) == self.size + 1 and next(self.ways):
            return torch.tensor([self.size])
        return torch.tensor([next(self.tokens)])


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("kind", PAIRS)
def test_every_draw_has_the_mixtures_probabilities(made, monkeypatch, kind, mixture):
    """Of a token: what is certain, and of the rest the share that the home component decides, are the mapped whole."""
    model, forced = made(kind, mixture).to(torch.float64), ids_of(kind, WRITTEN)[0].tolist()
    prompt, names = ids_of(kind, PROMPT), model.config.component_names
    script = Script(forced, len(names), model.config.vocab_size)
    monkeypatch.setattr(mixture_sampling.torch, "multinomial", script)
    out = sample(model, prompt, max_new_tokens=len(forced))
    monkeypatch.undo()
    assert out[0].tolist() == [*prompt[0].tolist(), *forced]
    with torch.no_grad():
        whole, own = model(out, use_cache=False), {}
        for name in names:
            model.set_mixture_weights(name)
            own[name] = model(out, use_cache=False).logits[0].softmax(-1)
        model.set_mixture_weights(None)
    ways = {1: 0, 2: 0}
    for at, (which, shares, drawn) in enumerate(script.draws, prompt.shape[1] - 1):
        wanted = model.mixture_weights()[0] if mixture == "static" else whole.weights[0, at]
        torch.testing.assert_close(shares, wanted.to(shares.dtype), rtol=1e-5, atol=1e-7)
        right = own[names[which]][at]
        if len(drawn[0]) == len(right):
            found = drawn[0]
        else:
            certain, rest = drawn[0][:-1], drawn[0][-1]
            assert (certain <= right + 1e-12).all() and 1e-7 < rest <= 1 and abs(drawn[0].sum() - 1) < 1e-9
            ways[len(drawn)] += 1
            found = right if len(drawn) == 1 else certain + rest * drawn[1] / drawn[1].sum()
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-9)
        mixed = sum(share * own[name][at] for share, name in zip(wanted, names))
        torch.testing.assert_close(mixed, whole.logits[0, at].softmax(-1), rtol=1e-5, atol=1e-8)
    assert ways[1] and ways[2]
    model.float()


def test_a_cache_goes_on_where_sampling_ended(made):
    """Greedily and sampled, with the tokens that no cache gives; other text may come in between."""
    for kind, mixture in (("three", "gate, past losses"), ("recurrent", "static"), ("attention", "online")):
        model, more = made(kind, mixture), ids_of(kind, ". The cat sat")
        torch.manual_seed(1)
        given = {"return_dict_in_generate": True, "max_new_tokens": 8}
        first = sample(model, ids_of(kind, PROMPT), **given)
        for between in (more[:, :0], more):
            with case(kind, mixture, f"{between.shape[1]} tokens in between"):
                text = torch.cat([first.sequences, between], 1)
                cache = mixture_sampling._fork(first.cache)
                settings = {"max_new_tokens": 6, "do_sample": False}
                alone = model.generate(text, use_cache=False, **settings)
                assert model.generate(text, cache=cache, **settings).tolist() == alone.tolist()
                turns = []
                for cache in (mixture_sampling._fork(first.cache), None):
                    torch.manual_seed(2)
                    turns.append(sample(model, text, cache=cache, **given).sequences.tolist())
                assert turns[0] == turns[1]


def test_rows_are_written_as_if_alone(made):
    """Padded rows, and several answers to one prompt, which is read once."""
    for kind, mixture in (("three", "gate, past losses"), ("recurrent", "static"), ("attention", "online")):
        model = made(kind, mixture)
        rows = [ids_of(kind, text) for text in ("the cat", PROMPT, PROMPT)]
        size = max(row.shape[1] for row in rows)
        gaps = [size - row.shape[1] for row in rows]
        ids = torch.cat([torch.nn.functional.pad(row, (gap, 0)) for row, gap in zip(rows, gaps)])
        mask = torch.stack([torch.arange(size) >= gap for gap in gaps]).long()
        torch.manual_seed(3)
        found = sample(model, ids, attention_mask=mask, pad_token_id=0)
        torch.manual_seed(3)
        for row, gap, one in zip(rows, gaps, found):
            with case(kind, mixture, gap):
                assert one[gap:].tolist() == sample(model, row)[0].tolist()


def test_only_what_was_drawn_runs(made):
    model, calls = made("attention", "static"), []
    for name in model.config.component_names:
        model.segments.segment(name, 0).stack.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    home, other = model.config.component_names
    model.set_mixture_weights([[1.0, 0.0]])
    sample(model, ids_of("attention", PROMPT))
    assert set(calls) == {home}
    model.set_mixture_weights([[0.0, 1.0]])
    calls.clear()
    sample(model, ids_of("attention", PROMPT), max_new_tokens=30)
    assert calls.count(other) >= 30 > calls.count(home)
    model.set_mixture_weights(None)


@torch.no_grad()
def test_the_last_prediction_alone_is_that_of_all(made):
    """What is not wanted hangs no paths on the trees, of rows padded anywhere, in one call and in several."""
    for kind in PAIRS:
        model = made(kind, "static")
        one, two = ids_of(kind, TEXTS["code"])[0], ids_of(kind, TEXTS["emojis"])[0]
        size = len(one) + 2
        ids = torch.stack([torch.nn.functional.pad(row, (1, size - 1 - len(row))) for row in (one, two)])
        mask = torch.stack([(torch.arange(size) > 0) & (torch.arange(size) <= len(row)) for row in (one, two)]).long()
        for last in (len(one), len(two) + 1, 5):
            given = ids[:, :last], mask[:, :last]
            whole = model(given[0], attention_mask=given[1], use_cache=False).logits[:, -1:]
            cache, here = model.make_cache(), []
            for start, end in ((0, last // 2), (last // 2, last)):
                part = {"attention_mask": mask[:, :end], "cache": cache, "logits_to_keep": 1}
                here = model(ids[:, start:end], **part).logits
            alone = model(given[0], attention_mask=given[1], use_cache=False, logits_to_keep=1).logits
            real = mask[:, last - 1].bool()
            for found in (alone, here):
                torch.testing.assert_close(found[real], whole[real], atol=1e-4, rtol=1e-4)


# ---- a tiny vocabulary -----------------------------------------------------------------------------------------------


def plain(*words):
    """A BPE tokenizer of a few letters and words, each of which is the last one and a letter more."""
    vocabulary = {word: number for number, word in enumerate(("</s>", "a", "b", "c", *words))}
    core = Tokenizer(models.BPE(vocabulary, [(word[:-1], word[-1]) for word in words]))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="</s>")


@pytest.mark.slow
@pytest.mark.parametrize("mixture, more", [("static", [5]), ("gate", [5, 1])])
def test_100000_tokens_are_the_mixtures(tmp_path, monkeypatch, mixture, more):
    parts = []
    for family, words in (("llama", ("ab", "bc")), ("gpt_neox", ("ca", "cab")), ("mamba", ("bb", "bbc"))):
        tokens = plain(*words)
        model = tiny(family, vocabulary=len(tokens))
        model.get_output_embeddings().weight.data.mul_(8)
        folder_of(model, tmp_path / family, tokens)
        parts.append(ComponentSpec(tmp_path / family, name=family))
    model = ManticoreForCausalLM.from_components(parts, **MIXTURES[mixture]).eval()
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    prompt, count, names = torch.tensor([1, 4, 3, 2]), 100_000, model.config.component_names
    ids, cache = torch.cat([prompt, torch.tensor(more)]), model.make_cache()
    with torch.no_grad():
        shares, own, _ = mixture_sampling._ask(model, prompt, cache)
        readers = {
            name: mixture_sampling._Reader(model, name, mixture_sampling._fork(cache), 4, own[name]) for name in names
        }
        for one in readers.values():
            one.read(ids)
        # What is read and mapped here is the same at each draw: once is enough
        aligner, held = aligner_of(model), {}
        for name in model.config.aligned:
            one = readers[name]
            held[name] = (
                one.certain(),
                aligner.log_probs(model, name, one.reading, readers["llama"].logits, mixture_sampling.LAST),
            )
        monkeypatch.setattr(mixture_sampling._Reader, "certain", lambda self, held=held: held[self.name][0])
        monkeypatch.setattr(aligner, "log_probs", lambda model, name, *_, held=held: held[name][1])
        drawn = [names[one] for one in torch.multinomial(shares, count, replacement=True).tolist()]
        found = torch.cat([dataclasses.replace(readers[name]).draw(ids, readers["llama"]) for name in drawn])
        monkeypatch.undo()
        expected = model(ids[None]).logits[0, -1].double().softmax(-1) * count
    square = ((found.bincount(minlength=len(expected)) - expected) ** 2 / expected).sum().item()
    assert square < 22.5  # of 5 degrees of freedom one in 2,500 is above
