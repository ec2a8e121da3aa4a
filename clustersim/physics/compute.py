"""Operators → seconds, each with where its price comes from.

A GPU with measured kernels of its own or of a relative is priced by them (`physics.kernels`); any other
by its data sheet alone: the longer of FLOP at peak rate and bytes over HBM, plus the launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.physics.calibration import FORMULA
from clustersim.physics.kernels import AUTO, KERNELS, Priced, basis_of, has_guess, price_calls
from clustersim.plan.stepgraph import Call, Operator
from clustersim.spec.formats import flop_rate_of
from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import TableKey


@dataclass(frozen=True, slots=True, eq=False)
class Price:
    """What an operator takes on each of its R ranks, alone on its GPU.

    seconds  float64[R]
    origin   int8[R] index into calibration.ORIGINS
    outside  float64[R] octaves beyond what was measured
    basis    the table it rests on, None for the data sheet alone
    """

    seconds: np.ndarray
    origin: np.ndarray
    outside: np.ndarray
    basis: TableKey | None


def price_operators(operators: Sequence[Operator], gpu: Gpu, library: str = AUTO) -> list[Price]:
    """Prices of compute operators, in their order.

    library  whose kernels, see `kernels.basis`
    Raises   ClustersimError where the GPU lacks an operator's number format
    """
    alike: dict[tuple[str, str, int], list[int]] = {}
    for index, op in enumerate(operators):
        call = _call(op)
        counts = call.columns.get("counts")
        width = 0 if counts is None else counts.shape[1]
        alike.setdefault((call.kernel, call.format, width), []).append(index)
    prices: dict[int, Price] = {}
    # Operators that call the same kernel are priced together: an array's price is hardly that of a number.
    for (kernel, form, _), members in alike.items():
        found = _together([operators[index] for index in members], kernel, form, gpu, library)
        prices.update(zip(members, found, strict=True))
    return [prices[index] for index in range(len(operators))]


def price(op: Operator, gpu: Gpu, library: str = AUTO) -> np.ndarray:
    """float64[R] s of one compute operator, see `price_operators`."""
    return price_operators([op], gpu, library)[0].seconds


def _call(op: Operator) -> Call:
    assert op.call is not None, f"{op.name} is no kernel"
    return op.call


def _together(operators: Sequence[Operator], kernel: str, form: str, gpu: Gpu, library: str) -> list[Price]:
    flop = np.concatenate([op.flop for op in operators])
    moved = np.concatenate([op.bytes for op in operators])
    found = _roofline(gpu, form, flop, moved)
    idle = (flop == 0) & (moved == 0)
    if _known(kernel, gpu, form, library) and not idle.all():
        busy = np.flatnonzero(~idle)
        columns = {
            name: np.concatenate([_call(op).columns[name] for op in operators])[busy]
            for name in KERNELS[kernel].columns
        }
        found = _placed(found, busy, price_calls(KERNELS[kernel], gpu, form, columns, library))
    seconds, origin, outside, basis = found
    prices, start = [], 0
    for op in operators:
        part = slice(start, start + len(op.flop))
        prices.append(Price(seconds[part], origin[part], outside[part], basis))
        start = part.stop
    return prices


def _known(kernel: str, gpu: Gpu, form: str, library: str) -> bool:
    """Whether anything but the data sheet speaks about a kernel."""
    if kernel not in KERNELS:
        return False
    found = basis_of(KERNELS[kernel], gpu, form, library)
    return found is not None or has_guess(KERNELS[kernel], gpu)


_Found = tuple[np.ndarray, np.ndarray, np.ndarray, TableKey | None]


def _roofline(gpu: Gpu, form: str, flop: np.ndarray, moved: np.ndarray) -> _Found:
    seconds = np.maximum(flop / flop_rate_of(gpu, form), moved / gpu.memory_bandwidth) + gpu.launch_latency
    return seconds, np.full(len(flop), FORMULA, dtype=np.int8), np.zeros(len(flop)), None


def _placed(found: _Found, at: np.ndarray, priced: Priced) -> _Found:
    """The ranks that have work at their price; those without any pay the launch alone."""
    seconds, origin, outside, _ = found
    seconds[at], origin[at], outside[at] = priced.seconds, priced.origin, priced.outside
    return seconds, origin, outside, priced.basis
