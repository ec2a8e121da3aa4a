"""Why a step or a request took as long as it did: its critical path, cut into parts with a cause each.

A span names the span whose end released it. Followed backwards from the last span of a step, these name who
was waited for at every moment, without a gap: the critical path. A rank that waits for others does not
stand on it while it waits; the one it waits for does, and what that one takes longer than the mean rank
is the part of which others say "waiting for a straggler".

Every part has one cause. The seconds of the parts add up to the latency: a path is cut, never estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from typing import Any

import numpy as np

from clustersim.analysis.latency import numbers, words
from clustersim.analysis.path_words import Clause, Facts, Figure
from clustersim.analysis.span_blocks import Block, Spans, spans_of, whole_steps
from clustersim.errors import ClustersimError, NotRecordedError
from clustersim.trace.record import Trace

#: Cause → what it is. A part of a path has just one.
CAUSES: dict[str, str] = {
    "compute": "computing, as long as the mean rank of the stage takes as priced, launches apart",
    "launch": "launching kernels",
    "imbalance": "waiting for a straggler that has more to compute than the mean rank of its stage",
    "slow_gpu": "waiting for a straggler whose GPU takes longer than priced",
    "queue": "in a queue behind other experts of the same rank",
    "exchange": "bytes on their way over links",
    "startup": "launch, protocol and latency of exchanges: what they take beyond the bytes of a link",
    "bubble": "pipeline bubble: the busiest stage is empty until a token batch has come through others",
    "admission": "before the first step, or while passes stop for weights of experts",
    "unrecorded": "before the spans that were recorded",
}
_CODE = {cause: code for code, cause in enumerate(CAUSES)}
#: Steps whose paths make the mean; of longer runs so many are taken, evenly spread, and the p99 step.
_STEPS = 1000
#: Of a duration: what ranks that do the same differ by.
_ROUNDOFF = 1e-9


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a critical path.

    cause    a key of CAUSES; inside: what was done there, for a bubble, else the cause itself
    operator, layer, rank, stage, token_batch   of the span on the path; "" and -1 where there is none
    start    s; seconds: how long
    words    a clause that says what happened
    about    what it waits for, with figures apart: parts of which the same is said differ in these only
    """

    cause: str
    inside: str
    operator: str
    layer: int
    rank: int
    stage: int
    token_batch: int
    start: float
    seconds: float
    words: str
    about: Clause


@dataclass(frozen=True, slots=True)
class Path:
    """A critical path.

    what        "step" or "request", and number
    start, end  s; latency = end - start
    parts       in order of time
    """

    what: str
    number: int
    start: float
    end: float
    parts: tuple[Part, ...]

    @property
    def latency(self) -> float:
        """s"""
        return self.end - self.start

    def seconds(self) -> dict[str, float]:
        """Cause → s, those without a part left out; they add up to the latency."""
        held: dict[str, list[float]] = {}
        for part in self.parts:
            held.setdefault(part.cause, []).append(part.seconds)
        return {cause: fsum(held[cause]) for cause in CAUSES if cause in held}

    def in_bubbles(self) -> dict[str, float]:
        """What other stages did in bubbles: cause → s, longest first; they add up to the bubbles."""
        held: dict[str, float] = {}
        for part in self.parts:
            if part.cause == "bubble":
                held[part.inside] = held.get(part.inside, 0.0) + part.seconds
        return dict(sorted(held.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """A path cut by cause, latest first: n spans, C causes.

    rows     int64[n] of the table `spans`; -1 for what no span was recorded of
    start    float64[n] s from when on a span stands on the path
    seconds  float64[n, C]
    bubble   float64[n] share of each that is a bubble, in `seconds` counted to what was done
    main     the stage whose emptiness makes it one
    """

    rows: np.ndarray
    start: np.ndarray
    seconds: np.ndarray
    bubble: np.ndarray
    main: int

    def by_cause(self) -> np.ndarray:
        """float64[C] s"""
        found: np.ndarray = (self.seconds * (1 - self.bubble)[:, None]).sum(axis=0)
        found[_CODE["bubble"]] += (self.seconds.sum(axis=1) * self.bubble).sum()
        return found


class Paths:
    """Critical paths of one trace; what several of them need is looked up once."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.spans: Spans = spans_of(trace)
        self.facts = Facts(trace, self.spans)
        self._means: dict[int, np.ndarray] = {}

    # ---- the questions -----------------------------------------------------------------------------

    def step(self, number: int) -> Path:
        """The path of a step.

        Raises   ClustersimError where there is no such step, or not all spans of it were recorded
        """
        start, end, last = self._step(number)
        cut = self._cut(last, start, end)
        return Path("step", number, start, end, tuple(self._parts(cut)))

    def request(self, number: int) -> Path:
        """The path of a request, from its arrival to its last token.

        Raises   ClustersimError where there is no such request, or its last pass was not recorded whole
        """
        table = self.trace.tables["requests"]
        row = _row(numbers(table, "request"), number, "request")
        arrival, started, finish = (float(numbers(table, c)[row]) for c in ("arrival", "started", "finish"))
        if not finish >= started:
            raise ClustersimError(f"request {number} was not finished: it has no critical path")
        passes = self._passes_of_batch(int(numbers(table, "batch")[row]))
        ends = numbers(self.trace.tables["token_batches"], "end")
        last = [int(p) for p in passes if ends[p] == finish]
        cut = self._cut(self._last_span(last, f"request {number}"), started, finish)
        waited = Part(
            "admission", "admission", "", -1, -1, -1, -1, arrival, started - arrival,
            "waits for its first step", Clause("waits for its first step"),
        )  # fmt: skip
        parts = [waited] if started > arrival else []
        return Path("request", number, arrival, finish, (*parts, *self._parts(cut)))

    def shares(self, phase: str | None = None) -> dict[str, Any] | None:
        """Seconds of the mean and of the p99 step by cause; None where no step was recorded.

        phase    prefill or decode; None: all steps
        Returns  steps: how many paths make the mean; mean: seconds, by: cause → s; p99: the same and
                 `step`, the first that is as long as 99 in 100
        """
        table = self.trace.tables["steps"]
        known = [n for n in self._recorded_steps if phase in (None, words(table, "phase")[n])]
        if not known:
            return None
        latency = (numbers(table, "end") - numbers(table, "start"))[known]
        order = np.argsort(latency, kind="stable")
        late = known[int(order[int(np.ceil(0.99 * len(known))) - 1])]
        chosen = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, _STEPS).astype(int))]
        cuts = {n: self._cut(*self._cut_of_step(n)).by_cause() for n in dict.fromkeys([*chosen, late])}
        mean = np.mean([cuts[n] for n in chosen], axis=0)
        return {
            "steps": len(chosen),
            "mean": _by_name(mean),
            "p99": {"step": int(numbers(table, "step")[late]), **_by_name(cuts[late])},
        }

    # ---- which span was last -----------------------------------------------------------------------

    def _step(self, number: int) -> tuple[float, float, int]:
        row = _row(numbers(self.trace.tables["steps"], "step"), number, "step")
        if row not in self._recorded_steps:
            raise self._not_recorded(
                f"step {number}", numbers(self.trace.tables["token_batches"], "step") == number
            )
        last, start, end = self._cut_of_step(row)
        return start, end, last

    def _cut_of_step(self, row: int) -> tuple[int, float, float]:
        table = self.trace.tables["steps"]
        start, end = (float(numbers(table, c)[row]) for c in ("start", "end"))
        number = int(numbers(table, "step")[row])
        passes = self.trace.tables["token_batches"]
        last = np.flatnonzero((numbers(passes, "step") == number) & (numbers(passes, "end") == end))
        return self._last_span(last.tolist(), f"step {number}"), start, end

    @cached_property
    def _recorded_steps(self) -> list[int]:
        """Rows of the steps of which all spans were recorded."""
        return whole_steps(self.trace, self.spans.passes)

    def recorded_steps(self) -> list[int]:
        """Numbers of the steps that have a critical path: of which all spans were recorded."""
        return [int(numbers(self.trace.tables["steps"], "step")[row]) for row in self._recorded_steps]

    @cached_property
    def _blocks_of(self) -> dict[int, list[Block]]:
        found: dict[int, list[Block]] = {}
        for block in self.spans.blocks:
            found.setdefault(block.token_batch, []).append(block)
        return found

    def _passes_of_batch(self, batch: int) -> np.ndarray:
        steps, passes = self.trace.tables["steps"], self.trace.tables["token_batches"]
        mine = numbers(steps, "step")[numbers(steps, "batch") == batch]
        return np.flatnonzero(np.isin(numbers(passes, "step"), mine))

    def _last_span(self, passes: Sequence[int], what: str) -> int:
        """The row of the span that ended last of passes that ended together (rows of token_batches)."""
        number = numbers(self.trace.tables["token_batches"], "token_batch")
        for one in passes:
            if int(number[one]) in self.spans.passes:
                block = max(self._blocks_of[int(number[one])], key=lambda one: one.stage)
                return block.first + int(np.argmax(self.spans.end[block.first : block.end]))
        raise self._not_recorded(what, np.isin(np.arange(len(number)), passes))

    def _not_recorded(self, what: str, passes: np.ndarray) -> NotRecordedError:
        """passes  bool[rows of token_batches] of what is asked for"""
        mine = numbers(self.trace.tables["token_batches"], "token_batch")[passes].tolist()
        some = any(batch in self._blocks_of for batch in mine)
        held = "only a part of its spans was recorded" if some else "none of its spans was recorded"
        known = self.recorded_steps()
        there = f"; whole are {len(known):,} steps, {known[0]} to {known[-1]}" if known else ""
        return NotRecordedError(f"{what}: {held}{there} (trace.steps and trace.window say which are)")

    # ---- walking and cutting -----------------------------------------------------------------------

    def _walk(self, row: int, until: float) -> list[int]:
        """Rows on the path, latest first, as far as `until`, s."""
        spans, rows = self.spans, []
        while row >= 0:
            rows.append(row)
            if spans.met[row] <= until and spans.start[row] <= until:
                break
            row = spans.row_of(int(spans.after[row]))
        return rows

    def _cut(self, last: int, start: float, end: float) -> _Cut:
        spans = self.spans
        rows = np.array(self._walk(last, start), dtype=np.int64)
        # What a span waited for until it met the others ends where its predecessor on the path does.
        upper = np.minimum(np.concatenate([[end], spans.end[rows[1:]]]), end)
        upper = np.minimum.accumulate(upper)
        lower = np.maximum(np.append(upper[1:], start), start)
        first = spans.after[rows[-1]] >= 0 or spans.start[rows[-1]] > start
        lower[-1] = min(max(start, float(spans.start[rows[-1]])), upper[-1])
        seconds = np.zeros((len(rows), len(CAUSES)))
        begun = np.clip(spans.met[rows], lower, upper)
        busy = upper - begun
        compute = np.flatnonzero(~spans.is_exchange[rows])
        exchange = np.flatnonzero(spans.is_exchange[rows])
        self._cut_compute(rows, busy, compute, seconds)
        self._cut_exchanges(rows, busy, exchange, seconds)
        self._cut_gaps(rows, begun - lower, seconds)
        bubble, main = self._bubble(rows, lower, upper)
        cut = _Cut(rows, lower, seconds, bubble, main)
        before = float(lower[-1]) - start
        return _with_rest(cut, before, start) if first and before > 0 else cut

    def _cut_compute(self, rows: np.ndarray, busy: np.ndarray, at: np.ndarray, seconds: np.ndarray) -> None:
        """Seconds of the compute spans at places `at` of the path, by cause."""
        spans, chosen = self.spans, rows[at]
        whole = spans.end[chosen] - spans.met[chosen]
        told = spans.priced[chosen]
        told = np.where(whole - told <= _ROUNDOFF * whole + 4 * np.spacing(spans.end[chosen]), whole, told)
        priced = np.minimum(np.where(np.isnan(told), whole, told), whole)
        mean = self._mean_of(chosen)
        more = np.where(np.abs(priced - mean) > _ROUNDOFF * mean, priced - mean, 0.0)
        beyond = self._net(more, spans.is_exchange[rows], at)
        launch = np.minimum(self.facts.launch(chosen), priced - beyond)
        share = np.divide(busy[at], whole, out=np.zeros(len(at)), where=whole > 0)
        slow, beyond, launch = ((part * share) for part in (whole - priced, beyond, launch))
        queued = self.facts.queued(rows)[at]
        rest = busy[at] - slow - beyond - launch
        seconds[at, _CODE["slow_gpu"]] = slow
        seconds[at, _CODE["imbalance"]] = beyond
        seconds[at, _CODE["launch"]] = launch
        seconds[at, _CODE["queue"]] = np.where(queued, rest, 0.0)
        seconds[at, _CODE["compute"]] = np.where(queued, 0.0, rest)

    def _mean_of(self, rows: np.ndarray) -> np.ndarray:
        """float64[n] s that the same operators take on the mean rank of the stage, as priced."""
        found = np.empty(len(rows))
        which = np.searchsorted(self.spans.firsts, rows, side="right") - 1
        for i, (row, number) in enumerate(zip(rows.tolist(), which.tolist(), strict=True)):
            block = self.spans.blocks[number]
            means = self._means.get(number)
            if means is None:
                means = self._means[number] = self._means_in(block)
            found[i] = means[(row - block.first) % block.operators]
        return found

    def _means_in(self, block: Block) -> np.ndarray:
        table = self.spans.table
        took = table(self.spans.end, block) - table(self.spans.met, block)
        told = table(self.spans.priced, block)
        mean: np.ndarray = np.minimum(np.where(np.isnan(told), took, told), took).mean(axis=0)
        return mean

    @staticmethod
    def _net(beyond: np.ndarray, is_exchange: np.ndarray, at: np.ndarray) -> np.ndarray:
        """What a rank takes beyond the mean between two exchanges: what it takes less in one operator
        makes up for what it takes more in another, as far as that goes."""
        stretch = np.cumsum(is_exchange)[at]
        more: np.ndarray = np.maximum(beyond, 0.0)
        if not len(at):
            return more
        net = np.maximum(np.bincount(stretch, weights=beyond), 0.0)
        gross = np.bincount(stretch, weights=more)
        kept = np.divide(net, gross, out=np.zeros_like(net), where=gross > 0)
        found: np.ndarray = more * kept[stretch]
        return found

    def _cut_exchanges(self, rows: np.ndarray, busy: np.ndarray, at: np.ndarray, seconds: np.ndarray) -> None:
        chosen = rows[at]
        whole = self.spans.end[chosen] - self.spans.met[chosen]
        bytes_alone = np.minimum(self.facts.link_seconds(chosen), whole)
        same = whole - bytes_alone <= _ROUNDOFF * whole + 4 * np.spacing(self.spans.end[chosen])
        bytes_alone = np.where(same, whole, bytes_alone)
        share = np.divide(busy[at], whole, out=np.zeros(len(at)), where=whole > 0)
        seconds[at, _CODE["exchange"]] = bytes_alone * share
        seconds[at, _CODE["startup"]] = busy[at] - bytes_alone * share

    def _cut_gaps(self, rows: np.ndarray, gap: np.ndarray, seconds: np.ndarray) -> None:
        """A rank that was free waited for tokens of its experts; before stage 0 for being let in."""
        spans = self.spans
        opening = (spans.stage[rows] == 0) & (spans.layer[rows] == -1)
        seconds[:, _CODE["admission"]] += np.where(opening, gap, 0.0)
        seconds[:, _CODE["exchange"]] += np.where(opening, 0.0, gap)

    def _bubble(self, rows: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, int]:
        """float64[n] share of each span's time in which the busiest stage was empty, and that stage."""
        stage, length = self.spans.stage[rows], upper - lower
        held = np.bincount(stage, weights=length)
        main = len(held) - 1 - int(np.argmax(held[::-1] >= held.max() * (1 - 1e-9)))
        away = np.flatnonzero((stage != main) & (length > 0))
        share = np.zeros(len(rows))
        if len(away):
            busy = self._occupied(main)
            empty = length[away] - (busy(upper[away]) - busy(lower[away]))
            share[away] = np.clip(empty / length[away], 0.0, 1.0)
            # What is left by roundoff is no part.
            share[share < _ROUNDOFF] = 0.0
        return share, main

    def _occupied(self, stage: int) -> _Occupied:
        held = self._occupations.get(stage)
        if held is None:
            held = self._occupations[stage] = _occupied(self.spans, stage)
        return held

    @cached_property
    def _occupations(self) -> dict[int, _Occupied]:
        return {}

    # ---- saying it ---------------------------------------------------------------------------------

    def _parts(self, cut: _Cut) -> Iterator[Part]:
        names = list(CAUSES)
        for i in range(len(cut.rows) - 1, -1, -1):
            at = float(cut.start[i])
            for code in np.flatnonzero(cut.seconds[i] != 0.0)[::-1].tolist():
                share = float(cut.bubble[i])
                for cause, part in ((names[code], 1 - share), ("bubble", share)):
                    if part > 0:
                        length = float(cut.seconds[i, code]) * part
                        yield self._part(int(cut.rows[i]), cause, names[code], at, length, cut.main)
                        at += length

    def _part(self, row: int, cause: str, inside: str, at: float, length: float, main: int) -> Part:
        if row < 0:
            missing = "no span was recorded"
            return Part(cause, inside, "", -1, -1, -1, -1, at, length, missing, Clause(missing))
        spans = self.spans
        about = self.facts.said(row, inside)
        said = str(about)
        if cause == "bubble":
            about = _empty(main, int(spans.stage[row]), int(spans.token_batch[row]))
            said = f"{about}: {said}"
        return Part(
            cause, inside, spans.operator_of(row), int(spans.layer[row]), int(spans.rank[row]),
            int(spans.stage[row]), int(spans.token_batch[row]), at, length, said, about,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Occupied:
    """For how long a stage had held token batches by some time, as a function.

    starts, ends  float64[m] s, intervals in order, none overlaps the next
    """

    starts: np.ndarray
    ends: np.ndarray

    def __call__(self, at: np.ndarray) -> np.ndarray:
        """float64[n] s until times float64[n]"""
        before = np.concatenate([[0.0], np.cumsum(self.ends - self.starts)])
        which = np.searchsorted(self.starts, at, side="right")
        last = np.maximum(which - 1, 0)
        inside = np.clip(at - self.starts[last], 0.0, self.ends[last] - self.starts[last])
        found: np.ndarray = before[last] + np.where(which > 0, inside, 0.0)
        return found


def _occupied(spans: Spans, stage: int) -> _Occupied:
    here = [block for block in spans.blocks if block.stage == stage]
    times = sorted(
        (float(spans.start[b.first : b.end].min()), float(spans.end[b.first : b.end].max())) for b in here
    )
    joined: list[list[float]] = []
    for start, end in times:
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    starts, ends = np.array(joined).T
    return _Occupied(starts, ends)


def shares(trace: Trace, phase: str | None = None) -> dict[str, Any] | None:
    """Seconds of the mean and of the p99 step by cause, see `Paths.shares`."""
    return Paths(trace).shares(phase)


def _row(known: np.ndarray, number: int, what: str) -> int:
    found = np.flatnonzero(known == number)
    if len(found):
        return int(found[0])
    there = f"{int(known.min())} to {int(known.max())}" if len(known) else "none"
    raise ClustersimError(f"there is no {what} {number} in this result; {what}s: {there}")


def _with_rest(cut: _Cut, before: float, start: float) -> _Cut:
    """The cut with what happened between its beginning and the first span that is known."""
    rest = np.zeros((1, len(CAUSES)))
    rest[0, _CODE["unrecorded"]] = before
    return _Cut(
        np.append(cut.rows, -1), np.append(cut.start, start), np.concatenate([cut.seconds, rest]),
        np.append(cut.bubble, 0.0), cut.main,
    )  # fmt: skip


def _empty(main: int, stage: int, token_batch: int) -> Clause:
    text = f"stage {main} has nothing left to do while token batch {{}} passes those behind it"
    if stage < main:
        text = f"stage {main} is empty until token batch {{}} comes"
    return Clause(text, (Figure(token_batch, "count"),))


def _by_name(seconds: np.ndarray) -> Mapping[str, Any]:
    by = {cause: float(seconds[code]) for cause, code in _CODE.items() if seconds[code] > 0}
    return {"seconds": float(seconds.sum()), "by": by}
