"""A Hugging Face `config.json` → the keys of `Model`.

The same word means different things in different families (`intermediate_size` is an expert's width in
Mixtral and a dense layer's in DeepSeek), so each family is read by its own entry of READERS. A key that
a family needs and the file lacks is a mistake, never a default: the defaults of the classes that read
these files are not the released models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clustersim.errors import nearest

#: Model key → its value and the key of the config that it was read from.
Read = dict[str, tuple[Any, str]]


@dataclass(frozen=True, slots=True)
class _Absent:
    """Stands for a key that is not there and has no usual value."""


_ABSENT = _Absent()


@dataclass(slots=True)
class Config:
    """The keys of one config, and what was wrong with those that were asked for.

    values    as JSON gave them
    prefix    what stands before a key in messages: "text_config." where it is nested
    problems  key and what is wrong with it
    """

    values: Mapping[str, Any]
    prefix: str = ""
    problems: list[tuple[str, str]] = field(default_factory=list)

    def wrong(self, key: str, problem: str) -> None:
        """Notes a mistake."""
        self.problems.append((self.prefix + key, problem))

    def number(self, key: str, usual: int | _Absent | None = _ABSENT, least: int = 1) -> tuple[int, str]:
        """A whole number and its key.

        usual    what the family's files mean by leaving it out or by null; none: it must be there
        """
        value = self.values.get(key)
        if value is None and not isinstance(usual, _Absent):
            return usual or 0, self.prefix + key
        if value is None:
            self.wrong(
                key, f"missing key{nearest(key, self.values)}" if key not in self.values else "is null"
            )
        elif isinstance(value, bool) or not isinstance(value, int):
            self.wrong(key, f"must be a whole number, not {_shown(value)}")
        elif value < least:
            self.wrong(key, f"must be at least {least}, not {value}")
        else:
            return value, self.prefix + key
        return 1, self.prefix + key

    def nullable(self, key: str) -> tuple[int, str]:
        """A whole number and its key; null means none, but leaving it out says nothing."""
        if key not in self.values:
            self.wrong(key, f"missing key{nearest(key, self.values)}; null means none")
        return self.number(key, usual=0, least=0)

    def flag(self, key: str, usual: bool = False) -> tuple[bool, str]:
        """A truth value and its key; `usual` where it is left out or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.wrong(key, f"must be true or false, not {_shown(value)}")
        return (value if isinstance(value, bool) else usual), self.prefix + key


def model_of(values: Mapping[str, Any]) -> tuple[Read, list[tuple[str, str]]]:
    """The model that a config describes.

    Returns  what was read, and every mistake as key and problem; with a mistake nothing read counts
    """
    config = _text_part(values)
    family = config.values.get("model_type")
    if not isinstance(family, str):
        config.wrong("model_type", f"missing key; it says which family the file is of: {', '.join(READERS)}")
        return {}, config.problems
    if family not in READERS:
        known = f"is not read{nearest(family, READERS)}; known are {', '.join(READERS)}"
        config.wrong("model_type", f'"{family}" {known}')
        return {}, config.problems
    read = _of_all(config) | READERS[family](config) | _formats(config, values)
    return read, config.problems


def _text_part(values: Mapping[str, Any]) -> Config:
    """The language model of a config with several parts, or the config itself."""
    nested = values.get("text_config")
    return Config(nested, "text_config.") if isinstance(nested, dict) else Config(values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


# --- what families have in common ----------------------------------------------------------------


def _of_all(c: Config) -> Read:
    return {
        "layers": c.number("num_hidden_layers"),
        "hidden": c.number("hidden_size"),
        "heads": c.number("num_attention_heads"),
        "vocab": c.number("vocab_size"),
        # In all of these families the head is a matrix of its own unless the file says otherwise.
        "tied_embeddings": c.flag("tie_word_embeddings"),
        "ffn_kind": ("gated", f"{c.prefix}model_type"),
    }


def _heads(c: Config, implied: bool) -> Read:
    """Key/value heads and their width.

    implied   where head_dim is left out or null, heads share the hidden width evenly
    """
    found = {"kv_heads": c.number("num_key_value_heads")}
    if not implied or c.values.get("head_dim") is not None:
        return found | {"head_dim": c.number("head_dim")}
    (hidden, _), (heads, key) = c.number("hidden_size"), c.number("num_attention_heads")
    if hidden % heads:
        c.wrong(
            "num_attention_heads", f"{heads} does not divide hidden_size {hidden}, and there is no head_dim"
        )
    return found | {"head_dim": (hidden // heads, key)}


def _latent(c: Config) -> Read:
    """Latent attention. `head_dim`, where such a file has it, is the rotated part only."""
    keys = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    mla = {"q_lora_rank": c.nullable("q_lora_rank")[0], **{key: c.number(key)[0] for key in keys}}
    return {"mla": (mla, f"{c.prefix}kv_lora_rank")}


def _routed(c: Config, experts: str, width: str) -> Read:
    """Experts by the family's own keys for their number and width."""
    return {
        "experts": c.number(experts),
        "top_k": c.number("num_experts_per_tok"),
        "ffn": c.number(width),
    }


def _led_by_dense(c: Config) -> Read:
    """Leading dense layers and shared experts, as DeepSeek and GLM write them."""
    shared = c.nullable("n_shared_experts")
    found: Read = {"shared_experts": shared, "dense_layers": c.number("first_k_dense_replace", least=0)}
    if found["dense_layers"][0]:
        found["dense_ffn"] = c.number("intermediate_size")
    if c.number("moe_layer_freq", usual=1)[0] != 1:
        c.wrong("moe_layer_freq", "only 1 is read")
    groups = c.number("n_group", usual=None)
    if groups[0] > 1:
        found |= {"expert_groups": groups, "groups_chosen": c.number("topk_group")}
    return found | {"mtp_layers": c.number("num_nextn_predict_layers", usual=0, least=0)}


def _sparse_steps(c: Config) -> Read:
    """Which layers have experts, as Qwen writes it."""
    found: Read = {"moe_layer_step": c.number("decoder_sparse_step", usual=1)}
    dense = c.values.get("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        c.wrong("mlp_only_layers", f"only leading layers are read, not {_shown(dense)}")
    elif dense:
        found["dense_layers"] = len(dense), f"{c.prefix}mlp_only_layers"
    if dense or found["moe_layer_step"][0] > 1:
        found["dense_ffn"] = c.number("intermediate_size")
    return found


def _no_window(c: Config) -> Read:
    """Qwen's files name a window that they do not use."""
    if c.flag("use_sliding_window")[0]:
        c.wrong("use_sliding_window", "is not read; only false is")
    return {}


def _window(c: Config) -> Read:
    """A window that all layers have, or null."""
    window = c.number("sliding_window", usual=None)
    return {"window": window} if window[0] else {}


def _alternating(c: Config) -> Read:
    """Layers with and without a window, by name."""
    kinds, layers = c.values.get("layer_types"), c.number("num_hidden_layers")[0]
    names = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in names for kind in kinds):
        c.wrong("layer_types", f"must name each of the {layers} layers {' or '.join(names)}")
        return {}
    if "sliding_attention" not in kinds:
        return {}
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    if any((kind == "full_attention") != bool(every and n % every == 0) for n, kind in enumerate(kinds, 1)):
        c.wrong("layer_types", "only each so-many-th layer may be of full_attention")
    return {"window": c.number("sliding_window"), "full_every": (every, f"{c.prefix}layer_types")}


# --- formats -------------------------------------------------------------------------------------

_DTYPES = {"bfloat16": "bf16", "float16": "bf16"}


def _formats(c: Config, whole: Mapping[str, Any]) -> Read:
    """Formats of the weights as released. Keys may stand beside a nested text part, too."""
    at = Config(whole, "", c.problems)
    dtypes = [(p, k) for p in (c, at) for k in ("dtype", "torch_dtype") if p.values.get(k) is not None]
    for part, key in dtypes[:1]:
        if part.values[key] not in _DTYPES:
            allowed = " and ".join(_DTYPES)
            part.wrong(key, f"{_shown(part.values[key])} is not read; {allowed} are, both as bf16")
    quantised = [p for p in (c, at) if p.values.get("quantization_config") is not None]
    return _quantised(quantised[0]) if quantised else {}


def _quantised(c: Config) -> Read:
    how, key = c.values["quantization_config"], "quantization_config"
    method = how.get("quant_method") if isinstance(how, dict) else None
    if method == "mxfp4":
        return {"expert_format": ("fp4", c.prefix + key)}
    if method in ("fp8", "fbgemm_fp8"):
        blocks = how.get("weight_block_size")
        if blocks not in (None, [128, 128]):
            c.wrong(f"{key}.weight_block_size", f"only [128, 128] is read, not {_shown(blocks)}")
        return {"format": ("fp8_block" if blocks else "fp8", c.prefix + key)}
    if method == "compressed-tensors":
        groups = how.get("config_groups")
        weights = [_weights(group) for group in groups.values()] if isinstance(groups, dict) else []
        if weights and all(one == (8, "float") for one in weights):
            return {"format": ("fp8", c.prefix + key)}
        c.wrong(f"{key}.config_groups", f"only weights of 8-bit floats are read, not {_shown(weights)}")
        return {}
    known = "fp8, fbgemm_fp8, mxfp4 and compressed-tensors"
    c.wrong(f"{key}.quant_method", f"{_shown(method)} is not read; known are {known}")
    return {}


def _weights(group: Any) -> tuple[Any, Any]:
    """Bits and type of the weights of one group of compressed tensors."""
    weights = group.get("weights") if isinstance(group, dict) else None
    return (weights.get("num_bits"), weights.get("type")) if isinstance(weights, dict) else (None, None)


# --- families ------------------------------------------------------------------------------------


def _mixtral(c: Config) -> Read:
    return _heads(c, implied=True) | _routed(c, "num_local_experts", "intermediate_size") | _window(c)


def _olmoe(c: Config) -> Read:
    norm = {"qk_norm": (True, f"{c.prefix}model_type")}
    return _heads(c, implied=True) | _routed(c, "num_experts", "intermediate_size") | norm


def _llama(c: Config) -> Read:
    return {
        **_heads(c, implied=True),
        "attention_bias": c.flag("attention_bias"),
        "dense_ffn": c.number("intermediate_size"),
    }


def _qwen3(c: Config) -> Read:
    return {
        **_heads(c, implied=False),
        **_no_window(c),
        "qk_norm": (True, f"{c.prefix}model_type"),
        "attention_bias": c.flag("attention_bias"),
        "dense_ffn": c.number("intermediate_size"),
    }


def _qwen3_moe(c: Config) -> Read:
    return {
        **_heads(c, implied=False),
        **_no_window(c),
        **_routed(c, "num_experts", "moe_intermediate_size"),
        **_sparse_steps(c),
        "qk_norm": (True, f"{c.prefix}model_type"),
        "attention_bias": c.flag("attention_bias"),
    }


def _qwen2_moe(c: Config) -> Read:
    return {
        **_heads(c, implied=True),
        **_no_window(c),
        **_routed(c, "num_experts", "moe_intermediate_size"),
        **_sparse_steps(c),
        "attention_bias": c.flag("qkv_bias", usual=True),
        "shared_experts": (1, f"{c.prefix}model_type"),
        "shared_ffn": c.number("shared_expert_intermediate_size"),
    }


def _deepseek(c: Config) -> Read:
    return _latent(c) | _routed(c, "n_routed_experts", "moe_intermediate_size") | _led_by_dense(c)


def _glm4_moe(c: Config) -> Read:
    return {
        **_heads(c, implied=False),
        **_routed(c, "n_routed_experts", "moe_intermediate_size"),
        **_led_by_dense(c),
        "qk_norm": c.flag("use_qk_norm"),
        "attention_bias": c.flag("attention_bias"),
    }


def _gpt_oss(c: Config) -> Read:
    return {
        **_heads(c, implied=False),
        **_alternating(c),
        **_routed(c, "num_local_experts", "intermediate_size"),
        "attention_bias": c.flag("attention_bias", usual=True),
    }


def _minimax_m2(c: Config) -> Read:
    routed = _routed(c, "num_local_experts", "intermediate_size")
    return _heads(c, implied=False) | routed | {"qk_norm": c.flag("use_qk_norm", usual=True)}


def _llama4(c: Config) -> Read:
    found = {
        **_heads(c, implied=False),
        **_routed(c, "num_local_experts", "intermediate_size"),
        "moe_layer_step": c.number("interleave_moe_layer_step"),
        "shared_experts": (1, f"{c.prefix}model_type"),
        "qk_norm": c.flag("use_qk_norm"),
        "attention_bias": c.flag("attention_bias"),
    }
    if found["moe_layer_step"][0] > 1:
        found["dense_ffn"] = c.number("intermediate_size_mlp")
    return found


#: model_type → how its file is read
READERS: dict[str, Callable[[Config], Read]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "minimax_m2": _minimax_m2,
    "llama4_text": _llama4,
}
