"""All-to-alls: everybody owes everybody something of its own, straight or by way of the same rail."""

from __future__ import annotations

import numpy as np

from clustersim.plan.rounds import Collective, Group, Round, all_pairs


def pairwise_all_to_all(group: Group, size: np.ndarray) -> list[Round]:
    """Everybody sends straight to everybody, all at once and interleaved.

    size     float64[G, n, n] bytes from row to column
    Source   NCCL does an all-to-all as one group of sends and receives
    """
    source, target = all_pairs(group.n)
    return [Round(source, target, size[:, source, target], sending="together")]


def low_latency_all_to_all(group: Group, size: np.ndarray) -> list[Round]:
    """Everybody writes straight into everybody's memory, token by token, and nobody waits to be answered.

    size     as in `pairwise_all_to_all`
    Source   DeepEP's low-latency kernels: no hand-shake; each rank sends as soon as it is there
    """
    return pairwise_all_to_all(group, size)


def hierarchical_all_to_all(group: Group, size: np.ndarray) -> list[Round]:
    """Over the network to the own rail of the target's domain, then over NVLink to the target.

    size     as in `pairwise_all_to_all`
    """
    return deduplicated_all_to_all(group, size, _sums(group, size))


def deduplicated_all_to_all(group: Group, size: np.ndarray, distinct: np.ndarray) -> list[Round]:
    """As `hierarchical_all_to_all`; what several members of a domain want crosses the network once.

    size      as in `pairwise_all_to_all`
    distinct  float64[G, n, D] bytes from each member to each domain, each token once; the own domain
              does not matter
    Returns   first the network and, beside it, what stays in the own domain; then NVLink in the
              targets' domains, where every target gets its own copy
    Source    DeepEP's kernels for training and prefill
    """
    first = _to_the_rails(group, size, distinct)
    if group.domains == 1 or group.domains == group.n:
        return [first]
    carrier, target = (ends.ravel() for ends in np.meshgrid(*2 * [np.arange(group.n)], indexing="ij"))
    near = (group.domain[carrier] == group.domain[target]) & (carrier != target)
    carrier, target = carrier[near], target[near]
    passed = _passed_on(group, size)[:, carrier, target]
    return [first, Round(carrier, target, passed, sending="together")]


def _to_the_rails(group: Group, size: np.ndarray, distinct: np.ndarray) -> Round:
    source, other = (ends.ravel() for ends in np.meshgrid(*2 * [np.arange(group.n)], indexing="ij"))
    near = (group.domain[source] == group.domain[other]) & (source != other)
    member, domain = np.meshgrid(np.arange(group.n), np.arange(group.domains), indexing="ij")
    far = group.domain[member] != domain
    member, domain = member[far], domain[far]
    return Round(
        np.concatenate([member, source[near]]),
        np.concatenate([group.relay[member, domain], other[near]]),
        np.concatenate([distinct[:, member, domain], size[:, source[near], other[near]]], axis=1),
        sending="together",
    )


def _sums(group: Group, size: np.ndarray) -> np.ndarray:
    """float64[G, n, D] bytes from each member to each domain."""
    return np.asarray(size @ (group.domain[:, None] == np.arange(group.domains)))


def _passed_on(group: Group, size: np.ndarray) -> np.ndarray:
    """float64[G, n, n] bytes that came from other domains and that row hands on to column."""
    target = np.arange(group.n)
    carrier = group.relay[:, group.domain]
    far = group.domain[:, None] != group.domain[None, :]
    passed = np.zeros(size.shape)
    for source in range(group.n):
        passed[:, carrier[source], target] += np.where(far[source], size[:, source, :], 0.0)
    return passed


def over_the_rail(group: Group) -> np.ndarray:
    """int64[n, n] who hands on to column what row sends it: the column's domain's member on row's rail."""
    source = np.arange(group.n)[:, None]
    near = group.domain[:, None] == group.domain[None, :]
    carrier = group.relay[:, group.domain]
    return np.where(near | (carrier == np.arange(group.n)[None, :]), source, carrier)


ALL_TO_ALL = {
    "pairwise": Collective(pairwise_all_to_all),
    "one_sided": Collective(pairwise_all_to_all, meets="each"),
    "hierarchical": Collective(
        hierarchical_all_to_all, deduplicated=deduplicated_all_to_all, last_hop=over_the_rail
    ),
    "low_latency": Collective(low_latency_all_to_all, meets="each"),
}
