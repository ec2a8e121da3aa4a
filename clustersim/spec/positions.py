"""Key path → line of a TOML text; loaded only when a message needs it.

tomllib keeps no positions, so the text is parsed a second time with tree-sitter.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from tree_sitter import Node

Path: TypeAlias = tuple[str | int, ...]


def line_of(text: bytes, path: Path) -> int | None:
    """The 1-based line of a key, of the nearest table above it that is written out, or None.

    text   valid TOML
    path   keys, and positions in lists
    """
    lines = _lines(text)
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


@lru_cache(maxsize=4)
def _lines(text: bytes) -> dict[Path, int]:
    # Imported here because most runs never meet a mistake and should not pay for a second parser.
    import tree_sitter
    import tree_sitter_toml

    language = tree_sitter.Language(tree_sitter_toml.language())
    root = tree_sitter.Parser(language).parse(text).root_node
    lines: dict[Path, int] = {}
    for path, line in _walk(root):
        lines.setdefault(path, line)
    return lines


def _walk(root: Node) -> Iterator[tuple[Path, int]]:
    """Every key path with its line, in file order; a table's line is its first mention."""
    counts: dict[Path, int] = {}
    for part in root.named_children:
        if part.type == "pair":
            yield from _pair(part, ())
            continue
        if part.type not in ("table", "table_array_element"):
            continue
        path = _header(part, counts)
        yield from _prefixes((), path, part.start_point[0] + 1)
        for pair in part.named_children:
            if pair.type == "pair":
                yield from _pair(pair, path)


def _header(part: Node, counts: dict[Path, int]) -> Path:
    """The path of `[a.b]` or `[[a.b]]`; `counts` holds how many elements each array has so far."""
    keys = _keys(part.named_children[0])
    path: Path = ()
    for key in keys[:-1]:
        path = (*path, key)
        if path in counts:
            path = (*path, counts[path] - 1)
    path = (*path, keys[-1])
    if part.type == "table_array_element":
        counts[path] = counts.get(path, 0) + 1
        path = (*path, counts[path] - 1)
    return path


def _pair(pair: Node, above: Path) -> Iterator[tuple[Path, int]]:
    key, value = pair.named_children[0], pair.named_children[1]
    path = (*above, *_keys(key))
    yield from _prefixes(above, path, key.start_point[0] + 1)
    yield from _value(value, path)


def _value(value: Node, path: Path) -> Iterator[tuple[Path, int]]:
    if value.type == "inline_table":
        for pair in value.named_children:
            if pair.type == "pair":
                yield from _pair(pair, path)
    elif value.type == "array":
        items = [item for item in value.named_children if item.type != "comment"]
        for position, item in enumerate(items):
            yield (*path, position), item.start_point[0] + 1
            yield from _value(item, (*path, position))


def _prefixes(above: Path, path: Path, line: int) -> Iterator[tuple[Path, int]]:
    for length in range(len(above) + 1, len(path) + 1):
        yield path[:length], line


def _keys(key: Node) -> list[str]:
    """The parts of a bare, quoted or dotted key; tomllib knows the escapes."""
    table = tomllib.loads(f"{(key.text or b'').decode()} = 0")
    keys = []
    while isinstance(table, dict):
        [(name, table)] = table.items()
        keys.append(name)
    return keys
