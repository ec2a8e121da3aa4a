"""Pydantic's errors → plain sentences: what is wrong, what is allowed, which key is near."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from clustersim.errors import nearest
from clustersim.spec.documents import KeyPath
from clustersim.spec.hardware import Dragonfly, FatTree, Nvl72, RailFatTree, SingleServer, VertexByVertex
from clustersim.spec.references import SCENARIO, Kind
from clustersim.spec.scenario import Scenario

#: family name → the value it makes
FAMILIES: dict[str, type[BaseModel]] = {
    get_args(family.model_fields["family"].annotation)[0]: family
    for family in (SingleServer, RailFatTree, FatTree, Nvl72, Dragonfly, VertexByVertex)
}


def sentences(error: ValidationError, broken: Iterable[KeyPath]) -> list[tuple[KeyPath, str]]:
    """Every error as a key path of the scenario and a sentence.

    broken   paths below which a missing key is only the consequence of a reference that led nowhere
    """
    roots = tuple(broken)
    details = [d for d in error.errors(include_url=False) if not _follows(d, roots)]
    missing: dict[KeyPath, list[str]] = {}  # table → its missing keys
    for detail in details:
        if detail["type"] == "missing":
            *table, key = _path(detail)
            missing.setdefault(tuple(table), []).append(str(key))
    found: list[tuple[KeyPath, str]] = []
    for detail in details:
        if detail["type"] == "extra_forbidden":
            found.append((_path(detail), _unknown(detail, missing.get(_path(detail)[:-1], []))))
        elif detail["type"] != "missing":
            found.append((_path(detail), _sentence(_path(detail), detail)))
    for detail in details:
        *table, key = _path(detail)
        if detail["type"] == "missing" and str(key) in missing[tuple(table)]:
            found.append((_path(detail), _missing(_path(detail))))
    return found


def entry_sentences(error: ValidationError) -> list[tuple[KeyPath, str]]:
    """Every error of a catalogue entry as a key path in it and a sentence."""
    plain = {"missing": "missing key", "extra_forbidden": "unknown key"}
    return [(d["loc"], plain.get(d["type"]) or _sentence(d["loc"], d)) for d in error.errors()]


def _follows(detail: ErrorDetails, broken: Sequence[KeyPath]) -> bool:
    """Whether an error is only the consequence of one that is told elsewhere."""
    path = _path(detail)
    if detail["type"] == "too_short":
        # Pydantic counts the elements that were right; the wrong ones have errors of their own.
        wanted: int = detail["ctx"]["min_length"]
        return len(detail["input"]) >= wanted
    absent = detail["type"] in ("missing", "union_tag_not_found")
    return absent and any(path[: len(root)] == root for root in broken)


def _path(detail: ErrorDetails) -> KeyPath:
    """The key path; pydantic puts the family's name between `topology` and its keys."""
    loc = detail["loc"]
    return (loc[0], *loc[2:]) if loc[:1] == ("topology",) and len(loc) > 1 else loc


def _unknown(detail: ErrorDetails, missing: list[str]) -> str:
    """An unknown key; a near key that is missing beside it is told here and struck off the list."""
    key = str(detail["loc"][-1])
    twin = next((name for name in missing if nearest(key, [name])), None)
    if twin:
        missing.remove(twin)
        return f'unknown key, and "{twin}" is missing: did you mean that?'
    known = _keys_beside(detail["loc"])
    return f"unknown key{nearest(key, known) or _listed(known)}"


def _listed(known: Sequence[str]) -> str:
    return f"; known here are {', '.join(known)}" if known else ""


def _missing(path: KeyPath) -> str:
    if path in (("deployment",), ("workload",)):
        return "missing table"
    if isinstance(path[-1], int):
        return "missing list element"
    return f"missing key; it must be {_kind(path)}" if path[-1] in _REFERRED else "missing key"


def _kind(path: KeyPath) -> str:
    kind: Kind | None = SCENARIO
    for key in path:
        kind = kind.nested.get(str(key)) if kind else None
    return kind.wanted if kind else "a table"


def _sentence(path: KeyPath, detail: ErrorDetails) -> str:
    context: Mapping[str, Any] = detail.get("ctx", {})
    wanted = _WANTED.get(detail["type"])
    if wanted:
        return f"must be {wanted}, not {shown(detail['input'])}"
    if detail["type"] in _TABLES:
        return f"must be {_kind(path)}, not {shown(detail['input'])}"
    if detail["type"] in _SENTENCES:
        return _SENTENCES[detail["type"]](detail["input"], context)
    return detail["msg"][:1].lower() + detail["msg"][1:]


def shown(value: object) -> str:
    """A value as TOML writes it, cut short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


_REFERRED = ("topology", "model", "server", "gpu")
_TABLES = ("model_type", "model_attributes_type", "dict_type")

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "finite_number": "a finite number",
}


def _not_allowed(value: object, names: Sequence[str]) -> str:
    near = nearest(value, names) if isinstance(value, str) else ""
    return f"{shown(value)} is not known{near}; allowed are {', '.join(names)}"


def _names(listed: str) -> list[str]:
    return listed.replace(" or ", ", ").replace("'", "").split(", ")


_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9_-]*$": 'letters, digits, "_" and "-", and must start with a letter or digit',
    r"^[A-Za-z0-9_.:/-]+$": "letters, digits and _ . : / -",
}

_SENTENCES: dict[str, Callable[[Any, Mapping[str, Any]], str]] = {
    "value_error": lambda value, ctx: str(ctx["error"]),
    "literal_error": lambda value, ctx: _not_allowed(value, _names(ctx["expected"])),
    "union_tag_invalid": lambda value, ctx: (
        f"its family {_not_allowed(value.get('family'), _names(ctx['expected_tags']))}"
    ),
    "union_tag_not_found": lambda value, ctx: f"its family is missing; allowed are {', '.join(FAMILIES)}",
    "greater_than_equal": lambda value, ctx: f"{shown(value)} is too small; at least {ctx['ge']} is allowed",
    "greater_than": lambda value, ctx: f"{shown(value)} is too small; it must be more than {ctx['gt']}",
    "less_than_equal": lambda value, ctx: f"{shown(value)} is too large; at most {ctx['le']} is allowed",
    "less_than": lambda value, ctx: f"{shown(value)} is too large; it must be less than {ctx['lt']:g}",
    "string_too_short": lambda value, ctx: "must not be empty",
    "string_too_long": lambda value, ctx: f"is too long; at most {ctx['max_length']} characters are allowed",
    "string_pattern_mismatch": lambda value, ctx: (
        f"{shown(value)} may hold only {_PATTERNS.get(ctx['pattern'], ctx['pattern'])}"
    ),
    "too_short": lambda value, ctx: f"holds too little; at least {ctx['min_length']} must be there",
    "too_long": lambda value, ctx: f"holds too much; at most {ctx['max_length']} may be there",
}


def _keys_beside(loc: Sequence[str | int]) -> list[str]:
    """The known keys of the table that holds the last key of a pydantic location."""
    here: Any = Scenario
    for key in loc[:-1]:
        here = _below(here, key)
    return list(here.model_fields) if _is_value(here) else []


def _below(here: Any, key: str | int) -> Any:
    """The type below a key, a position, or a family's name."""
    if key in FAMILIES and not _is_value(here):
        return FAMILIES[str(key)]
    if _is_value(here):
        return _bare(here.model_fields[str(key)].annotation)
    return _bare(get_args(here)[-1 if isinstance(key, str) else 0]) if get_args(here) else None


def _bare(annotation: Any) -> Any:
    """Without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return _bare(options[0]) if len(options) == 1 else annotation
    return None if get_origin(annotation) is Literal else annotation


def _is_value(here: Any) -> bool:
    return isinstance(here, type) and issubclass(here, BaseModel)
