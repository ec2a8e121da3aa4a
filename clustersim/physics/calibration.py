"""Measured curves laid over a formula, and where every price comes from.

A table holds log(measured / computed) on a grid of log2 coordinates. Inside the grid the ratio is
interpolated linearly, so a measured point is met exactly; outside it stays what it is at the edge and
the formula alone says how the time grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import KernelTable

#: Where a price comes from, best first; prices carry the index. measured: a timed call; interpolated:
#: between timed calls of the same kernel, GPU, format; extrapolated: beyond them, or by a relative of
#: the GPU; formula: parameters alone.
ORIGINS = ("measured", "interpolated", "extrapolated", "formula")
MEASURED, INTERPOLATED, EXTRAPOLATED, FORMULA = range(4)

#: Octaves: nearer to a node is on it; further beyond the grid is outside it; further than REACH from
#: any measured point is no longer between measured points. Conventions of ours.
NEAR = 1e-6
_BEYOND = 0.02
REACH = 2.0

#: Column → float64[Q], or float64[Q, g] for `counts`.
Columns: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kind of GPU kernel: its formula and how calls are compared.

    name        as in plan.stepgraph.Call
    columns     what a call states
    parameters  frozen dataclass of floats, each explained there
    seconds     (gpu, format, parameters, columns) → float64[Q] s by the formula
    least       (gpu, format, columns) → float64[Q] s no price may be below: the data sheet's roofline
    shape       columns → float64[Q, S] log2 coordinates in which models differ
    size        columns → float64[Q, D] log2 coordinates that grow with the batch
    table       kernel that it is a part of, whose tables price it where it has none of its own
    share       (gpu, format, parameters, columns) → float64[Q] its share of that kernel's time
    unmeasured  parameters where no table prices it; None: the data sheet and a launch do
    batch       columns that a larger batch of the same shape multiplies, and with them the size's first
                coordinate
    rises       leading coordinates of the size along which no call may take less time; 0: all
    form        the number format whose tables price it whatever format is asked for; "": that one
    """

    name: str
    columns: tuple[str, ...]
    parameters: type[Any]
    seconds: Callable[[Gpu, str, Any, Columns], np.ndarray]
    least: Callable[[Gpu, str, Columns], np.ndarray]
    shape: Callable[[Columns], np.ndarray]
    size: Callable[[Columns], np.ndarray]
    table: str = ""
    share: Callable[[Gpu, str, Any, Columns], np.ndarray] | None = None
    unmeasured: Any = None
    form: str = ""
    batch: tuple[str, ...] = ("sequences", "tokens", "pairs", "context")
    rises: int = 0


def coordinates(kernel: Kernel, columns: Columns) -> np.ndarray:
    """float64[Q, S + D] log2 coordinates of calls, those of the shape first."""
    return np.concatenate([kernel.shape(columns), kernel.size(columns)], axis=1)


def lay(table: KernelTable, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The measured curve at given coordinates.

    at       float64[Q, D]
    Returns  float64[Q] log(measured / computed); int8[Q] origin, an index into ORIGINS; float64[Q]
             octaves beyond the grid, summed over coordinates, or to the nearest measured point, where
             that is further than counts as inside
    """
    first = np.zeros(len(at), dtype=np.int64)
    beyond, exact = np.zeros(len(at)), np.ones(len(at), dtype=bool)
    strides = [int(np.prod(table.ratio.shape[d + 1 :])) for d in range(at.shape[1])]
    weights: list[tuple[np.ndarray, np.ndarray]] = []
    for axis, stride, value in zip(table.axes, strides, at.T, strict=True):
        inside = np.clip(value, axis[0], axis[-1])
        beyond += np.abs(value - inside)
        cell = np.clip(np.searchsorted(axis, inside, side="right") - 1, 0, max(len(axis) - 2, 0))
        width = axis[cell + 1] - axis[cell] if len(axis) > 1 else 1.0
        share = (inside - axis[cell]) / width
        exact &= np.minimum(share, 1.0 - share) * width <= NEAR if len(axis) > 1 else True
        first += cell * stride
        weights.append((1.0 - share, share))
    ratio, far = np.zeros(len(at)), np.zeros(len(at))
    flat_ratio, flat_far = table.ratio.ravel(), table.far.ravel()
    for corner in product((0, 1), repeat=at.shape[1]):
        if any(c and len(axis) == 1 for c, axis in zip(corner, table.axes, strict=True)):
            continue
        place = first + sum(c * stride for c, stride in zip(corner, strides, strict=True))
        weight = np.prod([pair[c] for pair, c in zip(weights, corner, strict=True)], axis=0)
        ratio += weight * flat_ratio[place]
        far += weight * flat_far[place]
    outside = (beyond > _BEYOND) | (far > REACH)
    off = np.where(outside, np.maximum(beyond, far), 0.0)
    on = exact & (far <= NEAR) & ~outside
    return ratio, np.select([on, ~outside], [MEASURED, INTERPOLATED], EXTRAPOLATED).astype(np.int8), off
