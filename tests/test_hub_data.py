"""Data sets of the Hub: the real `datasets` client against the Hub on loopback."""

import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_models import tokenizer

from manticore_hf import ManticoreError
from manticore_hf.evaluation.data import DataArguments, load_rows

BLOCK = 4
EOS = 2


def texts(first, count=8):
    """Documents of three words: with the end-of-text token each is one block. Word `wN` is token N."""
    return [f"w{first + i} w{first + i} w{first + i}" for i in range(count)]


def blocks(first, count=8):
    """What `texts` becomes."""
    return [[first + i] * 3 + [EOS] for i in range(count)]


def as_jsonl(documents, column="text"):
    return "".join(json.dumps({column: text}) + "\n" for text in documents).encode()


def as_parquet(documents, column="text"):
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: documents}), buffer)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A stream that was cut off is opened again after five seconds."""
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.05)


CONFIGURATIONS = {"code": "code.jsonl", "prose": "p.jsonl"}
FORMATS = {"jsonl": as_jsonl, "parquet": as_parquet}


def load(repo, **changes):
    settings = {"block_size": BLOCK, "validation_fraction": 0.0, **changes}
    return load_rows(DataArguments(repo, **settings), tokenizer())


def read(repo, **changes):
    """Blocks of the training rows."""
    return load(repo, **changes)[0]["input_ids"]


def message(repo, **changes):
    """The error of a source that cannot be read: one line that names it."""
    with pytest.raises(ManticoreError) as caught:
        read(repo, **changes)
    text = str(caught.value)
    assert repr(repo) in text and "\n" not in text and "load_dataset" not in text
    return text


def fetched(hub, name):
    """Requests for the content of a file."""
    return [path for method, path in hub.requests if method == "GET" and "/resolve/" in path and path.endswith(name)]


def test_the_client_is_on_the_local_hub(hub):
    assert datasets.config.HF_ENDPOINT == hub.url
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_reads_every_shard_of_the_split(hub, owner, kind, streaming):
    write = FORMATS[kind]
    files = {
        f"data/train-00000-of-00002.{kind}": write(texts(10)),
        f"data/train-00001-of-00002.{kind}": write(texts(20)),
        f"data/validation-00000-of-00001.{kind}": write(texts(40)),
    }
    hub.add_repo(f"datasets/{owner}/texts", files)
    rows, held_out = load(f"{owner}/texts", streaming=streaming)
    assert held_out is None
    assert rows["input_ids"] == blocks(10) + blocks(20)
    assert rows["labels"] == [[-100, *ids[1:]] for ids in rows["input_ids"]]
    assert read(f"{owner}/texts", streaming=streaming, data_split="validation") == blocks(40)
    rows, held_out = load(f"{owner}/texts", streaming=streaming, validation_fraction=0.25)
    assert (len(rows), len(held_out)) == (12, 4)
    assert sorted([*rows["input_ids"], *held_out["input_ids"]]) == blocks(10) + blocks(20)


def test_the_clients_bars_are_not_shown_and_stay_as_they_were(hub, owner, tmp_path, capsys):
    """Of files here and of the Hub's: "Generating train split", "Filter". Others' reading shows them still."""
    hub.add_repo(f"datasets/{owner}/bars", {"train.jsonl": as_jsonl(texts(10))})
    (tmp_path / "here.jsonl").write_bytes(as_jsonl(texts(10)))
    for data in (f"{owner}/bars", str(tmp_path / "here.jsonl")):
        assert read(data, where="text=w12 w12 w12") == blocks(12, 1)
        assert "examples" not in capsys.readouterr().err and not datasets.utils.are_progress_bars_disabled()
    datasets.load_dataset("json", data_files=str(tmp_path / "here.jsonl"), cache_dir=tmp_path / "other")
    assert "Generating train split" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_for_validation(hub, owner, streaming):
    splits = {"train": 10, "validation": 20, "test": 30}
    files = {f"data/{split}.jsonl": as_jsonl(texts(first)) for split, first in splits.items()}
    hub.add_repo(f"datasets/{owner}/splits", files)
    rows, held_out = load(f"{owner}/splits", streaming=streaming, validation_split="test", validation_fraction=0.5)
    assert list(rows["input_ids"]) == blocks(10) and list(held_out["input_ids"]) == blocks(30)
    rows, held_out = load(f"{owner}/splits", streaming=streaming, validation_split="test", max_records=3)
    assert list(rows["input_ids"]) == blocks(10, 3) and list(held_out["input_ids"]) == blocks(30, 3)
    shuffled = read(f"{owner}/splits", streaming=streaming, shuffle_seed=1)
    assert shuffled != blocks(10) and sorted(shuffled) == blocks(10)
    assert read(f"{owner}/splits", streaming=streaming, where="text=w12 w12 w12") == blocks(12, 1)
    assert "nowhere" in message(f"{owner}/splits", streaming=streaming, validation_split="nowhere")


@pytest.mark.parametrize("streaming", [False, True])
def test_instructions(hub, owner, streaming):
    records = [{"prompt": "w5 w6", "completion": f"w{i}"} for i in range(10, 14)]
    hub.add_repo(f"datasets/{owner}/chats", {"train.jsonl": "\n".join(map(json.dumps, records)).encode()})
    rows, _ = load(f"{owner}/chats", streaming=streaming, prompt_column="prompt", block_size=8)
    assert rows["input_ids"] == [[5, 6, i, EOS] for i in range(10, 14)]
    assert rows["labels"] == [[-100, -100, i, EOS] for i in range(10, 14)]


@pytest.mark.parametrize("streaming", [False, True])
def test_configurations(hub, owner, streaming):
    entries = (f"- config_name: {name}\n  data_files: {file}\n" for name, file in CONFIGURATIONS.items())
    card = f"---\nconfigs:\n{''.join(entries)}---\n"
    files = {"README.md": card.encode(), "code.jsonl": as_jsonl(texts(10)), "p.jsonl": as_jsonl(texts(20), "body")}
    hub.add_repo(f"datasets/{owner}/two", files)
    assert read(f"{owner}/two", streaming=streaming, data_config="code") == blocks(10)
    prose = read(f"{owner}/two", streaming=streaming, data_config="prose", text_column="body")
    assert prose == blocks(20)
    error = message(f"{owner}/two", streaming=streaming)
    assert "data_config=None" in error and "['code', 'prose']" in error
    assert "'poems' not found" in message(f"{owner}/two", streaming=streaming, data_config="poems")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_pinned_revision_outlives_main(hub, owner, kind, streaming):
    write = FORMATS[kind]
    repo = f"{owner}/moving"
    first = hub.add_repo(f"datasets/{repo}", {f"train.{kind}": write(texts(10))})
    assert read(repo, streaming=streaming) == blocks(10)
    hub.add_repo(f"datasets/{repo}", {f"train.{kind}": write(texts(20))})
    assert read(repo, streaming=streaming) == blocks(20)  # not what the cache still holds of the first
    hub.add_repo(f"datasets/{repo}", {f"train.{kind}": write(texts(30))}, branch="draft")
    hub.clear_requests()
    assert read(repo, streaming=streaming, data_revision=first) == blocks(10)
    assert all(first in path for path in fetched(hub, kind))
    assert read(repo, streaming=streaming, data_revision="draft") == blocks(30)
    assert "'gone' doesn't exist" in message(repo, streaming=streaming, data_revision="gone")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_is_read_only_as_far_as_needed(hub, owner, kind):
    write = FORMATS[kind]
    # The tokenizer has 64 words and reads the others as padding; here blocks are only counted.
    files = {f"train-0000{i}-of-00003.{kind}": write(texts(100 * i, 100)) for i in range(3)}
    names = sorted(files)
    hub.add_repo(f"datasets/{owner}/large", files)
    hub.clear_requests()
    assert len(read(f"{owner}/large", streaming=True, max_tokens=60 * BLOCK)) == 60
    assert fetched(hub, names[0]) and not fetched(hub, names[1]) and not fetched(hub, names[2])
    hub.clear_requests()
    assert len(read(f"{owner}/large", streaming=True, max_tokens=150 * BLOCK)) == 150
    assert fetched(hub, names[0]) and fetched(hub, names[1]) and not fetched(hub, names[2])
    # A stream keeps nothing; the whole data set is fetched without streaming, whatever max_tokens says.
    hub.clear_requests()
    assert len(read(f"{owner}/large", max_tokens=60 * BLOCK)) == 60
    assert all(fetched(hub, name) for name in names)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_missing_is_named(hub, owner, streaming):
    repo = f"{owner}/texts"
    hub.add_repo(f"datasets/{repo}", {"train.jsonl": as_jsonl(texts(10)), "test.jsonl": as_jsonl(texts(20))})
    error = message(repo, streaming=streaming, data_split="dev")
    assert "data_split='dev'" in error and "['train', 'test']" in error
    with pytest.raises(ManticoreError, match=rf"'{repo}' has no column 'body'; it has \['text'\]"):
        read(repo, streaming=streaming, text_column="body")
    with pytest.raises(ManticoreError, match=rf"'{repo}' has no column 'question'; it has \['text'\]"):
        read(repo, streaming=streaming, prompt_column="question")
    assert "doesn't exist on the Hub" in message(f"{owner}/nothing", streaming=streaming)
    hub.add_repo(f"{owner}/model", {"config.json": b"{}"})
    assert "doesn't exist on the Hub" in message(f"{owner}/model", streaming=streaming)  # a model is no data set
    hub.add_repo(f"datasets/{owner}/empty", {"README.md": b"# nothing yet\n"})
    assert "doesn't contain any data files" in message(f"{owner}/empty", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_breaks_on_the_way_is_named(hub, owner, streaming):
    """A stream is opened before its later shards are looked at."""
    bad = {"train-00000-of-00002.jsonl": as_jsonl(texts(10)), "train-00001-of-00002.jsonl": b"{broken\n{broken\n"}
    hub.add_repo(f"datasets/{owner}/bad", bad)
    assert "JSON parse error" in message(f"{owner}/bad", streaming=streaming)
    good = {name: as_jsonl(texts(10)) for name in bad}
    hub.add_repo(f"datasets/{owner}/good", good)
    hub.fault(f"{owner}/good/.*train-00001", "missing", times=-1)
    assert "train-00001-of-00002.jsonl" in message(f"{owner}/good", streaming=streaming)
    if streaming:  # what comes before is there for those who need no more
        assert read(f"{owner}/good", streaming=True, max_tokens=8 * BLOCK) == blocks(10)


@pytest.mark.parametrize("kept", [False, True])
def test_a_pinned_revision_is_never_replaced_by_another(hub, owner, kept):
    """Where the Hub does not answer, the client alone would take the newest copy in its cache."""
    repo = f"{owner}/moving"
    first = hub.add_repo(f"datasets/{repo}", {"train.jsonl": as_jsonl(texts(10))})
    second = hub.add_repo(f"datasets/{repo}", {"train.jsonl": as_jsonl(texts(20))})
    read(repo, data_revision=first)
    hub.fault(f"datasets/{repo}", "missing", times=-1, code="RepoNotFound")
    if kept:
        assert read(repo, data_revision=first) == blocks(10)
        assert read(repo) == blocks(10)  # not pinned: what there is
    else:
        assert f"cache is of {first}" in message(repo, data_revision=second)
        assert f"cache is of {first}" in message(repo, data_revision="main")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_private_data_set_opens_to_its_owners_token(hub, owner, streaming, monkeypatch):
    repo = f"{owner}/secret"
    hub.add_repo(f"datasets/{repo}", {"train.parquet": as_parquet(texts(10))}, private=True)
    with monkeypatch.context() as other:
        other.setenv("HF_TOKEN", "another")
        assert "doesn't exist on the Hub or cannot be accessed" in message(repo, streaming=streaming)
    assert read(repo, streaming=streaming) == blocks(10)


@pytest.mark.parametrize("streaming", [False, True])
def test_reads_what_the_client_pushed(hub, owner, streaming):
    datasets.Dataset.from_dict({"text": texts(10)}).push_to_hub(f"{owner}/pushed")
    datasets.Dataset.from_dict({"text": texts(20)}).push_to_hub(f"{owner}/pushed", "other", split="test")
    assert "README.md" in hub.files(f"datasets/{owner}/pushed")
    assert read(f"{owner}/pushed", streaming=streaming, data_config="default") == blocks(10)
    assert read(f"{owner}/pushed", streaming=streaming, data_config="other", data_split="test") == blocks(20)
