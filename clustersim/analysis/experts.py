"""How unevenly experts were loaded, and how long tokens stood in their queues."""

from __future__ import annotations

from typing import Any

import numpy as np

from clustersim.analysis.latency import distribution, numbers
from clustersim.trace.record import Columns, Trace


def experts(trace: Trace) -> dict[str, Any] | None:
    """Imbalance, queues and service of the expert copies; None if no expert was at work.

    imbalance     largest ÷ mean tokens over the EP ranks of one (token batch, layer): mean and
                  largest over those; ranks that share an expert (ETP) count as one, for they work on
                  the same tokens
    queue_wait    s a token stood in its queue before it was begun to be served
    queue_length  tokens in the queue when service began, over the queues that had any; over_time: tokens
                  that wait in all queues of a rank, mean over the run and the ranks with experts
    slowest       the copy of an expert whose tokens wait longest on average, over the run
    service       s from the beginning of the service to its end, over the queues that had tokens
    dropped       choices for experts that had no capacity left
    """
    table = trace.tables["experts"]
    some = numbers(table, "tokens") > 0
    if not some.any():
        return None
    tokens, length = numbers(table, "tokens")[some], numbers(table, "length")[some]
    every = trace.tables["token_waits"]
    waits = distribution(numbers(every, "wait"), numbers(every, "tokens"))
    service = distribution((numbers(table, "done") - numbers(table, "served"))[some])
    assert waits is not None and service is not None
    longest = float(numbers(table, "wait_max")[some].max())
    waited = float(numbers(table, "wait").sum())
    at_work = len(np.unique(numbers(table, "rank"))) * float(trace.facts["simulated_seconds"])
    return {
        "imbalance": _imbalance(table),
        "queue_wait": {**_pick(waits, "mean", "p50", "p99"), "max": longest},
        "queue_length": {
            "mean": float(length.mean()),
            "max": int(length.max()),
            "over_time": waited / at_work if at_work > 0 else 0.0,
        },
        "slowest": _slowest(table),
        "service": _pick(service, "mean", "p50", "p99", "max"),
        "tokens": int(tokens.sum()),
        "dropped": int(numbers(trace.tables["token_batches"], "dropped").sum()),
    }


def _slowest(table: Columns) -> dict[str, Any]:
    """rank, layer and expert of the copy whose tokens wait longest; its mean wait, and the longest p99 of
    its token batches, s."""
    # One number per copy: rows of three would take several times the memory where there are millions.
    size = [int(numbers(table, name).max()) + 1 for name in ("rank", "layer", "expert")]
    key = np.ravel_multi_index(tuple(numbers(table, name) for name in ("rank", "layer", "expert")), size)
    copies, which = np.unique(key, return_inverse=True)
    tokens = np.bincount(which, weights=numbers(table, "tokens"))
    waited = np.bincount(which, weights=numbers(table, "wait"))
    mean = np.divide(waited, tokens, out=np.full_like(waited, -1.0), where=tokens > 0)
    worst = int(mean.argmax())
    rank, layer, expert = (int(place) for place in np.unravel_index(copies[worst], size))
    p99 = np.nanmax(numbers(table, "wait_p99")[which == worst])
    return {"rank": rank, "layer": layer, "expert": expert, "mean": float(mean[worst]), "p99": float(p99)}


def _imbalance(table: Columns) -> dict[str, float]:
    layers = int(numbers(table, "layer").max()) + 1
    ranks = int(numbers(table, "ep_rank").max()) + 1
    place = numbers(table, "token_batch").astype("int64") * layers + numbers(table, "layer")
    pairs, member = np.unique(place * ranks + numbers(table, "ep_rank"), return_inverse=True)
    per_rank = np.bincount(member, weights=numbers(table, "tokens"))
    starts = np.flatnonzero(np.diff(pairs // ranks, prepend=-1))
    total = np.add.reduceat(per_rank, starts)
    members = np.diff(starts, append=len(pairs))
    largest = np.maximum.reduceat(per_rank, starts)
    ratio = (largest * members)[total > 0] / total[total > 0]
    return {"mean": float(ratio.mean()), "max": float(ratio.max())}


def _pick(found: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: found[key] for key in keys}
