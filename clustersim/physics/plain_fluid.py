"""The fluid model in plain numpy: rates are worked out from nothing whenever anything changes.

It judges the compiled one, and stands in for it where there is no numba.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from clustersim.physics.maxmin import max_min_rates
from clustersim.physics.network import Finished, Flows

#: As in `sharing`: a flow is done when less than this share of its bytes is left.
_DONE = 1e-9


@dataclass(slots=True)
class _Table:
    """Flows that are not done; R of them.

    start, position  int64[R] which start, and where in it
    size, weight, left, rate, begin  float64[R] bytes, 1, bytes, bytes/s, s
    links            int64[R, P] padded with -1
    """

    start: np.ndarray
    position: np.ndarray
    size: np.ndarray
    weight: np.ndarray
    left: np.ndarray
    rate: np.ndarray
    begin: np.ndarray
    links: np.ndarray

    def those(self, mask: np.ndarray) -> _Table:
        return _Table(*(getattr(self, name)[mask] for name in self.__slots__))

    def and_those(self, other: _Table) -> _Table:
        width = max(self.links.shape[1], other.links.shape[1])
        both = [(getattr(self, name), getattr(other, name)) for name in self.__slots__]
        both[-1] = (_wide(self.links, width), _wide(other.links, width))
        return _Table(*(np.concatenate(pair) for pair in both))


def _wide(links: np.ndarray, width: int) -> np.ndarray:
    return np.pad(links, ((0, 0), (0, width - links.shape[1])), constant_values=-1)


class PlainFluid:
    """Concurrent flows share links max-min fairly by weight; a few hundred at a time."""

    def __init__(self, bandwidth: np.ndarray, tolerance: float = 0.0) -> None:
        """bandwidth, tolerance as in Fluid."""
        self._capacity = np.array(bandwidth, dtype=np.float64)
        self._tolerance = tolerance
        none, nobody = np.zeros(0), np.zeros(0, dtype=int)
        self._flows = _Table(nobody, nobody, none, none, none, none, none, np.zeros((0, 1), dtype=int))
        self._keys: list[Hashable] = []
        self._finished: Finished = []
        self._clock = self._now = -np.inf
        self._due = np.inf
        self._changed = False

    def start(self, flows: Flows, key: Hashable, now: float) -> None:
        count = len(flows.size)
        begun = _Table(
            start=np.full(count, len(self._keys)),
            position=np.arange(count),
            size=flows.size,
            weight=flows.weight,
            left=flows.size,
            rate=np.zeros(count),
            begin=now + flows.latency,
            links=flows.links.astype(int),
        )
        self._keys.append(key)
        self._flows = self._flows.and_those(begun)
        self._clock = now
        if begun.begin.min() <= self._now:
            self._change(self._now)

    def set_capacity(self, link: int, bandwidth: float, now: float) -> None:
        self._reach(now)
        self._capacity[link] = bandwidth
        self._change(self._now)

    def next_finish(self) -> float:
        upcoming = self._run(self._clock)
        return self._clock if self._finished else upcoming

    def finish(self, now: float) -> Finished:
        self._clock = now
        self._run(now)
        finished, self._finished = self._finished, []
        return finished

    def stop(self, key: Hashable, positions: np.ndarray, now: float) -> np.ndarray:
        self._reach(now)
        left = np.zeros(len(positions))
        number = len(self._keys) - 1 - self._keys[::-1].index(key)
        mine = np.flatnonzero(self._flows.start == number)
        place = {int(p): int(row) for p, row in zip(self._flows.position[mine], mine, strict=True)}
        rows = [place.get(int(p), -1) for p in positions]
        for at, row in enumerate(rows):
            left[at] = self._flows.left[row] if row >= 0 else 0.0
        stays = np.ones(len(self._flows.left), dtype=bool)
        stays[[row for row in rows if row >= 0]] = False
        self._flows = self._flows.those(stays)
        told = [(k, p[~np.isin(p, positions)] if k == key else p) for k, p in self._finished]
        self._finished = [(k, p) for k, p in told if len(p)]
        self._change(self._now)
        return left

    def _change(self, due: float) -> None:
        """Rates have to be shared out anew, before time moves on beyond `due`."""
        self._changed, self._due = True, min(self._due, due)

    def _reach(self, now: float) -> None:
        self._clock = now
        self._run(now)
        self._move(now)

    def _move(self, now: float) -> None:
        if now > self._now:
            moving = self._flows.rate > 0
            sent = np.where(moving, self._flows.rate, 0.0) * (now - self._now if moving.any() else 0.0)
            self._flows.left = np.maximum(self._flows.left - sent, 0.0)
            self._now = now

    def _run(self, until: float) -> float:
        """Lets happen what is due; returns when something happens next, s."""
        while True:
            f = self._flows
            late = f.begin > self._now
            begins = float(f.begin[late].min(initial=np.inf))
            moving = f.rate > 0
            ends = np.full(len(f.left), np.inf)
            ends[moving] = self._now + f.left[moving] / f.rate[moving]
            ends[~late & ((f.links < 0).all(axis=1) | (f.size <= 0))] = self._now
            time = min(begins, float(ends.min(initial=np.inf)))
            if self._changed and time > self._due:
                self._share()
                continue
            if time > until or time == np.inf:
                return time
            self._move(time)
            if begins <= time:
                self._change(time)
            self._end(ends)

    def _end(self, ends: np.ndarray) -> None:
        f, now = self._flows, self._now
        done = (ends <= now) | ((f.rate > 0) & (f.left < _DONE * f.size))
        if not done.any():
            return
        sending = done & (f.rate > 0)
        if sending.any():
            self._change(now + float((self._tolerance * f.size[sending] / f.rate[sending]).min()))
        for number in np.unique(f.start[done]).tolist():
            self._finished.append((self._keys[number], f.position[done & (f.start == number)]))
        self._flows = f.those(~done)

    def _share(self) -> None:
        f = self._flows
        moving = (f.begin <= self._now) & (f.links >= 0).any(axis=1)
        f.rate = np.zeros(len(f.left))
        f.rate[moving] = max_min_rates(f.weight[moving], f.links[moving], self._capacity)[0]
        self._changed, self._due = False, np.inf
