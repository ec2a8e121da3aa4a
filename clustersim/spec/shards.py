"""How many sequences of a batch each shard gets."""

from __future__ import annotations

from math import gcd

import numpy as np

from clustersim.seeds import stream
from clustersim.spec.workload import Workload


def sequences_per_shard(workload: Workload, shards: int, seed: int) -> np.ndarray:
    """The sequences of a batch that each shard holds, int64[shards]; their sum is `sequences`.

    With `shard_skew` they follow lognormal shares, rounded by largest remainders. The draws do not depend
    on the skew: a larger one fills the same shards, only more so.
    """
    unit = _unit(workload)
    units = workload.sequences // unit
    weight = np.ones(shards)
    if workload.shard_skew:
        normal = stream(seed, "workload", "shards").standard_normal(shards)
        weight = np.exp(workload.shard_skew * (normal - normal.max()))
    wish = weight / weight.sum() * units
    found = np.floor(wish).astype(np.int64)
    left = units - int(found.sum())
    found[np.argsort(found - wish, kind="stable")[:left]] += 1
    return np.asarray(found * unit)


def _unit(workload: Workload) -> int:
    """Sequences that are dealt together, so that microbatches stay even: decode steps need as many
    sequences in each; prompts may be cut, where their tokens divide."""
    parts = workload.microbatches
    return parts // gcd(parts, workload.prompt_tokens) if workload.phase == "prefill" else parts
