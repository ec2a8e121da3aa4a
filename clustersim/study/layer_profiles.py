"""Profiles of a model's layers: from a layer's name and the model's widths to what its kernel was given.

Three sources time a whole decoder layer operator by operator. They name tokens, model and tensor parallelism;
which product or how many bytes that means is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.spec.model import Model
from clustersim.spec.reading import read_catalogue
from clustersim.spec.references import catalogue_name, not_in_catalogue
from clustersim.study.kernel_rows import (
    Rows,
    column,
    divides,
    doubts,
    entries,
    formats,
    gpus,
    line_of,
    lines_of,
    seconds,
    shares,
    whole,
)
from clustersim.study.measured import Table

#: Name → float64[M]: hidden, inter, heads, kv_heads, head_dim, vocab of the whole model, and tp, tokens.
Widths: TypeAlias = Mapping[str, np.ndarray]

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


#: Width → that of a model. `inter` is that of the network every token passes through, if there is one.
_MODEL_WIDTHS: Mapping[str, Callable[[Model], float]] = {
    "hidden": lambda model: model.hidden,
    "inter": lambda model: model.dense_ffn or model.ffn,
    "expert_inter": lambda model: model.ffn,
    "heads": lambda model: model.heads,
    "kv_heads": lambda model: model.kv_heads,
    "head_dim": lambda model: model.head_dim,
    "vocab": lambda model: model.vocab,
    "experts": lambda model: model.experts,
    "top_k": lambda model: model.top_k,
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
            ("tokens", "num_tokens"),
            ("hidden", "n_embd"),
            ("inter", inter),
            ("heads", "n_head"),
            ("kv_heads", "n_kv_head"),
        )
    }
    divides(widths["heads"], "n_head", widths["hidden"], "n_embd")
    divides(widths["kv_heads"], "n_kv_head", widths["heads"], "n_head")
    tp = _split(whole(table, "tp"), widths)
    number_format = np.full(len(lines_of(table)), "bf16")
    if "quant" in table:
        first = np.array([str(text).strip().partition(" ")[0] for text in table["quant"].tolist()])
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
        widths={**widths, "tp": tp, "head_dim": widths["hidden"] / widths["heads"]},
    )


def _split(tp: np.ndarray, widths: Widths, at: np.ndarray | None = None) -> np.ndarray:
    """The ranks of tensor parallelism. Raises ClustersimError where they do not divide a layer."""
    divides(tp, "tp", widths["heads"], "attention heads", at)
    shares(tp, "tp", widths["kv_heads"], "KV heads", at)
    divides(tp, "tp", widths["inter"], "width of the FFN", at)
    return tp


def vllm(table: Table, file: str = "rtxpro6000_vllm_kernels") -> Profile:
    """Columns of LLMServingSim's profiles: kind, layer, model, tp, tokens. No attention, no experts."""
    at = np.flatnonzero(np.array(entries(table, "kind", _VLLM_KINDS, "kind"), dtype=bool))
    names = entries(table, "layer", VLLM, "layer", at) if len(at) else []
    widths = model_widths(table, at)
    return Profile(
        file=file,
        library="vllm",
        layer=np.array(names, dtype=str),
        gpu=gpus(table, at),
        format=np.full(len(at), "bf16"),
        measured=seconds(table, at=at),
        row=at,
        doubt=doubts(table, at),
        widths={
            **widths,
            "tp": _split(whole(table, "tp", at), widths, at),
            "tokens": whole(table, "tokens", at) if len(at) else np.zeros(0),
        },
    )


def rows_of_kind(table: Table, kind: str) -> np.ndarray:
    """int64[M] rows of that kind in LLMServingSim's profiles, column `kind`."""
    kinds = np.array(entries(table, "kind", {name: name for name in _VLLM_KINDS}, "kind"), dtype=str)
    return np.flatnonzero(kinds == kind)


def model_widths(table: Table, at: np.ndarray) -> Widths:
    """float64[M] what `_MODEL_WIDTHS` lists, of the models that column `model` names.

    Raises  ClustersimError with the line of the first that is not in the catalogue, or keeps no heads of KV
    """
    texts = [str(text).strip() for text in column(table, "model", at).tolist()] if len(at) else []
    found = {text: _model_called(text) for text in dict.fromkeys(texts)}
    for place, text in enumerate(texts):
        model = found[text]
        if model is None or model.mla is not None:
            why = not_in_catalogue("models", text) if model is None else "its attention is latent"
            raise ClustersimError(f"line {line_of(place, at)}: model = {text or 'nothing'}: {why}")
    return {
        name: np.array([float(width(model)) for text in texts if (model := found[text])])
        for name, width in _MODEL_WIDTHS.items()
    }


@cache
def _model_called(text: str) -> Model | None:
    """A model of the catalogue by its name there or on Hugging Face, whoever publishes it."""
    name = catalogue_name("models", text.rpartition("/")[2].replace(".", "_"))
    entry = None if name is None else read_catalogue("models")[name]
    return entry if isinstance(entry, Model) else None


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
