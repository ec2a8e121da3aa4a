"""Dense matrix products: waves of output tiles over the SMs, or their bytes over HBM.

Source   tiles and waves: NVIDIA's "Matrix Multiplication Background User's Guide"; roofline: Williams,
         Waterman, Patterson, CACM 52(4), 2009. The parameters are fitted, see catalogue/kernels.toml.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.physics.calibration import Columns, Kernel
from clustersim.spec.formats import flop_rate_of
from clustersim.spec.hardware import Gpu
from clustersim.spec.model import FORMAT_BYTES

#: Output tiles (rows, columns) a library chooses from. Source: common CUTLASS tiles for Hopper (a guess
#: about what each library holds).
TILES = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
#: Parts into which the inner dimension may be cut when tiles alone leave SMs idle (split-K, stream-K),
#: and the least depth of a part. Guesses, after CUTLASS.
SPLITS = (1, 2, 4, 8, 16)
LEAST_DEPTH = 128.0
#: s: of a product this long, half of what throttling takes in the end is taken. A guess: what the power
#: controller of a GPU reacts in.
THROTTLED_AFTER = 1e-3
#: Bytes of an activation before it is quantised, and of a result.
WIDE = 2.0
#: Bytes of a partial sum, written and read again. fp32.
PARTIAL = 8.0


@dataclass(frozen=True, slots=True)
class GemmParameters:
    """What a library's matrix products reach on one GPU in one format.

    launch      s before the first and after the last tile
    reach       share of the data sheet's FLOP/s that large tiles reach, before throttling
    bandwidth   share of the data sheet's HBM bandwidth that is reached
    in_flight   bytes that could have been moved while the first ones are on their way
    overlap     how sharply the longer of arithmetic and bytes hides the other: exponent of their norm
    depth       inner dimension that costs as long as a tile's head and tail
    small_tile  how much slower a tile of 128 x 128 is than an endless one, for want of operands
    last_wave   share of the last wave that is paid though it is not full; 1: all of it
    throttle    by how much power throttling lengthens very long products
    stream      how many times its even share of the HBM bandwidth one SM can read by itself
    parts       into how many at most the inner dimension is cut; 1 where a library never does
    quantise    HBM passes over the activations to bring them into a narrow format; 0 for bf16
    """

    launch: float = 3e-6
    reach: float = 0.8
    bandwidth: float = 0.8
    in_flight: float = 2e6
    overlap: float = 3.0
    depth: float = 100.0
    small_tile: float = 0.1
    last_wave: float = 0.6
    throttle: float = 0.05
    stream: float = 3.0
    parts: float = 16.0
    quantise: float = 1.0


def gemm_seconds(gpu: Gpu, form: str, p: GemmParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of products [m, k] x [k, n]."""
    m, n, k = c["m"], c["n"], c["k"]
    arithmetic = _arithmetic(gpu, form, p, m, n, k)
    moved = (least_bytes(form, c) / p.bandwidth + p.in_flight) / gpu.memory_bandwidth
    hidden = (arithmetic**p.overlap + moved**p.overlap) ** (1.0 / p.overlap)
    throttled = 1.0 + p.throttle * arithmetic / (arithmetic + THROTTLED_AFTER)
    narrow = FORMAT_BYTES[form]
    quantised = 0.0 if narrow >= WIDE else p.quantise * (WIDE + narrow) * m * k / gpu.memory_bandwidth
    return np.asarray(p.launch + hidden * throttled + quantised)


def _arithmetic(
    gpu: Gpu, form: str, p: GemmParameters, m: np.ndarray, n: np.ndarray, k: np.ndarray
) -> np.ndarray:
    """Time of the best tile and split. Each grows with m, so their least does, too."""
    rate = p.reach * flop_rate_of(gpu, form) / gpu.sms
    fed = FORMAT_BYTES[form] * gpu.sms / (p.stream * gpu.memory_bandwidth)
    best = np.full(len(m), np.inf)
    for rows, columns in TILES:
        intensity = 1.0 + p.small_tile * 128.0 * (rows + columns) / (2.0 * rows * columns)
        multiplied = 2.0 * rows * columns * intensity / rate
        tiles = np.ceil(m / rows) * np.ceil(n / columns)
        for split in (split for split in SPLITS if split < p.parts + 0.5):
            full = tiles * (split / gpu.sms)
            waves = np.maximum(1.0, p.last_wave * np.ceil(full) + (1.0 - p.last_wave) * full)
            # One step along k: the tile's arithmetic, or its operands' way into the SM.
            step = np.maximum(multiplied, fed * (np.minimum(m, rows) + columns))
            taken = waves * (k / split + p.depth) * step
            if split > 1:
                taken += (split * PARTIAL / (p.bandwidth * gpu.memory_bandwidth)) * m * n
                taken[k < split * LEAST_DEPTH] = np.inf
            np.minimum(best, taken, out=best)
    return best


def least_bytes(form: str, c: Columns) -> np.ndarray:
    """float64[Q] bytes that must cross HBM: both operands and the result, each once."""
    m, n, k = c["m"], c["n"], c["k"]
    return np.asarray(FORMAT_BYTES[form] * (n * k + m * k) + WIDE * m * n)


def gemm_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the data sheet's roofline."""
    flop = 2.0 * c["m"] * c["n"] * c["k"] / flop_rate_of(gpu, form)
    return np.asarray(np.maximum(flop, least_bytes(form, c) / gpu.memory_bandwidth))


def gemm_shape(c: Columns) -> np.ndarray:
    """float64[Q, 2]: log2 of n and k."""
    return np.asarray(np.log2(np.stack([c["n"], c["k"]], axis=1)))


def gemm_size(c: Columns) -> np.ndarray:
    """float64[Q, 1]: log2 of m."""
    m: np.ndarray = np.log2(c["m"])
    return m[:, None]


KERNELS = (
    Kernel(
        "gemm", ("m", "n", "k"), GemmParameters, gemm_seconds, gemm_least, gemm_shape, gemm_size, batch=("m",)
    ),
)
