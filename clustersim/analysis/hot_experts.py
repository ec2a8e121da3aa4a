"""What hot experts cost where no single rank holds them all: how long is waited for them, and where most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.analysis.latency import numbers, words
from clustersim.trace.record import Columns, Trace

#: A rank with less than this times the mean tokens has no hot expert.
HOT = 1.1
#: Exchanges in which it shows that others are still served.
AFTER_SERVICE = ("combine", "expert_reduce_scatter")
#: A rank or place that bears this share of something stands for it.
_MOST = 0.5
#: Places that are named.
_PLACES = 3


@dataclass(frozen=True, slots=True)
class HotExperts:
    """Waiting for ranks with hot experts, in one step.

    wait      s that a GPU waits for them, mean over the GPUs
    one_rank  the share of it that goes to the account of one EP rank, the largest
    moves     "layer", "step": from which to which the rank that is waited for changes
    ranks     EP ranks that are waited for
    places    rank, layer, expert: where is waited most, at most three; expert_load, rank_load: tokens of
              the expert / mean of the copies and tokens of the rank / mean of the EP ranks, while it is
              waited for; wait: s of a step
    """

    wait: float
    one_rank: float
    moves: list[str]
    ranks: int
    places: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class _Passes:
    """The experts' service in every token batch and layer, P of them, over M EP ranks.

    batch, layer  int[P]
    tokens        float64[P, M]
    done          float64[P, M] when each rank was done, were every GPU as fast as the median one, s; NaN
                  for a rank without experts there
    row           int[rows] of P, of each row of the table
    """

    batch: np.ndarray
    layer: np.ndarray
    tokens: np.ndarray
    done: np.ndarray
    row: np.ndarray


def hot_experts(trace: Trace, steps: int, slowness: np.ndarray) -> HotExperts | None:
    """What waiting for hot experts costs; None where nobody waits for one.

    A rank is waited for from when the ranks are done with a layer's experts in the mean until it is, as
    the last one; only where it has more tokens than others, so that it is not slow or late by itself.

    slowness  float64[rank] how many times as long operators take as those of the median GPU
    """
    if not len(numbers(trace.tables["experts"], "rank")):
        return None
    passes = _passes(trace.tables["experts"], slowness)
    last = np.nanargmax(passes.done, axis=1)
    each = np.arange(len(last))
    members = np.isfinite(passes.done).sum(axis=1)
    load = passes.tokens[each, last] * members / np.maximum(passes.tokens.sum(axis=1), 1.0)
    wait = np.where(load >= HOT, passes.done[each, last] - np.nanmean(passes.done, axis=1), 0.0)
    stages = int(numbers(trace.tables["ranks"], "stage").max()) + 1
    waits = trace.tables["waits"]
    waited = numbers(waits, "seconds")[np.isin(words(waits, "operator"), AFTER_SERVICE)].sum()
    # A GPU sees the layers of its own stage only. No more than was really waited is put to any account.
    found = float(wait.sum()) / stages
    real = min(found, float(waited) / len(numbers(trace.tables["ranks"], "rank")))
    if real <= 0:
        return None
    wait *= real / found / stages / steps
    of_rank = np.bincount(last, weights=wait)
    shares = {
        "layer": _share_of_one(passes.batch, last, wait),
        "step": _share_of_one(passes.layer, last, wait),
    }
    return HotExperts(
        wait=float(wait.sum()),
        one_rank=float(of_rank.max() / of_rank.sum()),
        moves=[name for name, share in shares.items() if share < _MOST],
        ranks=int((of_rank > 0).sum()),
        places=_places(trace.tables["experts"], passes, last, wait),
    )


def _passes(table: Columns, slowness: np.ndarray) -> _Passes:
    layer, member = numbers(table, "layer").astype(np.int64), numbers(table, "ep_rank")
    layers, ranks = int(layer.max()) + 1, int(member.max()) + 1
    key = numbers(table, "token_batch").astype(np.int64) * layers + layer
    keys, row = np.unique(key, return_inverse=True)
    served, done = numbers(table, "served"), numbers(table, "done")
    # Of a rank's experts, the first to be served and the last to be done; sharers of one are one.
    begun = np.full((len(keys), ranks), np.inf)
    ended = np.full((len(keys), ranks), -np.inf)
    slow = np.zeros((len(keys), ranks))
    row = row.ravel()
    np.minimum.at(begun, (row, member), served)
    np.maximum.at(ended, (row, member), done)
    np.maximum.at(slow, (row, member), slowness[numbers(table, "rank")])
    there = np.isfinite(ended)
    service = np.divide(ended - begun, slow, out=np.zeros_like(slow), where=there)
    fair = np.where(there, begun, 0.0) + service
    tokens = np.bincount(row * ranks + member, weights=numbers(table, "tokens"), minlength=len(keys) * ranks)
    return _Passes(
        batch=keys // layers,
        layer=keys % layers,
        tokens=tokens.reshape(len(keys), ranks),
        done=np.where(there, fair, np.nan),
        row=row,
    )


def _share_of_one(where: np.ndarray, rank: np.ndarray, wait: np.ndarray) -> float:
    """The share of waiting that, within each of `where`, goes to the account of one rank, the largest."""
    ranks, rows = int(rank.max()) + 1, int(where.max()) + 1
    pairs = np.bincount(where * ranks + rank, weights=wait, minlength=rows * ranks).reshape(rows, ranks)
    return float(pairs.max(axis=1).sum() / wait.sum())


def _places(table: Columns, passes: _Passes, last: np.ndarray, wait: np.ndarray) -> list[dict[str, Any]]:
    """The layers and ranks for which is waited most."""
    ranks = passes.tokens.shape[1]
    of_place = np.bincount(passes.layer * ranks + last, weights=wait)
    worst = np.argsort(-of_place, kind="stable")[:_PLACES]
    found = []
    for place in worst[of_place[worst] > 0].tolist():
        layer, member = divmod(place, ranks)
        chosen = (passes.layer == layer) & (last == member) & (wait > 0)
        rows = np.flatnonzero(chosen[passes.row])
        mine = rows[numbers(table, "ep_rank")[rows] == member]
        tokens = numbers(table, "tokens")
        got = np.bincount(numbers(table, "expert")[mine], weights=tokens[mine])
        whole, times = float(tokens[rows].sum()), int(chosen.sum())
        members = np.isfinite(passes.done[chosen]).sum() / times
        found.append(
            {
                "rank": int(numbers(table, "rank")[mine].min()),
                "layer": layer,
                "expert": int(got.argmax()),
                "expert_load": float(got.max()) * len(rows) / times / whole,
                "rank_load": float(passes.tokens[chosen, member].sum()) * members / whole,
                "wait": float(of_place[place]),
            }
        )
    return found
