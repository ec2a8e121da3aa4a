"""Operator → seconds: a roofline whose matrix products cost whole waves of tiles.

Data-sheet rates, nothing fitted: the times are bounds a real kernel only approaches.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from clustersim.plan.stepgraph import Call, Operator
from clustersim.spec.hardware import Gpu
from clustersim.spec.model import rate_format

#: ways a library may cut the inner dimension when tiles alone leave SMs idle
SPLITS = (1, 2, 4, 8, 16)
#: least inner dimension per part: one k-step of the tensor cores' main loop.
#: Source: a guess, after the 64-deep k tiles of CUTLASS's Hopper kernels.
LEAST_DEPTH = 64


def product_seconds(rows: np.ndarray, columns: np.ndarray, depth: int, gpu: Gpu, fmt: str) -> np.ndarray:
    """Arithmetic time of a (grouped) matrix product on each rank, for the best tile and split.

    rows     [R, g] rows of each product: tokens
    columns  [R] the same for a rank's products
    depth    inner dimension
    fmt      number format, a key of gpu.flop_rate
    Returns  float64[R] seconds; the last wave occupies all SMs even when one tile is left
    Source   roofline: Williams, Waterman, Patterson, CACM 52(4), 2009; tiles and waves: NVIDIA's
             "Matrix Multiplication Background User's Guide"
    """
    rate = gpu.flop_rate[fmt] / gpu.sms
    best = np.full(len(rows), np.inf)
    for tile in gpu.tiles:
        per_group = -(-rows // tile.rows)
        tiles = per_group.sum(axis=1) * -(-columns // tile.columns)
        for split in SPLITS:
            part = ceil(depth / split)
            if split > 1 and part < LEAST_DEPTH:
                break
            waves = -(-(tiles * split) // gpu.sms)
            best = np.minimum(best, waves * (2.0 * tile.rows * tile.columns * part / rate))
    return best


def price(op: Operator, gpu: Gpu) -> np.ndarray:
    """Time of a compute operator on each rank, alone on its GPU.

    Returns  float64[R] seconds: the longer of arithmetic and HBM traffic, plus the launch
    """
    call = op.call
    assert call is not None, f"{op.name} is no kernel"
    fmt = rate_format(call.format, gpu.flop_rate)
    least = op.flop / gpu.flop_rate[fmt]
    product = _product(call)
    # Waves of tiles can only cost more than the FLOP themselves; rounding must not undercut that.
    arithmetic = least if product is None else np.maximum(product_seconds(*product, gpu, fmt), least)
    return np.asarray(np.maximum(arithmetic, op.bytes / gpu.memory_bandwidth) + gpu.launch_latency)


def _product(call: Call) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Rows, columns and depth of a kernel that is a (grouped) matrix product."""
    c = call.columns
    if call.kernel == "gemm":
        return c["m"][:, None], c["n"], int(c["k"][0])
    if call.kernel == "expert_up":
        return c["counts"], c["inter"] * (1 + c["gated"]), int(c["hidden"][0])
    if call.kernel == "expert_down":
        return c["counts"], c["hidden"], int(c["inter"][0])
    return None
