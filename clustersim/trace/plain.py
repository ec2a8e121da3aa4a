"""JSON text of plain values: the same value gives the same text, and nothing in it is NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clustersim.errors import ResultError


def plain(value: Any) -> Any:
    """The value in JSON's own types.

    value    mappings, sequences, numpy arrays and numbers, text
    Returns  dict, list, str, int, float, bool or None; what is not finite becomes None
    Raises   TypeError for anything else
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def json_text(value: Any) -> str:
    """The value as JSON for people and machines: two spaces of indent, keys in their order."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_regular(path: Path) -> None:
    """Raises ResultError where something else than a file lies: of a pipe or device reading never ends."""
    if path.exists() and not path.is_file():
        raise ResultError(f"{path}: damaged: not a regular file")


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The table of values in a JSON file.

    missing  what to say if there is no such file
    Raises   ResultError if there is none, or it is damaged
    """
    check_regular(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultError(f"{path}: {missing}") from None
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: damaged: {error}") from error
    if not isinstance(values, dict):
        raise ResultError(f"{path}: damaged: not a table of values")
    return values
