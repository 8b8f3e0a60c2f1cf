"""Original components, through their own tokenizers, beside the hybrid: by hand, in `evaluate` and in `compare`."""

import json
import math

import pytest
import torch
from tiny_hybrid import QUIET_RECIPE
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from two_tokenizers import FIRST, SECOND, component, first, second

from manticore_hf import ManticoreForCausalLM, compose_transplanted
from manticore_hf.cli import main
from manticore_hf.compare import CompareArguments
from manticore_hf.compare.compare import Comparison
from manticore_hf.evaluation.data import DataArguments, load_rows, rows_for
from manticore_hf.evaluation.losses import Measured, make_passages, measure, own_nats

TEXT = (FIRST + "caf\u00e9 \U0001f600 <s> " + SECOND) * 20


def starting(tokenizer):
    """The second tokenizer as Llama's and Gemma's are: it begins every text with <s>."""
    start = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=start)
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two components with their tokenizers, a text, and the hybrid that reads the first's."""
    folder, parts = tmp_path_factory.mktemp("place"), {}
    for name, kind, tokenizer in (("a", "neox", first()), ("b", "mamba", starting(second()))):
        torch.manual_seed(len(parts))
        parts[name] = component(kind, tokenizer)
        parts[name].save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model, tokenizer, _ = compose_transplanted([folder / "a", folder / "b"], progress=False)
    model.save_pretrained(folder / "hybrid")
    tokenizer.save_pretrained(folder / "hybrid")
    (folder / "text.txt").write_text(TEXT)
    return folder, parts


@torch.no_grad()
def naive_nats(model, ids, first):
    """-log p of the ids from `first` on, one after the other."""
    return -sum(
        model(torch.tensor([ids[:i]])).logits[0, -1, :].log_softmax(-1)[ids[i]].item() for i in range(first, len(ids))
    )


def rows_of(folder, block_size=24, **settings):
    data = DataArguments(str(folder / "text.txt"), block_size=block_size, validation_fraction=0, **settings)
    return load_rows(data, AutoTokenizer.from_pretrained(folder / "hybrid"), keep_text=True, keep_rest=True)[0]


def test_passages_are_scored_as_by_hand(place):
    folder, parts = place
    hybrid, tokenizer = ManticoreForCausalLM.from_pretrained(folder / "hybrid"), first()
    rows = rows_of(folder)
    passages = make_passages(rows.select(range(6)), tokenizer)
    assert TEXT.startswith("".join(passages.texts)) and len(passages) == 6
    assert passages.bytes.tolist() == [len(text.encode()) for text in passages.texts]
    found = measure(hybrid, passages, batch_size=4)
    for i, text in enumerate(passages.texts):
        own = second()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        by_hand = naive_nats(parts["b"], [second().bos_token_id, *own], 1)
        assert own_nats(parts["b"], starting(second()), passages, progress=False)[i] == pytest.approx(by_hand, rel=1e-4)
        ids = rows[i]["input_ids"]  # a tokenizer that begins texts with nothing: scored after its end-of-text token
        assert found.nats["hybrid"][i] == pytest.approx(naive_nats(hybrid, [0, *ids], 1), rel=1e-4)
        assert found.nats["a"][i] == pytest.approx(naive_nats(parts["a"], [0, *ids], 1), rel=1e-4)
    size = len("".join(passages.texts).encode())
    assert found.bits_per_byte["a"] == pytest.approx(found.nats["a"].sum() / math.log(2) / size)
    assert found.losses["a"] == pytest.approx(found.nats["a"].sum() / passages.tokens.sum())
    # No interval on so few passages; with more it is there, and is around the difference
    assert found.differences()["a"][1:] == [None, None]
    whole = measure(hybrid, make_passages(rows, tokenizer), batch_size=32)
    gain, low, high = whole.differences()["a"]
    assert low < gain < high and gain == pytest.approx(whole.bits_per_byte["a"] - whole.bits_per_byte["hybrid"])


def test_answers_are_scored_after_their_prompts(place, tmp_path):
    folder, parts = place
    records = [{"prompt": "The cat ", "completion": "sat on the mat"}, {"prompt": "dogs", "completion": " run" * 30}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    data = DataArguments(str(tmp_path / "chat.jsonl"), prompt_column="prompt", block_size=16, validation_fraction=0)
    rows, _ = load_rows(data, first(), keep_text=True)
    passages = make_passages(rows, first())
    assert passages.prompts == ["The cat ", "dogs"] and passages.texts[0] == "sat on the mat"
    assert (" run" * 30).startswith(passages.texts[1]) and len(passages.texts[1]) < 120
    for i, (prompt, text) in enumerate(zip(passages.prompts, passages.texts)):
        before, own = (second()(one, add_special_tokens=False)["input_ids"] for one in (prompt, text))
        by_hand = naive_nats(parts["b"], [second().bos_token_id, *before, *own], 1 + len(before))
        assert own_nats(parts["b"], starting(second()), passages, progress=False)[i] == pytest.approx(by_hand, rel=1e-4)
    other = rows_for(rows, first(), starting(second()), data)
    assert [row["input_ids"][0] for row in other] == [second().bos_token_id] * 2


def test_evaluate_prints_the_originals(place, tmp_path, capsys):
    folder, parts = place
    words = ["evaluate", "--model", folder / "hybrid", "--data", folder / "text.txt", "--block-size", "64"]
    words = [str(word) for word in (*words, "--output-dir", tmp_path)]
    assert main([*words, "--components", str(folder / "a"), str(folder / "b")]) == 0
    said, result = capsys.readouterr().out, json.loads((tmp_path / "evaluation.json").read_text())
    bits = result["bits_per_byte"]
    assert list(bits) == ["a", "b", "ensemble", "online mixture", "hybrid", "original a", "original b"]
    assert bits["original a"] == pytest.approx(bits["a"], rel=1e-5)  # the tokenizer is its own
    assert bits["original b"] != pytest.approx(bits["b"], rel=1e-2)  # transplanted
    passages = make_passages(rows_of(folder, 64), first())
    assert result["bytes"] == len(TEXT.encode()) and result["rows"] == len(passages)  # the last row is a shorter one
    assert passages.tokens[-1] < 64 and result["note"].startswith("All of it, in rows of at most 64 tokens. ")
    own = own_nats(parts["b"], starting(second()), passages, progress=False)
    assert bits["original b"] == pytest.approx(own.sum() / math.log(2) / passages.bytes.sum())
    assert f"{bits['original b']:.4f}" in said and "bits per byte" in said and result["missing"] == {}
    # The hybrid knows no address of components from directories, and says so
    assert main(words) == 0
    said, result = capsys.readouterr().out, json.loads((tmp_path / "evaluation.json").read_text())
    assert "original b: not measured. Component 'b' came from a directory" in said and "--components" in said
    assert list(result["missing"]) == ["original a", "original b"]
    assert main([*words, "--components", str(folder / "a")]) == 2
    # Of a part of a text, and of a text shorter than a row
    assert main([*words, "--max-tokens", "128"]) == 0
    assert "At most 128 tokens of it, in rows" in (tmp_path / "evaluation.json").read_text()
    (tmp_path / "short.txt").write_text(FIRST[:40])
    words[words.index("--data") + 1] = str(tmp_path / "short.txt")
    assert main(words) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert (result["bytes"], result["rows"]) == (40, 1)


def test_with_new_embeddings_the_baselines_are_untouched(place, tmp_path):
    """Inside such a hybrid components have embeddings that are not theirs: no baselines."""
    folder, parts = place
    same = tmp_path / "c"
    component("mamba", first()).save_pretrained(same)
    first().save_pretrained(same)
    model = ManticoreForCausalLM.from_components([folder / "a", same], embeddings="fresh", num_blocks=2)
    model.save_pretrained(tmp_path / "fresh")
    first().save_pretrained(tmp_path / "fresh")
    words = ["--model", tmp_path / "fresh", "--data", folder / "text.txt", "--block-size", 64, "--output-dir", tmp_path]
    assert main(["evaluate", *map(str, words), "--components", str(folder / "a"), str(same)]) == 0
    bits = json.loads((tmp_path / "evaluation.json").read_text())["bits_per_byte"]
    together = ["ensemble of the originals", "online mixture of the originals"]
    assert list(bits) == ["hybrid", "original a", "original c", *together]
    plain = ManticoreForCausalLM.from_components([folder / "a", same], num_blocks=1, mixture="static")
    found = measure(plain, make_passages(rows_of(folder, 64), first()))
    assert bits["ensemble of the originals"] == pytest.approx(found.bits_per_byte["ensemble"], rel=1e-5)
    assert bits[together[1]] == pytest.approx(found.bits_per_byte["online mixture"], rel=1e-5)
    assert bits["original a"] == pytest.approx(found.bits_per_byte["a"], rel=1e-5)


def test_compare_takes_models_of_any_tokenizer(place, tmp_path):
    folder, parts = place
    training = {**QUIET_RECIPE, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    recipe = {
        "components": [str(folder / "a"), str(folder / "b")],
        "hybrid": {"num_blocks": 1, "dtype": "float32", "transplant": "mean"},
        "data": {"data": str(folder / "text.txt"), "block_size": 32},
        "stages": [{"finetune": training}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (FIRST, SECOND, FIRST + SECOND))
    )
    arguments = CompareArguments(
        test=str(tmp_path / "test.jsonl"), seeds=(0,), singles=(str(folder / "b"),), allow_outside=True
    )
    one = Comparison(tmp_path / "recipe.yaml", arguments, tmp_path / "out")
    known = {contender.name: contender for contender in one._contenders()}
    names = ["original b", "b with its own tokenizer, tuned"]
    assert set(names) < set(known) and "b (single), tuned" not in known and "original a" not in known
    one.by_name = known
    with tqdm(disable=True) as one.bar:
        for name in (*names, "b, tuned 2 times as long", "a, untuned"):
            one.chosen[name] = one._choose(known[name])
    rows = {name: one._tested(known[name]) for name in one.chosen}
    assert one.chosen["b, tuned 2 times as long"][0]["training_tokens"] == 6 * 4 * 32  # also of max_steps
    # The test text by hand: every piece behind the start, through the model's own tokenizer
    tokenizer, total = starting(second()), 0.0
    assert "".join(one.documents.texts) == FIRST + SECOND + FIRST + SECOND
    for text in one.documents.texts:
        ids = tokenizer(text)["input_ids"]
        total += naive_nats(parts["b"], ids, 1)
    assert rows["original b"]["nll"].sum() == pytest.approx(total, rel=1e-4)
    assert rows["original b"]["correct"] is None and rows["a, untuned"]["correct"] is not None
    assert rows[names[1]]["nll"].sum() < rows["original b"]["nll"].sum()
    assert (one.chosen[names[1]][0]["folder"] / "model" / "tokenizer.json").read_bytes() == (
        folder / "b" / "tokenizer.json"
    ).read_bytes()
    # Its rows are the training text of the hybrid's rows, and nothing of the validation text
    mine = one.shop.rows_of(tokenizer)
    assert all(row["input_ids"][0] == tokenizer.bos_token_id for row in mine)
    seen = "".join(tokenizer.decode([i for i in row if i > 3]) for row in mine["input_ids"])
    kept = "".join(text for row in one.shop.train_texts["texts"] for text in row)
    assert kept.startswith(seen[:50])


def test_a_measurement_of_nothing_missing_says_so():
    found = Measured({"hybrid": torch.ones(9).numpy(), "x": 2 * torch.ones(9).numpy()}, *[torch.ones(9).numpy()] * 2)
    values = found.to_dict()
    assert values["differences"]["x"] == pytest.approx([1 / math.log(2)] * 3) and values["missing"] == {}
