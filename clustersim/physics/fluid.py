"""The fluid model, the default: flows share links max-min fairly by weight, exactly or nearly so.

The rates are worked out by `sharing`, as machine code, where numba is installed; else by
`plain_fluid`, which gives the same answers slowly, and judges this one.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from clustersim.physics import sharing
from clustersim.physics.kernel import State, grown, new_state
from clustersim.physics.network import Finished, Flows

#: Room at the beginning; it doubles when it is short.
_SLOTS, _HOPS = 256, 4


@dataclass(slots=True)
class _Start:
    """Flows that were handed over together: where they are kept, and how many are not done."""

    key: Hashable
    slots: np.ndarray
    missing: int


class Fluid:
    """Concurrent flows share links max-min fairly by weight, as a fluid without queues."""

    def __init__(self, bandwidth: np.ndarray, tolerance: float = 0.0) -> None:
        """bandwidth float64[K] bytes/s.

        tolerance  share of its bytes that a flow that has ended may still take bandwidth for: the run
                   is then the exact one of flows that have up to so much more to send, and rates
                   are shared out less often; 0: exact
        """
        self._hold(new_state(np.asarray(bandwidth, dtype=np.float64), _SLOTS, _HOPS, tolerance))
        self._owner = np.full(_SLOTS, -1)
        self._position = np.zeros(_SLOTS, dtype=np.int64)
        self._starts: dict[int, _Start] = {}
        self._numbers: dict[Hashable, int] = {}
        self._count = 0
        self._clock = -np.inf
        #: When something happens next, s, if nobody has interfered since it was worked out.
        self._due: float | None = None

    def start(self, flows: Flows, key: Hashable, now: float) -> None:
        count = len(flows.size)
        self._make_room(count, flows.links.shape[1])
        s = self._state
        free = int(s.totals["free"][0])
        s.totals["free"] = free - count
        slots = s.agenda["free"][free - count : free].copy()
        self._clock, self._count, self._due = now, self._count + 1, None
        self._owner[slots], self._position[slots] = self._count, np.arange(count)
        self._starts[self._count] = _Start(key, slots, count)
        self._numbers[key] = self._count
        table = np.ascontiguousarray(flows.links, dtype=np.int32)
        sharing.start(
            s.flows, s.path, s.agenda, s.totals, slots, flows.size, flows.weight, table, flows.latency, now
        )

    def set_capacity(self, link: int, bandwidth: float, now: float) -> None:
        self._reach(now)
        s = self._state
        sharing.set_capacity(s.links, s.heaps, s.totals, link, bandwidth)

    def next_finish(self) -> float:
        if self._due is None:
            self._due = float(sharing.advance(*self._state, self._clock))
        return self._clock if self._ended[0] else self._due

    def finish(self, now: float) -> Finished:
        self._clock = now
        self._due = float(sharing.advance(*self._state, now))
        return self._done()

    def stop(self, key: Hashable, positions: np.ndarray, now: float) -> np.ndarray:
        self._reach(now)
        s, number = self._state, self._numbers[key]
        slots = self._starts[number].slots[positions]
        left = np.zeros(len(slots))
        done = np.isin(slots, s.agenda["done"][: int(s.totals["done"][0])])
        rest = np.zeros(int((~done).sum()))
        sharing.stop(s.links, s.notes, s.heaps, s.flows, s.path, s.places, s.totals, slots[~done], rest)
        left[~done] = rest
        begun = ~done & (s.flows["load"][slots] > 0)
        self._owner[slots] = -1
        self._release(slots[begun])
        self._forget(number, len(slots))
        return left

    def in_flight(self) -> list[Hashable]:
        """The starts some of whose flows are not done, in the order of their beginning."""
        return [start.key for start in self._starts.values()]

    def rates(self, key: Hashable) -> np.ndarray:
        """float64[F] bytes/s of the flows of a start now; 0 before they begin and after they end.

        `next_finish` brings them up to date.
        """
        slots = self._starts[self._numbers[key]].slots
        flows = self._state.flows
        mine = (self._owner[slots] == self._numbers[key]) & (flows["bottleneck"][slots] >= 0)
        return np.where(mine, flows["share"][slots] * flows["weight"][slots], 0.0)

    def _reach(self, now: float) -> None:
        """Everything before is over; what is asked next counts from now on."""
        self._clock, self._due = now, None
        sharing.advance(*self._state, now)
        self._state.totals["now"] = max(now, float(self._state.totals["now"][0]))

    def _hold(self, state: State) -> None:
        """Keeps the state, and views of what every call looks at: numpy takes its time to find a field."""
        self._state = state
        self._ended, self._done_slots = state.totals["done"], state.agenda["done"]
        self._free, self._free_slots = state.totals["free"], state.agenda["free"]

    def _done(self) -> Finished:
        count = int(self._ended[0])
        if not count:
            return []
        slots = self._done_slots[:count].copy()
        self._ended[0] = 0
        self._release(slots)
        if count == 1:
            return self._told(slots)
        owner = self._owner[slots]
        if owner[0] == owner[-1] and (owner == owner[0]).all():
            parts = [slots]
        else:
            order = np.argsort(owner, kind="stable")
            slots, owner = slots[order], owner[order]
            parts = np.split(slots, np.flatnonzero(np.diff(owner)) + 1)
        return [told for part in parts for told in self._told(part)]

    def _told(self, slots: np.ndarray) -> Finished:
        number = int(self._owner[slots[0]])
        if number < 0:
            return []
        key = self._starts[number].key
        self._forget(number, len(slots))
        return [(key, self._position[slots])]

    def _forget(self, number: int, count: int) -> None:
        start = self._starts[number]
        start.missing -= count
        if not start.missing:
            del self._starts[number]
            if self._numbers.get(start.key) == number:
                del self._numbers[start.key]

    def _release(self, slots: np.ndarray) -> None:
        free = int(self._free[0])
        self._free_slots[free : free + len(slots)] = slots
        self._free[0] = free + len(slots)

    def _make_room(self, count: int, hops: int) -> None:
        s = self._state
        slots, width = s.path.shape
        free = int(s.totals["free"][0])
        if count <= free and hops <= width:
            return
        more = slots if count <= free else max(2 * slots, slots + count - free)
        self._hold(grown(s, more, max(hops, width)))
        self._owner = np.concatenate([self._owner, np.full(more - slots, -1)])
        self._position = np.concatenate([self._position, np.zeros(more - slots, dtype=np.int64)])
