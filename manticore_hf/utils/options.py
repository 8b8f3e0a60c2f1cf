"""Options of a command line: from the fields of dataclasses, with hyphens, and mistakes said in one sentence.

Imports neither torch nor Transformers: a command's help is printed before they are.
"""

import argparse
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from manticore_hf.modeling.settings_manticore import ManticoreError
from manticore_hf.utils.renamed import warn_renamed


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for options with hyphens.

    The form with underscores is taken, too, without a word (`--output_dir`, as Transformers writes it). Options are not
    abbreviated: TrainingArguments has so many that what is unique today is not tomorrow. A mistake is one sentence on
    stderr and exit status 2.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As in argparse, but that an unknown option is answered with the one it may have been meant for."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [one for one in self._option_string_actions if one.startswith("--")]
            close = difflib.get_close_matches(name, known, 1) if name.startswith("--") else []
            hint = f" (did you mean {close[0]}?)" if close else ""
            self.error(f"there is no option {name}{hint}" if name.startswith("-") else f"{name!r} is one too many")
        return found

    def parse_known_args(
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in argparse; what was given under old names is what the new ones stand for."""
        args = self._hyphened(args)
        found, unknown = super().parse_known_args(args, namespace)
        given = {arg.partition("=")[0] for arg in args[: args.index("--") if "--" in args else None]}
        for old in [one for one in self._actions if isinstance(one, Renamed) and hasattr(found, one.dest)]:
            new, value = self._option_string_actions[old.new], vars(found).pop(old.dest)
            if given.intersection(new.option_strings) and (said := getattr(found, new.dest)) != value:
                self.error(f"{old.new} ({said}) and, by its old name, {old.dest} ({value}) are given; drop {old.dest}")
            setattr(found, new.dest, value)
        return found, unknown

    def _hyphened(self, args):
        out, rest = [], False
        for arg in args:
            rest = rest or arg == "--"  # what follows is no option
            name, equals, value = arg.partition("=")
            if not rest and name.startswith("--") and "_" in name:
                hyphened = name.replace("_", "-")
                arg = f"{hyphened}{equals}{value}" if hyphened in self._option_string_actions else arg
            out.append(arg)
        return out

    def error(self, message: str) -> typing.NoReturn:
        """Ends the process with exit status 2 and one sentence."""
        self.exit(2, f"{self.prog}: {message.rstrip('.')}; `{self.prog} --help` lists the options.\n")


class HelpFormatter(argparse.HelpFormatter):
    """Help that ends with the default, where there is one and the text does not say it."""

    def _get_help_string(self, action):
        text = action.help or ""
        said = "default:" in text.lower() or "%(default)" in text
        if said or not action.option_strings or action.required:
            return text
        default = action.default
        if default in (None, argparse.SUPPRESS, False, (), []) or action.nargs == 0:
            return text
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        elif isinstance(default, float):
            default = f"{default:g}"
        return f"{text.rstrip('.')} (default: {str(default).replace('%', '%%')})"


class RawHelp(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The same, for a description whose line breaks stay."""


class Renamed(argparse.Action):
    """An option under its old name: taken for one release, with a warning, and not in the help.

    Args:
        new: The option's name now, in a `Parser`.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, new: str, **kwargs: Any):
        hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        super().__init__(option_strings, option_strings[0], **{**kwargs, **hidden})
        self.new = new

    def __call__(self, parser, namespace, values, option_string=None):
        warn_renamed(f"{parser.prog}: {option_string}", self.new)
        setattr(namespace, self.dest, values)


class RenamedSwitch(Renamed):
    """`Renamed` for an option that takes no value and stands for its `const`."""

    def __init__(self, option_strings: Sequence[str], dest: str, new: str, const: object = True, **kwargs: Any):
        super().__init__(option_strings, dest, new, nargs=0, const=const, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        super().__call__(parser, namespace, self.const, option_string)


def option(name: str) -> str:
    """The option of a field: "block_size" -> "--block-size"."""
    return f"--{name.replace('_', '-')}"


def add_fields(
    parser: argparse._ActionsContainer, cls: type, leave_out: Iterable[str] = (), switches: bool = False
) -> None:
    """Adds an option for every field of a dataclass, its help from `metadata["help"]`.

    Args:
        parser: A parser, or a group of one.
        cls: Dataclass whose fields are bool, int, float or str, one of them or None, tuples of one of them, or other
            containers (given as JSON). Fields without a default are required. Those with `choices` in their metadata
            show them, but leave the check to the dataclass; `metavar` there says what else to show for the value, and
            `old` under which name the option is taken, too, with a warning. Fields that a help names are shown as
            their options.
        leave_out: Names of fields that get none.
        switches: Whether the option of a bool takes no value; else it stands alone or with true or false.
    """
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init and field.name not in leave_out]
    shown = {one.name: option(one.name) for one in fields if "_" in one.name}  # without one it may be a word: "data"
    for field in fields:
        kind, many = _plain(hints[field.name])
        text = field.metadata["help"] + (" Default: the preset's." if field.metadata.get("preset") else "")
        text = re.sub(r"\w+", lambda found: shown.get(found[0], found[0]), text)
        about = {"help": text.replace("%", "%%"), "dest": field.name}
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            about["required"] = True
        else:
            about["default"] = field.default
        if field.metadata.get("choices"):
            about["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
        if "metavar" in field.metadata:
            about["metavar"] = field.metadata["metavar"]
        if kind is bool and switches:
            about["action"] = "store_true"
        elif kind is bool:  # as HfArgumentParser takes them
            about |= {"type": truth, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif kind is object and not many:
            about = {"metavar": "JSON", "action": _Json, **about}
        else:
            about |= {"type": str if kind is object else kind, "nargs": "+" if many else None}
        parser.add_argument(option(field.name), **about)
        if "old" in field.metadata:
            taken = {key: about[key] for key in ("type", "nargs", "const") if key in about}
            parser.add_argument(option(field.metadata["old"]), action=Renamed, new=option(field.name), **taken)


def from_namespace(cls: type, namespace: argparse.Namespace) -> Any:
    """The dataclass whose fields `add_fields` has added, from what was parsed; fields that were left out: the default.

    Raises:
        ManticoreError: Values that the dataclass does not take; Transformers raises many kinds of errors for them.
    """
    names = [field.name for field in dataclasses.fields(cls) if field.init and hasattr(namespace, field.name)]
    given = {name: getattr(namespace, name) for name in names}
    for name in names:
        if isinstance(given[name], list) and _plain(typing.get_type_hints(cls)[name])[1]:
            given[name] = tuple(given[name])
    try:
        return cls(**given)
    except ManticoreError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as err:
        raise ManticoreError(" ".join(str(err).split())) from err


def _plain(hint):
    """(type of one value, whether there are many): of `X | None` or `tuple[X, ...]` X, object of what is not plain."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [one for one in typing.get_args(hint) if one is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else object
    many = typing.get_origin(hint) is tuple
    hint = typing.get_args(hint)[0] if many else hint
    return (hint if hint in (bool, int, float, str) else object), many


def truth(text: str) -> bool:
    """A word for true or false, as HfArgumentParser reads it."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class _Json(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest, json.loads(values))
        except ValueError as err:
            raise ManticoreError(f"{self.dest}={values!r} is not JSON: {err}.") from None
