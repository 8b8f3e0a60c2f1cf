"""The paper's recipes on stand-ins: tiny components and data sets, under the real addresses and with the real columns.

The columns are those of the data sets' cards; the addresses are served by the Hub on loopback.
"""

import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_models import publish
from tiny_hybrid import WORDS
from two_tokenizers import component, first, second

from manticore_hf import ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.evaluation.data import load_rows
from manticore_hf.hub.card import CardFacts, make_card
from manticore_hf.training.recipe import load_recipe, stage_data
from manticore_hf.utils.tokenizers import read_tokenizer

RECIPE_FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path.name for path in RECIPE_FOLDER.glob("paper_*.yaml"))
PARQUET = "refs/convert/parquet"
COUNT = 60


def words(count, seed):
    drawn = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn.tolist())


def parquet(records):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def fineweb():
    for i in range(12):
        yield {
            "text": words(400, i),
            "id": f"<urn:uuid:{i}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://a.example/{i}",
            "date": "2024-02-21T00:00:00Z",
            "file_path": "s3://crawl/x.warc.gz",
            "language": "en",
            "language_score": 0.9,
            "token_count": 400,
        }


def alpaca():
    for i in range(COUNT):
        asked, given, out = words(4, i), words(3, 100 + i) if i % 2 else "", words(5 + i % 7, 200 + i)
        text = f"Below is an instruction.\n\n### Instruction:\n{asked}\n\n### Response:\n{out}"
        yield {"instruction": asked, "input": given, "output": out, "text": text}


def eli5():
    for i in range(COUNT):
        texts = [words(8, i), words(5, 300 + i)][: 1 + i % 2]
        urls = [[]] * len(texts)
        answers = {"a_id": [f"a{k}" for k in range(len(texts))], "text": texts, "score": [3] * len(texts)}
        yield {
            "q_id": f"q{i}",
            "title": words(5, i),
            "selftext": "",
            "category": "Other",
            "subreddit": "explainlikeimfive",
            "answers": {**answers, "text_urls": urls},
            "title_urls": ["url"],
            "selftext_urls": ["url"],
        }


def ptb(seed):
    return [{"sentence": words(30, seed + i)} for i in range(COUNT)]


def mlqa(seed):
    for i in range(COUNT // 4):
        answer = {"answer_start": [0], "text": [words(2, seed + i)]}
        yield {"context": words(20, seed + i), "question": words(5, seed + i), "answers": answer, "id": f"{seed}-{i}"}


def openorca():
    for i in range(COUNT):
        yield {
            "id/en": f"flan.{i}",
            "system_prompt/en": "" if i % 3 else "You are an assistant.",
            "question/en": words(4, i),
            "response/en": words(4, 50 + i),
            "question/ja": f"犬{words(4, i)}",
            "response/ja": f"猫{words(6, 50 + i)}",
        }


@pytest.fixture(scope="module", autouse=True)
def stand_ins(hub, tmp_path_factory):
    """The components with a tokenizer of their own, GPT-Neo's tokenizer, which is another, and all data sets."""
    place = tmp_path_factory.mktemp("stand-ins")
    for repo, kind in (("EleutherAI/pythia-410m", "neox"), ("state-spaces/mamba-370m-hf", "mamba")):
        torch.manual_seed(0)
        publish(hub, repo, component(kind, first(), extra=20), place, first())
    second().save_pretrained(place / "neo")
    hub.add_repo("EleutherAI/gpt-neo-1.3B", place / "neo")
    one = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    hub.add_repo(
        "datasets/HuggingFaceFW/fineweb",
        {"README.md": one.encode(), "sample/10BT/000_00000.parquet": parquet(list(fineweb()))},
    )
    hub.add_repo("datasets/tatsu-lab/alpaca", {"data/train-00000-of-00001-a09b.parquet": parquet(list(alpaca()))})
    splits = {"train": parquet(list(eli5())), "validation1": parquet(list(eli5())[:5])}
    files = {f"default/{split}/0000.parquet": data for split, data in splits.items()}
    hub.add_repo("datasets/dany0407/eli5_category", files, PARQUET)
    files = {f"penn_treebank/{split}/0000.parquet": parquet(ptb(seed)) for split, seed in TREEBANK.items()}
    hub.add_repo("datasets/ptb-text-only/ptb_text_only", files, PARQUET)
    card = "".join(
        f"- config_name: mlqa.{language}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: mlqa.{language}/{split}-*\n" for split in ("test", "validation"))
        for language in ("vi.vi", "de.de")
    )
    files = {
        f"mlqa.{language}/{split}-00000-of-00001.parquet": parquet(list(mlqa(seed)))
        for language, seeds in (("vi.vi", (0, 500)), ("de.de", (700, 800)))
        for split, seed in zip(("test", "validation"), seeds)
    }
    hub.add_repo("datasets/facebook/mlqa", {"README.md": f"---\nconfigs:\n{card}---\n".encode(), **files})
    records = datasets.Dataset.from_list(list(openorca()))
    buffer = io.BytesIO()
    records.to_json(buffer, force_ascii=False)
    hub.add_repo("datasets/atsushi3110/cross-lingual-openorcha-830k-en-ja", {"830k.ja.json": buffer.getvalue()})


COMPONENTS = ("pythia_410m", "mamba_370m_hf")
TREEBANK = {"train": 1000, "validation": 2000, "test": 3000}


def expected(name):
    """The texts of the training and of the validation rows, by the calls of `datasets` that the paper's code makes."""
    if name == "paper_pythia410m_mamba370m.yaml":
        records = datasets.Dataset.from_list(list(alpaca())).train_test_split(test_size=0.1, seed=1111)
        return records["train"]["text"], records["test"]["text"]
    if name == "paper_mlqa.yaml":
        asked = 'Based on given context "{}" Answer the following question: "{}"{}'
        splits = (
            [asked.format(one["context"], one["question"], one["answers"]["text"][0]) for one in mlqa(seed)]
            for seed in (0, 500)
        )
        return tuple(splits)
    if name == "paper_openorca_ja.yaml":
        records = datasets.Dataset.from_list(list(openorca())).filter(lambda one: one["system_prompt/en"] == "")
        records = records.shuffle(seed=42).train_test_split(test_size=0.2, seed=42)
        return tuple([one["question/ja"] + one["response/ja"] for one in records[split]] for split in ("train", "test"))
    if name == "paper_ptb.yaml":
        return tuple([one["sentence"] for one in ptb(TREEBANK[split])] for split in ("train", "test"))
    return [" ".join(one["answers"]["text"]) for one in eli5()], None  # of which some rows are held out


@pytest.mark.parametrize("name", RECIPES)
def test_the_target_text_is_that_of_the_papers_code(name):
    recipe, tokenizer = load_recipe(name), second()
    stages = dict(recipe.stages)
    data = stage_data(recipe, stages["finetune"]["data"])
    assert data == stage_data(recipe, stages["search"]["data"])
    train, held_out = load_rows(data, tokenizer)
    wanted = expected(name)
    cut = [tokenizer(one, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for one in wanted[0]]
    start = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    if data.one_per_row:
        rows = [(start + ids)[: data.block_size] for ids in cut]
        assert list(train["input_ids"]) == rows and len(held_out) == len(wanted[1])
        assert [sum(label != -100 for label in labels) for labels in train["labels"]] == [
            len(ids) - len(start) for ids in rows
        ]
        return
    ids = [token for ids in cut for token in start + ids]
    rows = [ids[i : i + data.block_size] for i in range(0, len(ids) - data.block_size + 1, data.block_size)]
    if wanted[1] is not None:
        assert list(train["input_ids"])[0] == rows[0] and len(held_out) > 0
        assert held_out["input_ids"][0][:10] != train["input_ids"][0][:10]
    else:
        assert len(train) + len(held_out) == pytest.approx(len(rows), abs=1) and len(held_out) == round(len(rows) * 0.1)


def test_each_value_says_where_it_comes_from():
    for name in RECIPES:
        lines = load_recipe(name).path.read_text().splitlines()
        for line in lines[lines.index("components:") + 1 :]:
            if re.match(r"\s*(- )?[\w-]+:\s*$|\s*- (search|finetune):|\s*data: [&*]", line) or line.strip()[:1] in "#'":
                continue
            assert re.search(r"# (\[paper\]|\[code\]|\[ours\])", line), (name, line)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_runs_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", name, "--output-dir", "out"]) == 0
    composed, pretrained, searched, tuned = (
        ManticoreForCausalLM.from_pretrained(tmp_path / "out" / folder)
        for folder in ("0-compose", "1-pretrain", "2-search", "3-finetune")
    )
    home = read_tokenizer(tmp_path / "out" / "3-finetune")
    assert home.get_vocab() == second().get_vocab() != first().get_vocab()
    assert tuned.config.eos_token_id == tuned.generation_config.eos_token_id == second().eos_token_id
    alpha = searched.mixture_weights()
    assert (alpha - 0.5).abs().max() > 1e-3
    torch.testing.assert_close(tuned.mixture_weights(), alpha)
    # Bodies start from the pretrained weights, projectors from those of the first stage, and both are trained on
    for one, two in ((composed, pretrained), (pretrained, tuned), (pretrained, searched)):
        body = [model.component("mamba_370m_hf").backbone.layers[0].mixer.in_proj.weight for model in (one, two)]
        assert torch.equal(*body) == (one is composed)
        assert not torch.equal(*(next(model.hybrid_mixer.into.parameters()) for model in (one, two)))
    made = make_card(tmp_path / "out" / "3-finetune", CardFacts("me/hybrid", dict.fromkeys(COMPONENTS, "mit")))
    assert "Embeddings and heads are new (330 rows) and are stored in this repository" in str(made[0])
    mamba = tuned.component("mamba_370m_hf")
    assert mamba.lm_head.weight is mamba.backbone.embeddings.weight


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_grid_of_fixed_alphas_of_a_recipe(blocks, tmp_path):
    """Each point is the recipe with its alpha fixed, from where its finetune stage starts; it goes on where it was."""
    text = (RECIPE_FOLDER / "paper_eli5.yaml").read_text().replace("block_size: 1024", "block_size: 64")
    (tmp_path / "small.yaml").write_text(text)
    command = [
        sys.executable,
        str(RECIPE_FOLDER.parent / "benchmarks" / "fixed_alphas.py"),
        str(tmp_path / "small.yaml"),
    ]
    command += ["--output-dir", str(tmp_path / "grid"), "--blocks", str(blocks), "--step", "0.5"]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert printed[0].count("| ") > 3 and printed[1].count("this stage is finished") >= 4 + 3**blocks
    found = json.loads((tmp_path / "grid" / "alphas.json").read_text())
    assert [row["alpha"] for row in found["grid"]] == [
        list(one) for one in itertools.product((0, 0.5, 1), repeat=blocks)
    ]
    for row in found["grid"]:
        folder = tmp_path / "grid" / f"fixed-{'-'.join(f'{one:g}' for one in row['alpha'])}" / "tuned"
        model = ManticoreForCausalLM.from_pretrained(folder)
        assert model.config.num_blocks == blocks and model.mixture_weights()[:, 0].tolist() == row["alpha"]
        assert json.loads((folder / "stage.json").read_text())["losses"] == row["losses"]
    assert found["best"]["losses"]["hybrid"] == min(row["losses"]["hybrid"] for row in found["grid"])
    searched = ManticoreForCausalLM.from_pretrained(tmp_path / "grid" / "searched" / "2-search")
    assert found["searched"]["alpha"] == pytest.approx(searched.mixture_weights()[:, 0].tolist())
