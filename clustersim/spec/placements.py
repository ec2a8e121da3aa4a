"""Files that say which expert stands in which place of every layer.

A layer's row names the expert in each place, the places of EP rank 0 first: `phy2log` of EPLB,
`physical_to_logical_map` of SGLang. One row stands for all layers alike.

    TOML, JSON  layers = [[0, 1, 2, 3], [2, 0, 3, 1]]; of JSON physical_to_logical_map = ... as well
    CSV         layer,place,expert: one line per place, in any order
"""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from clustersim.spec.documents import DocumentError, KeyPath, Leaf, Node, Origin, Table
from clustersim.spec.references import Resolver

#: The key that names the file, and the one that holds what it says.
NAMED: KeyPath = ("deployment", "experts", "slots_file")
HELD = "slots_by_layer"

Rows: TypeAlias = list[list[Any]]

_KEYS = ("layers", "physical_to_logical_map")
_COLUMNS = ["layer", "place", "expert"]


def with_placement(root: Node, resolver: Resolver) -> Node:
    """The scenario with the rows of its placement file in the place of the file's name."""
    return _replaced(root, NAMED, resolver)


def _replaced(node: Node, path: KeyPath, resolver: Resolver) -> Node:
    if not isinstance(node, Table) or path[0] not in node.children:
        return node
    key, *rest = path
    assert isinstance(key, str)
    children = dict(node.children)
    if rest:
        children[key] = _replaced(children[key], tuple(rest), resolver)
        return replace(node, children=children)
    named = children[key]
    if not isinstance(named, Leaf) or not isinstance(named.value, str) or not named.value:
        return node  # no file; or the wrong type, which is told where types are
    found = resolver.data(named, NAMED, "a file of placements", READERS)
    if found is None:
        return node
    document, rows = found
    del children[key]
    children[HELD] = Leaf(rows, Origin(document, ("layers",)))
    return replace(node, children=children)


def _read_toml(text: bytes) -> Rows:
    try:
        return _rows(tomllib.loads(text.decode()))
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"is not valid TOML: {error}") from None


def _read_json(text: bytes) -> Rows:
    try:
        return _rows(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"is not valid JSON: {error}") from None


def _rows(values: object) -> Rows:
    held = values if isinstance(values, Mapping) else {}
    rows = next((held[key] for key in _KEYS if key in held), None)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise DocumentError("has no key layers with a list of expert ids per layer")
    return rows


def _read_csv(text: bytes) -> Rows:
    try:
        lines = list(csv.reader(text.decode().splitlines(), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DocumentError(f"is not a CSV file: {error}") from None
    if not lines or [name.strip() for name in lines[0]] != _COLUMNS:
        raise DocumentError(f"does not begin with the columns {','.join(_COLUMNS)}", 1)
    found: dict[int, dict[int, int]] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            layer, place, expert = (int(cell) for cell in line)
        except ValueError:
            raise DocumentError("is not three whole numbers: layer, place, expert", number) from None
        if place in found.setdefault(layer, {}):
            raise DocumentError(f"fills place {place} of layer {layer} again", number)
        found[layer][place] = expert
    numbered = {"layers": sorted(found)} | {f"places of layer {n}": sorted(row) for n, row in found.items()}
    for what, numbers in numbered.items():
        if numbers != list(range(len(numbers))):
            raise DocumentError(f"its {what} are not 0, 1, 2 and so on")
    return [[row[place] for place in range(len(row))] for _, row in sorted(found.items())]


#: Ending of the file's name → its bytes to rows.
READERS = {".toml": _read_toml, ".json": _read_json, ".csv": _read_csv}
