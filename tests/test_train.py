"""The stage commands, as a user runs them; killed at any moment they end where an uninterrupted run does."""

import dataclasses
import json
import os
import signal
import time

import clean_process
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_hybrid import WORDS, pair, save, write_text

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.evaluation.data import DataArguments, load_rows, read_records
from manticore_hf.evaluation.records import text_of
from manticore_hf.training.trained_stages import last_whole_checkpoint, take_mixture


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny hybrid with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("start")
    # Dropout, because going on from a checkpoint must also go on in the random numbers.
    hybrid = ManticoreForCausalLM.from_components(pair(hidden_dropout=0.1), num_blocks=2, mixture="static")
    save(hybrid, folder / "hybrid")
    write_text(folder / "text.txt", 2000)
    return folder


def _arguments(stage, start, output, *more):
    return [
        stage,
        "--model",
        str(start / "hybrid"),
        "--data",
        str(start / "text.txt"),
        "--block_size",
        "16",
        "--output_dir",
        str(output),
        "--max_steps",
        "6",
        "--per_device_train_batch_size",
        "4",
        "--learning_rate",
        "1e-2",
        "--save_steps",
        "2",
        "--logging_steps",
        "1",
        "--seed",
        "3",
        "--use_cpu",
        "true",
        *more,
    ]


def _command(*given):
    return ["-m", "manticore_hf.cli", *_arguments(*given)]


def _run(command):
    done = clean_process.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def _same(one, two):
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=0, msg=key)
    first, second = (json.loads((folder / "stage.json").read_text())["losses"] for folder in (one, two))
    assert first == pytest.approx(second, abs=1e-6)


def _kill_when(command, condition):
    """Starts the command and kills -9 it as soon as the condition holds; returns whether it was still running."""
    process = clean_process.start(command)
    deadline = time.time() + 200
    while process.poll() is None and time.time() < deadline:
        if condition():
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    process.kill()
    return False


@pytest.mark.slow
def test_killed_while_training_and_while_saving(start, tmp_path):
    _run(_command("finetune", start, tmp_path / "whole"))
    output = tmp_path / "killed"
    command = _command("finetune", start, output)
    # During the saving of checkpoint 2: its folder is there, its last file is not.
    early = output / "checkpoint-2"
    assert _kill_when(command, lambda: early.is_dir() and not (early / "trainer_state.json").exists())
    # During training: checkpoint 4 is whole, the stage is not finished.
    assert _kill_when(command, lambda: (output / "checkpoint-4" / "trainer_state.json").exists())
    assert not (output / "stage.json").exists()
    done = _run(command)
    assert "resuming from" in done.stdout
    _same(tmp_path / "whole", output)
    assert "this stage is finished" in _run(command).stdout
    for name in ("mixture weights", "ensemble", "hybrid", "gpt_neox", "mamba"):
        assert name in done.stdout
    model = ManticoreForCausalLM.from_pretrained(output)
    assert model.config.mixture_weights == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["darts", "darts_bilevel", "gaea", "dash"])
def test_a_killed_search_goes_on(start, tmp_path, strategy):
    more = ("--strategy", strategy, "--alpha_learning_rate", "0.1")
    _run(_command("search", start, tmp_path / "whole", *more))
    output = tmp_path / "killed"
    command = _command("search", start, output, *more)
    assert _kill_when(command, lambda: (output / "checkpoint-4" / "trainer_state.json").exists())
    _run(command)
    _same(tmp_path / "whole", output)


def test_search_then_finetune_from_rewound_components(start, tmp_path):
    _run(_command("search", start, tmp_path / "searched", "--strategy", "gaea", "--alpha_learning_rate", "0.5"))
    assert (tmp_path / "searched" / "plots" / "alpha.png").stat().st_size > 5000
    assert (tmp_path / "searched" / "plots" / "mixture.png").stat().st_size > 3000
    searched = ManticoreForCausalLM.from_pretrained(tmp_path / "searched")
    assert (searched.mixture_weights() - 0.5).abs().max() > 1e-3
    _run(_command("finetune", start, tmp_path / "tuned", "--mixture_from", str(tmp_path / "searched")))
    tuned = ManticoreForCausalLM.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(tuned.mixture_weights(), searched.mixture_weights())
    log = json.loads((tmp_path / "tuned" / "trainer_state.json").read_text())["log_history"]
    assert {"loss", "alpha/0/mamba", "alpha/1/gpt_neox", "loss/mixture"} <= set(log[0])


def test_a_search_too_short_to_log_anything(start, tmp_path):
    assert main(_arguments("search", start, tmp_path / "out", "--logging_steps", "1000")) == 0
    assert (tmp_path / "out" / "plots" / "mixture.png").is_file()
    assert not (tmp_path / "out" / "plots" / "alpha.png").exists()
    ManticoreForCausalLM.from_pretrained(tmp_path / "out")


def test_pretrain_moves_the_mixer_only(start, tmp_path):
    assert main(_arguments("pretrain", start, tmp_path / "out")) == 0
    before, after = (load_file(d / "model.safetensors") for d in (start / "hybrid", tmp_path / "out"))
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("hybrid_mixer.") for key in changed)


def test_user_errors_are_one_sentence(start, tmp_path, capsys):
    arguments = _arguments("finetune", start, tmp_path / "x", "--mixture_from", str(start / "hybrid"))
    arguments[arguments.index("--data") + 1] = str(start / "hybrid" / "model.safetensors")
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.strip().splitlines()[-1].startswith("manticore-hf finetune: ")
    assert "Traceback" not in printed and "no files of one known format" in printed
    assert not (tmp_path / "x" / "stage.json").exists()


def test_last_whole_checkpoint(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-14").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_take_mixture_refuses_another_shape(start, tmp_path):
    model = ManticoreForCausalLM.from_pretrained(start / "hybrid")
    one = ManticoreForCausalLM.from_components([model.component("mamba")])
    with pytest.raises(ManticoreError, match="do not fit"):
        take_mixture(one, str(start / "hybrid"))


@pytest.fixture(scope="module")
def tokenizer(start):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(start / "hybrid")


def test_every_format_gives_the_same_rows(tmp_path, tokenizer):
    import pandas

    texts = [" ".join(WORDS[i:]) for i in range(8)] * 4
    frame = pandas.DataFrame({"text": texts})
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    rows = [
        load_rows(DataArguments(data=str(tmp_path / f"a.{kind}"), block_size=8), tokenizer)
        for kind in ("jsonl", "csv", "parquet")
    ]
    for train, validation in rows[1:]:
        assert train["input_ids"] == rows[0][0]["input_ids"] and validation["input_ids"] == rows[0][1]["input_ids"]
    total = sum(len(text.split()) + 1 for text in texts) // 8
    assert len(rows[0][0]) + len(rows[0][1]) == total


def test_instruction_rows_have_no_loss_on_the_prompt(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "the cat sat", "completion": "on a mat"}) for _ in range(4))
    )
    arguments = DataArguments(data=str(tmp_path / "a.jsonl"), block_size=16, prompt_column="prompt")
    train, _ = load_rows(arguments, tokenizer)
    row = train[0]
    assert row["labels"][:3] == [-100] * 3 and row["labels"][3:] == row["input_ids"][3:]
    assert row["input_ids"][-1] == tokenizer.eos_token_id and len(row["attention_mask"]) == 7


@pytest.mark.parametrize(
    "content,arguments,message",
    [
        ("the cat", {"block_size": 512}, "2 tokens|3 tokens"),
        ("the cat sat on a mat", {"block_size": 4}, "too short to hold out"),
        ('{"body": "the cat"}', {"name": "a.jsonl"}, "no column 'text'; it has \\['body'\\]"),
        ('{"text": 3}', {"name": "a.jsonl"}, "holds int, not text"),
        ("the cat", {"name": "a.docx"}, "no files of one known format"),
    ],
)
def test_bad_data_is_refused_by_name(tmp_path, tokenizer, content, arguments, message):
    file = tmp_path / arguments.pop("name", "a.txt")
    file.write_text(content)
    with pytest.raises(ManticoreError, match=message):
        load_rows(DataArguments(data=str(file), **arguments), tokenizer)


def test_records_in_another_encoding(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(ManticoreError, match="a.jsonl' cannot be read"):
        list(read_records(DataArguments(str(file))))
    assert list(read_records(DataArguments(str(file), encoding="latin-1"))) == [{"text": "caf\u00e9"}]


def test_a_search_starts_from_equal_alpha_unless_told_to_keep_it(start, tmp_path):
    model = ManticoreForCausalLM.from_pretrained(start / "hybrid")
    with torch.no_grad():
        model.hybrid_mixer.alpha_logits.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    save(model, tmp_path / "hybrid")
    (tmp_path / "text.txt").write_text((start / "text.txt").read_text())
    given = _arguments("search", tmp_path, tmp_path / "out", "--max_steps", "1", "--alpha-learning-rate", "1e-9")
    for option, alpha in (([], 0.5), (["--keep-alpha"], torch.tensor(2.0).sigmoid().item())):
        out = tmp_path / f"out{len(option)}"
        assert main([*given, *option, "--output_dir", str(out)]) == 0
        weights = ManticoreForCausalLM.from_pretrained(out).mixture_weights()
        assert weights.flatten().tolist() == pytest.approx([alpha, 1 - alpha, 1 - alpha, alpha], abs=1e-5)


def test_columns_inside_of_columns(tmp_path, tokenizer):
    """ELI5's answers: several texts to a record."""
    records = [{"answers": {"text": ["the cat", "sat on"], "score": [1, 2]}}] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    given = {"data": str(tmp_path / "a.jsonl"), "block_size": 5, "validation_fraction": 0}
    rows, _ = load_rows(DataArguments(**given, text_column="answers.text"), tokenizer)
    ids = tokenizer("the cat sat on")["input_ids"]
    assert rows["input_ids"] == [[*ids, tokenizer.eos_token_id]] * 3
    for name, message in (("answers.body", "no column 'answers.body'"), ("answers", "holds dict, not text")):
        with pytest.raises(ManticoreError, match=message):
            load_rows(DataArguments(**given, text_column=name), tokenizer)


def test_texts_of_several_columns_and_chosen_records(tmp_path, tokenizer):
    records = [{"ask": {"x": f"cat {i % 3}"}, "say": f"sat {i}", "kind": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))

    def texts(**given):
        arguments = DataArguments(str(tmp_path / "a.jsonl"), **{"text_column": "{ask.x}: {say}", **given})
        return [text_of(one, arguments.text_column, arguments) for one in read_records(arguments)]

    plain = [f"cat {i % 3}: sat {i}" for i in range(12)]
    assert texts() == plain and texts(where="kind=b") == plain[1::2] and texts(max_records=5) == plain[:5]
    drawn = texts(shuffle_seed=42, where="kind=a", max_records=4)
    order = Dataset.from_dict({"i": range(0, 12, 2)}).shuffle(seed=42)["i"][:4]
    assert drawn == [plain[i] for i in order] != plain[:8:2]
    assert texts(space_characters=True)[0] == "c a t   0: s a t   0"
    with pytest.raises(ManticoreError, match="no column 'nothing'"):
        texts(text_column="{say} {nothing}")
    with pytest.raises(ManticoreError, match="no column 'x'"):
        texts(where="x=1")
    for given, message in (
        ({"where": "kind"}, "where='kind' must be column=text"),
        ({"max_records": 0}, "max_records=0 must be"),
        ({"one_per_row": True, "prompt_column": "ask"}, "one_per_row"),
    ):
        with pytest.raises(ManticoreError, match=message):
            texts(**given)
    (tmp_path / "a.txt").write_text("the cat")
    with pytest.raises(ManticoreError, match="max_records is about records"):
        read_records(DataArguments(str(tmp_path / "a.txt"), max_records=3))
    with pytest.raises(ManticoreError, match="validation_split='test'.*no data set of the Hub"):
        load_rows(DataArguments(str(tmp_path / "a.txt"), validation_split="test"), tokenizer)


def test_one_text_to_a_row(start, tmp_path, tokenizer):
    """Each begins at the row's beginning, is cut at its end, and has a loss on all of it; shorter ones are padded."""
    texts = ["the cat sat", "a mat and two dogs run on a mat", "the", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = DataArguments(str(tmp_path / "a.jsonl"), one_per_row=True, block_size=6, validation_fraction=0.0)
    rows, _ = load_rows(data, tokenizer, keep_text=True)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:6] for text in texts[:3]]
    assert list(rows["input_ids"]) == list(rows["labels"]) == ids and set(rows["prompt"]) == {""}
    assert [one[0] for one in rows["texts"]] == ["the cat sat", "a mat and two dogs run", "the"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts * 12))
    given = _arguments("finetune", start, tmp_path / "out", "--max-steps", "1", "--learning-rate", "0")
    given[given.index("--data") + 1] = data.data
    assert main([*given, "--one-per-row", "--validation-fraction", "0.3", "--block-size", "6"]) == 0
    result = json.loads((tmp_path / "out" / "stage.json").read_text())
    _, held_out = load_rows(dataclasses.replace(data, validation_fraction=0.3), tokenizer)
    model, nats, count, end = ManticoreForCausalLM.from_pretrained(tmp_path / "out"), 0.0, 0, tokenizer.eos_token_id
    for row in held_out["input_ids"]:  # each text behind a start, and without its end
        read = torch.tensor([[end, *(row[:-1] if row[-1] == end else row)]])
        nats, count = nats + model(read, labels=read).loss.item() * (read.shape[1] - 1), count + read.shape[1] - 1
    assert result["losses"]["hybrid"] == pytest.approx(nats / count, rel=1e-4)


def test_an_unknown_source_is_refused(tokenizer):
    with pytest.raises(ManticoreError, match="data='nobody/nothing' is no file or folder here"):
        load_rows(DataArguments(data="nobody/nothing"), tokenizer)
