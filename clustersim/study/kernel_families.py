"""Kernels that are fitted to measurements: who reads their files, and where their parameters begin.

To add a measured file, write a reader for it (columns → list of Rows) and add it to the READERS of its
family's module; fit, validation, `clustersim price` and the docs follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from clustersim.spec.kernel_tables import TableKey
from clustersim.study import attention_rows, elementwise_rows, expert_layer_rows, gemm_rows, mla_rows
from clustersim.study.kernel_rows import Rows
from clustersim.study.least_squares import Parameter
from clustersim.study.measured import Table, measured

#: (a file's columns, its name) → its rows, one entry per kernel in it. Also reads a user's file of the
#: same form without the measured column.
Reader = Callable[[Table, str], list[Rows]]
#: Parameter → where its search begins, and its bounds.
Starts = Mapping[str, Parameter]

_FAMILIES = (gemm_rows, expert_layer_rows, attention_rows, mla_rows, elementwise_rows)

#: Measured table → its readers, one per family that finds kernels in it.
READERS: dict[str, list[Reader]] = {
    name: [family.READERS[name] for family in _FAMILIES if name in family.READERS]
    for name in dict.fromkeys(name for family in _FAMILIES for name in family.READERS)
}
#: Kernel → where the search for its parameters begins, by table.
STARTS: dict[str, Callable[[TableKey], Starts]] = {
    kernel: starts for family in _FAMILIES for kernel, starts in family.STARTS.items()
}


def rows_of_table(table: Table, name: str, form: str = "") -> list[Rows]:
    """All kernel calls in a table.

    name     what it is called in messages and in `Rows.file`
    form     measured table whose columns it has; default: it is that table
    Raises   ClustersimError with the line of a wrong row
    """
    return [rows for reader in READERS[form or name] for rows in reader(table, name)]


def measured_rows() -> list[Rows]:
    """The calls of all measured tables."""
    return [rows for name in READERS for rows in rows_of_table(measured(name), name)]
