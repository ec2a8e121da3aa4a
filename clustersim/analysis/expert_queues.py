"""What came to each expert copy, and how long it stood there: load, queue and wait, by copy and by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isnan
from typing import Any

import numpy as np

from clustersim.analysis.columns import ratio
from clustersim.analysis.latency import numbers, words
from clustersim.trace.record import Columns, Trace

_WAITS = ("mean", "behind", "p99", "max")

#: What copies may be sorted by, the most first → how much of it a copy has.
ORDERS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    # What the copy and its rank do. Waiting for tokens still to come is longest where few come, and the
    # senders' doing.
    "": lambda copy: (copy["wait"]["behind"] or 0.0) + copy["service"],
    "load": lambda copy: float(copy["load"]),
    "wait": lambda copy: float(copy["wait"]["mean"]),
    "service": lambda copy: float(copy["service"]),
    "behind": lambda copy: copy["wait"]["behind"] or 0.0,
}


def copies(trace: Trace, order: str = "") -> list[dict[str, Any]]:
    """Every expert copy over the run, by layer, rank, slot and expert.

    order     of ORDERS; by itself the one first whose tokens take longest from when all are there: behind
              other work, and in service

    passes    token batches in which the copy was there
    tokens    that came for it; load: these ÷ the mean of the copies in its layer
    length    tokens in its queue when service began, mean and max over the passes that brought some
    wait      s that a token waited: mean over its tokens, the largest p99 of its passes, and max; of the
              mean coming, for tokens still to come that are served together with it, and behind, behind other
              work of the rank; these are None where an older version recorded the run
    service   s from beginning to end of the service, mean over the passes that brought some
    Returns   [] where no expert was at work
    """
    table = trace.tables["experts"]
    if not len(numbers(table, "rank")):
        return []
    group = _Grouped(table, ("layer", "rank", "slot", "expert"))
    layer, rank, slot, expert = group.keys
    tokens = group.sum(numbers(table, "tokens"))
    in_layer = np.bincount(layer, weights=tokens) / np.maximum(np.bincount(layer), 1)
    found = group.queues(table)
    columns = {
        "layer": layer,
        "rank": rank,
        "gpu": _gpus(trace)[rank],
        "slot": slot,
        "expert": expert,
        "passes": group.counts,
        "tokens": tokens.astype(np.int64),
        "load": ratio(tokens, in_layer[layer]),
        **found,
    }
    entries = [_entry(row) for row in zip(*(column.tolist() for column in columns.values()), strict=True)]
    return sorted(entries, key=lambda copy: (-ORDERS[order](copy), -copy["tokens"]))


def layers(trace: Trace) -> list[dict[str, Any]]:
    """Every layer with experts over the run, in order.

    tokens     that came to its experts
    imbalance  tokens of the busiest EP rank ÷ their mean, mean over the passes
    busiest    EP rank and expert that got most tokens over the run; load: the expert's ÷ the mean of experts
    length, wait, service   as for `copies`, over all its queues
    """
    table = trace.tables["experts"]
    if not len(numbers(table, "rank")):
        return []
    group = _Grouped(table, ("layer",))
    (layer,) = group.keys
    tokens, found = group.sum(numbers(table, "tokens")), group.queues(table)
    imbalance = _imbalance(table)
    entries = []
    for at, number in enumerate(layer.tolist()):
        here = numbers(table, "layer") == number
        got = numbers(table, "tokens")[here]
        member = np.bincount(numbers(table, "ep_rank")[here], weights=got)
        kind = np.bincount(numbers(table, "expert")[here], weights=got)
        entries.append(
            {
                "layer": number,
                "tokens": int(tokens[at]),
                "imbalance": imbalance[number],
                "busiest": {
                    "ep_rank": int(member.argmax()),
                    "expert": int(kind.argmax()),
                    "load": float(kind.max() / kind.mean()) if kind.sum() else 0.0,
                },
                "length": {"mean": float(found["length_mean"][at]), "max": int(found["length_max"][at])},
                "wait": _waits(*(float(found[f"wait_{key}"][at]) for key in _WAITS)),
                "service": float(found["service"][at]),
            }
        )
    return entries


class _Grouped:
    """Rows of the table `experts` by some columns.

    keys    one array per column, of the groups
    counts  int64[groups] rows in each
    """

    def __init__(self, table: Columns, columns: tuple[str, ...]) -> None:
        key = np.zeros(len(numbers(table, "rank")), dtype=np.int64)
        sizes = [int(numbers(table, name).max()) + 1 for name in columns]
        for name, size in zip(columns, sizes, strict=True):
            key = key * size + numbers(table, name)
        groups, self._member, self.counts = np.unique(key, return_inverse=True, return_counts=True)
        keys = []
        for size in reversed(sizes):
            keys.append(groups % size)
            groups = groups // size
        self.keys = keys[::-1]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64[groups]"""
        return np.bincount(self._member, weights=values, minlength=len(self.counts))

    def max(self, values: np.ndarray) -> np.ndarray:
        """float64[groups]; NaN does not count, and where there is nothing else it is 0."""
        most = np.zeros(len(self.counts))
        np.fmax.at(most, self._member, values)
        return most

    def queues(self, table: Columns) -> dict[str, np.ndarray]:
        """Queue lengths, waits and service of each group."""
        tokens = numbers(table, "tokens")
        some = tokens > 0
        busy = self.sum(some)
        return {
            "length_mean": ratio(self.sum(np.where(some, numbers(table, "length"), 0)), busy),
            "length_max": self.max(numbers(table, "length")).astype(np.int64),
            "wait_mean": ratio(self.sum(numbers(table, "wait")), self.sum(tokens)),
            "wait_behind": ratio(self.sum(numbers(table, "behind")), self.sum(tokens)),
            "wait_p99": self.max(numbers(table, "wait_p99")),
            "wait_max": self.max(numbers(table, "wait_max")),
            "service": ratio(
                self.sum(np.where(some, numbers(table, "done") - numbers(table, "served"), 0.0)), busy
            ),
        }


def _entry(row: tuple[Any, ...]) -> dict[str, Any]:
    layer, rank, gpu, slot, expert, passes, tokens, load, mean_length, most, *waits, service = row
    return {
        "layer": layer,
        "rank": rank,
        "gpu": gpu,
        "slot": slot,
        "expert": expert,
        "passes": passes,
        "tokens": tokens,
        "load": load,
        "length": {"mean": mean_length, "max": most},
        "wait": _waits(*waits),
        "service": service,
    }


def _waits(mean: float, behind: float, p99: float, longest: float) -> dict[str, float | None]:
    known = not isnan(behind)
    # The two add up to the mean but for roundoff.
    coming = max(mean - behind, 0.0) if known else None
    return {
        "mean": mean, "coming": coming, "behind": behind if known else None, "p99": p99, "max": longest,
    }  # fmt: skip


def _imbalance(table: Columns) -> dict[int, float]:
    """Layer → largest ÷ mean tokens over the EP ranks, mean over its passes that had tokens."""
    group = _Grouped(table, ("layer", "token_batch", "ep_rank"))
    layer, batch, _ = group.keys
    tokens = group.sum(numbers(table, "tokens"))
    starts = np.flatnonzero((np.diff(layer, prepend=-1) != 0) | (np.diff(batch, prepend=-1) != 0))
    total, members = np.add.reduceat(tokens, starts), np.diff(starts, append=len(tokens))
    uneven = ratio(np.maximum.reduceat(tokens, starts) * members, total)
    of, some = layer[starts], total > 0
    sums, counts = np.bincount(of[some], weights=uneven[some]), np.bincount(of[some])
    known = {int(n): float(sums[n] / counts[n]) for n in np.flatnonzero(counts)}
    return {int(n): known.get(int(n), 0.0) for n in np.unique(layer)}


def _gpus(trace: Trace) -> np.ndarray:
    """object[highest rank + 1] the vertex of each rank."""
    ranks = trace.tables["ranks"]
    names = np.full(int(numbers(ranks, "rank").max(initial=-1)) + 1, "", dtype=object)
    names[numbers(ranks, "rank")] = words(ranks, "gpu")
    return names
