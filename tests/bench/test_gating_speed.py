"""How long gating takes: 4096 tokens on each of 64 ranks, 256 experts, 61 layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from scenarios import tiny

from clustersim.plan.gating import expert_counts
from clustersim.spec.workload import Gating


def test_the_counts_of_a_large_prefill(benchmark: Any) -> None:
    model = tiny(model={"experts": 4, "layers": 61}).model
    model = model.model_copy(update={"experts": 256, "top_k": 8})
    tokens, wish = np.full(64, 4096), Gating(skew="gini", gini=0.2)
    counts = benchmark.pedantic(lambda: expert_counts(tokens, model, wish, 0, 0), rounds=3, iterations=1)
    assert counts.shape == (61, 64, 256)
    assert (counts.sum(axis=2) == 4096 * 8).all() and counts.max() <= 4096
