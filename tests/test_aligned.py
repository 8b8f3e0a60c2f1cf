"""Aligned hybrids: components that read the same bytes through tokenizers of their own."""

import contextlib
import functools
import itertools
import json
import math
from pathlib import Path

import clean_process
import pytest
import torch
from aligned_language import Ideal, Language, bits, mapped
from aligned_pairs import TEXTS, gpt, hybrid, model, tokenizer
from hub_models import folder_of, publish
from manticore_hf.modeling.aligned_hybrid import aligner_of
from manticore_hf.modeling.aligned_mapping import ByteTokenizer, Mapping
from manticore_hf.modeling.aligned_reading import Row, grow
from manticore_hf.modeling.bounds_manticore import ManticoreError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from two_tokenizers import FIRST

from manticore_hf import ComponentSpec, ManticoreForCausalLM

DEMO = Path(__file__).parent.parent / "manticore_hf" / "demo_components"
PAIRS = {
    "attention": (("llama", "gpt"), ("gpt_neox", "gemma")),
    "recurrent": (("llama", "gemma"), ("mamba", "gpt")),
    "padded home": (("gpt_neox", "gemma"), ("llama", "gpt")),
    "three": (("llama", "gpt"), ("gpt_neox", "gemma"), ("mamba", "roles")),
}
LANGUAGES = {
    "words": [
        ["The", "There", "the"],
        [" cat", " cats", " contract", " tree", " trees"],
        [" wait", " waits", " ran"],
        [".", ", and"],
    ],
    "letters": [["é", "猫", "😀", "a"], ["ü", "が", "🐈‍⬛", " "], [" b", "犬"]],
    "code": [["for dog in mat:", "if mat:"], ["\n    ", "\n        ", "\n  "], ["return mat", "run(dog)", "pass"]],
}


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("aligned"), {}
    return lambda kind: made.setdefault(kind, hybrid(root, PAIRS[kind]))


def ids_of(kind, text, **kwargs):
    return tokenizer(PAIRS[kind][0][1])(text, return_tensors="pt", add_special_tokens=False, **kwargs)


@pytest.mark.parametrize("home, other", [("gpt", "gemma"), ("gemma", "gpt"), ("gpt", "roles")])
def test_a_perfect_component_is_mapped_to_perfect_predictions(home, other):
    """Compared with counting the texts of a finite language, where what is shared by the other's word is known."""
    a, b = ByteTokenizer(tokenizer(home)), ByteTokenizer(tokenizer(other))
    mapping = Mapping(a, b)
    ends = [one.surfaces.roles["eos"] for one in (a, b)]
    for name, limit in {"words": 0.01, "letters": 0.1, "code": 0.5}.items():
        language = Language(LANGUAGES[name])
        cuts = [lambda text, one=one: one.cut(text.encode()) for one in (a, b)]
        best, theirs = (Ideal(language, cut, end) for cut, end in zip(cuts, ends))

        def known(ids, best=best):
            out = torch.full((a.size,), -20.0)
            for number, probability in best(ids).items():
                out[number] = math.log(probability)
            return out

        entropy = -sum(weight * math.log2(weight) for weight in language.texts.values())
        lost = bits(language, cuts[0], ends[0], mapped(mapping, theirs, known)) - entropy
        assert abs(bits(language, cuts[0], ends[0], best) - entropy) < 1e-6
        assert -1e-3 < lost < limit, (home, other, name, lost)


def merging(*merges):
    """A tokenizer of bytes with these merges, in their order."""
    known = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*known, *("".join(pair) for pair in merges), "<|end|>"])}
    core = Tokenizer(models.BPE(words, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return ByteTokenizer(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|end|>", eos_token="<|end|>"))


@pytest.mark.parametrize("name", ["neox-prose", "mamba-code"])
def test_byte_probabilities_are_those_of_every_way_to_cut(tmp_path, name):
    """A trained model under a home of one-byte tokens, against the sum over all of its segmentations of the bytes."""
    folder_of(model("llama", "single"), tmp_path / "home", tokenizer("single"))
    parts = [ComponentSpec(tmp_path / "home", name="home"), ComponentSpec(DEMO / name, name="other")]
    made = ManticoreForCausalLM.from_components(parts, mixture="static").eval()
    made.set_mixture_weights("other")
    own, table = made.component("other"), aligner_of(made).bytes_of(made, "other")

    @functools.cache
    def after(ids):
        with torch.no_grad():
            return own(torch.tensor([[*table.start, *ids]]), use_cache=False).logits[0, -1].log_softmax(-1).tolist()

    def ways(data, ids=(), so_far=0.0):
        """Log-probabilities of the tokenisations of texts that begin with these bytes."""
        for number, token in enumerate(table.table) if so_far > -45 else ():
            if token and token.startswith(data):
                yield so_far + after(ids)[number]
            elif token and data.startswith(token):
                yield from ways(data[len(token) :], (*ids, number), so_far + after(ids)[number])

    for text in ("The film was", "def run(self)", "    return x"):
        data = text.encode()
        whole = [torch.tensor(list(ways(data[:end])) if end else [0.0]).logsumexp(0) for end in range(len(data) + 1)]
        exact = torch.stack(whole).diff()
        ids = torch.tensor([[tokenizer("single").bos_token_id, *tokenizer("single")(text).input_ids]])
        with torch.no_grad():
            found = made(ids, use_cache=False).logits[0].log_softmax(-1)
        found = found[torch.arange(len(data)), ids[0, 1:]]
        assert found.sum().item() == pytest.approx(exact.sum().item(), rel=0.02), text
        assert (found - exact).abs().max() < 0.6, text
        near = ((found - exact).abs() < 0.01).float().mean()
        assert near > (0.5 if text.startswith("  ") else 0.99), text  # what the cuts of spaces cost


def test_a_likely_token_is_cut_as_the_rest_of_the_word_asks():
    """Where B goes on with "Deb", "De" of A is the next token if "bian" follows; and "g|amm|a" may be "ga|mma"."""
    first = merging(("D", "e"), ("b", "i"), ("bi", "a"), ("bia", "n"), ("De", "b"), ("m", "m"), ("a", "mm"))
    second = merging(
        ("D", "e"), ("De", "b"), ("i", "a"), ("ia", "n"), ("g", "a"), ("m", "m"), ("mm", "a"), ("ga", "mm")
    )
    for text, cuts in {
        "Debian": ("De|bian", "Deb|ian"),
        "gamma": ("g|amm|a", "ga|mma"),
        "gamm": ("g|amm", "gamm"),
    }.items():
        for one, cut in zip((first, second), cuts):
            assert [one.table[i].decode() for i in one.cut(text.encode())] == cut.split("|")
    mapping, end = Mapping(first, second), first.surfaces.roles["eos"]
    language = Language([["Debian", "Debs", "Den", "gamma", "gammy", "gap"], [".", ", "]])
    best, theirs = (
        Ideal(language, lambda text, one=one: one.cut(text.encode()), one.surfaces.roles["eos"])
        for one in (first, second)
    )

    def known(ids):
        out = torch.full((first.size,), -20.0)
        for number, probability in best(ids).items():
            out[number] = math.log(probability)
        return out

    entropy = -sum(weight * math.log2(weight) for weight in language.texts.values())
    lost = bits(language, lambda text: first.cut(text.encode()), end, mapped(mapping, theirs, known)) - entropy
    assert -1e-3 < lost < 1.0, lost  # where each token was cut as it is alone: 5.3


def test_bytes_that_end_inside_of_a_letter_are_cut_as_with_the_letter():
    """A space and half a letter are one word, as a space and the letter are; half an emoji is no letter."""
    words = " \u72ac \u0416\u0443\u043a \U0001f600 a\u72ac"
    tokens = ByteTokenizer(gpt(FIRST + words * 40, 400))
    crossed = set()
    for text in (
        " \u72ac",
        "cat \u72ac",
        " \u0416\u0443",
        "\u0416 \u0416",
        " \U0001f600",
        "a\U0001f600",
        "a\u72ac \u72ac",
    ):
        data = text.encode()
        whole = tokens.cut(data)
        ends = list(itertools.accumulate(len(tokens.bytes_of([number])) for number in whole))
        for size in range(1, len(data)):
            with contextlib.suppress(UnicodeDecodeError):
                data[:size].decode()
                continue
            found = tokens.cut(data[:size])
            inside = [number for number, end in zip(whole, ends) if end <= size]
            assert list(found[: len(inside)]) == inside and tokens.bytes_of(found) == data[:size], (text, size)
            crossed |= {tokens.bytes_of([number]) for number in inside}
    assert any(one[:1] == b" " and len(one) > 1 for one in crossed), "no word with a space and half a letter was there"


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("kind", PAIRS)
def test_cached_equals_uncached_and_rows_sum_to_one(hybrids, kind):
    model = hybrids(kind)
    for name, text in TEXTS.items():
        ids = ids_of(kind, text).input_ids
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits.log_softmax(-1)
            assert whole.isfinite().all()
            for sizes in ([1] * ids.shape[1], [ids.shape[1] // 2, 1, ids.shape[1] - ids.shape[1] // 2 - 1]):
                cache = model.make_cache()
                parts = [model(part, cache=cache).logits for part in ids.split(sizes, 1)]
                torch.testing.assert_close(torch.cat(parts, 1).log_softmax(-1), whole, atol=1e-4, rtol=1e-4, msg=name)
            home = model.config.tokenizer_component
            own = model.segments.logits(home, torch.zeros(1, 1, getattr(model.config, home).hidden_size))
            assert own.shape[-1] == model.config.vocab_size
            model.set_mixture_weights(model.config.aligned[0])
            alone = model(ids, use_cache=False).logits
            model.set_mixture_weights(None)
        torch.testing.assert_close(alone.exp().sum(-1), torch.ones(ids.shape), atol=1e-4, rtol=1e-4)


def test_nothing_looks_ahead(hybrids):
    for kind in ("attention", "recurrent"):
        model = hybrids(kind)
        ids = ids_of(kind, TEXTS["code"] + TEXTS["emojis"]).input_ids
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            for length in range(1, ids.shape[1], 7):
                other = torch.cat([ids[:, :length], ids[:, length:].flip(1)], 1)
                changed = model(other, use_cache=False).logits[:, :length]
                # Rows of another length are summed in another order; the mapping itself takes nothing from the future
                torch.testing.assert_close(changed, whole[:, :length], atol=1e-4, rtol=1e-4)
        reader = aligner_of(model).mapping(model, model.config.aligned[0])
        one, _ = grow(reader, Row(), ids[0].tolist())
        for length in range(1, ids.shape[1]):
            two, _ = grow(reader, Row(), [*ids[0, :length].tolist(), *ids[0, length:].flip(0).tolist()])
            assert [paths(one, i) for i in range(length)] == [paths(two, i) for i in range(length)]


def paths(tree, number):
    """What a position is made of, in words that do not depend on the numbers of nodes."""

    def tokens(node):
        return () if node <= 0 else (*tokens(tree.parents[node]), tree.tokens[node])

    position = tree.positions[number]
    covers = [(tokens(node), [(tokens(n), t) for n, t in edges], cover) for node, edges, cover in position.covers]
    return tokens(position.node), covers, position.last


def test_padding_and_rows_change_nothing(hybrids):
    for kind in PAIRS:
        model, tokens = hybrids(kind), tokenizer(PAIRS[kind][0][1])
        texts = [TEXTS["code"], TEXTS["prose"], "a"]
        rows = [tokens(text, add_special_tokens=False).input_ids for text in texts]
        size, pad = max(map(len, rows)), tokens.pad_token_id or 0
        with torch.no_grad():
            alone = [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]
            for left in (True, False):
                fill = [[pad] * (size - len(row)) for row in rows]
                ids = torch.tensor([gap + row if left else row + gap for gap, row in zip(fill, rows)])
                mask = torch.tensor(
                    [[0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g) for g, r in zip(fill, rows)]
                )
                out = model(ids, attention_mask=mask, use_cache=False).logits
                for row, (one, shown) in enumerate(zip(alone, mask.bool())):
                    torch.testing.assert_close(out[row][shown], one, atol=1e-4, rtol=1e-4)


def test_generation_is_the_same_with_and_without_a_cache(hybrids):
    for kind in PAIRS:
        model, tokens = hybrids(kind), tokenizer(PAIRS[kind][0][1])
        given = (
            tokens(
                ["the cat", "two dogs ran and"],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            )
            if tokens.pad_token
            else ids_of(kind, "two dogs")
        )
        given.pop("token_type_ids", None)
        for settings in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
            settings = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, **settings}
            out = []
            for use_cache in (True, False):
                torch.manual_seed(0)
                out.append(model.generate(**given, use_cache=use_cache, **settings))
            assert out[0].tolist() == out[1].tolist(), (kind, settings)


def test_gradients_reach_every_component(hybrids):
    for kind in PAIRS:
        model = hybrids(kind)
        ids = ids_of(kind, TEXTS["code"]).input_ids
        model.train()
        model(ids, labels=ids).loss.backward()
        model.eval()
        for name in model.config.component_names:
            grads = [p.grad for p in model.component(name).parameters() if p.grad is not None]
            assert grads and sum(float(g.abs().sum()) for g in grads) > 0, (kind, name)
            assert all(g.isfinite().all() for g in grads)
        if kind == "attention":  # against the slope that is measured
            name = model.config.aligned[0]
            weight = model.component(name).get_output_embeddings().weight
            with torch.no_grad():
                step = weight.grad / weight.grad.norm() * 1e-2
                losses = []
                for sign in (1, -1):
                    weight.add_(sign * step)
                    losses.append(model(ids, labels=ids).loss.item())
                    weight.sub_(sign * step)
            torch.testing.assert_close((losses[0] - losses[1]) / 2e-2, weight.grad.norm().item(), rtol=0.05, atol=1e-3)
        model.zero_grad()


def test_special_tokens_broken_letters_and_nothing(hybrids):
    model, tokens = hybrids("attention"), tokenizer("gpt")
    end, half = tokens.eos_token_id, tokens("😀", add_special_tokens=False).input_ids[1:]
    for row in ([end], [end, *half], [*half, end, *half], [end, end], tokens("a<|end|>b").input_ids, [half[0]]):
        with torch.no_grad():
            out = model(torch.tensor([row]), use_cache=False).logits
        assert out.isfinite().all() and out.shape[:2] == (1, len(row))
    # A text after an end token is a text of its own
    text = tokens("the cat sat", add_special_tokens=False).input_ids
    mapping = aligner_of(model).mapping(model, model.config.aligned[0])
    alone, _ = grow(mapping, Row(), text)
    behind, _ = grow(mapping, Row(), [*text, end, *text])
    assert [paths(alone, i)[1][0][2] for i in range(len(text))] == [
        paths(behind, len(text) + 1 + i)[1][0][2] for i in range(len(text))
    ]


def test_saved_by_reference_and_loaded_as_remote_code(hub, tmp_path):
    from aligned_pairs import model as tiny_model

    specs = []
    for family, kind in PAIRS["attention"]:
        publish(hub, f"org/{family}-{kind}", tiny_model(family, kind), tmp_path / "parts", tokenizer(kind))
        specs.append(ComponentSpec(f"org/{family}-{kind}", name=f"{family}_{kind}"))
    model = ManticoreForCausalLM.from_components(specs)
    model.save_pretrained(tmp_path / "hybrid")
    files = {file.name: file.stat().st_size for file in (tmp_path / "hybrid").iterdir() if file.is_file()}
    assert "aligned_hybrid.py" in files and files["model.safetensors"] < 10_000
    config = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    assert {value.split(".")[0] for value in config["auto_map"].values()} == {"hybrid_manticore"}
    assert all(len(entry["tokenizer"]["files"]["tokenizer.json"]) == 64 for entry in config["components"])
    again = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")
    ids = ids_of("attention", TEXTS["code"]).input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    config["components"][1]["tokenizer"]["files"]["tokenizer.json"] = "0" * 64
    (tmp_path / "hybrid" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ManticoreError, match="tokenizer.json"):
        ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")(ids)


def test_two_repositories_are_composed_without_a_question(hub, owner, tmp_path):
    """By their addresses alone, by the command, where there is no terminal that could be asked."""
    from aligned_pairs import model as tiny_model

    for family, kind in PAIRS["attention"]:
        publish(hub, f"{owner}/{family}", tiny_model(family, kind), tmp_path / "parts", tokenizer(kind))
    repos = [f"{owner}/{family}" for family, _ in PAIRS["attention"]]
    code = f"""if True:
        import builtins, sys
        assert not sys.stdin.isatty()
        def refuse(*question):
            raise SystemExit(f"asked: {{question}}")
        builtins.input = refuse
        from manticore_hf.cli import main
        sys.exit(main(["compose", *{repos!r}, "--output-dir", {str(tmp_path / "hybrid")!r}]))
        """
    done = clean_process.run(["-c", code])
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    model = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert list(model.config.aligned) == ["gpt_neox"] and model.config.tokenizer_component == "llama"
    assert [entry["repo_id"] for entry in model.config.components] == repos
    ids = tokenizer("gpt")(TEXTS["prose"], return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_what_cannot_be_aligned_says_so(hybrids, tmp_path):
    with pytest.raises(ManticoreError, match="one block"):
        hybrid(tmp_path, tokenizers="aligned", num_blocks=2)
    with pytest.raises(ManticoreError, match="different vocabularies"):
        hybrid(tmp_path, tokenizers="transplant")
    with pytest.raises(ManticoreError, match="choose 'aligned'"):
        hybrid(tmp_path, tokenizers="both")
    model = hybrids("attention")
    for wrong in (lambda: model.make_cache(32), lambda: model.resize_token_embeddings(500)):
        with pytest.raises(ManticoreError, match="tokenizers of their own"):
            wrong()
    with pytest.raises(ManticoreError, match="Give input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 24))
