"""Components whose architecture is not Transformers' own: their repository's code, run only on request.

The request names the component. Its code is taken from its own repository, at the commit that its entry pins, and its
classes are registered with the Auto classes of this process; nothing else then treats such a component differently.
"""

import re

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .bounds_manticore import ManticoreError, check_component_name, check_reference, is_commit, show

CLASSES = ("AutoConfig", "AutoModelForCausalLM")

_registered = {}  # of this process, as the Auto classes' registers are: {model_type: (repo_id, commit, classes)}


def code_of(what, auto_map):
    """The classes that a repository's `auto_map` names, as an entry records them.

    Args:
        what: How a message calls the component.
        auto_map: What its config.json says, or what an entry recorded.

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


def trust(what, entry, model_type, token=None):
    """Runs a component's code and registers its classes.

    Args:
        what: How a message calls the component.
        entry: Its entry, with `repo_id`, `revision` (a commit) and `code`.
        model_type: What its configuration says.
        token: Of the Hub.

    Raises:
        ManticoreError: The code cannot be fetched or run, or another repository's code runs under the same model type.
    """
    source = (entry["repo_id"], entry["revision"], tuple(sorted(code_of(what, entry.get("code")).items())))
    if _registered.get(model_type) == source:
        return
    if model_type in _registered or model_type in CONFIG_MAPPING:
        raise ManticoreError(
            f"{what}: model_type {model_type!r} is taken in this process by other code "
            f"({'@'.join(_registered[model_type][:2]) if model_type in _registered else 'Transformers itself'}); load "
            "them in processes of their own."
        )
    if entry.get("subfolder"):
        raise ManticoreError(f"{what}: code in a subfolder ({entry['subfolder']!r}) is not supported.")
    try:
        config_class, model_class = (
            get_class_from_dynamic_module(
                entry["code"][key],
                entry["repo_id"],
                revision=entry["revision"],
                code_revision=entry["revision"],
                token=token,
            )
            for key in CLASSES
        )
        AutoConfig.register(model_type, config_class)
        AutoModelForCausalLM.register(config_class, model_class)
    except Exception as err:  # it is a stranger's code
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise ManticoreError(f"{what}: its code cannot be run: {reason[:1000]}") from err
    _registered[model_type] = source


def run_trusted(names, values):
    """Runs the code of the components that a caller trusts.

    Args:
        names: Their names, or one.
        values: What a hybrid's config.json says.

    Raises:
        ManticoreError: A name is no component with code of its own, or its code is not pinned or cannot be run.
    """
    entries = values.get("components") if isinstance(values.get("components"), list) else []
    entries = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
    found = {entry["name"]: entry for entry in entries if entry.get("code") is not None}
    for name in [names] if isinstance(names, str) else names:
        if name not in found:
            raise ManticoreError(f"trust_component_code: {show(name)} is no component that needs code of its own.")
        entry = found[name]
        address = [entry.get(key) for key in ("repo_id", "revision", "subfolder", "files")]
        check_component_name(name)
        check_reference(name, *address)
        if not is_commit(entry.get("revision")):
            raise ManticoreError(
                f"Component {name!r}: its code must be pinned by a commit, not {entry.get('revision')!r}."
            )
        sub = entry.get("config") or values.get(name)
        trust(f"Component {name!r}", entry, sub.get("model_type") if isinstance(sub, dict) else None)


def registered():
    """The model types that code of components was registered for in this process."""
    return set(_registered)


def require(name, entry, values):
    """Raises ManticoreError if a component needs code that was not asked for.

    Args:
        name: The component.
        entry: Its entry.
        values: Its configuration as a dict.
    """
    kind, what = values.get("model_type"), f"Component {name!r}"
    if entry.get("code") is None:
        if isinstance(kind, str) and kind in _registered:
            raise ManticoreError(f"{what} has model_type={kind!r}: here that is another component's own code.")
        return
    code = code_of(what, entry["code"])
    source = (entry.get("repo_id"), entry.get("revision"), tuple(sorted(code.items())))
    if not isinstance(kind, str) or _registered.get(kind) != source:
        files = ", ".join(sorted({value.split(".")[0] + ".py" for value in code.values()}))
        raise ManticoreError(
            f"{what} needs code of its own repository, which runs only if you ask for it: read {files} in {source[0]} "
            f"at commit {source[1]}, then load with trust_component_code=[{name!r}]."
        )
