"""Load and wait of the logical experts of every layer, as a map: their copies taken together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.analysis.columns import ratio
from clustersim.analysis.latency import numbers
from clustersim.trace.record import Trace


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMap:
    """What came to experts over the run, by layer and expert.

    layers  int64[L] numbers of the layers that have experts; experts 0 to E - 1 are columns
    tokens  float64[L, E]
    load    float64[L, E] tokens ÷ the mean of the layer's experts; 0 where none came to the layer
    wait    float64[L, E] s that a token stood in the queue, mean over its tokens; NaN where none came
    """

    layers: np.ndarray
    tokens: np.ndarray
    load: np.ndarray
    wait: np.ndarray


def expert_map(trace: Trace) -> ExpertMap | None:
    """The map of a run; None where no expert was at work."""
    table = trace.tables["experts"]
    expert = numbers(table, "expert").astype(np.int64)
    if not len(expert):
        return None
    layers, row = np.unique(numbers(table, "layer"), return_inverse=True)
    # Ranks that share an expert work on the same tokens; their shares of a load are alike.
    shape = len(layers), int(expert.max()) + 1
    place = row * shape[1] + expert
    sums = {
        name: np.bincount(place, weights=numbers(table, name), minlength=shape[0] * shape[1]).reshape(shape)
        for name in ("tokens", "wait")
    }
    mean = sums["tokens"].mean(axis=1, keepdims=True)
    wait = np.where(sums["tokens"] > 0, ratio(sums["wait"], sums["tokens"]), np.nan)
    load = ratio(sums["tokens"], np.broadcast_to(mean, shape))
    return ExpertMap(layers.astype(np.int64), sums["tokens"], load, wait)
