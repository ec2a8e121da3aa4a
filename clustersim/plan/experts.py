"""Which rank holds which expert copy.

A layer's copies stand in C = EP * slots places: copy c is held by EP rank c // slots. A policy fills
the places with logical experts; `copy_choice` spreads each source rank's tokens over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clustersim.errors import pick
from clustersim.plan import packing, swapping
from clustersim.seeds import stream
from clustersim.spec.deployment import Deployment, Experts


@dataclass(frozen=True, slots=True, eq=False)
class Where:
    """What a policy may know beside the load.

    seed     the scenario's
    domain   int[EP] NVLink domain of each rank of an EP group
    groups   groups of experts that the model's router chooses among; 0: none
    routed   int[.] layers that have experts; None: all
    """

    seed: int
    domain: np.ndarray
    groups: int
    routed: np.ndarray | None = None

    @classmethod
    def anywhere(cls, ranks: int, seed: int = 0) -> Where:
        """One NVLink domain, and a model without groups."""
        return cls(seed, np.zeros(ranks, dtype=np.int64), 0)

    def nodes(self) -> int:
        """NVLink domains, if all hold equally many of the ranks; else 1."""
        held = np.unique(self.domain, return_counts=True)[1]
        return len(held) if np.ptp(held) == 0 else 1


Policy = Callable[[np.ndarray, int, Experts, Where], np.ndarray]


def contiguous(load: np.ndarray, ranks: int, wish: Experts, where: Where) -> np.ndarray:
    """Experts in order: the first E / EP on the first rank, and so on.

    load     float64[L, E] tokens each expert is expected to get; ignored here
    ranks    EP
    Returns  int32[L, C] logical expert in each place
    """
    layers, experts = load.shape
    return np.tile(np.arange(experts, dtype=np.int32), (layers, 1))


def round_robin(load: np.ndarray, ranks: int, wish: Experts, where: Where) -> np.ndarray:
    """Experts dealt out like cards: expert e on rank e % EP. Shapes as in `contiguous`."""
    layers, experts = load.shape
    one_layer = np.arange(experts, dtype=np.int32).reshape(-1, ranks).T.ravel()
    return np.tile(one_layer, (layers, 1))


def random(load: np.ndarray, ranks: int, wish: Experts, where: Where) -> np.ndarray:
    """Experts shuffled anew in every layer, each once. Shapes as above."""
    layers, experts = load.shape
    return np.stack([stream(where.seed, "placement", layer).permutation(experts) for layer in range(layers)])


def replicated(load: np.ndarray, ranks: int, wish: Experts, where: Where) -> np.ndarray:
    """`per_gpu` places on every rank, filled with experts 0, 1, … over and over. Shapes as above."""
    layers, experts = load.shape
    return np.tile((np.arange(ranks * wish.per_gpu) % experts).astype(np.int32), (layers, 1))


def explicit(load: np.ndarray, ranks: int, wish: Experts, where: Where) -> np.ndarray:
    """The places as the scenario lists them, for every layer or for all alike. Shapes as above."""
    rows = wish.slots_by_layer or [[expert for held in wish.slots for expert in held]]
    listed = np.array(rows, dtype=np.int32)
    if len(listed) == 1:
        return np.tile(listed, (len(load), 1))
    # Rows of the layers with experts alone; the others ask for none.
    found = np.repeat(listed[:1], len(load), axis=0)
    found[where.routed if len(listed) < len(load) else slice(None)] = listed
    return found


def balanced(load: np.ndarray, ranks: int, wish: Experts, where: Where) -> np.ndarray:
    """Every expert once, the most popular first onto the least loaded rank. Shapes as above."""
    return packing.balanced(load, ranks)


def eplb(load: np.ndarray, ranks: int, wish: Experts, where: Where) -> np.ndarray:
    """Further copies of whatever bears most, packed onto any rank. Shapes as above."""
    return packing.eplb(load, _places(load, ranks, wish), 1, 1, ranks)


def eplb_hierarchical(load: np.ndarray, ranks: int, wish: Experts, where: Where) -> np.ndarray:
    """Groups packed onto NVLink domains, then copies of whatever bears most in each. Shapes as above.

    As published it is the global policy where the domains do not divide the groups or are not of one size.
    """
    nodes, places = where.nodes(), _places(load, ranks, wish)
    groups = max(where.groups, 1)
    found = packing.eplb(load, places, groups, nodes, ranks)
    if groups % nodes:
        return found
    # It names ranks node by node; ours stand in the order of the EP group.
    by_node = np.argsort(np.argsort(where.domain, kind="stable"))
    return found.reshape(len(load), ranks, -1)[:, by_node].reshape(len(load), places)


def packed(load: np.ndarray, ranks: int, wish: Experts, where: Where) -> np.ndarray:
    """As `eplb` or `balanced`, and then swaps while they help the busiest rank. Shapes as above."""
    return swapping.packed(load, _places(load, ranks, wish), ranks)


def _places(load: np.ndarray, ranks: int, wish: Experts) -> int:
    return ranks * wish.places_per_rank(load.shape[1], ranks)


def copies_of(load: np.ndarray, deployment: Deployment, where: Where | None = None) -> np.ndarray:
    """The layout of expert copies that the deployment asks for.

    load     float64[L, E] expected tokens per expert
    where    left out: one NVLink domain, no groups, seed 0
    Returns  int32[L, C]; every expert stands in at least one place of every layer
    """
    wish, ranks = deployment.experts, deployment.expert_parallel
    policy = pick(EXPERT_POLICIES, wish.policy, "deployment.experts.policy")
    copies = policy(load, ranks, wish, where or Where.anywhere(ranks)).astype(np.int32)
    covered = [np.unique(row).size for row in np.unique(copies, axis=0)]
    assert all(n == load.shape[1] for n in covered), "an expert stands nowhere"
    return copies


EXPERT_POLICIES: dict[str, Policy] = {
    "contiguous": contiguous,
    "round_robin": round_robin,
    "random": random,
    "replicated": replicated,
    "explicit": explicit,
    "balanced": balanced,
    "eplb": eplb,
    "eplb_hierarchical": eplb_hierarchical,
    "packed": packed,
}
