"""All kinds of GPU kernels, which table prices a call, and the price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np

from clustersim.physics import gemm, mla
from clustersim.physics.calibration import (
    EXTRAPOLATED,
    FORMULA,
    Columns,
    Kernel,
    coordinates,
    lay,
)
from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import KernelTable, TableKey, fitted_parameters, kernel_table

#: Where `library` is AUTO, the first that has a table.
AUTO = "auto"
LIBRARIES = ("trtllm", "vllm", "sglang", "deepgemm", "flashinfer", "fa3", "vidur", "frontier")
#: Format → formats whose tables stand in for it, nearest first.
STAND_INS = {
    "bf16": ("fp8", "fp8_block"),
    "fp8": ("fp8_block", "bf16"),
    "fp8_block": ("fp8", "bf16"),
    "fp4": ("fp8", "fp8_block", "bf16"),
}
#: The best measured GPU, for those that name no relative.
BEST_KNOWN = "h100_sxm"

_MODULES: Sequence[ModuleType] = (gemm, mla)
#: Name → kernel.
KERNELS: Mapping[str, Kernel] = {k.name: k for module in _MODULES for k in module.KERNELS}


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """Prices of Q calls of one kernel.

    seconds  float64[Q]
    origin   int8[Q] index into calibration.ORIGINS
    outside  float64[Q] octaves beyond what was measured; 0 where nothing was
    basis    the table they rest on, None for the formula with its starting values
    """

    seconds: np.ndarray
    origin: np.ndarray
    outside: np.ndarray
    basis: TableKey | None


def price_calls(kernel: Kernel, gpu: Gpu, form: str, columns: Columns, library: str = AUTO) -> Priced:
    """Times of calls, each alone on its GPU; calls without work take no time.

    form     number format, a key of STAND_INS
    columns  as kernel.columns says
    library  of LIBRARIES or AUTO; where it has no table of this kernel, another's is taken
    Raises   ClustersimError where the GPU has no such format
    """
    key = basis(kernel.table or kernel.name, gpu.name, getattr(gpu, "relative", None), form, library)
    if key is None:
        parameters = kernel.parameters()
        computed = kernel.seconds(gpu, form, parameters, columns)
        ratio, origin = np.zeros(len(computed)), np.full(len(computed), FORMULA, dtype=np.int8)
        outside = np.zeros(len(computed))
    else:
        table = kernel_table(key)
        computed = kernel.seconds(gpu, form, kernel.parameters(**table.parameters), columns)
        ratio, origin, outside = _laid(kernel, gpu, form, table, columns)
    least = kernel.least(gpu, form, columns)
    seconds = np.maximum(computed * np.exp(ratio), least)
    return Priced(seconds, origin, outside, key)


def _laid(
    kernel: Kernel, gpu: Gpu, form: str, table: KernelTable, columns: Columns
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ratio, origin, outside = lay(table, coordinates(kernel, columns))
    if table.key.format != form or (kernel.table or kernel.name) != table.key.kernel:
        # Another format's curve says nothing about this one; its parameters may.
        return np.zeros_like(ratio), np.full_like(origin, FORMULA), np.zeros_like(outside)
    if table.key.gpu != gpu.name:
        origin = np.maximum(origin, EXTRAPOLATED)
    return ratio, origin, outside


@cache
def basis(kernel: str, gpu: str, relative: str | None, form: str, library: str) -> TableKey | None:
    """The table that prices calls: of the GPU before its relative, of the format before its stand-ins,
    of the library before others."""
    there = [key for key in fitted_parameters() if key.kernel == kernel]
    order = (library, *LIBRARIES)
    for name in (gpu, relative or BEST_KNOWN, BEST_KNOWN):
        for wanted in (form, *STAND_INS[form]):
            fitting = [key for key in there if key.gpu == name and key.format == wanted]
            if fitting:
                return min(
                    fitting, key=lambda k: order.index(k.library) if k.library in order else len(order)
                )
    return None
