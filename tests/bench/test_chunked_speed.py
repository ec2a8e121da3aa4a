"""What a chunk costs, and how far chunks are from the fluid. Run: pytest tests/bench --benchmark-only -s"""

from __future__ import annotations

import numpy as np
import pytest
from test_chunked import Case

from clustersim.physics.chunked import Queues


@pytest.mark.parametrize("switching", ["store_and_forward", "cut_through"])
@pytest.mark.parametrize(("queueing", "window"), [("fair", 2), ("fifo", 2), ("fifo", 1_000_000)])
def test_cost_of_a_chunk_and_distance_from_the_fluid(benchmark, queueing, window, switching):
    cases = [Case(seed) for seed in range(200)]
    queues = Queues(queueing, switching, window)
    print(f"\n{queueing}, {switching}, window {window}: makespan against the fluid, 200 random cases")
    for served in (2_500, 10_000):
        errors = np.array([case.makespan_error(served, queues) for case in cases])
        median, over = np.median(errors), np.count_nonzero(errors > 0.02)
        print(f"{served:,} services: median {median:.3%}, worst {errors.max():.1%}, {over} over 2 %")
    benchmark.pedantic(lambda: cases[0].ends(100_000, queues), rounds=3, iterations=1)
    benchmark.extra_info["us_per_service"] = round(benchmark.stats.stats.min * 10, 2)
