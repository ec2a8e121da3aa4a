"""From one placement of experts to the next: what stays where it is, what moves, and from where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Move:
    """One expert copy on its way.

    layer, expert   which
    source, target  EP ranks
    """

    layer: int
    expert: int
    source: int
    target: int


def settled(old: np.ndarray, wished: np.ndarray, ranks: int, domain: np.ndarray) -> np.ndarray:
    """A wished placement, arranged so that as little as possible has to move.

    Ranks of an NVLink domain are alike to any policy, so they may swap what is meant for them: the pair
    with most experts in common first. Within a rank, an expert that stays keeps its place.

    old, wished  int[C] experts in the places of one layer
    domain       int[EP] NVLink domain of every EP rank
    Returns      int32[C]
    """
    held, meant = old.reshape(ranks, -1), wished.reshape(ranks, -1)
    found = np.empty_like(held, dtype=np.int32)
    for here in np.unique(domain):
        members = np.flatnonzero(domain == here)
        for rank, other in _paired(held[members], meant[members]):
            found[members[rank]] = _kept(held[members[rank]], meant[members[other]])
    return found.ravel()


def _paired(held: np.ndarray, meant: np.ndarray) -> list[tuple[int, int]]:
    """Rank, and whose wish it takes: the most experts in common first, then its own, then in order."""
    n, experts = len(held), int(max(held.max(), meant.max())) + 1
    holds, wants = (np.stack([np.bincount(row, minlength=experts) for row in rows]) for rows in (held, meant))
    common = np.minimum(holds[:, None, :], wants[None, :, :])
    # Further places for an expert that the rank holds already cost nothing: they only break ties.
    score = (common > 0).sum(axis=2) * (held.shape[1] + 1) + common.sum(axis=2)
    order = np.argsort(-(2 * score + np.eye(n, dtype=np.int64)), axis=None, kind="stable")
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    given: set[int] = set()
    for cell in order.tolist():
        rank, other = divmod(cell, n)
        if rank not in taken and other not in given:
            pairs.append((rank, other))
            taken.add(rank)
            given.add(other)
    # The largest first is not always the most in all.
    as_wished = [(rank, rank) for rank in range(n)]
    return max((as_wished, pairs), key=lambda chosen: sum(int(score[pair]) for pair in chosen))


def _kept(held: np.ndarray, meant: np.ndarray) -> np.ndarray:
    """The experts meant for a rank, those that it holds in the places where they are."""
    wanted = Counter(meant.tolist())
    places: list[int | None] = []
    for expert in held.tolist():
        stays = wanted[expert] > 0
        wanted[expert] -= stays
        places.append(expert if stays else None)
    fresh = iter([expert for expert in meant.tolist() if _taken(wanted, expert)])
    return np.array([next(fresh) if expert is None else expert for expert in places], dtype=np.int32)


def _taken(wanted: Counter[int], expert: int) -> bool:
    some = wanted[expert] > 0
    wanted[expert] -= some
    return some


def moves(layer: int, old: np.ndarray, arranged: np.ndarray, ranks: int, domain: np.ndarray) -> list[Move]:
    """What has to come from another rank, each from the nearest that holds it and sends least.

    A rank that holds an expert already gives it further places of its own without a move.

    old, arranged  int[C] experts in the places of one layer before and after
    domain         int[EP] as in `settled`
    """
    held, next_ = (rows.reshape(ranks, -1).tolist() for rows in (old, arranged))
    holders: dict[int, list[int]] = {}
    for rank, experts in enumerate(held):
        for expert in dict.fromkeys(experts):
            holders.setdefault(expert, []).append(rank)
    sends = [0] * ranks
    found = []
    for target, experts in enumerate(next_):
        for expert in dict.fromkeys(experts):
            if target not in holders[expert]:
                source = _nearest(holders[expert], target, sends, domain)
                sends[source] += 1
                found.append(Move(layer, expert, source, target))
    return found


def _nearest(holders: Sequence[int], target: int, sends: Sequence[int], domain: np.ndarray) -> int:
    return min(holders, key=lambda rank: (domain[rank] != domain[target], sends[rank], rank))


def chunks(layers: Sequence[int], stages: Sequence[range], together: int) -> list[list[int]]:
    """Layers that move at the same time, in order: so many of every stage.

    stages    the layers of each pipeline stage
    together  of a stage; 0: all
    """
    of_stage = [[layer for layer in layers if layer in held] for held in stages]
    each = together or max(map(len, of_stage), default=1) or 1
    most = max((len(held) for held in of_stage), default=0)
    return [
        [layer for held in of_stage for layer in held[first : first + each]] for first in range(0, most, each)
    ]
