"""Attention as operators: multi-head and grouped-query, and latent attention before and after absorption."""

from __future__ import annotations

from clustersim.plan.builder import WIDTH, Builder
from clustersim.plan.parameters import kv_heads_held
from clustersim.plan.stepgraph import Call
from clustersim.spec.model import FORMAT_BYTES, PLAIN, Mla


def attend(out: Builder, layer: int) -> None:
    """Appends one layer's attention, from its norm to the sum with the residual stream."""
    out.layer = layer
    out.norm("attention_norm", out.model.hidden)
    if out.model.mla:
        _latent(out, out.model.mla)
    else:
        _by_heads(out)
    out.all_reduce("attention_all_reduce")
    out.residual("attention_residual", out.load.tokens)


def _by_heads(out: Builder) -> None:
    m, load, tp = out.model, out.load, out.d.tensor_parallel
    heads, kv = m.heads // tp, kv_heads_held(m, tp) // tp
    out.gemm("qkv", load.tokens, (heads + 2 * kv) * m.head_dim, m.hidden, out.format)
    turned = 2 * WIDTH * load.tokens * (heads + kv) * m.head_dim
    if m.qk_norm:
        out.moves("qk_norm", "norm", load.tokens, turned)
    out.moves("rotary", "rotary", load.tokens, turned)
    near = m.windowed(out.layer)
    pairs, context = (load.near_pairs, load.near_context) if near else (load.pairs, load.context)
    new = load.tokens * m.head_dim * (2 * heads + 2 * kv)
    kv_bytes = FORMAT_BYTES[m.kv_format]
    sizes = {
        "sequences": load.sequences,
        "tokens": load.tokens,
        "pairs": pairs,
        "context": context,
        "heads": heads,
        "kv_heads": kv,
        "head_dim": m.head_dim,
        "kv_bytes": kv_bytes,
    }
    out.add(
        "attention",
        flop=4.0 * heads * m.head_dim * pairs,
        bytes=kv_bytes * 2 * kv * m.head_dim * context + WIDTH * new,
        # Queries come as bf16; what narrower keys and values make of that is the kernel's business.
        call=out.call(f"attention_{load.batch.phase}", PLAIN, **sizes),
    )
    out.gemm("attention_output", load.tokens, m.hidden, heads * m.head_dim, out.format)


def _latent(out: Builder, mla: Mla) -> None:
    """Projections into latent vectors run whole on every TP rank, all that has heads is divided.

    A model that compresses queries projects both vectors in one product, as vLLM and SGLang do.

    Source   DeepSeek-V2 (arXiv:2405.04434), section 2.1; vLLM's deepseek_v2.py: which projections are
             replicated
    """
    m, load = out.model, out.load
    heads = m.heads // out.d.tensor_parallel
    query, cached = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.kv_lora_rank + mla.qk_rope_head_dim
    if mla.q_lora_rank:
        out.gemm("latents", load.tokens, mla.q_lora_rank + cached, m.hidden, out.format)
        out.norm("latent_norm", mla.q_lora_rank + mla.kv_lora_rank)
        out.gemm("query_up", load.tokens, heads * query, mla.q_lora_rank, out.format)
    else:
        out.gemm("query", load.tokens, heads * query, m.hidden, out.format)
        out.gemm("latents", load.tokens, cached, m.hidden, out.format)
        out.norm("latent_norm", mla.kv_lora_rank)
    turned = 2 * WIDTH * load.tokens * (heads + 1) * mla.qk_rope_head_dim
    out.moves("rotary", "rotary", load.tokens, turned)
    (_expanded if load.batch.phase == "prefill" else _absorbed)(out, mla, heads)
    out.gemm("attention_output", load.tokens, m.hidden, heads * mla.v_head_dim, out.format)


def _expanded(out: Builder, mla: Mla, heads: int) -> None:
    """Keys and values of every head are made from the latent vectors of all that is read."""
    load, query = out.load, mla.qk_nope_head_dim + mla.qk_rope_head_dim
    both = mla.qk_nope_head_dim + mla.v_head_dim
    out.gemm("kv_up", load.context, heads * both, mla.kv_lora_rank, out.format)
    out.add(
        "attention",
        flop=2.0 * heads * (query + mla.v_head_dim) * load.pairs,
        bytes=WIDTH * heads * (query + mla.v_head_dim) * (load.tokens + load.context),
        call=_call(out, mla, heads, "mla_prefill"),
    )


def _absorbed(out: Builder, mla: Mla, heads: int) -> None:
    """Queries are taken to the latent vectors, and outputs back: two products by head.

    Their rows are written as those of one product with all heads' columns: FLOP, weights and output are
    the same. They stay bf16 in quantised models, as in vLLM and SGLang.
    """
    m, load = out.model, out.load
    nope, rank, wide = mla.qk_nope_head_dim, mla.kv_lora_rank, mla.v_head_dim
    cached = rank + mla.qk_rope_head_dim
    out.gemm("query_absorb", load.tokens, heads * rank, nope, PLAIN, read=heads * nope)
    out.add(
        "attention",
        flop=2.0 * heads * (cached + rank) * load.pairs,
        bytes=FORMAT_BYTES[m.kv_format] * cached * load.context
        + WIDTH * load.tokens * heads * (cached + rank),
        call=_call(out, mla, heads, "mla_decode"),
    )
    out.gemm("value_up", load.tokens, heads * wide, rank, PLAIN, read=heads * rank)


def _call(out: Builder, mla: Mla, heads: int, kernel: str) -> Call:
    load = out.load
    return out.call(
        kernel,
        PLAIN,
        sequences=load.sequences,
        tokens=load.tokens,
        pairs=load.pairs,
        context=load.context,
        heads=heads,
        kv_rank=mla.kv_lora_rank,
        rope_dim=mla.qk_rope_head_dim,
        nope_dim=mla.qk_nope_head_dim,
        v_dim=mla.v_head_dim,
        kv_bytes=FORMAT_BYTES[out.model.kv_format],
    )
