"""How busy GPUs and links were, and what GPUs waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clustersim.analysis.columns import ratio
from clustersim.analysis.latency import numbers, words
from clustersim.trace.record import Trace

#: What a GPU can be doing; the fractions add up to one.
STATES = ("compute", "exchange", "wait", "idle")


def gpus(trace: Trace) -> list[dict[str, Any]]:
    """What every GPU did in the run, one entry per rank, in the order of the table `ranks`.

    compute, exchange, wait and idle are shares of [0, simulated_seconds], reckoned from the sums of
    the compute stream: busy in compute, busy in exchanges, waiting for peers, and the rest.
    mfu is useful FLOP ÷ (peak FLOP/s × the window).
    waited_for is the operator of the rank that waited most, and the peer it waited for most.
    """
    ranks, window = trace.tables["ranks"], float(trace.facts["simulated_seconds"])
    shares = _shares(trace, window)
    mfu = ratio(numbers(ranks, "flop"), numbers(ranks, "flop_rate") * window)
    waits = _most_waited(trace)
    return [
        {
            "gpu": gpu,
            "rank": int(rank),
            "server": int(server),
            "stage": int(stage),
            **{state: float(shares[state][rank]) for state in STATES},
            "mfu": float(used),
            "waited_for": waits.get(int(rank)),
        }
        for gpu, rank, server, stage, used in zip(
            words(ranks, "gpu"), *(numbers(ranks, c) for c in ("rank", "server", "stage")), mfu, strict=True
        )
    ]


def _shares(trace: Trace, window: float) -> dict[str, np.ndarray]:
    """Share of the window per state, float64[highest rank + 1]."""
    sums = trace.tables["sums"]
    size = int(numbers(trace.tables["ranks"], "rank").max(initial=-1)) + 1
    rank, busy = numbers(sums, "rank"), numbers(sums, "busy")
    on_compute, kind = words(sums, "stream") == "compute", words(sums, "kind")
    seconds = {
        "compute": np.where(on_compute & (kind == "compute"), busy, 0.0),
        "exchange": np.where(on_compute & (kind == "exchange"), busy, 0.0),
        "wait": np.where(on_compute, numbers(sums, "wait"), 0.0),
    }
    shares = {
        state: ratio(np.bincount(rank, weights=time, minlength=size), window)
        for state, time in seconds.items()
    }
    # A stream that is never idle may add up to a hair more than the window.
    shares["idle"] = np.maximum(1.0 - sum(shares.values()), 0.0)
    return shares


def _most_waited(trace: Trace) -> dict[int, dict[str, Any]]:
    """Rank → the operator of the compute stream with the longest wait, and the peer waited for."""
    sums = trace.tables["sums"]
    wait = np.where(words(sums, "stream") == "compute", numbers(sums, "wait"), 0.0)
    operators, peers, ranks = words(sums, "operator"), numbers(sums, "waited_for"), numbers(sums, "rank")
    order = np.argsort(wait, kind="stable")
    return {
        int(ranks[row]): {"operator": operators[row], "rank": int(peers[row]) if peers[row] >= 0 else None}
        for row in order
        if wait[row] > 0
    }


def mfu(trace: Trace) -> float | None:
    """Useful FLOP of all GPUs ÷ what they could have done in the window; None without GPUs."""
    ranks, window = trace.tables["ranks"], float(trace.facts["simulated_seconds"])
    able = float(numbers(ranks, "flop_rate").sum()) * window
    return float(numbers(ranks, "flop").sum()) / able if able > 0 else None


def worst(found: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The GPUs that were longest neither computing nor exchanging, from the entries of `gpus`."""
    return sorted(found, key=lambda gpu: (-(gpu["wait"] + gpu["idle"]), -gpu["wait"], gpu["rank"]))[:count]


def spread(found: Sequence[dict[str, Any]], key: str) -> dict[str, float] | None:
    """Smallest, mean and largest of one share over the entries of `gpus`; None without entries."""
    values = [float(entry[key]) for entry in found if entry[key] is not None]
    if not values:
        return None
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def links(trace: Trace) -> list[dict[str, Any]]:
    """Every link: bytes carried, and bytes ÷ what its capacity allowed over the run, faults counted."""
    table = trace.tables["links"]
    used = ratio(numbers(table, "bytes"), numbers(table, "offered"))
    columns = [words(table, "source"), words(table, "target"), words(table, "tier")]
    amounts = [numbers(table, "bandwidth"), numbers(table, "bytes"), used]
    return [
        {
            "link": f"{source}->{target}",
            "tier": tier,
            "bandwidth": float(bandwidth),
            "bytes": float(size),
            "utilization": float(share),
        }
        for source, target, tier, bandwidth, size, share in zip(*columns, *amounts, strict=True)
    ]


def busiest(found: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The links with the highest utilization, from the entries of `links`; unused ones left out."""
    used = [link for link in found if link["bytes"] > 0]
    return sorted(used, key=lambda link: (-link["utilization"], -link["bytes"], link["link"]))[:count]


def tiers(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries of `links` by tier: how many links, their bytes, mean and largest utilization."""
    names = dict.fromkeys(link["tier"] for link in found)
    return {name: _tier([link for link in found if link["tier"] == name]) for name in names}


def _tier(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    used = [link["utilization"] for link in members]
    return {
        "links": len(members),
        "bytes": sum(link["bytes"] for link in members),
        "mean": sum(used) / len(used),
        "max": max(used),
    }


def queues(trace: Trace) -> dict[str, dict[str, float]] | None:
    """Mean and largest bytes that waited for a link, by tier; None where links have no queues.

    The mean is that over all links of the tier and over [0, simulated_seconds].
    """
    table, known = trace.tables["queues"], trace.tables["links"]
    link, most = numbers(table, "link"), numbers(table, "max")
    if not len(link):
        return None
    tier = words(known, "tier")[np.argsort(numbers(known, "link"))]
    area = numbers(table, "mean") * (numbers(table, "end") - numbers(table, "start"))
    window = float(trace.facts["simulated_seconds"])
    return {
        name: {
            "mean": float(ratio(area[tier[link] == name].sum(), window * (tier == name).sum())),
            "max": float(most[tier[link] == name].max(initial=0.0)),
        }
        for name in dict.fromkeys(tier)
    }
