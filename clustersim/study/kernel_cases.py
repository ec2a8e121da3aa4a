"""One kernel at one size, for every kernel that `clustersim measure` times, and the CSV form of its row.

The columns are those of the measured files that the prices are fitted to, name by name, so that one
reader serves both. Inside are bytes, FLOP and seconds; microseconds exist in the rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from clustersim.study.expert_loads import hot_rank_counts

#: Number format → how the measured files spell it.
SPELLED = {"bf16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block", "fp4": "fp4"}
#: Bytes of a number. Kernels of half a byte are not in plain PyTorch; a model may ask for them all the same.
BYTES = {"bf16": 2, "fp8": 1, "fp8_block": 1, "fp4": 1}

#: The only MLA that the form of mla.csv can tell: its rows hold no widths. Numbers of a KV token (latent,
#: rotary part), of a head's key without the rotary part, of a head's value.
#: Source: DeepSeek-V2, arXiv:2405.04434, section 3.1.2; DeepSeek-V3 keeps them.
MLA_KV_RANK, MLA_ROPE, MLA_NOPE, MLA_V = 512, 64, 128, 128


@dataclass(frozen=True, slots=True)
class Gemm:
    """Activations [m, k] times weights [k, n].

    format  a key of SPELLED
    """

    format: str
    m: int
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Causal attention of `batch` prompts of `length` tokens without earlier KV, bf16."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Decode:
    """Attention of one new token of each of `batch` sequences to `length` KV tokens, bf16."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class MlaPrefill:
    """Causal attention of latent heads after the up-projection: keys of 192, values of 128 numbers, bf16."""

    batch: int
    length: int
    heads: int


@dataclass(frozen=True, slots=True)
class MlaDecode:
    """Absorbed attention of one token per sequence to `length` latent KV tokens of 576 numbers, bf16."""

    batch: int
    length: int
    heads: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The gated expert layer of one rank, bf16: permute, up, activation, down, unpermute.

    model         for people
    hidden, inter width of the residual stream; inner width of a whole expert
    tp, ep        ranks that share an expert; ranks that share the experts
    distribution  one of LOADS
    tokens        of the whole expert-parallel group
    """

    model: str
    hidden: int
    inter: int
    top_k: int
    experts: int
    tp: int
    ep: int
    distribution: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Elementwise:
    """One operator that is bound by bytes, bf16.

    op        a key of OPS
    model     for people
    tp        ranks that share heads and inner width
    width     of the residual stream; a head has width / heads numbers
    expanded  inner width of the feed-forward, before TP
    """

    op: str
    model: str
    tp: int
    tokens: int
    width: int
    expanded: int
    heads: int
    kv_heads: int


Case: TypeAlias = Gemm | Prefill | Decode | MlaPrefill | MlaDecode | Experts | Elementwise

#: Rows that the embedding has where no column of the form says so: Llama-2's, whose rows the form is of.
VOCAB = 32000

#: Operator as the rows call it → (numbers read, numbers written) of a case.
OPS: dict[str, Callable[[Elementwise], tuple[int, int]]] = {
    "emb": lambda c: (c.tokens * c.width, c.tokens * c.width),
    "input_layernorm": lambda c: (c.tokens * c.width, c.tokens * c.width),
    "post_attention_layernorm": lambda c: (c.tokens * c.width, c.tokens * c.width),
    "attn_rope": lambda c: (c.tokens * rotated(c), c.tokens * rotated(c)),
    "mlp_act": lambda c: (2 * c.tokens * c.expanded // c.tp, c.tokens * c.expanded // c.tp),
    "add": lambda c: (2 * c.tokens * c.width, c.tokens * c.width),
}


def rotated(case: Elementwise) -> int:
    """Numbers of queries and keys per token on a rank."""
    kv_heads = max(1, case.kv_heads // case.tp)
    return (case.heads // case.tp + kv_heads) * (case.width // case.heads)


def rank_counts(case: Experts) -> np.ndarray:
    """Tokens of each expert on the measured rank, largest first: int64[experts / ep].

    What the readers of such rows take a pattern to mean, in whole tokens: those that rounding down leaves
    over go to the largest remainders.
    """
    sizes = case.tokens, case.top_k, case.experts, case.ep
    expected = hot_rank_counts(*sizes, case.distribution)
    counts: np.ndarray = np.floor(expected).astype(np.int64)
    left = round(float(expected.sum())) - int(counts.sum())
    counts[np.argsort(counts - expected, kind="stable")[:left]] += 1
    return counts


#: Patterns of the measured moe_kernels.csv.
LOADS = ("balanced", "powerlaw_a1.2")


@dataclass(frozen=True, slots=True)
class Form:
    """How one kind of case is written and what it takes.

    kernel   the name that `--kernel` knows
    file     the CSV file; two kinds may share one
    columns  its heading
    cells    case → the columns that tell it from other cases
    follows  case, seconds → columns that follow from both
    inputs   case → bytes that the kernel must read, each input once
    beside   case → bytes of outputs, of intermediate results and of what all sets of inputs share
    flop     case → floating-point operations
    idle     case → bytes that every set of inputs holds without their being read
    """

    kernel: str
    file: str
    columns: tuple[str, ...]
    cells: Callable[[Any], dict[str, str | int]]
    follows: Callable[[Any, float], dict[str, str | float]]
    inputs: Callable[[Any], int]
    beside: Callable[[Any], int]
    flop: Callable[[Any], float]
    idle: Callable[[Any], int] = lambda case: 0


def form_of(case: Case) -> Form:
    """The form of a case."""
    return FORMS[type(case)]


def title(case: Case) -> str:
    """A case in one line, for people and logs; no two cases share it."""
    cells = ", ".join(f"{name} {value}" for name, value in form_of(case).cells(case).items() if value != "")
    return f"{form_of(case).kernel}: {cells}"


def key(case: Case) -> tuple[str, ...]:
    """What tells the row of a case from the others of its file."""
    return tuple(str(value) for value in form_of(case).cells(case).values())


def row(case: Case, seconds: float, identity: Mapping[str, str]) -> dict[str, str | float]:
    """The line of a measured case, column by column.

    seconds   the median of the repetitions
    identity  gpu, framework, kernel_source, source; those the form lacks are left out
    """
    form = form_of(case)
    cells: dict[str, str | float] = {
        **identity,
        **form.cells(case),
        "time_us": _digits(seconds * 1e6),
        **form.follows(case, seconds),
    }
    return {name: cells[name] for name in form.columns}


def bytes_per_copy(case: Case) -> int:
    """Bytes of one set of inputs."""
    return form_of(case).inputs(case)


def copies(case: Case, cache: float) -> int:
    """Sets of inputs that are used in turn, so that each has left the cache when its turn comes again.

    cache  bytes of L2. Between two uses of a set the others pass through it, twice its size; small sets
           stop at MOST_COPIES, where the launch is all that they cost.
    """
    return min(MOST_COPIES, 1 + int(-(-2 * cache // max(1, bytes_per_copy(case)))))


def bytes_needed(case: Case, cache: float) -> float:
    """GPU memory that measuring a case takes: all sets of inputs, and the outputs of one."""
    form = form_of(case)
    return copies(case, cache) * (form.inputs(case) + form.idle(case)) + form.beside(case)


def least_seconds(case: Case, flop_rate: float, bandwidth: float) -> float:
    """What the data sheet says a case takes at least: its FLOP and the reading of its inputs.

    flop_rate  FLOP/s of the case's format
    bandwidth  HBM bytes/s
    """
    form = form_of(case)
    return max(form.flop(case) / flop_rate, form.inputs(case) / bandwidth)


#: Sets of inputs at most.
MOST_COPIES = 256


def _digits(value: float) -> float:
    """Five digits, as the measured files have them: more would be noise."""
    return float(f"{value:.5g}")


def _tera(name: str, flop: Callable[[Any], float]) -> Callable[[Any, float], dict[str, str | float]]:
    return lambda case, seconds: {name: _digits(flop(case) / seconds / 1e12)}


def _nothing(case: Any, seconds: float) -> dict[str, str | float]:
    return {}


def _of_torch(case: Any, seconds: float) -> dict[str, str | float]:
    # Readers of mla.csv take a kernel_source for a library of its own, unless it is called a default. What
    # was called stands in `source`.
    return {"kernel_source": "torch_default"}


def _gemm_flop(c: Gemm) -> float:
    return 2.0 * c.m * c.n * c.k


def _causal_flop(c: Prefill) -> float:
    # Half of the pairs, without the diagonal's half: as the measured files reckon it.
    return 2.0 * c.batch * c.length**2 * c.heads * c.head_dim


def _kv_bytes(c: Decode) -> int:
    return 2 * c.batch * c.length * c.kv_heads * c.head_dim * BYTES["bf16"]


def _decode_rate(c: Decode, seconds: float) -> dict[str, str | float]:
    return {"kv_GBps": _digits(_kv_bytes(c) / seconds / 1e9)}


def _attention_cells(c: Prefill | Decode, length: Literal["isl", "kv_len"]) -> dict[str, str | int]:
    return {
        "attn_dtype": SPELLED["bf16"],
        "kv_cache_dtype": SPELLED["bf16"],
        "batch_size": c.batch,
        length: c.length,
        "num_heads": c.heads,
        "num_kv_heads": c.kv_heads,
        "head_dim": c.head_dim,
    }


def _mla_cells(c: MlaPrefill | MlaDecode, phase: Literal["prefill", "decode"]) -> dict[str, str | int]:
    return {
        "scope": "kernel",
        "phase": phase,
        "mla_dtype": SPELLED["bf16"],
        "kv_cache_dtype": SPELLED["bf16"],
        "gemm_type": "",
        "num_heads": c.heads,
        "batch_size": c.batch,
        "seq_len": c.length,
    }


def _mla_latent(c: MlaDecode) -> int:
    """Numbers of the KV cache that a case reads."""
    return c.batch * c.length * (MLA_KV_RANK + MLA_ROPE)


def _expert_weights(c: Experts) -> int:
    """Numbers of the weights that a rank reads: experts without a token are left alone."""
    return int(np.count_nonzero(rank_counts(c))) * 3 * c.hidden * (c.inter // c.tp)


def _expert_weights_unread(c: Experts) -> int:
    return int(np.count_nonzero(rank_counts(c) == 0)) * 3 * c.hidden * (c.inter // c.tp)


def _pairs(c: Experts) -> int:
    return int(rank_counts(c).sum())


_ATTENTION = ("attn_dtype", "kv_cache_dtype", "batch_size")
_HEADS = ("num_heads", "num_kv_heads", "head_dim", "time_us")
_MLA_COLUMNS = (
    *("gpu", "framework", "kernel_source", "scope", "phase", "mla_dtype", "kv_cache_dtype", "gemm_type"),
    *("num_heads", "batch_size", "seq_len", "time_us", "source"),
)
_TWO = BYTES["bf16"]

FORMS: dict[type[Any], Form] = {
    Gemm: Form(
        kernel="gemm",
        file="gemm.csv",
        columns=(
            *("gpu", "framework", "kernel_source", "dtype", "m", "n", "k", "time_us", "tflops"),
            "source",
        ),
        cells=lambda c: {"dtype": SPELLED[c.format], "m": c.m, "n": c.n, "k": c.k},
        follows=_tera("tflops", _gemm_flop),
        inputs=lambda c: (c.m * c.k + c.n * c.k) * BYTES[c.format],
        beside=lambda c: c.m * c.n * _TWO,
        flop=_gemm_flop,
    ),
    Prefill: Form(
        kernel="attention_prefill",
        file="attn_prefill.csv",
        columns=("gpu", "framework", *_ATTENTION, "isl", *_HEADS, "tflops_causal", "source"),
        cells=lambda c: _attention_cells(c, "isl"),
        follows=_tera("tflops_causal", _causal_flop),
        inputs=lambda c: c.batch * c.length * (c.heads + 2 * c.kv_heads) * c.head_dim * _TWO,
        beside=lambda c: c.batch * c.length * c.heads * c.head_dim * _TWO,
        flop=_causal_flop,
    ),
    Decode: Form(
        kernel="attention_decode",
        file="attn_decode.csv",
        columns=("gpu", "framework", *_ATTENTION, "kv_len", *_HEADS, "kv_GBps", "source"),
        cells=lambda c: _attention_cells(c, "kv_len"),
        follows=_decode_rate,
        inputs=lambda c: _kv_bytes(c) + c.batch * c.heads * c.head_dim * _TWO,
        beside=lambda c: c.batch * c.heads * c.head_dim * _TWO,
        flop=lambda c: 4.0 * c.batch * c.length * c.heads * c.head_dim,
    ),
    MlaPrefill: Form(
        kernel="mla_prefill",
        file="mla.csv",
        columns=_MLA_COLUMNS,
        cells=lambda c: _mla_cells(c, "prefill"),
        follows=_of_torch,
        inputs=lambda c: c.batch * c.length * c.heads * (2 * (MLA_NOPE + MLA_ROPE) + MLA_V) * _TWO,
        beside=lambda c: c.batch * c.length * c.heads * (MLA_NOPE + MLA_ROPE) * _TWO,
        flop=lambda c: 1.0 * c.batch * c.length**2 * c.heads * (MLA_NOPE + MLA_ROPE + MLA_V),
        # Values a second time, padded to the width of keys for kernels that want them equally wide.
        idle=lambda c: c.batch * c.length * c.heads * (MLA_NOPE + MLA_ROPE) * _TWO,
    ),
    MlaDecode: Form(
        kernel="mla_decode",
        file="mla.csv",
        columns=_MLA_COLUMNS,
        cells=lambda c: _mla_cells(c, "decode"),
        follows=_of_torch,
        inputs=lambda c: (_mla_latent(c) + c.batch * c.heads * (MLA_KV_RANK + MLA_ROPE)) * _TWO,
        # Scores and weights of all pairs: plain torch may write them out, in fp32 for the softmax.
        beside=lambda c: c.batch * c.heads * (c.length * 8 + MLA_KV_RANK * _TWO),
        flop=lambda c: 2.0 * c.batch * c.length * c.heads * (2 * MLA_KV_RANK + MLA_ROPE),
    ),
    Experts: Form(
        kernel="experts",
        file="moe_kernels.csv",
        columns=(
            *("gpu", "framework", "kernel_source", "dtype", "model", "hidden_size", "inter_size", "topk"),
            *("num_experts", "moe_tp", "moe_ep", "distribution", "num_tokens_global", "time_us", "source"),
        ),
        cells=lambda c: {
            "dtype": SPELLED["bf16"],
            "model": c.model,
            "hidden_size": c.hidden,
            "inter_size": c.inter,
            "topk": c.top_k,
            "num_experts": c.experts,
            "moe_tp": c.tp,
            "moe_ep": c.ep,
            "distribution": c.distribution,
            "num_tokens_global": c.tokens,
        },
        follows=_nothing,
        inputs=lambda c: (_expert_weights(c) + min(c.tokens, _pairs(c)) * c.hidden) * _TWO,
        # Rows permuted, up, activated, down and weighted, and the sum in fp32.
        beside=lambda c: _pairs(c) * (3 * c.hidden + 4 * (c.inter // c.tp)) * _TWO + 6 * c.tokens * c.hidden,
        flop=lambda c: 6.0 * _pairs(c) * c.hidden * (c.inter // c.tp),
        idle=lambda c: (_expert_weights_unread(c) + c.tokens * c.hidden) * _TWO,
    ),
    Elementwise: Form(
        kernel="elementwise",
        file="elementwise.csv",
        columns=(
            *("gpu", "model", "op", "tp", "num_tokens", "n_embd", "n_expanded_embd", "n_head"),
            *("n_kv_head", "time_us", "source"),
        ),
        cells=lambda c: {
            "model": c.model,
            "op": c.op,
            "tp": c.tp,
            "num_tokens": c.tokens,
            "n_embd": c.width,
            "n_expanded_embd": c.expanded,
            "n_head": c.heads,
            "n_kv_head": c.kv_heads,
        },
        follows=_nothing,
        inputs=lambda c: OPS[c.op](c)[0] * _TWO,
        beside=lambda c: (OPS[c.op](c)[1] + (VOCAB * c.width if c.op == "emb" else 0)) * _TWO,
        flop=lambda c: 0.0,
    ),
}

#: Every kernel that `--kernel` may name, in the order in which they are measured.
KERNELS = tuple(form.kernel for form in FORMS.values())
