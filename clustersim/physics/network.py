"""The Network contract, the flows it moves, and the port bound: the fidelity with a closed form."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Flows:
    """F flows that are handed to the network together; may be started any number of times.

    size     float64[F] bytes, > 0
    weight   float64[F] share weight, > 0: the flows of one token exchange weigh as their bytes,
             independent flows weigh 1
    links    int32[F, P] link numbers in path order, padded with -1; an empty path (all -1) means:
             done after the latency
    latency  float64[F] seconds before the first byte; no bandwidth is used meanwhile

    Two values are the same only if they are the same object: networks remember by identity what
    they worked out for one. So the arrays must not be changed afterwards.
    """

    size: np.ndarray
    weight: np.ndarray
    links: np.ndarray
    latency: np.ndarray

    def __post_init__(self) -> None:
        flows = len(self.size)
        assert flows and self.links.ndim == 2, "there is at least one flow, and links are int[F, P]"
        assert len(self.weight) == len(self.links) == len(self.latency) == flows
        assert self.size.min() > 0 and self.weight.min() > 0 and self.latency.min() >= 0


Finished = list[tuple[Hashable, np.ndarray]]


class Network(Protocol):
    """Moves flows over links. Owns no clock: the caller says what time it is, and never goes back.

    `start` and `set_capacity` take effect at their `now`. The caller then asks `next_finish` and
    calls `finish` at that time; what happened between is worked out at its own exact time.
    """

    def start(self, flows: Flows, key: Hashable, now: float) -> None:
        """Begins to move flows; `key` names this start in `finish`, unique among those in flight."""
        ...

    def set_capacity(self, link: int, bandwidth: float, now: float) -> None:
        """Gives a link another bandwidth, bytes/s; 0 means down: its flows stall until it returns."""
        ...

    def next_finish(self) -> float:
        """When `finish` should be called next, s; inf if nothing moves. It may then return no flow."""
        ...

    def finish(self, now: float) -> Finished:
        """What was done by now and not told before: (key, positions in its Flows), int[...].

        The order is deterministic; a key may occur more than once.
        """
        ...

    def stop(self, key: Hashable, positions: np.ndarray, now: float) -> np.ndarray:
        """Takes flows of a start out of the network; `finish` will not name them.

        positions  int[S] of flows that were not told to be done
        Returns    float64[S] bytes that have not arrived; 0.0 of a flow that ends at this instant
        """
        ...


class _Transfer:
    """One start under the port bound: the flows that are not done yet.

    rows     int[R] their positions in the start
    sizes    float64[F] bytes that each brings: its size, or less where it was stopped
    left     float64[R] share of each that is still to come from `since` on
    since    float64[R] s; at first the end of the latency
    seconds  float64[F] s each flow takes in all at the present capacities
    """

    def __init__(self, key: Hashable, flows: Flows, now: float) -> None:
        self.key = key
        self.flows = flows
        self.sizes = flows.size
        self.rows = np.arange(len(flows.size))
        self.left = np.ones(len(flows.size))
        self.since = now + flows.latency
        self.version = 0

    def price(self, capacity: np.ndarray) -> None:
        """Sorts the flows by when they end at these capacities, float64[K]."""
        links = self.flows.links
        sizes = np.repeat(self.sizes, links.shape[1])
        carried = np.bincount(links.ravel() + 1, sizes, minlength=len(capacity) + 1)[1:]
        with np.errstate(divide="ignore", invalid="ignore"):
            busy = np.append(np.where(carried > 0, carried / capacity, 0.0), 0.0)
            self.seconds = busy[links].max(axis=1, initial=0.0)
            rest = np.where(self.left > 0, self.left * self.seconds[self.rows], 0.0)
        order = np.argsort(self.since + rest, kind="stable")
        self.ends = (self.since + rest)[order]
        self.rows, self.left, self.since = self.rows[order], self.left[order], self.since[order]
        self.version += 1

    def take(self, now: float) -> np.ndarray:
        """Removes the flows that end by now; returns their positions."""
        done = int(np.searchsorted(self.ends, now, side="right"))
        taken = self.rows[:done]
        self.rows, self.left = self.rows[done:], self.left[done:]
        self.since, self.ends = self.since[done:], self.ends[done:]
        return taken

    def pause(self, now: float) -> None:
        """Counts what came until now, so that the rest can be priced anew."""
        seconds = self.seconds[self.rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            came = np.where(seconds > 0, np.maximum(now - self.since, 0.0) / seconds, 0.0)
        self.left = np.maximum(self.left - came, 0.0)
        self.since = np.maximum(self.since, now)

    def stop(self, positions: np.ndarray, now: float) -> np.ndarray:
        """Takes flows out. Returns float64[P] bytes of each that have not come.

        The others no longer wait for these.
        """
        self.pause(now)
        missing = np.zeros(len(self.sizes))
        missing[self.rows] = self.left * self.sizes[self.rows]
        stays = ~np.isin(self.rows, positions)
        self.rows, self.left, self.since = self.rows[stays], self.left[stays], self.since[stays]
        self.sizes = self.sizes.copy()
        self.sizes[positions] -= missing[positions]
        stopped: np.ndarray = missing[positions]
        return stopped


class PortBound:
    """Every flow takes as long as the busiest link on its path needs for its own start alone.

    No network can be faster with one start; what else is in flight is ignored, so with several
    starts this is no price but a bound. A change of capacity counts for what is still to come.
    """

    def __init__(self, bandwidth: np.ndarray) -> None:
        """bandwidth  float64[K] bytes/s."""
        self._capacity = np.array(bandwidth, dtype=np.float64)
        self._transfers: dict[int, _Transfer] = {}
        self._ends: list[tuple[float, int, int, int]] = []
        self._numbers = count()
        self._entries = count()

    def start(self, flows: Flows, key: Hashable, now: float) -> None:
        number = next(self._numbers)
        self._transfers[number] = transfer = _Transfer(key, flows, now)
        transfer.price(self._capacity)
        self._note(number, transfer)

    def set_capacity(self, link: int, bandwidth: float, now: float) -> None:
        self._capacity[link] = bandwidth
        for number, transfer in self._transfers.items():
            if (transfer.flows.links == link).any():
                transfer.pause(now)
                transfer.price(self._capacity)
                self._note(number, transfer)

    def stop(self, key: Hashable, positions: np.ndarray, now: float) -> np.ndarray:
        number = next(n for n, transfer in self._transfers.items() if transfer.key == key)
        transfer = self._transfers[number]
        missing = transfer.stop(positions, now)
        if len(transfer.rows):
            transfer.price(self._capacity)
            self._note(number, transfer)
        else:
            del self._transfers[number]
        return missing

    def next_finish(self) -> float:
        while self._ends and not self._valid(self._ends[0]):
            heappop(self._ends)
        return self._ends[0][0] if self._ends else np.inf

    def finish(self, now: float) -> Finished:
        finished: Finished = []
        while self.next_finish() <= now:
            end, _, number, _ = heappop(self._ends)
            transfer = self._transfers[number]
            finished.append((transfer.key, transfer.take(end)))
            if len(transfer.rows):
                self._note(number, transfer)
            else:
                del self._transfers[number]
        return finished

    def _note(self, number: int, transfer: _Transfer) -> None:
        if transfer.ends[0] < np.inf:
            entry = (float(transfer.ends[0]), next(self._entries), number, transfer.version)
            heappush(self._ends, entry)

    def _valid(self, entry: tuple[float, int, int, int]) -> bool:
        _, _, number, version = entry
        return number in self._transfers and self._transfers[number].version == version
