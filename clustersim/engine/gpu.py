"""One process per GPU stream: runs operators in order, serves expert queues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import numpy as np
import simpy

from clustersim.engine.fabric import Meeting, Process
from clustersim.engine.faults import Pace
from clustersim.engine.tokenbatch import Section, TokenBatch
from clustersim.errors import pick
from clustersim.plan.stepgraph import Queue
from clustersim.spec.deployment import Deployment

Run = Callable[[simpy.Environment, TokenBatch, int, int, Pace | None], Process]


class Inbox:
    """Token batches that a stream has still to work on, in order."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._waiting: deque[TokenBatch] = deque()
        self._reader: simpy.Event | None = None

    def put(self, batch: TokenBatch) -> None:
        """Hands a batch to the stream."""
        if self._reader is None:
            self._waiting.append(batch)
        else:
            reader, self._reader = self._reader, None
            reader.succeed(batch)

    def get(self) -> simpy.Event:
        """The event that brings the next batch."""
        event = self._env.event()
        if self._waiting:
            event.succeed(self._waiting.popleft())
        else:
            self._reader = event
        return event


def compute_stream(
    env: simpy.Environment,
    stage: int,
    rank: int,
    inbox: Inbox,
    transfers: Inbox | None,
    pace: Pace | None,
    run: Run,
) -> Process:
    """The compute stream of one GPU.

    rank       place in the stage
    transfers  the GPU's transfer stream, where the stage has a successor
    pace       how slow the GPU is; None: as fast as its operators were priced
    run        what `service_of` gives
    """
    while True:
        batch = yield inbox.get()
        assert isinstance(batch, TokenBatch)
        inbound = batch.programs[stage].inbound
        if inbound is not None:
            yield batch.inbound(inbound, rank)
        else:
            batch.start()
        yield from run(env, batch, stage, rank, pace)
        if transfers is not None:
            transfers.put(batch)
        batch.left_stage()


def transfer_stream(env: simpy.Environment, stage: int, rank: int, inbox: Inbox) -> Process:
    """The stream that sends a rank's results to the next stage beside its computation."""
    while True:
        batch = yield inbox.get()
        assert isinstance(batch, TokenBatch)
        index = batch.programs[stage].transfer
        assert index is not None
        times = batch.sent[stage][rank]
        times[0] = env.now
        yield batch.arrive(index, rank)
        times[1] = env.now


def in_order(env: simpy.Environment, batch: TokenBatch, stage: int, rank: int, pace: Pace | None) -> Process:
    """Every operator after the one before it; an exchange holds the stream until it is done."""
    program = batch.programs[stage]
    seconds, indices, ends = program.seconds[rank], program.indices, batch.ends[stage]
    at = rank * len(seconds)
    batch.firsts[stage][rank] = env.now
    timeout = env.timeout
    for p, duration in enumerate(seconds):
        if duration is None:
            yield batch.arrive(indices[p], rank)
        else:
            yield timeout(duration * pace.at(env.now) if pace else duration)
        ends[at + p] = env.now


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A job that could be served now: the first of its slot that is left.

    job      its place in the section
    since    when the last of its tokens came, s
    waiting  tokens of its slot that are there and not served
    """

    job: int
    since: float
    waiting: float


#: Which of several experts that could be served is next: the one with the least key.
ORDERS: dict[str, Callable[[Candidate], tuple[float, int]]] = {
    "arrival": lambda one: (one.since, one.job),
    "longest_first": lambda one: (-one.waiting, one.job),
    "as_listed": lambda one: (0.0, one.job),
}


def service_of(deployment: Deployment) -> Run:
    """How a rank works through a pass with its experts."""
    experts = deployment.experts
    patient = experts.start == "all_arrived"
    order = pick(ORDERS, experts.order, "deployment.experts.order")
    # What sharers of an expert gather is there for all experts at the same moment.
    as_listed = experts.order == "as_listed" or deployment.expert_tensor_parallel > 1
    if experts.service == "grouped" or (patient and as_listed):
        return in_order
    return partial(one_by_one, order=order, patient=patient)


def one_by_one(
    env: simpy.Environment,
    batch: TokenBatch,
    stage: int,
    rank: int,
    pace: Pace | None,
    order: Callable[[Candidate], tuple[float, int]],
    patient: bool,
) -> Process:
    """As `in_order`, but experts are served one by one, as soon as all their own tokens, or those of a
    chunk, are there; patient: as soon as all tokens of all of them are."""
    program = batch.programs[stage]
    seconds, ends = program.seconds[rank], batch.ends[stage]
    at = rank * len(seconds)
    batch.firsts[stage][rank] = env.now
    p, before, free = 0, -1, env.now
    while p < len(seconds):
        duration = seconds[p]
        section = program.sections.get(p + 1)
        batch.begun[stage, rank, p] = (free, env.now, before)
        if duration is None and section:
            before = yield from _serve(env, batch, stage, rank, p, pace, order, patient)
            p = section.end[-1]
        else:
            if duration is None:
                yield batch.arrive(program.indices[p], rank)
            else:
                yield env.timeout(duration * pace.at(env.now) if pace else duration)
            ends[at + p] = env.now
            p, before = p + 1, p
        free = ends[at + before]


def _serve(
    env: simpy.Environment,
    batch: TokenBatch,
    stage: int,
    rank: int,
    dispatch: int,
    pace: Pace | None,
    order: Callable[[Candidate], tuple[float, int]],
    patient: bool,
) -> Generator[simpy.Event, object, int]:
    """Dispatch, then the experts of a rank in the order of their discipline.

    The dispatch's span ends when the first expert is served; what the rank waits for later ones is
    theirs. Returns the position served last; by then all that the rank sends has left, too.
    """
    program, ends = batch.programs[stage], batch.ends[stage]
    seconds = program.seconds[rank]
    at = rank * len(seconds)
    index = program.indices[dispatch]
    member = batch.member(index, rank)
    meeting = batch.meeting(index)
    all_there = meeting.arrive(member)
    if patient:
        yield all_there
    queue = program.compute[dispatch].queue
    assert queue is not None
    left = _Left(program.sections[dispatch + 1], queue, *divmod(member, meeting.routed.members), rank)
    before = dispatch
    while left:
        ready = left.ready(meeting, member)
        if not ready:
            yield meeting.news(member)
            continue
        if before == dispatch:
            ends[at + dispatch] = env.now
        for p in left.take(min(ready, key=order).job):
            batch.begun[stage, rank, p] = (ends[at + before], env.now, before)
            duration = seconds[p]
            assert duration is not None
            yield env.timeout(duration * pace.at(env.now) if pace else duration)
            ends[at + p], before = env.now, p
    yield all_there
    return before


class _Left:
    """What a rank has still to serve of a section.

    group, place  the rank's in the dispatch; rank: its place in the stage
    """

    def __init__(self, section: Section, queue: Queue, group: int, place: int, rank: int) -> None:
        slots = slice(place * queue.slots, (place + 1) * queue.slots)
        self._section = section
        self._place = place
        self._tokens = queue.tokens[group, :, slots]
        self._need = section.need[rank].tolist()
        self._served = [0.0] * queue.slots
        self._next: dict[int, list[int]] = {}
        for job, slot in enumerate(section.slots):
            self._next.setdefault(slot, []).append(job)

    def __bool__(self) -> bool:
        return bool(self._next)

    def ready(self, meeting: Meeting, member: int) -> list[Candidate]:
        """The jobs whose tokens are there, one of each slot at most."""
        began = meeting.met[member]
        if began != began:
            return []
        arrived = _arrivals(meeting, member)
        arrived[self._place] = began
        by_time = np.argsort(arrived, kind="stable")
        arrived = arrived[by_time]
        here = int(np.searchsorted(arrived, np.inf))
        came = np.cumsum(self._tokens[by_time[:here]], axis=0)
        found = []
        for slot, jobs in self._next.items():
            last = int(np.searchsorted(came[:, slot], self._need[jobs[0]]))
            if last < here:
                # A job without tokens waits for nobody.
                since = max(float(arrived[last]), began) if self._need[jobs[0]] else began
                found.append(Candidate(jobs[0], since, float(came[-1, slot]) - self._served[slot]))
        return found

    def take(self, job: int) -> range:
        """The positions of a job's operators; it is left no longer."""
        slot = self._section.slots[job]
        self._served[slot] = self._need[job]
        self._next[slot].pop(0)
        if not self._next[slot]:
            del self._next[slot]
        return range(self._section.first[job], self._section.end[job])


def _arrivals(meeting: Meeting, member: int) -> np.ndarray:
    """When what each of its group sends to a member is there, float64[n] s; inf for not yet."""
    assert meeting.routed.brought is not None
    by = meeting.routed.brought[member]
    # What nobody has to send is there from the beginning.
    arrived = np.where(by < 0, meeting.met[member], np.inf)
    first = 0
    for ends in meeting.ends:
        here = (by >= first) & (by < first + len(ends))
        arrived[here] = ends[by[here] - first]
        first += len(ends)
    return np.where(np.isnan(arrived), np.inf, arrived)
