"""Operator → seconds: a roofline whose matrix products cost whole waves of tiles.

Data-sheet rates, nothing fitted: the times are bounds a real kernel only approaches.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from clustersim.plan.stepgraph import Operator, Product
from clustersim.spec.formats import flop_rate_of
from clustersim.spec.hardware import Gpu

#: ways a library may cut the inner dimension when tiles alone leave SMs idle
SPLITS = (1, 2, 4, 8, 16)
#: least inner dimension per part: one k-step of the tensor cores' main loop.
#: Source: a guess, after the 64-deep k tiles of CUTLASS's Hopper kernels.
LEAST_DEPTH = 64


def product_seconds(product: Product, gpu: Gpu, fmt: str) -> np.ndarray:
    """Arithmetic time of a (grouped) matrix product on each rank, for the best tile and split.

    fmt      number format in which the GPU computes
    Returns  float64[R] seconds; the last wave occupies all SMs even when one tile is left
    Source   roofline: Williams, Waterman, Patterson, CACM 52(4), 2009; tiles and waves: NVIDIA's
             "Matrix Multiplication Background User's Guide"
    """
    rate = flop_rate_of(gpu, fmt) / gpu.sms
    best = np.full(len(product.rows), np.inf)
    for tile in gpu.tiles:
        per_group = -(-product.rows // tile.rows)
        tiles = per_group.sum(axis=1) * -(-product.columns // tile.columns)
        for split in SPLITS:
            depth = ceil(product.depth / split)
            if split > 1 and depth < LEAST_DEPTH:
                break
            waves = -(-(tiles * split) // gpu.sms)
            best = np.minimum(best, waves * (2.0 * tile.rows * tile.columns * depth / rate))
    return best


def price(op: Operator, gpu: Gpu, fmt: str) -> np.ndarray:
    """Time of a compute operator on each rank, alone on its GPU.

    Returns  float64[R] seconds: the longer of arithmetic and HBM traffic, plus the launch
    """
    arithmetic = (
        op.flop / flop_rate_of(gpu, fmt) if op.product is None else product_seconds(op.product, gpu, fmt)
    )
    # Waves of tiles can only cost more than the FLOP themselves; rounding must not undercut that.
    arithmetic = np.maximum(arithmetic, op.flop / flop_rate_of(gpu, fmt))
    return np.asarray(np.maximum(arithmetic, op.bytes / gpu.memory_bandwidth) + gpu.launch_latency)
