"""Where each number of a catalogue entry comes from, read from its `source` and the remarks beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

#: Words by which sources and remarks own up that nobody stated the number.
_GUESS = re.compile(r"\b(?:guess(?:es|ed)?|assum\w+|unverified|from memory|for want of)\b", re.IGNORECASE)
_CLAUSE = re.compile(r"(\w+(?:, \w+)*): (.+)")
_SECTION = re.compile(r"\[(\w+)\]")
_REMARK = re.compile(r"""(\w+)\s*=(?:[^#"']|"[^"]*"|'[^']*')*\#\s*(.+)""")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one number comes from.

    text    the clause of the source that names it, else the whole source
    remark  the comment beside it in the catalogue file, or ""
    guess   whether either says that it is a guess, an assumption or unverified
    """

    text: str
    remark: str
    guess: bool


def origin_of(key: str, source: str, remark: str = "") -> Origin:
    """The origin of one key of an entry.

    source   clauses `key, key: text` with semicolons between them; what names no key speaks about all
    remark   the comment beside the key
    """
    named = _named(source).get(key)
    if named is not None:
        return Origin(named, remark, says_guess(f"{named} {remark}"))
    # A source in one piece flags only those of its numbers that it calls by name: "vocab assumed".
    about = " ".join(part for part in source.split("; ") if re.search(rf"\b{re.escape(key)}\b", part))
    return Origin(source, remark, says_guess(f"{about} {remark}"))


def keys_named(source: str) -> set[str]:
    """The keys that clauses of the source name."""
    return set(_named(source))


def says_guess(text: str) -> bool:
    """Whether a text calls what it speaks about a guess."""
    return _GUESS.search(text) is not None


@cache
def remarks(catalogue: str) -> Mapping[str, Mapping[str, str]]:
    """Entry → key → the comment at the end of its line.

    catalogue  "gpus", "servers" or "models"
    """
    text = resources.files("clustersim.catalogue").joinpath(f"{catalogue}.toml").read_text("utf-8")
    found: dict[str, dict[str, str]] = {}
    entry = ""
    for line in text.splitlines():
        if section := _SECTION.match(line):
            entry = section[1]
        elif beside := _REMARK.fullmatch(line):
            found.setdefault(entry, {})[beside[1]] = beside[2]
    return found


def _named(source: str) -> dict[str, str]:
    """Key → the text of the clause that names it."""
    clauses = [match for part in source.split("; ") if (match := _CLAUSE.fullmatch(part))]
    return {key: match[2] for match in clauses for key in match[1].split(", ")}
