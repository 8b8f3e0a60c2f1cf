"""Components whose architecture is not Transformers' own: their code, from their repositories.

It is run only if the caller names the component, at the pinned commit; its classes are then registered with the Auto
classes of this process.
"""

import re

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .bounds_manticore import ManticoreError, check_reference, is_commit, reason, show

CLASSES = ("AutoConfig", "AutoModelForCausalLM")
_registered = {}  # of this process, as the Auto classes' registers are: {model_type: (repo_id, commit, classes)}


def code_of(what: str, auto_map: dict | None) -> dict:
    """The classes that an `auto_map`, of a config.json or an entry, names.

    Raises:
        ManticoreError: It names no such classes, or code of another repository, which no commit would pin.
    """
    code = {key: auto_map.get(key) for key in CLASSES} if isinstance(auto_map, dict) else {}
    for key in CLASSES:
        if not isinstance(code.get(key), str) or not re.fullmatch(r"\w+\.\w+", code[key]):
            raise ManticoreError(
                f"{what}: its code names {show(code.get(key))} as {key}; it must be a class in a file of its own "
                "repository ('modeling_x.XForCausalLM')."
            )
    return code


def _source(what, entry):
    return entry.get("repo_id"), entry.get("revision"), tuple(sorted(code_of(what, entry["code"]).items()))


def trust(what: str, entry: dict, model_type: str, token: str | bool | None = None) -> None:
    """Runs the code of the component of an entry (whose revision is a commit) and registers its classes.

    Raises:
        ManticoreError: The code cannot be fetched or run, or another repository's code runs under the same model type.
    """
    source = _source(what, entry)
    if _registered.get(model_type) == source:
        return
    if model_type in _registered or model_type in CONFIG_MAPPING:
        raise ManticoreError(
            f"{what}: model_type {model_type!r} is used in this process by other code "
            f"({'@'.join(_registered.get(model_type, ['Transformers itself'])[:2])}); load them in processes of their "
            "own."
        )
    if entry.get("subfolder"):
        raise ManticoreError(f"{what}: code in a subfolder ({entry['subfolder']!r}) is not supported.")
    try:
        pinned = {"revision": entry["revision"], "code_revision": entry["revision"], "token": token}
        classes = [get_class_from_dynamic_module(entry["code"][key], entry["repo_id"], **pinned) for key in CLASSES]
        AutoConfig.register(model_type, classes[0])
        AutoModelForCausalLM.register(*classes)
    except Exception as err:  # it is a stranger's code
        raise ManticoreError(f"{what}: its code cannot be run: {reason(err)}") from err
    _registered[model_type] = source


def run_trusted(names: str | list, values: dict) -> None:
    """Runs the code of the components of a hybrid's config.json that a caller trusts by name.

    Raises:
        ManticoreError: A name is no component with code of its own, or its code is not pinned or cannot be run.
    """
    entries = values.get("components") if isinstance(values.get("components"), list) else []
    entries = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
    found = {entry["name"]: entry for entry in entries if entry.get("code") is not None}
    for name in [names] if isinstance(names, str) else names:
        if name not in found:
            raise ManticoreError(f"trust_component_code: {show(name)} is not a component that needs code of its own.")
        entry = found[name]
        check_reference(name, *(entry.get(key) for key in ("repo_id", "revision", "subfolder")))
        if not is_commit(entry.get("revision")):
            raise ManticoreError(f"Component {name!r}: its code must be pinned by a commit, not {entry['revision']!r}.")
        sub = entry.get("config") or values.get(name)
        trust(f"Component {name!r}", entry, sub.get("model_type") if isinstance(sub, dict) else None)


def registered() -> set[str]:
    """The model types that code of components was registered for in this process."""
    return set(_registered)


def require(name: str, entry: dict, values: dict) -> None:
    """Raises ManticoreError if a component of this entry and configuration needs code that was not asked for."""
    kind, what = values.get("model_type"), f"Component {name!r}"
    if entry.get("code") is None:
        if isinstance(kind, str) and kind in _registered:
            raise ManticoreError(f"{what} has model_type={kind!r}: here that is another component's own code.")
        return
    repo, commit, code = source = _source(what, entry)
    if not isinstance(kind, str) or _registered.get(kind) != source:
        files = ", ".join(sorted({value.split(".")[0] + ".py" for _, value in code}))
        raise ManticoreError(
            f"{what} needs code of its own repository, which runs only if you ask for it: read {files} in {repo} at "
            f"commit {commit}, then load with trust_component_code=[{name!r}]."
        )
