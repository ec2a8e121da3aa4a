"""One token batch on its way through the stages: what its ranks do, and when they did it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simpy

from clustersim.engine.fabric import Fabric, Meeting
from clustersim.physics.bounds import Work, work_of
from clustersim.physics.calibration import ORIGINS
from clustersim.physics.compute import price_operators
from clustersim.physics.exchanges import Routes
from clustersim.physics.kernels import Priced
from clustersim.physics.launches import launch_seconds
from clustersim.plan.layout import Layout
from clustersim.plan.stepgraph import Operator, StepGraph
from clustersim.spec.hardware import Gpu


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Program:
    """What the ranks of one stage run for a graph.

    compute    operators on the compute stream, in order; P of them
    indices    their indices in the graph
    seconds    per rank of the stage a list of P durations, None for an exchange
    transfer   index of the operator on the transfer stream, None in the last stage
    inbound    index of the transfer that feeds the stage, None in the first
    priced     float64[N] s, all durations of a rank
    sections   position of the first operator of an expert section → what is served one by one in it
    """

    compute: tuple[Operator, ...]
    indices: list[int]
    seconds: list[list[float | None]]
    transfer: int | None
    inbound: int | None
    priced: np.ndarray
    sections: dict[int, Section]


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """The experts of a rank that are served one by one, each at once or in chunks: J jobs, in program order.

    slots  of each job, the expert slot it serves; those of a slot follow each other
    first  position of each job's first operator, end: after its last
    need   float64[N, J] tokens of the slot that must have come to rank n for the job
    """

    slots: list[int]
    first: list[int]
    end: list[int]
    need: np.ndarray


class PriceKey(NamedTuple):
    """What is counted together in how a run was priced.

    operator, kernel, format  as in the graph
    basis                     the table the price rests on: gpu, format and library; "" for the data sheet
    origin                    a word of physics.calibration.ORIGINS
    """

    operator: str
    kernel: str
    format: str
    basis: str
    origin: str


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A graph with its prices; shared by all passes that look alike.

    prices  key → operators over all ranks, their seconds, octaves beyond what was measured at most, and
            seconds of launches among theirs
    """

    graph: StepGraph
    programs: tuple[Program, ...]
    prices: Mapping[PriceKey, tuple[int, float, float, float]]


def prepare(graph: StepGraph, layout: Layout) -> Prepared:
    """Prices every operator of a graph and sorts them into the stages' programs."""
    computing = [i for i, op in enumerate(graph.operators) if op.exchange is None]
    operators = [graph.operators[i] for i in computing]
    found = price_operators(operators, layout.topology.gpu, layout.deployment.kernels)
    seconds = {i: _launched(graph.operators[i], one) for i, one in zip(computing, found, strict=True)}
    programs = tuple(_program(graph, stage, seconds) for stage in range(len(graph.ranks)))
    return Prepared(graph, programs, _counted(operators, found, layout.topology.gpu))


def _launched(op: Operator, found: Priced) -> np.ndarray:
    # Served one by one, an expert without tokens is not launched at all.
    return np.where((op.slot >= 0) & (op.bytes == 0), 0.0, found.seconds)


def _counted(
    operators: Sequence[Operator], found: Sequence[Priced], gpu: Gpu
) -> dict[PriceKey, tuple[int, float, float, float]]:
    counted: dict[PriceKey, tuple[int, float, float, float]] = {}
    for op, one in zip(operators, found, strict=True):
        seconds, call = _launched(op, one), op.call
        assert call is not None
        launch = np.minimum(launch_seconds(call, gpu, one.basis), seconds)
        basis = "" if one.basis is None else " ".join(one.basis[1:])
        for origin in np.flatnonzero(np.bincount(one.origin)).tolist():
            here = one.origin == origin
            key = PriceKey(op.name, call.kernel, call.format, basis, ORIGINS[origin])
            count, sum_of, most, launches = counted.get(key, (0, 0.0, 0.0, 0.0))
            counted[key] = (
                count + int(here.sum()),
                sum_of + float(seconds[here].sum()),
                max(most, float(one.outside[here].max())),
                launches + float(launch[here].sum()),
            )
    return counted


def _program(graph: StepGraph, stage: int, seconds: Mapping[int, np.ndarray]) -> Program:
    chosen = [i for i, op in enumerate(graph.operators) if op.stage == stage]
    compute = [i for i in chosen if graph.operators[i].stream == "compute"]
    operators = tuple(graph.operators[i] for i in compute)
    columns = [seconds[i].tolist() if i in seconds else [None] * len(graph.ranks[stage]) for i in compute]
    transfer = [i for i in chosen if graph.operators[i].stream == "transfer"]
    before = graph.operators[compute[0]].after
    return Program(
        compute=operators,
        indices=compute,
        seconds=[list(row) for row in zip(*columns, strict=True)],
        transfer=transfer[0] if transfer else None,
        inbound=before[0] if before else None,
        priced=np.sum([seconds[i] for i in compute if i in seconds], axis=0),
        sections=_sections(operators),
    )


def _sections(operators: tuple[Operator, ...]) -> dict[int, Section]:
    """Position of a section's first operator → what is served one by one in it."""
    jobs: dict[int, list[int]] = {}
    start = -1
    for p, op in enumerate(operators):
        if op.slot < 0:
            start = -1
        elif op.name == "expert_gemm_1":
            start = p if start < 0 else start
            jobs.setdefault(start, []).append(p)
    return {start: _section(operators, first) for start, first in jobs.items()}


def _section(operators: tuple[Operator, ...], first: list[int]) -> Section:
    slots = [operators[p].slot for p in first]
    need = np.stack([_served_by(operators[p]) for p in first], axis=1)
    for job in range(1, len(first)):
        if slots[job] == slots[job - 1]:
            need[:, job] += need[:, job - 1]
    return Section(slots, first, [p + 3 for p in first], need)


def _served_by(op: Operator) -> np.ndarray:
    """float64[N] tokens that a product of one expert serves on every rank."""
    assert op.call is not None
    tokens: np.ndarray = op.call.columns["counts"][:, 0]
    return tokens


class TokenBatch:
    """One pass of a micro-batch: meetings as they come up, and the times of every span.

    number    token batch number
    ready     when it could have begun at stage 0, s
    begins    fires when the first rank of stage 0 begins with it; done when the last rank is through
    phase     prefill or decode
    ends      per stage a flat list: end of rank n's p-th operator at n * P + p
    firsts    per stage: when rank n began its first operator
    begun     (stage, rank, position) → when the rank was free for the operator, when it began it, and
              the position it had been busy with before (-1: none); only where operators do not follow
              each other in the order of the program
    sent      per stage and rank: [start, end] of its transfer
    released  span that let stage 0 begin, -1 for none
    """

    def __init__(
        self,
        number: int,
        phase: str,
        prepared: Prepared,
        fabric: Fabric,
        routes: Routes,
        ready: float,
        released: int,
        begins: simpy.Event,
    ) -> None:
        self.number = number
        self.phase = phase
        self.graph = prepared.graph
        self.programs = prepared.programs
        self.prices = prepared.prices
        self.fabric = fabric
        self.done: simpy.Event = fabric.env.event()
        self.begins = begins
        self.ready = ready
        self.released = released
        self.meetings: dict[int, Meeting] = {}
        ranks = self.graph.ranks.shape[1]
        self.ends = [[0.0] * (ranks * len(p.compute)) for p in self.programs]
        self.firsts = [[0.0] * ranks for _ in self.programs]
        self.begun: dict[tuple[int, int, int], tuple[float, float, int]] = {}
        self.sent = [
            [[0.0, 0.0] for _ in range(ranks)] if p.transfer is not None else [] for p in self.programs
        ]
        self._routes = routes
        self._left = self.graph.ranks.size
        self._member = _Members(self.graph)

    def began(self) -> float:
        """When the first rank of stage 0 began with it, s; known when it is done."""
        return min(self.firsts[0])

    def meeting(self, index: int) -> Meeting:
        """The meeting of the graph's operator `index`; made when the first rank asks for it."""
        meeting = self.meetings.get(index)
        if meeting is None:
            op = self.graph.operators[index]
            assert op.exchange is not None
            what = (op.name, op.layer, self.number)
            meeting = self.meetings[index] = Meeting(self.fabric, self._routes.of(op.exchange), what)
        return meeting

    def arrive(self, index: int, rank: int) -> simpy.Event:
        """A rank of a stage is ready for exchange `index`. Returns the event of its being done."""
        return self.meeting(index).arrive(self._member.of(index, rank))

    def inbound(self, index: int, rank: int) -> simpy.Event:
        """What the rank's peer in the stage before sends it has come."""
        return self.meeting(index).expect(2 * rank + 1)

    def member(self, index: int, rank: int) -> int:
        """The rank's place in exchange `index`."""
        return self._member.of(index, rank)

    def members(self, index: int) -> np.ndarray:
        """int64[N] the place of every rank of the stage in exchange `index`."""
        return self._member.all(index)

    def start(self) -> None:
        """A rank of stage 0 begins with it."""
        if not self.begins.triggered:
            self.begins.succeed()

    def left_stage(self) -> None:
        """One more rank is through with it; the last one ends the pass."""
        self._left -= 1
        if self._left == 0:
            self.done.succeed()

    def work(self) -> Work:
        """FLOP, HBM bytes and link bytes of the pass; known when it is done."""
        return work_of(self.graph, (meeting.carried for meeting in self.meetings.values()))


class _Members:
    """Rank of a stage → its member number in an exchange."""

    def __init__(self, graph: StepGraph) -> None:
        self._graph = graph
        self._tables: dict[int, list[int]] = {}
        self._arrays: dict[int, np.ndarray] = {}

    def all(self, index: int) -> np.ndarray:
        array = self._arrays.get(index)
        if array is None:
            self.of(index, 0)
            array = self._arrays[index] = np.array(self._tables[index])
        return array

    def of(self, index: int, rank: int) -> int:
        table = self._tables.get(index)
        if table is None:
            op = self._graph.operators[index]
            assert op.exchange is not None
            groups = op.exchange.groups
            first = int(self._graph.ranks[op.stage, 0])
            where = np.empty(self._graph.ranks.shape[1], dtype=np.int64)
            senders = groups if op.stream == "compute" else groups[:, :1]
            position = np.arange(groups.size).reshape(groups.shape)[:, : senders.shape[1]]
            where[senders.ravel() - first] = position.ravel()
            table = self._tables[index] = where.tolist()
        return table[rank]
