"""Licences of components, what they oblige to, and the one licence a hybrid of them can carry.

A short table of the licences common on the Hub and a cautious reading of how they go together. **Not legal advice**: it
finds the plain cases, and says where a person has to look. A licence that is missing or not in the table is said to be
unknown, never guessed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from manticore_hf.hub.card_merge import split
from manticore_hf.modeling.configuration_manticore import ManticoreError

# What a licence asks of those who pass a work, or one made from it, on to others.
DUTIES = {
    "notice": "keep copyright and licence notices",
    "changes": "state what was changed",
    "share-alike": "pass it on under the same licence",
    "non-commercial": "no commercial use",
    "no-derivatives": "do not distribute modified versions",
    "use-restrictions": "pass on its use restrictions",
    "naming": "follow its rules on naming and attribution of derived models",
    "source": "make the source available",
}
MIXED = "mixed-component-licenses"


@dataclass(frozen=True)
class License:
    """One licence of the table.

    Args:
        id: The Hub's identifier, as in a card's `license:`.
        spdx: SPDX identifier, or None where SPDX has none.
        link: Where its text is.
        duties: Keys of `DUTIES`.
    """

    id: str
    spdx: str | None
    link: str
    duties: frozenset


def _table():
    spdx, cc = "https://spdx.org/licenses/", "https://creativecommons.org/licenses/"
    rows = [
        ("cc0-1.0", "CC0-1.0", "https://creativecommons.org/publicdomain/zero/1.0/", ""),
        ("unlicense", "Unlicense", f"{spdx}Unlicense.html", ""),
        ("wtfpl", "WTFPL", f"{spdx}WTFPL.html", ""),
        ("zlib", "Zlib", f"{spdx}Zlib.html", "notice changes"),
        ("mit", "MIT", f"{spdx}MIT.html", "notice"),
        ("isc", "ISC", f"{spdx}ISC.html", "notice"),
        ("bsd-2-clause", "BSD-2-Clause", f"{spdx}BSD-2-Clause.html", "notice"),
        ("bsd-3-clause", "BSD-3-Clause", f"{spdx}BSD-3-Clause.html", "notice"),
        ("bsl-1.0", "BSL-1.0", f"{spdx}BSL-1.0.html", "notice"),
        ("apache-2.0", "Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", "notice changes"),
        ("cdla-permissive-2.0", "CDLA-Permissive-2.0", f"{spdx}CDLA-Permissive-2.0.html", "notice"),
        ("cc-by-4.0", "CC-BY-4.0", f"{cc}by/4.0/", "notice changes"),
        ("cc-by-sa-4.0", "CC-BY-SA-4.0", f"{cc}by-sa/4.0/", "notice changes share-alike"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0", f"{cc}by-nc/4.0/", "notice changes non-commercial"),
        ("cc-by-nc-sa-4.0", "CC-BY-NC-SA-4.0", f"{cc}by-nc-sa/4.0/", "notice changes non-commercial share-alike"),
        ("cc-by-nd-4.0", "CC-BY-ND-4.0", f"{cc}by-nd/4.0/", "notice no-derivatives"),
        ("cc-by-nc-nd-4.0", "CC-BY-NC-ND-4.0", f"{cc}by-nc-nd/4.0/", "notice non-commercial no-derivatives"),
        ("gpl-2.0", "GPL-2.0-only", f"{spdx}GPL-2.0-only.html", "notice changes share-alike source"),
        ("gpl-3.0", "GPL-3.0-only", f"{spdx}GPL-3.0-only.html", "notice changes share-alike source"),
        ("lgpl-3.0", "LGPL-3.0-only", f"{spdx}LGPL-3.0-only.html", "notice changes share-alike source"),
        ("agpl-3.0", "AGPL-3.0-only", f"{spdx}AGPL-3.0-only.html", "notice changes share-alike source"),
        ("mpl-2.0", "MPL-2.0", f"{spdx}MPL-2.0.html", "notice share-alike source"),
        ("openrail", None, "https://www.licenses.ai/", "notice use-restrictions"),
        ("creativeml-openrail-m", None, "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
         "notice changes use-restrictions"),
        ("bigscience-openrail-m", None, "https://huggingface.co/spaces/bigscience/license",
         "notice changes use-restrictions"),
        ("bigscience-bloom-rail-1.0", None, "https://huggingface.co/spaces/bigscience/license",
         "notice changes use-restrictions"),
        ("bigcode-openrail-m", None, "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement",
         "notice changes use-restrictions"),
        ("llama2", None, "https://ai.meta.com/llama/license/", "notice use-restrictions"),
        ("llama3", None, "https://llama.meta.com/llama3/license/", "notice use-restrictions naming"),
        ("llama3.1", None, "https://www.llama.com/llama3_1/license/", "notice use-restrictions naming"),
        ("llama3.2", None, "https://www.llama.com/llama3_2/license/", "notice use-restrictions naming"),
        ("llama3.3", None, "https://www.llama.com/llama3_3/license/", "notice use-restrictions naming"),
        ("gemma", None, "https://ai.google.dev/gemma/terms", "notice changes use-restrictions"),
    ]  # fmt: skip
    return {row[0]: License(*row[:3], frozenset(row[3].split())) for row in rows}


LICENSES = _table()

_PUBLIC = {"cc0-1.0", "unlicense", "wtfpl"}
_SIMPLE = _PUBLIC | {"mit", "isc", "zlib", "bsl-1.0", "bsd-2-clause", "cdla-permissive-2.0"}
_PERMISSIVE = _SIMPLE | {"bsd-3-clause"}
# For each licence, those whose terms are met by whoever meets its own and keeps their notices.
_COVERS = {
    **{one: _PUBLIC - {one} for one in _SIMPLE},
    "bsd-3-clause": _SIMPLE,
    "apache-2.0": _PERMISSIVE,
    "cc-by-4.0": _PERMISSIVE,
    "cc-by-sa-4.0": _PERMISSIVE | {"cc-by-4.0"},
    "cc-by-nc-4.0": _PERMISSIVE | {"cc-by-4.0"},
    "cc-by-nc-sa-4.0": _PERMISSIVE | {"cc-by-4.0", "cc-by-nc-4.0"},
    "gpl-2.0": _PERMISSIVE,
    "mpl-2.0": _PERMISSIVE | {"apache-2.0"},
    "lgpl-3.0": _PERMISSIVE | {"apache-2.0"},
    "gpl-3.0": _PERMISSIVE | {"apache-2.0", "lgpl-3.0", "mpl-2.0", "cc-by-4.0", "cc-by-sa-4.0"},
    "agpl-3.0": _PERMISSIVE | {"apache-2.0", "lgpl-3.0", "mpl-2.0", "gpl-3.0"},
    **{one: _PERMISSIVE | {"apache-2.0"} for one in LICENSES if "use-restrictions" in LICENSES[one].duties},
}


@dataclass(frozen=True)
class Combined:
    """What follows from the components' licences.

    Args:
        license: The Hub's identifier for the hybrid: one of the components', or "other".
        name: With "other": what a card gives as `license_name`.
        conflicts: Sentences; with any of them the hybrid must not be published as things stand.
        unknown: Components whose licence is missing or not in the table.
        duties: Keys of `DUTIES` that any of the known licences imposes.
    """

    license: str
    name: str | None
    conflicts: tuple
    unknown: tuple
    duties: frozenset


def combine(licenses: Mapping[str, str | None], commercial: bool = False) -> Combined:
    """Finds the one licence that satisfies all components', and what stands against it.

    Args:
        licenses: `{component: licence id, or None where none is stated}`.
        commercial: Whether the hybrid is meant for commercial use.

    Returns:
        A Combined.
    """
    unknown = tuple(name for name, one in licenses.items() if one not in LICENSES)
    known = {name: LICENSES[one] for name, one in licenses.items() if one in LICENSES}
    conflicts = [
        f"{name} ({one.id}) may not be passed on in changed form."
        for name, one in known.items()
        if "no-derivatives" in one.duties
    ]
    if commercial:
        conflicts += [
            f"{name} ({one.id}) excludes commercial use."
            for name, one in known.items()
            if "non-commercial" in one.duties
        ]
    pairs = list(known.items())
    for at, (name, one) in enumerate(pairs):
        conflicts += [
            f"{name} ({one.id}) and {other} ({two.id}) {why}."
            for other, two in pairs[at + 1 :]
            if (why := _exclude(one, two))
        ]
    duties = frozenset().union(*(one.duties for one in known.values()))
    ids = {one.id for one in known.values()}
    fit = [one for one in ids if all(other == one or other in _COVERS.get(one, ()) for other in ids)]
    if unknown or conflicts or not fit:
        return Combined("other", MIXED, tuple(conflicts), unknown, duties)
    return Combined(min(fit), None, (), (), duties)


def _exclude(one, two):
    """Why two licences cannot both be met by one work, or None."""
    if one.id == two.id or two.id in _COVERS.get(one.id, ()) or one.id in _COVERS.get(two.id, ()):
        return None
    alike = [x for x in (one, two) if "share-alike" in x.duties]
    if len(alike) == 2:
        return "both ask to be passed on under themselves"
    if alike:
        other = two if alike[0] is one else one
        added = sorted(other.duties & {"non-commercial", "use-restrictions"})
        if added:
            return f"cannot be combined: {alike[0].id} allows no further restrictions, {other.id} has {added[0]}"
        if {one.id, two.id} == {"gpl-2.0", "apache-2.0"}:
            return "cannot be combined: gpl-2.0 excludes apache-2.0's patent terms"
    return None


def check(
    licenses: Mapping[str, str | None], commercial: bool = False, override: bool = False, chosen: str | None = None
) -> Combined:
    """`combine`, where a conflict raises.

    Args:
        licenses, commercial: As for `combine`.
        override: Return the conflicts instead of raising.
        chosen: The licence that the publisher wants for the hybrid, None for the one that follows.

    Returns:
        A Combined; its conflicts also say which licences `chosen` does not satisfy.

    Raises:
        ManticoreError: There is a conflict and it was not overridden.
    """
    found = combine(licenses, commercial)
    if chosen not in (None, "other", found.license):
        found = replace(found, conflicts=(*found.conflicts, *_uncovered(licenses, chosen)))
    if found.conflicts and not override:
        raise ManticoreError(
            f"The components' licences conflict: {' '.join(found.conflicts)} Choose other components, or, "
            "with permission, override this check explicitly (override_licenses=True, --override-licenses). This is "
            "not legal advice."
        )
    return found


def _uncovered(licenses, chosen):
    """Sentences on the licences that the one a publisher wants does not satisfy."""
    if chosen not in LICENSES:
        return [f"{chosen!r}, wanted for the hybrid, is not in the table, so it cannot be checked."]
    return [
        f"{name} ({one}) is not satisfied by {chosen}, which is wanted for the hybrid."
        for name, one in licenses.items()
        if one in LICENSES and one != chosen and one not in _COVERS.get(chosen, ())
    ]


def describe(found: Combined) -> str:
    """A Combined in a sentence or a few, with its conflicts, and that it is no legal advice."""
    duties = "; ".join(DUTIES[key] for key in sorted(found.duties)) or "nothing"
    if found.license == "other":
        said = "no single licence of the components satisfies all of them"
        if found.unknown:
            said = f"unknown for {', '.join(found.unknown)}, and therefore for the hybrid"
    else:
        said = found.license
    conflicts = "".join(f" CONFLICT: {sentence}" for sentence in found.conflicts)
    return f"{said}. Obligations of the known licences: {duties}.{conflicts} (Not legal advice.)"


def read_license(card: str | os.PathLike | None) -> str | None:
    """The licence that a model card's metadata state.

    Args:
        card: Path of the card, or None.

    Returns:
        The Hub's identifier, "other" being replaced by the name that it goes with; None where there is no card, no
        metadata that can be read, or no licence in them.
    """
    if card is None or not os.path.isfile(card):
        return None
    try:
        data = split(Path(card).read_text(encoding="utf-8"))[0]
    except (OSError, ValueError):  # whatever a stranger wrote there, a broken card is no reason not to use the model
        return None
    stated = data.get("license")
    if stated == "other":
        stated = data.get("license_name") or stated
    return stated_license(stated)


def stated_license(value: object) -> str | None:
    """What a file says under "license", None where that is not the short name of one."""
    return value if isinstance(value, str) and 0 < len(value) < 200 and value.isprintable() else None
