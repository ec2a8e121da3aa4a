"""Kernels that only move numbers: norms, rotary, activations, residual sums, look-ups, permutes, sampling.

They do next to no arithmetic. Their time is a launch, and then the longer of two: the wait of one row's
thread block, which rules as long as rows are few, and all bytes over the bandwidth reached. What they move
often lies in L2 from the kernel before, or may stay there for the next, so there are two speeds. Columns:

    tokens  rows worked on: a thread block takes one; for norms over heads, tokens x heads
    bytes   read and written over all rows, wherever they lie

Bytes per token, with b bytes to a number of an activation: norm 2 b hidden, with the residual sum fused in
4 b hidden; rotary 2 b (heads + kv_heads) head_dim; activation 3 b inter, without a gate 2 b inter; residual
3 b hidden; embedding 2 b hidden; permute, unpermute what is read and written, copies included; top_k what is
read and chosen; sampling 8 vocab, logits as float32 written and read.

Source   that few rows cannot fill the memory's pipeline: Little's law, J. Little, Operations Research 9(3),
         1961. The parameters are fitted, see catalogue/kernels.toml.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.physics.calibration import Columns, Kernel
from clustersim.spec.hardware import Gpu

#: How sharply the wait of one row gives way to bandwidth: exponent of their norm; and how sharply L2 gives
#: way to HBM as bytes grow. Guesses; 2 to 6 fit the measured kernels as well.
BEND = 4.0
EDGE = 4.0


@dataclass(frozen=True, slots=True)
class MoveParameters:
    """What sets one such kernel of one GPU apart.

    The values here hold where nothing was measured. launch, bandwidth: mem_op_constant_latency and
    mem_bw_efficiency, rules of thumb of ai-dynamo/aiconfigurator@095f58a5 systems/h100_sxm.yaml; row, near,
    resident: nothing is gained from L2 and nothing lost to waiting.

    launch     s from start to end of a kernel with nothing to do
    row        bytes/s at which one thread block works through its row while others do not hold it up
    bandwidth  share of the data sheet's HBM bandwidth that is reached
    near       how many times faster bytes are moved that lie in L2; 1 and more
    resident   bytes of a call of which half lie in L2, as a multiple of its capacity
    """

    launch: float = 3e-6
    row: float = 1e12
    bandwidth: float = 0.8
    near: float = 1.0
    resident: float = 1.0


def move_seconds(gpu: Gpu, form: str, p: MoveParameters, c: Columns) -> np.ndarray:
    """float64[Q] s; the format plays no part, for bytes are given."""
    moved = c["bytes"]
    traffic = moved / (p.bandwidth * gpu.memory_bandwidth)
    if gpu.l2:
        in_l2 = 1.0 / (1.0 + (moved / (p.resident * gpu.l2)) ** EDGE)
        traffic = traffic * (1.0 - in_l2 * (1.0 - 1.0 / p.near))
    wait = moved / np.maximum(c["tokens"], 1.0) / p.row
    return np.asarray(p.launch + (wait**BEND + traffic**BEND) ** (1.0 / BEND))


def move_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s that HBM needs for the bytes that no L2 can spare it.

    At most one L2 full of what is read can be there from before, and one of what is written stay there.
    """
    spared = 2.0 * (gpu.l2 or 0.0)
    return np.asarray(np.maximum(c["bytes"] - spared, 0.0) / gpu.memory_bandwidth)


def move_shape(c: Columns) -> np.ndarray:
    """float64[Q, 1]: log2 of the bytes of a row; of calls without rows 0."""
    return np.log2(np.maximum(c["bytes"] / np.maximum(c["tokens"], 1.0), 1.0))[:, None]


def move_size(c: Columns) -> np.ndarray:
    """float64[Q, 1]: log2 of the rows; of calls without rows 0."""
    return np.log2(np.maximum(c["tokens"], 1.0))[:, None]


def _kernel(name: str) -> Kernel:
    return Kernel(
        name,
        ("tokens", "bytes"),
        MoveParameters,
        move_seconds,
        move_least,
        move_shape,
        move_size,
        unmeasured=MoveParameters(),
        batch=("tokens", "bytes"),
        form="bf16",
    )


_NAMES = (
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
#: All were timed on numbers in bf16; bytes are given, so that no other format needs a table of its own. Of
#: permute, unpermute and top_k nobody measured any.
KERNELS = tuple(_kernel(name) for name in _NAMES)
