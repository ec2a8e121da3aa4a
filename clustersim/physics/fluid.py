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
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from clustersim.physics.maxmin import UNKNOWN, Phase, Rest, Shape
from clustersim.physics.network import Finished, Flows

#: Flows times phases that are remembered per Flows value; it bounds the memory, not the answer.
_REMEMBERED = 1 << 16


@dataclass(slots=True)
class _Plan:
    """What is remembered for one Flows value.

    shape  its flows
    rest   all of them, nothing sent yet; they wait for the first among them
    lead   s until the first begins
    first  phase in which the start begins when it is alone, once known
    """

    shape: Shape
    rest: Rest
    lead: float
    first: Phase | None


@dataclass(frozen=True, slots=True)
class _Crowd:
    """Flows on their way from one pool to another.

    real   float64[4, R]: bytes left, s to wait, rate, weight
    whole  int[3 + P, R]: batch, position, bottleneck, path; link numbers, padded with K
    floor  as in Rest
    keys   the start of each batch
    """

    real: np.ndarray
    whole: np.ndarray
    floor: float
    keys: list[Hashable]

    def part(self, rows: np.ndarray) -> _Crowd:
        """These flows alone, with the keys they need."""
        batches, batch = np.unique(self.whole[0, rows], return_inverse=True)
        whole = np.concatenate([batch[None], self.whole[1:, rows]])
        return _Crowd(self.real[:, rows], whole, self.floor, [self.keys[b] for b in batches])


class _Pool:
    """Flows in flight that share no link with any flow of another pool.

    keys    the starts they belong to
    shape   the flows; links: arrays of the link numbers it holds
    phase   present rates, begun at `since`; `done` of its flows are done
    cut     when the phase ended, counted from its beginning; inf while it lasts
    alone   a single start at nominal capacities so far: the phases are those remembered
    void    a capacity changed, the rates say nothing about the next ones
    crowds  flows that have met but not been shared out yet; empty otherwise
    """

    phase: Phase
    shape: Shape

    def __init__(self, number: int, keys: list[Hashable]) -> None:
        self.number = number
        self.keys = keys
        self.links: list[np.ndarray] = []
        self.crowds: list[_Crowd] = []
        self.alone = self.void = False
        self.version = 0

    def enter(self, phase: Phase, since: float) -> None:
        self.phase, self.since, self.done, self.cut, self.void = phase, since, 0, np.inf, False

    def offset(self, now: float) -> float:
        return self.cut if self.cut < np.inf else max(now - self.since, 0.0)

    def rest(self, now: float) -> Rest:
        """Its flows as they are now."""
        rest = self.phase.rest(self.done, self.offset(now))
        return rest._replace(floor=0.0) if self.void else rest

    def thinned(self) -> bool:
        """Whether so many of its starts are over that the rest may fall apart into several pools."""
        return len(self.keys) > 1 and _few(self.shape.batch[self.rest(self.since).rows], len(self.keys))


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

    def stop(self, key: Hashable, positions: np.ndarray, now: float) -> np.ndarray:
        self._clock = now
        self._run(now)
        self._now = max(self._now, now)
        while self._unshared:
            self._share()
            self._run(now)
        for at, (time, number, act, what, detail) in enumerate(self._events):
            if isinstance(what, _Plan) and detail == key:
                unsent, others = self._planned_without(what, positions)
                self._events[at] = (time, number, act, others, key)
                if others is None:
                    del self._events[at]
                    heapify(self._events)
                return unsent
        pool = next(pool for pool in self._pools.values() if key in pool.keys)
        crowd = self._crowd(pool.shape, pool.rest(now), pool.keys)
        of_key = crowd.whole[0] == pool.keys.index(key)
        gone = of_key & np.isin(crowd.whole[1], positions)
        where = np.full(int(positions.max()) + 1, -1)
        where[crowd.whole[1, gone]] = np.flatnonzero(gone)
        left: np.ndarray = crowd.real[0, where[positions]]
        if gone.all():
            self._drop(pool)
            return left
        pool.version += 1
        pool.void = True
        pool.crowds = [_Crowd(crowd.real[:, ~gone], crowd.whole[:, ~gone], 0.0, crowd.keys)]
        self._unshared.append(pool)
        return left

    def _planned_without(self, plan: _Plan, positions: np.ndarray) -> tuple[np.ndarray, _Plan | None]:
        """Bytes of flows that have not begun, and the plan of the others, None if there are none."""
        shape, rest = plan.shape, plan.rest
        stays = ~np.isin(shape.position, positions)
        left: np.ndarray = rest.left[np.searchsorted(shape.position, positions)]
        if not stays.any():
            return left, None
        path = np.append(shape.links, len(self._nominal))[shape.table[:, stays]]
        count = int(stays.sum())
        part = self._shape(shape.weight[stays], path, np.zeros(count, dtype=np.intp), shape.position[stays])
        rows, unknown = np.arange(count), (np.full(count, UNKNOWN), np.full(count, len(part.links)))
        return left, _Plan(
            part, Rest(rows, rest.left[stays], rest.wait[stays], *unknown, np.inf), plan.lead, None
        )

    def _push(self, time: float, act: Callable[[float, Any, Any], None], what: Any, detail: Any) -> None:
        heappush(self._events, (time, next(self._counter), act, what, detail))

    def _void(self, time: float, number: int, act: object, what: Any, detail: Any) -> bool:
        return isinstance(what, _Pool) and what.version != detail

    def _run(self, now: float) -> None:
        """Lets happen what is due by now. Rates are shared anew only when time has to move on."""
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
        rows = np.arange(len(flows.size))
        shape = self._shape(flows.weight, path, np.zeros_like(rows), rows)
        none = len(shape.links)
        # A flow that crosses no link has nothing to send: it is done when its latency is over.
        size = np.where((shape.table < none).any(axis=0), flows.size, 0.0)
        unknown = np.full(len(rows), UNKNOWN), np.full(len(rows), none)
        return _Plan(shape, Rest(rows, size, flows.latency - lead, *unknown, np.inf), lead, None)

    def _shape(self, weight: np.ndarray, path: np.ndarray, batch: np.ndarray, position: np.ndarray) -> Shape:
        """Numbers the links of int[P, F] paths by their last occurrence, without sorting them.

        The scratch then holds the place of each of these links, and of no link.
        """
        path = np.ascontiguousarray(path)
        flat, scratch = path.ravel(), self._scratch
        places = np.arange(len(flat))
        scratch[flat] = places
        scratch[-1] = -1
        links = flat[scratch[flat] == places]
        scratch[links] = places[: len(links)]
        scratch[-1] = len(links)
        return Shape(weight, batch, position, links, scratch[flat].reshape(path.shape))

    def _activate(self, now: float, plan: _Plan, key: Hashable) -> None:
        """The first flows of a start want bandwidth; whoever holds a link of theirs is joined."""
        links = plan.shape.links
        pool = _Pool(next(self._numbers), [key])
        self._pools[pool.number] = pool
        owners = self._owner[links]
        if len(links) and owners.max() >= 0:
            self._join(pool, plan, sorted({int(number) for number in owners if number >= 0}), now)
            return
        self._owner[links] = pool.number
        pool.links, pool.shape = [links], plan.shape
        pool.alone = not self._altered or np.array_equal(self._capacity[links], self._nominal[links])
        phase = plan.first if pool.alone else None
        if phase is None:
            phase = Phase(plan.shape, plan.rest, self._capacity[links])
            if pool.alone:
                plan.first = phase
        pool.enter(phase, now)
        self._expect(pool)

    def _join(self, pool: _Pool, plan: _Plan, others: Iterable[int], now: float) -> None:
        pool.links = [plan.shape.links]
        newcomers = self._crowd(plan.shape, plan.rest, pool.keys)
        for number in others:
            other = self._pools.pop(number)
            pool.crowds += other.crowds or [self._crowd(other.shape, other.rest(now), other.keys)]
            pool.links += other.links
            pool.void |= other.void
            other.version = -1
        pool.crowds.append(newcomers)
        for links in pool.links:
            self._owner[links] = pool.number
        self._unshared.append(pool)

    def _crowd(self, shape: Shape, rest: Rest, keys: list[Hashable]) -> _Crowd:
        rows, left, wait, rate, bottleneck, floor = rest
        links = np.append(shape.links, len(self._nominal))
        table = np.concatenate([bottleneck[None], shape.table[:, rows]])
        who = np.stack([shape.batch[rows], shape.position[rows]])
        real = np.stack([left, wait, rate, shape.weight[rows]])
        return _Crowd(real, np.concatenate([who, links[table]]), floor, keys)

    def _alter(self, now: float, link: int, bandwidth: float) -> None:
        before, nominal = self._capacity[link], self._nominal[link]
        self._capacity[link] = bandwidth
        self._altered += int(bandwidth != nominal) - int(before != nominal)
        pool = self._pools.get(int(self._owner[link]))
        if pool is None or before == bandwidth:
            return
        pool.alone, pool.void = False, True
        if not pool.crowds:
            self._cut(pool, pool.offset(now))

    def _expect(self, pool: _Pool) -> None:
        """Notes when the pool's next flow ends or begins."""
        offset = min(float(pool.phase.ends[pool.done]), pool.phase.joins)
        if offset < np.inf:
            self._push(pool.since + offset, self._reach, pool, pool.version)

    def _reach(self, now: float, pool: _Pool, version: int) -> None:
        """A flow of the pool ends or begins, unless the pool's rates have changed since."""
        if pool.version != version:
            return
        phase, before = pool.phase, pool.done
        # The offset itself, not now - since: roundoff could find nobody done, for ever.
        offset = min(float(phase.ends[before]), phase.joins)
        pool.done = done = int(phase.early.searchsorted(offset, side="right"))
        if done > before:
            self._hand_out(pool, phase.order[before:done])
        if done == len(phase.order) and not len(phase.late.rows):
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
        pool.version += 1
        if pool.cut == np.inf:
            pool.cut = offset
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
            then = Phase(pool.shape, pool.rest(self._now), self._capacity[pool.shape.links])
            then.number = phase.number + 1
            if pool.alone and then.number * len(pool.shape.weight) <= _REMEMBERED:
                phase.then = then
        pool.enter(then, pool.since + pool.cut)
        self._expect(pool)

    def _settle(self, pool: _Pool) -> None:
        """Puts the pool's flows into as many new pools as share no link."""
        no_link = len(self._nominal)
        crowd = _joined(pool.crowds or [self._crowd(pool.shape, pool.rest(self._now), pool.keys)], no_link)
        floor = 0.0 if pool.void else crowd.floor
        self._drop(pool)
        for part in _apart(crowd, no_link) if _few(crowd.whole[0], len(crowd.keys)) else [crowd]:
            left, wait, rate, weight = part.real
            batch, position, bottleneck, *_ = part.whole
            shape = self._shape(weight, part.whole[3:], batch, position)
            rest = Rest(np.arange(len(left)), left, wait, rate, self._scratch[bottleneck], floor)
            new = _Pool(next(self._numbers), part.keys)
            new.shape, new.links = shape, [shape.links]
            self._pools[new.number] = new
            self._owner[shape.links] = new.number
            new.enter(Phase(shape, rest, self._capacity[shape.links]), self._now)
            self._expect(new)


def _few(batch: np.ndarray, keys: int) -> bool:
    """Whether one in 32 of the starts, at least one, has no flow left in batch int[R]."""
    gone = keys - int(np.count_nonzero(np.bincount(batch, minlength=keys)))
    return gone > 0 and gone * 32 >= keys


def _joined(crowds: list[_Crowd], no_link: int) -> _Crowd:
    if len(crowds) == 1:
        return crowds[0]
    keys: list[Hashable] = []
    rows = max(len(crowd.whole) for crowd in crowds)
    wholes = []
    for crowd in crowds:
        whole = np.full((rows, crowd.whole.shape[1]), no_link)
        whole[: len(crowd.whole)] = crowd.whole
        whole[0] += len(keys)
        wholes.append(whole)
        keys += crowd.keys
    real = np.concatenate([crowd.real for crowd in crowds], axis=1)
    return _Crowd(real, np.concatenate(wholes, axis=1), min(crowd.floor for crowd in crowds), keys)


def _apart(crowd: _Crowd, no_link: int) -> list[_Crowd]:
    """The flows in groups that share no link; flows of one start stay together.

    Starts on a common link take the smallest of their labels until no label changes.
    """
    batch, path, label = crowd.whole[0], crowd.whole[3:], np.arange(len(crowd.keys))
    while True:
        on_link = np.full(no_link + 1, len(label))
        for hop in path:
            np.minimum.at(on_link, hop, label[batch])
        on_link[no_link] = len(label)
        nearest = label.copy()
        np.minimum.at(nearest, batch, on_link[path].min(axis=0))
        nearest = nearest[nearest]
        if np.array_equal(nearest, label):
            break
        label = nearest
    group = label[batch]
    rows = np.argsort(group, kind="stable")
    edges = np.flatnonzero(np.diff(group[rows])) + 1
    return [crowd.part(part) for part in np.split(rows, edges)]
