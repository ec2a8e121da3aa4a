"""Profiles of a model's layers: from a layer's name and the model's widths to what its kernel was given.

Three sources time a whole decoder layer operator by operator. They name tokens, model and tensor parallelism;
which product or how many bytes that means is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from clustersim.study.kernel_rows import (
    Rows,
    doubts,
    entries,
    formats,
    gpus,
    lines_of,
    seconds,
    whole,
)
from clustersim.study.measured import Table

#: Name → float64[M]: hidden, inter, heads, kv_heads, head_dim, vocab of the whole model, and tp, tokens.
Widths: TypeAlias = Mapping[str, np.ndarray]

#: Widths of the models that a profile only names. Source: config.json of each on Hugging Face.
MODELS = {
    "Llama-3.1-8B": {
        "hidden": 4096.0,
        "inter": 14336.0,
        "heads": 32.0,
        "kv_heads": 8.0,
        "head_dim": 128.0,
        "vocab": 128256.0,
    },
    "Qwen3-32B": {
        "hidden": 5120.0,
        "inter": 25600.0,
        "heads": 64.0,
        "kv_heads": 8.0,
        "head_dim": 128.0,
        "vocab": 151936.0,
    },
    "Qwen3-30B-A3B": {
        "hidden": 2048.0,
        "inter": 768.0,
        "heads": 32.0,
        "kv_heads": 4.0,
        "head_dim": 128.0,
        "vocab": 151936.0,
    },
}

#: Layers that are a dense product: widths → (columns of the weights n, depth k) on one rank.
PRODUCTS: dict[str, Callable[[Widths], tuple[np.ndarray, np.ndarray]]] = {
    "qkv": lambda w: (_qkv(w), w["hidden"]),
    "out": lambda w: (w["hidden"], w["heads"] * w["head_dim"] / w["tp"]),
    "up": lambda w: (2.0 * w["inter"] / w["tp"], w["hidden"]),
    "down": lambda w: (w["hidden"], w["inter"] / w["tp"]),
    "head": lambda w: (w["vocab"] / w["tp"], w["hidden"]),
}

#: Bytes of a number of the activations: all sources ran in half precision what is not a product.
_NUMBER = 2.0
#: Of a logit on its way to a token: float32, read and written. As plan.lowering counts them.
_LOGIT = 8.0

#: Layers that only move numbers: kernel, widths → (rows a token counts for, bytes per token on one rank).
MOVES: dict[str, tuple[str, Callable[[Widths], tuple[np.ndarray | float, np.ndarray]]]] = {
    "embedding": ("embedding", lambda w: (1.0, 2 * _NUMBER * w["hidden"])),
    "residual": ("residual", lambda w: (1.0, 3 * _NUMBER * w["hidden"])),
    "activation": ("activation", lambda w: (1.0, 3 * _NUMBER * w["inter"] / w["tp"])),
    "rotary": ("rotary", lambda w: (1.0, 2 * _NUMBER * _heads(w) * w["head_dim"])),
    "norm": ("norm", lambda w: (1.0, 2 * _NUMBER * w["hidden"])),
    # The sum with the residual stream is fused in: two are read, two written.
    "norm_and_residual": ("norm", lambda w: (1.0, 4 * _NUMBER * w["hidden"])),
    # One layer was profiled, whose first norm has nothing to add yet; the mean of its two norms is told.
    "mean_of_both_norms": ("norm", lambda w: (1.0, 3 * _NUMBER * w["hidden"])),
    "norm_of_heads": ("norm", lambda w: (_heads(w), 2 * _NUMBER * _heads(w) * w["head_dim"])),
    "sampling": ("sampling", lambda w: (1.0, _LOGIT * w["vocab"])),
}

#: What Vidur calls a layer → an entry of PRODUCTS or MOVES.
VIDUR = {
    "emb": "embedding",
    "add": "residual",
    "mlp_act": "activation",
    "attn_rope": "rotary",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "attn_pre_proj": "qkv",
    "attn_post_proj": "out",
    "mlp_up_proj": "up",
    "mlp_down_proj": "down",
}
#: Frontier's names. There the second norm takes 1.5 times as long as the first: the sum is fused in.
FRONTIER = {**VIDUR, "post_attention_layernorm": "norm_and_residual"}
#: What LLMServingSim calls the layers of vLLM.
VLLM = {
    "embedding": "embedding",
    "layernorm": "mean_of_both_norms",
    "final_layernorm": "norm_and_residual",
    "qk_norm": "norm_of_heads",
    "rotary_emb": "rotary",
    "act_fn": "activation",
    "sampler": "sampling",
    "qkv_proj": "qkv",
    "o_proj": "out",
    "gate_up_proj": "up",
    "down_proj": "down",
    "lm_head": "head",
}
#: Kinds of rows in that profile, and whether they are layers of the kinds above.
_VLLM_KINDS = {
    "dense": True,
    "per_sequence": True,
    "attention_mixed_batch": False,
    "fused_moe_forced_routing": False,
}


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Timed layers of models, of whatever kind.

    file      as in Rows
    library   whose kernels they are
    layer     str[M] entries of PRODUCTS or MOVES
    gpu, format, measured, row, doubt  as in Rows, [M]; format: that of the products
    widths    of each layer's model
    """

    file: str
    library: str
    layer: np.ndarray
    gpu: np.ndarray
    format: np.ndarray
    measured: np.ndarray
    row: np.ndarray
    doubt: np.ndarray
    widths: Widths


def vidur(table: Table, file: str = "vidur_elementwise_ops") -> Profile:
    """Columns of Vidur's profiles: op, tp, num_tokens, n_embd, n_expanded_embd, n_head, n_kv_head."""
    return _by_columns(table, file, "vidur", VIDUR, "n_expanded_embd")


def frontier(table: Table, file: str = "frontier_h800_ops_405b") -> Profile:
    """Columns of Frontier's profiles: as Vidur's, but n_ffn; `quant` begins with the products' format."""
    return _by_columns(table, file, "frontier", FRONTIER, "n_ffn")


def _by_columns(table: Table, file: str, library: str, names: Mapping[str, str], inter: str) -> Profile:
    widths = {
        name: whole(table, here)
        for name, here in (
            ("tp", "tp"),
            ("tokens", "num_tokens"),
            ("hidden", "n_embd"),
            ("inter", inter),
            ("heads", "n_head"),
            ("kv_heads", "n_kv_head"),
        )
    }
    number_format = np.full(len(lines_of(table)), "bf16")
    if "quant" in table:
        first = np.array([str(text).partition(" ")[0] for text in table["quant"].tolist()])
        number_format = formats({**table, "quant": first}, "quant")
    return Profile(
        file=file,
        library=library,
        layer=np.array(entries(table, "op", names, "op"), dtype=str),
        gpu=gpus(table),
        format=number_format,
        measured=seconds(table),
        row=lines_of(table),
        doubt=doubts(table),
        widths={**widths, "head_dim": widths["hidden"] / widths["heads"]},
    )


def vllm(table: Table, file: str = "rtxpro6000_vllm_kernels") -> Profile:
    """Columns of LLMServingSim's profiles: kind, layer, model, tp, tokens. No attention, no experts."""
    ours = np.array(entries(table, "kind", _VLLM_KINDS, "kind"), dtype=bool)
    at = np.flatnonzero(ours)
    models = entries(table, "model", MODELS, "model", at)
    return Profile(
        file=file,
        library="vllm",
        layer=np.array(entries(table, "layer", VLLM, "layer", at), dtype=str),
        gpu=gpus(table, at),
        format=np.full(len(at), "bf16"),
        measured=seconds(table, at=at),
        row=at,
        doubt=doubts(table, at),
        widths={
            **{name: np.array([m[name] for m in models]) for name in MODELS["Llama-3.1-8B"]},
            "tp": whole(table, "tp", at),
            "tokens": whole(table, "tokens", at),
        },
    )


def rows_of_layers(
    profile: Profile,
    kernel: str,
    chosen: np.ndarray,
    columns: Mapping[str, np.ndarray],
    **changed: np.ndarray,
) -> Rows:
    """Rows of one kernel.

    chosen   bool[M] which layers
    columns  float64[M] of the kernel, for all layers
    changed  format or left_out, str[M], where they are not the profile's
    """
    return Rows(
        file=profile.file,
        kernel=kernel,
        gpu=profile.gpu[chosen],
        library=np.full(int(chosen.sum()), profile.library),
        format=changed.get("format", profile.format)[chosen],
        columns={name: values[chosen] for name, values in columns.items()},
        measured=profile.measured[chosen],
        row=profile.row[chosen],
        left_out=changed.get("left_out", profile.doubt)[chosen],
    )


def per_layer(
    profile: Profile, layer: str, work: Callable[[Widths], tuple[np.ndarray | float, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool[M] where a layer stands, and float64[M] of the two numbers that `work` makes of its widths."""
    here = profile.layer == layer
    some = {name: values[here] for name, values in profile.widths.items()}
    filled = []
    for numbers in work(some):
        whole_column = np.zeros(len(here))
        whole_column[here] = numbers
        filled.append(whole_column)
    return here, filled[0], filled[1]


def _heads(w: Widths) -> np.ndarray:
    """Query and key heads on one rank; a KV head that several ranks need is held by each."""
    return np.asarray(w["heads"] / w["tp"] + np.maximum(w["kv_heads"] / w["tp"], 1.0))


def _qkv(w: Widths) -> np.ndarray:
    return np.asarray((w["heads"] / w["tp"] + 2.0 * np.maximum(w["kv_heads"] / w["tp"], 1.0)) * w["head_dim"])


#: Measured table → how it is read.
PROFILES = {
    "vidur_elementwise_ops": vidur,
    "frontier_h800_ops_405b": frontier,
    "rtxpro6000_vllm_kernels": vllm,
}
