"""What is drawn beside GPUs and links: steps, token batches, faults, and KV memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from clustersim.analysis.chosen import Part
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.timeline_parts import Counters, Slices, lanes, nanoseconds, spelled, steps_of
from clustersim.trace.record import Trace

#: Tracks of the run, in their order; all but the first may have several lanes.
RUN = ("run", "steps", "token batches", "faults")
#: (one of RUN, lane)
RunPlace = tuple[str, int]


def run_slices(trace: Trace, part: Part) -> tuple[Slices, list[RunPlace]]:
    """Slices, cut to the window, whose `track` is yet the place in the list returned."""
    steps, passes, faults = (trace.tables[name] for name in ("steps", "token_batches", "faults"))
    finish = float(trace.facts["simulated_seconds"])
    what = np.repeat(np.arange(len(RUN)), [1, *(len(numbers(t, "start")) for t in (steps, passes, faults))])
    begin = np.concatenate([[part.window[0]], *(numbers(t, "start") for t in (steps, passes, faults))])
    until = np.concatenate([[part.window[1]], *(numbers(t, "end") for t in (steps, passes, faults))])
    names = [
        str(trace.facts["name"]),
        *(f"{phase} {n}" for phase, n in zip(words(steps, "phase"), numbers(steps, "step"), strict=True)),
        *(f"token batch {n}" for n in numbers(passes, "token_batch").tolist()),
        *(f"{kind}: {at}" for kind, at in zip(words(faults, "kind"), words(faults, "place"), strict=True)),
    ]
    none = np.full(len(names), -1)
    read = numbers(steps, "input_tokens") + numbers(steps, "output_tokens")
    about = {
        "step": _of(none, what, {1: numbers(steps, "step"), 2: numbers(passes, "step")}),
        "micro-batch": _of(none, what, {2: numbers(passes, "microbatch")}),
        "tokens": _of(none, what, {1: read, 2: numbers(passes, "tokens")}),
        "slower by": _of(none * np.nan, what, {3: numbers(faults, "factor")}),
        "takes, s": until - begin,
    }
    seen = (begin < min(part.window[1], finish)) & (until > part.window[0])
    if part.batches is not None:
        meant = numbers(passes, "step")[np.isin(numbers(passes, "token_batch"), part.batches)]
        seen &= (about["step"] < 0) | np.isin(about["step"], meant)
    rows = np.flatnonzero(seen)
    # What reaches beyond the window is cut there, or a viewer would show mostly emptiness.
    what, start = what[rows], nanoseconds(np.maximum(begin[rows], part.window[0]))
    end = nanoseconds(np.minimum(until[rows], min(part.window[1], finish)))
    lane = lanes(what, start, end)
    most = int(lane.max(initial=0)) + 1
    distinct, where = np.unique(what * most + lane, return_inverse=True)
    where = where.ravel()
    order = np.lexsort((end, start, where))
    at = rows[order]
    slices = Slices(
        where[order],
        start[order],
        end[order],
        spelled([names[row] for row in at.tolist()]),
        spelled([RUN[one] for one in what[order].tolist()]),
        {name: column[at] for name, column in about.items()},
    )
    return slices, [(RUN[int(one) // most], int(one) % most) for one in distinct]


def _of(nothing: np.ndarray, what: np.ndarray, columns: Mapping[int, np.ndarray]) -> np.ndarray:
    """A column of all tables, one after the other; `nothing` where a table has none."""
    found = nothing.copy()
    for one, column in columns.items():
        found[what == one] = column
    return found


def shards_of(trace: Trace, ranks: Sequence[int] | None) -> list[int]:
    """Shards that held KV blocks, of chosen ranks."""
    held = np.unique(numbers(trace.tables["kv_use"], "shard"))
    if ranks is not None:
        table = trace.tables["ranks"]
        mine = numbers(table, "shard")[np.isin(numbers(table, "rank"), np.asarray(ranks))]
        held = held[np.isin(held, mine)]
    return [int(one) for one in held]


def kv_points(trace: Trace, part: Part, tracks: Mapping[int, int]) -> Counters:
    """Bytes of KV blocks given out, on each rank of the fullest stage. tracks: shard → track"""
    table = trace.tables["kv_use"]
    shard = numbers(table, "shard")
    number = np.full(int(shard.max(initial=-1)) + 1, -1)
    number[list(tracks)] = list(tracks.values())
    some = number[shard] >= 0
    return steps_of(
        number[shard][some], numbers(table, "time")[some], numbers(table, "bytes")[some], part.window
    )
