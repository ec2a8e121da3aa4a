"""A scenario → its text with every default written out, and its hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from clustersim.spec.scenario import Scenario

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_WIDTH = 100


def to_toml(scenario: Scenario) -> str:
    """The scenario as TOML that refers to nothing: read from any folder, it gives an equal value.

    Quantities are written in SI units to the last digit; what is None is left out.
    """
    return write_toml(scenario.model_dump(exclude_none=True))


def write_toml(values: Mapping[str, Any]) -> str:
    """Nested dictionaries, lists, texts, numbers and truth values as a TOML document."""
    return "\n".join(_table((), values)).lstrip("\n") + "\n"


def scenario_hash(scenario: Scenario) -> str:
    """12 hexadecimal digits; equal scenarios have equal hashes."""
    values = _without_negative_zero(scenario.model_dump(mode="json", exclude_none=True))
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def toml_value(value: Any) -> str:
    """One value as TOML text, to be read back as it is."""
    return _inline(value)


def _without_negative_zero(value: Any) -> Any:
    """Minus zero equals zero but is written otherwise."""
    if isinstance(value, dict):
        return {key: _without_negative_zero(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_without_negative_zero(child) for child in value]
    return value + 0.0 if isinstance(value, float) else value


def _table(path: tuple[str, ...], values: Mapping[str, Any]) -> Iterator[str]:
    """Lines of one table: its own values first, because a header ends it."""
    own = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if path and (own or not values):
        yield ""
        yield f"[{'.'.join(map(_key, path))}]"
    for key, value in own.items():
        yield from _pair(key, value)
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _table((*path, key), value)


def _pair(key: str, value: Any) -> Iterator[str]:
    """One line, or one line per element where that would be long."""
    line = f"{_key(key)} = {_inline(value)}"
    if isinstance(value, (list, tuple)) and len(line) > _WIDTH:
        yield f"{_key(key)} = ["
        yield from (f"  {_inline(element)}," for element in value)
        yield "]"
    else:
        yield line


def _inline(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        pairs = ", ".join(f"{_key(key)} = {_inline(child)}" for key, child in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_inline, value))}]"
    return repr(value)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    """A basic string; JSON escapes the same characters the same way, but leaves DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
