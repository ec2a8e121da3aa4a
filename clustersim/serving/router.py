"""Requests → shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clustersim.serving.request import Request

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


ROUTERS: dict[str, Router] = {"round_robin": round_robin, "least_loaded": least_loaded}
