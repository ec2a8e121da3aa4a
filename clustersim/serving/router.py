"""Requests → shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clustersim.errors import pick
from clustersim.serving.request import Request
from clustersim.spec.shards import sequences_per_shard
from clustersim.spec.workload import Workload

Router = Callable[[Sequence[Request], np.ndarray], list[int]]


def round_robin(requests: Sequence[Request], held: np.ndarray) -> list[int]:
    """The shards in turn.

    held     int64[D] tokens whose KV each shard holds
    Returns  the shard of each request
    """
    return [i % len(held) for i in range(len(requests))]


def least_loaded(requests: Sequence[Request], held: np.ndarray) -> list[int]:
    """Each request to the shard that holds the fewest tokens, ties to the lowest. As `round_robin`."""
    held = held.copy()
    shards = []
    for request in requests:
        shard = int(held.argmin())
        held[shard] += request.prompt_tokens + request.decode_steps
        shards.append(shard)
    return shards


def route(requests: Sequence[Request], held: np.ndarray, workload: Workload, seed: int) -> list[int]:
    """The shard of each request of a batch: what the router says, or, where the sources are ragged, so many
    in a row for each shard as its share is. Arguments as in `round_robin`."""
    if not workload.shard_skew:
        return pick(ROUTERS, workload.router, "workload.router")(requests, held)
    shards: list[int] = np.repeat(
        np.arange(len(held)), sequences_per_shard(workload, len(held), seed)
    ).tolist()
    return shards


ROUTERS: dict[str, Router] = {"round_robin": round_robin, "least_loaded": least_loaded}
