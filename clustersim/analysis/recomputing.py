"""A run's spans as a graph: all times reckoned anew from changed durations.

Spans say what had to be done in which order: a rank's operators one after the other, exchanges when their
members are there, hand-overs beside the computing, a stage when both it and what it is sent are there, a
micro-batch's next pass when its last is through. With durations changed all times follow anew. With
none changed they are the recorded ones, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.analysis.latency import numbers
from clustersim.analysis.path_words import Facts
from clustersim.analysis.span_blocks import Block, Spans, spans_of
from clustersim.errors import NotRecordedError
from clustersim.trace.record import Trace

#: Ways of an exchange in which each rank sends when it is ready and waits for its own senders only.
EACH = ("one_sided", "low_latency")


class Graph:
    """The recorded graph of a run: recomputes all times from changed durations.

    spans    as recorded; facts: what stands beside them
    Only passes are reckoned of which all spans were recorded; spans of others stay as they are.

    Raises   NotRecordedError where no pass was recorded whole
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.spans: Spans = spans_of(trace)
        self.facts = Facts(trace, self.spans)
        whole = [block for block in self.spans.blocks if block.token_batch in self.spans.passes]
        if not whole:
            raise NotRecordedError(
                "only a window of some passes was recorded; bounds need whole passes: record them with "
                "trace.steps instead of trace.window"
            )
        self._order = sorted(whole, key=lambda block: (block.token_batch, block.stage))
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
        step_of = dict(
            zip(numbers(passes, "token_batch").tolist(), numbers(passes, "step").tolist(), strict=True)
        )
        place = {int(step): i for i, step in enumerate(numbers(table, "step"))}
        first, last = np.full(len(place), np.inf), np.full(len(place), -np.inf)
        seen = np.zeros(len(place), dtype=np.int64)
        stages = max(block.stage for block in self._order)
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
    start, met, end = (spans.table(c, block) for c in (spans.start, spans.met, spans.end))
    order = None
    if not np.array_equal(start[:, 1:], end[:, :-1]):
        # Experts were served one by one: jobs changed places between a dispatch and its combine.
        # One without tokens takes no time, and stands where it was its turn.
        order = np.lexsort((end, met), axis=1)
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
