"""Which files of a hybrid's directory are published, and what must not be in them."""

import base64
import math
import mmap
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_token, hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from manticore_hf.modeling.aligned_tokenizers import FILES, folder_of
from manticore_hf.modeling.bounds_manticore import ManticoreError, is_commit
from manticore_hf.modeling.carried_manticore import CODE
from manticore_hf.modeling.references_manticore import where
from manticore_hf.utils.carried import copy_code
from manticore_hf.utils.files import check_link, stays_inside
from manticore_hf.utils.formatting import listed_some

_WEIGHTS = re.compile(r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?")
_TAKEN = re.compile(
    rf"{CODE.pattern}|config\.json|generation_config\.json|recipe\.yaml|evaluation\.json|LICENSE(\.\w+)?|NOTICE"
)
FOLDERS = ("plots", "additional_chat_templates", "tokenizer_*")
"""Folders of a directory of which something may be published."""
_PLOT = re.compile(r"[\w.-]+\.png")
REPLACED = re.compile(
    rf"{CODE.pattern}|model[\w.-]*\.safetensors(\.index[\w.-]*\.json)?|plots/[\w.-]+\.png"
    r"|\.eval_results/manticore-hf\.yaml"
)
"""Files of an earlier push that would be read, or shown, beside those of this one."""

_ITEM_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F4": 4,
}
_TOKEN = re.compile(
    rb"hf_(?:oauth_[\w.-]{30,}|[A-Za-z0-9]{30,})"
    rb"|h\0f\0_\0(?:[\w.-]\0){30,}|\0h\0f\0_(?:\0[\w.-]){30,}"  # UTF-16
)
# How "hf_" begins in base64, which takes three bytes at a time: at the first, second and third of them.
_ENCODED = re.compile(rb"(?:aGZf|hmX[z0-3]|oZl[89])[\w+/\r\n-]{36,400}", re.ASCII)
_PACKED = {
    b"\x1f\x8b\x08": "gzip", b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf\x27\x1c": "7-zip",
}  # fmt: skip


def collect(
    directory: str | os.PathLike,
    made: str | os.PathLike,
    config: PreTrainedConfig,
    tokenizer: object = None,
    token: str | bool | None = None,
    offline: bool = False,
) -> tuple[dict, list[str]]:
    """Finds the files of a saved hybrid that belong in its repository, and makes those that are missing.

    Args:
        directory: Where the hybrid is.
        made: Directory for the files that are made: tokenizer, code.
        config: The hybrid's configuration.
        tokenizer: Its tokenizer, or None for the directory's or that of the tokenizer component.
        token: Of the Hub.
        offline: Whether a tokenizer of the Hub is only looked for in the local cache.

    Returns:
        ({path in the repository: path here} without those in `made`, sentences for the publisher).

    Raises:
        ManticoreError: Weights are missing, or a component is referenced by a name that can move.
    """
    directory, notices = Path(directory), []
    for entry in config.components:
        if entry["weights"] == "reference" and not is_commit(entry["revision"]):
            raise ManticoreError(
                f"{where(entry)} is referenced by a name that can move; load the hybrid and save it again, which "
                "writes the commit."
            )
    files = {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
    files = {name: path for name, path in files.items() if _TAKEN.fullmatch(name) or _WEIGHTS.fullmatch(name)}
    if not any(_WEIGHTS.fullmatch(name) for name in files):
        raise ManticoreError(f"{directory} has no model.safetensors: save the hybrid there with save_pretrained.")
    files.update(
        {
            f"plots/{path.name}": path
            for path in sorted((directory / "plots").glob("*"))
            if path.is_file() and _PLOT.fullmatch(path.name)
        }
    )
    twice = [name for name, path in files.items() if path.suffix != ".safetensors" and path.stat().st_nlink > 1]
    if twice:  # which a copy of a directory may have, and a downloaded archive that was unpacked without care
        notices.append(
            f"Hard links: {listed_some(twice)} have other names on this machine; look whether they belong here."
        )
    made.mkdir(parents=True, exist_ok=True)
    for name in config.aligned:  # tokenizers without an address
        kept = sorted((directory / folder_of(name)).glob("*"))
        files.update({f"{folder_of(name)}/{path.name}": path for path in kept if path.name in FILES})
    copy_code(made, config)
    theirs = {name: path for name, path in files.items() if CODE.fullmatch(name)}
    if theirs:  # the code that the configuration was written by, whole
        ours = {path.name: path.read_bytes() for path in made.glob("*.py")}
        if ours != {name: path.read_bytes() for name, path in theirs.items()}:
            notices.append("The code in the directory is not the installed manticore-hf's; it is published as it is.")
        for path in made.glob("*.py"):
            path.unlink()
    notices += _add_tokenizer(directory, made, config, tokenizer, {"token": token, "local_files_only": offline})
    return files, notices


def _add_tokenizer(directory, made, config, tokenizer, hub):
    """Writes the tokenizer's files to `made`; a sentence where there is none."""
    if tokenizer is not None:
        tokenizer.save_pretrained(made)
        return []
    entry = next(one for one in config.components if one["name"] == config.tokenizer_component)
    sources = [(str(directory), {})]
    home = entry if entry["transplant"] is None else entry["transplant"]["tokenizer"] or {"repo_id": None}
    if home["repo_id"]:
        sources.append((home["repo_id"], {"revision": home["revision"], "subfolder": home["subfolder"] or "", **hub}))
    for source, options in sources:
        if source == str(directory) and not any(directory.glob("*token*")) and not any(directory.glob("vocab*")):
            continue  # of a configuration alone AutoTokenizer makes an empty tokenizer
        try:
            found = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        except Exception:  # whatever is wrong with a stranger's tokenizer: the hybrid can be published without
            continue
        if len(found):
            found.save_pretrained(made)
            return []
    return ["No tokenizer is published: none was found that can be read. Give one (tokenizer=..., --tokenizer)."]


def own_weights(paths: list, names: list) -> dict[str, int]:
    """Bytes of the tensors in a hybrid's own safetensors files.

    Args:
        paths: Files; others than safetensors files are passed over.
        names: The components.

    Returns:
        {component: bytes of its tensors, "": bytes of the others}.

    Raises:
        ManticoreError: A file is damaged.
    """
    out = dict.fromkeys([*names, ""], 0)
    for path in (path for path in map(Path, paths) if path.suffix == ".safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    size = math.prod(part.get_shape()) * _ITEM_BITS.get(part.get_dtype(), 32) // 8
                    name = key.partition(".")[0]
                    out[name if name in names else ""] += size
        except (SafetensorError, OSError) as err:
            raise ManticoreError(f"{path} is not a readable safetensors file ({err}); save the hybrid again.") from err
    return out


def check_no_tokens(files: dict, token: str | bool | None = None) -> None:
    """Raises ManticoreError if a file holds an access token: every byte that goes is looked at, whatever its name.

    Base64 is decoded before it is searched; a file that is compressed as a whole raises.

    Args:
        files: {path in the repository: path here}.
        token: The token that is used; it is looked for besides what looks like one.
    """
    own = {one for one in (token, get_token()) if isinstance(one, str) and len(one) >= 8}
    own = [one.encode(code) for one in own for code in ("utf-8", "utf-16-le", "utf-16-be")]
    for name, path in files.items():
        if _TOKEN.search(str(name).encode()) or any(one in str(name).encode() for one in own):
            raise ManticoreError("The name of a file is an access token of the Hub; rename it, and revoke the token.")
        if not path.stat().st_size:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            packed = next((kind for begin, kind in _PACKED.items() if data[: len(begin)] == begin), None)
            if packed is not None and path.suffix != ".safetensors":  # which begin with a number, whatever that is
                raise ManticoreError(f"{name} is a {packed} archive: a token in it would not be seen; unpack it.")
            if _TOKEN.search(data) or any(data.find(one) >= 0 for one in own) or _is_encoded(data):
                said = "holds an access token of the Hub; remove it there, and revoke the token."
                raise ManticoreError(f"{name} {said}")


def _is_encoded(data):
    """Whether an access token is somewhere in base64; folded lines are joined."""
    for found in _ENCODED.finditer(data):
        text = found[0].translate(bytes.maketrans(b"-_", b"+/"), b"\r\n")
        for missing in (b"", b"AG", b"AAB"):  # of the group of four that it begins in, with the bits of "h" in it
            whole = missing + text
            if _TOKEN.search(base64.b64decode(whole[: len(whole) // 4 * 4])):
                return True
    return False


def check_links(directory: str | os.PathLike) -> None:
    """Raises ManticoreError if something that is read for publishing is a link to what is not in the directory.

    Args:
        directory: Where the hybrid is.
    """
    directory = Path(directory)
    below = [path for name in FOLDERS for folder in directory.glob(name) for path in folder.rglob("*")]
    for path in [*directory.iterdir(), *below]:
        check_link(path, directory)


def source_card(model: PreTrainedModel) -> str | None:
    """Path of the model card of the repository or directory that a hybrid was loaded from, or None.

    A saved hybrid keeps it: what people wrote there is about the hybrid, also after it was trained further.
    """
    folder = getattr(model, "_loaded_from", None)
    if folder is None:
        return None
    if os.path.isfile(card := os.path.join(folder, "README.md")):
        return card if stays_inside(card, folder) else None  # a link to something of whoever saves it
    found = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})$", folder)
    if found is None:
        return None
    repo_id, cache_dir = found[1].replace("--", "/", 1), Path(folder).parents[2]
    if try_to_load_from_cache(repo_id, "README.md", cache_dir=cache_dir, revision=found[2]) is not None:
        return None  # known not to be there
    try:
        return hf_hub_download(repo_id, "README.md", cache_dir=cache_dir, revision=found[2])
    except Exception:  # offline, or no longer allowed to read it: no reason not to save
        return None


def keep_card(model: PreTrainedModel, directory: str, target: str | os.PathLike) -> None:
    """Writes into `directory` the card that a hybrid came with, if `target`, where it is saved, has none."""
    if not os.path.exists(os.path.join(target, "README.md")) and (card := source_card(model)) is not None:
        shutil.copyfile(card, os.path.join(directory, "README.md"))


def upload_files(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    repo_id: str,
    others: dict,
    token: str | bool | None = None,
    revision: str | None = None,
    **commit: object,
) -> CommitInfo:
    """Uploads a saved hybrid in one commit that also removes the weight files of an earlier push.

    A single `model.safetensors` left beside new shards (or the reverse) would win when the repository is loaded.

    Args:
        model: The hybrid, whose card is uploaded where the repository has none.
        folder: What to upload,
        repo_id: and where to.
        others: Names of files in it that are not uploaded. No dates are compared, which may lie in the future.
        token, revision, **commit: As in Transformers' `_upload_modified_files`.
    """
    directory, api = Path(folder), HfApi(token=token)
    if (card := source_card(model)) is not None and not api.file_exists(repo_id, "README.md"):
        shutil.copyfile(card, directory / "README.md")  # Transformers has put an empty one there
        others = {file: date for file, date in others.items() if file != "README.md"}
    files = [file.relative_to(directory) for file in directory.rglob("*") if file.is_file()]
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id=repo_id, branch=revision, exist_ok=True)
    commit["commit_message"] = commit.get("commit_message") or "Upload hybrid"
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        allow_patterns=[file.as_posix() for file in files if file.parts[0] not in others],
        delete_patterns=["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"],
        revision=revision,
        **commit,
    )
