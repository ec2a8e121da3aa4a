"""Which part of a run is meant: a time, some GPUs, some steps, and no more than so many spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.analysis.latency import numbers
from clustersim.trace.record import Columns, Text, Trace
from clustersim.units import show


@dataclass(frozen=True, slots=True)
class Chosen:
    """A part of a run.

    window  s, from and to; None is the whole run
    ranks   None is all
    steps   None is all
    most    spans at most; of more, those that start first
    """

    window: tuple[float, float] | None = None
    ranks: Sequence[int] | None = None
    steps: Sequence[int] | None = None
    most: int = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What was chosen, found in a trace.

    rows     int64[n] rows of the table `spans`, by start and number
    window   s, from and to: all chosen spans that start in it are there
    batches  int64[n] token batches of the chosen steps; None is all
    notes    what was left out
    """

    rows: np.ndarray
    window: tuple[float, float]
    batches: np.ndarray | None
    notes: tuple[str, ...]


def part_of(trace: Trace, chosen: Chosen) -> Part:
    """The spans that touch the window, of the chosen ranks and steps."""
    spans = trace.tables["spans"]
    start, end, number = (numbers(spans, name) for name in ("start", "end", "span"))
    some = np.ones(len(start), dtype=bool)
    window = chosen.window or (0.0, float(trace.facts["simulated_seconds"]))
    if chosen.window is not None:
        some &= (start < window[1]) & (end > window[0])
    if chosen.ranks is not None:
        some &= np.isin(numbers(spans, "rank"), np.asarray(chosen.ranks))
    batches = None
    if chosen.steps is not None:
        batches = batches_of(trace, chosen.steps)
        some &= np.isin(numbers(spans, "token_batch"), batches)
        window = _around(trace, chosen.steps, window)
    rows = np.flatnonzero(some)
    rows = rows[np.lexsort((number[rows], start[rows]))]
    notes: tuple[str, ...] = ()
    if len(rows) > chosen.most:
        left, until = len(rows) - chosen.most, float(start[rows[chosen.most]])
        notes = (
            f"left out {left:,} of {len(rows):,} spans, all that start after {show(until, 'time', 6)}: "
            "--from and --to, --gpus or --steps choose others, --most allows more",
        )
        rows, window = rows[: chosen.most], (window[0], max(until, window[0]))
    return Part(rows, window, batches, notes)


def batches_of(trace: Trace, steps: Sequence[int]) -> np.ndarray:
    """int64[n] the token batches of some steps."""
    passes = trace.tables["token_batches"]
    some = np.isin(numbers(passes, "step"), np.asarray(steps))
    found: np.ndarray = numbers(passes, "token_batch")[some].astype(np.int64)
    return found


def _around(trace: Trace, steps: Sequence[int], window: tuple[float, float]) -> tuple[float, float]:
    """From the first start to the last end of some steps, s, within a window."""
    table = trace.tables["steps"]
    some = np.isin(numbers(table, "step"), np.asarray(steps))
    if not some.any():
        return window
    begin, end = float(numbers(table, "start")[some].min()), float(numbers(table, "end")[some].max())
    return max(begin, window[0]), min(end, window[1])


def tables_of(trace: Trace, chosen: Chosen, part: Part) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """All tables row by row, words spelled out: `spans`, `span_links`, `flows` and `experts` as chosen, the
    others whole.

    Returns   table → column → values, and what was left out
    """
    notes = list(part.notes)
    rows = {"spans": np.sort(part.rows)}
    links, flows, experts = (trace.tables[name] for name in ("span_links", "flows", "experts"))
    if len(numbers(links, "span")):
        mine = np.isin(numbers(links, "span"), numbers(trace.tables["spans"], "span")[part.rows])
        rows["span_links"] = np.flatnonzero(mine)
    some = _of_batches(flows, part)
    if chosen.ranks is not None:
        some &= np.isin(numbers(flows, "source"), chosen.ranks) | np.isin(
            numbers(flows, "target"), chosen.ranks
        )
    if chosen.window is not None or part.notes:
        some &= (numbers(flows, "start") < part.window[1]) & (numbers(flows, "end") > part.window[0])
    rows["flows"] = np.flatnonzero(some)
    if len(rows["flows"]) > chosen.most:
        left = len(rows["flows"]) - chosen.most
        notes.append(f"left out {left:,} of {len(rows['flows']):,} flows, the last in the table")
        rows["flows"] = rows["flows"][: chosen.most]
    some = _of_batches(experts, part)
    if chosen.ranks is not None:
        some &= np.isin(numbers(experts, "rank"), chosen.ranks)
    rows["experts"] = np.flatnonzero(some)
    found = {
        table: {name: _spelled(column, rows.get(table)) for name, column in columns.items()}
        for table, columns in trace.tables.items()
    }
    return found, notes


def _of_batches(columns: Columns, part: Part) -> np.ndarray:
    """bool[rows] those of the chosen token batches."""
    batch = numbers(columns, "token_batch")
    found: np.ndarray = (
        np.ones(len(batch), dtype=bool) if part.batches is None else np.isin(batch, part.batches)
    )
    return found


def _spelled(column: np.ndarray | Text, rows: np.ndarray | None) -> np.ndarray:
    values = column.codes if isinstance(column, Text) else column
    values = values if rows is None else values[rows]
    return Text(values, column.words).rows() if isinstance(column, Text) else values
