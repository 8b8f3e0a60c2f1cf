"""Publishing a hybrid: own weights, configuration, code, tokenizer, recipe, card and plots, in one commit.

    manticore-hf push hybrid you/hybrid --dry-run

The weights of referenced components are not uploaded. Only known files are taken from a directory: no checkpoints, no
optimizer state, no logs. Nothing is committed over a commit that has come in between.
"""

import contextlib
import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedModel
from transformers.utils import logging

from manticore_hf.hub.card import LICENSE_FILE, CardFacts, make_card, one_gate, shown_results
from manticore_hf.hub.card_merge import choose, merge
from manticore_hf.hub.eval_results import FILE as EVAL_RESULTS
from manticore_hf.hub.eval_results import eval_results
from manticore_hf.hub.licenses import check, read_license
from manticore_hf.hub.upload import REPLACED, check_links, check_no_tokens, collect, own_weights
from manticore_hf.modeling.bounds_manticore import build_component
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.modeling.references_manticore import hub_reason, where
from manticore_hf.modeling.transplant_manticore import end_names
from manticore_hf.utils.saving import check_whole
from manticore_hf.utils.task_types import model_type_of

logger = logging.get_logger(__name__)


@dataclass
class Published:
    """What was published, or would be.

    Args:
        repo_id: The repository.
        files: {path in the repository: bytes}.
        deleted: Paths that are removed there.
        referenced_bytes: Of component weights that stay in their own repositories.
        notices: Sentences for the publisher.
        commit: The commit, None after a dry run.
        url: Page of the repository, of the pull request if one was opened.
    """

    repo_id: str
    files: dict
    deleted: list
    referenced_bytes: int
    notices: list = field(default_factory=list)
    commit: str | None = None
    url: str | None = None


def publish(
    model: PreTrainedModel | str | os.PathLike,
    repo_id: str,
    *,
    tokenizer: object = None,
    recipe: str | os.PathLike | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    commercial: bool = False,
    override_licenses: bool = False,
    card: str = "merge",
    datasets: list | tuple = (),
    tags: list | tuple = (),
) -> "Published":
    """Publishes a hybrid on the Hub.

    Args:
        model: A hybrid, or the directory of a saved one.
        repo_id: Repository, made if it is not there.
        tokenizer: The tokenizer; default: the directory's, else that of the hybrid's tokenizer component.
        recipe: Path of the recipe that made it; default: the directory's `recipe.yaml`.
        private: Whether a new repository is private.
        revision: Branch, made from main if it is not there.
        create_pr: Open a pull request instead of committing.
        dry_run: Do everything but write to the Hub; where it does not answer, what does not need it.
        token: Access token; default: the one that is logged in.
        commit_message: Default: "Publish hybrid".
        license: The hybrid's own licence, as the Hub names it; default: the one that satisfies all components'.
        commercial: Whether commercial use is wanted: components that exclude it are then a conflict.
        override_licenses: Publish although licences conflict. The card shows the conflicts.
        card: "merge" (edits made here and on the Hub are both kept), "local" or "hub".
        datasets, tags: Added to the card's metadata.

    Returns:
        A Published.

    Raises:
        ManticoreError: What cannot be published, and why; nothing was written to the Hub then, unless the message says
            so.
    """
    if card not in ("merge", "local", "hub"):
        raise ManticoreError(f"card={card!r} is unknown; choose 'merge', 'local' or 'hub'.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="manticore-publish-") as scratch, explained(repo_id):
        directory = _directory(model, Path(scratch) / "model")
        check_links(directory)
        config = ManticoreConfig.from_pretrained(directory)
        if recipe is not None:
            directory = _with_recipe(directory, recipe, Path(scratch) / "copy")
        alone = None  # why the Hub is not asked
        try:
            head, present, remote = _target(api, repo_id, revision, token)
        except (HTTPError, ConnectionError) as err:
            if not dry_run or getattr(err, "response", None) is not None:
                raise
            alone, head, present, remote = _sentence(err).rstrip("."), None, [], None
        licenses, sizes, access = look_at_components(config, api if alone is None else None)
        combined = check(licenses, commercial, override_licenses, license)
        made = Path(scratch) / "made"
        files, notices = collect(directory, made, config, tokenizer, token, offline=alone is not None)
        notices += [*access, *(f"Overridden: {conflict}" for conflict in combined.conflicts)]
        notices += [f"The licence of component {name!r} is unknown: {licenses[name]}." for name in combined.unknown]
        weights = _weights(files.values(), config, sizes)
        facts = CardFacts(repo_id, licenses, license, *weights, access, list(datasets), list(tags), combined)
        notices += write_card(directory, made, facts, choose(_read(directory / "README.md"), remote, card))
        notices += _write_results(directory, made, repo_id, api) if alone is None else []
        files.update({path.relative_to(made).as_posix(): path for path in made.rglob("*") if path.is_file()})
        check_no_tokens(files, token)
        if alone is None:
            _validate((made / "README.md").read_text(encoding="utf-8"))
        else:
            notices.append(
                f"The Hub does not answer ({alone}): it was not checked what {repo_id} holds, whether all can read the "
                "components, and whether the card is valid; licences are those that the hybrid records."
            )
        listed = {name: files[name].stat().st_size for name in sorted(files)}
        deleted = sorted(name for name in present if REPLACED.fullmatch(name) and name not in files)
        out = Published(repo_id, listed, deleted, facts.referenced_bytes, notices)
        if not dry_run:
            _commit(api, out, files, head, private, revision, create_pr, commit_message or "Publish hybrid")
            if not isinstance(model, PreTrainedModel) and revision is None and not create_pr:
                notices += _keep_card(made / "README.md", Path(model))
    return out


def update_card(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    token: str | bool | None = None,
    license: str | None = None,
    tags: list | tuple = (),
    datasets: list | tuple = (),
) -> None:
    """Writes the card of a saved hybrid into its directory, updating the one that is there or on the Hub.

    Args:
        directory: Where the hybrid is.
        repo_id: Repository that it is for.
        token, license, tags, datasets: As for `publish`.

    Raises:
        ManticoreError: The Hub cannot be asked, or the present card cannot be read.
    """
    directory, api = Path(directory), HfApi(token=token)
    check_links(directory)
    with explained(repo_id):
        config = ManticoreConfig.from_pretrained(directory)
        licenses, sizes, access = look_at_components(config, api)
        weights = _weights(directory.glob("model*.safetensors"), config, sizes)
        facts = CardFacts(repo_id, licenses, license, *weights, access, list(datasets), list(tags))
        present = choose(_read(directory / "README.md"), _target(api, repo_id, None, token)[2])
    for notice in write_card(directory, directory, facts, present):
        logger.warning(notice)


def look_at_components(config: ManticoreConfig, api: HfApi | None) -> tuple[dict, dict, list[str]]:
    """What a publisher has to know of the components' repositories.

    Args:
        config: The hybrid's configuration.
        api: HfApi; None: nothing is asked, and what the configuration says is all.

    Returns:
        ({component: licence or None}, {referenced component: bytes of its files}, sentences on who can read them).

    Raises:
        ManticoreError: A referenced component is not there, or its revision is no commit.
    """
    licenses, sizes, access = {}, {}, []
    for entry in config.components:
        licenses[entry["name"]] = entry["license"]
        if entry["repo_id"] is None or api is None:
            continue
        reference = entry["weights"] == "reference"
        try:
            info = api.model_info(entry["repo_id"], revision=entry["revision"], files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError) as err:
            if not reference:
                continue
            raise ManticoreError(
                f"{where(entry)}: the Hub has no such repository or commit that your token opens, so nobody could load "
                "the hybrid. Embed the component's weights instead (ComponentSpec(..., embed=True))."
            ) from err
        except HfHubHTTPError as err:
            raise ManticoreError(
                f"{where(entry)}: nothing was published, since the Hub does not say whether anybody could load it: "
                f"{hub_reason(err, entry['repo_id'])}"
            ) from err
        if entry["license"] is None:
            with contextlib.suppress(HTTPError, LocalEntryNotFoundError):  # no card, behind a gate, or not now
                path = hf_hub_download(entry["repo_id"], "README.md", revision=entry["revision"], token=api.token)
                licenses[entry["name"]] = read_license(path)
        if reference:
            folder = f"{entry['subfolder']}/" if entry["subfolder"] else ""
            wanted = {folder + name for name in entry["files"] or ()}
            sizes[entry["name"]] = sum(file.size or 0 for file in info.siblings if file.rfilename in wanted)
            if info.private or info.gated:
                kind = "private" if info.private else "gated"
                access.append(
                    f"{entry['repo_id']} is {kind}: only who has access to it, and is logged in, can load this hybrid."
                )
    return licenses, sizes, access


def write_card(directory: Path, made: Path, facts: CardFacts, present: str | None) -> list[str]:
    """Writes README.md, its pictures and, where no single licence covers all, the licence file to `made`.

    Args:
        directory: Where the hybrid is.
        made: Directory for the files.
        facts: CardFacts.
        present: Text of the card that this one updates, or None.

    Returns:
        Sentences for the publisher.
    """
    from manticore_hf.utils.plots import plot_differences, plot_mixture

    card, license_text, alpha, notices = make_card(directory, facts)
    text, kept = merge(card, present)
    made.mkdir(parents=True, exist_ok=True)
    (made / "README.md").write_text(text, encoding="utf-8")
    if license_text is not None:
        (made / LICENSE_FILE).write_text(license_text, encoding="utf-8")
    config = ManticoreConfig.from_pretrained(directory)
    if alpha is not None and not one_gate(config):
        plot_mixture(alpha, config.component_names, made / "plots" / "mixture.png")
    for number, result in enumerate(shown_results(directory)[0], 1):
        if result.differences:
            rows = [
                {"name": name, "kind": "baseline", "difference": gain, "difference_interval": ends}
                for name, (gain, *ends) in result.differences.items()
            ]
            path = made / "plots" / f"results_{number}.png"
            plot_differences(rows, result.own, path, unit="bits per byte")
    return notices + kept


def _write_results(directory, made, repo_id, api):
    """Writes the results that the card shows as the Hub's pages read them; returns sentences for the publisher."""
    text, notices = eval_results(directory, shown_results(directory)[0], repo_id, api)
    if text is not None:
        (made / EVAL_RESULTS).parent.mkdir(parents=True, exist_ok=True)
        (made / EVAL_RESULTS).write_text(text, encoding="utf-8")
    return notices


def _weights(paths, config, sizes):
    """(bytes of own weights, bytes that stay elsewhere, names of the referenced components that were changed)."""
    own = own_weights(paths, config.component_names)
    elsewhere = 0
    for name, size in sizes.items():
        unused, table = _tables(config, name)
        read, changed = size * (1 - unused), own[name] - table
        # What was changed is here after all; the last few bytes of a file are its header.
        elsewhere += round(read - changed) if changed < 0.95 * read else 0
    return sum(own.values()), elsewhere, {name for name in sizes if own[name]}


def _tables(config, name):
    """Share of a component's checkpoint that nobody reads because its vocabulary was transplanted; bytes of the new."""
    entry = next(entry for entry in config.components if entry["name"] == name)
    if entry["transplant"] is None:
        return 0.0, 0
    with torch.device("meta"):
        part = build_component(f"Component {name!r}", copy.deepcopy(getattr(config, name)))
    whole, keys = sum(one.numel() for one in part.parameters()), end_names(part)
    ends = sum(one.numel() for key, one in part.named_parameters() if key in keys)
    table = ends * entry["transplant"]["vocab_size"] / part.get_input_embeddings().weight.shape[0]
    return table / (whole - ends + table), ends * (config.dtype or torch.float32).itemsize


def _validate(text):
    """Raises ManticoreError if the Hub, or its client, would refuse a card."""
    try:
        ModelCard(text).validate()
    except (ValueError, TypeError, LookupError, AttributeError) as err:  # its keys and values may be anyone's
        reason = " ".join(str(err).split())
        raise ManticoreError(f"The metadata of README.md is invalid: {reason} Repair them.") from err


def _directory(model, scratch):
    """The directory of a hybrid, saved first if it is an instance."""
    if isinstance(model, PreTrainedModel):
        if getattr(model.config, "model_type", None) != ManticoreConfig.model_type:
            raise ManticoreError(f"A {type(model).__name__} is not a hybrid; publish it with its own push_to_hub.")
        model.save_pretrained(scratch)
        return scratch
    if hasattr(model, "peft_config"):
        raise ManticoreError(
            f"A {type(model).__name__} holds an adapter: publish that with its own push_to_hub, or the hybrid with it "
            "merged in (model.merge_and_unload())."
        )
    directory = Path(model)
    if not (directory / "config.json").is_file():
        raise ManticoreError(f"{str(model)!r} has no config.json: give a hybrid, or the directory of a saved one.")
    check_whole(directory)
    if (kind := model_type_of(directory)) != ManticoreConfig.model_type:
        raise ManticoreError(f"{str(model)!r} holds a model of type {kind!r}, no hybrid; publish it with hf upload.")
    return directory


def _with_recipe(directory, recipe, copy):
    """A directory that looks like the given one, with another recipe."""
    if not Path(recipe).is_file():
        raise ManticoreError(f"recipe={str(recipe)!r}: there is no such file.")
    copy.mkdir()
    for path in directory.iterdir():
        if path.name != "recipe.yaml":
            (copy / path.name).symlink_to(path.resolve())
    shutil.copyfile(recipe, copy / "recipe.yaml")
    return copy


def _target(api, repo_id, revision, token):
    """(commit that a new one follows or None, files there, text of the card there or None)."""
    info = None
    for at in dict.fromkeys((revision, None)):  # a branch that is not there yet starts from main
        try:
            info = api.model_info(repo_id, revision=at)
            break
        except RevisionNotFoundError:
            continue
        except RepositoryNotFoundError:
            return None, [], None
    files = [file.rfilename for file in info.siblings]
    if "config.json" in files:
        path = hf_hub_download(repo_id, "config.json", revision=info.sha, token=token)
        if '"manticore"' not in (_read(path) or ""):
            raise ManticoreError(f"{repo_id} holds a model that is not a hybrid; give another repository, or empty it.")
    if "README.md" not in files:
        return info.sha, files, None
    return info.sha, files, _read(hf_hub_download(repo_id, "README.md", revision=info.sha, token=token))


def _commit(api, out, files, head, private, revision, create_pr, message):
    if head is None:
        api.create_repo(out.repo_id, private=private)
        head = api.model_info(out.repo_id).sha
    elif private is not None and api.model_info(out.repo_id).private != private:
        out.notices.append(f"{out.repo_id} was there already and stays {'public' if private else 'private'}.")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(out.repo_id, branch=revision, revision=head, exist_ok=True)
    operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    operations += [CommitOperationDelete(name) for name in out.deleted]
    try:
        with unchanged(out.repo_id, "Publish again."):
            done = api.create_commit(
                out.repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
    except RuntimeError as err:  # so the client says that a large file did not arrive
        reason = " ".join(f"{err} {err.__cause__ or ''}".split())
        raise ManticoreError(f"{out.repo_id}: {_sentence(reason)} Nothing was committed; publish again.") from err
    out.commit, out.url = done.oid, done.pr_url if create_pr else f"{api.endpoint}/{out.repo_id}"


def _keep_card(card, directory):
    """Puts the published card beside the weights, so that the next one starts from it."""
    scratch = directory / ".README.md"
    try:
        shutil.copyfile(card, scratch)
        scratch.replace(directory / "README.md")
    except OSError as err:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        return [f"README.md was not written to {directory} ({err}); the next push starts from the Hub's."]
    return []


@contextlib.contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Context in which what the Hub or its client says is said as a ManticoreError."""
    try:
        yield
    except HFValidationError as err:
        raise ManticoreError(f"{repo_id!r} is not a repository id of the Hub ('you/name'): {err}") from err
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as err:
        status = getattr(getattr(err, "response", None), "status_code", None)
        remedy = "Nothing was committed unless the Hub's page of it says otherwise: look there, then publish again."
        if status in (401, 403):
            remedy = "Nothing was committed. Log in with a token that may write to it (`hf auth login`)."
        raise ManticoreError(f"{repo_id} was not published: {_sentence(err)} {remedy}") from err


def _sentence(said):
    """What others say, in one line that ends like a sentence, because another follows."""
    text = " ".join(str(said).split()) or type(said).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


@contextlib.contextmanager
def unchanged(repo_id: str, remedy: str) -> Iterator[None]:
    """Context of a commit on the head that was read; ManticoreError, with a remedy, if there is another by now."""
    try:
        yield
    except HfHubHTTPError as err:
        if getattr(err.response, "status_code", None) == 412:
            raise ManticoreError(
                f"{repo_id} was changed by someone else meanwhile; nothing was committed. {remedy}"
            ) from err
        raise


def _read(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as err:
        raise ManticoreError(f"{path} is not UTF-8 text ({err}); repair it.") from err


def print_published(out: "Published") -> None:
    """Prints what was published, or would be."""
    width = max(map(len, out.files))
    for name, size in out.files.items():
        print(f"  {name:{width}}  {size:>14,} bytes")
    for name in out.deleted:
        print(f"  {name:{width}}  {'removed':>14}")
    total, whole = sum(out.files.values()), sum(out.files.values()) + out.referenced_bytes
    saved = (
        f" Saved by referencing: {out.referenced_bytes:,} bytes of component weights are not uploaded "
        f"({out.referenced_bytes / whole:.1%} of the total)."
    )
    print(f"{len(out.files)} files, {total:,} bytes.{saved if out.referenced_bytes else ''}")
    for notice in out.notices:
        print(f"Note: {notice}", file=sys.stderr)
    if out.commit is None:
        print(f"Dry run: nothing was written to {out.repo_id}.")
    else:
        print(f"Published {out.repo_id}@{out.commit[:12]}: {out.url}")
