"""Rings, and the trees and chains through which bytes are passed on piece by piece."""

from __future__ import annotations

import numpy as np

from clustersim.plan.rounds import DOWN, PEER, UP, Group, Round


def rings(group: Group) -> np.ndarray:
    """The orders in which a group's rings go round, int64[K, n] members; each carries as much.

    A ring for every rail that all domains have, so that every card has its part: ring r comes into
    every other domain on rail r and leaves it on the next one, and the other way round in those
    between, so that it keeps to one rail where it crosses the network (all the way round if the
    domains are even in number). Where there is but one domain, one ring says it all.

    Source   NCCL: a ring per channel, and channels over all cards; NCCL_CROSS_NIC
    """
    if group.domains == 1:
        return np.arange(group.n)[None, :]
    rails = int(group.sizes.min())
    orders = []
    for rail in range(rails):
        order: list[int] = []
        for domain, members in enumerate(group.at):
            ends = [rail, (rail + 1) % rails]
            entry, leave = ends if domain % 2 == 0 else ends[::-1]
            around = np.roll(members[members >= 0], -entry).tolist()
            last = [int(members[leave])] if leave != entry else []
            order += [member for member in around if member not in last] + last
        orders.append(order)
    return np.array(orders)


def chain_from(order: np.ndarray, first: int) -> np.ndarray:
    """Parents along a ring that is opened before its member `first`: int64[n], -1 at that member."""
    order = np.roll(order, -int(np.flatnonzero(order == first)[0]))
    parent = np.full(len(order), -1)
    parent[order[1:]] = order[:-1]
    return parent


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


def switched(member: np.ndarray, size: np.ndarray, way: int, behind: list[list[int]]) -> Round:
    """Bytes between members and their switch.

    member  int64[M]
    size    float64[G] bytes of each
    way     UP or DOWN
    behind  for each member the flows that its own is behind, numbered as `at_once` numbers them
    """
    sizes = np.repeat(size[:, None], len(member), axis=1)
    via = np.full(len(member), way, dtype=np.int8)
    return Round(member, member, sizes, behind=padded(behind), via=via)


def at_once(rounds: list[Round], numbered: bool = False) -> Round:
    """Rounds of flows that pass bytes on, side by side as one round.

    numbered  flows are behind others as they are numbered in the result, not in their own round
    """
    width = max(r.behind.shape[1] for r in rounds if r.behind is not None)
    behind, via, first = [], [], 0
    for one in rounds:
        assert one.behind is not None
        shifted = np.where(one.behind >= 0, one.behind + (0 if numbered else first), -1)
        behind.append(np.pad(shifted, ((0, 0), (0, width - shifted.shape[1])), constant_values=-1))
        via.append(np.full(len(one.source), PEER, dtype=np.int8) if one.via is None else one.via)
        first += len(one.source)
    return Round(
        np.concatenate([r.source for r in rounds]),
        np.concatenate([r.target for r in rounds]),
        np.concatenate([r.size for r in rounds], axis=1),
        behind=np.concatenate(behind),
        via=None if all(r.via is None for r in rounds) else np.concatenate(via),
    )


def sums_in_switches(group: Group, size: np.ndarray) -> Round:
    """Switches add up what the members of a domain send, trees what domains have, switches copy it to all.

    size     float64[G] bytes of each group's vector
    Returns  in this order: everybody's vector up; down to each head (a member per domain and rail) its
             rail's share of the domain's sums; these through two trees over the domains, per rail; up
             from the heads the sums of all; down to everybody all of them
    """
    n, rails, domains = group.n, int(group.sizes.min()), group.domains
    heads = group.at[:, :rails]
    everybody, head = np.arange(n), heads.ravel()
    parts = [
        switched(everybody, size, UP, [[] for _ in range(n)]),
        switched(head, size / rails, DOWN, [[member] for member in head.tolist()]),
    ]
    # Flows after which a head has its share of the sums, and the number of the next flow.
    having, flow = [[n + place] for place in range(len(head))], n + len(head)
    if domains > 1:
        sums, having = having, [[] for _ in head]
        for rail in range(rails):
            places = np.arange(domains) * rails + rail
            for parent in (binary_tree(domains), second_tree(domains)):
                one = _among_heads(
                    parent, size / (2 * rails), heads[:, rail], [sums[p][0] for p in places], flow
                )
                parts.append(one)
                root = int(heads[parent < 0, rail][0])
                for number, target in enumerate(one.target.tolist(), flow):
                    # The root has it when all below it have sent, the others when it comes down.
                    if (number - flow < domains - 1) == (target == root):
                        having[int(group.domain[target]) * rails + rail].append(number)
                flow += len(one.source)
    last = [list(range(flow + d * rails, flow + (d + 1) * rails)) for d in group.domain.tolist()]
    parts += [switched(head, size / rails, UP, having), switched(everybody, size, DOWN, last)]
    return at_once(parts, numbered=True)


def _among_heads(
    parent: np.ndarray, size: np.ndarray, heads: np.ndarray, sums: list[int], first: int
) -> Round:
    """`reduce_and_spread` over domains, by their heads; a leaf is behind the flow that brought its sums."""
    one = reduce_and_spread(parent, size)
    assert one.behind is not None
    behind = np.where(one.behind >= 0, one.behind + first, -1)
    leaf = (behind == -1).all(axis=1)
    behind[leaf, 0] = np.array(sums)[one.source[leaf]]
    return Round(heads[one.source], heads[one.target], one.size, behind=behind)


def padded(rows: list[list[int]]) -> np.ndarray:
    """Lists of different lengths as one table, int64[rows, longest >= 1], padded with -1."""
    width = max((len(row) for row in rows), default=1)
    return np.array([row + [-1] * (max(width, 1) - len(row)) for row in rows], dtype=np.int64)
