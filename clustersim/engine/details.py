"""Spans and flows → rows, of the steps and the time that the scenario chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from clustersim.engine.blocks import Block
from clustersim.engine.fabric import Meeting
from clustersim.engine.link import Capacities
from clustersim.engine.link_use import narrowest
from clustersim.engine.tokenbatch import Program, TokenBatch
from clustersim.spec.workload import TraceLevel
from clustersim.trace.record import Recorder

#: What flows.via says, by plan.rounds' PEER, UP and DOWN.
_VIA = ("peer", "up", "down")


class Chosen:
    """The time whose spans and flows are written: that of the chosen steps, as far as it lies in the window.

    Steps are chosen by number, but what runs beside them belongs to how long they take. So all that
    touches the time from the beginning of the first to the end of the last is written.
    """

    def __init__(self, asked: TraceLevel) -> None:
        self._steps = asked.steps
        self._window = asked.window or (0.0, inf)
        self._since = inf if asked.steps else 0.0
        self._until = 0.0 if asked.steps else inf
        self._under_way: set[int] = set()

    def began(self, step: int, now: float) -> None:
        """A pass of a step begins."""
        if self._has(step):
            self._since = min(self._since, now)
            self._under_way.add(step)

    def ended(self, step: int, now: float) -> None:
        """All passes of a step are over, and written."""
        if self._has(step):
            self._until = now
            self._under_way.remove(step)

    def _has(self, step: int) -> bool:
        return self._steps is not None and self._steps[0] <= step < self._steps[1]

    def __call__(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Which of these are written, bool of the same shape. start, end: s, of any shape."""
        since = max(self._since, self._window[0])
        until = min(inf if self._under_way else self._until, self._window[1])
        # Bounds count: what ended when the first step began is what released it.
        touching: np.ndarray = (end >= since) & (start <= until)
        return touching


@dataclass(frozen=True, slots=True, eq=False)
class _Template:
    """What the spans of a stage have in common whenever it runs a program: columns of N * P rows.

    exchanges  position, index in the graph
    """

    columns: Mapping[str, np.ndarray]
    exchanges: tuple[tuple[int, int], ...]


class Details:
    """Writes spans, their links, and flows, as far as the scenario asks for them."""

    def __init__(self, recorder: Recorder, capacities: Capacities, asked: TraceLevel) -> None:
        self.chosen = Chosen(asked)
        self._recorder = recorder
        self._capacities = capacities
        self._spans = asked.level != "sums"
        self._flows = asked.level == "flows"
        self._templates: WeakKeyDictionary[Program, _Template] = WeakKeyDictionary()

    def write_block(self, block: Block) -> None:
        """Rows of a stage's spans on the compute stream."""
        if not self._spans:
            return
        written = self.chosen(block.start, block.end)
        if not written.any():
            return
        template = self._templates.get(block.program)
        if template is None:
            template = self._templates[block.program] = self._template(block)
        spans = block.base + np.arange(block.end.size).reshape(block.end.shape)
        self._span_rows(
            written.ravel(),
            **template.columns,
            span=spans.ravel(),
            token_batch=block.batch.number,
            rank=np.repeat(block.ranks, block.end.shape[1]),
            stage=block.stage,
            stream="compute",
            start=block.start.ravel(),
            met=block.met.ravel(),
            end=block.end.ravel(),
            after=block.after.ravel(),
        )
        for p, index in template.exchanges:
            self._link_rows(block.batch, index, spans[:, p], written[:, p])

    def _template(self, block: Block) -> _Template:
        batch, program, code = block.batch, block.program, self._recorder.code
        exchanges = tuple(
            (p, program.indices[p]) for p, op in enumerate(program.compute) if op.exchange is not None
        )
        ways, group = dict.fromkeys(range(len(program.compute)), ""), np.full(block.end.shape, -1)
        for p, index in exchanges:
            routed = batch.meetings[index].routed
            ways[p] = routed.algorithm
            group[:, p] = batch.members(index) // routed.members
        kinds = ["compute" if op.exchange is None else "exchange" for op in program.compute]
        each = {
            "operator": [code("spans", "operator", op.name) for op in program.compute],
            "kind": [code("spans", "kind", kind) for kind in kinds],
            "algorithm": [code("spans", "algorithm", way) for way in ways.values()],
            "layer": [op.layer for op in program.compute],
        }
        columns: dict[str, np.ndarray] = {
            "group": group.ravel().astype(np.int32),
            "priced": np.array(program.seconds, dtype=np.float64).ravel(),
            **{name: np.tile(np.array(codes, dtype=np.int32), len(group)) for name, codes in each.items()},
        }
        return _Template(columns, exchanges)

    def write_transfers(
        self,
        batch: TokenBatch,
        stage: int,
        index: int,
        spans: np.ndarray,
        start: np.ndarray,
        end: np.ndarray,
        after: np.ndarray,
    ) -> None:
        """Rows of a stage's spans on the transfer stream. index of the operator; arrays of N ranks."""
        if not self._spans:
            return
        written = self.chosen(start, end)
        if not written.any():
            return
        op, routed = batch.graph.operators[index], batch.meetings[index].routed
        self._span_rows(
            written,
            span=spans,
            token_batch=batch.number,
            rank=batch.graph.ranks[stage],
            stage=stage,
            stream="transfer",
            operator=op.name,
            kind="exchange",
            algorithm=routed.algorithm,
            layer=op.layer,
            group=batch.members(index) // routed.members,
            start=start,
            met=start,
            end=end,
            priced=np.nan,
            after=after,
        )
        self._link_rows(batch, index, spans, written)

    def _span_rows(self, written: np.ndarray, **columns: Any) -> None:
        if not written.all():
            columns = {name: c[written] if np.ndim(c) else c for name, c in columns.items()}
        self._recorder.rows("spans", **columns)

    def _link_rows(self, batch: TokenBatch, index: int, spans: np.ndarray, written: np.ndarray) -> None:
        """Rows for an exchange. spans: int64[N] of the ranks of the stage; bool[N] which are written."""
        meeting = batch.meetings[index]
        if not meeting.routed.rounds or not written.any():
            return
        found = narrowest(meeting, self._capacities.mean(*meeting.span()))
        member = batch.members(index)
        some = (found.link[member] >= 0) & written
        member = member[some]
        if len(member):
            self._recorder.rows(
                "span_links",
                span=spans[some],
                link=found.link[member],
                own=found.own[member],
                all=found.all[member],
                payload=found.payload[member],
            )

    def write_flows(self, meeting: Meeting, operator: str, layer: int, token_batch: int) -> None:
        """Rows of the flows of an exchange that is over."""
        if not self._flows:
            return
        for at, one_round in enumerate(meeting.routed.rounds):
            some = np.flatnonzero(self.chosen(meeting.starts[at], meeting.ends[at]))
            if not len(some):
                continue
            self._recorder.rows(
                "flows",
                token_batch=token_batch,
                operator=operator,
                layer=layer,
                source=meeting.routed.ranks[one_round.source[some]],
                target=meeting.routed.ranks[one_round.target[some]],
                via=[_VIA[via] for via in one_round.via[some].tolist()],
                bytes=one_round.payload[some],
                wire=one_round.flows.size[some],
                start=meeting.starts[at][some],
                end=meeting.ends[at][some],
            )
