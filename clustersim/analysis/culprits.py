"""Who is to blame: the rank with the most tokens, with its layer and expert, and the GPU others wait for."""

from __future__ import annotations

from typing import Any

import numpy as np

from clustersim.analysis.latency import numbers, words
from clustersim.trace.record import Trace


def hottest(trace: Trace) -> dict[str, Any] | None:
    """The EP rank that got the most tokens, where it got most of them, and for which expert.

    Returns  ep_rank, rank and gpu (in the layer below); load: its tokens ÷ the mean of the EP ranks;
             layer: where it got the most tokens; layer_load: the same ratio there; expert: the one that
             brought most of these; share: its part of them. None if no expert was at work
    """
    table = trace.tables["experts"]
    tokens, member = numbers(table, "tokens"), numbers(table, "ep_rank")
    if not tokens.sum():
        return None
    layer, ranks = numbers(table, "layer"), int(member.max()) + 1
    per_rank = np.bincount(member, weights=tokens, minlength=ranks)
    most = int(per_rank.argmax())
    mine = member == most
    here = int(np.bincount(layer[mine], weights=tokens[mine]).argmax())
    there = layer == here
    in_layer = np.bincount(member[there], weights=tokens[there], minlength=ranks)
    rows = mine & there
    per_expert = np.bincount(numbers(table, "expert")[rows], weights=tokens[rows])
    rank = int(numbers(table, "rank")[rows].min())
    return {
        "ep_rank": most,
        "rank": rank,
        "gpu": _gpu(trace, rank),
        "load": float(per_rank[most] / per_rank.mean()),
        "layer": here,
        "layer_load": float(in_layer[most] / in_layer.mean()),
        "expert": int(per_expert.argmax()),
        "share": float(per_expert.max() / max(per_expert.sum(), 1)),
    }


def worst_gpu(trace: Trace) -> dict[str, Any] | None:
    """The GPU that the others waited for longest.

    Returns  gpu, rank; share: of all time that GPUs waited for one another on their compute streams, the
             part that goes to its account (each operator's waiting to the rank most waited for in it);
             busy: share of the window it computed or exchanged. None if nobody waited for anybody
    """
    sums = trace.tables["sums"]
    culprit = numbers(sums, "waited_for")
    wait = np.where(words(sums, "stream") == "compute", numbers(sums, "wait"), 0.0)
    blamed = np.bincount(np.maximum(culprit, 0), weights=np.where(culprit >= 0, wait, 0.0))
    if not blamed.sum():
        return None
    rank = int(blamed.argmax())
    here = (numbers(sums, "rank") == rank) & (words(sums, "stream") == "compute")
    window = float(trace.facts["simulated_seconds"])
    return {
        "gpu": _gpu(trace, rank),
        "rank": rank,
        "share": float(blamed[rank] / blamed.sum()),
        "busy": float(numbers(sums, "busy")[here].sum() / window) if window > 0 else 0.0,
    }


def said_hottest(found: dict[str, Any]) -> str:
    """One line: rank, layer and expert."""
    where = f"{found['gpu']} (EP rank {found['ep_rank']})"
    return (
        f"{where} gets {found['load']:.2f} x the mean tokens, in layer {found['layer']} "
        f"{found['layer_load']:.2f} x, {found['share']:.0%} of them for expert {found['expert']}"
    )


def said_worst_gpu(found: dict[str, Any]) -> str:
    """One line: which GPU and how much of the waiting goes to its account."""
    return f"others wait for {found['gpu']} (rank {found['rank']}) in {found['share']:.0%} of their waiting"


def _gpu(trace: Trace, rank: int) -> str:
    ranks = trace.tables["ranks"]
    place = np.flatnonzero(numbers(ranks, "rank") == rank)
    return str(words(ranks, "gpu")[place[0]]) if len(place) else f"rank {rank}"
