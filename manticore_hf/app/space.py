"""The page as a Space on the Hub: app.py, requirements.txt, the card, and the page's own files as they are here.

    manticore-hf app you/hybrid --space you/try-hybrid

A Space runs the code that the hybrid's repository carries, at the commit that is written into app.py.
"""

import os
import re
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, repo_exists
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from manticore_hf._version import __version__
from manticore_hf.modeling.bounds_manticore import is_commit
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.formatting import escape, listed

GRADIO = "6.31.0"
"""The version of Gradio that a Space gets: the one that the page is tested with."""
PAGE = "hybrid_page"
_NEEDED = ("torch", "transformers", "safetensors", "tokenizers")
_MARK = "Written by `manticore-hf app`"
_APP = '''"""A page to try the hybrid {repo_id}. {mark} of manticore-hf {version}; run it again to update."""

from {page}.serving import serve_repository

serve_repository({repo_id!r}, {revision!r})
'''
_CARD = """
# Try {name}

{mark} of manticore-hf {version}, for {link}: a hybrid of {parts}. Type a text to see which component had the weight at
each token, what the hybrid and each component expected, what each writes next, and what that takes.

The hybrid is loaded at commit `{revision}` with the code that its repository carries (`trust_remote_code=True`).
{access}"""
_TOKEN = """
If the hybrid or a component is private or gated, add a secret `HF_TOKEN` to this Space: a token that may read them.
"""


def space_files(repo_id: str, revision: str, config: ManticoreConfig) -> dict[str, str]:
    """The files of a Space.

    Args:
        repo_id: The hybrid's repository.
        revision: Its commit.
        config: Its configuration there.

    Returns:
        {path in the Space: text}.
    """
    page = files("manticore_hf.app") / PAGE
    out = {
        f"{PAGE}/{one.name}": one.read_text(encoding="utf-8")
        for one in sorted(page.iterdir(), key=lambda one: one.name)
        if one.name.endswith(".py")
    }
    facts = {"repo_id": repo_id, "revision": revision, "version": __version__, "mark": _MARK}
    out["app.py"] = _APP.format(**facts, page=PAGE)
    out["requirements.txt"] = "".join(f"{one}\n" for one in requirements())
    name = repo_id.split("/")[-1]
    about = {
        "title": f"Try {name}"[:100],
        "emoji": "🧬",
        "colorFrom": "blue",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": "3.11",
        "app_file": "app.py",
        "models": list(dict.fromkeys([repo_id, *(one["repo_id"] for one in config.components if one["repo_id"])])),
        "short_description": "A hybrid language model, token by token",
        "tags": ["manticore", "hybrid"],
    }
    parts = listed([escape(f"{one} ({getattr(config, one).model_type})") for one in config.component_names])
    text = _CARD.format(
        **facts, name=escape(name), link=f"[{repo_id}](https://huggingface.co/{repo_id})", parts=parts, access=_TOKEN
    )
    out["README.md"] = f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n{text}"
    return out


def requirements() -> list[str]:
    """What a Space has to install beside Gradio, which its card names: as this package needs it."""
    ours = metadata.requires("manticore-hf") or []
    names = {re.match(r"[\w.-]+", one)[0]: one for one in ours if ";" not in one}
    return [names[name].replace(" ", "") for name in _NEEDED]


def publish_space(
    repo_id: str,
    revision: str | None = None,
    space: str | None = None,
    directory: str | os.PathLike | None = None,
    private: bool = False,
) -> str | None:
    """Writes the page as a Space, to a directory, to the Hub or both, and says where.

    Args:
        repo_id: The hybrid's repository.
        revision: Branch, tag or commit; the commit of now is written down. Default: main.
        space: The Space, made if it is not there; None: nothing is written to the Hub.
        directory: For the files; None: they are not kept.
        private: Whether a new Space is private.

    Returns:
        The commit in the Space, if one was made.

    Raises:
        ManticoreError: The hybrid is not on the Hub or is a classifier, the Space is another one's, or the Hub does not
            take it.
    """
    if os.path.isdir(repo_id):
        raise ManticoreError(
            f"A Space loads the hybrid from the Hub, and {repo_id!r} is a directory: publish it first "
            f"(`manticore-hf push {repo_id} you/name`), then give you/name."
        )
    api = HfApi()
    try:
        commit = revision if revision and is_commit(revision) else api.model_info(repo_id, revision=revision).sha
        config = ManticoreConfig.from_pretrained(repo_id, revision=commit)
        if any("Classification" in name for name in config.architectures or ()):
            raise ManticoreError(f"{repo_id} is a classifier ({config.architectures[0]}); the page is for text.")
        made = space_files(repo_id, commit, config)
        if directory is not None:
            _write(Path(directory), made)
        return None if space is None else _commit(api, space, made, private)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as err:
        raise ManticoreError(f"{space or repo_id}: {' '.join(str(err).split())}") from err
    except (HfHubHTTPError, HTTPError) as err:
        raise ManticoreError(
            f"The Hub did not answer, or did not accept the Space: {' '.join(str(err).split())}"
        ) from err


def _write(directory, made):
    for name, text in made.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    print(f"Wrote {len(made)} files to {directory}: {', '.join(sorted(made))}.")


def _commit(api, space, made, private):
    """The commit that puts the files into the Space; a card that is there already is its owner's."""
    there, head = [], None
    if repo_exists(space, repo_type="space"):
        info = api.space_info(space)
        there, head = [one.rfilename for one in info.siblings], info.sha
        if "app.py" in there and _MARK not in _read(space, "app.py", head):
            raise ManticoreError(
                f"The Space {space} has an app.py that `manticore-hf app` did not write: give another name."
            )
    else:
        api.create_repo(space, repo_type="space", space_sdk="gradio", private=private)
        head = api.space_info(space).sha
    kept = "README.md" in there
    operations = [
        CommitOperationAdd(name, text.encode()) for name, text in made.items() if not (kept and name == "README.md")
    ]
    old = [name for name in there if name.startswith(f"{PAGE}/") and name not in made]
    operations += [CommitOperationDelete(name) for name in old]
    out = api.create_commit(space, operations, commit_message="Write the page", repo_type="space", parent_commit=head)
    print(f"Published the Space {space}@{out.oid[:12]}: {api.endpoint}/spaces/{space}")
    if kept:
        print(f"Its README.md already existed and was kept; this page was tested with sdk_version: {GRADIO}.")
    return out.oid


def _read(space, name, revision):
    return Path(hf_hub_download(space, name, repo_type="space", revision=revision)).read_text(encoding="utf-8")
