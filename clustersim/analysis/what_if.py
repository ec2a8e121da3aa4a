"""How much faster each step would be were one thing away: bounds, reckoned over the recorded graph.

What is not reckoned anew: how flows of different exchanges share links, which algorithm would be chosen,
which expert would be served next. So every answer is a bound on one change by itself, not a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.analysis.latency import numbers, words
from clustersim.analysis.recomputing import Graph
from clustersim.analysis.span_blocks import Block
from clustersim.errors import NotRecordedError
from clustersim.trace.record import Trace

#: Links between these are NVLink, or what a server has in its place; others are the network, and cards.
_NVLINK = ("gpu", "nvswitch")
#: What tokens bring to the ranks of their experts, and what these do.
_EXPERTS = "expert_"
_TOKENS_SENT = ("dispatch", "combine")
#: Of a duration: what is no difference.
_ROUNDOFF = 1e-9


@dataclass(frozen=True, slots=True)
class Bound:
    """What a change could bring at most.

    name     a key of CHANGES
    seconds  of the mean step; p99 that of the 99th percentile
    speedup  recorded mean step / seconds
    faster   1 - seconds / recorded: by which share the mean step could be shorter at most; of_p99 likewise
    steps    float64[S] s, every step by itself
    words    a sentence
    """

    name: str
    seconds: float
    p99: float
    speedup: float
    faster: float
    of_p99: float
    steps: np.ndarray
    words: str


def _durations(graph: Graph) -> np.ndarray:
    return np.asarray(graph.spans.end - graph.spans.met)


def _no_straggler(graph: Graph) -> np.ndarray:
    """Compute as it was priced."""
    spans = graph.spans
    known = ~np.isnan(spans.priced)
    return np.asarray(np.where(known, spans.priced - _durations(graph), 0.0))


def _no_imbalance(graph: Graph) -> np.ndarray:
    """Every rank of a stage computes as long as the mean one, experts as long as the mean tokens take, and
    bytes of tokens as long as on the mean rank."""
    spans, change = graph.spans, np.zeros(len(graph.spans.span))
    took = _durations(graph)
    told = np.where(np.isnan(spans.priced), took, spans.priced)
    slow = np.divide(took, told, out=np.ones_like(took), where=told > 0)
    loads = Loads(graph)
    costs = _costs(graph, loads, told)
    for plan in graph.plans:
        block = plan.block
        each, factor = spans.table(told, block), spans.table(slow, block)
        out = spans.table(change, block)
        for p in range(block.operators):
            row = block.first + p
            if not spans.is_exchange[row]:
                cost = costs.get((int(spans.operator[row]), block.operators))
                even = each[:, p].mean()
                if cost is not None and (held := loads.tokens(block, row)) is not None:
                    even = min(cost.of(float(held.mean()), even), each[:, p].max())
                out[:, p] = (even - each[:, p]) * factor[:, p]
            elif spans.operator_of(row) in _TOKENS_SENT:
                most = loads.imbalance(block, row)
                if most > 1:
                    # Its bytes are those of the busiest rank, of which others wait for the last.
                    rows = row + np.arange(block.ranks) * block.operators
                    sent = np.minimum(graph.facts.link_seconds(rows, "least"), took[rows])
                    out[:, p] = -sent * (1 - 1 / most)
    return change


class Loads:
    """Tokens of ranks in every layer of every token batch, and for how many of their experts they are."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        table = graph.trace.tables["experts"]
        batch, layer, rank = (numbers(table, c).astype(np.int64) for c in ("token_batch", "layer", "rank"))
        self._layers = int(layer.max(initial=0)) + 1
        self._ranks = max(int(rank.max(initial=0)), int(graph.spans.rank.max())) + 1
        key = (batch * self._layers + layer) * self._ranks + rank
        places, where = np.unique(key, return_inverse=True)
        tokens = numbers(table, "tokens")
        sums = np.stack([np.bincount(where, weights=w, minlength=len(places)) for w in (tokens, tokens > 0)])
        self._held: dict[int, np.ndarray] = {}
        if len(places):
            cuts = np.flatnonzero(np.diff(places // self._ranks)) + 1
            for at, held in zip(np.split(places, cuts), np.split(sums, cuts, axis=1), strict=True):
                per_rank = np.zeros((2, self._ranks))
                per_rank[:, at % self._ranks] = held
                self._held[int(at[0] // self._ranks)] = per_rank

    def _of(self, block: Block, row: int) -> np.ndarray | None:
        spans = self._graph.spans
        held = self._held.get(block.token_batch * self._layers + int(spans.layer[row]))
        return None if held is None else np.asarray(held[:, spans.table(spans.rank, block)[:, 0]])

    def tokens(self, block: Block, row: int) -> np.ndarray | None:
        """float64[N] of the ranks of a block in the layer of a row; None where none is known."""
        held = self._of(block, row)
        return None if held is None else np.asarray(held[0])

    def used(self, block: Block, row: int) -> np.ndarray | None:
        """float64[N] experts with tokens, likewise."""
        held = self._of(block, row)
        return None if held is None else np.asarray(held[1])

    def imbalance(self, block: Block, row: int) -> float:
        """Largest / mean tokens of its ranks; 1 where they are not known."""
        held = self.tokens(block, row)
        return 1.0 if held is None or not held.any() else float(held.max() / held.mean())


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """What an expert operator takes by the tokens of its rank, as far as a run has shown it.

    tokens, seconds  float64[n] corners of the lower convex hull of what was seen, tokens ascending
    """

    tokens: np.ndarray
    seconds: np.ndarray

    def of(self, tokens: float, missing: float) -> float:
        """s at so many tokens: below the fewest seen those of these; `missing` beyond the most."""
        if tokens > self.tokens[-1] * (1 + _ROUNDOFF):
            return missing
        return float(np.interp(tokens, self.tokens, self.seconds))


def _costs(graph: Graph, loads: Loads, told: np.ndarray) -> dict[tuple[int, int], Cost]:
    """By operator and length of its stage's program.

    Time grows with tokens, and ever faster: first weights are read anyway, then tiles are full. So on the
    hull of what ranks took stands about what the mean tokens take. Only ranks that had tokens for as
    many experts as any are taken, because others read fewer weights, and an even load spares nobody.
    """
    seen: dict[tuple[int, int], list[np.ndarray]] = {}
    spans = graph.spans
    for plan in graph.plans:
        block = plan.block
        each = spans.table(told, block)
        first = slice(block.first, block.first + block.operators)
        names = [
            (int(code), int(layer))
            for code, layer in zip(spans.operator[first], spans.layer[first], strict=True)
        ]
        for p, name in enumerate(names):
            row = block.first + p
            # Served one by one, an operator's tokens are not those of its rank.
            if names.count(name) > 1 or not spans.operator_of(row).startswith(_EXPERTS):
                continue
            held, used = loads.tokens(block, row), loads.used(block, row)
            if spans.is_exchange[row] or held is None or used is None:
                continue
            points = np.stack([used, held, each[:, p]])
            seen.setdefault((name[0], block.operators), []).append(points)
    return {key: _hull(np.concatenate(points, axis=1)) for key, points in seen.items()}


def _hull(points: np.ndarray) -> Cost:
    """points  float64[3, n] experts used, tokens, s"""
    tokens, seconds = points[1:, points[0] == points[0].max()]
    distinct, where = np.unique(tokens, return_inverse=True)
    least = np.full(len(distinct), np.inf)
    np.minimum.at(least, where, seconds)
    corners: list[tuple[float, float]] = []
    for x, y in zip(distinct.tolist(), least.tolist(), strict=True):
        while len(corners) > 1 and _bends_down(corners[-2], corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    at, cost = np.array(corners).T
    return Cost(at, cost)


def _bends_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _infinite(nvlink: bool) -> Callable[[Graph], np.ndarray]:
    def change(graph: Graph) -> np.ndarray:
        """Exchanges that a link of a tier held up take what they take beside its bytes."""
        rows = np.flatnonzero(graph.spans.is_exchange)
        link = graph.facts.narrowest(rows)
        tier = words(graph.trace.tables["links"], "tier")
        of_tier = np.array([set(name.split("-")) <= set(_NVLINK) for name in tier], dtype=bool)
        known = link >= 0
        mine = known & (of_tier[link] == nvlink) if len(tier) else known
        if not known.any():
            mine = _inside_a_server(graph, rows) == nvlink
        took = _durations(graph)[rows]
        out = np.zeros(len(graph.spans.span))
        held = np.minimum(graph.facts.link_seconds(rows, "least"), took)
        out[rows] = np.where(mine, -held, 0.0)
        return out

    return change


def _inside_a_server(graph: Graph, rows: np.ndarray) -> np.ndarray:
    """bool[n] whether all that did an exchange sit in one server; for results that know no links.

    The peers of a hand-over are not in the trace; those of stages on one server are.
    """
    ranks, spans = graph.trace.tables["ranks"], graph.spans
    server = np.zeros(int(numbers(ranks, "rank").max()) + 1, dtype=np.int64)
    server[numbers(ranks, "rank")] = numbers(ranks, "server")
    inside: np.ndarray = np.zeros(len(spans.span), dtype=bool)
    stages = {plan.block.stage: server[spans.table(spans.rank, plan.block)[:, 0]] for plan in graph.plans}
    for plan in graph.plans:
        block, here = plan.block, stages[plan.block.stage]
        table = spans.table(inside, block)
        for p, members in enumerate(plan.members):
            if members is not None:
                alone = here[members].min(axis=1) == here[members].max(axis=1)
                table[members, p] = alone[:, None]
            elif plan.awaited[p] is not None:
                table[:, p] = (here == here[0]).all()
        if block.transfer >= 0:
            there = stages.get(block.stage + 1, here)
            inside[block.transfer : block.transfer + block.ranks] = here == there
    return np.asarray(inside[rows])


def _no_launch(graph: Graph) -> np.ndarray:
    """Kernels without their launches, exchanges without what they take beyond their bytes."""
    spans, took = graph.spans, _durations(graph)
    rows = np.arange(len(took))
    slow = np.divide(took, spans.priced, out=np.ones_like(took), where=spans.priced > 0)
    launch = np.minimum(graph.facts.launch(rows) * slow, took)
    # Without launches bytes go at other times, when a link may be as fast as it is at best; and nothing
    # that protocols add to them is sent.
    sent = np.minimum(graph.facts.link_seconds(rows, "most", "payload"), took)
    return np.asarray(-np.where(spans.is_exchange, took - sent, launch))


def _no_exchange(graph: Graph) -> np.ndarray:
    return np.asarray(np.where(graph.spans.is_exchange, -_durations(graph), 0.0))


def _no_compute(graph: Graph) -> np.ndarray:
    return np.asarray(np.where(graph.spans.is_exchange, 0.0, -_durations(graph)))


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that could be away.

    durations  graph → float64[n] s by which spans change; of several the longest answer counts
    words      what it is, in a clause
    """

    durations: tuple[Callable[[Graph], np.ndarray], ...]
    words: str


#: Name → what is away.
CHANGES: Mapping[str, Change] = {
    "no_imbalance": Change(
        (_no_imbalance,),
        "every rank of a stage had as much to compute, and sent as many tokens, as the mean one",
    ),
    "no_straggler": Change((_no_straggler,), "every GPU took for its operators what they are priced at"),
    "infinite_nvlink": Change(
        (_infinite(nvlink=True),), "bytes took no time in exchanges that an NVLink link holds up"
    ),
    "infinite_network": Change(
        (_infinite(nvlink=False),), "bytes took no time in exchanges that a card or a network link holds up"
    ),
    "no_launch": Change(
        (_no_launch,),
        "kernels cost no launch, and exchanges nothing beyond the bytes of their fullest link, "
        "those of protocols not counted",
    ),
    "perfect_overlap": Change(
        (_no_exchange, _no_compute),
        "exchanges and computing hid each other wholly, the longer of the two stayed",
    ),
}


def bounds(trace: Trace) -> list[Bound]:
    """How much faster steps could be at most, by each of CHANGES.

    Raises   ResultError where the trace has no spans, or none of a whole step
    """
    return bounds_of(Graph(trace))


def bounds_of(graph: Graph) -> list[Bound]:
    """As `bounds`, of a graph that is there already."""
    recorded = graph.steps(graph.spans.met, graph.spans.end)
    whole = ~np.isnan(recorded)
    if not whole.any():
        raise NotRecordedError("no step was recorded with all its passes; bounds need whole steps")
    found = []
    for name, change in CHANGES.items():
        answers = []
        for durations in change.durations:
            met, end = graph.ends(durations(graph))
            answers.append(graph.steps(met, end))
        found.append(_bound(name, change, np.max(answers, axis=0)[whole], recorded[whole]))
    return found


def _bound(name: str, change: Change, steps: np.ndarray, recorded: np.ndarray) -> Bound:
    mean, p99 = float(steps.mean()), float(np.quantile(steps, 0.99))
    was, was_p99 = float(recorded.mean()), float(np.quantile(recorded, 0.99))
    faster, of_p99 = 1 - mean / was, 1 - p99 / was_p99
    said = "no faster" if faster < 5e-4 else f"at most {faster:.1%} faster"
    speedup = was / mean if mean > 0 else float("inf")
    return Bound(name, mean, p99, speedup, faster, of_p99, steps, f"{said} if {change.words}")


def as_json(found: list[Bound]) -> list[dict[str, Any]]:
    """Bounds as JSON values, without their steps."""
    names = ("name", "seconds", "p99", "speedup", "faster", "of_p99", "words")
    return [{name: getattr(one, name) for name in names} for one in found]
