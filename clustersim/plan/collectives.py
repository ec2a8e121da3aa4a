"""An exchange → rounds of flows, for many groups of equal make at once.

A collective is a pure function from what is to be exchanged to rounds; members of a group are called
by their position 0 … n-1. `repeat` rounds with the same flows are written once.
"""

from __future__ import annotations

import numpy as np

from clustersim.errors import pick
from clustersim.plan.all_to_all import ALL_TO_ALL
from clustersim.plan.rounds import Collective, Group, Round, all_pairs
from clustersim.plan.trees import (
    at_once,
    binary_tree,
    chain_from,
    reduce_and_spread,
    rings,
    spread,
    sums_in_switches,
    two_trees,
)
from clustersim.spec.deployment import Algorithms

__all__ = ["AUTO", "COLLECTIVES", "Collective", "Group", "Round", "check_algorithms", "collective"]

#: The name by which a deployment leaves the choice to what the vendor's library would take.
AUTO = "auto"


# ---- all-reduce ---------------------------------------------------------------------------------


def ring_all_reduce(group: Group, size: np.ndarray) -> list[Round]:
    """Reduce-scatter, then all-gather, round each of `rings`.

    size     float64[G] bytes of each group's vector
    Returns  2 (n - 1) rounds in which every member sends size / n: the least possible
    Source   Patarasuk, Yuan, J. Parallel Distrib. Comput. 69(2), 2009
    """
    n, orders = group.n, rings(group)
    parts = np.repeat(size[:, None] / n / len(orders), orders.size, axis=1)
    return [Round(orders.ravel(), _following(orders), parts, repeat=2 * (n - 1))]


def _following(orders: np.ndarray) -> np.ndarray:
    """The next member on each ring. int64[K, n] → int64[K * n]."""
    return np.roll(orders, -1, axis=1).ravel()


def one_shot_all_reduce(group: Group, size: np.ndarray) -> list[Round]:
    """Everybody sends everything to everybody and adds up by itself: one round, for small vectors.

    size     float64[G] bytes of each group's vector
    """
    source, target = all_pairs(group.n)
    return [Round(source, target, np.repeat(size[:, None], len(source), axis=1), sending="together")]


def two_shot_all_reduce(group: Group, size: np.ndarray) -> list[Round]:
    """Everybody sends each its part, sums, and sends the sum to all: two rounds, for switches.

    size     float64[G] bytes of each group's vector
    """
    parts = np.repeat(size[:, None] / group.n, group.n, axis=1)
    return direct_reduce_scatter(group, parts) + direct_all_gather(group, parts)


def double_binary_tree_all_reduce(group: Group, size: np.ndarray) -> list[Round]:
    """Sums climb two complementary trees, each with half of the bytes, and come down them to all.

    An inner member of one tree is a leaf of the other, so all of them send and receive alike. All
    pieces are on their way at once: one round, in which a flow begins behind the flows that feed it.
    The time of one piece per level is left out, as in NCCL's own reckoning: pieces are small.

    size     float64[G] bytes of each group's vector
    Returns  each of `two_trees` carries its share over each of its edges, up and down
    Source   as `two_trees`
    """
    trees = two_trees(group)
    return [at_once([reduce_and_spread(parent, size / len(trees)) for parent in trees])]


def hierarchical_all_reduce(group: Group, size: np.ndarray) -> list[Round]:
    """Reduce-scatter in every NVLink domain, all-reduce along the rails, all-gather in the domains.

    size     float64[G] bytes of each group's vector
    Returns  a rail per member of the smallest domain; what larger domains have beyond that takes no
             part on the network
    Source   Cho et al., BlueConnect, MLSys 2019
    """
    rails, domains = int(group.sizes.min()), group.domains
    keeper, other = _near_pairs(group)
    keeper, other = keeper[group.rail[keeper] < rails], other[group.rail[keeper] < rails]
    rounds = []
    if len(keeper):
        shards = np.repeat(size[:, None] / rails, len(keeper), axis=1)
        rounds.append(Round(other, keeper, shards, sending="together"))
    if domains > 1:
        along = group.at[:, :rails]
        parts = np.repeat(size[:, None] / (rails * domains), along.size, axis=1)
        following = np.roll(along, -1, axis=0)
        rounds.append(Round(along.ravel(), following.ravel(), parts, repeat=2 * (domains - 1)))
    if len(keeper):
        rounds.append(Round(keeper, other, shards, sending="together"))
    return rounds


def in_switch_all_reduce(group: Group, size: np.ndarray) -> list[Round]:
    """The switch of each NVLink domain adds up what members send, and copies the sums to all of them.

    Of n members in a domain each asks for its nth of the sums: the switch reads it from all members, so
    each sends all its bytes up and gets size / n down. Then it sends that nth up, and the switch copies
    it to all: each gets all bytes down. That goes on at once, piece by piece: one round with (1 + 1 / n)
    size per member and direction, against 2 (1 - 1 / n) size of a ring. Between domains, every nth goes
    through two trees over the domains.

    size     float64[G] bytes of each group's vector
    Source   NCCL's NVLS and NVLSTree: multimem.ld_reduce and multimem.st (PTX ISA)
    """
    return [sums_in_switches(group, size)]


# ---- all-gather and reduce-scatter --------------------------------------------------------------


def ring_all_gather(group: Group, size: np.ndarray) -> list[Round]:
    """Every member hands its neighbours on `rings` one part per round, until all have all.

    size     float64[G, n] bytes each member contributes
    Returns  n - 1 rounds, written once where all parts of a group are equal
    """
    return _parts_round_the_rings(rings(group), size, first=0)


def ring_reduce_scatter(group: Group, size: np.ndarray) -> list[Round]:
    """Partial sums travel round `rings` until each arrives, complete, where it belongs.

    size     float64[G, n] bytes each member keeps
    Returns  n - 1 rounds, written once where all parts of a group are equal
    """
    return _parts_round_the_rings(rings(group), size, first=-1)


def _parts_round_the_rings(orders: np.ndarray, size: np.ndarray, first: int) -> list[Round]:
    """In its first round the ith of a ring passes on part i + first, then each time what it got before."""
    count, n = orders.shape
    source, target, shares = orders.ravel(), _following(orders), size / count
    if (size == size[:, :1]).all():
        return [Round(source, target, shares[:, source], repeat=n - 1)]
    return [
        Round(source, target, shares[:, np.roll(orders, k - first, axis=1).ravel()]) for k in range(n - 1)
    ]


def direct_all_gather(group: Group, size: np.ndarray) -> list[Round]:
    """Everybody sends its part to all others at once. size as in `ring_all_gather`."""
    source, target = all_pairs(group.n)
    return [Round(source, target, size[:, source], sending="together")]


def direct_reduce_scatter(group: Group, size: np.ndarray) -> list[Round]:
    """Everybody sends each other member that one's part. size as in `ring_reduce_scatter`."""
    source, target = all_pairs(group.n)
    return [Round(source, target, size[:, target], sending="together")]


def hierarchical_all_gather(group: Group, size: np.ndarray) -> list[Round]:
    """Parts go along their rail into every domain, then by NVLink to all of it. size as in the ring."""
    across, within, held = _by_rail(group, size)
    rounds = []
    if group.domains > 1:
        member, relay = across
        rounds.append(Round(member, relay, size[:, member], sending="together"))
    if len(within[0]):
        keeper, other = within
        rounds.append(Round(keeper, other, held[:, keeper], sending="together"))
    return rounds


def hierarchical_reduce_scatter(group: Group, size: np.ndarray) -> list[Round]:
    """Sums are made within every domain, then along the rails: `hierarchical_all_gather` backwards."""
    across, within, held = _by_rail(group, size)
    rounds = []
    if len(within[0]):
        keeper, other = within
        rounds.append(Round(other, keeper, held[:, keeper], sending="together"))
    if group.domains > 1:
        member, relay = across
        rounds.append(Round(relay, member, size[:, member], sending="together"))
    return rounds


def _by_rail(
    group: Group, size: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], np.ndarray]:
    """(member, its relay in each other domain), (keeper, other of its domain), float64[G, n] bytes kept.

    A member keeps, for its domain, its own part and those of whom it is the relay of.
    """
    member, domain = (ends.ravel() for ends in np.indices((group.n, group.domains)))
    relay = group.relay[member, domain]
    held = np.stack([np.bincount(relay, row[member], group.n) for row in size])
    far = group.domain[member] != domain
    return (member[far], relay[far]), _near_pairs(group), held


def _near_pairs(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """All ordered pairs of members of the same domain, in the order of `all_pairs`."""
    one, other = all_pairs(group.n)
    near = group.domain[one] == group.domain[other]
    return one[near], other[near]


# ---- broadcast and point-to-point ---------------------------------------------------------------


def ring_broadcast(group: Group, size: np.ndarray) -> list[Round]:
    """Member 0's bytes are handed on along each of `rings`, piece by piece.

    size     float64[G] bytes
    """
    orders = rings(group)
    return [at_once([spread(chain_from(order, 0), size / len(orders)) for order in orders])]


def binary_tree_broadcast(group: Group, size: np.ndarray) -> list[Round]:
    """Member 0's bytes come down a binary tree, piece by piece. size as in the ring.

    An inner member sends everything twice, so it takes twice as long as the ring where bandwidth
    rules, but its depth is log2 n.
    """
    return [spread(binary_tree(group.n), size)]


def direct_broadcast(group: Group, size: np.ndarray) -> list[Round]:
    """Member 0 sends everything to everybody. size as in the ring."""
    target = np.arange(1, group.n)
    parts = np.repeat(size[:, None], len(target), axis=1)
    return [Round(np.zeros_like(target), target, parts, sending="together")]


def to_the_next(group: Group, size: np.ndarray) -> list[Round]:
    """Member 0 sends to member 1. size float64[G] bytes."""
    assert group.n == 2
    return [Round(np.array([0]), np.array([1]), size[:, None])]


# ---- the tables ---------------------------------------------------------------------------------


def collective(kind: str, name: str) -> Collective:
    """The table entry of that name.

    kind     a key of COLLECTIVES
    Raises   ClustersimError that lists the algorithms there are
    """
    return pick(COLLECTIVES[kind], name, f"deployment.algorithms.{kind}")


def check_algorithms(algorithms: Algorithms) -> None:
    """Raises ClustersimError for a name that is not known, whether or not the deployment needs it."""
    for kind, table in COLLECTIVES.items():
        names = {**table, AUTO: None}
        pick(names, getattr(algorithms, kind), f"deployment.algorithms.{kind}")


ALL_REDUCE = {
    "ring": Collective(ring_all_reduce),
    "double_binary_tree": Collective(double_binary_tree_all_reduce),
    "hierarchical": Collective(hierarchical_all_reduce),
    "in_switch": Collective(in_switch_all_reduce, needs="switches"),
    "one_shot": Collective(one_shot_all_reduce, needs="domain"),
    "two_shot": Collective(two_shot_all_reduce, needs="domain"),
}
ALL_GATHER = {
    "ring": Collective(ring_all_gather),
    "direct": Collective(direct_all_gather),
    "hierarchical": Collective(hierarchical_all_gather),
}
REDUCE_SCATTER = {
    "ring": Collective(ring_reduce_scatter),
    "direct": Collective(direct_reduce_scatter),
    "hierarchical": Collective(hierarchical_reduce_scatter),
}
BROADCAST = {
    "ring": Collective(ring_broadcast),
    "binary_tree": Collective(binary_tree_broadcast),
    "direct": Collective(direct_broadcast),
}
POINT_TO_POINT = {
    "direct": Collective(to_the_next, meets="each"),
    # The scattering and gathering are done by what plan/lowering.py writes around it.
    "scatter_gather": Collective(to_the_next, meets="each"),
}

COLLECTIVES: dict[str, dict[str, Collective]] = {
    "all_reduce": ALL_REDUCE,
    "all_gather": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "broadcast": BROADCAST,
    "all_to_all": ALL_TO_ALL,
    "point_to_point": POINT_TO_POINT,
}
