"""Multi-head latent attention: its kernel alone, and the whole module with its projections.

Latent attention keeps of every token one row of kv_rank + rope_dim numbers for all heads. Two ways to
attend to the rows:

- prefill: a GEMM has expanded them into a key (nope_dim + rope_dim) and a value (v_dim) for each head,
  and attention under the causal mask works on those;
- decode, absorbed: the queries were brought into the latent space, so all heads read the same row, once,
  as key (kv_rank + rope_dim) and as value (its first kv_rank numbers).

    kernel = launches + merging + what passes through it for each new token and head + work
    module = launches + projections + kernel, or what the host needs to launch them, whichever is longer

Source   DeepSeek-V2, arXiv 2405.04434 (latent attention, absorption); FlashAttention-3, arXiv 2407.08608
         (tiles); roofline: Williams, Waterman, Patterson, CACM 52(4), 2009. The parameters are fitted, see
         catalogue/kernels.toml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from clustersim.physics.calibration import Columns, Kernel
from clustersim.spec.formats import flop_rate_of
from clustersim.spec.hardware import Gpu
from clustersim.spec.model import FORMAT_BYTES

#: Bytes of an activation between two kernels: bf16.
WIDE = 2.0
#: Query rows that an SM works on at a time, and key rows of a step. Source: FlashAttention-3's tiles.
TILE = 128.0
#: KV rows that an SM takes whole before a sequence is split over several. A guess.
UNSPLIT = 128.0
#: How merging grows with heads, beside that of MANY_HEADS: less than in proportion, for it is mostly
#: latency. A guess, by eye from rows of 16 and 128 heads.
MERGED, MANY_HEADS = 0.15, 64.0
#: How sharply the longer of arithmetic and KV traffic rules; infinity is the plain maximum. On an H100,
#: TensorRT-LLM's decode needs about as long for both with 128 heads; only with the two nearly independent
#: is its arithmetic then at the 660 TFLOP/s which FlashMLA's README states where arithmetic rules.
SHARPNESS = 8.0
#: How much faster than HBM the L2 delivers KV rows that it still holds. A guess.
L2_GAIN = 3.0
#: s: of a prefill this long, half of what throttling takes in the end is taken. A guess.
THROTTLED_AFTER = 20e-3


@dataclass(frozen=True, slots=True)
class PrefillParameters:
    """What a library's prefill kernels reach on one GPU in one format.

    launches    fixed cost, in launches of the least kernel (Gpu.launch_latency)
    merging     cost of each doubling of the context, in launches
    arithmetic  share of `attention_rate`, on whole tiles, before throttling
    traffic     share of the HBM bandwidth at which queries, keys, values and outputs pass
    throttle    by how much power throttling lengthens very long kernels
    """

    launches: float = 4.5
    merging: float = 0.1
    arithmetic: float = 0.7
    traffic: float = 0.7
    throttle: float = 0.2


@dataclass(frozen=True, slots=True)
class DecodeParameters:
    """What a library's absorbed decode kernels reach on one GPU in one format.

    launches    fixed cost, in launches of the least kernel (Gpu.launch_latency)
    merging     cost of each doubling of the context, in launches: parts of a sequence are merged in a tree
    arithmetic  share of `attention_rate`
    memory      share of the HBM bandwidth at which KV rows are read
    traffic     share of the HBM bandwidth at which queries and outputs pass
    resident    KV rows that the L2 still holds since the last call, in s at the HBM bandwidth: a kernel
                timed again and again on the same few rows finds them there
    """

    launches: float = 4.0
    merging: float = 0.4
    arithmetic: float = 0.7
    memory: float = 0.9
    traffic: float = 0.4
    resident: float = 1e-5


@dataclass(frozen=True, slots=True)
class PrefillModuleParameters:
    """What a library's whole attention module reaches in prefill.

    merging     of the kernel, as in PrefillParameters
    arithmetic  of the kernel, as in PrefillParameters
    traffic     of the kernel, as in PrefillParameters
    throttle    of the kernel, as in PrefillParameters
    launches    fixed cost of the kernel and all projections, in launches
    projection  share of the data sheet's FLOP/s that the projections reach
    weights     share of the HBM bandwidth at which the projections' weights are read
    passes      over the projections' inputs and outputs, in HBM and not hidden: norms, rotary, quantisation
    host        s that the host needs to launch the module, kernel by kernel
    """

    launches: float = 12.0
    merging: float = 0.1
    arithmetic: float = 0.7
    traffic: float = 0.7
    throttle: float = 0.2
    projection: float = 0.65
    weights: float = 0.75
    passes: float = 1.5
    host: float = 1e-5


@dataclass(frozen=True, slots=True)
class DecodeModuleParameters:
    """What a library's whole attention module reaches in decode.

    merging     of the kernel, as in DecodeParameters
    arithmetic  of the kernel, as in DecodeParameters
    memory      of the kernel, as in DecodeParameters
    traffic     of the kernel, as in DecodeParameters
    launches    fixed cost of the kernel and all projections, in launches
    projection  share of the data sheet's FLOP/s that the projections reach
    weights     share of the HBM bandwidth at which the projections' weights are read
    passes      over the projections' inputs and outputs, in HBM and not hidden: norms, rotary, quantisation
    """

    launches: float = 12.0
    merging: float = 0.4
    arithmetic: float = 0.7
    memory: float = 0.9
    traffic: float = 0.4
    projection: float = 0.65
    weights: float = 0.75
    passes: float = 1.5


class _Launched(Protocol):
    @property
    def launches(self) -> float: ...
    @property
    def merging(self) -> float: ...


class _Projecting(Protocol):
    @property
    def projection(self) -> float: ...
    @property
    def weights(self) -> float: ...
    @property
    def passes(self) -> float: ...


def _longer(*parts: np.ndarray) -> np.ndarray:
    """The longest of parts, somewhat more where several are near to it."""
    longest = np.maximum(np.maximum.reduce(parts), 1e-30)
    return np.asarray(longest * sum((part / longest) ** SHARPNESS for part in parts) ** (1 / SHARPNESS))


def attention_rate(gpu: Gpu, form: str) -> float:
    """FLOP/s that attention would reach if nothing held it up: the geometric mean of its format's and bf16's.

    Only the products are faster in a narrow format, softmax and conversions are not. In FlashAttention-3's
    paper fp8 reaches 1.6 times the FLOP/s of bf16, in TensorRT-LLM's rows 1.1 to 1.7 times.
    """
    return float(np.sqrt(flop_rate_of(gpu, form) * flop_rate_of(gpu, "bf16")))


def _fixed(gpu: Gpu, p: _Launched, c: Columns) -> np.ndarray:
    doublings = np.log2(1.0 + _length(c) / UNSPLIT) * (c["heads"] / MANY_HEADS) ** MERGED
    return np.asarray((p.launches + p.merging * doublings) * gpu.launch_latency)


def _length(c: Columns) -> np.ndarray:
    """KV tokens of a sequence, the mean."""
    return np.asarray(c["context"] / np.maximum(c["sequences"], 1.0))


# ---- prefill --------------------------------------------------------------------------------------


def _prefill_flop(c: Columns, pairs: np.ndarray) -> np.ndarray:
    return np.asarray(2.0 * pairs * c["heads"] * (c["nope_dim"] + c["rope_dim"] + c["v_dim"]))


def _prefill_work(
    gpu: Gpu, form: str, p: PrefillParameters | PrefillModuleParameters, c: Columns
) -> np.ndarray:
    rate = p.arithmetic * attention_rate(gpu, form)
    # The mask cuts the tiles on its edge in half, yet they are computed whole.
    tiled = _prefill_flop(c, c["pairs"] + c["tokens"] * (TILE / 2))
    # SMs finish their last tile row at different times: on the mean, half of the longest one is lost.
    last = 0.5 * gpu.sms * _prefill_flop(c, TILE * _length(c)) / c["heads"]
    work = (tiled + last) / rate
    return np.asarray(work * (1.0 + p.throttle * work / (work + THROTTLED_AFTER)))


def _prefill_traffic(form: str, c: Columns) -> np.ndarray:
    key = c["nope_dim"] + c["rope_dim"]
    read = c["heads"] * (c["tokens"] * key + c["context"] * (key + c["v_dim"]))
    # In a narrow format, operands are read wide, written narrow and read again.
    narrow = FORMAT_BYTES[form]
    quantised = 2.0 * narrow if narrow < WIDE else 0.0
    written = c["tokens"] * (c["heads"] * c["v_dim"] * WIDE + (c["kv_rank"] + c["rope_dim"]) * c["kv_bytes"])
    return np.asarray(read * (WIDE + quantised) + written)


def _prefill(gpu: Gpu, form: str, p: PrefillParameters | PrefillModuleParameters, c: Columns) -> np.ndarray:
    passed = _prefill_traffic(form, c) / (p.traffic * gpu.memory_bandwidth)
    return np.asarray(_fixed(gpu, p, c) + passed + _prefill_work(gpu, form, p, c))


def prefill_seconds(gpu: Gpu, form: str, p: PrefillParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of attention over expanded keys and values, its cache write and quantisation included."""
    return _prefill(gpu, form, p, c)


def prefill_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the data sheet's roofline: queries, latent rows and outputs cross HBM once."""
    width = FORMAT_BYTES[form]
    per_head = c["tokens"] * c["heads"] * (c["nope_dim"] + c["rope_dim"] + c["v_dim"]) * width
    moved = per_head + c["context"] * (c["kv_rank"] + c["rope_dim"]) * c["kv_bytes"]
    return np.asarray(
        np.maximum(_prefill_flop(c, c["pairs"]) / flop_rate_of(gpu, form), moved / gpu.memory_bandwidth)
    )


# ---- decode ---------------------------------------------------------------------------------------


def _decode_flop(c: Columns) -> np.ndarray:
    return np.asarray(2.0 * c["pairs"] * c["heads"] * (2.0 * c["kv_rank"] + c["rope_dim"]))


def _decode_rows(c: Columns) -> np.ndarray:
    return np.asarray(c["context"] * (c["kv_rank"] + c["rope_dim"]) * c["kv_bytes"])


def _decode(
    gpu: Gpu, form: str, p: DecodeParameters | DecodeModuleParameters, c: Columns, cold: np.ndarray | float
) -> np.ndarray:
    read = cold * _decode_rows(c) / (p.memory * gpu.memory_bandwidth)
    work = _longer(_decode_flop(c) / (p.arithmetic * attention_rate(gpu, form)), read)
    queries = c["tokens"] * c["heads"] * (2.0 * c["kv_rank"] + c["rope_dim"]) * WIDE
    return np.asarray(_fixed(gpu, p, c) + queries / (p.traffic * gpu.memory_bandwidth) + work)


def decode_seconds(gpu: Gpu, form: str, p: DecodeParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of absorbed attention, one new token for each sequence."""
    held = p.resident * gpu.memory_bandwidth / np.maximum(_decode_rows(c), 1.0)
    missed = 1.0 / (1.0 + held**4)
    return _decode(gpu, form, p, c, missed + (1.0 - missed) / L2_GAIN)


def decode_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the data sheet's roofline: latent rows cross HBM once for all heads."""
    per_head = c["tokens"] * c["heads"] * (2.0 * c["kv_rank"] + c["rope_dim"]) * FORMAT_BYTES[form]
    moved = (_decode_rows(c) + per_head) / gpu.memory_bandwidth
    return np.asarray(np.maximum(_decode_flop(c) / flop_rate_of(gpu, form), moved))


# ---- modules --------------------------------------------------------------------------------------


def _shared_projections(c: Columns) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rows, depth, columns) of the products every module has: queries down and up, KV down, output."""
    key = c["nope_dim"] + c["rope_dim"]
    return [
        (c["tokens"], c["hidden"], c["q_rank"] + c["kv_rank"] + c["rope_dim"]),
        (c["tokens"], c["q_rank"], c["heads"] * key),
        (c["tokens"], c["heads"] * c["v_dim"], c["hidden"]),
    ]


def _projection_rate(gpu: Gpu, c: Columns) -> np.ndarray:
    """float64[Q] FLOP/s of products whose weights have weight_bytes."""
    wide = flop_rate_of(gpu, "bf16")
    return np.where(c["weight_bytes"] < WIDE, gpu.flop_rate.get("fp8", wide), wide)


def _prefill_products(gpu: Gpu, c: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """s of the FLOP at the peak, bytes of weights, bytes of activations."""
    expand = (c["context"], c["kv_rank"], c["heads"] * (c["nope_dim"] + c["v_dim"]))
    products = [*_shared_projections(c), expand]
    flop = sum(2.0 * m * k * n for m, k, n in products)
    weights = sum(k * n * c["weight_bytes"] for m, k, n in products)
    return (
        np.asarray(flop / _projection_rate(gpu, c)),
        np.asarray(weights),
        np.asarray(sum(m * (k + n) * WIDE for m, k, n in products)),
    )


def _decode_products(gpu: Gpu, c: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As of prefill; the expansion of KV is absorbed: bf16 products of each head with its part of it."""
    products = _shared_projections(c)
    absorbed = c["heads"] * c["kv_rank"] * (c["nope_dim"] + c["v_dim"])
    flop = sum(2.0 * m * k * n for m, k, n in products) / _projection_rate(gpu, c)
    flop = flop + 2.0 * c["tokens"] * absorbed / flop_rate_of(gpu, "bf16")
    weights = sum(k * n * c["weight_bytes"] for m, k, n in products) + absorbed * WIDE
    activations = sum(m * (k + n) * WIDE for m, k, n in products)
    return np.asarray(flop), np.asarray(weights), np.asarray(activations)


def _projections(
    gpu: Gpu, p: _Projecting, flop: np.ndarray, weights: np.ndarray, activations: np.ndarray
) -> np.ndarray:
    products = _longer(flop / p.projection, weights / (p.weights * gpu.memory_bandwidth))
    return np.asarray(products + p.passes * activations / gpu.memory_bandwidth)


def prefill_module_seconds(gpu: Gpu, form: str, p: PrefillModuleParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of the module in prefill; form is the kernel's, weight_bytes says that of the products."""
    device = _projections(gpu, p, *_prefill_products(gpu, c)) + _prefill(gpu, form, p, c)
    return np.asarray(np.hypot(device, p.host))


def prefill_module_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the data sheet's rooflines of kernel and products, one after the other."""
    flop, weights, _ = _prefill_products(gpu, c)
    return np.asarray(prefill_least(gpu, form, c) + np.maximum(flop, weights / gpu.memory_bandwidth))


def decode_module_seconds(gpu: Gpu, form: str, p: DecodeModuleParameters, c: Columns) -> np.ndarray:
    """float64[Q] s of the module in decode; its weights have driven the KV rows out of the L2."""
    return np.asarray(_projections(gpu, p, *_decode_products(gpu, c)) + _decode(gpu, form, p, c, 1.0))


def decode_module_least(gpu: Gpu, form: str, c: Columns) -> np.ndarray:
    """float64[Q] s of the data sheet's rooflines of kernel and products, one after the other."""
    flop, weights, _ = _decode_products(gpu, c)
    return np.asarray(decode_least(gpu, form, c) + np.maximum(flop, weights / gpu.memory_bandwidth))


# ---- coordinates ----------------------------------------------------------------------------------


def mla_shape(c: Columns) -> np.ndarray:
    """float64[Q, 1]: log2 of the heads on this rank; latent and head sizes are alike in all models."""
    return np.asarray(np.log2(np.maximum(c["heads"], 1.0))[:, None])


def prefill_size(c: Columns) -> np.ndarray:
    """float64[Q, 3]: log2 of sequences, of new tokens of each, and of KV tokens for each new one."""
    sequences, tokens = np.maximum(c["sequences"], 1.0), np.maximum(c["tokens"], 1.0)
    earlier = np.maximum(c["context"] / tokens, 1.0)
    return np.asarray(np.log2(np.stack([sequences, np.maximum(tokens / sequences, 1.0), earlier], axis=1)))


def decode_size(c: Columns) -> np.ndarray:
    """float64[Q, 2]: log2 of sequences and of the KV tokens of each."""
    return np.asarray(
        np.log2(np.stack([np.maximum(c["sequences"], 1.0), np.maximum(_length(c), 1.0)], axis=1))
    )


_COLUMNS = (
    *("sequences", "tokens", "pairs", "context", "heads"),
    *("kv_rank", "rope_dim", "nope_dim", "v_dim", "kv_bytes"),
)
_MODULE = (*_COLUMNS, "hidden", "q_rank", "weight_bytes")

KERNELS = (
    Kernel(
        "mla_prefill",
        _COLUMNS,
        PrefillParameters,
        prefill_seconds,
        prefill_least,
        mla_shape,
        prefill_size,
        unmeasured=PrefillParameters(),
    ),
    Kernel(
        "mla_decode",
        _COLUMNS,
        DecodeParameters,
        decode_seconds,
        decode_least,
        mla_shape,
        decode_size,
        unmeasured=DecodeParameters(),
    ),
    Kernel(
        "mla_prefill_module",
        _MODULE,
        PrefillModuleParameters,
        prefill_module_seconds,
        prefill_module_least,
        mla_shape,
        prefill_size,
        unmeasured=PrefillModuleParameters(),
    ),
    Kernel(
        "mla_decode_module",
        _MODULE,
        DecodeModuleParameters,
        decode_module_seconds,
        decode_module_least,
        mla_shape,
        decode_size,
        unmeasured=DecodeModuleParameters(),
    ),
)
