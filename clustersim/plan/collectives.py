"""An exchange → rounds of flows, for many groups of equal size at once.

A collective is a pure function from what is to be exchanged to rounds; members of a group are called
by their position 0 … n-1. `repeat` rounds with the same flows are written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clustersim.errors import pick
from clustersim.spec.deployment import Algorithms


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """Flows that may run at once; a member's next round waits for its flows of this one.

    source, target  int[F] positions in the group
    size            float64[G, F] bytes, per group
    repeat          how many rounds in a row have just these flows
    interleaved     a sender's flows are sent interleaved, so that they share links as their bytes
    """

    source: np.ndarray
    target: np.ndarray
    size: np.ndarray
    repeat: int = 1
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Collective:
    """One way to do an exchange.

    rounds  (members, sizes) → rounds
    meets   all: nothing is sent before every member is there; each: a member sends when it is
            there, and is done when its own senders and receivers are
    """

    rounds: Callable[[int, np.ndarray], list[Round]]
    meets: Literal["all", "each"] = "all"


def _ring(n: int) -> tuple[np.ndarray, np.ndarray]:
    source = np.arange(n)
    return source, (source + 1) % n


def _all_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    # Shifted, as senders go round: in the k-th place everybody sends to its k-th neighbour.
    source = np.tile(np.arange(n), n - 1)
    return source, (source + np.repeat(np.arange(1, n), n)) % n


def ring_all_reduce(n: int, size: np.ndarray) -> list[Round]:
    """Reduce-scatter, then all-gather, round the ring.

    size     float64[G] bytes of each group's vector
    Returns  2 (n - 1) rounds in which every member sends size / n: the least possible
    Source   Patarasuk, Yuan, J. Parallel Distrib. Comput. 69(2), 2009
    """
    source, target = _ring(n)
    return [Round(source, target, np.repeat(size[:, None] / n, n, axis=1), repeat=2 * (n - 1))]


def direct_all_reduce(n: int, size: np.ndarray) -> list[Round]:
    """Everybody sends each its part, sums, and sends the sum to all: two rounds, for switches.

    size     float64[G] bytes of each group's vector
    """
    parts = np.repeat(size[:, None] / n, n, axis=1)
    return direct_reduce_scatter(n, parts) + direct_all_gather(n, parts)


def ring_all_gather(n: int, size: np.ndarray) -> list[Round]:
    """Every member hands its neighbour one part per round, until all have all.

    size     float64[G, n] bytes each member contributes
    Returns  n - 1 rounds, written once where all parts of a group are equal
    """
    return _parts_round_the_ring(n, size, first=0)


def ring_reduce_scatter(n: int, size: np.ndarray) -> list[Round]:
    """Partial sums travel round the ring until each arrives, complete, where it belongs.

    size     float64[G, n] bytes each member keeps
    Returns  n - 1 rounds, written once where all parts of a group are equal
    """
    return _parts_round_the_ring(n, size, first=-1)


def _parts_round_the_ring(n: int, size: np.ndarray, first: int) -> list[Round]:
    """In its first round member i passes on part i + first, then each time what it got before."""
    source, target = _ring(n)
    if (size == size[:, :1]).all():
        return [Round(source, target, size, repeat=n - 1)]
    return [Round(source, target, size[:, (source + first - k) % n]) for k in range(n - 1)]


def direct_all_gather(n: int, size: np.ndarray) -> list[Round]:
    """Everybody sends its part to all others at once. size as in `ring_all_gather`."""
    source, target = _all_pairs(n)
    return [Round(source, target, size[:, source], interleaved=True)]


def direct_reduce_scatter(n: int, size: np.ndarray) -> list[Round]:
    """Everybody sends each other member that one's part. size as in `ring_reduce_scatter`."""
    source, target = _all_pairs(n)
    return [Round(source, target, size[:, target], interleaved=True)]


def pairwise_all_to_all(n: int, size: np.ndarray) -> list[Round]:
    """Everybody sends straight to everybody, all at once and interleaved.

    size     float64[G, n, n] bytes from row to column
    Source   NCCL does an all-to-all as one group of sends and receives
    """
    source, target = _all_pairs(n)
    return [Round(source, target, size[:, source, target], interleaved=True)]


def to_the_next(n: int, size: np.ndarray) -> list[Round]:
    """Member 0 sends to member 1. size float64[G] bytes."""
    assert n == 2
    return [Round(np.array([0]), np.array([1]), size[:, None])]


def collective(kind: str, algorithms: Algorithms) -> Collective:
    """The table entry that a deployment names for a kind of exchange.

    kind     a key of COLLECTIVES
    Raises   ClustersimError that lists the algorithms there are
    """
    name = "direct" if kind == "point_to_point" else getattr(algorithms, kind)
    return pick(COLLECTIVES[kind], name, f"deployment.algorithms.{kind}")


def check_algorithms(algorithms: Algorithms) -> None:
    """Raises ClustersimError for a name that is not known, whether or not the deployment needs it."""
    for kind in COLLECTIVES:
        collective(kind, algorithms)


ALL_REDUCE = {"ring": Collective(ring_all_reduce), "direct": Collective(direct_all_reduce)}
ALL_GATHER = {"ring": Collective(ring_all_gather), "direct": Collective(direct_all_gather)}
REDUCE_SCATTER = {"ring": Collective(ring_reduce_scatter), "direct": Collective(direct_reduce_scatter)}
ALL_TO_ALL = {
    "pairwise": Collective(pairwise_all_to_all),
    "one_sided": Collective(pairwise_all_to_all, meets="each"),
}
POINT_TO_POINT = {"direct": Collective(to_the_next, meets="each")}

COLLECTIVES: dict[str, dict[str, Collective]] = {
    "all_reduce": ALL_REDUCE,
    "all_gather": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "all_to_all": ALL_TO_ALL,
    "point_to_point": POINT_TO_POINT,
}
