"""How late ranks are by their own work, also those that nobody waits for because another is later still."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from clustersim.analysis.columns import ratio
from clustersim.analysis.latency import numbers, words
from clustersim.trace.record import Trace

#: Operators that are an expert's service.
SERVICE = ("expert_gemm_1", "expert_activation", "expert_gemm_2")
#: A rank that is late by less than this share of the latest between two exchanges holds up nobody there.
_NEARLY = 0.8


def slowness(trace: Trace) -> np.ndarray:
    """How many times as long each rank's operators took as the median GPU's would, float64[rank]."""
    ranks = trace.tables["ranks"]
    priced = np.bincount(numbers(ranks, "rank"), weights=numbers(ranks, "priced"))
    took_all = busy(trace, "compute", (), False)
    took = np.divide(took_all, priced, out=np.ones_like(priced), where=priced > 0)
    middle = float(np.median(took))
    return took / middle if middle > 0 else np.ones_like(took)


def busy(trace: Trace, kind: str, operators: tuple[str, ...], these: bool) -> np.ndarray:
    """Seconds each rank's compute stream was busy with these operators of a kind, or all others."""
    sums, size = trace.tables["sums"], len(numbers(trace.tables["ranks"], "rank"))
    chosen = (words(sums, "stream") == "compute") & (words(sums, "kind") == kind)
    chosen &= np.isin(words(sums, "operator"), operators) == these
    return np.bincount(numbers(sums, "rank")[chosen], weights=numbers(sums, "busy")[chosen], minlength=size)


class RankLoads:
    """Tokens that came to a rank's experts ÷ the mean of the ranks with experts of the same layers."""

    def __init__(self, trace: Trace) -> None:
        table = trace.tables["experts"]
        rank, number = numbers(table, "rank"), numbers(table, "layer")
        layers = int(number.max(initial=0)) + 1
        pairs, member = np.unique(rank.astype(np.int64) * layers + number, return_inverse=True)
        self._rank, self._layer = pairs // layers, pairs % layers
        self._got = np.bincount(member, weights=numbers(table, "tokens"), minlength=len(pairs))
        # Ranks of different stages hold different layers: each is held against the means of its own.
        mean = ratio(np.bincount(self._layer, weights=self._got), np.bincount(self._layer))
        self._mean = mean[self._layer]

    def of(self, rank: int, layer: int = -1) -> float | None:
        """Of a rank in a layer, as loads differ by layer; over its layers for -1, or where it has no experts
        there. None without experts."""
        mine = self._rank == rank
        if not mine.any() or not self._got.sum():
            return None
        there = mine & (self._layer == layer)
        mine = there if there.any() else mine
        mean = float(self._mean[mine].sum())
        return float(self._got[mine].sum()) / mean if mean else 0.0


def late(trace: Trace, steps: int, gone: Iterable[int] = (), served: bool = True) -> np.ndarray:
    """How long each other GPU would wait for a rank in a step by its own computing, s, float64[rank].

    Between two exchanges ranks are late by what they take longer than the mean of the others. Counted is
    where a rank is the latest or nearly so: equals are equally late, whichever of them is the last.

    gone    ranks that are taken to be as fast as the others, which nobody waits for then
    served  whether the service of experts counts, or the other computing only
    """
    size = len(numbers(trace.tables["ranks"], "rank"))
    absent = np.zeros(size, dtype=bool)
    absent[list(gone)] = True
    found = np.zeros(size)
    for took in _between_exchanges(trace, served):
        took[:, absent] = np.nan
        there = np.isfinite(took)
        members = there.sum(axis=1, keepdims=True)
        mean = ratio(np.where(there, took, 0.0).sum(axis=1, keepdims=True), members)
        longer = np.where(there, took - mean, 0.0) * ratio(members, members - 1.0)
        most = longer.max(axis=1, keepdims=True)
        found += np.where((longer > 0) & (longer >= _NEARLY * most), longer, 0.0).sum(axis=0)
    return found / steps


def _between_exchanges(trace: Trace, served: bool) -> Iterator[np.ndarray]:
    """What ranks take between exchanges, s, float64[n, ranks], NaN for those that take no part: the stages
    with all computing but the experts', then the passes of token batches through layers with experts."""
    ranks = trace.tables["ranks"]
    stage = np.zeros(len(numbers(ranks, "rank")), dtype=np.int64)
    stage[numbers(ranks, "rank")] = numbers(ranks, "stage")
    other = busy(trace, "compute", SERVICE, False)
    yield np.where(np.unique(stage)[:, None] == stage, other, np.nan)
    table = trace.tables["experts"]
    if served and len(numbers(table, "rank")):
        layers = int(numbers(table, "layer").max()) + 1
        place = numbers(table, "token_batch").astype(np.int64) * layers + numbers(table, "layer")
        passes, row = np.unique(place, return_inverse=True)
        begun = np.full((len(passes), len(stage)), np.inf)
        done = np.full((len(passes), len(stage)), -np.inf)
        np.minimum.at(begun, (row.ravel(), numbers(table, "rank")), numbers(table, "served"))
        np.maximum.at(done, (row.ravel(), numbers(table, "rank")), numbers(table, "done"))
        there = np.isfinite(done)
        yield np.where(there, np.where(there, done, 0.0) - np.where(there, begun, 0.0), np.nan)
