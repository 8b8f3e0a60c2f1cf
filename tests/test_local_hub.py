"""The real huggingface_hub client against the Hub on loopback."""

import hashlib
import http.client
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from manticore_hf.local_hub import TOKEN, LocalHub

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "README.md": b"---\nlicense: mit\ntags:\n- tiny\npipeline_tag: text-generation\n---\n# Tiny\n",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "sub/deep/notes.txt": b"notes",
    "sub/vocab.txt": b"a\nb\n",
}


@pytest.fixture
def hub(monkeypatch):
    # Read at every call, unlike the environment variable: in this process the client is already imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def repo(hub):
    hub.add_repo("ada/tiny", FILES)
    return "ada/tiny"


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def read_folder(root: str | Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def run_python(hub: LocalHub, home: Path, code: str) -> str:
    environment = {**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- repos


def test_create_repo(hub, api):
    url = api.create_repo("ada/new")
    assert (url.repo_id, url.repo_type, str(url)) == ("ada/new", "model", f"{hub.url}/ada/new")
    assert api.create_repo("ada/new", exist_ok=True).repo_id == "ada/new"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("ada/new")
    assert api.create_repo("short").repo_id == "tester/short"
    assert list(hub.files("ada/new")) == [".gitattributes"]


def test_dataset_repo(hub, api, tmp_path):
    assert api.create_repo("ada/texts", repo_type="dataset").repo_type == "dataset"
    api.upload_file(path_or_fileobj=b"PAR1", path_in_repo="a.parquet", repo_id="ada/texts", repo_type="dataset")
    path = api.hf_hub_download("ada/texts", "a.parquet", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"PAR1"
    assert api.dataset_info("ada/texts").id == "ada/texts"
    assert hub.files("datasets/ada/texts")["a.parquet"] == b"PAR1"
    assert not api.repo_exists("ada/texts")


def test_delete_repo(api, repo):
    api.delete_repo(repo)
    assert not api.repo_exists(repo)
    api.delete_repo(repo, missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)


def test_private_repo_is_missing_for_strangers(hub, api):
    api.create_repo("ada/secret", private=True)
    assert api.model_info("ada/secret").private is True
    for token, status in ((False, 401), ("other", 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            HfApi(endpoint=hub.url, token=token).model_info("ada/secret")
        assert caught.value.response.status_code == status


def test_gated_repo(hub, api, tmp_path):
    hub.add_repo("ada/gated", FILES, gated="manual")
    for token, status in ((False, 401), ("other", 403)):
        stranger = HfApi(endpoint=hub.url, token=token)
        assert stranger.model_info("ada/gated").gated == "manual"
        with pytest.raises(GatedRepoError) as caught:
            stranger.hf_hub_download("ada/gated", "config.json", cache_dir=tmp_path)
        assert caught.value.response.status_code == status
    assert api.hf_hub_download("ada/gated", "config.json", cache_dir=tmp_path)


def test_whoami(hub, api):
    assert api.whoami()["name"] == "tester"
    hub.fault("whoami", "unauthorized")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami()


def test_writing_needs_a_token(hub, repo):
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=hub.url, token=False).create_branch(repo, branch="dev")
    assert caught.value.response.status_code == 401


# --- commits


def test_upload_file_regular_and_lfs(hub, api, repo):
    before = hub.head(repo)
    api.upload_file(path_or_fileobj=b"{1}", path_in_repo="config.json", repo_id=repo)
    commit = api.upload_file(
        path_or_fileobj=b"weights", path_in_repo="w.bin", repo_id=repo, commit_message="Add w", commit_description="why"
    )
    assert hub.head(repo) == commit.oid != before
    assert re.fullmatch("[0-9a-f]{40}", commit.oid)
    assert hub.files(repo) == {**FILES, "config.json": b"{1}", "w.bin": b"weights"}
    assert len([method for method, _ in hub.requests if method == "PUT"]) == 1
    assert hub.files(repo, before) == FILES
    history = api.list_repo_commits(repo)
    assert [c.title for c in history] == ["Add w", "Upload config.json with huggingface_hub", "Add files"]
    assert history[0].message == "why" and history[0].commit_id == commit.oid and history[-1].commit_id == before
    assert history[0].created_at >= history[1].created_at


def test_upload_folder(hub, api, tmp_path):
    files = {**FILES, "empty.bin": b"", "sub/emb.pt": b"x" * 3000}
    api.create_repo("ada/folder")
    api.upload_folder(repo_id="ada/folder", folder_path=write_folder(tmp_path, files))
    stored = hub.files("ada/folder")
    stored.pop(".gitattributes")
    assert stored == files
    api.upload_folder(
        repo_id="ada/folder",
        folder_path=tmp_path,
        allow_patterns="config.json",
        path_in_repo="copy",
        delete_patterns="*",
    )
    assert hub.files("ada/folder")["copy/config.json"] == b"{}"


def test_unchanged_upload_makes_no_commit(hub, api, repo, tmp_path):
    before = hub.head(repo)
    commit = api.upload_folder(repo_id=repo, folder_path=write_folder(tmp_path, FILES))
    assert commit.oid == before == hub.head(repo)
    assert not [path for method, path in hub.requests if method == "PUT" or "/commit/" in path]


def test_lfs_content_is_sent_once_and_verified(hub, api, repo):
    api.upload_file(path_or_fileobj=FILES["model.safetensors"], path_in_repo="again.safetensors", repo_id=repo)
    assert not [path for method, path in hub.requests if method == "PUT"]
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    connection.request("PUT", "/lfs-objects/" + "0" * 64, body=iter([b"not ", b"it"]), encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 400
    response.read()
    # The same connection goes on: nothing of the chunked body is left unread.
    connection.request("GET", "/ada/tiny/resolve/main/config.json")
    assert connection.getresponse().read() == b"{}"
    connection.close()


def test_delete_and_copy(hub, api, repo):
    api.delete_file("config.json", repo)
    api.delete_folder("sub", repo)
    api.create_commit(
        repo,
        [
            CommitOperationCopy("model.safetensors", "copy.safetensors"),
            CommitOperationCopy("README.md", "docs/README.md"),
            CommitOperationDelete("model.safetensors"),
        ],
        commit_message="Move",
    )
    assert set(hub.files(repo)) == {"README.md", "docs/README.md", "copy.safetensors"}
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.delete_file("config.json", repo)


def test_parent_commit(hub, api, repo):
    first = hub.head(repo)
    options = {"repo_id": repo, "path_in_repo": "a.txt", "parent_commit": first[:7]}
    second = api.upload_file(path_or_fileobj=b"1", **options).oid
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.upload_file(path_or_fileobj=b"2", **options)
    assert caught.value.response.status_code == 412
    assert hub.head(repo) == second


def test_commit_to_a_missing_branch(hub, api, repo):
    for revision in ("nowhere", hub.head(repo)):
        with pytest.raises(RevisionNotFoundError):
            addition = CommitOperationAdd("a.txt", b"1")
            api.create_commit(repo, [addition], commit_message="No", revision=revision)


# --- refs


def test_branches(hub, api, repo):
    first = hub.head(repo)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=repo)
    api.create_branch(repo, branch="dev/old", revision=first)
    api.create_branch(repo, branch="new")
    assert hub.head(repo, "dev/old") == first and hub.head(repo, "new") == hub.head(repo)
    commit = api.upload_file(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id=repo, revision="dev/old")
    assert [c.commit_id for c in api.list_repo_commits(repo, revision="dev/old")] == [commit.oid, first]
    assert "b.txt" not in hub.files(repo) and "a.txt" not in hub.files(repo, "dev/old")
    api.create_branch(repo, branch="new", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(repo, branch="new")
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(repo, branch="other", revision="nowhere")
    with pytest.raises(BadRequestError):
        api.create_branch(repo, branch="refs/pr/9")
    assert {branch.name for branch in api.list_repo_refs(repo).branches} == {"main", "dev/old", "new"}


def test_tag_points_to_the_given_revision(hub, api, repo):
    first = hub.head(repo)
    api.create_branch(repo, branch="dev")
    second = api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=repo, revision="dev").oid
    api.create_tag(repo, tag="v1", revision="dev", tag_message="First")
    api.create_tag(repo, tag="v0", revision=first[:8])
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=repo, revision="dev")
    tags = {tag.name: tag for tag in api.list_repo_refs(repo).tags}
    assert (tags["v1"].target_commit, tags["v1"].ref) == (second, "refs/tags/v1")
    assert tags["v0"].target_commit == first
    assert api.model_info(repo, revision="v1").sha == second
    api.create_tag(repo, tag="v1", exist_ok=True)
    with pytest.raises(HfHubHTTPError):
        api.create_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id=repo, revision="v1")


def test_pull_requests(hub, api, repo, tmp_path):
    first = hub.head(repo)
    addition = CommitOperationAdd("a.txt", b"1")
    info = api.create_commit(repo, [addition], commit_message="Propose a", create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert hub.head(repo) == first and hub.head(repo, "refs/pr/1") == info.oid
    api.upload_file(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id=repo, revision="refs/pr/1")
    path = api.hf_hub_download(repo, "b.txt", revision="refs/pr/1", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"2"
    titles = [commit.title for commit in api.list_repo_commits(repo, revision="refs/pr/1")]
    assert titles == ["Upload b.txt with huggingface_hub", "Propose a", "Add files"]
    second = api.upload_file(
        path_or_fileobj=b"3", path_in_repo="c.txt", repo_id=repo, create_pr=True, parent_commit=first
    )
    assert second.pr_num == 2
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert [pull.ref for pull in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]
    assert [branch.name for branch in refs.branches] == ["main"]
    assert api.list_repo_refs(repo).pull_requests is None


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


# --- model cards


def test_card_errors_stop_a_commit(hub, api, repo):
    bad = b"---\nlicense: mit\nlicense: mit\ntags: tiny\n\tx: 1\nstray line\n---\n"
    with pytest.raises(ValueError, match='duplicated key(.|\n)*x: 1(.|\n)*stray line(.|\n)*"tags" must be an array'):
        api.upload_file(path_or_fileobj=bad, path_in_repo="README.md", repo_id=repo)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Bare\n", path_in_repo="README.md", repo_id=repo)
    assert hub.files(repo)["README.md"] == b"# Bare\n"


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
    command = [sys.executable, "-m", "manticore_hf.local_hub", "--home", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            endpoint = process.stdout.readline().strip().removeprefix("export HF_ENDPOINT=")
            assert HfApi(endpoint=endpoint, token=TOKEN).whoami()["name"] == "tester"
        finally:
            process.terminate()


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
