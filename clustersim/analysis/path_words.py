"""What stands beside the spans of a critical path: launches, links and tokens; and clauses that say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clustersim.analysis.latency import numbers, words
from clustersim.analysis.span_blocks import Spans
from clustersim.trace.record import Columns, Trace
from clustersim.units import show

_EXPERT = "expert_"
#: A rank's time beyond the mean is told as a factor from here on.
_WORTH_SAYING = 1.005
#: Of a share: what is no difference.
_ROUNDOFF = 1e-9
#: What can be asked of a link's capacity over a time.
_CAPACITIES = ("mean", "most", "least")


@dataclass(frozen=True, slots=True)
class Figure:
    """A number in a clause; unit: "count", "times" or a dimension of units.show."""

    value: float
    unit: str

    def __str__(self) -> str:
        if self.unit == "count":
            return f"{int(self.value):,}"
        return f"{self.value:.2f}" if self.unit == "times" else show(self.value, self.unit)


@dataclass(frozen=True, slots=True)
class Clause:
    """A clause that says what happened; what differs from one part to the next stands apart.

    text     with a {} for each figure
    figures  in their order
    """

    text: str
    figures: tuple[Figure, ...] = ()

    def __str__(self) -> str:
        return self.text.format(*self.figures)


def together(clauses: Sequence[Clause]) -> str:
    """Several clauses of one text as one, with the range of each figure."""

    def told(figures: Sequence[Figure]) -> str:
        least, most = (str(key(figures, key=lambda one: one.value)) for key in (min, max))
        return least if least == most else f"{least} to {most}"

    return clauses[0].text.format(*map(told, zip(*(one.figures for one in clauses), strict=True)))


class Facts:
    """Looks up what other tables know of spans."""

    def __init__(self, trace: Trace, spans: Spans) -> None:
        self._trace = trace
        self._spans = spans

    # ---- launches ----------------------------------------------------------------------------------

    def launch(self, rows: np.ndarray) -> np.ndarray:
        """float64[n] s of launches in spans of operators; 0 where the trace does not say."""
        spans = self._spans
        phase = self._phase_code[spans.token_batch[rows]] if len(self._phase_code) else 0
        found: np.ndarray = np.where(
            spans.is_exchange[rows], 0.0, self._launches[phase, spans.operator[rows]]
        )
        return found

    @cached_property
    def _phase_code(self) -> np.ndarray:
        """int[T] 1 where a token batch is of decode."""
        passes, steps = self._trace.tables["token_batches"], self._trace.tables["steps"]
        decode = np.zeros(int(numbers(steps, "step").max(initial=0)) + 1, dtype=np.int64)
        decode[numbers(steps, "step")] = words(steps, "phase") == "decode"
        of_pass = np.zeros(int(numbers(passes, "token_batch").max(initial=0)) + 1, dtype=np.int64)
        of_pass[numbers(passes, "token_batch")] = decode[numbers(passes, "step")]
        # Passes of a step that was not over when the trace ended stay with prefill.
        return np.pad(of_pass, (0, max(0, int(self._spans.token_batch.max()) + 1 - len(of_pass))))

    @cached_property
    def _launches(self) -> np.ndarray:
        """float64[2, operators] s of launches in one span, by phase and operator."""
        table, names = self._trace.tables["prices"], self._spans.words
        found = np.zeros((2, len(names)))
        if "launch" not in table:
            return found
        count = np.zeros_like(found)
        place = {name: i for i, name in enumerate(names)}
        told = words(table, "phase"), words(table, "operator")
        for phase, operator, launch, often in zip(
            *told, numbers(table, "launch"), numbers(table, "count"), strict=True
        ):
            if operator in place and launch == launch:
                at = int(phase == "decode"), place[operator]
                found[at] += launch
                count[at] += often
        return np.divide(found, count, out=found, where=count > 0)

    # ---- links -------------------------------------------------------------------------------------

    @cached_property
    def _links(self) -> Columns:
        return self._trace.tables.get("span_links", {})

    @cached_property
    def _link_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Spans in ascending order, and their rows in `span_links`."""
        if not self._links:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        span = numbers(self._links, "span")
        order = np.argsort(span, kind="stable")
        return span[order], order

    def _link_row(self, rows: np.ndarray) -> np.ndarray:
        """int64[n] rows of `span_links`, -1 for none."""
        known, order = self._link_rows
        if not len(known):
            return np.full(len(rows), -1)
        span = self._spans.span[rows]
        at = np.minimum(np.searchsorted(known, span), len(known) - 1)
        found: np.ndarray = np.where(known[at] == span, order[at], -1)
        return found

    def narrowest(self, rows: np.ndarray) -> np.ndarray:
        """int64[n] the link that held up each exchange; -1 where the trace does not say."""
        at = self._link_row(rows)
        if not len(self._link_rows[0]):
            return at
        found: np.ndarray = np.where(at >= 0, numbers(self._links, "link")[at], -1)
        return found

    def link_seconds(self, rows: np.ndarray, capacity: str = "mean", column: str = "all") -> np.ndarray:
        """float64[n] s that all bytes of each exchange take over the link that held it up; inf where the
        trace does not say, or where the link carried nothing meanwhile.

        capacity  that of the link while the exchange lasts: its "mean", its "most" or its "least"
        column    "all" bytes, or "payload" without what protocols add, as far as that is known
        """
        link, found = self.narrowest(rows), np.full(len(rows), np.inf)
        known = np.flatnonzero(link >= 0)
        if len(known):
            at = self._link_row(rows[known])
            size = numbers(self._links, "all")[at]
            if column in self._links:
                told = numbers(self._links, column)[at]
                size = np.where(np.isnan(told), size, told)
            rate = self._capacity(rows[known], link[known])[_CAPACITIES.index(capacity)]
            found[known] = np.divide(size, rate, out=np.full(len(known), np.inf), where=rate > 0)
        return found

    def _capacity(self, rows: np.ndarray, link: np.ndarray) -> np.ndarray:
        """float64[3, n] bytes/s that links had while exchanges lasted, as in _CAPACITIES."""
        nominal = numbers(self._trace.tables["links"], "bandwidth")[link]
        start, end = self._spans.met[rows], self._spans.end[rows]
        lasted, table = end - start, self._trace.tables["outages"]
        mean, away = nominal.copy(), np.zeros(len(rows))
        most, least = np.full(len(rows), -np.inf), nominal.copy()
        columns = (numbers(table, name).tolist() for name in ("link", "start", "end", "bandwidth"))
        for which, since, until, rate in zip(*columns, strict=True):
            at = np.flatnonzero((link == which) & (start < until) & (end > since))
            inside = np.minimum(end[at], until) - np.maximum(start[at], since)
            share = inside / lasted[at]
            mean[at] += (rate - nominal[at]) * share
            away[at] += share
            most[at], least[at] = np.maximum(most[at], rate), np.minimum(least[at], rate)
        # For whatever time no row tells of the link was as fast as it is.
        most = np.where(away < 1 - _ROUNDOFF, np.maximum(most, nominal), most)
        # What is left of a link that was down by subtracting is no capacity.
        mean[mean <= _ROUNDOFF * nominal] = 0.0
        return np.stack([mean, most, least])

    # ---- experts -----------------------------------------------------------------------------------

    def queued(self, rows: np.ndarray) -> np.ndarray:
        """bool[n] whether a span of a path, latest first, serves an expert behind which others stand.

        Where experts are served one by one, what comes next on the path is served after it by the same
        rank: its tokens stood in a queue meanwhile. The last expert's tokens did not wait for themselves.
        """
        spans, behind = self._spans, np.zeros(len(rows), dtype=bool)
        first = spans.words.index("expert_gemm_1") if "expert_gemm_1" in spans.words else -1
        operator, is_exchange = spans.operator[rows].tolist(), spans.is_exchange[rows].tolist()
        served = [word.startswith(_EXPERT) for word in spans.words]
        # Jobs begun later in the same section, seen from the end.
        later = 0
        for i, code in enumerate(operator):
            if is_exchange[i] or not served[code]:
                later = 0
                continue
            behind[i] = later > 0
            later += code == first
        return behind

    @cached_property
    def _tokens(self) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
        """(token batch, layer) → rows of `experts`, and ranks there."""
        table = self._trace.tables["experts"]
        batch, layer = numbers(table, "token_batch"), numbers(table, "layer")
        key = batch.astype(np.int64) * (int(layer.max(initial=0)) + 1) + layer
        order = np.argsort(key, kind="stable")
        cuts = np.flatnonzero(np.diff(key[order])) + 1
        parts = np.split(order, cuts) if len(order) else []
        return {
            (int(batch[part[0]]), int(layer[part[0]])): (part, numbers(table, "rank")[part]) for part in parts
        }

    def load(self, row: int) -> tuple[int, float] | None:
        """Tokens of a rank's experts and how many times the mean of ranks that is; None where unknown."""
        spans = self._spans
        held = self._tokens.get((int(spans.token_batch[row]), int(spans.layer[row])))
        if held is None:
            return None
        rows, ranks = held
        tokens = numbers(self._trace.tables["experts"], "tokens")[rows]
        per_rank = np.bincount(ranks, weights=tokens)
        mean = tokens.sum() / len(np.unique(ranks))
        mine = int(per_rank[spans.rank[row]]) if spans.rank[row] < len(per_rank) else 0
        return (mine, mine / mean) if mean else None

    def served(self, row: int) -> tuple[int, int] | None:
        """The expert that a span serves and its tokens, where the rank serves one by one; None if unknown."""
        spans, table = self._spans, self._trace.tables["experts"]
        held = self._tokens.get((int(spans.token_batch[row]), int(spans.layer[row])))
        if held is None:
            return None
        rows = held[0][held[1] == spans.rank[row]]
        begun, done = numbers(table, "served")[rows], numbers(table, "done")[rows]
        fits = (begun <= spans.met[row]) & (done >= spans.end[row]) & (numbers(table, "tokens")[rows] > 0)
        if not fits.any():
            return None
        best = rows[np.flatnonzero(fits)[int(np.argmin((done - begun)[fits]))]]
        return int(numbers(table, "expert")[best]), int(numbers(table, "tokens")[best])

    # ---- words -------------------------------------------------------------------------------------

    def said(self, row: int, cause: str) -> Clause:
        """What happened in a span."""
        say = {
            "imbalance": self._said_imbalance,
            "slow_gpu": self._said_slow,
            "queue": self._said_queue,
            "exchange": self._said_exchange,
            "startup": self._said_startup,
        }.get(cause)
        operator = self._spans.operator_of(row)
        if say is not None:
            return say(row)
        text = {
            "launch": f"launches {operator}",
            "admission": "waits to be let into the first stage",
        }.get(cause, f"computes {operator}")
        return Clause(text)

    def _said_imbalance(self, row: int) -> Clause:
        operator, rank = self._spans.operator_of(row), self._spans.rank[row]
        load = self.load(row) if operator.startswith(_EXPERT) else None
        who = f"waiting for straggler rank {rank}"
        if load is None:
            return Clause(f"{who}: it has more to do in {operator} than the mean rank")
        told = Figure(load[0], "count"), Figure(load[1], "times")
        return Clause(f"{who}: {{}} tokens for its experts, {{}} x the mean", told)

    def _said_slow(self, row: int) -> Clause:
        spans = self._spans
        factor = float((spans.end[row] - spans.met[row]) / spans.priced[row])
        who = f"waiting for straggler rank {spans.rank[row]}: its GPU takes"
        if factor < _WORTH_SAYING:
            return Clause(f"{who} longer than priced{self._fault(row)}")
        return Clause(f"{who} {{}} x as long as priced{self._fault(row)}", (Figure(factor, "times"),))

    def _fault(self, row: int) -> str:
        table, spans = self._trace.tables["faults"], self._spans
        place, kind = words(table, "place"), words(table, "kind")
        start, end = numbers(table, "start"), numbers(table, "end")
        for i in range(len(place)):
            mine = place[i] in (f"rank {spans.rank[row]}", "all ranks")
            if mine and start[i] <= spans.met[row] < end[i]:
                return f" ({kind[i]})"
        return ""

    def _said_queue(self, row: int) -> Clause:
        found = self.served(row)
        rank = self._spans.rank[row]
        if found is None:
            return Clause(f"queue of rank {rank} behind another of its experts")
        return Clause(
            f"queue of rank {rank} behind expert {found[0]} and its {{}} tokens", (Figure(found[1], "count"),)
        )

    def _said_exchange(self, row: int) -> Clause:
        spans = self._spans
        way = f"{spans.operator_of(row)} by {spans.algorithm_of(row)}" if spans.is_exchange[row] else ""
        if not way:
            return Clause("waits for tokens that are still on their way to the rank's experts")
        at = int(self._link_row(np.array([row]))[0])
        if at < 0:
            return Clause(f"bytes of {way}")
        links = self._trace.tables["links"]
        link = int(numbers(self._links, "link")[at])
        own, size = (float(numbers(self._links, name)[at]) for name in ("own", "all"))
        where = f"{{}} of {way} on link {words(links, 'source')[link]}->{words(links, 'target')[link]}"
        others = size - own
        # Bytes a link carries twice are not told as shared by half a byte.
        if others <= 0.5:
            return Clause(f"{where}, alone", (Figure(own, "size"),))
        shared = Figure(own, "size"), Figure(others, "size")
        return Clause(f"{where}, shared with {{}} of other ranks", shared)

    def _said_startup(self, row: int) -> Clause:
        spans = self._spans
        way = f" by {spans.algorithm_of(row)}" if spans.algorithm_of(row) else ""
        return Clause(f"launch, protocol and latency of {spans.operator_of(row)}{way}")
