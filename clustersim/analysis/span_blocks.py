"""Spans of a trace as blocks: what the ranks of one stage did with one token batch, ranks x operators.

The engine writes a token batch stage by stage and a stage rank by rank, so that a column of `spans` is
looked at as arrays over ranks and operators without copying it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clustersim.analysis.latency import numbers
from clustersim.errors import NotRecordedError, ResultError
from clustersim.trace.files import Stored
from clustersim.trace.record import Columns, Text, Trace

#: By which a rank may seem slower than priced because its sums are rounded.
_ROUNDOFF = 1e-6
#: By which what released a span may end later, s: sums that are rounded differently.
_LATER = 1e-9


@dataclass(frozen=True, slots=True)
class Block:
    """N ranks of a stage with one token batch.

    first      row of the first rank's first operator; rank n's p-th stands in row first + n * P + p
    ranks      N; operators: P, on the compute stream
    transfer   row of the first rank's hand-over to the next stage, -1 where there is none
    whole      whether all N x P spans were recorded
    """

    token_batch: int
    stage: int
    first: int
    ranks: int
    operators: int
    transfer: int
    whole: bool

    @property
    def end(self) -> int:
        """The row behind the last span of the compute stream."""
        return self.first + self.ranks * self.operators


@dataclass(frozen=True, eq=False)
class Spans:
    """The table `spans`, ready for questions about order.

    span, token_batch, rank, stage, layer, after, group   int[n] as in the table; group is -1 where unknown
    operator      int32[n] codes of `words`
    algorithm     int32[n] codes of `ways`
    is_exchange   bool[n]; on_compute bool[n] on the compute stream
    start, met, end  float64[n] s
    priced        float64[n] s, NaN for exchanges
    blocks        in the order of the table
    passes        token batches of which all spans were recorded
    """

    span: np.ndarray
    token_batch: np.ndarray
    rank: np.ndarray
    stage: np.ndarray
    layer: np.ndarray
    operator: np.ndarray
    words: tuple[str, ...]
    algorithm: np.ndarray
    ways: tuple[str, ...]
    is_exchange: np.ndarray
    on_compute: np.ndarray
    start: np.ndarray
    met: np.ndarray
    end: np.ndarray
    after: np.ndarray
    group: np.ndarray
    priced: np.ndarray
    blocks: tuple[Block, ...]
    passes: frozenset[int]

    def table(self, column: np.ndarray, block: Block) -> np.ndarray:
        """A column's part that belongs to a whole block, [N, P], not copied."""
        part: np.ndarray = column[block.first : block.end].reshape(block.ranks, block.operators)
        return part

    def rows_of(self, spans: np.ndarray) -> np.ndarray:
        """int64[...] the rows in which spans stand; -1 for those that were not recorded."""
        if not len(self.span):
            return np.full(np.shape(spans), -1)
        at = np.minimum(np.searchsorted(self.span, spans), len(self.span) - 1)
        found: np.ndarray = np.where(self.span[at] == spans, at, -1)
        return found

    @cached_property
    def _gapless(self) -> bool:
        return len(self.span) > 0 and int(self.span[-1]) - int(self.span[0]) + 1 == len(self.span)

    def row_of(self, span: int) -> int:
        """The row in which one span stands, -1 if it was not recorded."""
        if self._gapless:
            row = span - int(self.span[0])
            return row if 0 <= row < len(self.span) else -1
        return int(self.rows_of(np.array(span)))

    @cached_property
    def firsts(self) -> np.ndarray:
        """int64[B] the first rows of the blocks, ascending."""
        return np.array([block.first for block in self.blocks], dtype=np.int64)

    def block_of(self, row: int) -> Block:
        """The block in which a row stands, its stage's hand-overs counted to it."""
        return self.blocks[int(np.searchsorted(self.firsts, row, side="right")) - 1]

    def operator_of(self, row: int) -> str:
        """The operator's name."""
        return self.words[int(self.operator[row])]

    def algorithm_of(self, row: int) -> str:
        """How the exchange was done."""
        return self.ways[int(self.algorithm[row])]


def spans_of(trace: Trace) -> Spans:
    """The spans of a trace.

    Raises   ResultError where it has none, or where they do not hang together
    """
    table = trace.tables["spans"]
    if not len(numbers(table, "span")):
        raise NotRecordedError(
            "this result holds no spans, from which causes are read; run the scenario again with "
            '--set trace.level="spans"'
        )
    stream, kind = _text(table, "stream"), _text(table, "kind")
    operator, algorithm = _text(table, "operator"), _text(table, "algorithm")
    columns = {
        name: numbers(table, name)
        for name in ("span", "token_batch", "rank", "stage", "layer", "start", "met", "end", "after")
    }
    _check_after(trace, columns)
    on_compute = stream.codes == _code(stream, "compute")
    blocks = _blocks(columns, on_compute)
    rows, is_exchange = len(on_compute), kind.codes == _code(kind, "exchange")
    priced = _or(table, "priced", np.full(rows, np.nan))
    if np.isnan(priced).all():
        took = np.where(is_exchange, np.nan, columns["end"] - columns["met"])
        priced = took / _slowness(trace)[columns["rank"]]
    return Spans(
        **columns,
        operator=operator.codes,
        words=operator.words,
        algorithm=algorithm.codes,
        ways=algorithm.words,
        is_exchange=is_exchange,
        on_compute=on_compute,
        group=_or(table, "group", np.full(rows, -1)),
        priced=priced,
        blocks=blocks,
        passes=_whole_passes(trace, columns, blocks),
    )


def whole_steps(trace: Trace, passes: Set[int]) -> list[int]:
    """Rows of the steps of which all passes are among these, numbers of token batches."""
    steps, table = trace.tables["steps"], trace.tables["token_batches"]
    of, number = numbers(table, "step"), numbers(table, "token_batch")
    there = np.isin(number, np.fromiter(passes, dtype=np.int64, count=len(passes)))
    known = np.isin(numbers(steps, "step"), of[there]) & ~np.isin(numbers(steps, "step"), of[~there])
    rows: list[int] = np.flatnonzero(known).tolist()
    return rows


def _whole_passes(trace: Trace, columns: dict[str, np.ndarray], blocks: tuple[Block, ...]) -> frozenset[int]:
    """Token batches of which all spans were recorded.

    A time of the run is recorded without a gap. So a pass is there as a whole if its first span and its
    last are, and every rank of its stages has all its spans.
    """
    table = trace.tables["token_batches"]
    times = (numbers(table, name).tolist() for name in ("token_batch", "start", "end"))
    told = {batch: (start, end) for batch, start, end in zip(*times, strict=True)}
    stages = set(numbers(trace.tables["ranks"], "stage").tolist())
    found: dict[int, list[Block]] = {}
    for block in blocks:
        found.setdefault(block.token_batch, []).append(block)

    def is_whole(batch: int, of_batch: list[Block]) -> bool:
        if {block.stage for block in of_batch} != stages or not all(block.whole for block in of_batch):
            return False
        first, last = (key(of_batch, key=lambda one: one.stage) for key in (min, max))
        start = columns["start"][first.first : first.end].min()
        return (float(start), float(columns["end"][last.first : last.end].max())) == told.get(batch)

    return frozenset(batch for batch, of_batch in found.items() if is_whole(batch, of_batch))


def _check_after(trace: Trace, columns: dict[str, np.ndarray]) -> None:
    """Raises ResultError where a span says that something released it that is no span, or was later."""
    span, after, met, end = (columns[name] for name in ("span", "after", "met", "end"))
    if len(span) > 1 and (np.diff(span) <= 0).any():
        row = int(np.argmax(np.diff(span) <= 0)) + 1
        raise _damaged(trace, f"span {span[row]} stands behind span {span[row - 1]}")
    at = np.minimum(np.searchsorted(span, after), len(span) - 1)
    there = span[at] == after
    # What was not recorded is one of the spans that the run had, and not one between those that follow it.
    all_ = trace.facts.get("operators")
    most = int(all_) if isinstance(all_, int) else int(span[-1]) + 1
    whole = len(span) == most
    bad = (after < -1) | (after >= most) | (after == span) | (~there & (after >= 0) & whole)
    bad |= there & (end[at] > met + _LATER)
    if bad.any():
        row = int(np.argmax(bad))
        said = "which ended later than that began" if there[row] else "which is no span of this run"
        raise _damaged(trace, f"span {span[row]} was released by span {after[row]}, {said}")


def _damaged(trace: Trace, what: str) -> ResultError:
    table = trace.tables["spans"]
    where = f"{table.path}: " if isinstance(table, Stored) else "the table spans is "
    return ResultError(f"{where}damaged: {what}; run the scenario again")


def _text(table: Columns, name: str) -> Text:
    column = table[name]
    assert isinstance(column, Text), name
    return column


def _code(column: Text, word: str) -> int:
    return column.words.index(word) if word in column.words else -1


def _or(table: Columns, name: str, missing: np.ndarray) -> np.ndarray:
    """A column that results of version 3 do not have."""
    return numbers(table, name) if name in table else missing


def _slowness(trace: Trace) -> np.ndarray:
    """float64[highest rank + 1] how many times as long as priced a rank's operators took in the whole run.

    Results of version 3 do not say it of a span.
    """
    ranks, sums = trace.tables["ranks"], trace.tables["sums"]
    rank, size = numbers(ranks, "rank"), int(numbers(ranks, "rank").max(initial=-1)) + 1
    kind = _text(sums, "kind")
    computing = kind.codes == _code(kind, "compute")
    busy = np.bincount(
        numbers(sums, "rank")[computing], weights=numbers(sums, "busy")[computing], minlength=size
    )
    priced = np.bincount(rank, weights=numbers(ranks, "priced"), minlength=size)
    found: np.ndarray = np.divide(busy, priced, out=np.ones(size), where=priced > 0)
    # What is left by adding up is no slowness.
    found[np.abs(found - 1.0) < _ROUNDOFF] = 1.0
    return found


def _blocks(columns: dict[str, np.ndarray], on_compute: np.ndarray) -> tuple[Block, ...]:
    batch, stage, rank = (columns[name] for name in ("token_batch", "stage", "rank"))
    change = (np.diff(batch) != 0) | (np.diff(stage) != 0) | np.diff(on_compute)
    starts = np.concatenate([[0], np.flatnonzero(change) + 1])
    ends = np.append(starts[1:], len(batch))
    found: list[Block] = []
    for first, end in zip(starts.tolist(), ends.tolist(), strict=True):
        where = int(batch[first]), int(stage[first])
        if on_compute[first]:
            found.append(_block(where, first, rank[first:end], columns["span"][first:end]))
        elif found and (found[-1].token_batch, found[-1].stage) == where:
            last = found[-1]
            whole = last.whole and end - first == last.ranks
            found[-1] = Block(*where, last.first, last.ranks, last.operators, first, whole)
    return tuple(found)


def _block(where: tuple[int, int], first: int, rank: np.ndarray, span: np.ndarray) -> Block:
    turns = np.concatenate([[0], np.flatnonzero(np.diff(rank)) + 1])
    each = np.diff(np.append(turns, len(rank)))
    # Spans are numbered rank by rank: where some were left out, there are gaps.
    whole = bool((each == each[0]).all()) and int(span[-1]) - int(span[0]) + 1 == len(span)
    if whole:
        return Block(*where, first, len(each), int(each[0]), -1, True)
    # Only a window of the run was recorded: the block is a row of spans, of which nothing is compared.
    return Block(*where, first, 1, len(rank), -1, False)
