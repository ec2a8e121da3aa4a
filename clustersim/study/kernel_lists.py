"""Files that list kernels of any kind: each row names its kernel, and has its sizes in columns of their own.

The column `kernel` holds a kernel's name, and there is a column for every flag by which `clustersim price`
asks for one of these kernels, called as the flag: m, n, k, batch, kv_len or kv-len. Cells of flags that a
row's kernel does not have are empty, as are those of flags that it may leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError, nearest
from clustersim.physics.kernels import KERNELS
from clustersim.study.kernel_rows import (
    FORMATS,
    KEPT,
    MOST,
    MOST_EXPERTS,
    MissingColumn,
    Rows,
    gpus,
    libraries,
    line_of,
    shown,
)
from clustersim.study.measured import Table
from clustersim.study.price_flags import Flags, flags_of, one_call

#: What such a form is called.
LIST = "list of kernels"
#: Flags whose cells hold words, and what these may be.
_WORDS: Mapping[str, Mapping[str, str]] = {"dtype": FORMATS, "kv_dtype": KEPT, "weights_dtype": KEPT}


def list_columns() -> frozenset[str]:
    """Every column that such a file may have, with "-" and "_"."""
    flags = {_column(flag) for kernel in KERNELS for flag in _all(flags_of(kernel))}
    names = flags | {"kernel", "gpu", "framework"}
    return frozenset(names | {name.replace("_", "-") for name in names})


def is_list(table: Table) -> bool:
    """Whether the column `kernel` names kernels; in measured files it holds a remark, if it is there."""
    if "kernel" not in table:
        return False
    named = {_kernel(text) for text in table["kernel"].tolist()} & set(KERNELS)
    return bool(named) or not any(name in table for name in ("num_heads", "phase", "batch_size"))


def list_rows(table: Table) -> list[Rows]:
    """The calls of a list, kernel by kernel.

    Raises   ClustersimError with the line of a wrong row
    """
    called = {_column(name): name for name in table}
    twice = set(table) - set(called.values())
    if twice:
        raise ClustersimError(f'there are a column "{min(twice)}" and one "{called[_column(min(twice))]}"')
    table = {_column(name): values for name, values in table.items()}
    names = [_kernel(text) for text in table["kernel"].tolist()]
    for place, name in enumerate(names):
        if name not in KERNELS:
            raise ClustersimError(
                f"line {line_of(place, None)}: kernel = {name or 'nothing'} is no kernel"
                f"{nearest(name, KERNELS)}; there are {', '.join(KERNELS)}"
            )
    column = np.array(names, dtype=str)
    return [_calls(table, name, np.flatnonzero(column == name)) for name in dict.fromkeys(names)]


def _calls(table: Table, kernel: str, at: np.ndarray) -> Rows:
    flags = flags_of(kernel)
    cells = {flag: _cells(table, kernel, flags, flag, at) for flag in _all(flags)}
    calls = []
    for place, values in enumerate(zip(*cells.values(), strict=True)):
        try:
            calls.append(one_call(flags, dict(zip(cells, values, strict=True))))
        except ClustersimError as error:
            raise ClustersimError(f"line {line_of(place, at)}: {error}") from error
    return Rows(
        file=LIST,
        kernel=kernel,
        gpu=gpus(table, at),
        library=libraries(table, at),
        format=np.array(cells["dtype"], dtype=str),
        columns={name: _stacked([call[name] for call in calls]) for name in calls[0]},
        measured=np.full(len(at), np.nan),
        row=at,
        left_out=np.full(len(at), ""),
    )


def _cells(table: Table, kernel: str, flags: Flags, flag: str, at: np.ndarray) -> list[Any]:
    """The values of a flag; its default where a cell is empty."""
    name = _column(flag)
    wanted = flag in flags.wanted
    if name not in table:
        if wanted:
            raise MissingColumn(name, header=table)
        return [flags.defaults[flag]] * len(at)
    texts = table[name][at].tolist()
    values: dict[Any, Any] = {}
    for place, text in enumerate(texts):
        if text in values:
            continue
        if text == "" or text != text:
            if wanted:
                raise ClustersimError(f"line {line_of(place, at)}: {name} is missing; {kernel} wants it")
            values[text] = flags.defaults[flag]
            continue
        found = _parsed(flags, flag, text)
        if found is None:
            raise ClustersimError(f"line {line_of(place, at)}: {name} = {shown(text)} {_wanted(flags, flag)}")
        values[text] = found
    # A gap among numbers is NaN, which is not its own key.
    return [values[text] if text == text else flags.defaults[flag] for text in texts]


def _parsed(flags: Flags, flag: str, text: Any) -> Any:
    """What a cell says, None if nothing that it may."""
    name = _column(flag)
    if name in _WORDS:
        return _WORDS[name].get(str(text).lower())
    if name == "distribution":
        return str(text).lower()
    if flag in flags.lists:
        parts = [_number(part, 0) for part in str(text).replace(";", ",").split(",")]
        return None if None in parts or len(parts) > MOST_EXPERTS else parts
    return _number(text, 0 if flag in flags.free else 1)


def _number(text: Any, least: int) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if least <= value <= MOST and value % 1 == 0 else None


def _wanted(flags: Flags, flag: str) -> str:
    words = _WORDS.get(_column(flag))
    if words is not None:
        return f"is no known dtype; there are {', '.join(words)}"
    if flag in flags.lists:
        return f'is no list of tokens of at most {MOST_EXPERTS:,} experts, such as "12;0;7"'
    return f"is not a whole number from {0 if flag in flags.free else 1} to {MOST:,}"


def _stacked(values: list[Any]) -> np.ndarray:
    """float64[N], or float64[N, g] of lists, shorter ones filled up with zeros."""
    if not isinstance(values[0], list | np.ndarray):
        return np.array(values, dtype=float)
    widest = max(len(value) for value in values)
    return np.array([[*value, *[0.0] * (widest - len(value))] for value in values], dtype=float)


def _all(flags: Flags) -> tuple[str, ...]:
    return (*flags.wanted, *flags.defaults)


def _column(flag: str) -> str:
    return flag.replace("-", "_")


def _kernel(text: Any) -> str:
    return str(text).strip().lower().replace("-", "_")
