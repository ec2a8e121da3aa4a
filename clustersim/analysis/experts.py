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
    queue_wait    s a token stood in its queue before it was begun to be served; on average, coming: for
                  tokens still to come that are served together with it, behind: behind other work
    queue_length  tokens in the queue when service began, over the queues that had any; over_time: tokens
                  that wait in all queues of a rank, mean over the run and the ranks with experts
    slowest       the rank and layer whose tokens take longest from when all are there, behind other work and
                  in service, and the expert of which most are held up there
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
    waited, behind = (float(numbers(table, name).sum()) for name in ("wait", "behind"))
    total = int(tokens.sum())
    at_work = len(np.unique(numbers(table, "rank"))) * float(trace.facts["simulated_seconds"])
    return {
        "imbalance": _imbalance(table),
        "queue_wait": {
            **_pick(waits, "mean", "p50", "p99"),
            "max": longest,
            "coming": (waited - behind) / total,
            "behind": behind / total,
        },
        "queue_length": {
            "mean": float(length.mean()),
            "max": int(length.max()),
            "over_time": waited / at_work if at_work > 0 else 0.0,
        },
        "slowest": _slowest(table),
        "service": _pick(service, "mean", "p50", "p99", "max"),
        "tokens": total,
        "dropped": int(numbers(trace.tables["token_batches"], "dropped").sum()),
    }


def dropped_share(found: dict[str, Any] | None) -> float | None:
    """The part of all choices of tokens that no expert had room for; None if no expert was at work.

    found  what `experts` says
    """
    return None if found is None else found["dropped"] / (found["dropped"] + found["tokens"])


def _slowest(table: Columns) -> dict[str, Any]:
    """rank, layer, expert; over: what a token takes there / the mean of all tokens; coming, behind, service:
    mean of a token for this expert there, s.

    Waiting for tokens still to come does not choose: it is longest where few come, and the senders' doing.
    """
    tokens = numbers(table, "tokens").astype(np.float64)
    service = tokens * (numbers(table, "done") - numbers(table, "served"))
    # Results of trace version 3 know no "behind".
    held = np.nan_to_num(numbers(table, "behind")) + service
    places, which = _distinct(table, "rank", "layer")
    came = np.bincount(which, weights=tokens)
    taken = np.bincount(which, weights=held)
    worst = int(np.divide(taken, came, out=np.full_like(came, -1.0), where=came > 0).argmax())
    rank, layer = places[:, worst].tolist()
    here = which == worst
    expert = int(np.bincount(numbers(table, "expert")[here], weights=held[here]).argmax())
    here &= numbers(table, "expert") == expert
    mean = {
        "coming": numbers(table, "wait") - numbers(table, "behind"),
        "behind": numbers(table, "behind"),
        "service": service,
    }
    count = float(tokens[here].sum())
    of_token = {key: float(seconds[here].sum()) / count for key, seconds in mean.items()}
    over = float(taken[worst] / came[worst] / (taken.sum() / came.sum())) if taken.sum() > 0 else 1.0
    return {"over": over, "rank": rank, "layer": layer, "expert": expert, **of_token}


def _distinct(table: Columns, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of some columns, int[names, n], and which of them each row is."""
    # One number per row: rows of several would take several times the memory where there are millions.
    size = [int(numbers(table, name).max()) + 1 for name in names]
    keys, which = np.unique(
        np.ravel_multi_index(tuple(numbers(table, name) for name in names), size), return_inverse=True
    )
    return np.stack(np.unravel_index(keys, size)), which


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
