"""How many bytes wait at a link over time, in bounded memory."""

from __future__ import annotations

import numpy as np

#: Intervals per link; when they are used up, each two become one.
_MOST = 256

#: Width of the first intervals, s; a power of two, so that dividing by it is exact.
_FINEST = 2.0**-20

#: What is less does not count as waiting, bytes: sums of parts of bytes need not come out at zero.
_NOTHING = 0.5


class Depth:
    """Bytes that wait at one link: mean and maximum of intervals that together cover the run from 0 s on.

    The intervals are equally long, at least 128 of them once the run is longer than 0.25 ms.
    """

    __slots__ = ("_area", "_bytes", "_peak", "_since", "_width")

    def __init__(self) -> None:
        self._bytes = 0.0
        self._since = 0.0
        self._width = _FINEST
        self._area = [0.0] * _MOST
        self._peak = [0.0] * _MOST

    def change(self, by: float, now: float) -> None:
        """That many bytes more wait from now on."""
        self._advance(now)
        self._bytes += by

    def intervals(self, end: float) -> np.ndarray:
        """What there was until a time that is no earlier than the last change.

        Returns  float64[N, 4] begin s, end s, mean bytes, most bytes; intervals in which nothing
                 waited are joined to one
        """
        self._advance(end)
        last = int(end / self._width) + 1
        edges = np.minimum(np.arange(last + 1) * self._width, end)
        peak = np.array(self._peak[:last])
        empty = peak < _NOTHING
        first = np.flatnonzero(~(empty & np.append(False, empty[:-1])) & (np.diff(edges) > 0))
        begin, until = edges[:-1][first], np.append(edges[first[1:]], end)[: len(first)]
        area, peak = (np.where(empty, 0.0, column)[first] for column in (self._area[:last], peak))
        return np.column_stack([begin, until, area / (until - begin), peak])

    def _advance(self, now: float) -> None:
        """Counts what waited until now; what came and went at one instant did not wait."""
        while now >= self._width * _MOST:
            self._fold()
        at, waits = int(self._since / self._width), self._bytes
        while self._since < now:
            edge = min((at + 1) * self._width, now)
            self._area[at] += waits * (edge - self._since)
            if waits > self._peak[at]:
                self._peak[at] = waits
            self._since = edge
            at += 1

    def _fold(self) -> None:
        none = [0.0] * (_MOST // 2)
        self._area = [a + b for a, b in zip(self._area[::2], self._area[1::2], strict=True)] + none
        self._peak = [max(pair) for pair in zip(self._peak[::2], self._peak[1::2], strict=True)] + none
        self._width *= 2
