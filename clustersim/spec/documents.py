"""TOML files (and JSON ones) as trees that remember where each value was written.

Files extend and refer to one another, so a value of the resolved scenario may stand in any of
several files, or on the command line. Every table and every other value carries its origin, and a
mistake found late can still name the file, the key path there and the line.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from clustersim.spec.positions import line_of

#: Largest file that is read, bytes. A topology vertex by vertex of 100 000 GPUs fits.
LARGEST_FILE = 16 * 2**20

#: What is said of a file that is not there.
NO_FILE = "there is no such file"

Key: TypeAlias = str | int
KeyPath: TypeAlias = tuple[Key, ...]


class DocumentError(Exception):
    """A file that could not be read or is not TOML: what is wrong, and on which line."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


@dataclass(frozen=True, slots=True)
class Document:
    """One text that values come from.

    shown         its name in messages
    folder        where its relative references start
    text          its bytes, for line numbers
    command_line  it is not a file but an option, which has no lines
    """

    shown: str
    folder: Path
    text: bytes = b""
    command_line: bool = False


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: the document and the key path in it."""

    document: Document
    path: KeyPath

    def under(self, *keys: Key) -> Origin:
        """The origin of what lies below."""
        return Origin(self.document, (*self.path, *keys))

    def line(self) -> int | None:
        """1-based line, or None where the document has no lines or does not have the key."""
        return None if self.document.command_line else line_of(self.document.text, self.path)


@dataclass(frozen=True, slots=True)
class Finding:
    """A mistake before it is worded for the user.

    line   where it is known already; otherwise the origin is looked up
    """

    origin: Origin
    problem: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Leaf:
    """Anything but a table; a list is one leaf, because lists replace each other whole."""

    value: Any
    origin: Origin


@dataclass(frozen=True, slots=True)
class Table:
    """A TOML table.

    replaces  it stands for itself when laid over another: it came from a name, a file or `from`
    """

    children: Mapping[str, Node]
    origin: Origin
    replaces: bool = False


Node: TypeAlias = Leaf | Table


def values_of(text: str) -> dict[str, Any]:
    """The values of a TOML text that we wrote ourselves, such as a result's scenario.

    Raises   DocumentError when it is not TOML
    """
    try:
        return tomllib.loads(text)
    except (RecursionError, ValueError) as error:
        raise DocumentError(f"is not TOML: {error}") from None


def read_document(path: Path, shown: str) -> tuple[Document, dict[str, Any]]:
    """A TOML file's text and values.

    Raises   DocumentError when it cannot be read, is too large, or is not TOML
    """
    text = read_bytes(path)
    document = Document(shown, path.parent, text)
    try:
        return document, tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        raise DocumentError("is not UTF-8 text", text[: error.start].count(b"\n") + 1) from None
    except RecursionError:
        raise DocumentError("is nested too deeply") from None
    except ValueError as error:
        raise _syntax_error(str(error), text) from None


def read_json(path: Path, shown: str) -> tuple[Document, dict[str, Any]]:
    """A JSON object's values. The document has no lines: they are looked up in TOML only.

    Raises   DocumentError when it cannot be read, is too large, or is not a JSON object
    """
    text = read_bytes(path)
    try:
        values = json.loads(text)
    except RecursionError:
        raise DocumentError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DocumentError(f"is not valid JSON: {error.msg}", error.lineno) from None
    except ValueError:  # not UTF-8, or a number of too many digits
        raise DocumentError("is not valid JSON") from None
    if not isinstance(values, dict):
        raise DocumentError("is JSON but not an object")
    return Document(shown, path.parent), values


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises DocumentError as above."""
    try:
        if not path.exists():
            raise DocumentError(NO_FILE)
        if not path.is_file():
            raise DocumentError("is not a file")
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise DocumentError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > LARGEST_FILE:
        raise DocumentError(f"is larger than {LARGEST_FILE // 2**20} MiB")
    return text.removeprefix(b"\xef\xbb\xbf")  # some editors put a byte order mark first


_PLACE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")


def _syntax_error(message: str, text: bytes) -> DocumentError:
    match = _PLACE.search(message)
    if match is None:
        return DocumentError(f"is not valid TOML: {message}")
    line = int(match[1]) if match[1] else max(text.count(b"\n") + (not text.endswith(b"\n")), 1)
    return DocumentError(f"is not valid TOML: {message[: match.start()]}", line)


def tree(values: Mapping[str, Any], origin: Origin) -> Table:
    """What tomllib gave, with origins."""
    return Table({key: _node(child, origin.under(key)) for key, child in values.items()}, origin)


def _node(value: object, origin: Origin) -> Node:
    return tree(value, origin) if isinstance(value, dict) else Leaf(value, origin)


def plain(node: Node) -> Any:
    """The values alone, as nested dictionaries."""
    if isinstance(node, Leaf):
        return node.value
    return {key: plain(child) for key, child in node.children.items()}


def overlay(below: Node | None, above: Node) -> Node:
    """`above` laid over `below`: tables merge key by key, everything else replaces."""
    if not isinstance(below, Table) or not isinstance(above, Table) or above.replaces:
        return above
    children = dict(below.children)
    for key, child in above.children.items():
        children[key] = overlay(children.get(key), child)
    # An option adds to a table of the file: what is missing there is still missing in the file.
    origin = below.origin if above.origin.document.command_line else above.origin
    return Table(children, origin, below.replaces)


def origin_of(root: Node, path: KeyPath) -> Origin:
    """Where the value at a key path was written, or where a missing one would belong."""
    node = root
    for depth, key in enumerate(path):
        if isinstance(node, Leaf) or not isinstance(key, str) or key not in node.children:
            return node.origin.under(*path[depth:])
        node = node.children[key]
    return node.origin


_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dotted(path: KeyPath) -> str:
    """A key path as TOML would write it, list positions as numbers."""
    return ".".join(str(k) if isinstance(k, int) or _BARE.fullmatch(k) else f'"{k}"' for k in path)
