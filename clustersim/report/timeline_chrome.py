"""A timeline in Chrome's JSON: what Perfetto's own form holds, but for what this one has no place for.

It knows processes and threads, so a server is a process, a stream or a link is a thread, and groups of
tracks are left out; units of counters stand in their names. Times are microseconds with three decimals,
which are whole nanoseconds. Source: "Trace Event Format", the Chromium project.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from clustersim.analysis.timeline_parts import Arrows, Counters, Slices, Timeline, Track
from clustersim.trace.record import Text

#: Events that are put into words at a time.
_PIECE = 1 << 15


def chrome(timeline: Timeline) -> Iterator[bytes]:
    """The file, piece by piece."""
    about = {"name": timeline.name, "notes": list(timeline.notes)}
    yield f'{{"displayTimeUnit":"ns","otherData":{json.dumps(about)},"traceEvents":[\n'.encode()
    before = ""
    for lines in _events(timeline):
        if lines:
            yield (before + ",\n".join(lines)).encode()
            before = ",\n"
    yield b"\n]}\n"


def _events(timeline: Timeline) -> Iterator[list[str]]:
    process = processes(timeline.tracks)
    yield _names(timeline.tracks, process)
    for block in (timeline.run, timeline.streams, timeline.links):
        for first in range(0, len(block), _PIECE):
            yield _slices(block, process, slice(first, first + _PIECE))
    for ends in (_leaving, _ending):
        for first in range(0, len(timeline.arrows), _PIECE):
            yield ends(timeline.streams, timeline.arrows, process, slice(first, first + _PIECE))
    for first in range(0, len(timeline.counters), _PIECE):
        yield _points(timeline, timeline.counters, process, slice(first, first + _PIECE))


def processes(tracks: Sequence[Track]) -> np.ndarray:
    """int64[tracks] the process that each track is in: its nearest ancestor, or itself, that is one."""
    found = np.zeros(len(tracks), dtype=np.int64)
    for number, track in enumerate(tracks):
        found[number] = number if track.kind == "process" else found[track.parent]
    return found


def _names(tracks: Sequence[Track], process: np.ndarray) -> list[str]:
    lines = []
    for number, track in enumerate(tracks):
        where = f'"ph":"M","pid":{process[number] + 1},"tid":{number + 1}'
        if track.kind == "process":
            lines.append(f'{{{where},"name":"process_name","args":{{"name":{json.dumps(track.name)}}}}}')
            lines.append(f'{{{where},"name":"process_sort_index","args":{{"sort_index":{number}}}}}')
        if track.kind in ("process", "slices"):
            name = json.dumps("run" if track.parent < 0 else track.name)
            if track.kind == "slices" or track.parent < 0:
                lines.append(f'{{{where},"name":"thread_name","args":{{"name":{name}}}}}')
                lines.append(f'{{{where},"name":"thread_sort_index","args":{{"sort_index":{number}}}}}')
    return lines


def _slices(block: Slices, process: np.ndarray, rows: slice) -> list[str]:
    known = np.full(len(block.track[rows]), "", dtype=object)
    for key, column in block.about.items():
        known = known + _told(key, column, rows)
    heads = _heads(block, rows)
    track, start, end = (column[rows] for column in (block.track, block.start, block.end))
    return [
        f'{{{head},"pid":{pid},"tid":{tid},"ts":{_micro(since)},"dur":{_micro(took)},"args":{{{about[:-1]}}}}}'
        for head, pid, tid, since, took, about in zip(
            heads,
            (process[track] + 1).tolist(),
            (track + 1).tolist(),
            start.tolist(),
            (end - start).tolist(),
            known.tolist(),
            strict=True,
        )
    ]


def _heads(block: Slices, rows: slice) -> list[str]:
    """`"name":"...","cat":"...","ph":"X"` of each row."""
    several = len(block.category.words)
    code = block.name.codes[rows].astype(np.int64) * several + block.category.codes[rows]
    distinct, where = np.unique(code, return_inverse=True)
    heads = [
        f'"name":{json.dumps(block.name.words[one // several])},'
        f'"cat":{json.dumps(block.category.words[one % several])},"ph":"X"'
        for one in distinct.tolist()
    ]
    found: list[str] = np.array(heads, dtype=object)[where.ravel()].tolist()
    return found


def _told(key: str, column: np.ndarray | Text, rows: slice) -> np.ndarray:
    """`"key":value,` of each row, object[n]; nothing where it is not known."""
    label = json.dumps(key)
    values = column.codes[rows] if isinstance(column, Text) else column[rows]
    distinct, where = np.unique(values, return_inverse=True)

    def said(value: float) -> str:
        if isinstance(column, Text):
            return json.dumps(column.words[int(value)])
        return repr(value)

    # What is not known is -1 or no number, neither of which is at least 0.
    words = [
        f"{label}:{said(value)}," if value >= 0 and value != np.inf else "" for value in distinct.tolist()
    ]
    found: np.ndarray = np.array(words, dtype=object)[where.ravel()]
    return found


def _leaving(block: Slices, arrows: Arrows, process: np.ndarray, rows: slice) -> list[str]:
    source = arrows.source[rows]
    return _ends('"ph":"s"', block, source, block.start[source], process, rows.start)


def _ending(block: Slices, arrows: Arrows, process: np.ndarray, rows: slice) -> list[str]:
    source, target = arrows.source[rows], arrows.target[rows]
    # Never before it left: slices that begin together are joined at the second one's end.
    late = block.start[source] >= block.start[target]
    time = np.where(late, block.end[target] - 1, block.start[target])
    return _ends('"ph":"f","bp":"e"', block, target, time, process, rows.start)


def _ends(
    kind: str, block: Slices, at: np.ndarray, time: np.ndarray, process: np.ndarray, first: int
) -> list[str]:
    track = block.track[at]
    rows = zip((process[track] + 1).tolist(), (track + 1).tolist(), time.tolist(), strict=True)
    return [
        f'{{{kind},"name":"sent","cat":"sent","id":{number},"pid":{pid},"tid":{tid},"ts":{_micro(when)}}}'
        for number, (pid, tid, when) in enumerate(rows, first + 1)
    ]


def _points(timeline: Timeline, counters: Counters, process: np.ndarray, rows: slice) -> list[str]:
    track = counters.track[rows]
    distinct, where = np.unique(track, return_inverse=True)
    heads = [
        f'"ph":"C","pid":{process[one] + 1},"name":'
        + json.dumps(f"{timeline.tracks[one].name}, {timeline.tracks[one].unit}")
        for one in distinct.tolist()
    ]
    values = zip(
        where.ravel().tolist(), counters.time[rows].tolist(), counters.value[rows].tolist(), strict=True
    )
    return [f'{{{heads[at]},"ts":{_micro(when)},"args":{{"value":{value!r}}}}}' for at, when, value in values]


def _micro(nanoseconds: int) -> str:
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"
