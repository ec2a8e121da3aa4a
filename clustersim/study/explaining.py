"""One question: why did it take so long, and what could make it faster? Asked of a trace alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.analysis.critical_path import Path, Paths
from clustersim.analysis.latency import numbers
from clustersim.analysis.path_groups import as_json as path_as_json
from clustersim.analysis.recomputing import Graph
from clustersim.analysis.what_if import Bound, as_json, bounds_of
from clustersim.errors import ClustersimError, nearest
from clustersim.trace.record import Trace

__all__ = ["NAMED", "Explained", "explained", "is_named", "path_as_json", "path_of"]

#: Name → which step is meant, as a quantile of their latencies.
NAMED = {"slowest": 1.0, "p99": 0.99, "median": 0.5, "fastest": 0.0}
_NUMBERED = re.compile(r"(?:(step|request)\s*[:=]?\s*)?(\d+)")


@dataclass(frozen=True, slots=True)
class Explained:
    """What steps could gain at most, and what their critical paths are made of.

    unexplained  s by which recorded times are off from what the graph says, at most
    shares       as `Paths.shares` gives them
    """

    bounds: list[Bound]
    unexplained: float
    shares: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"bounds": as_json(self.bounds), "unexplained": self.unexplained, "shares": self.shares}


def path_of(trace: Trace, what: str) -> Path:
    """The critical path of what is named: "7", "step:7", "request:3", or a key of NAMED.

    Raises   ClustersimError where that is no step or request of the trace
    """
    paths = Paths(trace)
    if what in NAMED:
        return paths.step(_step_at(trace, NAMED[what]))
    found = _NUMBERED.fullmatch(what.strip())
    if found is None:
        raise ClustersimError(
            f'"{what}" is no step or request{nearest(what, [*NAMED, "step:0", "request:0"])}; write a number '
            f"for a step, step:7, request:3, or one of {', '.join(NAMED)}"
        )
    kind, number = found.groups()
    return paths.request(int(number)) if kind == "request" else paths.step(int(number))


def is_named(what: str) -> bool:
    """Whether a word could be a step or request: a number, or a key of NAMED."""
    return what in NAMED or _NUMBERED.fullmatch(what.strip()) is not None


def _step_at(trace: Trace, level: float) -> int:
    """The number of the first step that is as long as a share of all."""
    table = trace.tables["steps"]
    latency = numbers(table, "end") - numbers(table, "start")
    if not len(latency):
        raise ClustersimError("this result holds no step")
    order = np.argsort(latency, kind="stable")
    place = max(int(np.ceil(level * len(order))) - 1, 0)
    return int(numbers(table, "step")[order[place]])


def explained(trace: Trace) -> Explained:
    """Bounds of all steps, and shares of their critical paths by cause."""
    graph = Graph(trace)
    return Explained(bounds_of(graph), graph.unexplained(), Paths(trace).shares())
