"""How long attention takes: MHA and GQA, prompts (chunked or whole) and one new token per sequence.

*Prefill*: the new tokens of every sequence and query head are cut into tiles of TILE rows. A tile walks
along all keys up to its diagonal; per key it costs two matrix products and an exponential. Tiles fill the
SMs in waves. With a causal mask the last tile of a sequence walks farthest; when it begins late, the GPU
waits for it.

*Decode*: there is a work item for every sequence and KV head. It reads its keys and values once for all
query heads of the group. Items that are too few for the SMs cut their KV into parts, whose results are put
together in the end. Long KV runs at the speed of HBM, that which the last call left in the L2 faster.

Batches are described by sums over their sequences. Sums of bytes, pairs and tiles are all that long
prompts and decode ask for; what depends on the longest sequence (the tail of a prefill) is taken from the
mean KV length over tokens, pairs / tokens, which gives long sequences their weight; the parts of a decode
step are those of equal sequences.

Source   FlashAttention-2 and -3 (arXiv 2307.08691, 2407.08608): tiles, causal masks, exponentials that the
         products do not hide; Flash-Decoding (pytorch.org/blog/flash-decoding): parts of the KV. The
         parameters are fitted to measured calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.physics.calibration import Columns, Kernel
from clustersim.spec.hardware import Gpu

#: Query rows of a tile, and keys it takes at a time. Source: FlashAttention-3, head dimension 128.
TILE = 128.0
#: Exponentials per clock of an SM. Source: CUDA C++ Programming Guide, throughput of native arithmetic
#: instructions, compute capability 8.0 and 9.0; of Blackwell a guess.
EXPONENTIALS = 16.0
#: Hz of an SM and bytes of L2 where the data sheet in the catalogue states none: guesses, as the H100's.
CLOCK = 1.755e9
L2 = 50e6
#: Bytes of an activation that comes from a product or goes into one.
WIDE = 2.0
#: How sharply the longest of latency, memory and arithmetic hides the others: exponent of their norm. A guess.
SHARPNESS = 4.0
#: How sharply reads fall out of the L2 once the KV outgrows it. A guess: LRU keeps nothing of a loop that
#: is longer than the cache.
OUTGROWN = 4.0
#: Query rows the products are padded to in decode. Source: the least rows of mma.m16n8k16, PTX ISA.
PADDED = 16.0
#: Octaves that set kernels of other code apart: those for MHA, which has no group of query heads to pack
#: into rows, and those for a narrow KV cache. A convention: other code tells little about a kernel.
OTHER_CODE = 3.0

ATTENTION_COLUMNS = (
    "sequences",
    "tokens",
    "pairs",
    "context",
    "heads",
    "kv_heads",
    "head_dim",
    "kv_bytes",
)


@dataclass(frozen=True, slots=True)
class PrefillParameters:
    """What a library's prefill attention reaches on one GPU.

    launch    s of all its launches, before the first and after the last tile
    quantise  s more to bring bf16 queries to the format of a narrow KV cache
    traffic   share of the HBM bandwidth at which the numbers of new tokens pass, counted once, though a
              kernel before the attention may rotate them and write them to the cache
    reach     share of the data sheet's FLOP/s that the products alone reach
    softmax   share of the exponentials' time that the products do not hide
    tile      s of a tile beside its keys: prologue, epilogue, first bytes
    waves     share of the last wave that is paid though it is not full; 1: all of it
    longest   share of the way to the end of the longest tile, beyond a mean one, that nothing else fills
    """

    launch: float = 11e-6
    quantise: float = 2e-6
    traffic: float = 0.75
    reach: float = 0.85
    softmax: float = 0.8
    tile: float = 2e-6
    waves: float = 0.7
    longest: float = 1.0


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


def _flop_rate(gpu: Gpu, c: Columns) -> np.ndarray:
    """float64[Q] FLOP/s of the data sheet."""
    wide = gpu.flop_rate["bf16"]
    return np.where(_narrow(gpu, c), gpu.flop_rate.get("fp8", wide), wide)


def _flop(c: Columns) -> np.ndarray:
    """float64[Q] FLOP of the pairs that the mask leaves: two products of head_dim each."""
    return np.asarray(4.0 * c["pairs"] * c["heads"] * c["head_dim"])


def _kv_bytes(c: Columns) -> np.ndarray:
    """float64[Q] bytes of all keys and values that are attended to, each once."""
    return np.asarray(2.0 * c["context"] * c["kv_heads"] * c["head_dim"] * c["kv_bytes"])


def _or_one(values: np.ndarray) -> np.ndarray:
    """What may stand below a fraction line or in a logarithm where a rank has no work."""
    return np.maximum(values, 1.0)


def attention_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the data sheet's roofline: products, or queries, KV and outputs once over HBM."""
    row = np.where(_narrow(gpu, c), 1.0, WIDE)
    moved = _kv_bytes(c) + 2.0 * row * c["tokens"] * c["heads"] * c["head_dim"]
    return np.maximum(_flop(c) / _flop_rate(gpu, c), moved / gpu.memory_bandwidth)


# ---- prefill --------------------------------------------------------------------------------------


def prefill_seconds(gpu: Gpu, form: str, p: PrefillParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of attention over new tokens; 0 without any."""
    rows = c["tokens"] / _or_one(c["sequences"])
    depth = c["pairs"] / _or_one(c["tokens"])
    mean = depth + np.minimum(rows, TILE) / 2 + TILE / 2
    # The last row sees half a prompt more than the mean one.
    longest = np.maximum(depth + rows / 2 + TILE / 2, mean)
    key = TILE * _pair_seconds(gpu, p, c) * gpu.sms
    full = c["sequences"] * c["heads"] * np.ceil(rows / TILE) / gpu.sms
    waves = full + p.waves * (np.ceil(full) - full)
    work = waves * (mean * key + p.tile) + p.longest * (longest - mean) * key
    taken = p.launch + _passing(gpu, c) / p.traffic + work
    if form == "bf16":
        taken = taken + p.quantise * _narrow(gpu, c)
    return np.where(c["tokens"] > 0, taken, 0.0)


def _pair_seconds(gpu: Gpu, p: PrefillParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of one query head's pair of query and key, if all SMs work on such."""
    products = 4.0 * c["head_dim"] / (p.reach * _flop_rate(gpu, c))
    clock = getattr(gpu, "boost_clock", None) or CLOCK
    return np.asarray(products + p.softmax / (EXPONENTIALS * clock * gpu.sms))


def _passing(gpu: Gpu, c: Columns) -> np.ndarray:
    """float64[Q] s in which queries, outputs, new keys and values pass HBM once, and all KV once."""
    new = WIDE * c["tokens"] * c["head_dim"] * 2.0 * (c["heads"] + c["kv_heads"])
    return np.asarray((new + _kv_bytes(c)) / gpu.memory_bandwidth)


def prefill_size(c: Columns) -> np.ndarray:
    """float64[Q, 4]: log2 of query heads in the batch, of a sequence's new tokens, and of how much deeper
    its earlier KV makes them; the width of the KV."""
    rows = _or_one(c["tokens"] / _or_one(c["sequences"]))
    deeper = c["pairs"] / _or_one(c["tokens"]) / ((rows + 1.0) / 2)
    heads = _or_one(c["sequences"] * c["heads"])
    return np.stack([np.log2(heads), np.log2(rows), np.log2(_or_one(deeper)), _width(c)], axis=1)


# ---- decode ---------------------------------------------------------------------------------------


def decode_seconds(gpu: Gpu, form: str, p: DecodeParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of attention of one new token per sequence; 0 without any."""
    lone, narrow = _lone(c), _narrow(gpu, c)
    items = _or_one(c["sequences"] * c["kv_heads"])
    length = c["context"] / _or_one(c["sequences"])
    parts = _or_one(length / np.where(lone, p.lone_chunk, p.chunk))
    used = np.minimum(parts, _or_one(gpu.sms / items))
    token = 4.0 * c["head_dim"] * gpu.sms / gpu.memory_bandwidth / np.where(lone, p.lone_stream, p.stream)
    item = np.where(lone, p.lone_item, p.item) * np.where(narrow, p.narrow_item, 1.0)
    latency = _or_one(items * used / gpu.sms) * (item + length / used * token)
    # Whether parts are made is taken from the length alone: a larger batch makes fewer, but is not cheaper.
    gather = p.gather * np.where(narrow, p.narrow_gather, 1.0) * np.minimum(parts - 1.0, 1.0)
    gather = gather + p.merge * np.minimum(parts, gpu.sms) * (parts > 1.0)
    regroup = p.regroup * (~lone & (c["kv_heads"] > 1) & (c["sequences"] > 1))
    launch = np.where(lone, p.lone_launch, p.launch)
    taken = launch + gather + regroup + _longest(latency, _reading(gpu, p, c), _products(gpu, p, c))
    return np.where(c["sequences"] > 0, taken, 0.0)


def _lone(c: Columns) -> np.ndarray:
    """bool[Q] whether each query head has KV of its own."""
    return np.asarray(c["heads"] <= c["kv_heads"])


def _reading(gpu: Gpu, p: DecodeParameters, c: Columns) -> np.ndarray:
    """float64[Q] s in which KV, queries and outputs come from HBM or L2."""
    kv = _kv_bytes(c)
    held = 1.0 / (1.0 + (kv / (p.cache * (getattr(gpu, "l2", None) or L2))) ** OUTGROWN)
    moved = kv + 2.0 * WIDE * c["tokens"] * c["heads"] * c["head_dim"]
    slow = moved / (p.bandwidth * gpu.memory_bandwidth)
    return np.asarray(slow * (1.0 - held * (1.0 - 1.0 / p.cached)) + p.cold * (1.0 - held))


def _products(gpu: Gpu, p: DecodeParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of the products, the rows of a group padded to what tensor cores take."""
    rows = np.maximum(c["heads"] / _or_one(c["kv_heads"]), PADDED)
    flop = 4.0 * c["context"] * c["kv_heads"] * rows * c["head_dim"]
    return np.asarray(flop / (p.reach * _flop_rate(gpu, c)))


def _longest(*parts: np.ndarray) -> np.ndarray:
    return np.asarray(sum(part**SHARPNESS for part in parts) ** (1.0 / SHARPNESS))


def decode_size(c: Columns) -> np.ndarray:
    """float64[Q, 3]: log2 of work items and of their KV tokens; the width of the KV."""
    items = _or_one(c["sequences"] * c["kv_heads"])
    length = _or_one(c["context"] / _or_one(c["sequences"]))
    return np.stack([np.log2(items), np.log2(length), _width(c)], axis=1)


# ---- both -----------------------------------------------------------------------------------------


def _width(c: Columns) -> np.ndarray:
    """float64[Q] a coordinate that sets apart widths of the KV cache."""
    return np.asarray(OTHER_CODE * np.log2(c["kv_bytes"]))


def attention_shape(c: Columns) -> np.ndarray:
    """float64[Q, 3]: log2 of query heads per KV head (apart where that is 1), KV heads, head dimension.

    Heads stand here and, times sequences, in the size: what a kernel costs follows from how many there are
    in the batch, less from how they are dealt out.
    """
    group = np.where(_lone(c), -OTHER_CODE, np.log2(_or_one(c["heads"] / _or_one(c["kv_heads"]))))
    return np.stack([group, np.log2(_or_one(c["kv_heads"])), np.log2(_or_one(c["head_dim"]))], axis=1)


KERNELS = (
    Kernel(
        "attention_prefill",
        ATTENTION_COLUMNS,
        PrefillParameters,
        prefill_seconds,
        attention_least,
        attention_shape,
        prefill_size,
    ),
    Kernel(
        "attention_decode",
        ATTENTION_COLUMNS,
        DecodeParameters,
        decode_seconds,
        attention_least,
        attention_shape,
        decode_size,
    ),
)
