"""Expert layers: two grouped products over unevenly loaded experts, and what moves the rows between them.

A grouped product reads the weights of every expert that has a token and computes whole tiles of rows per
expert, so skew costs nothing while weights are the larger part and all of it once tiles are.

Source   tiles and waves: NVIDIA's "Matrix Multiplication Background User's Guide"; roofline: Williams,
         Waterman, Patterson, CACM 52(4), 2009. The parameters are fitted, see catalogue/kernels.toml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from clustersim.physics.calibration import Columns, Kernel
from clustersim.spec.formats import flop_rate_of
from clustersim.spec.hardware import Gpu
from clustersim.spec.model import FORMAT_BYTES

_Seconds: TypeAlias = Callable[[Gpu, str, "ExpertParameters", Columns], np.ndarray]
_Least: TypeAlias = Callable[[Gpu, str, Columns], np.ndarray]

#: Heights of a tile of rows that a library chooses from; the least one is that of a tensor-core
#: instruction. Source: common CUTLASS and DeepGEMM tiles (a guess about what each library holds).
TILE_ROWS = (16, 32, 64, 128, 256)
TILE_COLUMNS = 128
#: s: of a layer this long, half of what throttling takes in the end is taken. As in physics.gemm.
THROTTLED_AFTER = 1e-3
#: Passes of an activation over the results of the first product: one read, and one write half as wide after
#: gates.
ACTIVATION_PASSES = 1.5
#: Bytes of a number before it is brought into a narrow format, and of a result.
WIDE = 2.0


@dataclass(frozen=True, slots=True)
class ExpertParameters:
    """What a library's expert layers reach on one GPU in one format.

    launch        s of the layer's kernels without work: sort, permute, two products, activation, unpermute
    per_expert    s for each expert held, with tokens or without: empty tiles, offsets, descriptors
    reach         share of the data sheet's FLOP/s that the largest tiles reach, before throttling
    bandwidth     share of the data sheet's HBM bandwidth at which weights stream in
    overlap       how sharply the longer of arithmetic and bytes hides the other: exponent of their norm
    depth         inner dimension that costs as long as a tile's head and tail
    head_rows     rows that a tile costs beyond its own, for want of operands; the largest tile sets the scale
    last_wave     share of the last wave that is paid though it is not full; 1: all of it
    tuned         how firmly the tile's height follows the even load and not the best one; 1: always
    throttle      by how much power throttling lengthens very long products
    row_passes    times the rows of the experts, at full width, cross HBM: permuted, quantised, reduced
    inner_passes  times the results of the first product do
    token_passes  times the layer's own tokens do
    """

    launch: float = 2.5e-5
    per_expert: float = 1e-8
    reach: float = 0.7
    bandwidth: float = 0.9
    overlap: float = 3.0
    depth: float = 100.0
    head_rows: float = 16.0
    last_wave: float = 0.5
    tuned: float = 0.5
    throttle: float = 0.1
    row_passes: float = 4.0
    inner_passes: float = 2.0
    token_passes: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Load:
    """What the counts of experts say: float64[Q] experts with tokens (below one token: the chance of one),
    rows in all, and row tiles float64[len(TILE_ROWS), Q]."""

    used: np.ndarray
    rows: np.ndarray
    tiles: np.ndarray


def layer_seconds(gpu: Gpu, form: str, p: ExpertParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of whole expert layers on a rank: tokens in, the weighted sum of their experts out."""
    load = _load_of(c["counts"])
    products = sum(_product(gpu, form, p, c, n, k) for n, k in (_up(c), _down(c)))
    moved = p.row_passes * load.rows * c["hidden"] + p.inner_passes * load.rows * _up(c)[0]
    moved = moved + p.token_passes * _tokens(c) * c["hidden"]
    return np.asarray(p.launch + p.per_expert * _held(c) + products + moved * (WIDE / gpu.memory_bandwidth))


def up_seconds(gpu: Gpu, form: str, p: ExpertParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of the first grouped product by itself, [rows, hidden] x [hidden, inter], with gates twice
    as wide, and of bringing its rows into a narrow format."""
    rows = c["counts"].sum(axis=1) * c["hidden"]
    return _alone(gpu, p, c, 0.5 * p.row_passes * rows, _product(gpu, form, p, c, *_up(c)))


def down_seconds(gpu: Gpu, form: str, p: ExpertParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of the second grouped product by itself, [rows, inter] x [inter, hidden], and of bringing
    its rows into a narrow format."""
    rows = c["counts"].sum(axis=1)
    moved = 0.5 * p.row_passes * rows * c["hidden"] + p.inner_passes * rows * _up(c)[0]
    return _alone(gpu, p, c, moved, _product(gpu, form, p, c, *_down(c)))


def activation_seconds(gpu: Gpu, form: str, p: ExpertParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of the activation between the two by itself: its numbers read and written, each once."""
    moved = ACTIVATION_PASSES * c["counts"].sum(axis=1) * _up(c)[0]
    return _alone(gpu, p, c, moved, np.zeros(len(moved)))


def _alone(gpu: Gpu, p: ExpertParameters, c: Columns, moved: np.ndarray, product: np.ndarray) -> np.ndarray:
    """One kernel's launch, half of what a layer pays per expert held, numbers moved, and a product."""
    taken = gpu.launch_latency + 0.5 * p.per_expert * _held(c) + moved * (WIDE / gpu.memory_bandwidth)
    return np.asarray(taken + product)


def share_of(part: str) -> _Seconds:
    """Which share of a whole layer's time a part of it has: up, activation and down share everything that is
    in a layer in proportion to their own work, so that they add up to the measured layer."""

    def share(gpu: Gpu, form: str, p: ExpertParameters, c: Columns) -> np.ndarray:
        work = {
            "up": _product(gpu, form, p, c, *_up(c)),
            "down": _product(gpu, form, p, c, *_down(c)),
            "activation": ACTIVATION_PASSES
            * c["counts"].sum(axis=1)
            * _up(c)[0]
            * (WIDE / gpu.memory_bandwidth),
        }
        return np.asarray(work[part] / sum(work.values()))

    return share


def _product(
    gpu: Gpu, form: str, p: ExpertParameters, c: Columns, n: np.ndarray, k: np.ndarray
) -> np.ndarray:
    load, tuned = _load_of(c["counts"]), _tuned(c)
    rate = p.reach * flop_rate_of(gpu, form) / gpu.sms
    wide = np.ceil(n / TILE_COLUMNS)
    costs = np.empty_like(load.tiles)
    for cost, rows, tiles in zip(costs, TILE_ROWS, load.tiles, strict=True):
        full = tiles * wide / gpu.sms
        waves = p.last_wave * np.ceil(full) + (1.0 - p.last_wave) * full
        slower = (rows + p.head_rows) * (TILE_ROWS[-1] / (TILE_ROWS[-1] + p.head_rows))
        cost[:] = np.maximum(waves, np.minimum(tiles * wide, 1.0)) * slower
    lower = np.minimum(tuned.astype(np.int64), len(TILE_ROWS) - 2)
    at, share = np.arange(len(tuned)), tuned - lower
    chosen = costs[lower, at] ** (1.0 - share) * costs[lower + 1, at] ** share
    best = chosen**p.tuned * costs.min(axis=0) ** (1.0 - p.tuned)
    arithmetic = best * (2.0 * TILE_COLUMNS / rate) * (k + p.depth)
    streamed = FORMAT_BYTES[form] * load.used * n * k / (p.bandwidth * gpu.memory_bandwidth)
    hidden = (arithmetic**p.overlap + streamed**p.overlap) ** (1.0 / p.overlap)
    return np.asarray(hidden * (1.0 + p.throttle * arithmetic / (arithmetic + THROTTLED_AFTER)))


def _load_of(counts: np.ndarray) -> _Load:
    """What counts say, reckoned once while a fit tries parameters on the same array."""
    if not (_LAST and _LAST[0][0] is counts):
        _LAST[:] = [(counts, _reckoned(counts))]
    return _LAST[0][1]


#: The last counts that were asked for and what they say; whoever changes an array in place must ask with
#: another. At most one entry.
_LAST: list[tuple[np.ndarray, _Load]] = []


def _reckoned(counts: np.ndarray) -> _Load:
    whole = np.maximum(counts, 1.0)
    used = np.minimum(counts, 1.0)
    tiles = np.stack([(used * np.ceil(whole / rows)).sum(axis=1) for rows in TILE_ROWS])
    return _Load(used.sum(axis=1), counts.sum(axis=1), tiles)


def _up(c: Columns) -> tuple[np.ndarray, np.ndarray]:
    return c["inter"] * (1.0 + c["gated"]), c["hidden"]


def _down(c: Columns) -> tuple[np.ndarray, np.ndarray]:
    return c["hidden"], c["inter"]


def _tuned(c: Columns) -> np.ndarray:
    """float64[Q] place in TILE_ROWS, between two where it falls between, of the tile that an expert would
    just fill if the load were even: what a library chooses before it knows the load. `even_rows`: its rows
    then, by default the mean of the rank."""
    even = c["even_rows"] if "even_rows" in c else c["counts"].sum(axis=1) / _held(c)
    place = np.log2(np.maximum(even, 1.0) / TILE_ROWS[0])
    return np.asarray(np.clip(place, 0.0, len(TILE_ROWS) - 1.0))


def _held(c: Columns) -> np.ndarray:
    """Experts on the rank: `experts_held`, or as many as `counts` has columns."""
    return (
        c["experts_held"] if "experts_held" in c else np.full(len(c["counts"]), float(c["counts"].shape[1]))
    )


def _tokens(c: Columns) -> np.ndarray:
    """Tokens in the layer's own buffers: `tokens`, or those whose experts are all here."""
    return c["tokens"] if "tokens" in c else c["counts"].sum(axis=1) / c["top_k"]


def layer_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the data sheet's roofline for both products; every weight in use is read once."""
    return _least(gpu, form, c, (_up(c), _down(c)))


def up_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the roofline of the first product."""
    return _least(gpu, form, c, (_up(c),))


def down_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the roofline of the second product."""
    return _least(gpu, form, c, (_down(c),))


def _least(
    gpu: Gpu, form: str, c: Columns, products: tuple[tuple[np.ndarray, np.ndarray], ...]
) -> np.ndarray:
    used, rows = np.minimum(c["counts"], 1.0).sum(axis=1), c["counts"].sum(axis=1)
    least: np.ndarray = np.zeros(len(rows))
    for n, k in products:
        flop = 2.0 * rows * n * k / flop_rate_of(gpu, form)
        least += np.maximum(flop, FORMAT_BYTES[form] * used * n * k / gpu.memory_bandwidth)
    return least


def layer_shape(c: Columns) -> np.ndarray:
    """float64[Q, 3]: log2 of the hidden and inner widths and of the experts on the rank."""
    return np.asarray(np.log2(np.stack([c["hidden"], c["inter"], _held(c)], axis=1)))


def layer_size(c: Columns) -> np.ndarray:
    """float64[Q, 2]: log2 of the rows of all experts, and of the busiest expert's over the mean."""
    rows, busiest = c["counts"].sum(axis=1), c["counts"].max(axis=1)
    even = np.maximum(rows / _held(c), 1.0)
    tiny = 2.0**-10
    skew = np.maximum(busiest / even, 1.0)
    return np.asarray(np.log2(np.stack([np.maximum(rows, tiny), skew], axis=1)))


#: Beside these a call may state what only a benchmark knows better than its counts: `experts_held` (default:
#: as many as counts has columns), `tokens` in the layer's buffers (rows / top_k) and `even_rows`, the rows of
#: an expert under even load (the rank's own mean).
_COLUMNS = ("counts", "hidden", "inter", "gated", "top_k")


def activation_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s: zero, as what is activated may lie in L2."""
    return np.zeros(len(c["counts"]))


def _kernel(name: str, seconds: _Seconds, least: _Least, part: str = "") -> Kernel:
    # Skew may save time, too: the same rows on fewer experts read fewer weights.
    return Kernel(
        name,
        _COLUMNS,
        ExpertParameters,
        seconds,
        least,
        layer_shape,
        layer_size,
        table="experts" if part else "",
        share=share_of(part) if part else None,
        rises=1,
        batch=("counts", "tokens", "even_rows"),
    )


KERNELS = (
    _kernel("experts", layer_seconds, layer_least),
    _kernel("expert_up", up_seconds, up_least, "up"),
    _kernel("expert_activation", activation_seconds, activation_least, "activation"),
    _kernel("expert_down", down_seconds, down_least, "down"),
)
