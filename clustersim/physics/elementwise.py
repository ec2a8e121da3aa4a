"""Kernels that only move numbers: norms, rotary, activations, residual sums, look-ups, permutes, sampling.

They do next to no arithmetic, so their time is a launch, the wait of one row's thread block, and bytes over
the bandwidth reached. What they move often lies in L2 from the kernel before, hence two speeds.

Columns of every kernel here:

    tokens  rows worked on: a thread block takes one; for norms over heads, tokens x heads
    bytes   read and written, over all rows, wherever they lie

Bytes per token, by kernel, with b bytes per number of an activation:

    norm        2 b hidden; with the residual sum fused in 4 b hidden
    rotary      2 b (heads + kv_heads) head_dim: turned in place
    activation  3 b inter: gate and up read, their product written; 2 b inter without a gate
    residual    3 b hidden
    embedding   2 b hidden
    permute, unpermute  what is read and written, copies included
    top_k       b experts
    sampling    10 vocab: logits read as bf16, written and read again as float32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from clustersim.spec.hardware import Gpu

#: Column → float64[Q].
Columns: TypeAlias = Mapping[str, np.ndarray]

KERNELS = (
    "norm",
    "rotary",
    "activation",
    "residual",
    "embedding",
    "permute",
    "unpermute",
    "top_k",
    "sampling",
)

#: How sharply the wait of one row gives way to bandwidth, and L2 to HBM; both guesses, chosen once by the
#: fit over all tables.
_BEND = 4.0
_EDGE = 4.0


@dataclass(frozen=True, slots=True)
class Parameters:
    """What sets one kernel of one GPU apart.

    launch    s from start to end of a kernel that has nothing to do
    row       bytes/s at which one thread block works through its row, all others idle
    share     of the HBM bandwidth on the data sheet that long kernels reach
    near      how many times faster than that they are while their bytes lie in L2; 1 and more
    resident  bytes moved at which half of them come from HBM
    """

    launch: float
    row: float
    share: float
    near: float
    resident: float


#: Where nothing was measured. launch, share: rules of thumb of ai-dynamo/aiconfigurator@095f58a5
#: systems/h100_sxm.yaml (mem_op_constant_latency, mem_bw_efficiency); nothing is known of rows and L2.
UNMEASURED = Parameters(launch=3e-6, row=1e12, share=0.8, near=1.0, resident=1.0)


def seconds(gpu: Gpu, number_format: str, p: Parameters, c: Columns) -> np.ndarray:
    """Time of each call.

    number_format  plays no part: bytes are given
    Returns        float64[Q] s: at few rows the wait of one, at many their bytes over the bandwidth reached
    """
    far = p.share * gpu.memory_bandwidth
    in_l2 = 1.0 / (1.0 + (c["bytes"] / p.resident) ** _EDGE)
    traffic = c["bytes"] * (in_l2 / p.near + 1.0 - in_l2) / far
    wait = c["bytes"] / np.maximum(c["tokens"], 1.0) / p.row
    longer = (wait**_BEND + traffic**_BEND) ** (1.0 / _BEND)
    return np.asarray(p.launch + longer)


def shape(c: Columns) -> np.ndarray:
    """float64[Q, 1] log2 of the bytes of a row: what a model's width sets."""
    return np.log2(c["bytes"] / c["tokens"])[:, None]


def size(c: Columns) -> np.ndarray:
    """float64[Q, 1] log2 of the rows."""
    return np.log2(c["tokens"])[:, None]
