"""All kinds of GPU kernels, which table prices a call, and the price."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TypeAlias

import numpy as np

from clustersim.physics import attention, elementwise, experts, gemm, mla
from clustersim.physics.calibration import (
    EXTRAPOLATED,
    FORMULA,
    INTERPOLATED,
    NEAR,
    Columns,
    Kernel,
    coordinates,
    lay,
)
from clustersim.spec.gpus import gpu_named, siblings
from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import KernelTable, TableKey, fitted_parameters, kernel_table

#: Where `library` is AUTO, the first that has a table.
AUTO = "auto"
LIBRARIES = (
    *("trtllm", "vllm", "sglang", "deepgemm", "deepgemm_masked", "deepgemm_contiguous", "trtllm_wide"),
    *("flashinfer", "fa3", "vidur", "frontier"),
)
#: Libraries whose tables hold only for who names them: infersim's timer counts about 20 us of launching.
ONLY_NAMED = ("infersim",)
#: Format → formats whose tables stand in for it, nearest first.
STAND_INS = {
    "bf16": ("fp8", "fp8_block"),
    "fp8": ("fp8_block", "bf16"),
    "fp8_block": ("fp8", "bf16"),
    "fp4": ("fp8", "fp8_block", "bf16"),
    "w4a16": ("bf16", "fp8", "fp8_block"),
}

#: Calls priced at a time: their columns stay in a core's cache.
_BLOCK = 8192

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
    parts = []
    for start in range(0, max(len(next(iter(columns.values()))), 1), _BLOCK):
        block = {name: values[start : start + _BLOCK] for name, values in columns.items()}
        if key is None:
            parts.append(_by_guess(kernel, gpu, form, block))
        else:
            parts.append(_by_table(kernel, gpu, form, block, key))
    seconds, origin, outside = (np.concatenate(found) for found in zip(*parts, strict=True))
    return Priced(seconds, origin, outside, key)


#: Seconds, origin and octaves outside of some calls.
_Found: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def _by_guess(kernel: Kernel, gpu: Gpu, form: str, columns: Columns) -> _Found:
    """Calls for which there is no table."""
    least = kernel.least(gpu, form, columns)
    seconds = least + gpu.launch_latency
    if has_guess(kernel, gpu):
        seconds = np.maximum(kernel.seconds(gpu, form, kernel.unmeasured, columns), least)
    return seconds, np.full(len(least), FORMULA, dtype=np.int8), np.zeros(len(least))


def _by_table(kernel: Kernel, gpu: Gpu, form: str, columns: Columns, key: TableKey) -> _Found:
    """Calls by a table's formula, and by its curve where that speaks of their format and architecture."""
    if key.kernel != kernel.name:
        return _part(kernel, gpu, form, columns, key)
    foreign = key.gpu != gpu.name or not _as_catalogued(gpu)
    table, least = kernel_table(key), kernel.least(_at_most_reached(gpu) if foreign else gpu, form, columns)
    parameters = kernel.parameters(**table.parameters)
    seconds = kernel.seconds(gpu, form, parameters, columns)
    if key.format != form:
        return np.maximum(seconds, least), np.full(len(least), FORMULA, dtype=np.int8), np.zeros(len(least))
    at = coordinates(kernel, columns)
    ratio, origin, outside = lay(table, at)
    if foreign:
        origin = np.maximum(origin, EXTRAPOLATED)
    # A curve is the ways of a library's code for one architecture; it does not travel to another.
    if gpu.architecture == gpu_named(key.gpu).architecture:
        seconds *= np.exp(ratio)

        def price(some: Columns, there: np.ndarray) -> np.ndarray:
            return np.asarray(kernel.seconds(gpu, form, parameters, some) * np.exp(lay(table, there)[0]))

        _keep_between(seconds, kernel, table, columns, at, price)
    return np.maximum(seconds, least), origin, outside


def _part(kernel: Kernel, gpu: Gpu, form: str, columns: Columns, key: TableKey) -> _Found:
    """Calls that are a share of a larger kernel's; its parts add up to it, but nobody timed one alone."""
    assert kernel.share is not None, f"{kernel.name} is no part of {key.kernel}"
    whole = KERNELS[key.kernel]
    seconds, origin, outside = _by_table(whole, gpu, form, columns, key)
    share = kernel.share(gpu, form, whole.parameters(**kernel_table(key).parameters), columns)
    least = kernel.least(gpu, form, columns)
    return np.maximum(seconds * share, least), np.maximum(origin, INTERPOLATED), outside


def _keep_between(
    seconds: np.ndarray,
    kernel: Kernel,
    table: KernelTable,
    columns: Columns,
    at: np.ndarray,
    price: Callable[[Columns, np.ndarray], np.ndarray],
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
    low, high = (
        price(_resized(kernel, columns, inner, node - place[inner]), _moved(at[inner], d, node))
        for node in (axis[cell], axis[cell + 1])
    )
    seconds[inner] = np.clip(seconds[inner], low, np.maximum(low, high))


def computed_by(key: TableKey, kernel: Kernel, gpu: Gpu, form: str, columns: Columns) -> np.ndarray:
    """float64[Q] s by the formula alone, with the parameters of a table."""
    return kernel.seconds(gpu, form, kernel.parameters(**kernel_table(key).parameters), columns)


def _resized(kernel: Kernel, columns: Columns, chosen: np.ndarray, octaves: np.ndarray) -> Columns:
    """Chosen calls with a batch so many octaves larger."""
    factor = np.exp2(octaves)
    return {
        name: (values[chosen].T * factor).T if name in kernel.batch else values[chosen]
        for name, values in columns.items()
    }


def _moved(at: np.ndarray, d: int, to: np.ndarray) -> np.ndarray:
    there = at.copy()
    there[:, d] = to
    return there


def _at_most_reached(gpu: Gpu) -> Gpu:
    """The GPU with the rates that the best product reaches; narrow formats reach no more than bf16 does."""
    if not gpu.reached:
        return gpu
    widest = gpu.reached.get("bf16", 1.0)
    rates = {form: rate * gpu.reached.get(form, widest) for form, rate in gpu.flop_rate.items()}
    return gpu.model_copy(update={"flop_rate": rates})


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
    """Of the format before its stand-ins, of the library asked for before others, of the GPU before its
    relative and before those that are alike, of the kernel itself before the one it shares tables with."""
    names = [name for name in (gpu, relative, *siblings(gpu)) if name]
    order = (library, *LIBRARIES)

    def place(key: TableKey) -> tuple[bool, int, int, int]:
        known = order.index(key.library) if key.library in order else len(order)
        return key.library != library, names.index(key.gpu), kernels.index(key.kernel), known

    there = [
        key
        for key in fitted_parameters()
        if key.kernel in kernels
        and key.gpu in names
        and (key.library == library or key.library not in ONLY_NAMED)
    ]
    for wanted in (form, *STAND_INS[form]):
        fitting = [key for key in there if key.format == wanted]
        if fitting:
            return min(fitting, key=place)
    return None
