"""What placing experts anew while a model runs brought, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from clustersim.analysis.latency import numbers, words
from clustersim.trace.record import Columns, Trace
from clustersim.units import show


def rebalancing(trace: Trace) -> dict[str, Any] | None:
    """The bill of a run; None where experts stay where they are.

    imbalance  largest ÷ mean tokens over the EP ranks of one layer of one token batch, mean over those:
               as it was, and by the same tokens at the places of the beginning
    gained     s, an estimate: tokens that the busiest ranks were spared times what a token more took a
               rank, by a line through the run's own service times. Only the service of experts counts,
               and what passes of several micro-batches would have hidden counts, too; None where all
               ranks served alike many
    """
    table = trace.tables["rebalances"]
    if not len(numbers(table, "rebalance")):
        return None
    outcome = words(table, "outcome")
    moved = outcome == "moved"
    gained = _gained(trace)
    stopped, window = float(numbers(table, "stopped").sum()), trace.facts.get("simulated_seconds")
    return {
        "planned": len(moved),
        "moved": int(moved.sum()),
        "finished": int((~np.isnan(numbers(table, "ended"))).sum()),
        "idle": {key: int((outcome == key).sum()) for key in IDLE},
        "offered": {key: _mean(numbers(table, key)[outcome == "nothing_better"]) for key in _OFFERED},
        "copies": int(numbers(table, "copies").sum()),
        "bytes": float(numbers(table, "bytes").sum()),
        "moving": _moving(trace),
        "stopped": stopped,
        "stopped_share": stopped / window if window else None,
        "imbalance": _imbalance(trace.tables["placements"]),
        "of_moves": {key: _mean(numbers(table, key)[moved]) for key in _OF_MOVES},
        "gained": gained,
        "net": None if gained is None else gained - stopped,
    }


#: Why a planning moves nothing.
IDLE = ("below_threshold", "nothing_better", "too_late")
_OFFERED = ("before", "wished")
_OF_MOVES = ("before", "foreseen", "after", "unmoved")


def _moving(trace: Trace) -> float:
    """Seconds in which weights of a plan were under way, s; what never ended was until the run did."""
    began, ended = (numbers(trace.tables["rebalances"], name) for name in ("began", "ended"))
    over = numbers(trace.tables["steps"], "end").max(initial=0.0)
    until = np.where(np.isnan(ended), np.maximum(over, began), ended)
    return float(np.nansum(until - began))


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _imbalance(table: Columns) -> dict[str, float | None]:
    some = numbers(table, "mean") > 0
    mean = numbers(table, "mean")[some]
    found: dict[str, float | None] = {"mean": None, "max": None, "first": None}
    if len(mean):
        ratio = numbers(table, "busiest")[some] / mean
        found = {
            "mean": float(ratio.mean()),
            "max": float(ratio.max()),
            "first": float((numbers(table, "first")[some] / mean).mean()),
        }
    return found


def _gained(trace: Trace) -> float | None:
    """Seconds; None where no line can be laid through the service times."""
    placed = trace.tables["placements"]
    slope = _seconds_per_token(trace.tables["experts"])
    if slope is None:
        return None
    return slope * float((numbers(placed, "first") - numbers(placed, "busiest")).sum())


def _seconds_per_token(table: Columns) -> float | None:
    """Least squares: s that a rank takes longer for its experts of a layer with every further token."""
    keys = [numbers(table, name).astype(np.int64) for name in ("token_batch", "layer", "rank")]
    if not len(keys[0]):
        return None
    order = np.lexsort(keys[::-1])
    fresh = np.zeros(len(order), dtype=bool)
    fresh[0] = True
    for key in keys:
        fresh[1:] |= np.diff(key[order]) != 0
    starts = np.flatnonzero(fresh)
    tokens = np.add.reduceat(numbers(table, "tokens")[order], starts).astype(float)
    served = np.minimum.reduceat(numbers(table, "served")[order], starts)
    seconds = np.maximum.reduceat(numbers(table, "done")[order], starts) - served
    off = tokens - tokens.mean()
    spread = float(off @ off)
    return float(off @ seconds) / spread if spread > 0 else None


def rebalancing_notes(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Sentences on the bill, for the summary's notes."""
    if found is None:
        return
    imbalance = found["imbalance"]
    if not found["moved"]:
        yield f"Experts were never placed anew: of {found['planned']:,} plans {said_idle(found)}."
        return
    moved, stopped = show(found["bytes"], "size"), show(found["stopped"], "time")
    yield (
        f"Experts were placed anew {_times(found['moved'])} ({found['planned']:,} planned): "
        f"{moved} of weights came over links, passes stopped for {stopped}; a layer's "
        f"busiest rank got {imbalance['mean']:.2f} x the mean tokens, at the first places it would "
        f"have been {imbalance['first']:.2f} x."
    )
    left = found["moved"] - found["finished"]
    if left:
        yield (
            f"{left:,} of these moves {'was' if left == 1 else 'were'} still under way when the run ended: "
            "layers whose weights had not all come stayed where they were, and their bytes are not counted."
        )
    if found["net"] is not None:
        verdict = "gained" if found["net"] > 0 else "cost"
        yield (
            f"By an estimate from the run's own service times this {verdict} "
            f"{show(abs(found['net']), 'time')} net of the stops; `clustersim rebalance` simulates both."
        )


def said_idle(found: Mapping[str, Any]) -> str:
    """Why plans moved nothing, in words; found has the keys `idle` and `offered`."""
    before, wished = (found["offered"][key] for key in _OFFERED)
    offer = "" if before is None else f" (asked for {wished:.2f} x where it was {before:.2f} x)"
    said = {
        "below_threshold": "found the imbalance below the threshold",
        "nothing_better": f"found no placement that lowers a layer's imbalance by least_gain{offer}",
        "too_late": "came when the run was over",
    }
    return ", ".join(f"{count:g} {said[key]}" for key, count in found["idle"].items() if count)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
