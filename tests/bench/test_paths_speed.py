"""How long a thousand GPUs take to find their paths. Run: pytest tests/bench --benchmark-only"""

from __future__ import annotations

import numpy as np

from clustersim.plan.paths import Paths
from clustersim.plan.topology import build
from clustersim.study.run import find, load


def test_paths_of_a_thousand_gpus(benchmark):
    spec = load(find("workloads/moe_1024.toml")).topology
    keys = np.random.default_rng(0).choice(1024**2, 130_000, replace=False)
    source, target = np.divmod(keys, 1024)
    table = benchmark(lambda: Paths(build(spec)).between(source, target))
    assert table.links.shape == (130_000, 6)
