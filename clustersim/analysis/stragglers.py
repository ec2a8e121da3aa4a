"""Who made the others wait: which rank, how long, at which operator and layer, and when."""

from __future__ import annotations

from typing import Any

import numpy as np

from clustersim.analysis.cause import next_rank
from clustersim.analysis.columns import is_word, text
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.lateness import RankLoads, slowness
from clustersim.analysis.over_time import spans_of
from clustersim.trace.record import Columns, Trace

#: Operators and layers that are told of a straggler.
_PLACES = 3
#: From here on a rank's own slowness or load is a reason; below it is noise.
_SLOW, _LOADED = 1.02, 1.1


def stragglers(trace: Trace, operator: str | None = None) -> list[dict[str, Any]]:
    """The ranks that others waited for, the one that cost most first. Needs no spans.

    operator   only waiting in this exchange
    Returns    rank, gpu, stage; seconds: how long all others together waited for it; share: of all such
               waiting; each: s that each other rank of its stage waited for it per step, mean; at: the
               operators and layers where most of it was, with their seconds; slowness: its computing ÷ as
               priced, relative to the median rank; load: its tokens ÷ the mean of ranks in the layer in
               which it was waited for most, of the whole run where that has no experts, None without any;
               reasons: of "slow GPU" and "more tokens". [] where nobody waited for anybody
    """
    waits, ranks = trace.tables["waits"], trace.tables["ranks"]
    chosen = np.ones(len(numbers(waits, "rank")), dtype=bool)
    if operator is not None:
        chosen &= is_word(waits, "operator", operator)
    culprit, seconds = numbers(waits, "rank")[chosen], numbers(waits, "seconds")[chosen]
    blamed = np.bincount(culprit, weights=seconds)
    total = float(blamed.sum())
    names, layer = words(waits, "operator")[chosen], numbers(waits, "layer")[chosen]
    row_of = {int(rank): row for row, rank in enumerate(numbers(ranks, "rank"))}
    stage, slow, loads = numbers(ranks, "stage"), slowness(trace), RankLoads(trace)
    steps = max(len(numbers(trace.tables["steps"], "step")), 1)
    found = []
    for rank in np.argsort(-blamed, kind="stable").tolist():
        if blamed[rank] <= 0:
            break
        row, mine = row_of[rank], culprit == rank
        load = loads.of(rank, _longest(layer[mine], seconds[mine]))
        others = max(int((stage == stage[row]).sum()) - 1, 1)
        found.append(
            {
                "rank": rank,
                "gpu": str(words(ranks, "gpu")[row]),
                "stage": int(stage[row]),
                "seconds": float(blamed[rank]),
                "share": float(blamed[rank]) / total,
                "each": float(blamed[rank]) / others / steps,
                "at": _places(names[mine], layer[mine], seconds[mine]),
                "slowness": float(slow[rank]),
                "load": load,
                "reasons": _reasons(float(slow[rank]), load),
            }
        )
    return found


def next_straggler(trace: Trace) -> dict[str, Any] | None:
    """The rank that would be waited for longest, were the worst straggler as fast as the others, as
    `cause.next_rank` has it; None where there would be none."""
    blamed = stragglers(trace)
    steps = len(numbers(trace.tables["steps"], "step"))
    if not blamed or not steps:
        return None
    return next_rank(trace, steps, slowness(trace), blamed[0]["rank"], [])


def waits_by_operator(trace: Trace) -> list[dict[str, Any]]:
    """The exchanges in which ranks waited for others, the longest first: operator, seconds (over all that
    waited), share of all such waiting, and the rank most waited for in it."""
    waits = trace.tables["waits"]
    seconds, culprit = numbers(waits, "seconds"), numbers(waits, "rank")
    names = words(waits, "operator")
    total = float(seconds.sum())
    found = []
    for name in dict.fromkeys(names.tolist()):
        rows = names == name
        here = float(seconds[rows].sum())
        worst = int(np.bincount(culprit[rows], weights=seconds[rows]).argmax())
        found.append({"operator": name, "seconds": here, "share": here / total, "rank": worst})
    return sorted(found, key=lambda entry: (-entry["seconds"], entry["operator"]))


def moments(trace: Trace, operator: str | None = None) -> list[dict[str, Any]]:
    """Every wait of ranks for one rank in one exchange, the longest first. Needs spans.

    operator   only in this exchange
    Returns    operator, layer, token_batch, step; rank: waited for, -1 where its span was not recorded;
               ranks: how many waited; seconds: all together; longest; start, end: s from when the first of
               them waited until they met
    Raises     ResultError where no spans were recorded
    """
    spans = spans_of(trace)
    start, met = numbers(spans, "start"), numbers(spans, "met")
    late = is_word(spans, "kind", "exchange") & (met > start)
    if operator is not None:
        late &= is_word(spans, "operator", operator)
    rows = np.flatnonzero(late)
    if not len(rows):
        return []
    culprit = awaited(spans, rows)
    operators = text(spans, "operator")
    name = operators.codes[rows]
    batch, layer = numbers(spans, "token_batch")[rows], numbers(spans, "layer")[rows]
    keys = np.stack([batch, layer, name, culprit])
    groups, member = np.unique(keys, axis=1, return_inverse=True)
    member, count = member.ravel(), groups.shape[1]
    took = met[rows] - start[rows]
    begin, end, longest = np.full(count, np.inf), np.full(count, -np.inf), np.zeros(count)
    np.minimum.at(begin, member, start[rows])
    np.maximum.at(end, member, met[rows])
    np.maximum.at(longest, member, took)
    seconds, waiting = np.bincount(member, weights=took), np.bincount(member)
    step = _steps(trace)
    order = np.lexsort((begin, -seconds))
    return [
        {
            "operator": operators.words[groups[2, at]],
            "layer": int(groups[1, at]),
            "token_batch": int(groups[0, at]),
            "step": step.get(int(groups[0, at])),
            "rank": int(groups[3, at]),
            "ranks": int(waiting[at]),
            "seconds": float(seconds[at]),
            "longest": float(longest[at]),
            "start": float(begin[at]),
            "end": float(end[at]),
        }
        for at in order.tolist()
    ]


def awaited(spans: Columns, rows: np.ndarray) -> np.ndarray:
    """int64[n] the rank that each of some waiting spans waited for; -1 where its span was not recorded.

    rows     of exchanges that waited: what released them is the predecessor of the rank waited for
    """
    number, before = numbers(spans, "span"), numbers(spans, "after")[rows]
    order = np.argsort(number, kind="stable")
    at = np.minimum(np.searchsorted(number, before, sorter=order), len(number) - 1)
    found: np.ndarray = np.where(
        number[order[at]] == before, numbers(spans, "rank")[order[at]].astype(np.int64), -1
    )
    return found


def _places(names: np.ndarray, layer: np.ndarray, seconds: np.ndarray) -> list[dict[str, Any]]:
    """The operators and layers with most waiting; phases are added up."""
    sums: dict[tuple[str, int], float] = {}
    for name, number, time in zip(names, layer.tolist(), seconds.tolist(), strict=True):
        sums[name, number] = sums.get((name, number), 0.0) + time
    order = sorted(sums, key=lambda place: (-sums[place], place))[:_PLACES]
    return [{"operator": name, "layer": number, "seconds": sums[name, number]} for name, number in order]


def _longest(layer: np.ndarray, seconds: np.ndarray) -> int:
    """The layer in which it was waited for most; -1 if in none."""
    known = layer >= 0
    return int(np.bincount(layer[known], weights=seconds[known]).argmax()) if known.any() else -1


def _reasons(slow: float, load: float | None) -> list[str]:
    found = {"slow GPU": slow >= _SLOW, "more tokens": load is not None and load >= _LOADED}
    return [reason for reason, holds in found.items() if holds]


def _steps(trace: Trace) -> dict[int, int]:
    passes = trace.tables["token_batches"]
    return dict(zip(numbers(passes, "token_batch").tolist(), numbers(passes, "step").tolist(), strict=True))
