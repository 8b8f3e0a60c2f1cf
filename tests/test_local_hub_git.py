"""Repositories, commits, branches, tags and pull requests of the local Hub, by the real huggingface_hub client."""

import http.client
import re
from pathlib import Path

import local_hub_client
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
from local_hub_client import FILES, write_folder

# Each test has a Hub of its own
hub, api, repo = local_hub_client.hub, local_hub_client.api, local_hub_client.repo

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


# --- model cards


def test_card_errors_stop_a_commit(hub, api, repo):
    bad = b"---\nlicense: mit\nlicense: mit\ntags: tiny\n\tx: 1\nstray line\n---\n"
    with pytest.raises(ValueError, match='duplicated key(.|\n)*x: 1(.|\n)*stray line(.|\n)*"tags" must be an array'):
        api.upload_file(path_or_fileobj=bad, path_in_repo="README.md", repo_id=repo)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Bare\n", path_in_repo="README.md", repo_id=repo)
    assert hub.files(repo)["README.md"] == b"# Bare\n"
