"""Bringing the code that a published hybrid carries up to this version; weights, tokenizer and card stay as they are.

manticore-hf push you/hybrid --code-only
"""

import difflib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from manticore_hf._version import __version__
from manticore_hf.hub.publish import explained, unchanged
from manticore_hf.modeling.carried_manticore import CODE
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.utils.carried import copy_code


@dataclass
class CodeUpdate:
    """What of a repository's code differs from this version's.

    Attributes:
        repo_id: The repository.
        head: Its commit.
        changed: {file: its new text}; the code, and config.json where it names classes elsewhere than they are now.
        deleted: Files of code that this version has no more.
        diff: All of it, as `diff -u` shows it.
        commit: The commit that was made, if one was.
        url: Where it is.
    """

    repo_id: str
    head: str
    changed: dict[str, str]
    deleted: list[str]
    diff: str
    commit: str | None = field(default=None)
    url: str | None = field(default=None)


def code_update(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> CodeUpdate:
    """Compares a published hybrid's code with this version's; nothing is written, and none of its code is run.

    Args:
        repo_id: The repository.
        revision: Its branch; default: main.
        token: Access token; default: the one that is logged in.

    Raises:
        ManticoreError: It is not there, is no hybrid, or was written by a newer version.
    """
    with explained(repo_id):
        try:
            info = HfApi(token=token).model_info(repo_id, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError) as err:
            at = "" if revision is None else f"@{revision}"
            raise ManticoreError(f"{repo_id}{at} is not on the Hub, or your token does not open it.") from err
        files = {one.rfilename for one in info.siblings}
        if "config.json" not in files:
            raise ManticoreError(
                f"{repo_id} has no config.json, so it is not a hybrid; publish one with manticore-hf push."
            )

        def there(name):
            path = hf_hub_download(repo_id, name, revision=info.sha, token=token)
            return Path(path).read_text(encoding="utf-8", errors="replace")

        text = there("config.json")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise ManticoreError(f"config.json of {repo_id} is not JSON ({err}); repair it.") from err
        if not isinstance(values, dict) or values.get("model_type") != "manticore":
            raise ManticoreError(f"{repo_id} holds a model that is not a hybrid; its config.json says so.")
        config = ManticoreConfig.from_pretrained(repo_id, revision=info.sha, token=token)  # this version reads it
        new = {}
        with tempfile.TemporaryDirectory() as folder:
            copy_code(folder, config)
            for path in sorted(Path(folder).iterdir()):
                new[path.name] = path.read_text(encoding="utf-8")
        classes = config.to_dict()["auto_map"]
        if values.get("auto_map") != classes:
            new["config.json"] = json.dumps({**values, "auto_map": classes}, indent=2, sort_keys=True) + "\n"
        old = {name: there(name) for name in sorted(files) if CODE.fullmatch(name)} | {"config.json": text}
    changed = {name: text for name, text in new.items() if old.get(name) != text}
    deleted = sorted(name for name in old if CODE.fullmatch(name) and name not in new)
    diff = [_diff(name, old.get(name, ""), new.get(name, "")) for name in sorted([*changed, *deleted])]
    return CodeUpdate(repo_id, info.sha, changed, deleted, "".join(diff))


def _diff(name, old, new):
    lines = difflib.unified_diff(
        old.splitlines(),
        new.splitlines(),
        f"a/{name}" if old else "/dev/null",
        f"b/{name}" if new else "/dev/null",
        lineterm="",
    )
    return "".join(f"{line}\n" for line in lines)


def commit_update(
    update: CodeUpdate,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    message: str | None = None,
) -> None:
    """Commits a CodeUpdate, on the very commit that it was made from.

    Args:
        update: It learns its commit.
        revision: As for `code_update`.
        create_pr: Open a pull request instead.
        token: As for `code_update`.
        message: Of the commit; default: "Bring the code up to manticore-hf VERSION".

    Raises:
        ManticoreError: The Hub does not take it, or somebody else was faster; then nothing was committed.
    """
    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, text.encode()) for name, text in sorted(update.changed.items())]
    operations += [CommitOperationDelete(name) for name in update.deleted]
    message = message or f"Bring the code up to manticore-hf {__version__}"
    with explained(update.repo_id), unchanged(update.repo_id, "Run it again."):
        done = api.create_commit(
            update.repo_id,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=update.head,
        )
    update.commit, update.url = done.oid, done.pr_url if create_pr else f"{api.endpoint}/{update.repo_id}"


def push_code(
    repo_id: str,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    yes: bool = False,
    message: str | None = None,
    ask: Callable[[str], str] = input,
) -> CodeUpdate:
    """Shows what would change in a repository's code, asks, and commits it.

    Args:
        repo_id, revision, create_pr, message: As `commit_update` takes them.
        dry_run: Show it only.
        yes: Do not ask.
        ask: Asks the question and gives the answer.

    Raises:
        ManticoreError: As `code_update` and `commit_update`; or nobody is there to be asked.
    """
    update = code_update(repo_id, revision)
    if not update.diff:
        print(f"The code of {repo_id} is already that of manticore-hf {__version__}.")
        return update
    print(update.diff, end="")
    count = len(update.changed) + len(update.deleted)
    print(f"{count} files of {repo_id} differ from manticore-hf {__version__}; weights are not touched.")
    if dry_run:
        print(f"Dry run: nothing was written to {repo_id}.")
        return update
    if not yes:
        if not sys.stdin.isatty():
            raise ManticoreError(
                "There is no terminal to confirm this commit on: give --yes, or --dry-run just to look."
            )
        if ask(f"Commit this to {repo_id}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was committed.")
            return update
    commit_update(update, revision, create_pr, message=message)
    print(f"Committed {repo_id}@{update.commit[:12]}: {update.url}")
    return update
