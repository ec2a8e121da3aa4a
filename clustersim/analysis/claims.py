"""What a document claimed beside what was found, and what a claim would need if it is out of reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clustersim.analysis.latency import bounds, in_flight, numbers
from clustersim.trace.record import Trace
from clustersim.units import show

# Published numbers are rounded to two digits or so: nearer than this is no contradiction.
_ROUNDING = 1.1

_BOUND = {
    "compute": "computing alone takes",
    "memory": "reading HBM alone takes",
    "network": "carrying the bytes over the busiest link alone takes",
}

#: bound → column of the table `ranks` that sets it, and its dimension
_RATES = {"compute": ("flop_rate", "flop rate"), "memory": ("memory_bandwidth", "bandwidth")}


def claimed(trace: Trace, throughput: float | None, tpot: float | None) -> dict[str, Any] | None:
    """The claim beside the result, or None if the scenario carries no claim.

    throughput  found, tokens/s in total
    tpot        found, s
    Returns     source, against, and for each claimed number: claimed, found, ratio = found ÷ claimed;
                None for a number that was not claimed
    """
    claim = trace.facts.get("claimed")
    if not claim:
        return None
    return {
        "source": claim.get("source"),
        "against": claim.get("against"),
        "total_tokens_per_second": _beside(claim.get("total_tokens_per_second"), throughput),
        "tpot": _beside(claim.get("tpot"), tpot),
    }


def _beside(claim: float | None, found: float | None) -> dict[str, float | None] | None:
    if claim is None:
        return None
    ratio = found / claim if found is not None and claim > 0 else None
    return {"claimed": claim, "found": found, "ratio": ratio}


def claim_notes(trace: Trace) -> list[str]:
    """Sentences on claims that contradict each other, or that lie beyond a lower bound."""
    claim = trace.facts.get("claimed") or {}
    rate, tpot = claim.get("total_tokens_per_second"), claim.get("tpot")
    return [*_do_not_fit(trace, rate, tpot), *_tpot_beyond(trace, tpot), *_rate_beyond(trace, rate)]


def _do_not_fit(trace: Trace, rate: float | None, tpot: float | None) -> Iterator[str]:
    """tokens/s × s per token = sequences in flight; says so where the run had another number."""
    reads_prompts = numbers(trace.tables["requests"], "input_tokens").any()
    had = in_flight(trace)
    if not rate or not tpot or not had or reads_prompts:
        return
    needed = rate * tpot
    if not 1 / _ROUNDING <= needed / had <= _ROUNDING:
        yield (
            f"The claimed numbers do not fit this workload: {_said(rate)} tokens/s x {show(tpot, 'time')} "
            f"per token are {_said(needed)} sequences in flight; the run had {had:,}."
        )


def _tpot_beyond(trace: Trace, tpot: float | None) -> Iterator[str]:
    steps = trace.tables["steps"]
    found = bounds(trace, numbers(steps, "output_tokens") * (numbers(steps, "input_tokens") == 0) > 0)
    if not tpot or found is None:
        return
    floor = found[found["bound_by"]]
    if tpot < floor:
        yield (
            f"The claimed TPOT is out of reach: {_BOUND[found['bound_by']]} {show(floor, 'time')} "
            f"per decode step; {show(tpot, 'time')} is shorter by a factor {_said(floor / tpot)}. "
            f"{_needed(trace, found['bound_by'], floor / tpot)}"
        )


def _rate_beyond(trace: Trace, rate: float | None) -> Iterator[str]:
    requests, floor = trace.tables["requests"], _occupied(trace)
    tokens = float((numbers(requests, "input_tokens") + numbers(requests, "output_tokens")).sum())
    if rate and floor and rate > tokens / floor:
        yield (
            f"The claimed throughput is out of reach: {_said(tokens)} tokens occupy the busiest GPU or link "
            f"for at least {show(floor, 'time')}, which allows {_said(tokens / floor)} tokens/s at most; "
            f"{_said(rate)} tokens/s is more by a factor {_said(rate * floor / tokens)}."
        )


def _occupied(trace: Trace) -> float:
    """Seconds that the run's work occupies its busiest rank or link, however well all else overlaps."""
    ranks, links = trace.tables["ranks"], trace.tables["links"]
    return max(
        float((numbers(table, amount) / numbers(table, rate)).max(initial=0.0))
        for table, amount, rate in (
            (ranks, "flop", "flop_rate"),
            (ranks, "moved", "memory_bandwidth"),
            (links, "bytes", "bandwidth"),
        )
    )


def _needed(trace: Trace, bound_by: str, factor: float) -> str:
    """What a claim beyond a bound would take."""
    if bound_by == "network":
        return f"It would take links {_said(factor)} times as wide, or as many times fewer bytes."
    column, unit = _RATES[bound_by]
    rate = float(numbers(trace.tables["ranks"], column).max(initial=0.0))
    less = "less to read (weights, expert copies, KV cache)" if bound_by == "memory" else "less work"
    return (
        f"It would take {show(rate * factor, unit)} per GPU instead of {show(rate, unit)}, or {less}: "
        f"{_said(factor)} times less in all."
    )


def _said(value: float) -> str:
    """A number to three digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"
