"""How much faster each step would be were one thing away: bounds, reckoned over the recorded graph.

Spans say what had to be done in which order: a rank's operators one after the other, exchanges when their
members are there, hand-overs beside the computing, a stage when both it and what it is sent are there, a
micro-batch's next pass when its last is through. With durations changed all times follow anew. With
none changed they are the recorded ones, to the last bit.

What is not reckoned anew: how flows of different exchanges share links, which algorithm would be chosen,
which expert would be served next. So every answer is a bound on one change by itself, not a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.analysis.latency import numbers, words
from clustersim.analysis.path_words import Facts
from clustersim.analysis.span_blocks import Block, Spans, spans_of
from clustersim.errors import ResultError
from clustersim.trace.record import Trace

#: Ways of an exchange in which each rank sends when it is ready and waits for its own senders only.
EACH = ("one_sided", "low_latency")
#: Tiers with this at either end are NVLink; all others are the network, with the way to it.
_NVLINK = "nvswitch"
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


class Graph:
    """The recorded graph of a run: recomputes all times from changed durations.

    spans    as recorded; facts: what stands beside them
    Raises   ResultError where spans of a part of the run only were recorded within a pass
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.spans: Spans = spans_of(trace)
        self.facts = Facts(trace, self.spans)
        if not all(block.whole for block in self.spans.blocks):
            raise ResultError(
                "only a window of some passes was recorded; bounds need whole passes: record them with "
                "trace.steps instead of trace.window"
            )
        self._order = sorted(self.spans.blocks, key=lambda block: (block.token_batch, block.stage))
        self._plans = [_plan(self.spans, block) for block in self._order]
        self._chain = _chain(trace)

    @property
    def plans(self) -> list[Plan]:
        """The blocks in the order in which they are reckoned."""
        return self._plans

    def ends(self, change: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """When every span begins to do its work and ends.

        change   float64[n] s that every span of the table takes longer (negative: less) than recorded
        Returns  float64[n] met, float64[n] end, s. With no change those of the table
        """
        run = _Run(self, change)
        for plan in self._plans:
            run.block(plan)
        return run.met, run.end

    def steps(self, met: np.ndarray, end: np.ndarray) -> np.ndarray:
        """float64[S] s from the start to the end of each step of which all passes were recorded; NaN for
        others."""
        table, passes = self.trace.tables["steps"], self.trace.tables["token_batches"]
        step_of = dict(zip(numbers(passes, "token_batch").tolist(), numbers(passes, "step").tolist(), strict=True))
        place = {int(step): i for i, step in enumerate(numbers(table, "step"))}
        first, last = np.full(len(place), np.inf), np.full(len(place), -np.inf)
        seen = np.zeros(len(place), dtype=np.int64)
        stages = max(block.stage for block in self.spans.blocks)
        for plan in self._plans:
            block = plan.block
            at = place.get(step_of.get(block.token_batch, -1))
            if at is None:
                continue
            if block.stage == 0:
                seen[at] += 1
                first[at] = min(first[at], float(self.spans.table(met, block)[:, 0].min()))
            if block.stage == stages:
                last[at] = max(last[at], float(self.spans.table(end, block).max()))
        count = np.bincount([place[s] for s in step_of.values() if s in place], minlength=len(place))
        found: np.ndarray = np.where(seen == count, last - first, np.nan)
        return found

    def unexplained(self) -> float:
        """The longest that a recorded time is off from what the graph says it follows from, s.

        0 where the graph explains all. What is not explained keeps its length in every recomputation:
        passes that were stopped for weights, first passes that waited to be let in, and ranks that had
        served all their experts and waited for their own sends to leave.
        """
        run = _Run(self, None)
        for plan in self._plans:
            run.block(plan)
        return run.unexplained


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How the times of a block hang together.

    order    int64[N, P] its operators in the order in which each rank did them; None: as listed
    members  per column of an exchange int64[G, n] places in the block of each group; else None
    awaited  per column of an exchange in which each waits for its own senders int64[N] the place of the
             one that came last, its own where it waited for nobody; else None
    """

    block: Block
    order: np.ndarray | None
    members: list[np.ndarray | None]
    awaited: list[np.ndarray | None]


def _plan(spans: Spans, block: Block) -> Plan:
    start, end = (spans.table(c, block) for c in (spans.start, spans.end))
    order = None
    if not np.array_equal(start[:, 1:], end[:, :-1]):
        # Experts were served one by one: jobs changed places between a dispatch and its combine.
        order = np.argsort(end, axis=1, kind="stable")
    members: list[np.ndarray | None] = [None] * block.operators
    awaited: list[np.ndarray | None] = [None] * block.operators
    first = block.first
    for p in np.flatnonzero(spans.is_exchange[first : first + block.operators]).tolist():
        if spans.algorithm_of(first + p) in EACH:
            awaited[p] = _awaited(spans, block, p)
        else:
            members[p] = _members(spans, block, p)
    return Plan(block, order, members, awaited)


def _members(spans: Spans, block: Block, p: int) -> np.ndarray:
    group = spans.table(spans.group, block)[:, p]
    if group[0] < 0:
        # Older results do not number groups; those that met at the same time are taken for one.
        group = np.unique(spans.table(spans.met, block)[:, p], return_inverse=True)[1]
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    sizes = sizes[sizes > 0]
    if (sizes == sizes[0]).all():
        return order.reshape(len(sizes), -1)
    # Padded with the first of each: the latest of them stays the latest.
    found = np.empty((len(sizes), int(sizes.max())), dtype=np.int64)
    at = 0
    for row, size in enumerate(sizes.tolist()):
        found[row] = order[at]
        found[row, :size] = order[at : at + size]
        at += size
    return found


def _awaited(spans: Spans, block: Block, p: int) -> np.ndarray:
    met, start = (spans.table(c, block)[:, p] for c in (spans.met, spans.start))
    here = np.arange(block.ranks)
    waited = met > start
    last = spans.rows_of(spans.table(spans.after, block)[:, p]) - block.first
    inside = (last >= 0) & (last < block.ranks * block.operators)
    return np.where(waited & inside, last // block.operators, here)


def _chain(trace: Trace) -> dict[int, tuple[float, int]]:
    """Token batch → when it was ready, s, and the token batch whose end let it be so; -1 for none."""
    passes, steps = trace.tables["token_batches"], trace.tables["steps"]
    number, ready, end = (numbers(passes, c) for c in ("token_batch", "ready", "end"))
    of_step = {
        int(step): (int(batch), int(index))
        for step, batch, index in zip(*(numbers(steps, c) for c in ("step", "batch", "index")), strict=True)
    }
    part = numbers(passes, "microbatch").tolist()
    place = {
        (*of_step[step], micro): i
        for i, (step, micro) in enumerate(zip(numbers(passes, "step").tolist(), part, strict=True))
        if step in of_step
    }
    ended = {float(when): i for i, when in enumerate(end.tolist())}
    found = {}
    for (batch, index, micro), i in place.items():
        before = place.get((batch, index - 1, micro), -1)
        if before < 0:
            # A batch that waited for room was let in when another one ended.
            before = ended.get(float(ready[i]), -1)
        found[int(number[i])] = float(ready[i]), int(number[before]) if before >= 0 else -1
    return found


class _Run:
    """One recomputation. Every time is the recorded one plus what it is later by, so that nothing
    changed gives nothing but the recorded."""

    def __init__(self, graph: Graph, change: np.ndarray | None) -> None:
        spans = graph.spans
        self.met, self.end = spans.met.copy(), spans.end.copy()
        self._spans, self._change = spans, change
        self._chain = graph._chain
        self.unexplained = 0.0
        self._ended: dict[int, tuple[float, float]] = {}
        #: stream, stage → recorded and new ends of the last span of each rank
        self._last: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self._sent: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def block(self, plan: Plan) -> None:
        """Times of a block, after those of all it waits for."""
        block, spans = plan.block, self._spans
        free = self._begin(block)
        if plan.order is None:
            self._in_order(plan, free)
        else:
            self._out_of_order(plan, free)
        old, new = (spans.table(c, block) for c in (spans.end, self.end))
        last = (old.max(axis=1), new.max(axis=1))
        self._last["compute", block.stage] = last
        was, now = self._ended.get(block.token_batch, (-np.inf, -np.inf))
        self._ended[block.token_batch] = max(was, float(last[0].max())), max(now, float(last[1].max()))
        if block.transfer >= 0:
            self._hand_over(block, last)

    def _begin(self, block: Block) -> np.ndarray:
        """float64[N] when the first operator can begin, s."""
        start = self._spans.table(self._spans.start, block)[:, 0]
        known = [self._last.get(("compute", block.stage)), self._came(block)]
        found = [one for one in known if one is not None]
        if not found:
            return start.copy()
        was = np.max([one[0] for one in found], axis=0)
        now = np.max([one[1] for one in found], axis=0)
        self._not_explained(start - was)
        # What it waited for beside these, such as weights on their way, takes as long as it took.
        free: np.ndarray = start + (now - was)
        return free

    def _came(self, block: Block) -> tuple[np.ndarray, np.ndarray] | None:
        if block.stage > 0:
            return self._sent.get((block.token_batch, block.stage - 1))
        ready, before = self._chain.get(block.token_batch, (None, -1))
        if ready is None:
            return None
        # Both as they are reckoned: the ends of a pass that was not recorded are not known anew.
        was, now = self._ended.get(before, (ready, ready))
        return np.full(block.ranks, ready), np.full(block.ranks, ready + (now - was))

    def _in_order(self, plan: Plan, free: np.ndarray) -> None:
        table, block = self._spans.table, plan.block
        start, met, end = (table(c, block) for c in (self._spans.start, self._spans.met, self._spans.end))
        new_met, new_end = table(self.met, block), table(self.end, block)
        change = None if self._change is None else table(self._change, block)
        for p in range(block.operators):
            later = free - start[:, p]
            if plan.members[p] is not None or plan.awaited[p] is not None:
                later = self._meeting(plan, p, free)
            new_met[:, p] = met[:, p] + later
            if change is not None:
                later = later + change[:, p]
            free = new_end[:, p] = end[:, p] + later

    def _meeting(self, plan: Plan, p: int, free: np.ndarray) -> np.ndarray:
        """float64[N] s by which the members of an exchange have met later than recorded."""
        table, block = self._spans.table, plan.block
        start, met = table(self._spans.start, block)[:, p], table(self._spans.met, block)[:, p]
        members, awaited = plan.members[p], plan.awaited[p]
        if awaited is not None:
            was, now = np.maximum(start, start[awaited]), np.maximum(free, free[awaited])
        else:
            assert members is not None
            was, now = np.empty(len(free)), np.empty(len(free))
            was[members] = start[members].max(axis=1)[:, None]
            now[members] = free[members].max(axis=1)[:, None]
        self._not_explained(met - was)
        found: np.ndarray = now - was
        return found

    def _not_explained(self, seconds: np.ndarray) -> None:
        self.unexplained = max(self.unexplained, float(np.abs(seconds).max()))

    def _out_of_order(self, plan: Plan, free: np.ndarray) -> None:
        """As `_in_order` where a rank's jobs changed places, and where it waited for tokens of a job."""
        table, block, order = self._spans.table, plan.block, plan.order
        assert order is not None
        start, met, end = (table(c, block) for c in (self._spans.start, self._spans.met, self._spans.end))
        new_met, new_end = table(self.met, block), table(self.end, block)
        change = None if self._change is None else table(self._change, block)
        rows = np.arange(block.ranks)
        anchor = np.zeros(block.ranks)
        for turn in range(block.operators):
            p = order[:, turn]
            one = int(p[0])
            if plan.members[one] is not None or plan.awaited[one] is not None:
                assert (p == one).all(), "ranks come to an exchange at the same place of their programs"
                anchor = later = self._meeting(plan, one, free)
            else:
                here = (rows, p)
                # Tokens on their way come as long after the dispatch began as they did.
                at = np.where(met[here] > start[here], met[here] + anchor, -np.inf)
                later = np.maximum(start[here] + (free - start[here]), at) - met[here]
                later = np.where(met[here] > start[here], later, free - start[here])
            new_met[rows, p] = met[rows, p] + later
            if change is not None:
                later = later + change[rows, p]
            free = end[rows, p] + later
            new_end[rows, p] = free

    def _hand_over(self, block: Block, last: tuple[np.ndarray, np.ndarray]) -> None:
        spans = self._spans
        rows = slice(block.transfer, block.transfer + block.ranks)
        before = self._last.get(("transfer", block.stage), last)
        was, now = np.maximum(last[0], before[0]), np.maximum(last[1], before[1])
        self._not_explained(spans.start[rows] - was)
        later = now - was
        self.met[rows] = spans.met[rows] + later
        if self._change is not None:
            later = later + self._change[rows]
        self.end[rows] = spans.end[rows] + later
        ends = spans.end[rows], self.end[rows]
        self._last["transfer", block.stage] = self._sent[block.token_batch, block.stage] = ends


# ---- what could be away ----------------------------------------------------------------------------


def _durations(graph: Graph) -> np.ndarray:
    return graph.spans.end - graph.spans.met


def _no_straggler(graph: Graph) -> np.ndarray:
    """Compute as it was priced."""
    spans = graph.spans
    known = ~np.isnan(spans.priced)
    return np.where(known, spans.priced - _durations(graph), 0.0)


def _no_imbalance(graph: Graph) -> np.ndarray:
    """Every rank of a stage computes as long as the mean one; experts, where some rank with no less than
    the mean tokens took less, as long as that one; bytes of tokens as on the mean rank."""
    spans, change = graph.spans, np.zeros(len(graph.spans.span))
    took = _durations(graph)
    told = np.where(np.isnan(spans.priced), took, spans.priced)
    slow = np.divide(took, told, out=np.ones_like(took), where=told > 0)
    loads = _Loads(graph)
    cheapest = loads.cheapest(told)
    for plan in graph.plans:
        block = plan.block
        each, factor = spans.table(told, block), spans.table(slow, block)
        out = spans.table(change, block)
        for p in range(block.operators):
            row = block.first + p
            if not spans.is_exchange[row]:
                even = each[:, p].mean()
                even = min(even, cheapest.get(loads.key(block, row), np.inf))
                out[:, p] = (even - each[:, p]) * factor[:, p]
            elif spans.operator_of(row) in _TOKENS_SENT:
                most = loads.imbalance(block, row)
                if most > 1:
                    # Its bytes are those of the busiest rank, of which others wait for the last.
                    rows = row + np.arange(block.ranks) * block.operators
                    sent = np.minimum(graph.facts.link_seconds(rows), took[rows])
                    out[:, p] = -sent * (1 - 1 / most)
    return change


class _Loads:
    """Tokens of ranks in every layer of every token batch."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        table = graph.trace.tables["experts"]
        batch, layer, rank = (numbers(table, c).astype(np.int64) for c in ("token_batch", "layer", "rank"))
        self._layers = int(layer.max(initial=0)) + 1
        self._ranks = max(int(rank.max(initial=0)), int(graph.spans.rank.max())) + 1
        key = (batch * self._layers + layer) * self._ranks + rank
        places, where = np.unique(key, return_inverse=True)
        tokens = np.bincount(where, weights=numbers(table, "tokens"), minlength=len(places))
        self._tokens: dict[int, np.ndarray] = {}
        if len(places):
            cuts = np.flatnonzero(np.diff(places // self._ranks)) + 1
            for at, held in zip(np.split(places, cuts), np.split(tokens, cuts), strict=True):
                per_rank = np.zeros(self._ranks)
                per_rank[at % self._ranks] = held
                self._tokens[int(at[0] // self._ranks)] = per_rank

    def of(self, block: Block, row: int) -> np.ndarray | None:
        """float64[N] tokens of the ranks of a block in the layer of a row; None where none is known."""
        spans = self._graph.spans
        held = self._tokens.get(block.token_batch * self._layers + int(spans.layer[row]))
        if held is None:
            return None
        return held[spans.table(spans.rank, block)[:, 0]]

    def imbalance(self, block: Block, row: int) -> float:
        """Largest / mean tokens of its ranks; 1 where they are not known."""
        held = self.of(block, row)
        return 1.0 if held is None or not held.any() else float(held.max() / held.mean())

    def key(self, block: Block, row: int) -> tuple[int, int]:
        """Operator and mean tokens of a rank: passes with the same are held against each other."""
        spans = self._graph.spans
        if not spans.operator_of(row).startswith(_EXPERTS):
            return -1, -1
        held = self.of(block, row)
        return int(spans.operator[row]), -1 if held is None else round(float(held.mean()))

    def cheapest(self, told: np.ndarray) -> dict[tuple[int, int], float]:
        """By key the least that a span took, as priced, on a rank with no less than the mean tokens.

        What a rank takes grows with its tokens, so the even load costs no more than that.
        """
        spans, found = self._graph.spans, {}
        for plan in self._graph.plans:
            block = plan.block
            each = spans.table(told, block)
            for p in range(block.operators):
                row = block.first + p
                if spans.is_exchange[row] or not spans.operator_of(row).startswith(_EXPERTS):
                    continue
                held = self.of(block, row)
                if held is None:
                    continue
                loaded = each[held >= held.mean() * (1 - _ROUNDOFF), p]
                key = self.key(block, row)
                # An expert served by itself that got nothing says nothing about one that got some.
                some = loaded[loaded > 0]
                if len(some):
                    found[key] = min(found.get(key, np.inf), float(some.min()))
        return found


def _infinite(nvlink: bool) -> Callable[[Graph], np.ndarray]:
    def change(graph: Graph) -> np.ndarray:
        """Exchanges that a link of a tier held up take what they take beside its bytes."""
        rows = np.flatnonzero(graph.spans.is_exchange)
        link = graph.facts.narrowest(rows)
        tier = words(graph.trace.tables["links"], "tier")
        of_tier = np.array([_NVLINK in name for name in tier], dtype=bool)
        known = link >= 0
        mine = known & (of_tier[link] == nvlink) if len(tier) else known
        if not known.any():
            mine = _inside_a_server(graph, rows) == nvlink
        took = _durations(graph)[rows]
        out = np.zeros(len(graph.spans.span))
        out[rows] = np.where(mine, -np.minimum(graph.facts.link_seconds(rows), took), 0.0)
        return out

    return change


def _inside_a_server(graph: Graph, rows: np.ndarray) -> np.ndarray:
    """bool[n] whether all that did an exchange sit in one server; for results that know no links.

    The peers of a hand-over are not in the trace; those of stages on one server are.
    """
    ranks, spans = graph.trace.tables["ranks"], graph.spans
    server = np.zeros(int(numbers(ranks, "rank").max()) + 1, dtype=np.int64)
    server[numbers(ranks, "rank")] = numbers(ranks, "server")
    inside = np.zeros(len(spans.span), dtype=bool)
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
    return inside[rows]


def _no_launch(graph: Graph) -> np.ndarray:
    """Kernels without their launches, exchanges without what they take beyond their bytes."""
    spans, took = graph.spans, _durations(graph)
    rows = np.arange(len(took))
    slow = np.divide(took, spans.priced, out=np.ones_like(took), where=spans.priced > 0)
    launch = np.minimum(graph.facts.launch(rows) * slow, took)
    sent = np.minimum(graph.facts.link_seconds(rows), took)
    return -np.where(spans.is_exchange, took - sent, launch)


def _no_exchange(graph: Graph) -> np.ndarray:
    return np.where(graph.spans.is_exchange, -_durations(graph), 0.0)


def _no_compute(graph: Graph) -> np.ndarray:
    return np.where(graph.spans.is_exchange, 0.0, -_durations(graph))


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
        (_no_imbalance,), "every rank of a stage had as much to compute, and sent as many tokens, as the mean one"
    ),
    "no_straggler": Change((_no_straggler,), "every GPU took for its operators what they are priced at"),
    "infinite_nvlink": Change(
        (_infinite(nvlink=True),), "bytes took no time in exchanges that an NVLink link holds up"
    ),
    "infinite_network": Change(
        (_infinite(nvlink=False),), "bytes took no time in exchanges that a card or a network link holds up"
    ),
    "no_launch": Change(
        (_no_launch,), "kernels cost no launch, and exchanges nothing beyond the bytes of their fullest link"
    ),
    "perfect_overlap": Change(
        (_no_exchange, _no_compute), "exchanges and computing hid each other wholly, the longer of the two stayed"
    ),
}


def bounds(trace: Trace) -> list[Bound]:
    """How much faster steps could be at most, by each of CHANGES.

    Raises   ResultError where the trace has no spans, or none of a whole step
    """
    graph = Graph(trace)
    recorded = graph.steps(graph.spans.met, graph.spans.end)
    whole = ~np.isnan(recorded)
    if not whole.any():
        raise ResultError("no step was recorded with all its passes; bounds need whole steps")
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
