"""A timeline as Perfetto reads it: protocol buffers, names interned, whole nanoseconds.

Numbers of fields are those of perfetto/protos/perfetto/trace: trace_packet.proto, interned_data.proto,
track_event/track_event.proto, track_descriptor.proto, counter_descriptor.proto, debug_annotation.proto.

Servers are groups of tracks and not what Perfetto calls a process: those it puts in an order of its own, with
a number behind the name. Of tracks without a parent it keeps no order either, so there is one above all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.analysis.timeline_parts import Counters, Slices, Timeline, Track
from clustersim.report.protobuf import (
    Rows,
    bytes_field,
    double_column,
    fixed,
    interleaved,
    joined,
    message_column,
    number_column,
    number_field,
)
from clustersim.trace.record import Text

#: Slices and points that are encoded at a time: what is in the making then fits into a processor's cache.
_PIECE = 1 << 15

# Trace
_PACKET = 1
# TracePacket
_TIMESTAMP, _SEQUENCE, _EVENT, _INTERNED, _FLAGS, _TRACK = 8, 10, 11, 12, 13, 60
#: SequenceFlags: names begin anew; names of before are needed.
_CLEARED, _NEEDED = 1, 2
# TrackEvent
_CATEGORY, _ANNOTATION, _TYPE, _NAME, _TRACK_UUID = 3, 4, 9, 10, 11
_COUNTER_VALUE, _FLOW, _FLOW_END = 44, 47, 48
_BEGIN, _END, _COUNTER = 1, 2, 4
# TrackDescriptor
_UUID, _TRACK_NAME, _PARENT, _COUNTER_ABOUT, _ORDERING, _RANK, _DESCRIPTION = 1, 2, 5, 8, 11, 12, 14
_EXPLICIT = 3
# CounterDescriptor: number and name of the unit; bytes are known by number, what has none by name
_UNIT, _UNIT_NAME, _BYTES_UNIT = 3, 6, 3
# InternedData
_CATEGORIES, _NAMES, _ANNOTATION_NAMES, _ANNOTATION_WORDS = 1, 2, 3, 29
# DebugAnnotation
_ABOUT, _WHOLE, _DOUBLE, _WORD = 1, 4, 5, 17

#: All packets are of one sequence, so that they share names.
_OURS = number_field(_SEQUENCE, 1)
_USES_NAMES = _OURS + number_field(_FLAGS, _NEEDED)


def perfetto(timeline: Timeline) -> Iterator[bytes]:
    """The file, piece by piece."""
    names = _Names()
    blocks = (timeline.run, timeline.streams, timeline.links)
    known = [names.learn(block) for block in blocks]
    yield names.packet()
    yield _descriptors(timeline.tracks)
    for block, codes in zip(blocks, known, strict=True):
        sent, ended = _ends(timeline, block)
        for first in range(0, len(block), _PIECE):
            yield _slices(block, codes, slice(first, min(first + _PIECE, len(block))), sent, ended)
    for first in range(0, len(timeline.counters), _PIECE):
        yield _points(timeline.counters, slice(first, first + _PIECE))


# ---- names and tracks ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Codes:
    """Interned numbers of a block's words, by their codes.

    about   number of each annotation's name
    words   annotation → numbers of its words
    """

    name: np.ndarray
    category: np.ndarray
    about: dict[str, int]
    words: dict[str, np.ndarray]


class _Names:
    """Words and the numbers, from 1 on, that stand for them."""

    def __init__(self) -> None:
        self._known: dict[int, dict[str, int]] = {
            field: {} for field in (_CATEGORIES, _NAMES, _ANNOTATION_NAMES, _ANNOTATION_WORDS)
        }

    def learn(self, block: Slices) -> _Codes:
        """Numbers for what the block says; words that it does not use get none."""
        texts = {key: column for key, column in block.about.items() if isinstance(column, Text)}
        return _Codes(
            self._all(_NAMES, block.name),
            self._all(_CATEGORIES, block.category),
            {key: self._number(_ANNOTATION_NAMES, key) for key in block.about},
            {key: self._all(_ANNOTATION_WORDS, column) for key, column in texts.items()},
        )

    def _all(self, field: int, column: Text) -> np.ndarray:
        numbers = np.zeros(len(column.words) + 1, dtype=np.int64)
        for code in np.unique(column.codes).tolist():
            if code >= 0:
                numbers[code] = self._number(field, column.words[code])
        return numbers

    def _number(self, field: int, word: str) -> int:
        known = self._known[field]
        return known.setdefault(word, len(known) + 1)

    def packet(self) -> bytes:
        """The packet from which on the names are known."""
        interned = b"".join(
            bytes_field(field, number_field(1, number) + bytes_field(2, word))
            for field, known in self._known.items()
            for word, number in known.items()
        )
        return _packet(_OURS + number_field(_FLAGS, _CLEARED) + bytes_field(_INTERNED, interned))


def _packet(content: bytes) -> bytes:
    return bytes_field(_PACKET, content)


def _descriptors(tracks: Sequence[Track]) -> bytes:
    """A packet for each track; siblings stand in the order of their numbers."""
    return b"".join(
        _packet(_OURS + bytes_field(_TRACK, _descriptor(number, track)))
        for number, track in enumerate(tracks)
    )


def _descriptor(number: int, track: Track) -> bytes:
    # 0 is Perfetto's own.
    content = number_field(_UUID, number + 1)
    if track.parent >= 0:
        content += number_field(_PARENT, track.parent + 1)
    content += number_field(_RANK, number) + number_field(_ORDERING, _EXPLICIT)
    content += bytes_field(_TRACK_NAME, track.name)
    if track.about:
        content += bytes_field(_DESCRIPTION, track.about)
    if track.kind == "counter":
        unit = (
            number_field(_UNIT, _BYTES_UNIT) if track.unit == "bytes" else bytes_field(_UNIT_NAME, track.unit)
        )
        content += bytes_field(_COUNTER_ABOUT, unit)
    return content


# ---- slices -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Ends:
    """Ends of arrows at one side of slices: those of slice s are `ids[first[s]:first[s + 1]]`.

    field  int64[] field of each, by which it leaves or ends
    """

    first: np.ndarray
    ids: np.ndarray
    field: np.ndarray

    def of(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """uint8[bytes] the fields of some slices, and int64[n] bytes of each slice's."""
        begin, end = int(self.first[rows.start]), int(self.first[rows.stop])
        ids, field = self.ids[begin:end], self.field[begin:end]
        leaving, ending = double_column(_FLOW, ids), double_column(_FLOW_END, ids)
        cells = np.where((field == _FLOW)[:, None], leaving.cells, ending.cells)
        return cells.ravel(), np.diff(self.first[rows.start : rows.stop + 1]) * cells.shape[1]


def _ends(timeline: Timeline, block: Slices) -> tuple[_Ends, _Ends]:
    """Ends of arrows at the beginnings of slices and at their ends.

    An arrow leaves at the beginning of its first slice and ends at the beginning of its second, or, where
    the two begin together, at the second one's end: Perfetto pairs them in the order of time.
    """
    arrows, size = timeline.arrows, len(block)
    if block is not timeline.streams:
        none = np.empty(0, dtype=np.uint64)
        nothing = _Ends(np.zeros(size + 1, dtype=np.int64), none, none)
        return nothing, nothing
    ids = np.arange(1, len(arrows) + 1, dtype=np.uint64)
    late = block.start[arrows.source] >= block.start[arrows.target]
    at = np.concatenate([arrows.source, arrows.target[~late]])
    field = np.repeat([_FLOW, _FLOW_END], [len(ids), int((~late).sum())])
    return (
        _sorted_ends(at, np.concatenate([ids, ids[~late]]), field, size),
        _sorted_ends(arrows.target[late], ids[late], np.full(int(late.sum()), _FLOW_END), size),
    )


def _sorted_ends(at: np.ndarray, ids: np.ndarray, field: np.ndarray, size: int) -> _Ends:
    order = np.argsort(at, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(at, minlength=size))])
    return _Ends(first, ids[order], field[order])


def _slices(block: Slices, codes: _Codes, rows: slice, begins: _Ends, ends: _Ends) -> bytes:
    """Two packets for each slice: where it begins, with all that is known of it, and where it ends."""
    track = number_column(_TRACK_UUID, block.track[rows] + 1)
    count = len(track.cells)
    sent, sent_size = begins.of(rows)
    ended, ended_size = ends.of(rows)
    event = joined(
        [
            fixed(number_field(_TYPE, _BEGIN), count),
            track,
            number_column(_CATEGORY, codes.category[block.category.codes[rows]]),
            number_column(_NAME, codes.name[block.name.codes[rows]]),
            *(_annotation(block, codes, key, rows) for key in block.about),
        ]
    )
    begin = _event_packets(block.start[rows], event, sent_size)
    event = joined([fixed(number_field(_TYPE, _END), count), track])
    end = _event_packets(block.end[rows], event, ended_size)
    if not len(sent) and not len(ended):
        return joined([begin, end]).flat().tobytes()
    return interleaved(
        [begin.flat(), sent, end.flat(), ended], [begin.lengths(), sent_size, end.lengths(), ended_size]
    ).tobytes()


def _annotation(block: Slices, codes: _Codes, key: str, rows: slice) -> Rows:
    """One of the things known of slices, in those rows in which it is."""
    column = block.about[key]
    if isinstance(column, Text):
        code = column.codes[rows]
        known, value = code >= 0, number_column(_WORD, codes.words[key][code])
    elif column.dtype.kind == "f":
        values = column[rows]
        known, value = np.isfinite(values), double_column(_DOUBLE, values)
    else:
        values = column[rows]
        known, value = values >= 0, number_column(_WHOLE, np.maximum(values, 0))
    name = fixed(number_field(_ABOUT, codes.about[key]), len(known))
    return message_column(_ANNOTATION, joined([name, value])).where(known)


def _event_packets(time: np.ndarray, event: Rows, more: np.ndarray) -> Rows:
    """Packets with an event each. more: int64[N] bytes of the event that will stand behind its row"""
    packet = [
        number_column(_TIMESTAMP, time),
        fixed(_USES_NAMES, len(time)),
        message_column(_EVENT, event, more),
    ]
    return message_column(_PACKET, joined(packet), more)


def _points(counters: Counters, rows: slice) -> bytes:
    track = number_column(_TRACK_UUID, counters.track[rows] + 1)
    value = double_column(_COUNTER_VALUE, counters.value[rows])
    event = joined([fixed(number_field(_TYPE, _COUNTER), len(track.cells)), track, value])
    return (
        _event_packets(counters.time[rows], event, np.zeros(len(track.cells), dtype=np.int64))
        .flat()
        .tobytes()
    )
