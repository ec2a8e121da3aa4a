"""Library collectives and custom all-reduce kernels: measured rows → shapes, predictions, fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from clustersim.physics.startup import Costs, Parts, Shape, estimate, quickest
from clustersim.spec.costs import from_values
from clustersim.spec.library import (
    ARCHITECTURES,
    FABRICS,
    SECTION,
    FabricCosts,
    KernelCosts,
    LibraryCosts,
)
from clustersim.spec.quantities import Value
from clustersim.study.collective_rows import KERNEL_GROUPS, KINDS, READERS, Row, left_out
from clustersim.study.least_squares import Fitted, Parameter, fit
from clustersim.study.measured import Table
from clustersim.study.prediction import Costs as FamilyCosts
from clustersim.study.prediction import Family, Groups, Prediction, ruled_by, values

#: What a custom kernel knows, in the order in which it learns.
_CUSTOM = ("one_shot", "two_shot")
_SHARE = Parameter(0.8, 0.02, 1.0)
_STEP = Parameter(0.5e-6, 1e-8, 50e-6, "time")

#: Where the search for an architecture's parameters begins, and how far it may go.
LIBRARY = {
    "launch": Parameter(6e-6, 1e-6, 30e-6, "time"),
    "start_ll128": Parameter(1e-6, 1e-8, 30e-6, "time"),
    "start_simple": Parameter(10e-6, 1e-7, 60e-6, "time"),
    "step_ll": _STEP,
    "step_ll128": _STEP,
    "step_simple": _STEP,
    "reach_ll": Parameter(0.2, 0.01, 0.5),
    "reach_ll128": Parameter(0.4, 0.02, 0.9375),
    "reach_simple": _SHARE,
    "own_ll128": Parameter(0.5, 0.01, 3.0),
    "own_simple": Parameter(0.4, 0.01, 3.0),
    "chunk": Parameter(2e6, 1e3, 1e8, "size"),
    "switch_head": Parameter(4e-6, 1e-7, 50e-6, "time"),
    "switch_reach": Parameter(0.65, 0.1, 1.0),
    "pair_launch": Parameter(8e-6, 1e-6, 30e-6, "time"),
    "pair_peer": Parameter(0.3e-6, 1e-8, 10e-6, "time"),
    "pair_rate": Parameter(6e9, 1e8, 1e11, "bandwidth"),
    "pair_simple": Parameter(6e-6, 1e-7, 50e-6, "time"),
    "pair_reach": _SHARE,
    "pair_own": Parameter(0.5, 0.01, 3.0),
}
FABRIC = {
    "step_ll": Parameter(3e-6, 1e-7, 50e-6, "time"),
    "step_simple": Parameter(8e-6, 1e-7, 80e-6, "time"),
    "rate_ll": Parameter(3e9, 1e8, 5e10, "bandwidth"),
    "reach": Parameter(0.95, 0.3, 1.0),
    "pair_peer": Parameter(2e-6, 1e-8, 50e-6, "time"),
}
KERNELS = {
    "launch": Parameter(3e-6, 1e-7, 20e-6, "time"),
    "barrier": Parameter(2e-6, 1e-8, 20e-6, "time"),
    "peer": Parameter(0.1e-6, 1e-9, 5e-6, "time"),
    "reach_one": Parameter(0.6, 0.05, 1.0),
    "reach_two": Parameter(0.6, 0.05, 1.0),
    "host": Parameter(25e-6, 1e-6, 200e-6, "time"),
    "copy_rate": Parameter(1e12, 1e11, 1e13, "bandwidth"),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one kind, architecture, fabric, kernel and way, as arrays for the closed forms."""

    rows: Sequence[Row]
    shape: Shape
    size: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Group:
        """All rows at once."""
        names = [one.name for one in fields(Shape)]
        arrays = {name: np.array([getattr(row.shape, name) for row in rows], dtype=float) for name in names}
        return cls(rows, Shape(**arrays), np.array([row.size for row in rows], dtype=float))

    def predict(self, costs: Mapping[str, Any]) -> tuple[Parts, list[str]]:
        """Parts of each row's time, and the algorithm the model takes for it."""
        row = self.rows[0]
        held = Costs(costs[row.architecture], costs[row.fabric], costs.get(row.kernel))
        kind = KINDS[row.kind]
        if row.kernel:
            return self._kernel(held, kind)
        if row.algorithm:
            return estimate(held, kind, row.algorithm, self.shape, self.size)[0], [row.algorithm] * len(
                self.rows
            )
        parts, best, names = quickest(held, kind, self.shape, self.size)
        return parts, [names[place] for place in best]

    def _kernel(self, costs: Costs, kind: str) -> tuple[Parts, list[str]]:
        """The quicker of the custom kernels, or NCCL where they are given up."""
        ways = [
            estimate(costs, kind, name, self.shape, self.size)[0] for name in _CUSTOM[: self.rows[0].shots]
        ]
        names = [*_CUSTOM[: len(ways)], "library"]
        ways.append(quickest(costs, kind, self.shape, self.size)[0])
        seconds = np.stack([way.seconds for way in ways])
        seconds[:-1, self.size > self.rows[0].most] = np.inf
        best = np.argmin(seconds, axis=0)
        kernels = costs.kernels
        assert kernels is not None
        found = np.take_along_axis(seconds, best[None], axis=0)[0]
        if self.rows[0].eager:
            found = np.maximum(kernels.host, found + self.size / kernels.copy_rate)
        port = np.take_along_axis(np.stack([way.port for way in ways]), best[None], axis=0)[0]
        zero = np.zeros(len(found))
        return Parts(zero, zero, found, port), [names[place] for place in best]


def grouped(rows: Iterable[Row]) -> list[Group]:
    """Rows gathered by what a call of the closed forms has in common, in order of appearance."""
    gathered: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        gathered.setdefault(
            (row.kind, row.architecture, row.fabric, row.kernel, row.algorithm, row.eager), []
        ).append(row)
    return [Group.of(group) for group in gathered.values()]


def predict(file: str, table: Table, costs: FamilyCosts) -> list[Prediction]:
    """What the model says about the rows of a file, in row order."""
    found = []
    for group in grouped(READERS[file](table)):
        parts, choices = group.predict(costs)
        seconds, port = (
            np.broadcast_to(parts.seconds, group.size.shape),
            np.broadcast_to(parts.port, group.size.shape),
        )
        for row, predicted, busy, choice in zip(group.rows, seconds, port, choices, strict=True):
            found.append(
                Prediction(
                    file, row.number, row.kind, row.what, int(row.shape.members), row.servers, row.size,
                    row.measured, float(predicted), ruled_by(float(busy), row.measured), row.fitted, choice,
                )
            )  # fmt: skip
    return sorted(found, key=lambda one: one.row)


def fit_collectives(tables: Mapping[str, Table]) -> Groups:
    """Parameters of every architecture, fabric and kernel: first what stays in a domain, then the
    network, then the custom kernels, each with what was found before."""
    rows = [row for file, table in tables.items() for row in _numbered(file, table) if row[1].fitted]
    groups: dict[str, dict[str, Fitted]] = {}
    for name, (form, parameters, chosen) in _STAGES.items():
        here = [row for row in rows if chosen(row[1], name)]
        groups[name] = _fitted(name, form, parameters, here, costs_of(groups))
    return groups


def _numbered(file: str, table: Table) -> list[tuple[str, Row]]:
    return [(file, row) for row in READERS[file](table)]


def _fitted(
    name: str,
    form: type[Value],
    parameters: Mapping[str, Parameter],
    rows: Sequence[tuple[str, Row]],
    known: FamilyCosts,
) -> dict[str, Fitted]:
    file_of = {id(row): file for file, row in rows}
    batches = grouped(row for _, row in rows)
    in_order = [row for batch in batches for row in batch.rows]

    def model(values: Mapping[str, float]) -> np.ndarray:
        costs = {**known, name: _of_floats(form, values)}
        found = [np.broadcast_to(b.predict(costs)[0].seconds, b.size.shape) for b in batches]
        return np.concatenate(found)

    measured = np.array([row.measured for row in in_order])
    files = np.array([file_of[id(row)] for row in in_order], dtype="str")
    return fit(parameters, model, measured, files)


def costs_of(groups: Groups) -> FamilyCosts:
    """Group → its costs; groups that are not there yet have their starting values."""
    given = values(groups)
    return {
        name: from_values(given[name], form)
        if name in given
        else _of_floats(form, {key: one.start for key, one in parameters.items()})
        for name, (form, parameters, _) in _STAGES.items()
    }


def _of_floats(form: type[Value], values: Mapping[str, float]) -> Value:
    # Already SI and within bounds: the search calls this thousands of times.
    given: Any = dict(values)
    return form.model_construct(**given)


def _inside(row: Row, name: str) -> bool:
    return row.architecture == name and not row.kernel and row.shape.domains == 1


def _between(row: Row, name: str) -> bool:
    return row.fabric == name and row.shape.domains > 1


def _by_kernel(row: Row, name: str) -> bool:
    return row.kernel == name


#: Group, in the order of fitting → its form, its parameters, and which rows it is fitted to.
_STAGES: dict[str, tuple[type[Value], Mapping[str, Parameter], Callable[[Row, str], bool]]] = {
    **dict.fromkeys(ARCHITECTURES, (LibraryCosts, LIBRARY, _inside)),
    **dict.fromkeys(FABRICS, (FabricCosts, FABRIC, _between)),
    **dict.fromkeys(KERNEL_GROUPS, (KernelCosts, KERNELS, _by_kernel)),
}

COLLECTIVES = Family(
    SECTION,
    {file: partial(predict, file) for file in READERS},
    fit_collectives,
    costs_of,
    left_out(),
)
