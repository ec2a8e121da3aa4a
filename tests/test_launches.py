"""What of a kernel's price is launching it."""

from __future__ import annotations

import numpy as np
import pytest
from scenarios import single_server, table, tiny, trace_of

from clustersim.physics.kernels import KERNELS as FAMILIES
from clustersim.physics.kernels import basis_of
from clustersim.physics.launches import launch_seconds
from clustersim.plan.stepgraph import KERNELS, Call
from clustersim.spec.gpus import gpu_named

ROWS = 3


def call(kernel: str, batch: float) -> Call:
    """A call of a fixed shape with a batch of that size."""
    grows = ("counts", *FAMILIES[kernel].batch)
    sizes = {name: batch if name in grows else 128.0 for name in KERNELS[kernel]}
    return Call(
        kernel, "bf16", {n: np.full((ROWS, 4) if n == "counts" else ROWS, v) for n, v in sizes.items()}
    )


@pytest.mark.parametrize("gpu", ["a100_sxm", "h100_sxm", "mi300x"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_launch_that_does_not_grow_with_its_batch(kernel: str, gpu: str) -> None:
    card = gpu_named(gpu)
    basis = basis_of(FAMILIES[kernel], card, "bf16")
    small, large = (launch_seconds(call(kernel, batch), card, basis) for batch in (16.0, 4096.0))
    assert small.shape == (ROWS,)
    assert (small > 0).all()
    assert (small < 1e-3).all()
    assert np.allclose(small, large)


def test_where_nothing_was_measured_the_launch_is_the_gpus() -> None:
    prices = table(trace_of(tiny(single_server(2, launch=3e-6))), "prices")
    assert np.allclose(prices["launch"], 3e-6 * prices["count"])


def test_launches_are_part_of_what_was_priced() -> None:
    skewed = tiny(single_server(2, launch=3e-6), gating={"skew": "zipf", "exponent": 1.0})
    prices = table(trace_of(skewed), "prices")
    assert (prices["launch"] <= prices["seconds"] * (1 + 1e-12)).all()
