"""The local Hub read by the real huggingface_hub client, its faults, and the server itself."""

import hashlib
import http.client
import os
import subprocess
import sys
from pathlib import Path

import clean_process
import httpx2
import local_hub_client
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from local_hub_client import FILES, ROOT, read_folder, run_python, write_folder

from manticore_hf.testing.local_hub import TOKEN

# Each test has a Hub of its own
hub, api, repo = local_hub_client.hub, local_hub_client.api, local_hub_client.repo

# --- reading


def test_model_info(hub, api, repo):
    info = api.model_info(repo)
    assert (info.id, info.author, info.sha, info.private) == (repo, "ada", hub.head(repo), False)
    assert [(file.rfilename, file.size) for file in info.siblings] == [(path, None) for path in sorted(FILES)]
    assert info.pipeline_tag == "text-generation"
    files = {file.rfilename: file for file in api.model_info(repo, files_metadata=True).siblings}
    assert {path: file.size for path, file in files.items()} == {path: len(data) for path, data in FILES.items()}
    weights, config = files["model.safetensors"], files["config.json"]
    assert weights.lfs.sha256 == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert config.lfs is None and config.blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"


def test_tree(hub, api, repo):
    def listing(*args, **options):
        return [(type(item).__name__, item.path) for item in api.list_repo_tree(repo, *args, **options)]

    top = [("RepoFolder", "sub"), *(("RepoFile", p) for p in ("README.md", "config.json", "model.safetensors"))]
    assert listing() == top
    assert listing("sub") == [("RepoFolder", "sub/deep"), ("RepoFile", "sub/vocab.txt")]
    assert listing("sub/deep", recursive=True) == [("RepoFile", "sub/deep/notes.txt")]
    assert len(listing(recursive=True)) == len(FILES) + 2
    assert sorted(api.list_repo_files(repo)) == sorted(FILES)
    with pytest.raises(RemoteEntryNotFoundError):
        listing("nowhere")


def test_tree_expanded_names_the_last_commit_of_each_path(hub, api, repo):
    first = hub.head(repo)
    second = api.upload_file(path_or_fileobj=b"new", path_in_repo="sub/vocab.txt", repo_id=repo).oid
    tree = {item.path: item for item in api.list_repo_tree(repo, expand=True, recursive=True)}
    assert {path: item.last_commit.oid == second for path, item in tree.items() if item.path.startswith("sub")} == {
        "sub": True,
        "sub/deep": False,
        "sub/vocab.txt": True,
        "sub/deep/notes.txt": False,
    }
    assert tree["sub/deep/notes.txt"].last_commit.oid == first


def test_paths_info(api, repo):
    infos = api.get_paths_info(repo, ["sub", "model.safetensors", "missing.txt"], expand=True)
    assert [info.path for info in infos] == ["sub", "model.safetensors"]
    assert infos[1].lfs.size == len(FILES["model.safetensors"])


def test_existence(api, repo):
    assert api.repo_exists(repo) and not api.repo_exists("ada/none")
    assert api.file_exists(repo, "sub/vocab.txt") and not api.file_exists(repo, "vocab.txt")
    assert api.revision_exists(repo, "main") and not api.revision_exists(repo, "nowhere")


def test_missing_things_raise_the_right_errors(api, repo, tmp_path):
    for error, arguments in (
        (RepositoryNotFoundError, ("ada/none", "config.json")),
        (RepositoryNotFoundError, ("none", "config.json")),
        (RemoteEntryNotFoundError, (repo, "none.json")),
    ):
        with pytest.raises(error) as caught:
            api.hf_hub_download(*arguments, cache_dir=tmp_path)
        assert caught.value.response.status_code == 404
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(repo, "config.json", revision="nowhere", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.snapshot_download(repo, revision="nowhere", cache_dir=tmp_path)
    # The client keeps the absence of a file under the commit that the 404 named.
    assert list(tmp_path.glob("models--ada--tiny/.no_exist/*/none.json"))


def test_download(hub, api, repo, tmp_path):
    path = Path(api.hf_hub_download(repo, "sub/deep/notes.txt", cache_dir=tmp_path))
    assert path.read_bytes() == b"notes"
    assert path.parts[-4] == hub.head(repo)
    folder = api.snapshot_download(repo, cache_dir=tmp_path)
    assert read_folder(folder) == FILES
    hub.clear_requests()
    assert api.snapshot_download(repo, cache_dir=tmp_path) == folder
    assert [method for method, path in hub.requests if "/resolve/" in path] == []
    local = api.snapshot_download(repo, local_dir=tmp_path / "plain", allow_patterns="*.json")
    assert Path(local, "config.json").exists() and not Path(local, "README.md").exists()
    assert api.verify_repo_checksums(repo, cache_dir=tmp_path).mismatches == []


def test_resolve_headers_and_ranges(hub, repo):
    data = FILES["model.safetensors"]
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))

    def get(method="GET", path="model.safetensors", **headers):
        connection.request(method, f"/{repo}/resolve/main/{path}", headers=headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()

    status, headers, body = get("HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(data)))
    sha256 = hashlib.sha256(data).hexdigest()
    assert headers["ETag"] == headers["X-Linked-Etag"] == f'"{sha256}"'
    assert (headers["X-Linked-Size"], headers["Accept-Ranges"]) == (str(len(data)), "bytes")
    assert headers["X-Repo-Commit"] == hub.head(repo)
    assert get("HEAD", "config.json")[1]["X-Linked-Etag"] is None
    for ask, start, stop in (
        ("5-9", 5, 10),
        ("5-", 5, len(data)),
        ("-7", len(data) - 7, len(data)),
        ("0-99999", 0, 10240),
    ):
        status, headers, body = get(Range=f"bytes={ask}")
        assert (status, body) == (206, data[start:stop])
        assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(data)}"
    assert get(Range=f"bytes={len(data)}-")[0] == 416
    connection.close()


def test_safetensors_metadata(hub, api):
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    hub.add_repo("ada/weights", {"model.safetensors": len(header).to_bytes(8, "little") + header + b"\0" * 8})
    assert api.get_safetensors_metadata("ada/weights").parameter_count == {"F32": 2}


# --- faults


def test_cut_download_is_resumed(hub, api, repo, tmp_path):
    hub.fault("GET .*/model.safetensors", "cut", bytes=1000)
    path = api.hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == FILES["model.safetensors"]
    assert len([method for method, path in hub.requests if method == "GET" and "/resolve/" in path]) == 2


def test_flipped_byte_goes_unnoticed_until_checksums_are_verified(hub, api, repo, tmp_path):
    hub.fault("/model.safetensors", "flip", offset=3)
    path = api.hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path)
    data = FILES["model.safetensors"]
    assert Path(path).read_bytes() == data[:3] + bytes([data[3] ^ 0xFF]) + data[4:]
    wrong = api.verify_repo_checksums(repo, cache_dir=tmp_path).mismatches
    assert [mismatch["path"] for mismatch in wrong] == ["model.safetensors"]


def test_truncated_download_is_refused(hub, api, repo, tmp_path):
    hub.fault("/model.safetensors", "truncate", bytes=100)
    with pytest.raises(OSError, match="Consistency check failed"):
        api.hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path)


def test_status_faults(hub, api, repo, tmp_path):
    hub.fault("GET /api/models/ada/tiny", "status", status=429)
    with pytest.raises(HfHubHTTPError, match="429"):
        api.model_info(repo)
    hub.fault("GET .*/config.json", "status", status=429)
    assert api.hf_hub_download(repo, "config.json", cache_dir=tmp_path)
    hub.fault("GET .*/README.md", "status", status=500, times=-1)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="500"):
            api.hf_hub_download(repo, "README.md", cache_dir=tmp_path)
    hub.clear_faults()
    assert api.hf_hub_download(repo, "README.md", cache_dir=tmp_path)


def test_access_faults(hub, api, repo, tmp_path):
    hub.fault("/api/models", "gated")
    with pytest.raises(GatedRepoError):
        api.model_info(repo)
    hub.fault("/api/models", "missing", code="RepoNotFound")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo)
    hub.fault("config.json", "missing")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(repo, "config.json", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="kind"):
        hub.fault("x", "explode")


# --- the server itself


def test_add_repo_from_a_folder(hub, tmp_path):
    first = hub.add_repo("ada/disk", write_folder(tmp_path, FILES))
    assert hub.files("ada/disk") == FILES and hub.head("ada/disk") == first
    second = hub.add_repo("ada/disk", {"only.txt": b"1"}, branch="dev")
    assert hub.files("ada/disk", "dev") == {"only.txt": b"1"} and hub.head("ada/disk") == first != second


def test_closed_hub_drops_idle_connections(repo, hub, api):
    api.model_info(repo)
    hub.close()
    with pytest.raises(httpx2.ConnectError):
        api.model_info(repo)


def test_loads_by_path_with_the_standard_library_only():
    """The tests start a Hub this way before anything reads the endpoint; -I -S leaves no other package to import."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from manticore_hf_testing import load_local_hub
with load_local_hub().LocalHub() as hub:
    hub.add_repo("ada/tiny", {"a.txt": b"1"})
print(*sys.modules)
"""
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT / "tests")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loaded = {name.partition(".")[0] for name in out.split()}
    assert loaded - set(sys.stdlib_module_names) == {"__main__", "manticore_local_hub", "manticore_hf_testing"}


def test_main_prints_the_environment_and_serves(tmp_path):
    command = ["-m", "manticore_hf.testing.local_hub", "--home", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = clean_process.start(command, env=environment, stdout=subprocess.PIPE)
    try:
        endpoint = process.stdout.readline().strip().removeprefix("export HF_ENDPOINT=")
        assert HfApi(endpoint=endpoint, token=TOKEN).whoami()["name"] == "tester"
    finally:
        process.kill()
        process.wait(60)


def test_environment_carries_a_whole_push(hub, tmp_path):
    """Model, tokenizer and card, pushed and loaded again as a user would, with nothing but the environment set."""
    out = run_python(
        hub,
        tmp_path,
        """
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=4, n_positions=8))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
model.push_to_hub("ada/pushed", private=True, tags=["tiny"])
tokenizer.push_to_hub("ada/pushed")
card = ModelCard("---\\nlicense: mit\\n---\\n# Pushed\\n")
card.push_to_hub("ada/pushed")
assert ModelCard.load("ada/pushed").data.license == "mit"
try:
    ModelCard("---\\nlicense: A License\\n---\\n").validate()
except ValueError as error:
    print("refused", "license" in str(error))
again = AutoModelForCausalLM.from_pretrained("ada/pushed")
assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)
print(AutoTokenizer.from_pretrained("ada/pushed")("b")["input_ids"])
""",
    )
    assert out.splitlines()[-2:] == ["refused True", "[1]"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(hub.files("ada/pushed"))
    assert (tmp_path / "hub" / "models--ada--pushed").is_dir()
