"""How code of the fluid model becomes machine code, and the arrays it works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

try:
    import numba
except ImportError:  # no wheel for this machine
    numba = None  # type: ignore[assignment]

Function = TypeVar("Function", bound=Callable[..., Any])

#: Whether there is machine code at all; `physics/fluid.py` goes on without.
COMPILES = numba is not None


def compiled(function: Function) -> Function:
    """The function as machine code, kept on disk from run to run; as it stands without numba.

    Nothing is allocated here, so numba need not count who holds an array; left to itself it does so
    at every call, atomically, and that takes three quarters of the time. What is kept is made anew
    when the file of a function changes, but not when the file of one that it calls does.
    """
    if numba is None:
        return function
    compiling: Any = numba.njit
    for options in ({"cache": True, "_nrt": False}, {"cache": True}, {}):
        try:
            made: Function = compiling(error_model="numpy", **options)(function)
            return made
        except (KeyError, TypeError, RuntimeError):
            # A numba that does not know the option, or no folder that can be written to.
            continue
    return function


def _record(**fields: str) -> np.dtype[Any]:
    return np.dtype(list(fields.items()), align=True)


#: One link. -1 is nobody.
#:   level     bytes/s per weight that it grants; inf: not full
#:   capacity  bytes/s
#:   own       weight of the flows whose bottleneck it is, `owned` in number; list from slot `first`
#:   peak      the most that `own` has been since it was summed up
#:   held      bytes/s of its other flows that have been shared out
#:   top       none of those has more bytes/s per weight
#:   crossing  all its flows in number; list from place `head`
#:   fresh     those of them that have not been shared out yet
#:   stale     how often `own` and `held` were changed since they were summed up
LINK = _record(
    level="f8",
    capacity="f8",
    own="f8",
    peak="f8",
    held="f8",
    top="f8",
    owned="i4",
    first="i4",
    crossing="i4",
    head="i4",
    fresh="i4",
    stale="i4",
)

#: Two lists of links, and who stands in them: links whose first end has to be looked up anew, and
#: links whose flows changed with the level that was granted last.
NOTE = _record(ends="i8", moved="i8", in_ends="i8", in_moved="i8")

#: Two heaps of links, [2, K]: those in doubt by level, those with own flows by their first end.
#: `rank` and `place` are the link's, `entry` is the heap's.
HEAP = _record(rank="f8", entry="i8", place="i8")

#: One slot for a flow.
#:   left        bytes per weight at `stamp`, s; load: in all
#:   share       bytes/s per weight
#:   bottleneck  the link that says so; -1: not shared out yet; -2: on no link
#:   next, last  slots with the same bottleneck
#:   chain       the next slot that begins at the same time
FLOW = _record(
    left="f8",
    stamp="f8",
    share="f8",
    weight="f8",
    load="f8",
    bottleneck="i4",
    next="i4",
    last="i4",
    chain="i4",
)

#: slot * P + hop: where a flow stands in the list of a link. Kept small, as `path` is: what is read
#: from either is widened at once, lest numba compile everything twice.
PLACE = _record(after="i4", before="i4")

#: Flows whose latency is not over, as a heap; and lists of free slots and of flows that are done.
AGENDA = _record(time="f8", number="i8", slot="i8", free="i8", done="i8", done_at="f8")

#: Flows that wait for others (only where traffic is replayed): `missing` others, then `start`; they
#: are released at `release` and begin `latency` later. Those that wait for slot i are
#: following[first[i]] … following[first[i + 1] - 1].
GATE = _record(first="i8", missing="i8", start="f8", latency="f8", release="f8")

#: Counters, one record.
#:   now        s; due: until then ended flows keep their share; tolerance: see `moving.end_on`
#:   doubted, ending, coming, free, done, ends, moved   lengths of heaps and lists
#:   number     announcements so far; shared, judged, fitted: how much work it was
TOTAL = _record(
    now="f8",
    due="f8",
    tolerance="f8",
    doubted="i8",
    ending="i8",
    coming="i8",
    free="i8",
    done="i8",
    ends="i8",
    moved="i8",
    number="i8",
    shared="i8",
    judged="i8",
    fitted="i8",
)

#: Which of the two heaps.
DOUBT, ENDS = 0, 1


class State(NamedTuple):
    """Arrays over K links and N slots; `path` is int32[N, P], padded with -1.

    They are handed over one by one, never as one: taking an array out of a tuple costs numba more
    than all that is done with it.
    """

    links: np.ndarray
    notes: np.ndarray
    heaps: np.ndarray
    flows: np.ndarray
    path: np.ndarray
    places: np.ndarray
    work: np.ndarray
    agenda: np.ndarray
    gates: np.ndarray
    following: np.ndarray
    totals: np.ndarray


def new_state(capacity: np.ndarray, slots: int, hops: int, tolerance: float) -> State:
    """Links without flows.

    capacity   float64[K] bytes/s
    slots      room for flows in flight; hops: room for links of a path
    tolerance  see `moving.end_on`
    """
    links = np.zeros(len(capacity), LINK)
    links["capacity"], links["level"], links["head"], links["first"] = capacity, np.inf, -1, -1
    heaps = np.zeros((2, len(capacity)), HEAP)
    heaps["rank"], heaps["entry"], heaps["place"] = np.inf, -1, -1
    flows, agenda = np.zeros(slots, FLOW), np.zeros(slots, AGENDA)
    flows["bottleneck"] = -2
    agenda["free"] = np.arange(slots)[::-1]
    totals = np.zeros(1, TOTAL)
    totals["now"], totals["due"], totals["free"], totals["tolerance"] = -np.inf, np.inf, slots, tolerance
    return State(
        links=links,
        notes=np.zeros(len(capacity), NOTE),
        heaps=heaps,
        flows=flows,
        path=np.full((slots, hops), -1, dtype=np.int32),
        places=np.zeros(slots * hops, PLACE),
        work=np.zeros((slots, 2)),
        agenda=agenda,
        gates=np.zeros(0, GATE),
        following=np.zeros(0, dtype=np.int64),
        totals=totals,
    )


def grown(state: State, slots: int, hops: int) -> State:
    """The same flows, with room for more of them or for longer paths."""
    old, width = state.path.shape
    flows, agenda, places = np.zeros(slots, FLOW), np.zeros(slots, AGENDA), np.zeros(slots * hops, PLACE)
    path = np.full((slots, hops), -1, dtype=np.int32)
    flows[:old], agenda[:old], path[:old, :width] = state.flows, state.agenda, state.path
    flows["bottleneck"][old:] = -2
    # A place is slot * P + hop: with another P all of them have another number.
    for field in ("after", "before"):
        moved = places[field].reshape(slots, hops)
        moved[:old, :width] = _renumbered(state.places[field].reshape(old, width), width, hops)
    links = state.links.copy()
    links["head"] = _renumbered(links["head"], width, hops)
    totals = state.totals.copy()
    free, more = int(totals["free"][0]), slots - old
    agenda["free"][:more] = np.arange(slots - 1, old - 1, -1)
    agenda["free"][more : more + free] = state.agenda["free"][:free]
    totals["free"] = more + free
    return state._replace(
        links=links,
        flows=flows,
        path=path,
        places=places,
        work=np.zeros((slots, 2)),
        agenda=agenda,
        totals=totals,
    )


def _renumbered(places: np.ndarray, width: int, hops: int) -> np.ndarray:
    return np.where(places < 0, places, places // width * hops + places % width)
