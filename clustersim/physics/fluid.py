"""Max-min fair rates, exact and fast: the default model of the network.

The flows in flight fall into pools: flows of different pools share no link, so an event in one pool
leaves the others alone. The rates of a pool hold for a phase, from one re-share to the next. When
flows end, there is no re-share as long as every flow that is left still has a full link that none
of the ended ones crossed: then the old rates still are max-min fair. That is why the flows of one
exchange, which weigh as their bytes, are shared out once and then end group by group.

A pool of a single start at nominal capacities always lives through the same phases; they are worked
out once per Flows value and remembered as long as that value lives.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from clustersim.physics.network import Finished, Flows

#: A flow is done when less is left, bytes.
_DONE = 0.5

#: Links whose fair share differs by less are filled together; it bounds the error of the rates, and
#: keeps roundoff among the equal ports of a symmetric exchange from being shared out port by port.
_SAME = 1e-12

#: Bytes/s of a flow that no link holds back; finite, so that it may be multiplied by 0 s.
_UNBOUND = 1e300

#: Flows times phases that are remembered per Flows value; it bounds the memory, not the answer.
_REMEMBERED = 1 << 16


def max_min_rates(
    weight: np.ndarray, links: np.ndarray, capacity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The max-min fair rates of flows that share links.

    weight    float64[F] share weights, > 0
    links     int[F, P] the links each flow crosses, padded with -1
    capacity  float64[K] bytes/s, >= 0
    Returns   float64[F] bytes/s, inf for an empty path, and int[F] for each flow a full link on
              which no flow has a larger rate per weight, -1 for an empty path
    Source    progressive filling: Bertsekas, Gallager, Data Networks, 2nd ed., section 6.5.2
    """
    table = np.where(links < 0, len(capacity), links).T
    rate, bottleneck = _fill(weight, table, capacity)
    return rate, np.where(bottleneck < len(capacity), bottleneck, -1)


def _fill(weight: np.ndarray, table: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rates and bottlenecks as in max_min_rates; table int[P, F], padded with K.

    All links that are the smallest to every one of their flows are filled in one go: the number of
    rounds is the depth of who waits for whom, not the number of distinct rates.
    """
    links, flows = len(capacity), len(weight)
    rate, bottleneck = np.full(flows, np.inf), np.full(flows, links)
    room, rows = np.append(capacity, np.inf), np.flatnonzero((table < links).any(axis=0))
    if len(rows) < flows:
        weight, table = weight[rows], table[:, rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        while len(rows):
            load = np.bincount(table.ravel(), np.tile(weight, len(table)), links + 1)
            share = np.where(load > 0, room / load, np.inf)
            share[links] = np.inf
            level = share[table]
            lowest = level.min(axis=0)
            full = load > 0
            full[table[lowest * (1 + _SAME) < level]] = False
            full[links] = False
            crossed = full[table]
            settled = crossed.any(axis=0)
            filled, at = weight * lowest, table[crossed.argmax(axis=0), np.arange(len(rows))]
            if settled.all():
                rate[rows], bottleneck[rows] = filled, at
                break
            rate[rows[settled]], bottleneck[rows[settled]] = filled[settled], at[settled]
            filled[~settled] = 0.0
            used = np.bincount(table.ravel(), np.tile(filled, len(table)), links + 1)
            room = np.maximum(room - used, 0.0)
            rows, weight, table = rows[~settled], weight[~settled], table[:, ~settled]
    return rate, bottleneck


@dataclass(frozen=True, slots=True)
class _Shape:
    """The flows of a pool as the solver sees them.

    weight    float64[F]
    batch     int[F] which of the pool's starts a flow belongs to
    position  int[F] where in that start
    links     int[U] the links of all paths
    table     int[P, F] the paths as places in `links`, padded with U
    """

    weight: np.ndarray
    batch: np.ndarray
    position: np.ndarray
    links: np.ndarray
    table: np.ndarray


class _Phase:
    """The rates of a pool's flows from one re-share to the next. Times count from its beginning.

    order  int[A] flows with bandwidth, as rows of the shape, in the order in which they are done
    left   float64[A] bytes left at the beginning, in that order; rate bytes/s likewise
    early  float64[A] when less than half a byte is left
    ends   float64[A + 1] when the next flow ends if that many are done, inf for none
    late   int[W] flows that still wait for their latency; late_left, late_wait likewise
    joins  when the next of these begins, inf for none
    """

    def __init__(
        self, shape: _Shape, rows: np.ndarray, left: np.ndarray, wait: np.ndarray, capacity: np.ndarray
    ) -> None:
        """rows int[R] of the shape, with their bytes left and s to wait; capacity float64[U]."""
        begun = wait <= 0
        self.late, self.late_left, self.late_wait = rows[~begun], left[~begun], wait[~begun]
        self.joins = float(self.late_wait.min(initial=np.inf))
        rows, left = rows[begun], left[begun]
        near = left < _DONE
        table = np.where(near, len(capacity), shape.table[:, rows])
        rate, bottleneck = _fill(shape.weight[rows], table, capacity)
        rate = np.minimum(rate, _UNBOUND)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            early, ends = (left - _DONE) / rate, np.where(near, 0.0, left / rate)
        order = np.argsort(early, kind="stable")
        self.order, self.left, self.rate = rows[order], left[order], rate[order]
        self.early = early[order]
        self.ends = np.append(np.minimum.accumulate(ends[order][::-1])[::-1], np.inf)
        self.then: _Phase | None = None
        self.number = 1
        self._table, self._bottleneck, self._links = table[:, order], bottleneck[order], len(capacity)

    @cached_property
    def unfair(self) -> np.ndarray:
        """bool[A + 1]: with that many done, one of them crossed the bottleneck of one that is not."""
        flows, links = len(self.order), self._links
        rank = np.arange(flows)
        first, last = np.full(links + 1, flows), np.full(links + 1, -1)
        first[self._table.T[::-1].ravel()] = np.repeat(rank[::-1], len(self._table))
        last[self._bottleneck] = rank
        first, last = first[:links], last[:links]
        split = first < last
        change = np.bincount(first[split] + 1, minlength=flows + 2)
        change -= np.bincount(last[split] + 1, minlength=flows + 2)
        return np.cumsum(change)[: flows + 1] > 0

    def rest(self, done: int, now: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows that are not done at that time, their bytes left and s to wait (<= 0: begun)."""
        left = np.maximum(self.left[done:] - self.rate[done:] * now, 0.0)
        if not len(self.late):
            return self.order[done:], left, np.zeros(len(left))
        return (
            np.concatenate([self.order[done:], self.late]),
            np.concatenate([left, self.late_left]),
            np.concatenate([np.zeros(len(left)), self.late_wait - now]),
        )


@dataclass(slots=True)
class _Plan:
    """What is remembered for one Flows value.

    size   float64[F] bytes
    wait   float64[F] s each flow begins after the first
    lead   s until the first begins
    first  phase in which the start begins when it is alone, once known
    """

    shape: _Shape
    size: np.ndarray
    wait: np.ndarray
    lead: float
    first: _Phase | None


@dataclass(frozen=True, slots=True)
class _Crowd:
    """Flows on their way from one pool to another.

    left      float64[R] bytes
    wait      float64[R] s until they begin, <= 0: begun
    weight    float64[R]
    path      int[P, R] link numbers, padded with K
    batch     int[R] which of the keys, position int[R] in its start
    """

    left: np.ndarray
    wait: np.ndarray
    weight: np.ndarray
    path: np.ndarray
    batch: np.ndarray
    position: np.ndarray
    keys: list[Hashable]

    @classmethod
    def of(
        cls,
        shape: _Shape,
        rows: np.ndarray,
        left: np.ndarray,
        wait: np.ndarray,
        keys: list[Hashable],
        no_link: int,
    ) -> _Crowd:
        path = np.append(shape.links, no_link)[shape.table[:, rows]]
        return cls(left, wait, shape.weight[rows], path, shape.batch[rows], shape.position[rows], keys)

    def part(self, rows: np.ndarray) -> _Crowd:
        """These flows alone, with the keys they need."""
        batches, batch = np.unique(self.batch[rows], return_inverse=True)
        keys = [self.keys[b] for b in batches]
        return _Crowd(
            self.left[rows],
            self.wait[rows],
            self.weight[rows],
            self.path[:, rows],
            batch,
            self.position[rows],
            keys,
        )


class _Pool:
    """Flows in flight that no other flow in flight shares a link with.

    keys    the starts they belong to
    links   arrays of the links it holds
    phase   present rates, begun at `since`; `done` of its flows are done
    cut     when the phase ended, counted from its beginning; inf while it lasts
    alone   a single start at nominal capacities so far: the phases are those remembered
    crowds  flows that have met but not been shared out yet; empty otherwise
    """

    __slots__ = (
        "alone",
        "crowds",
        "cut",
        "done",
        "keys",
        "links",
        "number",
        "phase",
        "shape",
        "since",
        "version",
    )

    phase: _Phase
    shape: _Shape

    def __init__(self, number: int, keys: list[Hashable], since: float) -> None:
        self.number = number
        self.keys = keys
        self.links: list[np.ndarray] = []
        self.crowds: list[_Crowd] = []
        self.alone = False
        self.version = 0
        self.since = since
        self.done = 0
        self.cut = np.inf

    def enter(self, phase: _Phase, since: float) -> None:
        self.phase, self.since, self.done, self.cut = phase, since, 0, np.inf

    def crowd(self, now: float, no_link: int) -> list[_Crowd]:
        """All its flows, as they are now."""
        if self.crowds:
            return self.crowds
        offset = self.cut if self.cut < np.inf else max(now - self.since, 0.0)
        return [_Crowd.of(self.shape, *self.phase.rest(self.done, offset), self.keys, no_link)]

    def thinned(self) -> bool:
        """Whether so many of its starts are over that the rest may fall apart into several pools."""
        rows = self.phase.rest(self.done, 0.0)[0]
        return len(self.keys) > 1 and _few(self.shape.batch[rows], len(self.keys))


class Fluid:
    """Concurrent flows share links max-min fairly by weight, as a fluid without queues."""

    def __init__(self, bandwidth: np.ndarray) -> None:
        """bandwidth  float64[K] bytes/s."""
        self._nominal = np.array(bandwidth, dtype=np.float64)
        self._capacity = self._nominal.copy()
        self._altered = 0
        self._owner = np.full(len(self._nominal), -1)
        self._scratch = np.empty(len(self._nominal) + 1, dtype=np.intp)
        self._pools: dict[int, _Pool] = {}
        self._unshared: list[_Pool] = []
        self._plans: WeakKeyDictionary[Flows, _Plan] = WeakKeyDictionary()
        self._events: list[tuple[float, int, Callable[[float, Any, Any], None], Any, Any]] = []
        self._counter = count()
        self._numbers = count()
        self._finished: Finished = []
        self._clock = -np.inf
        self._now = -np.inf

    def start(self, flows: Flows, key: Hashable, now: float) -> None:
        plan = self._plans.get(flows)
        if plan is None:
            self._plans[flows] = plan = self._plan(flows)
        self._clock = now
        self._push(now + plan.lead, self._activate, plan, key)

    def set_capacity(self, link: int, bandwidth: float, now: float) -> None:
        self._clock = now
        self._push(now, self._alter, link, bandwidth)

    def next_finish(self) -> float:
        self._run(self._clock)
        while self._unshared:
            self._share()
            self._run(self._clock)
        if self._finished:
            return self._clock
        while self._events and self._void(*self._events[0]):
            heappop(self._events)
        return self._events[0][0] if self._events else np.inf

    def finish(self, now: float) -> Finished:
        self._clock = now
        self._run(now)
        finished, self._finished = self._finished, []
        return finished

    def _push(self, time: float, act: Callable[[float, Any, Any], None], what: Any, detail: Any) -> None:
        heappush(self._events, (time, next(self._counter), act, what, detail))

    def _void(self, time: float, number: int, act: object, what: Any, detail: Any) -> bool:
        return isinstance(what, _Pool) and what.version != detail

    def _run(self, now: float) -> None:
        """Lets happen what is due by now. Shares are made only when time has to move on."""
        events = self._events
        while True:
            upcoming = events[0][0] if events else np.inf
            if self._unshared and self._now < min(upcoming, now):
                self._share()
            elif upcoming <= now:
                self._now, _, act, what, detail = heappop(events)
                act(self._now, what, detail)
            else:
                return

    def _plan(self, flows: Flows) -> _Plan:
        path = np.where(flows.links < 0, len(self._nominal), flows.links).T
        lead = float(flows.latency.min())
        flow = np.arange(len(flows.size))
        shape = self._shape(flows.weight, path, np.zeros_like(flow), flow)
        size = np.where((shape.table < len(shape.links)).any(axis=0), flows.size, 0.0)
        return _Plan(shape, size, flows.latency - lead, lead, None)

    def _shape(self, weight: np.ndarray, path: np.ndarray, batch: np.ndarray, position: np.ndarray) -> _Shape:
        path = np.ascontiguousarray(path)
        flat, scratch = path.ravel(), self._scratch
        places = np.arange(len(flat))
        scratch[flat] = places
        scratch[-1] = -1
        links = flat[scratch[flat] == places]
        scratch[links] = places[: len(links)]
        scratch[-1] = len(links)
        return _Shape(weight, batch, position, links, scratch[flat].reshape(path.shape))

    def _activate(self, now: float, plan: _Plan, key: Hashable) -> None:
        """The first flows of a start want bandwidth; whoever holds a link of them is joined."""
        links = plan.shape.links
        pool = _Pool(next(self._numbers), [key], now)
        self._pools[pool.number] = pool
        owners = self._owner[links]
        if len(links) and owners.max() >= 0:
            self._join(pool, plan, sorted({int(n) for n in owners if n >= 0}), now)
            return
        self._owner[links] = pool.number
        pool.links, pool.shape = [links], plan.shape
        pool.alone = not self._altered or np.array_equal(self._capacity[links], self._nominal[links])
        phase = plan.first if pool.alone else None
        if phase is None:
            phase = _Phase(plan.shape, plan.shape.position, plan.size, plan.wait, self._capacity[links])
            if pool.alone:
                plan.first = phase
        pool.enter(phase, now)
        self._expect(pool)

    def _join(self, pool: _Pool, plan: _Plan, others: Iterable[int], now: float) -> None:
        shape = plan.shape
        pool.links = [shape.links]
        none = len(self._nominal)
        pool.crowds = [_Crowd.of(shape, shape.position, plan.size, plan.wait, pool.keys, none)]
        for number in others:
            other = self._pools.pop(number)
            pool.crowds = other.crowd(now, none) + pool.crowds
            pool.links = other.links + pool.links
            other.version = -1
        for links in pool.links:
            self._owner[links] = pool.number
        self._unshared.append(pool)

    def _alter(self, now: float, link: int, bandwidth: float) -> None:
        before, nominal = self._capacity[link], self._nominal[link]
        self._capacity[link] = bandwidth
        self._altered += int(bandwidth != nominal) - int(before != nominal)
        pool = self._pools.get(int(self._owner[link]))
        if pool is not None and before != bandwidth:
            pool.alone = False
            self._cut(pool, max(now - pool.since, 0.0))

    def _expect(self, pool: _Pool) -> None:
        """Notes when the pool's next flow ends or begins."""
        phase = pool.phase
        offset = min(float(phase.ends[pool.done]), phase.joins)
        if offset < np.inf:
            self._push(pool.since + offset, self._reach, pool, pool.version)

    def _reach(self, now: float, pool: _Pool, version: int) -> None:
        if pool.version != version:
            return
        phase, before = pool.phase, pool.done
        offset = min(float(phase.ends[before]), phase.joins)
        pool.done = done = int(phase.early.searchsorted(offset, side="right"))
        if done > before:
            self._hand_out(pool, phase.order[before:done])
        if done == len(phase.order) and not len(phase.late):
            self._drop(pool)
        elif phase.joins <= offset or phase.unfair[done]:
            self._cut(pool, offset)
        else:
            self._expect(pool)

    def _hand_out(self, pool: _Pool, rows: np.ndarray) -> None:
        position = pool.shape.position[rows]
        if len(pool.keys) == 1:
            self._finished.append((pool.keys[0], position))
            return
        batch = pool.shape.batch[rows]
        order = np.argsort(batch, kind="stable")
        batch, position = batch[order], position[order]
        edges = np.flatnonzero(np.diff(batch)) + 1
        for at, part in zip([0, *edges.tolist()], np.split(position, edges), strict=True):
            self._finished.append((pool.keys[batch[at]], part))

    def _drop(self, pool: _Pool) -> None:
        for links in pool.links:
            self._owner[links] = -1
        pool.version = -1
        del self._pools[pool.number]

    def _cut(self, pool: _Pool, offset: float) -> None:
        """Ends the phase; the new rates are worked out before time moves on."""
        if pool.crowds or pool.cut < np.inf:
            return
        pool.cut = offset
        pool.version += 1
        self._unshared.append(pool)

    def _share(self) -> None:
        unshared, self._unshared = self._unshared, []
        for pool in unshared:
            if pool.version < 0:
                continue
            if pool.crowds or pool.thinned():
                self._settle(pool)
            else:
                self._go_on(pool)

    def _go_on(self, pool: _Pool) -> None:
        """The next phase of a pool that neither gained a start nor falls apart."""
        phase = pool.phase
        then = phase.then if pool.alone else None
        if then is None:
            rest = phase.rest(pool.done, pool.cut)
            then = _Phase(pool.shape, *rest, self._capacity[pool.shape.links])
            then.number = phase.number + 1
            if pool.alone and then.number * len(pool.shape.weight) <= _REMEMBERED:
                phase.then = then
        pool.enter(then, pool.since + pool.cut)
        self._expect(pool)

    def _settle(self, pool: _Pool) -> None:
        """Puts the pool's flows into as many new pools as share no link."""
        no_link = len(self._nominal)
        crowd = _joined(pool.crowd(self._now, no_link), no_link)
        self._drop(pool)
        for part in _apart(crowd, no_link) if _few(crowd.batch, len(crowd.keys)) else [crowd]:
            shape = self._shape(part.weight, part.path, part.batch, part.position)
            pool = _Pool(next(self._numbers), part.keys, self._now)
            self._pools[pool.number] = pool
            self._owner[shape.links] = pool.number
            pool.links, pool.shape = [shape.links], shape
            rows = np.arange(len(part.left))
            pool.enter(_Phase(shape, rows, part.left, part.wait, self._capacity[shape.links]), self._now)
            self._expect(pool)


def _few(batch: np.ndarray, keys: int) -> bool:
    """Whether one in 32 of the starts, at least one, has no flow left in batch int[R]."""
    gone = keys - int(np.count_nonzero(np.bincount(batch, minlength=keys)))
    return gone > 0 and gone * 32 >= keys


def _joined(crowds: list[_Crowd], no_link: int) -> _Crowd:
    if len(crowds) == 1:
        return crowds[0]
    keys: list[Hashable] = []
    batches = []
    for crowd in crowds:
        batches.append(crowd.batch + len(keys))
        keys += crowd.keys
    hops = max(len(crowd.path) for crowd in crowds)
    paths = [np.full((hops, len(crowd.left)), no_link) for crowd in crowds]
    for path, crowd in zip(paths, crowds, strict=True):
        path[: len(crowd.path)] = crowd.path
    return _Crowd(
        np.concatenate([crowd.left for crowd in crowds]),
        np.concatenate([crowd.wait for crowd in crowds]),
        np.concatenate([crowd.weight for crowd in crowds]),
        np.concatenate(paths, axis=1),
        np.concatenate(batches),
        np.concatenate([crowd.position for crowd in crowds]),
        keys,
    )


def _apart(crowd: _Crowd, no_link: int) -> list[_Crowd]:
    """The flows in groups that share no link; flows of one start stay together.

    Starts on a common link take the smallest of their labels until no label changes.
    """
    label = np.arange(len(crowd.keys))
    while True:
        on_link = np.full(no_link + 1, len(label))
        for hop in crowd.path:
            np.minimum.at(on_link, hop, label[crowd.batch])
        on_link[no_link] = len(label)
        nearest = label.copy()
        np.minimum.at(nearest, crowd.batch, on_link[crowd.path].min(axis=0))
        nearest = nearest[nearest]
        if np.array_equal(nearest, label):
            break
        label = nearest
    group = label[crowd.batch]
    rows = np.argsort(group, kind="stable")
    edges = np.flatnonzero(np.diff(group[rows])) + 1
    return [crowd.part(part) for part in np.split(rows, edges)] if len(edges) else [crowd.part(rows)]
