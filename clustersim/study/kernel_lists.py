"""Files that list kernels of any kind: each row names its kernel, and has its sizes in columns of their own.

The column `kernel` holds a kernel's name, and there is a column for every flag by which `clustersim price`
asks for one of these kernels, called as the flag: m, n, k, batch, kv_len or kv-len. Cells of flags that a
row's kernel does not have are empty, as are those of flags that it may leave out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clustersim.errors import ClustersimError, nearest
from clustersim.study.kernel_flags import FLAGS, Flags, Unfit, kernel_of, one_call, parsed
from clustersim.study.kernel_rows import BadRows, MissingColumn, Rows, gpus, libraries, shown
from clustersim.study.measured import Table

#: What such a form is called.
LIST = "list of kernels"


def list_columns() -> frozenset[str]:
    """Every column that such a file may have, with "-" and "_"."""
    flags = {_column(flag) for one in FLAGS.values() for flag in one.all()}
    names = flags | {"kernel", "gpu", "framework"}
    return frozenset(names | {name.replace("_", "-") for name in names})


def is_list(table: Table) -> bool:
    """Whether the column `kernel` names kernels; in measured files it holds a remark, if it is there."""
    if "kernel" not in table:
        return False
    named = {_kernel(text) for text in table["kernel"].tolist()} & set(FLAGS)
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
    strange = [name for name in names if name not in FLAGS]
    if strange:
        places = np.flatnonzero([name not in FLAGS for name in names])
        raise BadRows(
            places,
            f"kernel = {strange[0] or 'nothing'} is no kernel{nearest(strange[0], FLAGS)}; "
            f"there are {', '.join(FLAGS)}",
        )
    column = np.array(names, dtype=str)
    return [_calls(table, name, np.flatnonzero(column == name)) for name in dict.fromkeys(names)]


def _calls(table: Table, kernel: str, at: np.ndarray) -> Rows:
    flags = FLAGS[kernel]
    cells = {flag: _cells(table, kernel, flags, flag, at) for flag in flags.all()}
    calls = []
    for place, values in enumerate(zip(*cells.values(), strict=True)):
        one = dict(zip(cells, values, strict=True))
        try:
            calls.append(one_call(flags, one))
        except Unfit as error:
            raise BadRows(at[place : place + 1], error.said(one, _as_cell)) from None
    return Rows(
        file=LIST,
        kernel=kernel_of(kernel),
        gpu=gpus(table, at),
        library=libraries(table, at),
        format=np.array(cells["dtype"], dtype=str),
        columns={name: _stacked([call[name] for call in calls]) for name in calls[0]},
        measured=np.full(len(at), np.nan),
        row=at,
        left_out=np.full(len(at), ""),
    )


def _as_cell(flag: str, value: str) -> str:
    return f"{_column(flag)} = {value}" if value else _column(flag)


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
    for text in texts:
        if text in values:
            continue
        if _is_gap(text):
            if wanted:
                gaps = at[np.flatnonzero([_is_gap(one) for one in texts])]
                raise BadRows(gaps, f"{name} is missing; {kernel} wants it")
            values[text] = flags.defaults[flag]
            continue
        try:
            values[text] = parsed(flags, flag, str(text))
        except Unfit as error:
            alike = at[np.flatnonzero([one == text for one in texts])]
            raise BadRows(alike, f"{name} = {shown(text)} {error}") from None
    # A gap among numbers is NaN, which is not its own key.
    return [values[text] if text == text else flags.defaults[flag] for text in texts]


def _is_gap(text: Any) -> bool:
    return bool(text == "" or text != text)


def _stacked(values: list[Any]) -> np.ndarray:
    """float64[N], or float64[N, g] of lists, shorter ones filled up with zeros."""
    if not isinstance(values[0], list | np.ndarray):
        return np.array(values, dtype=float)
    widest = max(len(value) for value in values)
    return np.array([[*value, *[0.0] * (widest - len(value))] for value in values], dtype=float)


def _column(flag: str) -> str:
    return flag.replace("-", "_")


def _kernel(text: Any) -> str:
    return str(text).strip().lower().replace("-", "_")
