"""Kernels that are fitted to measurements: who reads their files, and where their parameters begin.

To add a measured file, write a reader for it (columns → list of Rows) and add a line to READERS; fit,
validation, `clustersim price` and the docs follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from clustersim.study.kernel_rows import Rows
from clustersim.study.least_squares import Parameter
from clustersim.study.measured import Table

#: (a file's columns) → its rows, one entry per kernel in it. Must also read a user's file of the same
#: form without the measured column.
Reader = Callable[[Table, str], list[Rows]]

#: Measured table → reader.
READERS: dict[str, Reader] = {}

#: Kernel → parameter → where its search begins, and its bounds.
STARTS: dict[str, Mapping[str, Parameter]] = {
    "gemm": {
        "launch": Parameter(3e-6, 1e-7, 3e-5),
        "reach": Parameter(0.8, 0.1, 2.0),
        "bandwidth": Parameter(0.8, 0.1, 1.0),
        "in_flight": Parameter(1e6, 1e4, 1e8),
        "overlap": Parameter(3.0, 1.0, 6.0),
        "depth": Parameter(100.0, 10.0, 1000.0),
        "small_tile": Parameter(0.1, 0.01, 1.0),
        "last_wave": Parameter(0.6, 0.05, 1.0),
        "throttle": Parameter(0.05, 0.001, 1.0),
        "quantise": Parameter(1.0, 0.1, 10.0),
    },
}
