"""All kinds of GPU kernels, which table prices a call, and the price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np

from clustersim.physics import attention, elementwise, experts, gemm, mla
from clustersim.physics.calibration import (
    EXTRAPOLATED,
    FORMULA,
    NEAR,
    Columns,
    Kernel,
    coordinates,
    lay,
)
from clustersim.spec.gpus import gpu_named
from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import KernelTable, TableKey, fitted_parameters, kernel_table

#: Where `library` is AUTO, the first that has a table.
AUTO = "auto"
LIBRARIES = (
    *("trtllm", "vllm", "sglang", "deepgemm", "deepgemm_masked", "deepgemm_contiguous", "trtllm_wide"),
    *("flashinfer", "fa3", "vidur", "frontier", "infersim"),
)
#: Format → formats whose tables stand in for it, nearest first.
STAND_INS = {
    "bf16": ("fp8", "fp8_block"),
    "fp8": ("fp8_block", "bf16"),
    "fp8_block": ("fp8", "bf16"),
    "fp4": ("fp8", "fp8_block", "bf16"),
    "w4a16": ("bf16", "fp8", "fp8_block"),
}

_MODULES: Sequence[ModuleType] = (gemm, attention, experts, mla, elementwise)
#: Name → kernel.
KERNELS: Mapping[str, Kernel] = {k.name: k for module in _MODULES for k in module.KERNELS}


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """Prices of Q calls of one kernel.

    seconds  float64[Q]
    origin   int8[Q] index into calibration.ORIGINS
    outside  float64[Q] octaves beyond what was measured; 0 where nothing was
    basis    the table they rest on, None for the data sheet alone
    """

    seconds: np.ndarray
    origin: np.ndarray
    outside: np.ndarray
    basis: TableKey | None


def price_calls(kernel: Kernel, gpu: Gpu, form: str, columns: Columns, library: str = AUTO) -> Priced:
    """Times of calls, each alone on its GPU.

    form     number format, a key of STAND_INS
    columns  as kernel.columns says, all above zero; of `counts`, some of every row
    library  of LIBRARIES or AUTO; where it has no table of this kernel, another's is taken
    Returns  without any table: by the kernel's own guess, or the data sheet's roofline and the GPU's launch
    Raises   ClustersimError where the GPU has no such format
    """
    form = kernel.form or form
    return priced_by(basis_of(kernel, gpu, form, library), kernel, gpu, form, columns)


def priced_by(key: TableKey | None, kernel: Kernel, gpu: Gpu, form: str, columns: Columns) -> Priced:
    """The prices that one table gives, of whichever GPU, format and library it is; None: the data sheet's."""
    least = kernel.least(gpu, form, columns)
    if key is None:
        formula, seconds = np.full(len(least), FORMULA, dtype=np.int8), least + gpu.launch_latency
        if has_guess(kernel, gpu):
            seconds = np.maximum(kernel.seconds(gpu, form, kernel.unmeasured, columns), least)
        return Priced(seconds, formula, np.zeros(len(least)), None)
    table = kernel_table(key)
    at = coordinates(kernel, columns)
    ratio, origin, outside = lay(table, at)
    if table.key.format != form:
        # Another format's curve says nothing about this one; its parameters may.
        ratio, origin, outside = np.zeros_like(ratio), np.full_like(origin, FORMULA), np.zeros_like(outside)
    elif table.key.gpu != gpu.name or not _as_catalogued(gpu):
        origin = np.maximum(origin, EXTRAPOLATED)
    seconds = kernel.seconds(gpu, form, kernel.parameters(**table.parameters), columns) * np.exp(ratio)
    if table.key.format == form:
        _between_neighbours(seconds, kernel, gpu, form, table, columns, at)
    return Priced(np.maximum(seconds, least), origin, outside, key)


def _between_neighbours(
    seconds: np.ndarray,
    kernel: Kernel,
    gpu: Gpu,
    form: str,
    table: KernelTable,
    columns: Columns,
    at: np.ndarray,
) -> None:
    """Keeps every price between those of the next smaller and the next larger measured batch, in place.

    A formula climbs in steps, the ratio laid over it slopes: where it slopes down before the step comes,
    a larger batch would cost less than the measured one below it.
    """
    d = at.shape[1] - kernel.size(columns).shape[1]
    axis, place = table.axes[d], at[:, d]
    inner = np.flatnonzero((place > axis[0] + NEAR) & (place < axis[-1] - NEAR))
    cell = np.searchsorted(axis, place[inner], side="right") - 1
    off_node = (place[inner] - axis[cell] > NEAR) & (axis[cell + 1] - place[inner] > NEAR)
    inner, cell = inner[off_node], cell[off_node]
    if not len(inner):
        return
    bounds = []
    for node in (axis[cell], axis[cell + 1]):
        factor = np.exp2(node - place[inner])
        resized = {
            name: values[inner] * (factor if values.ndim == 1 else factor[:, None])
            if name in kernel.batch
            else values[inner]
            for name, values in columns.items()
        }
        there = at[inner].copy()
        there[:, d] = node
        parameters = kernel.parameters(**table.parameters)
        bounds.append(kernel.seconds(gpu, form, parameters, resized) * np.exp(lay(table, there)[0]))
    low, high = bounds
    seconds[inner] = np.clip(seconds[inner], low, np.maximum(low, high))


def computed_by(key: TableKey, kernel: Kernel, gpu: Gpu, form: str, columns: Columns) -> np.ndarray:
    """float64[Q] s by the formula alone, with the parameters of a table."""
    return kernel.seconds(gpu, form, kernel.parameters(**kernel_table(key).parameters), columns)


def _as_catalogued(gpu: Gpu) -> bool:
    """Whether the measured GPU is meant, not one of its name with other rates."""
    known = gpu_named(gpu.name)
    return all(getattr(gpu, of) == getattr(known, of) for of in ("flop_rate", "memory_bandwidth", "sms"))


def basis_of(kernel: Kernel, gpu: Gpu, form: str, library: str = AUTO) -> TableKey | None:
    """The table that prices a kernel's calls, None for none."""
    return _basis((kernel.name, kernel.table), gpu.name, gpu.relative, kernel.form or form, library)


def has_guess(kernel: Kernel, gpu: Gpu) -> bool:
    """Whether the kernel's parameters for want of a table are taken: on GPUs of which something was measured.
    All others keep to their data sheet throughout."""
    known = {key.gpu for key in fitted_parameters()}
    return kernel.unmeasured is not None and bool(known & {gpu.name, gpu.relative})


@cache
def _basis(
    kernels: tuple[str, str], gpu: str, relative: str | None, form: str, library: str
) -> TableKey | None:
    """Of the format before its stand-ins, of the GPU before its relative, of the kernel itself before the one
    it shares tables with, of the library before others."""
    there = [key for key in fitted_parameters() if key.kernel in kernels]
    order = (library, *LIBRARIES)

    def place(key: TableKey) -> tuple[int, int]:
        known = order.index(key.library) if key.library in order else len(order)
        return kernels.index(key.kernel), known

    for wanted in (form, *STAND_INS[form]):
        for name in (gpu, relative):
            fitting = [key for key in there if key.gpu == name and key.format == wanted]
            if fitting:
                return min(fitting, key=place)
    return None
