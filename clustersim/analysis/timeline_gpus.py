"""What GPUs did as slices on their streams, and arrows between these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.analysis.chosen import Part
from clustersim.analysis.columns import text
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.stragglers import awaited
from clustersim.analysis.timeline_parts import Arrows, Counters, Slices, lanes, nanoseconds, steps_of
from clustersim.trace.record import Text, Trace

#: (rank, stream, lane) or (rank, "queue", 0) → number of its track
Place = tuple[int, str, int]

#: Categories of slices, by code.
_CATEGORIES = ("compute", "exchange", "wait")
_WAIT = _CATEGORIES.index("wait")


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """Chosen spans, each on its stream.

    part    what was chosen
    place   int64[n] which of `places` each is on
    places  (rank, stream, lane)
    """

    part: Part
    place: np.ndarray
    places: list[Place]


def laid(trace: Trace, part: Part) -> Laid:
    """Which streams are needed. A stream is in order, so that one lane is enough for any sound trace."""
    spans, rows = trace.tables["spans"], part.rows
    streams = text(spans, "stream")
    start, end = (nanoseconds(numbers(spans, name)[rows]) for name in ("start", "end"))
    several = max(len(streams.words), 1)
    place = numbers(spans, "rank")[rows].astype(np.int64) * several + streams.codes[rows]
    lane = lanes(place, start, end)
    most = int(lane.max(initial=0)) + 1
    distinct, where = np.unique(place * most + lane, return_inverse=True)
    places = [
        (int(one) // most // several, streams.words[int(one) // most % several], int(one) % most)
        for one in distinct
    ]
    return Laid(part, where.ravel(), places)


def stream_slices(trace: Trace, spans_: Laid, tracks: Mapping[Place, int]) -> tuple[Slices, np.ndarray]:
    """Slices of the chosen spans: the wait, if there was one, and what came after it.

    tracks   of every place
    Returns  slices, and int64[n] which of them is each chosen span's own (not its wait)
    """
    spans, rows = trace.tables["spans"], spans_.part.rows
    start, met, end = (nanoseconds(numbers(spans, name)[rows]) for name in ("start", "met", "end"))
    late = np.flatnonzero(met > start)
    of = np.concatenate([np.arange(len(rows)), late])
    waits = np.arange(len(of)) >= len(rows)
    begin = np.where(waits, start[of], met[of])
    finish = np.where(waits, met[of], end[of])
    number = np.array([tracks[place] for place in spans_.places], dtype=np.int64)
    track = number[spans_.place[of]]
    order = np.lexsort((finish, begin, track))
    own = np.empty(len(of), dtype=np.int64)
    own[order] = np.arange(len(of))
    of, waits = of[order], waits[order]
    operators = text(spans, "operator")
    names = Text(
        np.where(waits, len(operators.words), operators.codes[rows[of]]).astype(np.int32),
        (*operators.words, "wait"),
    )
    kinds = text(spans, "kind")
    codes = np.array([_CATEGORIES.index(word) for word in kinds.words] or [0], dtype=np.int32)
    category = np.where(waits, _WAIT, codes[kinds.codes[rows[of]]] if len(of) else 0).astype(np.int32)
    about = _about(trace, rows, of, waits)
    slices = Slices(track[order], begin[order], finish[order], names, Text(category, _CATEGORIES), about)
    return slices, own[: len(rows)]


def _about(trace: Trace, rows: np.ndarray, of: np.ndarray, waits: np.ndarray) -> dict[str, np.ndarray | Text]:
    """What is told of every slice. of: the chosen span of each; waits: whether it is a wait."""
    spans = trace.tables["spans"]
    batch, layer = (numbers(spans, name)[rows].astype(np.int64) for name in ("token_batch", "layer"))
    passes = trace.tables["token_batches"]
    step, tokens = (
        _looked_up(numbers(passes, "token_batch"), numbers(passes, n), batch) for n in ("step", "tokens")
    )
    link, own, every = _narrowest(trace, numbers(spans, "span")[rows])
    algorithm = text(spans, "algorithm")
    known = np.array([-1 if word == "" else code for code, word in enumerate(algorithm.words)] or [-1])
    way = np.where(waits, -1, known[algorithm.codes[rows[of]]] if len(of) else -1)
    link_names = tuple(link_labels(trace))
    return {
        "layer": layer[of],
        "token batch": batch[of],
        "step": step[of],
        "tokens in batch": tokens[of],
        "tokens for its experts": np.where(waits, -1, _expert_tokens(trace, rows)[of]),
        "algorithm": Text(way.astype(np.int32), algorithm.words),
        "narrowest link": Text(np.where(waits, -1, link[of]).astype(np.int32), link_names),
        "bytes of this GPU on it": np.where(waits, np.nan, own[of]),
        "bytes of all on it": np.where(waits, np.nan, every[of]),
        "before": Text(
            np.where(waits, text(spans, "operator").codes[rows[of]], -1).astype(np.int32),
            text(spans, "operator").words,
        ),
        "waited for": _waited_for(trace, rows, of, waits),
    }


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64[n] the value of each wanted key; -1 where there is none."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys, kind="stable")
    at = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    found: np.ndarray = np.where(keys[at] == wanted, values[at], -1).astype(np.int64)
    return found


def _narrowest(trace: Trace, span: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64[n] row of each span's narrowest link, -1 for none; float64[n] bytes of its rank and of all."""
    table = trace.tables["span_links"]
    row = _looked_up(numbers(table, "span"), np.arange(len(numbers(table, "span"))), span)
    if not len(numbers(table, "span")):
        return row, np.full(len(span), np.nan), np.full(len(span), np.nan)
    link, own, every = (np.where(row < 0, np.nan, numbers(table, n)[row]) for n in ("link", "own", "all"))
    links = numbers(trace.tables["links"], "link")
    wanted = np.where(row < 0, -1, np.nan_to_num(link)).astype(np.int64)
    return _looked_up(links, np.arange(len(links)), wanted), own, every


def _expert_tokens(trace: Trace, rows: np.ndarray) -> np.ndarray:
    """int64[n] tokens that came for the experts of the rank, where a span serves them; else -1."""
    table, spans = trace.tables["experts"], trace.tables["spans"]
    if not len(numbers(table, "rank")):
        return np.full(len(rows), -1)
    ranks = int(max(numbers(table, "rank").max(), numbers(spans, "rank").max(initial=0))) + 1
    layers = int(max(numbers(table, "layer").max(), numbers(spans, "layer").max(initial=0))) + 2

    def key(columns: Mapping[str, np.ndarray | Text], chosen: np.ndarray | slice) -> np.ndarray:
        batch, layer, rank = (
            numbers(columns, n)[chosen].astype(np.int64) for n in ("token_batch", "layer", "rank")
        )
        found: np.ndarray = (batch * layers + layer + 1) * ranks + rank
        return found

    queues, where = np.unique(key(table, slice(None)), return_inverse=True)
    where = where.ravel()
    tokens = np.bincount(where, weights=numbers(table, "tokens"))
    served, done = np.full(len(queues), np.inf), np.full(len(queues), -np.inf)
    np.minimum.at(served, where, numbers(table, "served"))
    np.maximum.at(done, where, numbers(table, "done"))
    at = _looked_up(queues, np.arange(len(queues)), key(spans, rows))
    serves = (
        (at >= 0) & (numbers(spans, "met")[rows] >= served[at]) & (numbers(spans, "end")[rows] <= done[at])
    )
    found: np.ndarray = np.where(serves, tokens[at], -1).astype(np.int64)
    return found


def _waited_for(trace: Trace, rows: np.ndarray, of: np.ndarray, waits: np.ndarray) -> Text:
    """The GPU that a wait was for."""
    ranks = trace.tables["ranks"]
    codes = np.full(len(of), -1, dtype=np.int32)
    if waits.any():
        culprit = awaited(trace.tables["spans"], rows[of[waits]])
        mine = numbers(trace.tables["spans"], "rank")[rows[of[waits]]]
        row = _looked_up(numbers(ranks, "rank"), np.arange(len(numbers(ranks, "rank"))), culprit)
        codes[waits] = np.where(culprit == mine, -1, row)
    return Text(codes, tuple(words(ranks, "gpu").tolist()))


def link_labels(trace: Trace) -> list[str]:
    """What each row of the table `links` is called: `gpu0 → server0/nic0`; equal ones are counted."""
    links = trace.tables["links"]
    seen: dict[str, int] = {}
    labels = []
    for source, target in zip(words(links, "source"), words(links, "target"), strict=True):
        label = f"{source} → {target}"
        seen[label] = seen.get(label, 0) + 1
        labels.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return labels


# ---- arrows -------------------------------------------------------------------------------------


def arrows_of(trace: Trace, rows: np.ndarray, slices: Slices, own: np.ndarray, most: int) -> Arrows:
    """Arrows between the slices of chosen spans.

    Where flows were recorded, one from the sender's to the receiver's slice for all that was sent in an
    exchange. Else, and for what is no exchange, one from the span that released another on another stream.

    own      int64[n] slice of each chosen span
    most     if there are more arrows by flows, each exchange has only that of the flow that came last
    """
    spans = trace.tables["spans"]
    position = _looked_up(numbers(spans, "span")[rows], np.arange(len(rows)), numbers(spans, "after")[rows])
    target = np.flatnonzero(position >= 0)
    source = position[target]
    sent, received, left = _sent(trace, rows, most)
    # What is known of the senders themselves says more than who was waited for.
    kept = ~np.isin(target, np.unique(received))
    source, target = (np.concatenate(pair) for pair in ((source[kept], sent), (target[kept], received)))
    source, target = own[source], own[target]
    pairs = np.unique(np.stack([source, target]), axis=1)
    source, target = pairs[0], pairs[1]
    # A slice that ends as it begins has no room for an arrow.
    drawn = (slices.track[source] != slices.track[target]) & (slices.start[source] < slices.end[target])
    return Arrows(source[drawn], target[drawn], left)


def _sent(trace: Trace, rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """int64[a] chosen spans that sent and those that received, pair by pair, and how many pairs are left out.

    There are none without flows.
    """
    flows, spans = trace.tables["flows"], trace.tables["spans"]
    if not len(numbers(flows, "source")) or not len(rows):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), 0
    batch = numbers(flows, "token_batch").astype(np.int64)
    names = {word: code for code, word in enumerate(text(spans, "operator").words)}
    operators = text(flows, "operator")
    codes = np.array([names.get(word, len(names)) for word in operators.words], dtype=np.int64)
    operator, layer = codes[operators.codes], numbers(flows, "layer").astype(np.int64)
    keys = _keys(trace, rows, len(names) + 1)
    first = np.unique(keys, return_index=True)
    exchanges = _key(trace, batch, layer, operator, len(names) + 1)
    ranks = len(numbers(trace.tables["ranks"], "rank"))
    source = _looked_up(first[0], first[1], exchanges * ranks + numbers(flows, "source"))
    target = _looked_up(first[0], first[1], exchanges * ranks + numbers(flows, "target"))
    handed = (source >= 0) & (target < 0)
    target[handed] = _first_of(trace, rows, batch[handed], numbers(flows, "target")[handed])
    some = (source >= 0) & (target >= 0)
    source, target, end = source[some], target[some], numbers(flows, "end")[some]
    pairs = np.unique(source * len(rows) + target)
    if len(pairs) > most:
        order = np.lexsort((source, end, target))
        last = order[np.append(target[order][1:] != target[order][:-1], True)]
        return source[last], target[last], len(pairs) - len(last)
    return pairs // len(rows), pairs % len(rows), 0


def _keys(trace: Trace, rows: np.ndarray, operators: int) -> np.ndarray:
    """int64[n] one number for token batch, layer, operator and rank of each chosen span."""
    spans = trace.tables["spans"]
    batch, layer, rank = (numbers(spans, n)[rows].astype(np.int64) for n in ("token_batch", "layer", "rank"))
    ranks = len(numbers(trace.tables["ranks"], "rank"))
    found: np.ndarray = (
        _key(trace, batch, layer, text(spans, "operator").codes[rows], operators) * ranks + rank
    )
    return found


def _key(
    trace: Trace, batch: np.ndarray, layer: np.ndarray, operator: np.ndarray, operators: int
) -> np.ndarray:
    layers = int(numbers(trace.tables["spans"], "layer").max(initial=0)) + 2
    found: np.ndarray = (batch * layers + layer + 1) * operators + operator
    return found


def _first_of(trace: Trace, rows: np.ndarray, batch: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """int64[a] a token batch's first span on a rank: what was handed over is received by no operator."""
    spans = trace.tables["spans"]
    ranks = len(numbers(trace.tables["ranks"], "rank"))
    key = numbers(spans, "token_batch")[rows].astype(np.int64) * ranks + numbers(spans, "rank")[rows]
    distinct, first = np.unique(key, return_index=True)
    return _looked_up(distinct, first, batch * ranks + rank)


# ---- queues -------------------------------------------------------------------------------------


def queueing(trace: Trace, part: Part, ranks: Sequence[int] | None) -> list[int]:
    """Chosen ranks in whose expert queues tokens stood during the window."""
    table = trace.tables["experts"]
    some = (numbers(table, "wait") > 0) & (numbers(table, "first_arrival") < part.window[1])
    some &= numbers(table, "done") > part.window[0]
    found = np.unique(numbers(table, "rank")[some])
    return [int(rank) for rank in found if ranks is None or rank in ranks]


def queue_points(trace: Trace, part: Part, tracks: Mapping[Place, int]) -> Counters:
    """Tokens in the expert queues of each rank that has a track.

    As in `over_time.queue_lengths`, the token-seconds of a queue count as spread evenly from the first
    arrival until it was served: the area under the line is exact, its course within a pass is not.
    """
    table = trace.tables["experts"]
    rank, wait, first, last, served, done = (
        numbers(table, name) for name in ("rank", "wait", "first_arrival", "last_arrival", "served", "done")
    )
    track_of = {rank: number for (rank, what, _), number in tracks.items() if what == "queue"}
    some = np.flatnonzero((wait > 0) & np.isin(rank, list(track_of)))
    first, until = first[some], np.where((served >= last) & (served > first), served, done)[some]
    lasts = until > first
    some, first, until = some[lasts], first[lasts], until[lasts]
    length = wait[some] / (until - first)
    track = np.array([track_of[int(one)] for one in rank[some]], dtype=np.int64)
    track, time = np.concatenate([track, track]), np.concatenate([first, until])
    change = np.concatenate([length, -length])
    more = np.concatenate([np.ones(len(some)), -np.ones(len(some))])
    order = np.lexsort((time, track))
    track, time = track[order], time[order]
    value, waiting = _running(track, change[order]), np.rint(_running(track, more[order]))
    # What is left of sums and differences of floats where nothing waits is not a length.
    value = np.where(waiting > 0, np.maximum(value, 0.0), 0.0)
    return steps_of(track, time, value, part.window)


def _running(track: np.ndarray, change: np.ndarray) -> np.ndarray:
    """float64[n] sums so far, track by track. track: sorted"""
    total = np.cumsum(change)
    begins = np.searchsorted(track, track)
    before = np.where(begins > 0, total[begins - 1], 0.0)
    found: np.ndarray = total - before
    return found
