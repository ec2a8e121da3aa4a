"""Max-min fair rates of flows that share links, and how long they hold. No time of its own, no state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

#: A flow is done when less is left, bytes.
DONE = 0.5

#: Links whose fair share differs by less are filled together; it bounds the error of the rates, and
#: keeps roundoff among the equal ports of a symmetric exchange from being shared out port by port.
_SAME = 1e-12

#: Rates this much below the lowest change are kept; more than roundoff, so that no tie is kept.
_BELOW = 1 - 1e-9

#: Bytes/s of a flow that no link holds back; finite, so that it may be multiplied by 0 s.
_UNBOUND = 1e300

#: The rate of a flow that has not been shared out yet.
UNKNOWN = -1.0


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
    rate, bottleneck = np.full(len(weight), np.inf), np.full(len(weight), -1)
    rows = np.flatnonzero((links >= 0).any(axis=1))
    _fill(weight, table, np.append(capacity, np.inf), rows, rate, bottleneck)
    return rate, bottleneck


def _fill(
    weight: np.ndarray,
    table: np.ndarray,
    room: np.ndarray,
    rows: np.ndarray,
    rate: np.ndarray,
    bottleneck: np.ndarray,
) -> None:
    """Sets rate and bottleneck of those rows that are not shared out yet.

    table  int[P, F] links, padded with K
    room   float64[K + 1] what the other flows leave; the last entry is no link
    rows   int[O] flows with at least one link

    All links that are the smallest to every one of their flows are filled in one go: the number of
    rounds is the depth of who waits for whom, not the number of distinct rates.
    """
    bins = len(room)
    if len(rows) < len(weight):
        weight, table = weight[rows], table[:, rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        while len(rows):
            load = _on_links(table, weight, bins)
            share = np.where(load > 0, room / load, np.inf)
            share[-1] = np.inf
            level = share[table]
            lowest = level.min(axis=0)
            full = load > 0
            full[table[lowest * (1 + _SAME) < level]] = False
            full[-1] = False
            crossed = full[table]
            settled = crossed.any(axis=0)
            done, rest = settled.nonzero()[0], (~settled).nonzero()[0]
            filled = weight[done] * lowest[done]
            rate[rows[done]] = filled
            bottleneck[rows[done]] = table[crossed.argmax(axis=0)[done], done]
            if not len(rest):
                return
            room = np.maximum(room - _on_links(table[:, done], filled, bins), 0.0)
            rows, weight, table = rows[rest], weight[rest], table[:, rest]


def _on_links(table: np.ndarray, amount: np.ndarray, bins: int) -> np.ndarray:
    """The sum of float64[F] amounts on each link, float64[bins]."""
    return np.bincount(table.ravel(), np.concatenate((amount,) * len(table)), bins)


@dataclass(frozen=True, slots=True)
class Shape:
    """Flows as the solver sees them.

    weight    float64[F]
    batch     int[F] which start a flow belongs to
    position  int[F] where in that start
    links     int[U] the links of all paths
    table     int[P, F] the paths as places in `links`, padded with U
    """

    weight: np.ndarray
    batch: np.ndarray
    position: np.ndarray
    links: np.ndarray
    table: np.ndarray


class Rest(NamedTuple):
    """What is still to come of some flows, and what is known of their rates.

    rows        int[R] of a shape
    left        float64[R] bytes
    wait        float64[R] s until they begin, <= 0: begun
    rate        float64[R] bytes/s so far, UNKNOWN if not shared out yet
    bottleneck  int[R] place of the link that held them back so far
    floor       no flow that ended since then had less rate per weight; 0 if the rates are void
    """

    rows: np.ndarray
    left: np.ndarray
    wait: np.ndarray
    rate: np.ndarray
    bottleneck: np.ndarray
    floor: float


_NONE, _NOTHING = np.empty(0, dtype=np.intp), np.empty(0)
_NOBODY = Rest(_NONE, _NOTHING, _NOTHING, _NOTHING, _NONE, np.inf)


class Phase:
    """The rates of a pool's flows from one re-share to the next. Times count from its beginning.

    order  int[A] flows with bandwidth, as rows of the shape, in the order in which they are done
    left   float64[A] bytes left at the beginning, in that order; rate bytes/s likewise
    early  float64[A] when less than half a byte is left
    ends   float64[A + 1] when the next flow ends if that many are done, inf for none
    late   flows that still wait for their latency
    joins  when the next of these begins, inf for none
    """

    def __init__(self, shape: Shape, rest: Rest, capacity: np.ndarray) -> None:
        """capacity  float64[U] bytes/s."""
        begun = rest.wait <= 0
        now, self.late = _divided(rest, begun)
        self.joins = float(self.late.wait.min(initial=np.inf))
        rows, left, _, rate, bottleneck, _ = now
        near = left < DONE
        weight, table = shape.weight[rows], np.where(near, len(capacity), shape.table[:, rows])
        kept = _kept(now, near, weight, table, capacity)
        rate = np.where(kept, rate, np.where(near, _UNBOUND, 0.0))
        bottleneck = np.where(kept, bottleneck, len(capacity))
        room = np.append(capacity, np.inf)
        if kept.any():
            room = np.maximum(room - _on_links(table[:, kept], rate[kept], len(room)), 0.0)
        _fill(weight, table, room, (~(kept | near)).nonzero()[0], rate, bottleneck)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            early, ends = (left - DONE) / rate, np.where(near, 0.0, left / rate)
        order = np.argsort(early, kind="stable")
        self.order, self.left, self.rate = rows[order], left[order], rate[order]
        self.early = early[order]
        self.ends = np.append(np.minimum.accumulate(ends[order][::-1])[::-1], np.inf)
        self._shape, self._bottleneck = shape, bottleneck[order]
        self.then: Phase | None = None
        self.number = 1

    @cached_property
    def unfair(self) -> np.ndarray:
        """bool[A + 1]: with that many done, one of them crossed the bottleneck of one that is not."""
        flows, links = len(self.order), len(self._shape.links)
        rank = np.arange(flows)
        table = np.where(self.left < DONE, links, self._shape.table[:, self.order])
        first, last = np.full(links + 1, flows), np.full(links + 1, -1)
        # Of several values for one link the last one stays, so the flows go backwards.
        first[table.T[::-1].ravel()] = np.repeat(rank[::-1], len(table))
        last[self._bottleneck] = rank
        first, last = first[:links], last[:links]
        split = first < last
        change = np.bincount(first[split] + 1, minlength=flows + 2)
        change -= np.bincount(last[split] + 1, minlength=flows + 2)
        return np.cumsum(change)[: flows + 1] > 0

    def rest(self, done: int, now: float) -> Rest:
        """The flows that are not done at that time."""
        rate, bottleneck, late = self.rate[done:], self._bottleneck[done:], self.late
        left = np.maximum(self.left[done:] - rate * now, 0.0)
        ended = self._shape.weight[self.order[:done]]
        floor = float((self.rate[:done] / ended).min(initial=np.inf))
        if not len(late.rows):
            return Rest(self.order[done:], left, np.zeros(len(left)), rate, bottleneck, floor)
        return Rest(
            np.concatenate([self.order[done:], late.rows]),
            np.concatenate([left, late.left]),
            np.concatenate([np.zeros(len(left)), late.wait - now]),
            np.concatenate([rate, late.rate]),
            np.concatenate([bottleneck, late.bottleneck]),
            floor,
        )


def _divided(rest: Rest, mask: np.ndarray) -> tuple[Rest, Rest]:
    """The flows of bool[R], and the others."""
    if mask.all():
        return rest, _NOBODY
    return _those(rest, mask), _those(rest, ~mask)


def _those(rest: Rest, mask: np.ndarray) -> Rest:
    rows, left, wait, rate, bottleneck, floor = rest
    return Rest(rows[mask], left[mask], wait[mask], rate[mask], bottleneck[mask], floor)


def _kept(
    rest: Rest, near: np.ndarray, weight: np.ndarray, table: np.ndarray, capacity: np.ndarray
) -> np.ndarray:
    """bool[R]: flows whose rates stay what they were.

    Raise all rates per weight together from zero, as progressive filling does: a link that an ended
    flow crossed fills no sooner than at that flow's level, a link that a fresh flow crosses no sooner
    than at its capacity by its load. Below the lowest of these levels nothing is different.
    """
    known = rest.rate >= 0
    if not rest.floor or not known.any():
        return np.zeros(len(known), dtype=bool)
    level = rest.rate / weight
    floor = min(rest.floor, float(level[near & known].min(initial=np.inf)))
    fresh = ~known & ~near
    if fresh.any():
        load = _on_links(table, weight, len(capacity) + 1)[:-1]
        crossed = np.zeros(len(capacity) + 1, dtype=bool)
        crossed[table[:, fresh]] = True
        crossed = crossed[:-1]
        floor = min(floor, float((capacity[crossed] / load[crossed]).min()))
    kept: np.ndarray = known & ~near & (level < floor * _BELOW)
    return kept
