"""How attention is drawn: projections, every head by itself, and what brings the heads together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from clustersim.plan.dag import COMPUTATION, REST, ROUTING, Node, Tensor
from clustersim.plan.dag_sheet import Sheet
from clustersim.plan.stepgraph import Operator


def qkv(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """One product whose columns are queries, keys and values of the heads of this GPU."""
    call = op.call
    assert call is not None
    m, d = call.columns["m"], sheet.model.head_dim
    heads = sheet.model.heads // sheet.tp
    kv = (call.columns["n"] / d - heads) / 2
    for suffix, at in sheet.lanes:
        tokens = ("tokens", m, sheet.graph.tokens)
        gives = [
            sheet.tensor(name, at, tokens, (of, number, float(np.max(number)) * sheet.tp), ("d", d, d))
            for name, of, number in (("query", "heads", heads), ("key", "heads", kv), ("value", "heads", kv))
        ]
        takes = [sheet.tensor("x", at, tokens, ("hidden", call.columns["k"], sheet.model.hidden))]
        yield sheet.node(index, op, f"QKV projection{_columns(sheet)}", suffix, at, takes, gives)


def query(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Queries of latent attention: of every head a part without position and one with it."""
    call, mla = op.call, sheet.model.mla
    assert call is not None and mla is not None
    m, width = call.columns["m"], mla.qk_nope_head_dim + mla.qk_rope_head_dim
    heads, tokens = call.columns["n"] / width, ("tokens", m, sheet.graph.tokens)
    of = ("heads", heads, sheet.model.heads)
    source = "latent_q" if op.name == "query_up" else "x"
    for suffix, at in sheet.lanes:
        takes = [
            sheet.tensor(
                source,
                at,
                tokens,
                ("latent" if source != "x" else "hidden", call.columns["k"], float(call.columns["k"].max())),
            )
        ]
        gives = [
            sheet.tensor("query", at, tokens, of, ("d", mla.qk_nope_head_dim, mla.qk_nope_head_dim)),
            sheet.tensor("query_rope", at, tokens, of, ("rope", mla.qk_rope_head_dim, mla.qk_rope_head_dim)),
        ]
        yield sheet.node(index, op, f"Query projection{_columns(sheet)}", suffix, at, takes, gives)


def latents(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """The short vectors that queries, keys and values are made from; every TP rank makes them whole."""
    call, mla = op.call, sheet.model.mla
    assert call is not None and mla is not None
    tokens = ("tokens", call.columns["m"], sheet.graph.tokens)
    rope = mla.qk_rope_head_dim
    # What the product has beyond keys and values are latent queries, where the model has such.
    short = call.columns["n"] - mla.kv_lora_rank - rope
    parts = (
        ("latent_q", "latent", short),
        ("latent_kv", "latent", mla.kv_lora_rank),
        ("key_rope", "rope", rope),
    )
    for suffix, at in sheet.lanes:
        takes = [sheet.tensor("x", at, tokens, ("hidden", call.columns["k"], sheet.model.hidden))]
        gives = [
            sheet.tensor(name, at, tokens, (of, width, float(np.max(width))))
            for name, of, width in parts
            if np.max(width) > 0
        ]
        yield sheet.node(index, op, "Latent projection", suffix, at, takes, gives)


def kv_up(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Keys and values of all heads, of this pass's tokens and of those in the cache."""
    call, mla = op.call, sheet.model.mla
    assert call is not None and mla is not None
    m, k = call.columns["m"], call.columns["k"]
    width = mla.qk_nope_head_dim + mla.v_head_dim
    for suffix, at in sheet.lanes:
        new = sheet.registers.numbers("latent_kv", sheet.ranks[at]) / k[at]
        tokens = np.zeros(len(sheet.ranks))
        tokens[at] = new
        cached = m - tokens
        takes = [
            sheet.tensor(
                "latent_kv", at, ("tokens", tokens, sheet.graph.tokens), ("latent", k, float(k.max()))
            )
        ]
        whole = float(m[:: sheet.tp].sum())
        gives = [
            sheet.tensor(
                "kv",
                at,
                ("context", m, whole),
                ("heads", call.columns["n"] / width, sheet.model.heads),
                ("d", width, width),
            )
        ]
        note = f"and {_span(cached[at])} tokens of the cache" if cached[at].any() else ""
        yield sheet.node(
            index, op, f"Key/value projection{_columns(sheet)}", suffix, at, takes, gives, note=note
        )


def query_absorb(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Queries are taken to the latent vectors, head by head."""
    call, mla = op.call, sheet.model.mla
    assert call is not None and mla is not None
    c, rank = call.columns, float(mla.kv_lora_rank)
    tokens, of = ("tokens", c["m"], sheet.graph.tokens), ("heads", c["n"] / rank, sheet.model.heads)
    for suffix, at in sheet.lanes:
        takes = [sheet.tensor("query", at, tokens, of, ("d", c["k"], float(c["k"].max())))]
        gives = [sheet.tensor("query", at, tokens, of, ("latent", rank, rank))]
        yield sheet.node(
            index, op, f"Queries into the latent space{_columns(sheet)}", suffix, at, takes, gives
        )


def value_up(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Outputs of the heads are taken back from the latent vectors."""
    call, mla = op.call, sheet.model.mla
    assert call is not None and mla is not None
    c, wide = call.columns, mla.v_head_dim
    tokens, of = ("tokens", c["m"], sheet.graph.tokens), ("heads", c["n"] / wide, sheet.model.heads)
    for suffix, at in sheet.lanes:
        takes = [sheet.tensor("x", at, tokens, of, ("latent", c["k"], float(c["k"].max())))]
        gives = [sheet.tensor("x", at, tokens, of, ("d", wide, wide))]
        yield sheet.node(
            index, op, f"Values out of the latent space{_columns(sheet)}", suffix, at, takes, gives
        )


def heads(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Every head by itself, on the GPU of each shard that has it; then all of them side by side."""
    assert op.call is not None
    local = sheet.model.heads // sheet.tp
    parts = sheet.wish.heads(sheet.model.heads)
    for suffix, at in sheet.lanes:
        for part in parts:
            held = np.bincount(np.array(part) // local, minlength=sheet.tp)[at % sheet.tp]
            yield _head(sheet, index, op, part, suffix, at[held > 0], held, len(parts) > 1)
        if len(parts) > 1:
            yield _aggregation(sheet, op, suffix, at)


def _head(
    sheet: Sheet,
    index: int,
    op: Operator,
    part: tuple[int, ...],
    suffix: str,
    at: np.ndarray,
    held: np.ndarray,
    split: bool,
) -> Node:
    """held int[.]: heads of the part on each GPU of the lane."""
    assert op.call is not None
    c, key = op.call.columns, part if split else None
    each = np.zeros(len(sheet.ranks))
    each[at] = held[held > 0]
    name, title, kind = f".h{part[0]}", f"Head {part[0]}", COMPUTATION
    if len(part) > 1:
        name = f".h{part[0]}-{part[-1]}" if split else ""
        title = f"… heads {part[0]} to {part[-1]}" if split else f"Attention, {len(part)} heads"
        kind = REST if split else COMPUTATION
    takes = [_taken(sheet, at, *wanted, key) for wanted in TAKES[op.call.kernel](sheet, op, each)]
    width = {"mla_decode": "latent"}.get(op.call.kernel, "d")
    out = _given_width(op)
    gives = [
        sheet.tensor(
            "heads" if split else "x",
            at,
            ("tokens", c["tokens"], sheet.graph.tokens),
            ("heads", each, len(part)),
            (width, out, float(out.max())),
            key=key,
        )
    ]
    share = (each / c["heads"])[at]
    return sheet.node(
        index, op, title, name + suffix, at, takes, gives, kind, share, members=part, note=_reads(op, at)
    )


def _given_width(op: Operator) -> np.ndarray:
    """Numbers that a head makes of a token."""
    assert op.call is not None
    c = op.call.columns
    return {"mla_decode": c.get("kv_rank"), "mla_prefill": c.get("v_dim")}.get(
        op.call.kernel, c.get("head_dim")
    )  # type: ignore[return-value]


#: Register, what its heads are called, tokens, heads on each GPU (parts of one, where it is shared), width.
_Wanted = tuple[str, str, np.ndarray, np.ndarray, np.ndarray]


def _by_heads(sheet: Sheet, op: Operator, each: np.ndarray) -> list[_Wanted]:
    # What several query heads share counts once: each takes its part of it.
    assert op.call is not None
    c = op.call.columns
    shared = each * c["kv_heads"] / c["heads"]
    return [
        ("query", "heads", c["tokens"], each, c["head_dim"]),
        ("key", "heads", c["tokens"], shared, c["head_dim"]),
        ("value", "heads", c["tokens"], shared, c["head_dim"]),
    ]


def _latent(sheet: Sheet, op: Operator, each: np.ndarray) -> list[_Wanted]:
    assert op.call is not None
    c = op.call.columns
    shared = each / c["heads"]
    return [
        ("query", "heads", c["tokens"], each, c["kv_rank"]),
        ("query_rope", "heads", c["tokens"], each, c["rope_dim"]),
        ("latent_kv", "shared", c["tokens"], shared, c["kv_rank"]),
        ("key_rope", "heads", c["tokens"], shared, c["rope_dim"]),
    ]


def _expanded(sheet: Sheet, op: Operator, each: np.ndarray) -> list[_Wanted]:
    assert op.call is not None
    c = op.call.columns
    return [
        ("query", "heads", c["tokens"], each, c["nope_dim"]),
        ("query_rope", "heads", c["tokens"], each, c["rope_dim"]),
        ("kv", "heads", c["context"], each, c["nope_dim"] + c["v_dim"]),
        ("key_rope", "heads", c["tokens"], each / c["heads"], c["rope_dim"]),
    ]


def _taken(
    sheet: Sheet,
    at: np.ndarray,
    name: str,
    of: str,
    tokens: np.ndarray,
    each: np.ndarray,
    width: np.ndarray,
    key: object,
) -> Tensor:
    first = (
        ("context", tokens, float(tokens[:: sheet.tp].sum()))
        if name == "kv"
        else ("tokens", tokens, sheet.graph.tokens)
    )
    # Of a shard: what its GPUs hold of these heads, all of them together.
    shard = at[at // sheet.tp == at[0] // sheet.tp]
    whole = float(each[shard].sum()) if name in SPREAD else float(each[at[0]])
    return sheet.tensor(name, at, first, (of, each, whole), ("d", width, float(width.max())), key=key)


#: Tensors whose heads are divided by TP; others are whole on every rank.
SPREAD = ("query", "query_rope", "key", "value", "kv")


def _reads(op: Operator, at: np.ndarray) -> str:
    """What of the cache it reads besides what comes in."""
    assert op.call is not None
    cached = (op.call.columns["context"] - op.call.columns["tokens"])[at]
    if op.call.kernel == "mla_prefill" or not cached.any():
        return ""
    return f"and {_span(cached)} tokens of the cache"


def _span(values: np.ndarray) -> str:
    least, most = int(values.min()), int(values.max())
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _aggregation(sheet: Sheet, op: Operator, suffix: str, at: np.ndarray) -> Node:
    """Heads of a GPU already lie side by side; nothing is copied, and nothing leaves the GPU."""
    assert op.call is not None
    c, out = op.call.columns, _given_width(op)
    sizes = (
        ("tokens", c["tokens"], sheet.graph.tokens),
        ("heads", c["heads"], sheet.model.heads),
        ("d", out, float(out.max())),
    )  # fmt: skip
    takes, gives = [sheet.tensor("heads", at, *sizes)], [sheet.tensor("x", at, *sizes)]
    return sheet.view(
        "attention_aggregation", "Aggregation of heads", op.layer, suffix, at, takes, gives, ROUTING
    )


def output(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """The product that brings the heads of a GPU back to the width of the residual stream."""
    call = op.call
    assert call is not None
    c = call.columns
    tokens = ("tokens", c["m"], sheet.graph.tokens)
    rows = " (row parallel)" if sheet.tp > 1 else ""
    for suffix, at in sheet.lanes:
        takes = [sheet.tensor("x", at, tokens, ("heads x d", c["k"], float(c["k"].max()) * sheet.tp))]
        gives = [sheet.hidden("delta", at, c["m"])]
        yield sheet.node(index, op, f"Output projection{rows}", suffix, at, takes, gives)


def _columns(sheet: Sheet) -> str:
    return " (column parallel)" if sheet.tp > 1 else ""


#: Kernel → what a head takes.
TAKES = {
    "attention_prefill": _by_heads,
    "attention_decode": _by_heads,
    "mla_prefill": _expanded,
    "mla_decode": _latent,
}
