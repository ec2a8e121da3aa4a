"""Which sizes `clustersim measure` times: a table of plain lists, per kernel, in full and quick.

Cases that share weights follow each other, so that the weights are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from clustersim.errors import pick
from clustersim.study.kernel_cases import (
    KERNELS,
    LOADS,
    OPS,
    Case,
    Decode,
    Elementwise,
    Experts,
    Gemm,
    MlaDecode,
    MlaPrefill,
    Prefill,
    bytes_needed,
    form_of,
)


@dataclass(frozen=True, slots=True)
class Grid:
    """The sizes that all cases are made of.

    m            rows of a GEMM
    sides        its columns and depths
    tokens       of an expert layer or elementwise operator
    batches      sequences of an attention
    lengths      tokens of one of them
    prefill_most, decode_most   tokens of all sequences together that are still measured
    heads        query and KV heads of a rank
    mla_heads    heads of a rank
    moe          ways to share an expert layer: (name in LAYERS, tp, ep)
    dense        models whose elementwise operators are measured: names in WIDTHS
    tps          ranks that share them
    """

    m: tuple[int, ...]
    sides: tuple[int, ...]
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    prefill_most: int
    decode_most: int
    heads: tuple[tuple[int, int], ...]
    mla_heads: tuple[int, ...]
    moe: tuple[tuple[str, int, int], ...]
    dense: tuple[str, ...]
    tps: tuple[int, ...]


#: Expert layers → hidden, inter, top_k, experts. Source: the shapes of the measured moe_kernels.csv.
LAYERS = {
    "Mixtral-8x7B": (4096, 14336, 2, 8),
    "Qwen3-30B-A3B": (2048, 768, 8, 128),
    "Qwen3-235B-A22B": (4096, 1536, 8, 128),
    "DeepSeek-V3": (7168, 2048, 8, 256),
}
#: Dense models → width, expanded, heads, KV heads. Source: the shapes of vidur_elementwise_ops.csv.
WIDTHS = {"Llama-2-7b-hf": (4096, 11008, 32, 32), "Llama-2-70b-hf": (8192, 28672, 64, 8)}

#: Operators of which TP ranks do a part each; all others are the same on every rank.
SHARED = ("attn_rope", "mlp_act")

FULL = Grid(
    m=tuple(2**k for k in range(15)),
    sides=(512, 1536, 4096, 7168, 16384),
    tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    batches=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    lengths=(64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    prefill_most=65536,
    decode_most=1 << 20,
    heads=((8, 1), (16, 4), (32, 8), (32, 32), (64, 8)),
    mla_heads=(16, 128),
    moe=(
        *(("Mixtral-8x7B", tp, 1) for tp in (1, 2, 8)),
        *(("Qwen3-30B-A3B", 1, ep) for ep in (1, 4, 8)),
        *(("Qwen3-235B-A22B", 1, ep) for ep in (1, 8)),
        *(("DeepSeek-V3", 1, ep) for ep in (1, 8, 32, 128)),
    ),
    dense=tuple(WIDTHS),
    tps=(1, 2, 4, 8),
)
QUICK = Grid(
    m=(1, 16, 128, 1024, 8192),
    sides=(1024, 4096, 16384),
    tokens=(1, 16, 128, 1024, 8192),
    batches=(1, 8, 64),
    lengths=(256, 2048, 16384),
    prefill_most=32768,
    decode_most=1 << 19,
    heads=((8, 1), (32, 8)),
    mla_heads=(16, 128),
    moe=(("Mixtral-8x7B", 2, 1), ("Qwen3-30B-A3B", 1, 1), ("DeepSeek-V3", 1, 32)),
    dense=("Llama-2-7b-hf",),
    tps=(1,),
)


def plan(kernels: Sequence[str] = KERNELS, quick: bool = False) -> list[Case]:
    """All cases of some kernels, each once, always in the same order.

    kernels  names in KERNELS, in any order
    quick    few of each: minutes instead of an hour
    """
    grid = grid_of(quick)
    return [case for name in chosen(kernels) for case in PLANS[name](grid)]


def grid_of(quick: bool) -> Grid:
    """The sizes that are measured."""
    return QUICK if quick else FULL


def named(kernels: str) -> list[str]:
    """The kernels of a list with commas, in the order in which they are measured; all for "".

    Raises  ClustersimError for unknown names
    """
    return chosen([name.strip() for name in kernels.split(",") if name.strip()] or KERNELS)


#: L2 of the machine that a dry run thinks of, bytes: about that of an H100. Source: its data sheet, 50 MB.
OUTLINE_CACHE = 50e6


def outline(cases: Sequence[Case]) -> dict[str, Any]:
    """How many cases there are by kernel, and how much memory the largest takes, bytes."""
    by_kernel: dict[str, list[Case]] = {}
    for case in cases:
        by_kernel.setdefault(form_of(case).kernel, []).append(case)
    return {
        "planned": [
            {
                "kernel": kernel,
                "cases": len(some),
                "file": form_of(some[0]).file,
                "largest": max(bytes_needed(case, OUTLINE_CACHE) for case in some),
            }
            for kernel, some in by_kernel.items()
        ]
    }


def chosen(kernels: Sequence[str]) -> list[str]:
    """The kernels, each once, in the order in which they are measured; ClustersimError for unknown ones."""
    known = dict.fromkeys(KERNELS)
    for name in kernels:
        pick(known, name, "--kernel")
    return [name for name in KERNELS if name in kernels]


def _gemm(grid: Grid) -> Iterable[Case]:
    for fmt, n, k, m in product(("bf16", "fp8"), grid.sides, grid.sides, grid.m):
        yield Gemm(fmt, m, n, k)


def _prefill(grid: Grid) -> Iterable[Case]:
    for (heads, kv_heads), batch, length in product(grid.heads, grid.batches, grid.lengths):
        if batch * length <= grid.prefill_most:
            yield Prefill(batch, length, heads, kv_heads, 128)


def _decode(grid: Grid) -> Iterable[Case]:
    for (heads, kv_heads), batch, length in product(grid.heads, grid.batches, grid.lengths):
        if batch * length <= grid.decode_most:
            yield Decode(batch, length, heads, kv_heads, 128)


def _mla_prefill(grid: Grid) -> Iterable[Case]:
    for heads, batch, length in product(grid.mla_heads, grid.batches, grid.lengths):
        if batch * length <= grid.prefill_most:
            yield MlaPrefill(batch, length, heads)


def _mla_decode(grid: Grid) -> Iterable[Case]:
    for heads, batch, length in product(grid.mla_heads, grid.batches, grid.lengths):
        if batch * length <= grid.decode_most:
            yield MlaDecode(batch, length, heads)


def _experts(grid: Grid) -> Iterable[Case]:
    for (name, tp, ep), load, tokens in product(grid.moe, LOADS, grid.tokens):
        hidden, inter, top_k, experts = LAYERS[name]
        yield Experts(name, hidden, inter, top_k, experts, tp, ep, load, tokens)


def _elementwise(grid: Grid) -> Iterable[Case]:
    for op, name, tp, tokens in product(OPS, grid.dense, grid.tps, grid.tokens):
        if tp > 1 and op not in SHARED:
            continue
        width, expanded, heads, kv_heads = WIDTHS[name]
        yield Elementwise(op, name, tp, tokens, width, expanded, heads, kv_heads)


PLANS: Mapping[str, Callable[[Grid], Iterable[Case]]] = {
    "gemm": _gemm,
    "attention_prefill": _prefill,
    "attention_decode": _decode,
    "mla_prefill": _mla_prefill,
    "mla_decode": _mla_decode,
    "experts": _experts,
    "elementwise": _elementwise,
}
