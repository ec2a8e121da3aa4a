"""Operators → seconds, each with where its price comes from.

A GPU with measured kernels of its own or of a relative is priced by them (`physics.kernels`); any other
by its data sheet alone: the longer of FLOP at peak rate and bytes over HBM, plus the launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clustersim.physics.calibration import FORMULA
from clustersim.physics.kernels import AUTO, KERNELS, Priced, basis_of, has_guess, price_calls
from clustersim.plan.stepgraph import Call, Operator
from clustersim.spec.formats import flop_rate_of
from clustersim.spec.hardware import Gpu


def price_operators(operators: Sequence[Operator], gpu: Gpu, library: str = AUTO) -> list[Priced]:
    """Prices of compute operators, in their order: an entry per rank, each alone on its GPU.

    library  whose kernels, see `kernels.price_calls`
    Raises   ClustersimError where the GPU lacks an operator's number format
    """
    alike: dict[tuple[str, str, int], list[int]] = {}
    for index, op in enumerate(operators):
        call = _call(op)
        counts = call.columns.get("counts")
        width = 0 if counts is None else counts.shape[1]
        alike.setdefault((call.kernel, call.format, width), []).append(index)
    prices: dict[int, Priced] = {}
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


def _together(operators: Sequence[Operator], kernel: str, form: str, gpu: Gpu, library: str) -> list[Priced]:
    flop = np.concatenate([op.flop for op in operators])
    moved = np.concatenate([op.bytes for op in operators])
    idle = (flop == 0) & (moved == 0)
    found = _roofline(gpu, form, flop, moved)
    if _known(kernel, gpu, form, library) and not idle.all():
        busy = np.flatnonzero(~idle)
        columns = {
            name: np.concatenate([_call(op).columns[name] for op in operators])[busy]
            for name in _call(operators[0]).columns
        }
        found = _placed(found, busy, price_calls(KERNELS[kernel], gpu, form, columns, library))
    prices, start = [], 0
    for op in operators:
        part = slice(start, start + len(op.flop))
        prices.append(Priced(found.seconds[part], found.origin[part], found.outside[part], found.basis))
        start = part.stop
    return prices


def _known(kernel: str, gpu: Gpu, form: str, library: str) -> bool:
    """Whether anything but the data sheet speaks about a kernel."""
    return basis_of(KERNELS[kernel], gpu, form, library) is not None or has_guess(KERNELS[kernel], gpu)


def _roofline(gpu: Gpu, form: str, flop: np.ndarray, moved: np.ndarray) -> Priced:
    seconds = np.maximum(flop / flop_rate_of(gpu, form), moved / gpu.memory_bandwidth) + gpu.launch_latency
    return Priced(seconds, np.full(len(flop), FORMULA, dtype=np.int8), np.zeros(len(flop)), None)


def _placed(found: Priced, at: np.ndarray, priced: Priced) -> Priced:
    """The ranks that have work at their price; those without any pay the launch alone."""
    for held, told in (
        (found.seconds, priced.seconds),
        (found.origin, priced.origin),
        (found.outside, priced.outside),
    ):
        held[at] = told
    return replace(found, basis=priced.basis)
