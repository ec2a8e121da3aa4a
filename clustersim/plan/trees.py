"""Trees and chains through which bytes are passed on piece by piece."""

from __future__ import annotations

import numpy as np

from clustersim.plan.rounds import DOWN, UP, Group, Round


def binary_tree(n: int) -> np.ndarray:
    """Parent of each of n vertices, int64[n], -1 at the root, which is vertex 0.

    Every other vertex of an in-order tree is a leaf, and neighbours by number are near in the tree.

    Source   NCCL, ncclGetBtree in src/graph/trees.cc
    """
    vertex = np.arange(n)
    low = vertex & -vertex
    up = (vertex ^ low) | (low << 1)
    parent = np.where(up < n, up, vertex ^ low)
    parent[0] = -1
    return np.asarray(parent)


def second_tree(n: int) -> np.ndarray:
    """A binary tree whose inner vertices are leaves of `binary_tree`, all but one: int64[n], -1 at the root.

    Source   Sanders, Speck, Träff, Parallel Computing 35(12), 2009; NCCL, ncclGetDtree: mirrored where n
             is even, shifted by one where it is odd
    """
    first = binary_tree(n)
    number = np.arange(n)[::-1] if n % 2 == 0 else (np.arange(n) + 1) % n
    parent = np.empty(n, dtype=np.int64)
    parent[number] = np.where(first >= 0, number[first], -1)
    return parent


def two_trees(group: Group) -> list[np.ndarray]:
    """The spanning trees of a double binary tree, int64[n] parents of each; every one carries as much.

    Two trees over the domains for every rail that all domains have; within a domain a chain leads to
    the member on that rail. Where there is but one domain, the trees are over its members.

    Source   NCCL: chains in the server, trees between servers, a leader per channel
    """
    trees = (binary_tree, second_tree)
    if group.domains == 1:
        return [tree(group.n) for tree in trees]
    return [
        _with_chains(group, tree(group.domains), rail)
        for rail in range(int(group.sizes.min()))
        for tree in trees
    ]


def _with_chains(group: Group, tree: np.ndarray, rail: int) -> np.ndarray:
    parent = np.empty(group.n, dtype=np.int64)
    for domain, members in enumerate(group.at):
        chain = np.roll(members[members >= 0], -rail)
        parent[chain[1:]] = chain[:-1]
        above = tree[domain]
        parent[chain[0]] = group.at[above, rail] if above >= 0 else -1
    return parent


def reduce_and_spread(parent: np.ndarray, size: np.ndarray) -> Round:
    """Sums climb a spanning tree to its root, and come down again to all, piece by piece.

    parent   int64[n] of each member, -1 at the root
    size     float64[G] bytes
    Returns  flow c carries the sums of the c-th member but the root to its parent, flow n - 1 + c the
             result back
    """
    child = np.flatnonzero(parent >= 0)
    above, edges = parent[child], len(child)
    rising = np.full(len(parent), -1)
    rising[child] = np.arange(edges)
    below: list[list[int]] = [[] for _ in parent]
    for flow, member in enumerate(above.tolist()):
        below[member].append(flow)
    up = [below[member] for member in child.tolist()]
    # What a member hands down it got from above; the root has it when all below it have sent.
    down = [[int(rising[m]) + edges] if rising[m] >= 0 else below[m] for m in above.tolist()]
    return Round(
        np.concatenate([child, above]),
        np.concatenate([above, child]),
        np.repeat(size[:, None], 2 * edges, axis=1),
        behind=padded(up + down),
    )


def spread(parent: np.ndarray, size: np.ndarray) -> Round:
    """The root's bytes come down a spanning tree to all, piece by piece. Arguments as above."""
    child = np.flatnonzero(parent >= 0)
    arriving = np.full(len(parent), -1)
    arriving[child] = np.arange(len(child))
    return Round(
        parent[child],
        child,
        np.repeat(size[:, None], len(child), axis=1),
        behind=arriving[parent[child]][:, None],
    )


def through_the_switch(n: int, size: np.ndarray) -> Round:
    """Every member sends bytes up to the switch and gets as many down. size float64[G] bytes each."""
    member, nothing = np.arange(n), np.full(n, -1)
    return Round(
        np.tile(member, 2),
        np.tile(member, 2),
        np.repeat(size[:, None], 2 * n, axis=1),
        behind=np.concatenate([nothing, member])[:, None],
        via=np.repeat(np.array([UP, DOWN], dtype=np.int8), n),
    )


def at_once(rounds: list[Round]) -> Round:
    """Rounds of flows that pass bytes on, side by side as one round."""
    width = max(r.behind.shape[1] for r in rounds if r.behind is not None)
    behind, first = [], 0
    for one in rounds:
        assert one.behind is not None and one.via is None
        shifted = np.where(one.behind >= 0, one.behind + first, -1)
        behind.append(np.pad(shifted, ((0, 0), (0, width - shifted.shape[1])), constant_values=-1))
        first += len(one.source)
    return Round(
        np.concatenate([r.source for r in rounds]),
        np.concatenate([r.target for r in rounds]),
        np.concatenate([r.size for r in rounds], axis=1),
        behind=np.concatenate(behind),
    )


def padded(rows: list[list[int]]) -> np.ndarray:
    """Lists of different lengths as one table, int64[rows, longest >= 1], padded with -1."""
    width = max((len(row) for row in rows), default=1)
    return np.array([row + [-1] * (max(width, 1) - len(row)) for row in rows], dtype=np.int64)
