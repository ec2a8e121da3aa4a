"""Fits kernel formulas to measured calls and lays the measured curves over them.

python -m clustersim.study.fit kernels

For every kernel, GPU, format and library with enough rows: the formula's parameters by robust least
squares, then log(measured / computed) at every node of a grid that goes through all measured points,
the nodes between them filled by a Gaussian process. Run again, it writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clustersim.physics.calibration import Columns, Kernel, coordinates
from clustersim.physics.kernels import KERNELS
from clustersim.spec.gpus import gpu_named
from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import FAR_STEP, KernelTable, TableKey, packed
from clustersim.study.kernel_families import STARTS, measured_rows
from clustersim.study.kernel_rows import Rows, taken
from clustersim.study.kriging import Surface, best_surface, left_out, predict
from clustersim.study.least_squares import FREE, Fitted, Parameter, fit, inline

#: Rows below which a formula's parameters cannot be told apart.
LEAST_ROWS = 12
#: Nodes of a grid at most; nearest neighbours are joined until it fits.
MOST_NODES = 60_000
#: Parts into which shapes are divided to judge parameters by shapes they have not seen.
FOLDS = 8
#: Coordinates nearer than this are the same, octaves.
_SAME = 1e-6
#: A node whose price is off what was timed there by more, as log ratio, is interpolated, not measured.
KEPT = 0.05
#: Turns in which measured times are made to rise along all size coordinates.
_TURNS = 20


_HEAD = """\
# Parameters of kernel formulas, fitted to measured/*.parquet: [kernel.gpu.format.library], SI units.
# Written by `python -m clustersim.study.fit kernels`; do not edit it. What each parameter means stands in
# the docstrings of clustersim/physics/; measured/README.md says where the measurements come from.
#
# rows      how many measured rows speak about the parameter
# residual  median |log(predicted / measured)| of these rows, by the formula alone
# files     the measured tables they stand in; none: no row speaks about it
"""


@dataclass(frozen=True, slots=True, eq=False)
class Calls:
    """All measured calls of one key.

    columns   as the kernel's
    measured  float64[N] s
    files     str[N] measured table of each
    row       int64[N] row in its table
    """

    key: TableKey
    columns: Columns
    measured: np.ndarray
    files: np.ndarray
    row: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """What the rows of one key say.

    calls       with times that rise with the batch, see `rising`
    parameters  name → fitted value and where it comes from
    surface     of log(measured / computed)
    """

    calls: Calls
    parameters: Mapping[str, Fitted]
    surface: Surface


def calls_of(tables: Sequence[Rows]) -> dict[TableKey, Calls]:
    """The calls of all keys with enough rows, in the order of their names; rows left out are not in."""
    parts: dict[TableKey, list[Rows]] = {}
    for rows in tables:
        for key in _keys(rows):
            chosen = (
                (rows.gpu == key.gpu)
                & (rows.format == key.format)
                & (rows.library == key.library)
                & (rows.left_out == "")
                & np.isfinite(rows.measured)
            )
            if chosen.any():
                parts.setdefault(key, []).append(taken(rows, chosen))
    return {key: _joined(key, parts[key]) for key in sorted(parts) if sum(map(len, parts[key])) >= LEAST_ROWS}


def _keys(rows: Rows) -> list[TableKey]:
    triples = sorted(set(zip(rows.gpu.tolist(), rows.format.tolist(), rows.library.tolist(), strict=True)))
    return [TableKey(rows.kernel, *triple) for triple in triples]


def _joined(key: TableKey, parts: Sequence[Rows]) -> Calls:
    # What readers state beyond a kernel's own columns helps its formula where all of them state it.
    stated = [name for name in parts[0].columns if all(name in p.columns for p in parts)]
    columns = {name: _stacked([p.columns[name] for p in parts]) for name in stated}
    return Calls(
        key,
        columns,
        np.concatenate([p.measured for p in parts]),
        np.concatenate([np.full(len(p), p.file) for p in parts]),
        np.concatenate([p.row for p in parts]),
    )


def _stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts below each other; counts of fewer experts are filled up with zeros."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    widest = max(p.shape[1] for p in parts)
    return np.concatenate([np.pad(p, ((0, 0), (0, widest - p.shape[1]))) for p in parts])


def fitted_calls(calls: Calls, gpu: Gpu, start: Mapping[str, Parameter]) -> Fit:
    """Parameters and curves of one key."""
    kernel = KERNELS[calls.key.kernel]
    calls = replace(calls, measured=rising(kernel, calls))
    parameters = _parameters(kernel, gpu, calls, start, np.ones(len(calls.measured), dtype=bool))
    values = _log_ratio(kernel, gpu, calls, parameters)
    at = coordinates(kernel, calls.columns)
    shapes = kernel.shape(calls.columns).shape[1]
    return Fit(calls, parameters, best_surface(at, values, shapes, groups_of(kernel, calls)))


def _parameters(
    kernel: Kernel, gpu: Gpu, calls: Calls, start: Mapping[str, Parameter], chosen: np.ndarray
) -> dict[str, Fitted]:
    columns = {name: values[chosen] for name, values in calls.columns.items()}

    def model(values: Mapping[str, float]) -> np.ndarray:
        return kernel.seconds(gpu, calls.key.format, kernel.parameters(**values), columns)

    return fit(start, model, calls.measured[chosen], calls.files[chosen])


def _log_ratio(kernel: Kernel, gpu: Gpu, calls: Calls, parameters: Mapping[str, Fitted]) -> np.ndarray:
    return np.asarray(np.log(calls.measured / computed(kernel, gpu, calls, parameters)))


def rising(kernel: Kernel, calls: Calls) -> np.ndarray:
    """float64[N] s measured times, evened out where a larger batch of the same shape took less time.

    Libraries switch kernels, and now and then to a slower one; a price that falls as work grows would
    lead a search for the best deployment astray. Times along each size coordinate in turn become their
    nearest non-falling ones (in the logarithm), until nothing moves.
    """
    size = np.round(kernel.size(calls.columns), 6)
    told = np.log(calls.measured)
    lines = [_lines(kernel, calls, size, d) for d in range(kernel.rises or size.shape[1])]
    for _ in range(_TURNS):
        before = told.copy()
        for along in lines:
            for line in along:
                told[line] = _not_falling(told[line])
        if np.abs(told - before).max(initial=0.0) < _SAME:
            break
    return np.asarray(np.exp(told))


def _lines(kernel: Kernel, calls: Calls, size: np.ndarray, d: int) -> list[np.ndarray]:
    """Calls that differ in one size coordinate only, each line ascending in it; two calls or more."""
    others = np.concatenate([np.round(kernel.shape(calls.columns), 6), np.delete(size, d, axis=1)], axis=1)
    _, line = np.unique(others, axis=0, return_inverse=True)
    order = np.lexsort((size[:, d], line.ravel()))
    ends = np.flatnonzero(np.diff(line.ravel()[order])) + 1
    return [part for part in np.split(order, ends) if len(part) > 1]


def _not_falling(values: np.ndarray) -> np.ndarray:
    """The nearest non-falling sequence: pool adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, of = pools.pop()
            mean, count = (mean * count + other * of) / (count + of), count + of
        pools.append((mean, count))
    return np.concatenate([np.full(count, mean) for mean, count in pools])


def computed(kernel: Kernel, gpu: Gpu, calls: Calls, parameters: Mapping[str, Fitted]) -> np.ndarray:
    """float64[N] s by the formula alone."""
    values = kernel.parameters(**{name: float(one.value) for name, one in parameters.items()})
    return np.asarray(kernel.seconds(gpu, calls.key.format, values, calls.columns))


def groups_of(kernel: Kernel, calls: Calls) -> np.ndarray:
    """int64[N] number of the shape of each call; where all have one shape, of its first size."""
    shape = kernel.shape(calls.columns)
    _, groups = np.unique(np.round(shape, 6), axis=0, return_inverse=True)
    if groups.max(initial=0) == 0:
        _, groups = np.unique(np.round(kernel.size(calls.columns)[:, 0], 6), return_inverse=True)
    return np.asarray(groups.ravel())


def foretold(found: Fit, gpu: Gpu, start: Mapping[str, Parameter]) -> np.ndarray:
    """float64[N] s that each call is priced at by a fit which has not seen its shape.

    Curves leave out one shape at a time; parameters are fitted anew without the shapes of one of FOLDS
    parts at a time.
    """
    calls = found.calls
    kernel = KERNELS[calls.key.kernel]
    groups = groups_of(kernel, calls)
    near = {name: _near(start[name], float(one.value)) for name, one in found.parameters.items()}
    told = np.empty(len(groups))
    for fold in range(min(FOLDS, groups.max() + 1)):
        without = groups % FOLDS == fold
        parameters = _parameters(kernel, gpu, calls, near, ~without)
        base = computed(kernel, gpu, calls, parameters)
        values = np.log(calls.measured / base)
        known = replace(found.surface, values=values, weights=found.surface.inverse @ values)
        told[without] = (base * np.exp(left_out(known, groups)))[without]
    return np.asarray(np.maximum(told, kernel.least(gpu, calls.key.format, calls.columns)))


def _near(start: Parameter, value: float) -> Parameter:
    """A start for a fit to some of the rows that saves its search.

    A start that holds the fit back stays: it must know nothing about the rows that are to be foretold.
    """
    if start.prior < FREE:
        return start
    return replace(start, start=min(max(value, start.low), start.high))


def table_of(found: Fit, timed: np.ndarray) -> KernelTable:
    """The grid that goes through the fit's points.

    timed    float64[N] s as they were measured: a node is only called measured if it says what they say
    """
    at = found.surface.at
    axes = _axes(at)
    nodes = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    ratio, far = predict(found.surface, nodes), _nearest(nodes, at)
    here, mean, kept = _at_nodes(axes, at, found.surface.values, np.log(timed / found.calls.measured))
    ratio[here], far[here] = mean, np.where(kept, 0.0, FAR_STEP)
    shape = tuple(len(axis) for axis in axes)
    values = {name: float(one.value) for name, one in found.parameters.items()}
    return KernelTable(found.calls.key, values, axes, ratio.reshape(shape), far.reshape(shape))


def _axes(at: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ascending nodes per coordinate: every value that occurs, joined where there are too many, first along
    coordinates where that puts the fewest points off the nodes."""
    axes = [_distinct(column, _SAME) for column in at.T]
    apart = [0.05] * len(axes)
    while np.prod([float(len(axis)) for axis in axes]) > MOST_NODES:
        tried = [_shorter(column, axis, gap) for column, axis, gap in zip(at.T, axes, apart, strict=True)]
        losses = [
            (_off(column, shorter) - _off(column, axis) + 1.0) / np.log(len(axis) / len(shorter))
            if len(shorter) < len(axis)
            else np.inf
            for column, axis, (shorter, _) in zip(at.T, axes, tried, strict=True)
        ]
        chosen = int(np.argmin(losses))
        axes[chosen], apart[chosen] = tried[chosen]
    return tuple(axes)


def _shorter(column: np.ndarray, axis: np.ndarray, gap: float) -> tuple[np.ndarray, float]:
    """The axis with at least one node less, if it has more than its ends, and how far apart its nodes are."""
    shorter = axis
    while len(shorter) == len(axis) > 2:
        gap *= 1.15
        shorter = _distinct(column, gap)
    return shorter, gap


def _off(column: np.ndarray, axis: np.ndarray) -> int:
    """How many points lie on no node."""
    return int((np.abs(axis[None] - column[:, None]).min(axis=1) > _SAME).sum())


def _distinct(values: np.ndarray, apart: float) -> np.ndarray:
    """Ascending values more than so far apart, both ends among them; of near ones the most frequent is kept,
    so that a grid which cannot go through all points goes through as many as it can."""
    ordered, times = np.unique(values, return_counts=True)
    kept = [float(ordered[0])]
    if ordered[-1] - ordered[0] > _SAME:
        kept.append(float(ordered[-1]))
    for value in ordered[np.argsort(-times, kind="stable")].tolist():
        if np.abs(np.array(kept) - value).min() > apart:
            kept.append(value)
    return np.array(sorted(kept))


def _at_nodes(
    axes: Sequence[np.ndarray], at: np.ndarray, values: np.ndarray, moved: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat indices of nodes with a point on them, the mean of the points' values there, and whether all
    of them were timed within KEPT of it.

    moved    float64[P] log(as timed / as in values)
    """
    index = np.zeros(len(at), dtype=np.int64)
    on = np.ones(len(at), dtype=bool)
    for axis, column in zip(axes, at.T, strict=True):
        place = np.abs(axis[None] - column[:, None]).argmin(axis=1)
        on &= np.abs(axis[place] - column) <= 2 * _SAME
        index = index * len(axis) + place
    nodes, which = np.unique(index[on], return_inverse=True)
    mean = np.bincount(which, weights=values[on]) / np.bincount(which)
    off = np.abs(values[on] + moved[on] - mean[which])
    worst = np.zeros(len(nodes))
    np.maximum.at(worst, which, off)
    return nodes, mean, worst <= KEPT


def _nearest(nodes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """float64[Q] octaves from each node to the nearest point."""
    far = np.empty(len(nodes))
    for start in range(0, len(nodes), 2048):
        here = nodes[start : start + 2048]
        square = (here**2).sum(axis=1)[:, None] + (at**2).sum(axis=1)[None] - 2.0 * here @ at.T
        far[start : start + 2048] = np.sqrt(np.maximum(square.min(axis=1), 0.0))
    return far


def all_calls() -> dict[TableKey, Calls]:
    """The measured calls of all kernels."""
    return calls_of(measured_rows())


def write_kernels(folder: Path) -> Iterator[str]:
    """Fits all kernels and writes kernels.toml and kernels.npz; yields what it found, line by line.

    folder  the catalogue's
    """
    parts, curves = [_HEAD], {}
    for key, calls in all_calls().items():
        gpu, start = gpu_named(key.gpu), STARTS[key.kernel](key)
        found = fitted_calls(calls, gpu, start)
        alone = computed(KERNELS[key.kernel], gpu, calls, found.parameters)
        told = foretold(found, gpu, start)
        table = table_of(found, calls.measured)
        curves.update(packed(table))
        parts.append(document(key, found.parameters))
        yield (
            f"{'.'.join(key):45} {len(told):5} rows, formula {said_error(alone, calls.measured)}, "
            f"shape left out {said_error(told, calls.measured)}, {table.ratio.size:,} nodes"
        )
    (folder / "kernels.toml").write_text("\n".join(parts), encoding="utf-8")
    np.savez_compressed(folder / "kernels.npz", allow_pickle=False, **curves)


def document(key: TableKey, parameters: Mapping[str, Fitted]) -> str:
    """One table of catalogue/kernels.toml."""
    lines = [f"{name} = {inline(one)}" for name, one in parameters.items()]
    return "\n".join([f"[{'.'.join(key)}]", *lines, ""])


def said_error(told: np.ndarray, calls: np.ndarray) -> str:
    """Median and p90 of |relative error|."""
    error = np.abs(told / calls - 1.0)
    return f"{np.median(error):.1%} / {np.quantile(error, 0.9):.1%}"
