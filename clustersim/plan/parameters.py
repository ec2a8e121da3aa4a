"""Closed forms of a model: its parameters and the FLOP of a pass."""

from __future__ import annotations

import numpy as np

from clustersim.spec.batch import Batch
from clustersim.spec.model import Mla, Model

#: matrices of a feed-forward network by its kind: plain is up and down; gated has gate and up, and down
FFN_MATRICES = {"plain": 2, "gated": 3}


def ffn_parameters(model: Model, width: int) -> int:
    """Of one feed-forward network of this inner width."""
    return FFN_MATRICES[model.ffn_kind] * model.hidden * width


def expert_parameters(model: Model) -> int:
    """Of one expert."""
    return ffn_parameters(model, model.ffn)


def latent_projection(model: Model, mla: Mla) -> int:
    """Parameters of one layer's projections into latent vectors, which every TP rank holds whole."""
    return model.hidden * (mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim)


def head_projection(model: Model, mla: Mla) -> int:
    """Parameters of one layer that latent attention divides by heads, the key/value up-projection apart."""
    query = (mla.q_lora_rank or model.hidden) * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    return model.heads * (query + mla.v_head_dim * model.hidden)


def up_projection(model: Model, mla: Mla) -> int:
    """Parameters of one layer that make keys and values of all heads from latent vectors."""
    return mla.kv_lora_rank * model.heads * (mla.qk_nope_head_dim + mla.v_head_dim)


def attention_parameters(model: Model) -> int:
    """Matrices of one layer's attention."""
    m, mla = model, model.mla
    if mla:
        return latent_projection(m, mla) + head_projection(m, mla) + up_projection(m, mla)
    return m.hidden * m.head_dim * 2 * (m.heads + m.kv_heads)


def small_parameters(model: Model) -> int:
    """Vectors of one layer that every rank holds whole: norms and biases."""
    m = model
    found = 2 * m.hidden
    if m.mla:
        found += m.mla.q_lora_rank + m.mla.kv_lora_rank
    if m.qk_norm:
        found += 2 * m.head_dim
    if m.attention_bias:
        found += (m.heads + 2 * m.kv_heads) * m.head_dim
    return found


def total_parameters(model: Model, experts: int | None = None) -> int:
    """Of the whole model, or with only `experts` experts per layer (active: top_k)."""
    m = model
    experts = m.experts if experts is None else experts
    attention = m.layers * (attention_parameters(m) + small_parameters(m))
    routed = experts * expert_parameters(m) + m.experts * m.hidden  # and the gate
    networks = m.moe_layers * (routed + ffn_parameters(m, m.shared_width))
    networks += (m.layers - m.moe_layers) * ffn_parameters(m, m.dense_ffn)
    embeddings = m.vocab * m.hidden * (1 if m.tied_embeddings else 2)
    return attention + networks + embeddings + m.hidden


def active_parameters(model: Model) -> int:
    """Those that one token passes through."""
    return total_parameters(model, model.top_k)


def kv_heads_held(model: Model, tensor_parallel: int) -> int:
    """Key/value heads over a TP group: with more ranks than heads, heads are held several times."""
    return max(model.kv_heads, tensor_parallel)


def step_flop(model: Model, batch: Batch, tensor_parallel: int) -> float:
    """Useful FLOP of a pass over all ranks: matrix products and attention; 2 per multiply-add.

    Source   2 * parameters per token, and per query-key pair and head what `_pair_flop` says
    """
    m, tokens = model, float(batch.tokens.sum())
    attention = m.layers * _projection_flop(m, batch, tensor_parallel)
    near = m.windowed_layers
    pairs = near * float(np.sum(batch.near_pairs)) + (m.layers - near) * float(np.sum(batch.pairs))
    attention += _pair_flop(m, batch.phase) * m.heads * pairs
    routed = m.hidden * m.experts + m.top_k * expert_parameters(m) + ffn_parameters(m, m.shared_width)
    dense = ffn_parameters(m, m.dense_ffn)
    networks = 2.0 * tokens * (m.moe_layers * routed + (m.layers - m.moe_layers) * dense)
    return attention + networks + 2.0 * m.hidden * m.vocab * float(batch.outputs.sum())


def _projection_flop(m: Model, batch: Batch, tensor_parallel: int) -> float:
    """Of one layer's attention, pairs apart; what several ranks do alike counts for each of them."""
    tokens, mla = float(batch.tokens.sum()), m.mla
    if not mla:
        key_heads = kv_heads_held(m, tensor_parallel)
        return 2.0 * tokens * m.hidden * m.head_dim * 2 * (m.heads + key_heads)
    whole = latent_projection(m, mla) * tensor_parallel + head_projection(m, mla)
    # Keys and values are made of all that is read; absorbed, queries and outputs are taken to latents.
    raised = float(np.sum(batch.context)) if batch.phase == "prefill" else tokens
    return 2.0 * (tokens * whole + raised * up_projection(m, mla))


def _pair_flop(m: Model, phase: str) -> float:
    """Per query-key pair and head: QK and PV."""
    if not m.mla:
        return 4.0 * m.head_dim
    if phase == "prefill":
        return 2.0 * (m.mla.qk_nope_head_dim + m.mla.qk_rope_head_dim + m.mla.v_head_dim)
    return 2.0 * (2 * m.mla.kv_lora_rank + m.mla.qk_rope_head_dim)
