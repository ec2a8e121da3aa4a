"""What some GPUs did between two times, piece by piece: computing, exchanging, and waiting for whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clustersim.analysis.columns import is_word, text
from clustersim.analysis.latency import numbers
from clustersim.analysis.over_time import Window, spans_of
from clustersim.analysis.stragglers import awaited
from clustersim.trace.record import Trace


def slice_of(
    trace: Trace, ranks: Sequence[int], window: Window, operator: str | None = None
) -> list[dict[str, Any]]:
    """The pieces of the ranks' spans that lie in a window, in order of time.

    operator   only its pieces
    Returns    rank, stream, state (compute, exchange or wait), operator, layer, token_batch, span; start and
               end, s, as they were, also where that is outside the window; rank_awaited: whom a wait was
               for, None for other states or where it is not known. A span that waited gives two pieces,
               one that took no time a piece without length
    Raises     ResultError where no spans were recorded
    """
    spans = spans_of(trace)
    chosen = (numbers(spans, "start") < window[1]) & (numbers(spans, "end") > window[0])
    chosen &= np.isin(numbers(spans, "rank"), ranks)
    if operator is not None:
        chosen &= is_word(spans, "operator", operator)
    rows = np.flatnonzero(chosen)
    pieces = [
        piece for piece in _pieces(trace, rows) if piece["start"] < window[1] and piece["end"] > window[0]
    ]
    return sorted(pieces, key=lambda piece: (piece["start"], piece["end"], piece["rank"], piece["span"]))


def _pieces(trace: Trace, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    spans = spans_of(trace)
    labels = {name: text(spans, name) for name in ("stream", "operator", "kind")}
    columns = ("rank", "token_batch", "layer", "span", "start", "met", "end")
    values = [numbers(spans, name)[rows].tolist() for name in columns]
    spelled = [[label.words[code] for code in label.codes[rows].tolist()] for label in labels.values()]
    culprits = awaited(spans, rows).tolist() if len(rows) else []
    for rank, batch, layer, span, start, met, end, stream, operator, kind, culprit in zip(
        *values, *spelled, culprits, strict=True
    ):
        about = {"rank": rank, "stream": stream, "operator": operator, "layer": layer}
        about |= {"token_batch": batch, "span": span}
        if met > start:
            known = culprit if culprit not in (-1, rank) else None
            yield {**about, "state": "wait", "start": start, "end": met, "rank_awaited": known}
        yield {**about, "state": kind, "start": met, "end": end, "rank_awaited": None}
