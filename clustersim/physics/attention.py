"""How long attention takes: MHA and GQA, prompts (chunked or whole) and one new token per sequence.

*Prefill*: the new tokens of every sequence and query head are cut into tiles of rows. A tile walks
along all keys up to its diagonal; per key it costs two matrix products and an exponential. Tiles fill the
SMs in waves. With a causal mask the last tile of a sequence walks farthest; when it begins late, the GPU
waits for it.

*Decode*: there is a work item for every sequence and KV head. It reads its keys and values once for all
query heads of the group. Items that are too few for the SMs cut their KV into parts, whose results are put
together in the end. Long KV runs at the speed of HBM, that which the last call left in the L2 faster.

Batches are described by sums over their sequences, and sums are what most of the time depends on. Tiles are
those of sequences of equal length. The longest tile is judged by the mean row of the batch, in which long
sequences have their weight. The KV of a decode step is cut as if sequences were equal: one that is much
longer than the others, and that a kernel does not cut finer, is priced too low.

Source   FlashAttention-2 and -3 (arXiv 2307.08691, 2407.08608): tiles, causal masks, exponentials that the
         products do not hide; Flash-Decoding (pytorch.org/blog/flash-decoding): parts of the KV. The
         parameters are fitted to measured calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from clustersim.physics.calibration import Columns, Kernel
from clustersim.spec.formats import flop_rate_of
from clustersim.spec.hardware import Gpu

#: Keys a tile takes at a time. Source: FlashAttention-3, head dimension 128.
KEYS = 128.0
#: Rows of a tile are a multiple of these: those of four warps. Source: mma.m16n8k16, wgmma.m64, PTX ISA.
WARPS_ROWS = 64
#: Exponentials per clock of an SM. Source: CUDA C++ Programming Guide, throughput of native arithmetic
#: instructions, compute capability 8.0 and 9.0; of Blackwell a guess.
EXPONENTIALS = 16.0
#: Hz of an SM and bytes of L2 where the data sheet in the catalogue states none: guesses, as the H100's.
CLOCK = 1.755e9
L2 = 50e6
#: Bytes of an activation that comes from a product or goes into one.
WIDE = 2.0
#: How sharply the longest of latency, memory and arithmetic hides the others.
#: Exponent of their norm, a guess.
SHARPNESS = 4.0
#: Share of the L2 that keeps KV for the next reader. Source: fits of decode on A100, H100 and B200.
CACHE = 0.8
#: How sharply reads fall out of the L2 once the KV outgrows it. A guess: LRU keeps nothing of a loop that
#: is longer than the cache.
OUTGROWN = 4.0
#: Query rows the products are padded to in decode. Source: the least rows of mma.m16n8k16, PTX ISA.
PADDED = 16.0
#: Octaves that set kernels of other code apart: those for MHA, which has no group of query heads to pack
#: into rows, and those for a narrow KV cache. A convention: other code tells little about a kernel.
OTHER_CODE = 3.0

BATCH = ("sequences", "tokens", "pairs", "context")
HEADS = ("heads", "kv_heads", "head_dim", "kv_bytes")


@dataclass(frozen=True, slots=True)
class PrefillParameters:
    """What a library's prefill attention reaches on one GPU.

    launch       s of all its launches, before the first and after the last tile
    quantise     s more to bring bf16 queries to the format of a narrow KV cache
    traffic      share of the HBM bandwidth at which the numbers of new tokens pass, counted once, though a
                 kernel before the attention may rotate them and write them to the cache
    reach        share of the data sheet's FLOP/s that the products alone reach
    softmax      share of the exponentials' time that the products do not hide
    rows         query rows of a tile, a multiple of 64: what tensor cores of a block of four warps take
    tile         s of a tile beside its keys: prologue, epilogue, first bytes
    narrow_tile  the same with a narrow KV cache, times
    waves        share of the last wave that is paid though it is not full; 1: all of it
    longest      share of the way to the end of the longest tile, beyond a mean one, that nothing else fills
    again        with new tokens of other sequences in the same call: bandwidth ÷ that of HBM at which their
                 query heads read KV that others of the group have read before them and the L2 has lost
    """

    launch: float = 11e-6
    quantise: float = 2e-6
    traffic: float = 0.75
    reach: float = 0.85
    softmax: float = 0.8
    rows: float = 128.0
    tile: float = 2e-6
    narrow_tile: float = 2.0
    waves: float = 0.7
    longest: float = 1.0
    again: float = 2.0


@dataclass(frozen=True, slots=True)
class DecodeParameters:
    """What a library's decode attention reaches on one GPU; `lone_` for MHA, whose query heads go alone.

    launch, lone_launch  s of all its launches
    item, lone_item      s of a work item beside its keys
    narrow_item          the same with a narrow KV cache, times
    stream, lone_stream  KV tokens that an SM takes in while its part of the HBM bandwidth brings one of bf16
    chunk, lone_chunk    tokens from which on KV is cut into parts; longer than any: never
    gather               s to put parts together
    narrow_gather        the same with a narrow KV cache, times
    merge                s per part of it
    regroup              s to copy queries and outputs into the order of groups and back
    bandwidth            share of the HBM bandwidth that long KV reaches
    cache                share of the L2 up to which KV stays there from call to call
    cached               bandwidth of the L2 ÷ that of HBM
    cold                 s more that the first reads take from HBM
    reach                share of the data sheet's FLOP/s that the products reach
    """

    launch: float = 5e-6
    lone_launch: float = 7.5e-6
    item: float = 4e-6
    lone_item: float = 1.6e-6
    narrow_item: float = 0.5
    stream: float = 4.0
    lone_stream: float = 2.0
    chunk: float = 200.0
    lone_chunk: float = 300.0
    gather: float = 3e-6
    narrow_gather: float = 0.5
    merge: float = 5e-8
    regroup: float = 1e-7
    bandwidth: float = 0.95
    cache: float = 0.8
    cached: float = 2.0
    cold: float = 6e-6
    reach: float = 0.5


def _narrow(gpu: Gpu, c: Columns) -> np.ndarray:
    """bool[Q] whether the products run in fp8: as soon as the KV cache is no wider, if the GPU can."""
    return np.asarray((c["kv_bytes"] < WIDE) & ("fp8" in gpu.flop_rate))


def _flop_rate(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] FLOP/s of the data sheet."""
    wide = gpu.flop_rate.get("bf16") or flop_rate_of(gpu, form)
    return np.asarray(np.where(_narrow(gpu, c), gpu.flop_rate.get("fp8", wide), wide))


def _flop(c: Columns) -> np.ndarray:
    """float64[Q] FLOP of the pairs that the mask leaves: two products of head_dim each."""
    return np.asarray(4.0 * c["pairs"] * c["heads"] * c["head_dim"])


def _kv_bytes(c: Columns) -> np.ndarray:
    """float64[Q] bytes of all keys and values that are attended to, each once."""
    return np.asarray(2.0 * c["context"] * c["kv_heads"] * c["head_dim"] * c["kv_bytes"])


def attention_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the data sheet's roofline: products, or queries, KV and outputs once over HBM.

    Raises   ClustersimError where the GPU has no such format
    """
    flop_rate_of(gpu, form)
    row = np.where(_narrow(gpu, c), 1.0, WIDE)
    moved = _kv_bytes(c) + 2.0 * row * c["tokens"] * c["heads"] * c["head_dim"]
    return np.asarray(np.maximum(_flop(c) / _flop_rate(gpu, form, c), moved / gpu.memory_bandwidth))


# ---- prefill --------------------------------------------------------------------------------------


def prefill_seconds(gpu: Gpu, form: str, p: PrefillParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of attention over new tokens."""
    at_a_time = _rows(p)
    work = _walk(gpu, form, p, c, _tiles(at_a_time, c), at_a_time)
    return np.asarray(_before(gpu, form, p, c) + _passing(gpu, c) / p.traffic + work)


def _rows(p: PrefillParameters) -> int:
    return WARPS_ROWS * max(round(p.rows / WARPS_ROWS), 1)


def _before(gpu: Gpu, form: str, p: PrefillParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of launches, and of the queries' way to the format of a narrow KV cache."""
    return np.asarray(p.launch + (p.quantise * _narrow(gpu, c) if form == "bf16" else 0.0))


#: float64[Q] tiles of a query head; keys of the mean and of the longest one.
Tiles: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def _tiles(at_a_time: int, c: Columns) -> Tiles:
    """Tiles of sequences of equal length with the sums given.

    The last tile of a sequence walks along all its KV. Those before it end, in the mean, where its mean row
    ends. Sequences with one new token add as much to pairs as to context and so tell nothing about that.
    """
    rows = c["tokens"] / c["sequences"]
    tiles = c["sequences"] * np.ceil(rows / at_a_time)
    depth = (c["pairs"] - c["context"]) / np.maximum(c["tokens"] - c["sequences"], 1.0)
    mean = (c["context"] + (tiles - c["sequences"]) * depth) / tiles
    return tiles, mean, np.maximum(depth + rows / 2, mean)


def _walk(gpu: Gpu, form: str, p: PrefillParameters, c: Columns, some: Tiles, at_a_time: int) -> np.ndarray:
    """float64[Q] s in which all tiles of all query heads are worked off."""
    tiles, mean, longest = some
    key = at_a_time * _pair_seconds(gpu, form, p, c) * gpu.sms
    full = tiles * c["heads"] / gpu.sms
    waves = full + p.waves * (np.ceil(full) - full)
    tile = p.tile * np.where(_narrow(gpu, c), p.narrow_tile, 1.0)
    # Half of the keys that are taken last lie beyond the end.
    return np.asarray(waves * ((mean + KEYS / 2) * key + tile) + p.longest * (longest - mean) * key)


def _pair_seconds(gpu: Gpu, form: str, p: PrefillParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of one query head's pair of query and key, if all SMs work on such."""
    products = 4.0 * c["head_dim"] / (p.reach * _flop_rate(gpu, form, c))
    clock = gpu.boost_clock or CLOCK
    return np.asarray(products + p.softmax / (EXPONENTIALS * clock * gpu.sms))


def _passing(gpu: Gpu, c: Columns) -> np.ndarray:
    """float64[Q] s in which queries, outputs, new keys and values pass HBM once, and all KV once."""
    new = WIDE * c["tokens"] * c["head_dim"] * 2.0 * (c["heads"] + c["kv_heads"])
    return np.asarray((new + _kv_bytes(c)) / gpu.memory_bandwidth)


def prefill_size(c: Columns) -> np.ndarray:
    """float64[Q, 3]: log2 of query heads in the batch, of a sequence's new tokens, and of how much deeper
    its earlier KV makes them."""
    rows = c["tokens"] / c["sequences"]
    deeper = np.maximum(c["pairs"] / c["tokens"] / ((rows + 1.0) / 2), 1.0)
    heads = c["sequences"] * c["heads"]
    return np.stack([np.log2(heads), np.log2(rows), np.log2(deeper)], axis=1)


# ---- both in one call -----------------------------------------------------------------------------


def mixed_seconds(gpu: Gpu, form: str, p: PrefillParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of one call for chunks of prompts and for sequences with one new token.

    A kernel for prompts gives every query head of a new token a tile of its own, in which one row is used.
    The heads of a group then read the same KV one by one; what outgrows the L2 comes from HBM again.
    """
    at_a_time = _rows(p)
    chunks, mean, longest = _tiles(at_a_time, c)
    tiles = chunks + c["decode_sequences"]
    mean = (chunks * mean + c["decode_context"]) / tiles
    alone = c["decode_context"] / np.maximum(c["decode_sequences"], 1.0)
    longest = np.maximum(np.maximum(longest, alone), mean)
    work = _walk(gpu, form, p, c, (tiles, mean, longest), at_a_time)
    new = {**c, "tokens": c["tokens"] + c["decode_sequences"], "context": c["context"] + c["decode_context"]}
    kv = _kv_bytes({**c, "context": c["decode_context"]})
    lost = 1.0 / (1.0 + (CACHE * (gpu.l2 or L2) / np.maximum(kv, 1.0)) ** OUTGROWN)
    again = kv * c["heads"] / c["kv_heads"] * lost / (p.again * gpu.memory_bandwidth)
    return np.asarray(_before(gpu, form, p, c) + _passing(gpu, new) / p.traffic + np.maximum(work, again))


def mixed_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the data sheet's roofline."""
    names = {"tokens": "decode_sequences", "pairs": "decode_context", "context": "decode_context"}
    return attention_least(gpu, form, {**c, **{name: c[name] + c[more] for name, more in names.items()}})


def mixed_size(c: Columns) -> np.ndarray:
    """float64[Q, 5]: log2 of query heads with a chunk, its tokens, how much deeper its earlier KV makes them,
    query heads with one new token, and their KV tokens; 0 for none of either."""
    heads, rows, deeper = prefill_size(c).T
    length = c["decode_context"] / np.maximum(c["decode_sequences"], 1.0)
    more = np.log2(np.maximum(c["decode_sequences"], 1.0) * c["heads"])
    return np.stack([heads, rows, deeper, more, np.log2(np.maximum(length, 1.0))], axis=1)


# ---- decode ---------------------------------------------------------------------------------------


def decode_seconds(gpu: Gpu, form: str, p: DecodeParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of attention of one new token per sequence."""
    lone, narrow = _lone(c), _narrow(gpu, c)
    items = c["sequences"] * c["kv_heads"]
    length = c["context"] / c["sequences"]
    parts = np.maximum(length / np.where(lone, p.lone_chunk, p.chunk), 1.0)
    used = np.minimum(parts, np.maximum(gpu.sms / items, 1.0))
    token = 4.0 * c["head_dim"] * gpu.sms / gpu.memory_bandwidth / np.where(lone, p.lone_stream, p.stream)
    item = np.where(lone, p.lone_item, p.item) * np.where(narrow, p.narrow_item, 1.0)
    latency = np.maximum(items * used / gpu.sms, 1.0) * (item + length / used * token)
    # Whether parts are made is taken from the length alone: a larger batch makes fewer, but is not cheaper.
    gather = p.gather * np.where(narrow, p.narrow_gather, 1.0) * (1.0 - 1.0 / parts)
    gather = gather + p.merge * np.minimum(parts, gpu.sms) * (parts > 1.0)
    regroup = p.regroup * (~lone & (c["kv_heads"] > 1) & (c["sequences"] > 1))
    launch = np.where(lone, p.lone_launch, p.launch)
    work = _longest(latency, _reading(gpu, p, c), _products(gpu, form, p, c))
    return np.asarray(launch + gather + regroup + work)


def _lone(c: Columns) -> np.ndarray:
    """bool[Q] whether each query head has KV of its own."""
    return np.asarray(c["heads"] <= c["kv_heads"])


def _reading(gpu: Gpu, p: DecodeParameters, c: Columns) -> np.ndarray:
    """float64[Q] s in which KV, queries and outputs come from HBM or L2."""
    kv = _kv_bytes(c)
    held = 1.0 / (1.0 + (kv / (p.cache * (gpu.l2 or L2))) ** OUTGROWN)
    moved = kv + 2.0 * WIDE * c["tokens"] * c["heads"] * c["head_dim"]
    slow = moved / (p.bandwidth * gpu.memory_bandwidth)
    return np.asarray(slow * (1.0 - held * (1.0 - 1.0 / p.cached)) + p.cold * (1.0 - held))


def _products(gpu: Gpu, form: str, p: DecodeParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of the products, the rows of a group padded to what tensor cores take."""
    rows = np.maximum(c["heads"] / c["kv_heads"], PADDED)
    flop = 4.0 * c["context"] * c["kv_heads"] * rows * c["head_dim"]
    return np.asarray(flop / (p.reach * _flop_rate(gpu, form, c)))


def _longest(*parts: np.ndarray) -> np.ndarray:
    return np.asarray(sum(part**SHARPNESS for part in parts) ** (1.0 / SHARPNESS))


def decode_size(c: Columns) -> np.ndarray:
    """float64[Q, 2]: log2 of work items and of their KV tokens."""
    items = c["sequences"] * c["kv_heads"]
    return np.stack([np.log2(items), np.log2(c["context"] / c["sequences"])], axis=1)


# ---- both -----------------------------------------------------------------------------------------


def attention_shape(c: Columns) -> np.ndarray:
    """float64[Q, 4]: log2 of query heads per KV head, KV heads, head dimension and bytes of a KV number;
    MHA and a narrow KV cache stand apart by OTHER_CODE.

    Heads stand here and, times sequences, in the size: what a kernel costs follows from how many there are
    in the batch, less from how they are dealt out.
    """
    group = np.where(_lone(c), -OTHER_CODE, np.log2(c["heads"] / c["kv_heads"]))
    width = OTHER_CODE * np.log2(c["kv_bytes"])
    return np.stack([group, np.log2(c["kv_heads"]), np.log2(c["head_dim"]), width], axis=1)


KERNELS = (
    Kernel(
        "attention_prefill",
        (*BATCH, *HEADS),
        PrefillParameters,
        prefill_seconds,
        attention_least,
        attention_shape,
        prefill_size,
        unmeasured=PrefillParameters(),
    ),
    Kernel(
        "attention_decode",
        (*BATCH, *HEADS),
        DecodeParameters,
        decode_seconds,
        attention_least,
        attention_shape,
        decode_size,
        unmeasured=DecodeParameters(),
        # Products are as wide as the KV cache, whatever the model's weights are.
        form="bf16",
    ),
    Kernel(
        "attention_mixed",
        (*BATCH, "decode_sequences", "decode_context", *HEADS),
        PrefillParameters,
        mixed_seconds,
        mixed_least,
        attention_shape,
        mixed_size,
        unmeasured=PrefillParameters(),
        form="bf16",
    ),
)
