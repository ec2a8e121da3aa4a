"""summary.json: one run in a few pages. `schema.py` beside it says what every key means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clustersim.analysis.cause import cause, cause_notes
from clustersim.analysis.claims import claim_notes, claimed
from clustersim.analysis.exchanges import algorithms
from clustersim.analysis.experts import dropped_share, experts
from clustersim.analysis.latency import bounds, latencies, numbers, phases, throughput, words
from clustersim.analysis.prices import price_notes, prices
from clustersim.analysis.rebalancing import rebalancing, rebalancing_notes
from clustersim.analysis.schema import SCHEMA_VERSION
from clustersim.analysis.utilization import busiest, gpus, links, mfu, queues, spread, tiers
from clustersim.trace.plain import plain
from clustersim.trace.record import Trace
from clustersim.units import show

# From here on something is worth a sentence. They choose what is said, never what is found.
_WAIT_STANDS_OUT = 0.25
_IMBALANCE_STANDS_OUT = 1.25
_LINK_STANDS_OUT = 0.9
_MEMORY_STANDS_OUT = 0.95


def summarize(trace: Trace) -> dict[str, Any]:
    """The content of summary.json: JSON values in SI units, shares as fractions of one.

    Returns   the keys of `schema.SCHEMA`; what the run has no data for is None
    """
    facts, rates, times = trace.facts, throughput(trace), latencies(trace)
    tpot = times["tpot"]["mean"] if times["tpot"] else None
    per_gpu, per_link, at_work = gpus(trace), links(trace), experts(trace)
    summary = {
        "schema_version": SCHEMA_VERSION,
        **{key: facts.get(key) for key in ("name", "scenario_hash", "seed", "wall_seconds")},
        **{key: facts.get(key) for key in ("simulated_seconds", "events", "operators")},
        "throughput": {**rates, "dropped_share": dropped_share(at_work)},
        "latency": times,
        "phases": phases(trace),
        "bounds": bounds(trace),
        "mfu": mfu(trace),
        "cause": cause(trace),
        "experts": at_work,
        "rebalancing": rebalancing(trace),
        "algorithms": algorithms(trace),
        "memory": memory(trace),
        "tiers": tiers(per_link),
        "queues": queues(trace),
        "claimed": claimed(trace, rates["total_tokens_per_second"], tpot),
        "beside": None,
        "prices": prices(trace),
        "gpus": per_gpu,
        "links": per_link,
    }
    summary["notes"] = [*claim_notes(trace), *_notes(trace, summary)]
    content: dict[str, Any] = plain(summary)
    return content


def memory(trace: Trace) -> dict[str, Any] | None:
    """HBM of the fullest rank: rank, gpu, bytes by part, total and capacity; None if none was recorded."""
    table, ranks = trace.tables["memory"], trace.tables["ranks"]
    if not len(numbers(table, "rank")):
        return None
    rank, size, part = numbers(table, "rank"), numbers(table, "bytes"), words(table, "part")
    fullest = int(np.argmax(np.bincount(rank, weights=size)))
    parts: dict[str, float] = {}
    for row in np.flatnonzero(rank == fullest):
        parts[part[row]] = parts.get(part[row], 0.0) + float(size[row])
    place = np.flatnonzero(numbers(ranks, "rank") == fullest)
    return {
        "rank": fullest,
        "gpu": words(ranks, "gpu")[place[0]] if len(place) else None,
        "parts": parts,
        "total": sum(parts.values()),
        "capacity": float(numbers(ranks, "memory")[place[0]]) if len(place) else None,
    }


def _notes(trace: Trace, summary: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on what stands out in a run."""
    yield from cause_notes(summary["cause"])
    # Runs of before had the sentences on gating in one.
    yield from filter(None, [trace.facts.get("startup"), trace.facts.get("gating")])
    yield from trace.facts.get("idle") or ()
    yield from price_notes(trace, summary["prices"])
    yield from _fault_note(trace)
    yield from _wait_note(trace, summary)
    imbalance = summary["experts"] and summary["experts"]["imbalance"]["mean"]
    if imbalance and imbalance >= _IMBALANCE_STANDS_OUT:
        yield f"Experts are unevenly loaded: a layer's busiest rank gets {imbalance:.2f} x the mean tokens."
    dropped = summary["experts"]["dropped"] if summary["experts"] else 0
    if dropped:
        share = summary["throughput"]["dropped_share"]
        yield (
            f"Experts had no room for {dropped:,} choices of tokens, {share:.1%} of all; they were dropped, "
            "and tokens/s counts the tokens all the same."
        )
    yield from rebalancing_notes(summary["rebalancing"])
    full = [link for link in summary["links"] if link["utilization"] >= _LINK_STANDS_OUT]
    for link in busiest(full, 1):
        yield (
            f"Links with {_LINK_STANDS_OUT:.0%} or more of their capacity used: {len(full):,}, "
            f"most of all {link['link']} with {link['utilization']:.0%}."
        )
    held = summary["memory"]
    if held and held["capacity"] and held["total"] >= _MEMORY_STANDS_OUT * held["capacity"]:
        share = held["total"] / held["capacity"]
        yield f"Memory is nearly full: {share:.0%} of the HBM of rank {held['rank']} is taken."


def _fault_note(trace: Trace) -> Iterator[str]:
    faults, end = trace.tables["faults"], trace.facts.get("simulated_seconds") or 0.0
    named: dict[bool, list[str]] = {True: [], False: []}
    for kind, place, start in zip(
        words(faults, "kind"), words(faults, "place"), numbers(faults, "start"), strict=True
    ):
        came = bool(start < end)
        named[came].append(f"{kind} at {place}" + ("" if came else f" from {show(float(start), 'time')} on"))
    if named[True]:
        yield f"Faults were at work: {_few(named[True])}."
    if named[False]:
        yield (
            f"Faults that never came, for the run was over after {show(float(end), 'time')}: "
            f"{_few(named[False])}."
        )
    yield from _detour_notes(trace)


def _few(named: Sequence[str]) -> str:
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _detour_notes(trace: Trace) -> Iterator[str]:
    outages = trace.tables["outages"]
    moved, avoided, stranded = (int(numbers(outages, c).sum()) for c in ("moved", "avoided", "stranded"))
    if moved or avoided:
        left = show(float(numbers(outages, "moved_bytes").sum()), "size")
        yield (
            f"While links were down, {moved:,} flows under way took another path with {left} still to send, "
            f"and {avoided:,} flows began on another path."
        )
    if stranded:
        yield f"While links were down, {stranded:,} flows found no other path and waited."


def _wait_note(trace: Trace, summary: Mapping[str, Any]) -> Iterator[str]:
    sums, waits = trace.tables["sums"], spread(summary["gpus"], "wait")
    if waits is None or waits["mean"] < _WAIT_STANDS_OUT:
        return
    by_operator: dict[str, float] = {}
    on_compute = words(sums, "stream") == "compute"
    for operator, wait in zip(
        words(sums, "operator")[on_compute], numbers(sums, "wait")[on_compute], strict=True
    ):
        by_operator[operator] = by_operator.get(operator, 0.0) + float(wait)
    most = max(by_operator, key=lambda operator: by_operator[operator])
    yield f"GPUs wait for others {waits['mean']:.0%} of the time, most of all in {most}."
