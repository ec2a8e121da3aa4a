"""How long steps, token batches and requests took, and how many tokens came out."""

from __future__ import annotations

from typing import Any

import numpy as np

from clustersim.analysis.statistics import steady
from clustersim.trace.record import Columns, Text, Trace

Distribution = dict[str, Any]

QUANTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


def distribution(values: Any, weights: Any = None) -> Distribution | None:
    """Mean, quantiles and extremes of some values.

    values   float[n], none of them NaN
    weights  float[n] not negative, or None for all alike; a value without weight does not count
    Returns  mean, p50, p90, p95, p99, max, min, count; None if there are no values.
             Quantiles are interpolated linearly; with weights they are the smallest value whose
             cumulative weight reaches the quantile
    """
    values = np.asarray(values, dtype="float64")
    if weights is not None:
        weights = np.asarray(weights, dtype="float64")
        values, weights = values[weights > 0], weights[weights > 0]
    if not len(values):
        return None
    levels = np.array(list(QUANTILES.values()))
    at = np.quantile(values, levels) if weights is None else _weighted_quantiles(values, weights, levels)
    return {
        "mean": float(np.average(values, weights=weights)),
        **dict(zip(QUANTILES, at.tolist(), strict=True)),
        "max": float(values.max()),
        "min": float(values.min()),
        "count": len(values),
    }


def _weighted_quantiles(values: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> np.ndarray:
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    index = np.searchsorted(cumulative, levels * cumulative[-1], side="left")
    found: np.ndarray = values[order][index]
    return found


def latencies(trace: Trace) -> dict[str, Distribution | None]:
    """Distributions, in seconds, of step, token_batch, tpot, ttft and request (arrival to finish)."""
    steps, passes, requests = (trace.tables[name] for name in ("steps", "token_batches", "requests"))
    return {
        "step": distribution(numbers(steps, "end") - numbers(steps, "start")),
        "token_batch": distribution(numbers(passes, "end") - numbers(passes, "start")),
        "tpot": distribution(tpot(requests)),
        "ttft": distribution(ttft(requests)),
        "request": distribution(numbers(requests, "finish") - numbers(requests, "arrival")),
    }


def tpot(requests: Columns) -> np.ndarray:
    """Mean seconds per further output token, for each request that has one.

    A request that read its prompt in this run has its first token from prefill, so the gaps are one
    fewer than the tokens. One whose prompt was in the KV cache already pays for every token.
    """
    made, prefilled = numbers(requests, "output_tokens"), numbers(requests, "input_tokens") > 0
    since = np.where(prefilled, numbers(requests, "first_token"), numbers(requests, "started"))
    gaps = made - prefilled
    some = (gaps > 0) & ~np.isnan(since)
    found: np.ndarray = (numbers(requests, "finish")[some] - since[some]) / gaps[some]
    return found


def token_gaps(trace: Trace) -> Distribution | None:
    """Seconds from an output token to the next of its sequence, over all tokens of decode steps.

    Counted from when the pass could begin, so that what keeps it waiting is in it: other micro-batches,
    and weights for which passes stop. The first pass of a batch has no token before it in this run and
    counts from its own start, as in `tpot`.
    """
    steps, passes = trace.tables["steps"], trace.tables["token_batches"]
    order = np.argsort(numbers(steps, "step"))
    at = order[np.searchsorted(numbers(steps, "step")[order], numbers(passes, "step"))]
    made = words(steps, "phase")[at] == "decode"
    first = numbers(steps, "index")[at] == 0
    since = np.where(first, numbers(passes, "start"), numbers(passes, "ready"))
    return distribution((numbers(passes, "end") - since)[made], numbers(passes, "tokens")[made])


def ttft(requests: Columns) -> np.ndarray:
    """Seconds from arrival to the first output token, for each request that read its prompt in this run."""
    waited = numbers(requests, "first_token") - numbers(requests, "arrival")
    found: np.ndarray = waited[(numbers(requests, "input_tokens") > 0) & ~np.isnan(waited)]
    return found


def throughput(trace: Trace) -> dict[str, float | None]:
    """Tokens per second from the first arrival to the last finish: total, output and input."""
    requests = trace.tables["requests"]
    tokens = {side: float(numbers(requests, f"{side}_tokens").sum()) for side in ("output", "input")}
    window = _span_of(numbers(requests, "arrival"), numbers(requests, "finish"))
    return {
        "total_tokens_per_second": _per(tokens["output"] + tokens["input"], window),
        "output_tokens_per_second": _per(tokens["output"], window),
        "input_tokens_per_second": _per(tokens["input"], window),
    }


def in_flight(trace: Trace) -> int:
    """The most requests that were between the start of their first step and their finish at once."""
    requests = trace.tables["requests"]
    started, finished = np.sort(numbers(requests, "started")), np.sort(numbers(requests, "finish"))
    ever = np.searchsorted(started, started, side="right")
    gone = np.searchsorted(finished, started, side="right")
    return int((ever - gone).max(initial=0))


def phases(trace: Trace) -> dict[str, dict[str, Any]]:
    """What each phase that ran cost: prefill before decode.

    Prefill counts the prompt tokens it read, decode the tokens it made; the time is from the start
    of the phase's first step to the end of its last.
    """
    steps = trace.tables["steps"]
    ran = words(steps, "phase")
    return {
        phase: _phase(trace, phase, np.flatnonzero(ran == phase))
        for phase in ("prefill", "decode")
        if (ran == phase).any()
    }


def _phase(trace: Trace, phase: str, rows: np.ndarray) -> dict[str, Any]:
    steps = trace.tables["steps"]
    start, end = numbers(steps, "start")[rows], numbers(steps, "end")[rows]
    side = "input_tokens" if phase == "prefill" else "output_tokens"
    tokens = int(numbers(steps, side)[rows].sum())
    return {
        "steps": len(rows),
        "tokens": tokens,
        "tokens_per_second": _per(tokens, _span_of(start, end)),
        "period": _span_of(start, end) / len(rows) if len(rows) else None,
        "step": distribution(end - start),
        "steady": steady((end - start)[np.argsort(start, kind="stable")]),
        "bounds": bounds(trace, rows),
        "parts": parts(trace, phase, len(rows)),
    }


def bounds(trace: Trace, rows: np.ndarray | slice = slice(None)) -> dict[str, Any] | None:
    """Seconds below which no step can be, mean over steps, and the name of the largest.

    rows     which steps
    Returns  compute, memory, network, bound_by; None without steps
    """
    steps = trace.tables["steps"]
    found = {kind: numbers(steps, f"bound_{kind}")[rows] for kind in ("compute", "memory", "network")}
    if not len(found["compute"]):
        return None
    means = {kind: float(values.mean()) for kind, values in found.items()}
    return {**means, "bound_by": max(means, key=lambda kind: means[kind])}


def parts(trace: Trace, phase: str, steps: int) -> list[dict[str, Any]]:
    """Where a GPU's time goes in one step of a phase, the longest first.

    steps    how many steps of the phase there were
    Returns  operator, kind, stream, busy and wait: the seconds all GPUs spent in it, divided by the
             number of steps and by the number of all GPUs, also of those that never run it. So the
             parts of the compute stream add up to the mean time per GPU and step that is accounted
             for; those of other streams run beside them
    """
    sums, gpus = trace.tables["sums"], len(trace.tables["ranks"]["rank"])
    labels = [words(sums, column) for column in ("operator", "kind", "stream")]
    here = np.flatnonzero(words(sums, "phase") == phase)
    found: dict[tuple[str, ...], list[float]] = {}
    for row in here:
        time = found.setdefault(tuple(label[row] for label in labels), [0.0, 0.0])
        time[0] += float(numbers(sums, "busy")[row])
        time[1] += float(numbers(sums, "wait")[row])
    share = 1.0 / max(steps * gpus, 1)
    rows = [
        {"operator": operator, "kind": kind, "stream": stream, "busy": busy * share, "wait": wait * share}
        for (operator, kind, stream), (busy, wait) in found.items()
    ]
    return sorted(rows, key=lambda part: (-(part["busy"] + part["wait"]), part["operator"]))


def numbers(columns: Columns, name: str) -> np.ndarray:
    """A column of numbers."""
    column = columns[name]
    assert not isinstance(column, Text), name
    return column


def words(columns: Columns, name: str) -> np.ndarray:
    """A text column, word by word, object[rows]."""
    column = columns[name]
    assert isinstance(column, Text), name
    return column.rows()


def _span_of(start: np.ndarray, end: np.ndarray) -> float:
    return float(end.max() - start.min()) if len(start) else 0.0


def _per(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None
