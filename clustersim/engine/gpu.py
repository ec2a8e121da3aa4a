"""One process per GPU stream: runs operators in order, serves expert queues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence

import numpy as np
import simpy

from clustersim.engine.fabric import Meeting, Process
from clustersim.engine.faults import Pace
from clustersim.engine.tokenbatch import TokenBatch
from clustersim.plan.stepgraph import Queue

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
    run        an entry of SERVICE
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


def as_complete(
    env: simpy.Environment, batch: TokenBatch, stage: int, rank: int, pace: Pace | None
) -> Process:
    """As `in_order`, but an expert is served as soon as all its own tokens are there."""
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
            before = yield from _serve(env, batch, stage, rank, p, pace)
            p = section[-1][1]
        else:
            if duration is None:
                yield batch.arrive(program.indices[p], rank)
            else:
                yield env.timeout(duration * pace.at(env.now) if pace else duration)
            ends[at + p] = env.now
            p, before = p + 1, p
        free = ends[at + before]


def _serve(
    env: simpy.Environment, batch: TokenBatch, stage: int, rank: int, dispatch: int, pace: Pace | None
) -> Generator[simpy.Event, object, int]:
    """Dispatch, then the experts of a rank in the order in which their queues are complete.

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
    queue = program.compute[dispatch].queue
    assert queue is not None
    waiting, before = list(range(queue.slots)), dispatch
    while waiting:
        slot = _complete(meeting, queue, member, waiting)
        if slot is None:
            yield meeting.news(member)
            continue
        if before == dispatch:
            ends[at + dispatch] = env.now
        waiting.remove(slot)
        for p in range(*program.sections[dispatch + 1][slot]):
            batch.begun[stage, rank, p] = (ends[at + before], env.now, before)
            duration = seconds[p]
            assert duration is not None
            yield env.timeout(duration * pace.at(env.now) if pace else duration)
            ends[at + p], before = env.now, p
    yield all_there
    return before


def _complete(meeting: Meeting, queue: Queue, member: int, waiting: Sequence[int]) -> int | None:
    """The waiting slot whose queue is complete: the one complete longest, ties to the lowest; or None."""
    members = meeting.routed.members
    group, place = divmod(member, members)
    if meeting.met[member] != meeting.met[member]:
        return None
    arrived = _arrivals(meeting, member)
    arrived[place] = meeting.met[member]
    best: tuple[float, int] | None = None
    for slot in waiting:
        senders = queue.tokens[group, :, place * queue.slots + slot] > 0
        when = float(arrived[senders].max(initial=meeting.met[member]))
        if when < np.inf and (best is None or (when, slot) < best):
            best = (when, slot)
    return None if best is None else best[1]


def _arrivals(meeting: Meeting, member: int) -> np.ndarray:
    """When what each of its group sends to a member is there, float64[n] s; inf for not yet."""
    assert meeting.routed.brought is not None
    by = meeting.routed.brought[member]
    arrived = np.full(len(by), np.inf)
    first = 0
    for ends in meeting.ends:
        here = (by >= first) & (by < first + len(ends))
        arrived[here] = ends[by[here] - first]
        first += len(ends)
    return np.where(np.isnan(arrived), np.inf, arrived)


SERVICE: dict[str, Run] = {"all_arrived": in_order, "expert_complete": as_complete}
