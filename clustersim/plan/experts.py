"""Which rank holds which expert copy, and which copy serves whose tokens.

A layer's copies stand in C = EP * slots places: copy c is held by EP rank c // slots. A policy fills
the places with logical experts; a copy choice spreads each source rank's tokens over the copies.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clustersim.errors import pick
from clustersim.spec.deployment import Deployment, Experts

Policy = Callable[[np.ndarray, int, Experts], np.ndarray]
CopyChoice = Callable[[np.ndarray, np.ndarray], np.ndarray]


def contiguous(load: np.ndarray, ranks: int, wish: Experts) -> np.ndarray:
    """Experts in order: the first E / EP on the first rank, and so on.

    load     float64[L, E] tokens each expert is expected to get; ignored here
    ranks    EP
    Returns  int32[L, C] logical expert in each place
    """
    layers, experts = load.shape
    return np.tile(np.arange(experts, dtype=np.int32), (layers, 1))


def round_robin(load: np.ndarray, ranks: int, wish: Experts) -> np.ndarray:
    """Experts dealt out like cards: expert e on rank e % EP. Shapes as in `contiguous`."""
    layers, experts = load.shape
    one_layer = np.arange(experts, dtype=np.int32).reshape(-1, ranks).T.ravel()
    return np.tile(one_layer, (layers, 1))


def replicated(load: np.ndarray, ranks: int, wish: Experts) -> np.ndarray:
    """`per_gpu` places on every rank, filled with experts 0, 1, … over and over. Shapes as above."""
    layers, experts = load.shape
    return np.tile((np.arange(ranks * wish.per_gpu) % experts).astype(np.int32), (layers, 1))


def explicit(load: np.ndarray, ranks: int, wish: Experts) -> np.ndarray:
    """The places as the scenario lists them, the same in every layer. Shapes as above."""
    return np.tile(np.array(wish.slots, dtype=np.int32).ravel(), (load.shape[0], 1))


def copies_of(load: np.ndarray, deployment: Deployment) -> np.ndarray:
    """The layout of expert copies that the deployment asks for.

    load     float64[L, E] expected tokens per expert
    Returns  int32[L, C]; every expert stands in at least one place of every layer
    """
    wish = deployment.experts
    policy = pick(EXPERT_POLICIES, wish.policy, "deployment.experts.policy")
    copies = policy(load, deployment.expert_parallel, wish)
    covered = [np.unique(row).size for row in np.unique(copies, axis=0)]
    assert all(n == load.shape[1] for n in covered), "an expert stands nowhere"
    return copies


def every_copy(holds: np.ndarray, near: np.ndarray) -> np.ndarray:
    """All copies of an expert serve all sources alike.

    holds    bool[E, C] place c holds expert e
    near     int[N, C] 0 where source and copy share a rank, 1 a server, 2 neither
    Returns  bool[N, C] copies that may serve source i's tokens
    """
    return np.ones(near.shape, dtype=bool)


def nearest_copy(holds: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Only the nearest copies of an expert serve a source. Shapes as in `every_copy`."""
    may = np.zeros(near.shape, dtype=bool)
    for places in holds:
        distance = near[:, places]
        may[:, places] = distance == distance.min(axis=1, keepdims=True)
    return may


def tokens_per_copy(counts: np.ndarray, copies: np.ndarray, near: np.ndarray, choice: str) -> np.ndarray:
    """Spreads every source's tokens over the copies that may serve it, in turn.

    counts   int[N, E] tokens of source i for expert e
    copies   int[C] logical expert in each place of this layer
    near     int[N, C] as in `every_copy`
    choice   a key of COPY_CHOICES
    Returns  int64[N, C]; row sums per expert are kept
    """
    experts = counts.shape[1]
    if len(copies) == experts:
        return counts[:, copies].astype(np.int64)
    holds = copies[None, :] == np.arange(experts)[:, None]
    may = pick(COPY_CHOICES, choice, "deployment.experts.copy_choice")(holds, near)
    spread = np.zeros(near.shape, dtype=np.int64)
    for expert, places in enumerate(holds):
        open_ = may[:, places]
        ways = open_.sum(axis=1, keepdims=True)
        whole, left = np.divmod(counts[:, expert : expert + 1], ways)
        # Left-over tokens go on where the source before left off, and experts begin at different
        # copies: however few tokens there are, they do not pile up on the first ones.
        begin = expert + np.cumsum(left, axis=0) - left
        turn = (np.cumsum(open_, axis=1) - 1 - begin) % ways
        spread[:, places] = np.where(open_, whole + (turn < left), 0)
    return spread


EXPERT_POLICIES: dict[str, Policy] = {
    "contiguous": contiguous,
    "round_robin": round_robin,
    "replicated": replicated,
    "explicit": explicit,
}
COPY_CHOICES: dict[str, CopyChoice] = {"round_robin": every_copy, "local_first": nearest_copy}
