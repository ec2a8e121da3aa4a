"""By which algorithms ranks exchanged."""

from __future__ import annotations

from clustersim.analysis.latency import numbers, words
from clustersim.trace.record import Trace


def algorithms(trace: Trace) -> dict[str, dict[str, float]]:
    """Kind of exchange → algorithm → its share of the exchanges of this kind."""
    table = trace.tables["exchanges"]
    found: dict[str, dict[str, float]] = {}
    for kind, name, count in zip(
        words(table, "kind"), words(table, "algorithm"), numbers(table, "count"), strict=True
    ):
        of_kind = found.setdefault(kind, {})
        of_kind[name] = of_kind.get(name, 0.0) + float(count)
    return {
        kind: {name: count / sum(of_kind.values()) for name, count in of_kind.items()}
        for kind, of_kind in found.items()
    }
